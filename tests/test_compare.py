"""Two sets of rows: a ratio beyond the spread, a refusal where a ratio would mislead."""

import pytest

from perf_commands import perf  # isort: skip
from fake_rows import row as full_row
from lossfuse.perf import compare
from lossfuse.perf.compare import Incomparable, select
from lossfuse.perf.rows import append


def row(commit, ms, spread=0.01, **changes):
    times = {"ms_p50": ms, "ms_p20": ms * (1 - spread), "ms_p80": ms * (1 + spread)}
    when = {"commit": commit, "date": f"2026-01-0{ord(commit[0]) - 96}"}
    return full_row(**times | when | changes)


@pytest.fixture
def sides(tmp_path):
    def sides(*rows):
        append(tmp_path / "rows.csv", list(rows))
        return [select(f"{tmp_path}/rows.csv@{commit}") for commit in ("aaaa", "bbbb")]

    return sides


BROKEN = {"ms_p50": None, "ms_p20": None, "ms_p80": None, "status": "wrong", "note": "loss"}


@pytest.mark.parametrize(
    ("a", "b", "faster", "verdict"),
    [
        (row("aaaa", 2.0), row("bbbb", 1.0), 2.0, ""),
        (row("aaaa", 2.0), row("bbbb", 2.01), None, "within the spread"),
        (row("aaaa", 2.0, spread=0.5), row("bbbb", 1.5), None, "within the spread"),
        (row("aaaa", 2.0), row("bbbb", 1.0, **BROKEN), None, "ok -> wrong"),
    ],
)
def test_only_a_difference_beyond_the_spread_is_a_ratio(sides, a, b, faster, verdict):
    (both,) = compare.compare(*sides(a, b)).to_dict("records")
    assert both["verdict"] == verdict
    assert both["faster"] == pytest.approx(faster or float("nan"), nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dirty": True}, "uncommitted changes on bbbb"),
        ({"tests": "failed"}, "tests failed"),
        ({"device": "A100"}, r"differ in device: \['NVIDIA.*'\] and \['A100'\]"),
        ({"settings": "OMP_NUM_THREADS=1"}, "differ in settings"),
        ({"case": "llama3"}, "in common"),
    ],
)
def test_misleading_comparisons_are_refused(sides, changes, message):
    with pytest.raises(Incomparable, match=message):
        compare.compare(*sides(row("aaaa", 2.0), row("bbbb", 1.0, **changes)))


def test_the_newest_commit_is_selected_and_its_last_run(tmp_path, sides):
    a, _ = sides(row("aaaa", 9.0), row("aaaa", 2.0, date="2026-01-05"), row("bbbb", 1.0))
    assert a["ms_p50"].tolist() == [2.0]
    path = tmp_path / "more.csv"
    append(path, [row("bbbb", 1.0), row("aaaa", 2.0), row("aaab", 2.0)])
    assert set(select(str(path))["commit"]) == {"bbbb"}
    for commit, message in (("cccc", "no rows of commit 'cccc'"), ("aaa", "2 commits that begin")):
        with pytest.raises(Incomparable, match=message):
            select(f"{path}@{commit}")


def test_the_command_prints_a_table(tmp_path, capsys, sides):
    sides(row("aaaa", 2.0), row("bbbb", 1.0))
    assert perf("compare", f"{tmp_path}/rows.csv@aaaa", f"{tmp_path}/rows.csv") == 0
    printed = capsys.readouterr().out
    assert "2.00" in printed and "at bbbb" in printed and "tests passed" in printed
