"""Tables of commands: whole names at any width, whole numbers or a note of omitted columns."""

import io
import re

import pytest

from perf_commands import perf  # isort: skip
from rich.console import Console

from fake_rows import row as measured
from lossfuse.perf import bench, methods, tables
from lossfuse.perf.rows import append

NAMES = [method.name for method in methods.METHODS]
LONGEST = max(NAMES, key=len)
COLUMNS = [column.name for column in bench.COLUMNS]
NUMBERS = ["1234", "12.3-12.4", "1.23", "0.95", "1,234 MiB", "1e-07", "2e-07"]


def drawn(width, *lines, terminal=True):
    console = Console(width=width, force_terminal=terminal, file=io.StringIO(), color_system=None)
    tables.show(console, bench.COLUMNS, lines, "a title", "a caption")
    return console.file.getvalue()


def line(name, group="fp32 no_grad"):
    return tables.Line([name, *NUMBERS], group)


@pytest.mark.parametrize("width", [40, 80, 132])
def test_a_terminal_shows_whole_names_and_says_which_columns_it_omits(width):
    said = drawn(width, *map(line, NAMES))
    assert max(map(len, said.splitlines())) <= width and "\u2026" not in said
    rows = [text for text in said.splitlines() if text.startswith("\u2502")]
    together = "".join(re.split("[\u2502\u2503]", text)[1] for text in rows).replace(" ", "")
    assert all(name.replace(" ", "") in together for name in NAMES)
    assert "1234" in said and "1.23" in said
    head, omitted = said.splitlines()[2], said.partition("at this width: ")[2]
    shown = {name for name in COLUMNS if re.search(rf"\b{re.escape(name)}\b", head)}
    omitted = set(filter(None, " ".join(omitted.split()).split(", ")))
    assert shown | omitted == set(COLUMNS) and not shown & omitted
    assert (width == 132) == (not omitted)


def test_a_pipe_gets_whole_lines_each_with_its_group():
    failed = tables.Line(["gone"], "bf16 forward", "failed: because")
    said = drawn(80, line(LONGEST), line("short", "bf16 forward"), failed, terminal=False)
    title, head, first, second, third, caption, *_ = said.splitlines()
    assert (title, caption) == ("a title", "a caption")
    assert head.split() == " ".join(COLUMNS).split()
    assert first.startswith(f"fp32 no_grad  {LONGEST}  1234") and first.endswith("2e-07")
    assert second.split() == ["bf16", "forward", "short", *" ".join(NUMBERS).split()]
    assert re.fullmatch("bf16 forward +gone +failed: because", third)
    assert not re.search("[\u2500-\u257f]", said)


SCATTER = "scatter + F.binary_cross_entropy_with_logits"
COMMANDS = {
    "estimate head-llama3 16x1000p3 8192x32000": LONGEST,
    "estimate head-llama3 --layout tp=8,fsdp=64": "weight gradient, for its reduction",
    "compare rows.csv@aaaa rows.csv@bbbb": LONGEST,
    "bench --cases 8x50p3 --dtypes fp32 --modes no_grad --methods scatter --repeats 1": SCATTER,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_cuts_a_name_in_a_pipe(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    both = [measured(commit=commit, method=LONGEST) for commit in ("aaaa", "bbbb")]
    append(tmp_path / "rows.csv", both)
    assert perf(command) == 0
    said = capsys.readouterr().out
    assert any(COMMANDS[command] in text for text in said.splitlines()) and "\u2026" not in said


def test_foreign_text_in_a_table_is_only_text():
    said = drawn(80, line("[bold]\x1b[2Jname[/bold]", "[red]group"))
    assert "[bold]" in said and "[red]group" in said and "\x1b" not in said
