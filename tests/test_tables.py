"""Tables of commands: a name is never cut, whatever the width; numbers are whole or left out, and
that is said."""

import io
import re

import pytest

for name in ("pandas", "rich"):
    pytest.importorskip(name)

from rich.console import Console  # noqa: E402

from lossfuse.perf import bench, methods, tables  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.rows import append  # noqa: E402
from test_compare import row as measured  # noqa: E402

LONGEST = max((m.name for m in methods.METHODS), key=len)


def drawn(width, *lines, columns=bench.COLUMNS, terminal=True):
    console = Console(width=width, force_terminal=terminal, file=io.StringIO(), color_system=None)
    tables.show(console, columns, lines, "a title", "a caption")
    return console.file.getvalue()


def line(name, group="fp32 no_grad", **other):
    return tables.Line(
        [name, "1234", "12.3-12.4", "1.23", "0.95", "1,234 MiB", "1e-07", "2e-07"], group, **other
    )


@pytest.mark.parametrize("width", [40, 80, 132])
def test_a_terminal_shows_whole_names_and_whole_numbers_or_says_what_it_leaves_out(width):
    names = [method.name for method in methods.METHODS]
    said = drawn(width, *map(line, names))
    assert max(map(len, said.splitlines())) <= width and "\u2026" not in said
    firsts = [
        re.split("[\u2502\u2503]", text)[1].strip()
        for text in said.splitlines()
        if text.startswith("\u2502")
    ]
    together = "".join(firsts).replace(" ", "")
    assert all(name.replace(" ", "") in together for name in names)
    assert "1234" in said and "1.23" in said
    shown = [
        column.name
        for column in bench.COLUMNS
        if re.search(rf"\b{re.escape(column.name)}\b", said.splitlines()[2])
    ]
    left_out = " ".join(said.partition("left out at this width: ")[2].split())
    assert {*shown, *filter(None, left_out.split(", "))} == {
        column.name for column in bench.COLUMNS
    }
    assert (width == 132) == (not left_out)


def test_elsewhere_every_line_is_whole_and_says_its_group():
    said = drawn(
        80,
        line(LONGEST),
        line("short", "bf16 forward"),
        tables.Line(["gone"], "bf16 forward", "failed: because"),
        terminal=False,
    )
    lines = said.splitlines()
    assert (
        lines[0] == "a title"
        and lines[1].split() == " ".join(column.name for column in bench.COLUMNS).split()
    )
    assert lines[2].startswith(f"fp32 no_grad  {LONGEST}  1234") and lines[2].endswith("2e-07")
    assert lines[3].split() == [
        "bf16",
        "forward",
        "short",
        *line("").cells[1:5],
        "1,234",
        "MiB",
        *line("").cells[6:],
    ]
    assert (
        re.fullmatch(r"bf16 forward +gone +failed: because", lines[4]) and lines[5] == "a caption"
    )
    assert not re.search("[\u2500-\u257f]", said)


COMMANDS = {
    "estimate": ["estimate", "head-llama3", "16x1000p3", "8192x32000"],
    "estimate, layouts": ["estimate", "head-llama3", "--layout", "tp=8,fsdp=64"],
    "compare": ["compare", "{}@aaaa", "{}@bbbb"],
    "bench": [
        "bench",
        "--cases",
        "8x50p3",
        "--dtypes",
        "fp32",
        "--modes",
        "no_grad",
        "--methods",
        "scatter",
        "--repeats",
        "1",
    ],
}
NAMES = {"estimate, layouts": "weight gradient, for its reduction"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_cuts_a_name_in_a_pipe(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "rows.csv"
    append(
        path,
        [measured(commit, ms, method=LONGEST) for commit, ms in (("aaaa", 2.0), ("bbbb", 1.0))],
    )
    assert main([part.format(path) for part in COMMANDS[command]]) == 0
    said = capsys.readouterr().out
    name = NAMES.get(
        command, "scatter + F.binary_cross_entropy_with_logits" if command == "bench" else LONGEST
    )
    assert any(name in text for text in said.splitlines()) and "\u2026" not in said


def test_foreign_text_in_a_table_is_only_text():
    said = drawn(80, line("[bold]\x1b[2Jname[/bold]", "[red]group"))
    assert "[bold]" in said and "[red]group" in said and "\x1b" not in said
