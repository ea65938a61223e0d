"""Programs in documents: found, and run as they stand.

    torchrun --nproc-per-node 2 tests/programs.py PAGE          # all programs of a page, one after
    the other

Each of them makes and destroys its process group, as it does when it is started alone.
"""

import importlib.util
import os
import re
import sys
from functools import partial
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
        """The packages that its first line asks for and that are not installed."""
        asked = re.match(r"# pip install (.*)", self.code)
        names = asked[1].split() if asked else []
        return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]

    def run(self) -> None:
        # a traceback shows the line of the document
        exec(
            compile("\n" * self.line + self.code, str(self.path), "exec"),
            {"__name__": self.heading},
        )


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


def main() -> None:
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    make = dist.init_process_group
    # torchrun's store keeps the keys of one group when the next is made
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    for program in programs(Path(sys.argv[1])):
        if not program.missing:
            dist.init_process_group = partial(
                make, store=dist.PrefixStore(program.heading, store), rank=rank, world_size=ranks
            )
            program.run()
            assert not dist.is_initialized(), (
                f"{program.heading}: the process group is not destroyed"
            )
            print(f"ran: {program.heading}", flush=True)


if __name__ == "__main__":
    main()
