"""Every program in our documents runs as it stands, and a recipe notices when what it calls is
wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lossfuse
from programs import programs

ROOT = Path(__file__).parent.parent
RECIPES, README = ROOT / "docs" / "recipes.md", ROOT / "README.md"
# what a recipe may call
FUNCTIONS = [name for name in lossfuse.__all__ if "cross_entropy" in name]


def cases(path: Path) -> list[Any]:
    """None where the document is not there, which is a failure of its own."""
    return [
        pytest.param(program, id=program.heading)
        for program in (programs(path) if path.exists() else [])
    ]


@pytest.mark.parametrize(("path", "count"), [(RECIPES, 8), (README, 3)], ids=["recipes", "README"])
def test_the_document_is_there_with_its_programs(path, count):
    assert path.exists(), f"{path.relative_to(ROOT)} is missing, so none of its programs is tested"
    assert len(cases(path)) >= count


@pytest.mark.parametrize("program", cases(RECIPES))
def test_a_recipe_runs(program):
    program.run()


@pytest.mark.parametrize("program", cases(README))
def test_an_example_runs(program):
    program.run()


def off(value: Any) -> Any:
    """A hundredth too large, and its gradient with it; a whole number by one."""
    if isinstance(value, lossfuse.LossStats):
        return lossfuse.LossStats(*map(off, value))
    if not isinstance(value, torch.Tensor):
        return value
    return value * 1.01 if value.is_floating_point() else value + 1


@pytest.mark.parametrize("program", cases(RECIPES))
def test_a_recipe_notices_a_wrong_result(program, monkeypatch):
    for name in FUNCTIONS:
        right = getattr(lossfuse, name)
        monkeypatch.setattr(
            lossfuse, name, lambda *args, right=right, **options: off(right(*args, **options))
        )
    with pytest.raises(AssertionError):
        program.run()


def test_programs_are_found_and_a_wrong_one_fails_at_its_line(tmp_path):
    document = tmp_path / "document.md"
    text = (
        "# One\n\n```sh\n# no heading\n```\n\n```python\nx = 1\n```\n\n"
        "## Two\n\n```python\ny = 2\nassert y == 3\n```\n"
    )
    document.write_text(text, encoding="utf-8")
    one, two = programs(document)
    assert (one.heading, one.code, two.heading) == ("One", "x = 1", "Two")
    one.run()
    with pytest.raises(AssertionError) as caught:
        two.run()
    assert caught.traceback[-1].lineno + 1 == text.splitlines().index("assert y == 3") + 1
    with pytest.raises(NameError):
        # nothing is left of another program
        one._replace(code="x").run()
