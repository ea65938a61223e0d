"""The command line of lossfuse.perf in this process; skips where its packages are missing."""

import pytest

for name in ("altair", "filelock", "pandas", "rich", "tokenizers", "vl_convert"):
    pytest.importorskip(name)

from lossfuse.perf.__main__ import main  # noqa: E402


def perf(command, *paths):
    """The exit code of a command; ``paths`` follow its words."""
    try:
        return main([*command.split(), *map(str, paths)])
    except SystemExit as exit:
        return exit.code


def words(text):
    """The text without line breaks, wherever a table or a console put them."""
    return " ".join(text.split())
