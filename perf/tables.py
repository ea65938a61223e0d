"""Tables: as wide as the terminal, plain lines of any length elsewhere, and names never cut."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .shown import clean

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Column:
    """A column; a narrow terminal omits columns with a ``rank``, the highest first.

    Words may be folded, numbers not."""

    name: str
    rank: int = 0
    right: bool = True
    folds: bool = False


@dataclass(frozen=True)
class Line:
    """A row; adjacent rows share the heading ``group``, a ``remark`` replaces missing cells."""

    cells: Sequence[str]
    group: str = ""
    remark: str = ""
    style: str = ""


def console() -> "Console":
    """A console on stdout that wraps lines on a terminal alone."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def show(
    to: "Console",
    columns: Sequence[Column],
    lines: Sequence[Line],
    title: str = "",
    caption: str = "",
) -> None:
    """Print a table; names of the first column are folded if necessary."""
    lines = [
        Line(
            [clean(cell) for cell in line.cells], clean(line.group), clean(line.remark), line.style
        )
        for line in lines
    ]
    if to.is_terminal:
        _drawn(to, columns, lines, clean(title), clean(caption))
    else:
        _plain(to, columns, lines, clean(title), clean(caption))


def _plain(
    to: "Console", columns: Sequence[Column], lines: Sequence[Line], title: str, caption: str
) -> None:
    grouped = any(line.group for line in lines)
    heads = [""] * grouped + [column.name for column in columns]
    rights = [False] * grouped + [column.right for column in columns]
    rows = [heads, *([line.group] * grouped + list(line.cells) for line in lines)]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(heads))]
    said = [title] * bool(title)
    for row, remark in zip(rows, ["", *(line.remark for line in lines)], strict=True):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, rights, strict=False)
        ]
        said.append("  ".join([*cells, *[remark] * bool(remark)]).rstrip())
    said += [caption] * bool(caption)
    for text in [*said, ""]:
        to.print(text, markup=False, highlight=False, soft_wrap=True)


def _drawn(
    to: "Console", columns: Sequence[Column], lines: Sequence[Line], title: str, caption: str
) -> None:
    from rich.table import Table
    from rich.text import Text

    def width(i: int) -> int:
        texts = [columns[i].name, *(line.cells[i] for line in lines if i < len(line.cells))]
        pieces = [
            piece for text in texts for piece in (text.split() if columns[i].folds else [text])
        ]
        # plus a border and two spaces
        return 3 + max(map(len, pieces), default=0)

    shown, omitted = list(range(len(columns))), []
    for i in sorted((i for i in shown if columns[i].rank), key=lambda i: -columns[i].rank):
        if sum(map(width, shown)) + 1 <= to.width:
            break
        shown.remove(i)
        omitted.append(columns[i].name)
    table = Table(
        title=Text(title) if title else None,
        caption=Text(caption) if caption else None,
        title_justify="left",
    )
    for i in shown:
        table.add_column(
            Text(columns[i].name),
            justify="right" if columns[i].right else "left",
            no_wrap=i > 0 and not columns[i].folds,
            overflow="fold",
        )
    for group, grouped in itertools.groupby(lines, lambda line: line.group):
        if group:
            table.add_row(Text(group, style="bold"))
        for line in (members := list(grouped)):
            cells = (Text(line.cells[i]) for i in shown if i < len(line.cells))
            last = bool(group) and line is members[-1]
            table.add_row(*cells, style=line.style, end_section=last)
    to.print(table)
    for line in lines:
        if line.remark:
            text = f"{line.group} {line.cells[0]}: {line.remark}".strip()
            to.print(text, style=line.style, markup=False, highlight=False)
    if omitted:
        note = f"left out at this width: {', '.join(omitted)}"
        to.print(note, style="dim", markup=False, highlight=False)
