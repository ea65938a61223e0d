"""Every set of versions that we say works: install it, run the same tests in it, write down what
came of it.

    python tests/matrix.py --list
    python tests/matrix.py --only torch-2.8 torch-2.15 --write
    python tests/matrix.py --only triton-3.6 triton-3.9 lowest     # as CI does: no torch of its own
    python tests/matrix.py --only python-3.10 python-3.14          # as CI does: do pages install?

Needs what the extra ``dev`` installs. A row that pins torch gets a virtual environment from
nothing, for which pip downloads gigabytes unless it is shown builds for the CPU
(``PIP_EXTRA_INDEX_URL``), and is skipped where its Python is not on the PATH. A row ``python-...``
installs nothing and needs no such Python: uv resolves the pip commands of README.md and
CONTRIBUTING.md for it. Any other lies over the packages of the Python that runs this, which stay as
they are. Each is deleted before the next; ``TMPDIR`` says where they are made. ``--write`` keeps
the outcome in ``docs/compatibility.csv`` and makes the table of ``docs/compatibility.md`` of it.
"""

import argparse
import csv
import datetime
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "compatibility.csv"
PAGE = ROOT / "docs" / "compatibility.md"
TABLE = re.compile(r"(?<=<!-- rows -->\n).*?(?=<!-- end of rows -->)", re.DOTALL)
# the pages whose commands set up an environment, and what pip is given there
COMMANDS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
INSTALL = re.compile(r"^python3 -m venv .*?/pip install (.*?)(?: &&|$)", re.MULTILINE)

# what is run, by the name that rows use: arguments of pytest
CORE = "values", "functional", "errors", "autograd", "compile", "imports", "inplace", "lm_head"
SUITES: dict[str, list[str]] = {
    # Triton's interpreter takes seconds where the others take milliseconds: two files of it, two
    # ranks, and no model of transformers
    "core": [
        *(f"tests/test_{name}.py" for name in CORE),
        "tests/test_distributed.py::test_two_ranks",
        "tests/test_cross_compile.py",
        "-k",
        "not triton or test_values or test_functional",
    ],
    "kernels": [
        "tests/test_values.py",
        "tests/test_half_precision_products.py",
        "tests/test_cross_compile.py",
        "-k",
        "triton or compile",
    ],
    "models": [
        "tests/test_model_families.py",
        "tests/test_trainers.py",
        "tests/test_trainer_recipes.py",
    ],
    "perf": [
        f"tests/test_{name}.py"
        for name in ("cases", "compare", "dashboard", "estimate", "perf_rows", "properties")
    ],
}


@dataclass(frozen=True)
class Row:
    """Versions, and what is run with them."""

    name: str
    pins: tuple[str, ...]
    # "install": nothing is run, see resolved
    suite: str = "core"
    # where torch is pinned or nothing is run
    python: str = ""


TESTING = (
    "pytest>=8.4",
    "pytest-xdist>=3.6.1",
    "hypothesis>=6.100",
    "build>=1.2",
    "hatchling>=1.26",
)
ROWS = (
    # each torch with the Triton it was released with; the oldest and the newest of each are those
    # of 2026-11-21
    Row("torch-2.8", ("torch==2.8.0", "triton==3.4.0", "numpy==1.26.4"), python="3.10"),
    Row("torch-2.11", ("torch==2.11.0", "triton==3.6.0", "numpy==2.3.5"), python="3.12"),
    Row("torch-2.13", ("torch==2.13.0", "triton==3.7.1", "numpy==2.4.6"), python="3.11"),
    Row("torch-2.14", ("torch==2.14.1", "triton==3.8.0", "numpy==2.5.5"), python="3.13"),
    Row("torch-2.15", ("torch==2.15.0", "triton==3.9.0", "numpy==2.5.5"), python="3.14"),
    Row("triton-3.6", ("triton==3.6.0", "numpy==2.3.5"), suite="kernels"),
    Row("triton-3.9", ("triton==3.9.0", "numpy==2.4.6"), suite="kernels"),
    Row(
        "transformers-4.57",
        ("transformers==4.57.6", "accelerate==1.3.0", "kernels==0.9.0"),
        suite="models",
    ),
    Row("transformers-5.23", ("transformers==5.23.0", "accelerate==1.15.0"), suite="models"),
    Row(
        "lowest",
        (
            "altair==5.5.0",
            "filelock==3.0.0",
            "pandas==2.2.0",
            "rich==13.0.0",
            "tokenizers==0.20.0",
            "vl-convert-python==1.7.0",
            "numpy==1.26.4",
            "hypothesis==6.100.0",
            "pytest==8.4.0",
            "pytest-xdist==3.6.1",
        ),
        suite="perf",
    ),
    *(
        Row(f"python-{version}", (), suite="install", python=version)
        for version in ("3.10", "3.11", "3.12", "3.13", "3.14")
    ),
)
PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate")
COLUMNS = (
    "row",
    "python",
    *PACKAGES,
    "suite",
    "passed",
    "skipped",
    "failed",
    "result",
    "seconds",
    "date",
)


class NotRun(Exception):
    """Nothing came of a row; the message says why."""


@contextmanager
def environment(row: Row, console: Console) -> Iterator[str]:
    """The python of a new environment with the row's packages."""
    python = sys.executable
    if row.python:
        found = shutil.which(f"python{row.python}")
        if found is None:
            raise NotRun(f"no python{row.python} on the PATH")
        python = found
    with tempfile.TemporaryDirectory(prefix="lossfuse-matrix-") as folder:
        run([python, "-m", "venv", folder], "environment", console)
        made = os.path.join(folder, "bin", "python")
        install = [
            made,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-cache-dir",
        ]
        if row.python:
            # the package among them, so that its own ranges have a say
            run([*install, str(ROOT), *row.pins, *TESTING], "packages", console)
        else:
            # after the row's own, and seen by pip
            (site,) = Path(folder).glob("lib/python*/site-packages")
            (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
            run([*install, *row.pins], "packages", console)
        yield made


def run(
    command: Sequence[str], what: str, console: Console, *, may_fail: bool = False
) -> subprocess.CompletedProcess[str]:
    """NotRun where it fails and must not."""
    start = time.monotonic()
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    with console.status(escape(what)):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    console.print(f"  {what}: {time.monotonic() - start:.0f} s", highlight=False, markup=False)
    if done.returncode and not may_fail:
        raise NotRun(f"{what} failed:\n{done.stdout[-3000:]}")
    return done


def installs() -> list[str]:
    """The arguments of pip in the commands of the pages."""
    return [
        words for page in COMMANDS for words in INSTALL.findall(page.read_text(encoding="utf-8"))
    ]


def resolved(row: Row, console: Console) -> dict[str, str]:
    """Check that each command finds a wheel of every package for the row's Python, and return the
    versions; reads only metadata."""
    start = time.monotonic()
    uv = [sys.executable, "-m", "uv"]
    run([*uv, "--version"], "uv", console)
    versions, result = dict.fromkeys(PACKAGES, ""), "resolves"
    with tempfile.TemporaryDirectory(prefix="lossfuse-matrix-") as folder:
        # pip has --python-version too, but evaluates markers for the Python it runs on (26.3)
        install = [
            *uv,
            "pip",
            "install",
            "--dry-run",
            "--python-version",
            row.python,
            "--target",
            folder,
        ]
        # as on a machine without a compiler; lossfuse itself is a checkout
        install += ["--only-binary", ":all:", "--no-binary", "lossfuse"]
        for words in installs():
            done = run([*install, *shlex.split(words)], words, console, may_fail=True)
            if done.returncode:
                console.print(done.stdout[-3000:], highlight=False, markup=False)
                result = "fails"
            found = dict(re.findall(r"^ \+ (\S+)==(\S+)$", done.stdout, re.MULTILINE))
            versions |= {name: found[name] for name in PACKAGES if name in found}
    made = {
        "row": row.name,
        "python": row.python,
        "suite": row.suite,
        "passed": "",
        "skipped": "",
        "failed": "",
        "result": result,
    }
    return (
        versions
        | made
        | {"seconds": f"{time.monotonic() - start:.0f}", "date": datetime.date.today().isoformat()}
    )


VERSIONS = f"""
import importlib.metadata, json, platform
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return ""
found = {{name: version(name) for name in {PACKAGES}}}
print(json.dumps({{"python": platform.python_version()}} | found))
"""


def outcome(row: Row, console: Console) -> dict[str, str]:
    """Of one row, by column."""
    start = time.monotonic()
    with environment(row, console) as python, tempfile.TemporaryDirectory() as folder:
        versions = json.loads(
            run([python, "-c", VERSIONS], "versions", console).stdout.splitlines()[-1]
        )
        report = os.path.join(folder, "report.xml")
        # of other versions' warnings nothing is known
        pytest = [
            python,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "-p",
            "no:cacheprovider",
            "-o",
            "filterwarnings=",
            f"--junitxml={report}",
        ]
        done = run([*pytest, *SUITES[row.suite]], "tests", console, may_fail=True)
        if not os.path.exists(report):
            raise NotRun(f"pytest did not finish:\n{done.stdout[-3000:]}")
        counts, failed, reasons = counted(report)
        for name in failed:
            console.print(f"  failed: {name}", highlight=False, markup=False)
        for reason, n in reasons.most_common():
            console.print(f"  skipped {n}: {reason}", highlight=False, markup=False)
        if done.returncode:
            console.print(done.stdout[-20000:], highlight=False, markup=False)
    result = "works" if done.returncode == 0 and counts["passed"] else "fails"
    made = {
        "row": row.name,
        "suite": row.suite,
        "result": result,
        "seconds": f"{time.monotonic() - start:.0f}",
    }
    when = {"date": datetime.date.today().isoformat()}
    return versions | made | when | {name: str(n) for name, n in counts.items()}


def counted(report: str) -> tuple[Counter[str], list[str], Counter[str]]:
    """How many passed, were skipped and failed, which failed, and why some were skipped, of a
    report of pytest."""
    counts, failed, reasons = Counter({"passed": 0, "skipped": 0, "failed": 0}), [], Counter[str]()
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if kinds.keys() & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            counts["skipped"] += 1
            reasons[str(kinds["skipped"].get("message"))] += 1
        else:
            counts["passed"] += 1
    return counts, failed, reasons


def read() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(new: Sequence[dict[str, str]]) -> None:
    """Rows of the same name are replaced; the page shows them all, in the order of ``ROWS``."""
    order = [row.name for row in ROWS]
    rows = {row["row"]: row for row in (*read(), *new) if row["row"] in order}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(sorted(rows.values(), key=lambda row: order.index(row["row"])))
    RESULTS.write_text(text.getvalue(), encoding="utf-8")
    PAGE.write_text(
        TABLE.sub(lambda _: page_table(read()), PAGE.read_text(encoding="utf-8")), encoding="utf-8"
    )


def page_table(rows: Sequence[dict[str, str]]) -> str:
    shown = [name for name in COLUMNS if name != "seconds"]
    lines = [shown, ["---"] * len(shown), *([row[name] for name in shown] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def listed(console: Console) -> None:
    known = {row["row"]: row for row in read()}
    table = Table("row", "python", "pins", "tests", "last outcome")
    for row in ROWS:
        last = known.get(row.name)
        passed = f", {last['passed']} passed" if last and last["passed"] else ""
        said = f"{last['result']}{passed}, {last['date']}" if last else ""
        table.add_row(row.name, row.python or "this one", "\n".join(row.pins), row.suite, said)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ROW",
        choices=[row.name for row in ROWS],
        help="all of them otherwise",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"keep what came of it in {RESULTS.name} and {PAGE.name}",
    )
    asked = parser.parse_args()
    console = Console(soft_wrap=True)
    if asked.list:
        listed(console)
        return 0
    table = Table(
        "row",
        "python",
        "torch",
        "triton",
        "numpy",
        "passed",
        "skipped",
        "failed",
        "result",
        title="compatibility",
    )
    for column in (table.columns[0], table.columns[-1]):
        column.no_wrap = True
    done, missing = [], []
    for row in ROWS:
        if asked.only and row.name not in asked.only:
            continue
        console.print(f"[bold]{row.name}[/bold]: {', '.join(row.pins)}", highlight=False)
        try:
            made = resolved(row, console) if row.suite == "install" else outcome(row, console)
        except NotRun as why:
            console.print(str(why), highlight=False, markup=False)
            missing.append(row.name)
            table.add_row(row.name, row.python, *[""] * 6, "not run")
            continue
        done.append(made)
        table.add_row(*(made[str(column.header)] for column in table.columns))
        if asked.write:
            write([made])
    console.print(table)
    # a row that was asked for by name must have run
    return int(
        any(made["result"] == "fails" for made in done) or bool(asked.only and missing) or not done
    )


if __name__ == "__main__":
    sys.exit(main())
