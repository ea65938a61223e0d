"""Files of rows and results: typed, append-only, written atomically, and safe with foreign text."""

import multiprocessing
import os
import stat

import pytest

from perf_commands import perf  # isort: skip
from fake_rows import row as full_row
from lossfuse.perf import rows
from lossfuse.perf.rows import BadRows, append, read, write_atomically

COLUMNS = ",".join(rows.COLUMNS)


def row(**changes):
    few = {"n": 12345, "v": 8, "ms_p50": 1.25, "commit": "", "method": 'a,"b"\nc'}
    return full_row(**few | changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.csv"


def test_rows_come_back_typed(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    append(path, [row(), row(d=16, dirty=True, commit="12e4")])
    append(path, [row(ms_p50=None, status="failed", note="none")])
    frame = read([path])
    assert list(frame.columns) == list(rows.COLUMNS) == list(read([]).columns)
    assert frame["method"].tolist() == ['a,"b"\nc'] * 3
    assert frame["dirty"].tolist() == [False, True, False] and frame["dirty"].dtype == bool
    # a commit like a number stays text
    assert frame["commit"].tolist() == ["", "12e4", ""]
    assert frame["d"].isna().tolist() == [True, False, True] and frame["n"].dtype == "int64"
    assert frame["ms_p50"].isna().tolist() == [False, False, True]
    assert frame["note"].tolist() == ["", "", "none"]


SAVED_BY_OTHERS = {
    "no last newline": lambda content: content.rstrip(b"\n"),
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("how", SAVED_BY_OTHERS)
def test_a_file_that_an_editor_saved_is_read_and_extended(path, how):
    append(path, [row(case="é"), row(case="b", method="x")])
    path.write_bytes(SAVED_BY_OTHERS[how](path.read_bytes()))
    append(path, [row(case="c")])
    assert read([path])["case"].tolist() == ["é", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", r"has columns \['a', 'b'\] and lacks columns"),
        (f"{COLUMNS},extra\n{',' * len(rows.COLUMNS)}\n", "schema"),
        (f"{COLUMNS},extra\n", r"has columns \['extra'\]$"),
        (",".join(reversed(rows.COLUMNS)) + "\n", "another order"),
        (f"{COLUMNS}\n1{',' * (len(rows.COLUMNS) - 1)}\n", "rows of schema 1"),
        ("\x00\x01\xff", "is not a CSV file|has columns"),
        ('"', "is not a CSV file|has columns"),
    ],
)
def test_a_foreign_file_is_refused_and_left_unchanged(path, content, message):
    path.write_bytes(content.encode("latin-1"))
    for use in (lambda: read([path]), lambda: append(path, [row()])):
        with pytest.raises(BadRows, match=message) as caught:
            use()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content.encode("latin-1")


NO_INTEGERS = ["1.5", "1" + "0" * 30, "9223372036854775808", "inf", "1e400", "nan", "0x10", "", "x"]


@pytest.mark.parametrize("n", NO_INTEGERS)
def test_a_number_that_is_not_an_integer_is_refused(path, n):
    append(path, [row()])
    path.write_text(path.read_text().replace("12345", n))
    with pytest.raises(BadRows, match="column 'n' that is not an integer"):
        read([path])


def test_unknown_columns_statuses_and_paths_are_refused(tmp_path, path):
    with pytest.raises(BadRows, match=r"columns \['speed'\]"):
        append(path, [row() | {"speed": 1}])
    with pytest.raises(BadRows, match=r"status \['fine'\]"):
        append(path, [row(status="fine")])
    assert not path.exists()
    with pytest.raises(BadRows, match="does not exist"):
        read([path])
    with pytest.raises(BadRows, match="cannot be read"):
        read([tmp_path])


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_alone(path, monkeypatch, function):
    append(path, [row()])
    before, seen = path.read_bytes(), []

    def interrupt(*_):
        seen.extend(path.parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.os, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        append(path, [row()])
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path.with_name("page.html"), b"all of it")
    assert path.read_bytes() == before and path.with_name("page.html") not in seen
    assert list(path.parent.iterdir()) == [path]


def _write(path, writer):
    for i in range(5):
        append(path, [row(case=f"{writer}.{i}")])


@pytest.mark.slow
def test_concurrent_writers_lose_no_rows(path):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write, args=(path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
        assert writer.exitcode == 0
    assert sorted(read([path])["case"]) == sorted(f"{w}.{i}" for w in range(3) for i in range(5))


HOSTILE = [
    *("<script>alert(1)</script>", "'\"`", "=cmd|' /C calc'!A0", "+1", "@SUM(1)", "\u202eevil"),
    *("é\U0001f600\ufeff", "x" * 100_000, "a\rb", "a\r\nb", "a\nb", "a\0b", "\x1b[2J\x9b2J"),
    *("NaN", "None", "[bold]", "[/]", "{{7*7}}", "${x}", "../../etc", "\ud800", ""),
]


def test_hostile_text_is_stored_and_read_as_text(path):
    columns = ("case", "method", "note", "device", "commit")
    append(path, [row(**dict.fromkeys(columns, text)) for text in HOSTILE])
    # the second writer reads the file first
    append(path, [row(**dict.fromkeys(columns, HOSTILE[0]))])
    expected = [text.replace("\r\n", "\n").replace("\r", "\n") for text in [*HOSTILE, HOSTILE[0]]]
    frame = read([path])
    escaped = [t.replace("\ud800", "\\ud800").replace("\0", "\\x00") for t in expected]
    for column in columns:
        assert frame[column].tolist() == escaped


def test_no_escape_sequence_of_a_file_reaches_the_terminal(path, capsys):
    evil = "\x1b]0;owned\x07\x9b2J[/bold]"
    texts = dict.fromkeys(("case", "method", "torch", "device"), evil)
    for commit, ms in (("aaaa", 2.0), ("bbbb", 1.0)):
        append(path, [row(**texts, commit=commit + evil, ms_p50=ms)])
    assert perf("compare", f"{path}@aaaa", f"{path}@bbbb") == 0
    text = path.read_text()
    for known in (f"{rows.VERSION},", "2.0,"):
        path.write_text(text.replace(known, f"{evil},", 1))
        assert perf("compare", path, path) == 2
    printed = "".join(capsys.readouterr())
    assert "owned" in printed and not set(printed) & {"\x1b", "\x07", "\x9b"}


WRITERS = {
    "page.html": "dashboard source.csv --out",
    "memory.csv": "memory builtins:list --warmup 0 --out",
    "rows.csv": "bench --cases 4x5 --dtypes fp32 --modes no_grad --methods lossfuse --out",
    "demo.png": "demo --steps 1 --out",
}


@pytest.fixture(params=WRITERS)
def writer(request, tmp_path, monkeypatch):
    """A file name, and the command that writes it; ``source.csv`` has a row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lossfuse.perf.dashboard.build", lambda frame: "a page")
    append(tmp_path / "source.csv", [row()])
    return request.param, lambda path: perf(WRITERS[request.param], path)


def test_a_folder_a_pipe_or_a_missing_folder_is_never_replaced(tmp_path, capsys, writer):
    name, write = writer
    (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    paths = [tmp_path / "folder" / name, tmp_path / "file" / name]
    for path in paths:
        assert write(path) == 2 and "cannot be written" in capsys.readouterr().err
    assert list((tmp_path / "folder").iterdir()) == paths[:1]
    if not hasattr(os, "mkfifo"):
        return
    pipe, link = tmp_path / name, tmp_path / f"link.{name}"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        # with a reader that does not block, a writer would not block either
        end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        assert write(path) == 2 and "cannot be written" in capsys.readouterr().err
        os.close(end)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"source.csv", "folder", "file", name, link.name}


def test_a_link_stays_a_link(tmp_path, writer):
    name, write = writer
    if name == "demo.png":
        pytest.skip("the demo trains for seconds; it writes like the dashboard")
    target, link = tmp_path / "elsewhere" / "saved", tmp_path / name
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        assert write(link) == 0
        assert link.is_symlink() and target.stat().st_size > 0
    assert [path.name for path in target.parent.iterdir()] == ["saved"]
