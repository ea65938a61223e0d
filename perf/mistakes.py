"""The error for wrong arguments."""


class Mistake(ValueError):
    """A wrong argument or file; the command line prints the message and exits with code 2."""
