"""Tables of a command: on a terminal as wide as it is, elsewhere plain lines as long as they need,
and no name is ever cut."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .shown import clean

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Column:
    """A column; of those with a ``rank`` the highest is left out first where a terminal is too
    narrow. Words may be folded, numbers not."""

    name: str
    rank: int = 0
    right: bool = True
    folds: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table, under the heading it shares with its neighbours; a ``remark`` takes the
    place of the cells it has not."""

    cells: Sequence[str]
    group: str = ""
    remark: str = ""
    style: str = ""


def console() -> "Console":
    """For stdout; where that is no terminal lines are not broken."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def show(
    to: "Console",
    columns: Sequence[Column],
    lines: Sequence[Line],
    title: str = "",
    caption: str = "",
) -> None:
    """Print a table; the first column holds names, which are folded if they must be."""
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
    rights = (
        [False] * grouped
        + [column.right for column in columns[:1]]
        + [column.right for column in columns[1:]]
    )
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
        # and a border and a space on both sides
        return 3 + max(map(len, pieces), default=0)

    kept, left_out = list(range(len(columns))), []
    for i in sorted((i for i in kept if columns[i].rank), key=lambda i: -columns[i].rank):
        if sum(map(width, kept)) + 1 <= to.width:
            break
        kept.remove(i)
        left_out.append(columns[i].name)
    table = Table(
        title=Text(title) if title else None,
        caption=Text(caption) if caption else None,
        title_justify="left",
    )
    for i in kept:
        no_wrap = i > 0 and not columns[i].folds
        table.add_column(
            Text(columns[i].name),
            justify="right" if columns[i].right else "left",
            no_wrap=no_wrap,
            overflow="fold",
        )
    group = None
    for at, line in enumerate(lines):
        if line.group and line.group != group:
            table.add_row(Text(line.group, style="bold"))
        group = line.group
        last = at + 1 == len(lines) or lines[at + 1].group != group
        table.add_row(
            *(Text(line.cells[i]) for i in kept if i < len(line.cells)),
            style=line.style,
            end_section=bool(group) and last,
        )
    to.print(table)
    for line in lines:
        if line.remark:
            to.print(
                f"{line.group} {line.cells[0]}: {line.remark}".strip(),
                style=line.style,
                markup=False,
                highlight=False,
            )
    if left_out:
        to.print(
            f"left out at this width: {', '.join(left_out)}",
            style="dim",
            markup=False,
            highlight=False,
        )
