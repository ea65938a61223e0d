"""The house as CONTRIBUTING draws it: each file has a line there and imports only from lines below; public names are documented."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lossfuse

ROOT = Path(__file__).parent.parent
FOLDERS = ("lossfuse", "lossfuse/backends", "lossfuse/integrations", "kernels", "perf")
LISTED = re.findall(r"^\| `([\w/]+\.py)` \| .+ \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
FILES = sorted(f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def test_every_file_is_listed_once():
    assert sorted(LISTED) == FILES


def imported(file: str) -> set[str]:
    """Those of our files that one imports, at its top or later."""
    names = {f.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in FILES}
    names = {n if n.startswith("lossfuse") else f"lossfuse.{n}": f for n, f in names.items()}
    (own,) = (n for n, f in names.items() if f == file)
    package = own if file.endswith("__init__.py") else own.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {n if (n := f"{module}.{a.name}") in names else module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {names[n] for n in found & names.keys()} - {file}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    above = LISTED[: LISTED.index(file)]
    assert imported(file).isdisjoint(above), "imports a file listed above it"


def test_the_reference_and_the_kernels_have_few_readers():
    """Backends are judged by the reference, and one file launches kernels."""
    readers = {file: imported(file) for file in FILES if not file.startswith("kernels/")}
    assert not any("lossfuse/reference.py" in of for file, of in readers.items() if file.startswith("lossfuse/backends/"))
    assert {file for file, of in readers.items() if any(f.startswith("kernels/") for f in of)} == {"lossfuse/backends/triton.py"}


@pytest.mark.parametrize("file", [f for f in FILES if not f.endswith("backends/__init__.py")])
def test_a_file_says_what_it_is_about(file):
    assert ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", lossfuse.__all__)
def test_public_names_are_documented(name):
    """What it is; and each argument of a function by its name, there or in the docstring of a function it refers to."""
    public = getattr(lossfuse, name)
    doc = public.__doc__ or ""
    # a NamedTuple's own, or a dataclass's
    assert doc and not doc.startswith(f"{name}(")
    if inspect.isfunction(public):
        referred = [getattr(lossfuse, other).__doc__ for other in re.findall(r"``(\w+)``", doc) if other in lossfuse.__all__]
        assert [p for p in inspect.signature(public).parameters if not re.search(rf"\b{p}\b", "".join([doc, *referred]))] == []
