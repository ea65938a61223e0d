"""docs/promises.md names tests that exist, and every test of test_promises.py."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
PROMISES = "tests/test_promises.py"
NAMED = [
    (file.rstrip(":") or PROMISES, name)
    for file, name in re.findall(r"`(tests/test_\w+\.py::)?((?:Test\w+::)?test_\w+)`", TABLE)
]


def collected_in(file):
    """As pytest collects them: functions of a module, methods of its classes."""
    found = []
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        inner = (
            node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else [node]
        )
        prefix = "" if inner == [node] else f"{node.name}::"
        found += [
            prefix + f.name
            for f in inner
            if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")
        ]
    return found


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_is_named_exists(file):
    assert {name for of, name in NAMED if of == file} <= {*collected_in(file)}


def test_every_promise_is_in_the_table():
    assert {*collected_in(PROMISES)} == {name for file, name in NAMED if file == PROMISES}


def test_every_line_of_a_table_names_its_test():
    lines = [
        line
        for line in TABLE.splitlines()
        if line.startswith("|") and not re.match(r"\|(---|.*\| test \|$)", line)
    ]
    assert len(lines) > 40 and all("test_" in line.split("|")[-2] for line in lines)
