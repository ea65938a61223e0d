"""The layers and walks of CONTRIBUTING: imports point down, without cycles, and steps name what
exists; public names are documented."""

import ast
import graphlib
import inspect
import re
from pathlib import Path

import lossfuse

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# from top to bottom, a row of the table each: folders and files
LAYERS = [
    re.findall(r"`([\w/.]+)`", names)
    for names in re.findall(r"^\| (`.+`) \| .+ \|$", CONTRIBUTING, re.M)
]
# file and names of each step
STEPS = re.findall(r"^\d\. `([\w/]+\.py)` ((?:`[\w.]+`(?:, )?)+):", CONTRIBUTING, re.M)
FOLDERS = [
    "perf",
    "kernels",
    "lossfuse",
    *(f"lossfuse/{init.parent.name}" for init in (ROOT / "lossfuse").glob("*/__init__.py")),
]
FILES = sorted(
    f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")
)


def layers_of(file: str) -> list[int]:
    return [
        i
        for i, names in enumerate(LAYERS)
        if file in names or f"{file.rpartition('/')[0]}/" in names
    ]


def imported(file: str) -> set[str]:
    """The files of this repository that a file imports, at its top or later."""
    names = {f.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in FILES}
    names = {n if n.startswith("lossfuse") else f"lossfuse.{n}": f for n, f in names.items()}
    (own,) = (n for n, f in names.items() if f == file)
    package = own if file.endswith("__init__.py") else own.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                if node.level
                else ""
            )
            module = ".".join(part for part in (base, node.module) if part)
            found |= {n if (n := f"{module}.{a.name}") in names else module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {names[n] for n in found & names.keys()} - {file}


IMPORTS = {file: imported(file) for file in FILES}


def test_every_file_is_in_one_layer():
    assert {file: layers for file in FILES if len(layers := layers_of(file)) != 1} == {}


def test_imports_point_down():
    pairs = {(file, other) for file in FILES for other in IMPORTS[file]}
    assert {(a, b) for a, b in pairs if layers_of(b) < layers_of(a)} == set()


def test_no_file_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_steps_of_the_walks_name_functions_that_exist():
    missing = []
    for file, names in STEPS:
        defined = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inner = (
                    [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                    if isinstance(node, ast.ClassDef)
                    else []
                )
                defined |= {node.name, *(f"{node.name}.{name}" for name in inner)}
        missing += [
            f"{file}: {name}" for name in re.findall(r"`([\w.]+)`", names) if name not in defined
        ]
    assert missing == []
    assert len(STEPS) == len(re.findall(r"^\d\. ", CONTRIBUTING, re.M))


def test_the_reference_and_the_kernels_have_few_readers():
    """Backends are judged by the reference, and one file launches kernels."""
    assert not any(
        "lossfuse/reference.py" in IMPORTS[file]
        for file in FILES
        if file.startswith("lossfuse/backends/")
    )
    launching = {
        file
        for file in FILES
        if not file.startswith("kernels/") and any(f.startswith("kernels/") for f in IMPORTS[file])
    }
    assert launching == {"lossfuse/backends/triton.py"}


def test_every_file_says_what_it_is_about():
    assert [
        file
        for file in FILES
        if not ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    ] == []


def test_public_names_and_their_arguments_are_documented():
    """Arguments there, or in the docstring of a function that it refers to."""
    for name in lossfuse.__all__:
        public = getattr(lossfuse, name)
        doc = public.__doc__ or ""
        # a NamedTuple's own, or a dataclass's
        assert doc and not doc.startswith(f"{name}("), name
        if not inspect.isfunction(public):
            continue
        others = [o for o in re.findall(r"``(\w+)``", doc) if o in lossfuse.__all__]
        text = "".join([doc, *(getattr(lossfuse, other).__doc__ for other in others)])
        named = [p for p in inspect.signature(public).parameters if re.search(rf"\b{p}\b", text)]
        assert named == [*inspect.signature(public).parameters], name
