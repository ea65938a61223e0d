"""What perf does with foreign data and with the machine: rows are text, files are written where
asked, and nothing else is touched."""

import ast
import os
import stat
from pathlib import Path

import pytest

for name in ("altair", "pandas", "filelock", "rich", "tokenizers", "vl_convert"):
    pytest.importorskip(name)

from fake_rows import row as whole_row  # noqa: E402
from lossfuse.perf import rows  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.memory import profile_memory  # noqa: E402
from lossfuse.perf.memory_view import save  # noqa: E402
from lossfuse.perf.rows import append, read, write_atomically  # noqa: E402

SOURCES = sorted((Path(__file__).parent.parent / "perf").glob("*.py"))
# of code, of the network, of a shell
MODULES = {
    "code",
    "ftplib",
    "http",
    "httpx",
    "marshal",
    "multiprocessing",
    "pickle",
    "pty",
    "requests",
    "shelve",
    "socket",
    "socketserver",
    "ssl",
    "telnetlib",
    "urllib",
    "urllib3",
    "webbrowser",
    "xmlrpc",
    "yaml",
    "dill",
    "cloudpickle",
    "joblib",
    "asyncio",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "read_pickle",
    "to_pickle",
    "unsafe_load",
    "system",
    "popen",
    "getoutput",
    "from_url",
}
# who may start a program, and which
PROGRAMS = {
    "environment.py": {"git", "sys.executable"},
    "gpu.py": {"sys.executable"},
    "sanitizer.py": {"command", "sys.executable"},
}
STARTERS = ("subprocess.run", "subprocess.Popen")
NO_STARTERS = (
    "PIPE",
    "STDOUT",
    "DEVNULL",
    "TimeoutExpired",
    "SubprocessError",
    "CalledProcessError",
    "CompletedProcess",
    "Popen[",
)
HOSTILE = (
    "<script>alert(1)</script>",
    "'\"`",
    "=cmd|' /C calc'!A0",
    "+1",
    "@SUM(1)",
    "\u202eevil",
    "é\U0001f600\ufeff",
    "x" * 100_000,
    "a\rb",
    "a\r\nb",
    "a\nb",
    "a\0b",
    "\x1b[2J\x9b2J",
    "NaN",
    "None",
    "[bold]",
    "[/]",
    "{{7*7}}",
    "${x}",
    "../../etc",
    "\ud800",
    "",
)


def names_of(tree):
    """(line, module) of imports and (line, function) of calls, by their last names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (("import", alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield "import", (node.module or "").split(".")[0], node
        elif isinstance(node, ast.Call):
            yield (
                "call",
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", ""),
                node,
            )


def complaints(source, file):
    """What of a module could run somebody's data, reach a network or start a shell."""
    found = []
    for kind, name, node in names_of(ast.parse(source)):
        called = ast.unparse(node.func) if kind == "call" else ""
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords} if kind == "call" else {}
        # of a model or a pattern, not of code
        harmless = called in ("torch.compile", "re.compile")
        bad = name in (MODULES if kind == "import" else CALLS) and not harmless
        bad |= (
            called in ("torch.load", "np.load", "numpy.load")
            or keywords.get("shell", "False") != "False"
        )
        if kind == "import" and name == "subprocess" and file not in PROGRAMS:
            bad = True
        if bad:
            found.append(f"{file}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return found


def test_no_module_can_run_data_reach_a_network_or_start_a_shell():
    assert len(SOURCES) > 15
    assert [
        line for path in SOURCES for line in complaints(path.read_text(encoding="utf-8"), path.name)
    ] == []


def test_programs_are_named_in_the_source():
    started = {}
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        if "subprocess" not in source:
            continue
        lists = [
            node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.List) and node.elts
        ]
        firsts = {ast.unparse(node.elts[0]).strip("'") for node in lists}
        started[path.name] = {
            first for first in firsts if first in ("git", "sys.executable", "command")
        }
        # the only arguments of a program are lists, never a line for a shell
        runs = [
            node
            for kind, name, node in names_of(ast.parse(source))
            if kind == "call" and ast.unparse(node.func) in STARTERS
        ]
        assert runs and all(isinstance(run.args[0], ast.List | ast.Name) for run in runs)
        assert source.count("subprocess.") == len(runs) + sum(
            source.count(f"subprocess.{name}") for name in NO_STARTERS
        )
    assert started == PROGRAMS


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from urllib.request import urlopen", "eval(text)", "pd.read_pickle(path)", "torch.load(path)", "os.system(x)",
        "subprocess.run(line, shell=True)", "subprocess.run(line, shell=quick)", "import subprocess", "exec(open(path).read())",
    ],
)  # fmt: skip
def test_what_is_forbidden_is_found(line):
    assert complaints(line, "new.py") != [], line


def test_hostile_text_goes_to_a_file_and_comes_back_as_text(tmp_path):
    path = tmp_path / "rows.csv"
    strange = [
        whole_row(case=text, method=text, note=text, device=text, commit=text) for text in HOSTILE
    ]
    append(path, strange)
    # a second writer reads what the first has written
    append(path, strange[:1])
    frame = read([path])
    assert len(frame) == len(HOSTILE) + 1
    expected = [
        text.replace("\r\n", "\n").replace("\r", "\n").replace("\ud800", "\\ud800")
        for text in HOSTILE
    ]
    for column in ("case", "method", "note", "device", "commit"):
        assert frame[column].tolist() == [*expected, HOSTILE[0]]


@pytest.mark.parametrize("how", ["bom", "crlf"])
def test_a_file_that_another_program_has_saved_is_read(tmp_path, how):
    path = tmp_path / "rows.csv"
    append(path, [whole_row(case="é"), whole_row(case="b")])
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content if how == "bom" else content.replace(b"\n", b"\r\n"))
    append(path, [whole_row(case="c")])
    assert read([path])["case"].tolist() == ["é", "b", "c"]


@pytest.mark.parametrize(
    "n", ["1.5", "1" + "0" * 30, "9223372036854775808", "inf", "1e400", "nan", "0x10", ""]
)
def test_a_number_that_is_no_integer_is_refused(tmp_path, n):
    path = tmp_path / "rows.csv"
    append(path, [whole_row(n=12345)])
    path.write_text(path.read_text().replace("12345", n))
    with pytest.raises(rows.BadRows, match=r"column 'n' that is not an integer"):
        read([path])


def test_nothing_obeys_a_foreign_file_but_text(tmp_path, capsys):
    """A terminal would obey escape sequences, and rich its markup."""
    path = tmp_path / "rows.csv"
    evil = "\x1b]0;owned\x07\x9b2J[/bold]"
    for commit, ms in (("aaaa", 2.0), ("bbbb", 1.0)):
        append(
            path,
            [
                whole_row(
                    case=evil,
                    method=evil,
                    torch=evil,
                    device=evil,
                    commit=commit + evil,
                    ms_p50=ms,
                    tests="passed",
                )
            ],
        )
    assert main(["compare", f"{path}@aaaa", f"{path}@bbbb"]) == 0
    text = path.read_text()
    path.write_text(text.replace(f"{rows.VERSION},", f"{evil},", 1))
    assert main(["compare", str(path), str(path)]) == 2
    path.write_text(text.replace("2.0,", f"{evil},", 1))
    assert main(["compare", str(path), str(path)]) == 2
    printed = "".join(capsys.readouterr())
    assert "owned" in printed and not set(printed) & {"\x1b", "\x07", "\x9b"}


def _dashboard(path, source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lossfuse.perf.dashboard.build", lambda frame: "a page")
        return main(["dashboard", str(source), "--out", str(path)])


def _memory(path, source):
    return main(["memory", "builtins:list", "--out", str(path), "--warmup", "0"])


def _append(path, source):
    append(path, [])
    return 0


def _demo(path, source):
    return main(["demo", "--out", str(path)])


WRITERS = {
    "dashboard": (_dashboard, "page.html"),
    "memory": (_memory, "memory.csv"),
    "append": (_append, "rows.csv"),
}


def refused(call, path, source, capsys):
    try:
        return call(path, source) == 2 and "cannot be written" in capsys.readouterr().err
    except rows.BadRows as error:
        return "cannot be written" in str(error)


@pytest.mark.parametrize("name", [*WRITERS, "demo"])
def test_what_is_no_file_is_not_replaced(tmp_path, capsys, name):
    """As /dev/null would be, by whoever may."""
    call, file = {**WRITERS, "demo": (_demo, "demo.png")}[name]
    source = tmp_path / "source.csv"
    append(source, [whole_row()])
    folder = tmp_path / "folder"
    (folder / file).mkdir(parents=True)
    assert refused(call, folder / file, source, capsys) and list(folder.iterdir()) == [
        folder / file
    ]
    if hasattr(os, "mkfifo"):
        pipe, link = tmp_path / file, tmp_path / f"link.{file}"
        os.mkfifo(pipe)
        link.symlink_to(pipe)
        for path in (pipe, link):
            # a reader that does not wait, so that a writer would not either
            end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            assert refused(call, path, source, capsys)
            os.close(end)
        assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"source.csv", "folder", file, f"link.{file}"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_stays_one(tmp_path, name):
    call, file = WRITERS[name]
    source = tmp_path / "source.csv"
    append(source, [whole_row()])
    target, link = tmp_path / "elsewhere" / "kept", tmp_path / file
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        assert call(link, source) == 0
        assert link.is_symlink() and target.stat().st_size > 0
    assert [path.name for path in target.parent.iterdir()] == ["kept"]


def test_nobody_sees_a_file_before_it_is_whole(tmp_path, monkeypatch):
    """Neither half a file nor one more beside it, whatever stops a writer."""
    seen = []
    path = tmp_path / "page.html"

    def stop(handle):
        seen.extend(file.name for file in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"whole")
    assert "page.html" not in seen and len(seen) == 1 and not list(tmp_path.iterdir())


def test_a_demo_that_cannot_be_drawn_is_not_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lossfuse.perf.demo.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "demo.png")]) == 2
    assert main(["demo", "--out", str(tmp_path / "demo.gif")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_profile_that_cannot_be_saved_is_a_sentence(tmp_path, capsys):
    assert _memory(tmp_path / "absent" / "memory.csv", None) == 2
    assert "absent/memory.csv cannot be written" in capsys.readouterr().err
    with pytest.raises(OSError):
        save(profile_memory(list, warmup=0), tmp_path / "absent" / "memory.csv")
