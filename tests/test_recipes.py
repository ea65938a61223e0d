"""Every program in our documents runs as it stands, and a recipe notices when what it calls is wrong."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import lossfuse

ROOT = Path(__file__).parent.parent
RECIPES, README = ROOT / "docs" / "recipes.md", ROOT / "README.md"
# what a recipe may call
FUNCTIONS = [name for name in lossfuse.__all__ if "cross_entropy" in name]


class Block(NamedTuple):
    """A block of Python under the heading it is found under, with the line it begins at."""

    path: Path
    heading: str
    line: int
    code: str

    def run(self) -> None:
        # a traceback shows the line of the document
        code = compile("\n" * self.line + self.code, str(self.path), "exec")
        exec(code, {"__name__": self.heading})


def blocks(path: Path, text: str) -> list[Block]:
    found, heading, opened = [], path.name, None
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if opened is None:
                opened = (i + 1, line[3:].strip())
            else:
                start, language = opened
                if language == "python":
                    found.append(Block(path, heading, start, "\n".join(lines[start:i])))
                opened = None
        elif opened is None and re.match("#+ ", line):
            heading = line.lstrip("# ")
    return found


def programs(path: Path) -> list[Any]:
    """None where the document is not there, which is a failure of its own."""
    found = blocks(path, path.read_text(encoding="utf-8")) if path.exists() else []
    return [pytest.param(block, id=block.heading) for block in found]


@pytest.mark.parametrize(("path", "count"), [(RECIPES, 8), (README, 3)], ids=["recipes", "README"])
def test_the_document_is_there_with_its_programs(path, count):
    assert path.exists(), f"{path.relative_to(ROOT)} is missing, so none of its programs is tested"
    assert len(programs(path)) >= count


@pytest.mark.parametrize("block", programs(RECIPES))
def test_a_recipe_runs(block):
    block.run()


@pytest.mark.parametrize("block", programs(README))
def test_an_example_runs(block):
    block.run()


def off(value: Any) -> Any:
    """A hundredth too large, and its gradient with it; a whole number by one."""
    if isinstance(value, lossfuse.LossStats):
        return lossfuse.LossStats(*map(off, value))
    if not isinstance(value, torch.Tensor):
        return value
    return value * 1.01 if value.is_floating_point() else value + 1


@pytest.mark.parametrize("block", programs(RECIPES))
def test_a_recipe_notices_a_wrong_result(block, monkeypatch):
    for name in FUNCTIONS:
        right = getattr(lossfuse, name)
        monkeypatch.setattr(lossfuse, name, lambda *args, right=right, **options: off(right(*args, **options)))
    with pytest.raises(AssertionError):
        block.run()


def test_blocks_are_found_and_a_wrong_one_fails_at_its_line():
    text = "# One\n\n```sh\n# no heading\n```\n\n```python\nx = 1\n```\n\n## Two\n\n```python\ny = 2\nassert y == 3\n```\n"
    one, two = blocks(README, text)
    assert (one.heading, one.code, two.heading) == ("One", "x = 1", "Two")
    one.run()
    with pytest.raises(AssertionError) as caught:
        two.run()
    assert caught.traceback[-1].lineno + 1 == text.splitlines().index("assert y == 3") + 1
    with pytest.raises(NameError):
        # nothing is left of another block
        Block(README, "Three", 0, "x").run()
