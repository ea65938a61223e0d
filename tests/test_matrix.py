"""Versions in the metadata are rows of the matrix, and the script tells red from green."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

for name in ("rich", "tomllib"):
    pytest.importorskip(name)

import tomllib  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from rich.console import Console  # noqa: E402

import matrix  # noqa: E402

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="red"><failure message="no"/></testcase>
<testcase classname="a" name="broken"><error message="no"/></testcase>
<testcase classname="a" name="absent"><skipped message="none here"/></testcase>
</testsuite></testsuites>"""


def floors(*requirements):
    """{package: the oldest version asked for, to as many parts as are said}"""
    found = [re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements]
    return {match[1]: match[2] for match in found if match}


def versions(package):
    """That rows pin which have been run and work."""
    work = {row["row"] for row in matrix.read() if row["result"] == "works"}
    pins = [pin.split("==") for row in matrix.ROWS if row.name in work for pin in row.pins]
    return [version for name, version in pins if name == package]


EXTRAS = PROJECT["optional-dependencies"]
PROMISED = floors(
    *PROJECT["dependencies"], *EXTRAS["triton"][:1], *EXTRAS["transformers"], *EXTRAS["perf"]
)


@pytest.mark.parametrize("package", PROMISED)
def test_the_oldest_version_that_is_promised_works(package):
    floor = PROMISED[package]
    assert any(
        version == floor or version.startswith(f"{floor}.") for version in versions(package)
    ), floor


OLDEST, NEWEST = map(
    int,
    re.search(
        r"\| Python \| 3\.(\d+) \| 3\.(\d+) \|", matrix.PAGE.read_text(encoding="utf-8")
    ).groups(),
)
PYTHONS = [f"3.{minor}" for minor in range(OLDEST, NEWEST + 1)]
INSTALLS = [row for row in matrix.ROWS if row.suite == "install"]


def test_every_promised_python_can_install_what_the_pages_tell_people_to():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert [row.python for row in INSTALLS] == PYTHONS
    assert {row.name for row in INSTALLS} <= {
        row["row"] for row in matrix.read() if row["result"] == "resolves"
    }
    ci = ROOT / ".ci" / "run"
    if ci.exists():
        assert all(row.name in ci.read_text(encoding="utf-8").split() for row in INSTALLS)


def test_what_pip_is_given_is_read_from_the_pages():
    assert [
        re.fullmatch(r"-c constraints\.txt -e '\.\[(\w+)\]'", words)[1]
        for words in matrix.installs()
    ] == ["perf", "test", "dev"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_has_one_pin(python):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    here = Counter(
        pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)
    )
    several = {name for name, n in Counter(pin.name for pin in pins).items() if n > 1}
    assert set(here.values()) == {1} and several <= here.keys()


@pytest.mark.parametrize(("status", "result"), [(0, "resolves"), (1, "fails")])
def test_a_command_that_cannot_be_resolved_is_red(monkeypatch, status, result):
    def run(command, what, console, *, may_fail=False):
        return subprocess.CompletedProcess(
            command,
            status if what == matrix.installs()[-1] else 0,
            "Would install\n + torch==2.13.0\n",
        )

    monkeypatch.setattr(matrix, "run", run)
    made = matrix.resolved(INSTALLS[0], Console())
    assert (
        made["result"] == result
        and made["torch"] == "2.13.0"
        and made.keys() == set(matrix.COLUMNS)
    )


def test_the_page_shows_the_rows():
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.TABLE.search(page)[0] == matrix.page_table(matrix.read())


def test_a_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    counts, failed, reasons = matrix.counted(str(report))
    assert counts == {"passed": 1, "skipped": 1, "failed": 2}
    assert failed == ["a::red", "a::broken"]
    assert reasons == {"none here": 1}


@pytest.mark.parametrize(
    ("came", "code"),
    [
        ({"a": "works", "b": "resolves"}, 0),
        ({"a": "works", "b": "fails"}, 1),
        ({"a": "works"}, 1),
        ({}, 1),
    ],
    ids=str,
)
def test_green_is_for_rows_that_ran(monkeypatch, capsys, came, code):
    def outcome(row, console):
        if row.name not in came:
            raise matrix.NotRun("no such python on the PATH")
        return dict.fromkeys(matrix.COLUMNS, "1") | {"row": row.name, "result": came[row.name]}

    monkeypatch.setattr(matrix, "ROWS", (matrix.Row("a", ()), matrix.Row("b", ())))
    monkeypatch.setattr(matrix, "outcome", outcome)
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--only", "a", "b"])
    assert matrix.main() == code
    said = capsys.readouterr().out
    assert ("not run" in said) == (len(came) < 2)
