"""What the metadata promises is a row of the matrix, and the script tells red from green."""

import re
import sys
from pathlib import Path

import pytest

for name in ("rich", "tomllib"):
    pytest.importorskip(name)

import tomllib  # noqa: E402

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
PROMISED = floors(*PROJECT["dependencies"], *EXTRAS["triton"][:1], *EXTRAS["transformers"], *EXTRAS["perf"])


@pytest.mark.parametrize("package", PROMISED)
def test_the_oldest_version_that_is_promised_works(package):
    floor = PROMISED[package]
    assert any(version == floor or version.startswith(f"{floor}.") for version in versions(package)), floor


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
    ("came", "code"), [({"a": "works", "b": "works"}, 0), ({"a": "works", "b": "fails"}, 1), ({"a": "works"}, 1), ({}, 1)], ids=str
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
