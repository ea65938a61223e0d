"""Rows of measurements: they come back as they went in, no writer loses another's, and a foreign
file is a sentence."""

import multiprocessing

import pytest

for name in ("pandas", "filelock"):
    pytest.importorskip(name)

from lossfuse.perf import rows  # noqa: E402
from lossfuse.perf.rows import BadRows, append, read  # noqa: E402


def row(**changes):
    made = dict.fromkeys(rows.COLUMNS) | {
        "schema": rows.VERSION,
        "case": "llama2",
        "op": "logits",
        "mode": "no_grad",
        "dtype": "bf16",
        "n": 4,
        "v": 8,
        "method": 'a,"b"\nc',
        "status": "ok",
        "note": "",
        "ms_p50": 1.25,
        "dirty": False,
        "tests": "passed",
        "date": "2026-01-01",
    }
    return made | changes


def test_rows_come_back_typed(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    append(path, [row(), row(d=16, dirty=True, commit="12e4")])
    append(path, [row(ms_p50=None, status="failed", note="none")])
    frame = read([path])
    assert list(frame.columns) == list(rows.COLUMNS)
    assert frame["method"].tolist() == ['a,"b"\nc'] * 3
    assert frame["dirty"].tolist() == [False, True, False] and frame["dirty"].dtype == bool
    # a commit that looks like a number stays a commit
    assert frame["commit"].tolist() == ["", "12e4", ""]
    assert frame["d"].isna().tolist() == [True, False, True] and frame["n"].dtype == "int64"
    assert frame["ms_p50"].isna().tolist() == [False, False, True]
    assert frame["note"].tolist() == ["", "", "none"]


def test_no_files_are_no_rows():
    assert len(read([])) == 0 and list(read([]).columns) == list(rows.COLUMNS)


def test_a_file_without_a_last_newline_grows_by_whole_lines(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, [row()])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append(path, [row()])
    assert len(read([path])) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1,2\n", r"has columns \['a', 'b'\] and lacks columns"),
        (",".join(rows.COLUMNS) + ",extra\n" + "," * len(rows.COLUMNS) + "\n", "schema"),
        (",".join([*rows.COLUMNS, "extra"]) + "\n", r"has columns \['extra'\]$"),
        (",".join(reversed(rows.COLUMNS)) + "\n", "another order"),
        (",".join(rows.COLUMNS) + "\n1" + "," * (len(rows.COLUMNS) - 1) + "\n", "rows of schema 1"),
        (
            ",".join(rows.COLUMNS) + f"\n{rows.VERSION}" + ",x" * (len(rows.COLUMNS) - 1) + "\n",
            "column 'n' that is not an integer",
        ),
        ("\x00\x01\xff", "is not a CSV file|has columns"),
        ('"', "is not a CSV file|has columns"),
    ],
)
def test_a_file_that_is_not_ours_is_a_sentence_and_stays_as_it_is(tmp_path, content, says):
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode("latin-1"))
    for use in (lambda: read([path]), lambda: append(path, [row()])):
        with pytest.raises(BadRows, match=says) as caught:
            use()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content.encode("latin-1")


def test_unknown_columns_and_statuses_are_refused(tmp_path):
    with pytest.raises(BadRows, match=r"columns \['speed'\]"):
        append(tmp_path / "rows.csv", [row(speed=1)])
    with pytest.raises(BadRows, match=r"status \['fine'\]"):
        append(tmp_path / "rows.csv", [row(status="fine")])
    assert not (tmp_path / "rows.csv").exists()


def test_where_nothing_can_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRows, match="cannot be written"):
        append(tmp_path / "file" / "rows.csv", [])
    with pytest.raises(BadRows, match="does not exist"):
        read([tmp_path / "absent.csv"])
    with pytest.raises(BadRows, match="cannot be read"):
        read([tmp_path])


def test_a_crash_while_writing_leaves_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    append(path, [row()])
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        append(path, [row()])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def _write(path, writer):
    for i in range(5):
        append(path, [row(case=f"{writer}.{i}")])


@pytest.mark.slow
def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "rows.csv"
    writers = [
        multiprocessing.get_context("spawn").Process(target=_write, args=(path, i))
        for i in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
        assert writer.exitcode == 0
    assert sorted(read([path])["case"]) == sorted(f"{w}.{i}" for w in range(3) for i in range(5))
