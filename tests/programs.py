"""Programs in documents: found, and run as they stand."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple


class Program(NamedTuple):
    """A ```python block, the heading it stands under, and the line it begins at."""

    path: Path
    heading: str
    line: int
    code: str

    @property
    def missing(self) -> list[str]:
        """What its first line says to install and is not."""
        asked = re.match(r"# pip install (.*)", self.code)
        names = asked[1].split() if asked else []
        return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]

    def run(self) -> None:
        # a traceback shows the line of the document
        exec(compile("\n" * self.line + self.code, str(self.path), "exec"), {"__name__": self.heading})


def programs(path: Path) -> list[Program]:
    found, heading, begin = [], path.name, None
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        if begin is None:
            if re.match("#+ ", line):
                heading = line.lstrip("# ")
            elif line.startswith("```"):
                begin = (i + 1, line[3:])
        elif line.startswith("```"):
            if begin[1] == "python":
                found.append(Program(path, heading, begin[0], "\n".join(lines[begin[0] : i])))
            begin = None
    return found
