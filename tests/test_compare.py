"""Two sets of rows: a ratio where it means something, a refusal where it does not."""

import pytest

for name in ("pandas", "filelock", "rich"):
    pytest.importorskip(name)

from lossfuse.perf import compare  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.compare import Incomparable, select  # noqa: E402
from lossfuse.perf.rows import append  # noqa: E402


def row(commit, ms, spread=0.01, **changes):
    return {
        "case": "llama2",
        "op": "logits",
        "mode": "no_grad",
        "dtype": "bf16",
        "n": 4,
        "v": 8,
        "method": "lossfuse",
        "status": "ok",
        "ms_p50": ms,
        "ms_p20": ms * (1 - spread),
        "ms_p80": ms * (1 + spread),
        "peak_extra_bytes": 1 << 20,
        "device": "H100",
        "commit": commit,
        "dirty": False,
        "tests": "passed",
        "date": f"2026-01-0{ord(commit[0]) - 96}",
    } | changes


def sides(tmp_path, *rows):
    path = tmp_path / "rows.csv"
    append(path, list(rows))
    return select(f"{path}@aaaa"), select(f"{path}@bbbb")


def test_a_difference_beyond_the_spread_is_a_ratio(tmp_path):
    both = compare.compare(
        *sides(
            tmp_path,
            row("aaaa", 2.0),
            row("bbbb", 1.0),
            row("aaaa", 2.0, mode="forward"),
            row("bbbb", 2.01, mode="forward"),
        )
    )
    assert both["faster"].tolist()[0] == pytest.approx(2.0) and both["faster"].isna().tolist() == [
        False,
        True,
    ]
    assert both["verdict"].tolist() == ["", "within the spread"]


def test_a_wide_spread_hides_a_difference(tmp_path):
    both = compare.compare(*sides(tmp_path, row("aaaa", 2.0, spread=0.5), row("bbbb", 1.5)))
    assert both["verdict"].tolist() == ["within the spread"]


def test_a_failure_is_told_and_has_no_ratio(tmp_path):
    gone = {"ms_p50": None, "ms_p20": None, "ms_p80": None, "status": "wrong", "note": "loss"}
    both = compare.compare(*sides(tmp_path, row("aaaa", 2.0), row("bbbb", 1.0, **gone)))
    assert both["faster"].isna().all() and both["verdict"].tolist() == ["ok -> wrong"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dirty": True}, "uncommitted changes on bbbb"),
        ({"tests": "failed"}, "tests failed"),
        ({"device": "A100"}, r"differ in device: \['H100'\] and \['A100'\]"),
        ({"settings": "OMP_NUM_THREADS=1"}, "differ in settings"),
        ({"case": "llama3"}, "nothing in common|in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, says):
    with pytest.raises(Incomparable, match=says):
        compare.compare(*sides(tmp_path, row("aaaa", 2.0), row("bbbb", 1.0, **changes)))


def test_the_newest_commit_is_taken_and_an_unknown_one_refused(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, [row("bbbb", 1.0), row("aaaa", 2.0), row("aaab", 2.0)])
    assert set(select(str(path))["commit"]) == {"bbbb"}
    with pytest.raises(Incomparable, match="no rows of commit 'cccc'"):
        select(f"{path}@cccc")
    with pytest.raises(Incomparable, match="2 commits that begin with 'aaa'"):
        select(f"{path}@aaa")


def test_the_last_run_of_a_commit_counts(tmp_path):
    a, b = sides(tmp_path, row("aaaa", 9.0), row("aaaa", 2.0, date="2026-01-05"), row("bbbb", 1.0))
    assert a["ms_p50"].tolist() == [2.0] and len(compare.compare(a, b)) == 1


def test_the_command_prints_the_table(tmp_path, capsys):
    sides(tmp_path, row("aaaa", 2.0), row("bbbb", 1.0))
    assert main(["compare", f"{tmp_path}/rows.csv@aaaa", f"{tmp_path}/rows.csv"]) == 0
    printed = capsys.readouterr().out
    assert "2.00" in printed and "at bbbb" in printed and "tests passed" in printed
