"""What a user asked for and cannot have."""


class Mistake(ValueError):
    """Its message is a sentence for whoever typed the command; the command line prints it and exits
    with code 2."""
