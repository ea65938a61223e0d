"""A memory profile shown: a table, a picture, a page; and the command for a training step of the user's."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .memory import MemoryProfile, profile_memory
from .mistakes import Mistake
from .rows import destination

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
    from rich.console import Console

SUFFIXES = (".png", ".svg", ".html", ".csv")
COLOURS = ["#4c78a8", "#e0a458", "#6ba292", "#b279a2", "#9ecae9", "#d98a7b", "#8c9f5e"]
OTHERS = "others"
GREY, INK, RED = "#c9d1d9", "#3c4650", "#d1495b"


def _unit(size: int) -> tuple[str, int]:
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
    return next(((name, unit) for name, unit in units.items() if size >= unit), ("bytes", 1))


def _size(size: int) -> str:
    name, unit = _unit(size)
    return f"{size / unit:,.{0 if unit == 1 else 1}f} {name}"


def _held_by(profile: MemoryProfile, places: list[str], moments: int = 200) -> "pd.DataFrame":
    """Bytes held over time by each of ``places`` and by all others, thinned to what a picture can show; no spike is lost."""
    import pandas as pd

    frame = profile.frame()
    place = frame["where"].where(frame["where"].isin(places), OTHERS)
    held = pd.DataFrame({"ms": frame["ms"]} | {name: (frame["change"] * (place == name)).cumsum() for name in [*places, OTHERS]})
    # of many changes within one moment: the lowest, the highest and the last
    moment = (frame["ms"] * (moments / max(frame["ms"].max(), 1e-9))).astype(int)
    groups = frame["bytes"].groupby(moment)
    keep = sorted({0, *groups.idxmin(), *groups.idxmax(), *moment.index[~moment.duplicated(keep="last")]})
    return held.loc[keep].melt("ms", var_name="where", value_name="bytes")


def timeline_chart(profile: MemoryProfile, top: int = 7) -> "alt.VConcatChart":
    """Memory over time, coloured by the (at most 7) places that hold most at the peak, over bars of what each of them holds there."""
    import altair as alt
    import pandas as pd

    width, end = 760, profile.timeline[-1].ms
    unit, divisor = _unit(profile.peak_bytes)
    shown = [group for group in profile.alive[: min(top, len(COLOURS))] if group.share >= 0.002] or list(profile.alive[:1])
    rest = profile.alive[len(shown) :]
    names = [*(group.where for group in shown), OTHERS]
    colour = alt.Color("where:N", legend=None, scale=alt.Scale(domain=names, range=[*COLOURS[: len(shown)], GREY]))

    areas = _held_by(profile, names[:-1])
    areas["held"], areas["rank"] = areas["bytes"] / divisor, areas["where"].map(names.index)
    x = alt.X("ms:Q", title="ms since the call began", scale=alt.Scale(domain=[0, max(end, 1e-6)], nice=False))
    ceiling = alt.Scale(domain=[0, 1.15 * max(profile.peak_bytes, 1) / divisor], nice=False)
    y = alt.Y("held:Q", title=f"{unit} beyond the start", scale=ceiling)
    area = alt.Chart(areas).mark_area(interpolate="step-after", opacity=0.9).encode(x=x, y=y.stack("zero"), color=colour, order="rank:Q")
    peak_label = f"peak {_size(profile.peak_bytes)} at {profile.peak_ms:.1f} ms"
    peak = pd.DataFrame({"ms": [profile.peak_ms], "held": [profile.peak_bytes / divisor], "label": [peak_label]})
    peak_chart = alt.Chart(peak).encode(x=x)
    late = profile.peak_ms > end / 2
    label = peak_chart.mark_text(align="right" if late else "left", dx=-7 if late else 7, dy=-10, color=RED, fontSize=13, fontWeight="bold")
    timeline = alt.layer(
        area,
        peak_chart.mark_rule(color=RED, strokeDash=[4, 3]),
        peak_chart.mark_point(color=RED, filled=True, size=45, opacity=1).encode(y=y),
        label.encode(y=y, text="label:N"),
    ).properties(width=width, height=300)

    rows = [(group.where, group.where, group.bytes, group.count, " < ".join(group.stack[:12])) for group in shown]
    if rest:
        rows.append((OTHERS, f"{len(rest)} more", sum(group.bytes for group in rest), sum(group.count for group in rest), ""))
    bars = pd.DataFrame(rows, columns=["where", "label", "bytes", "count", "stack"])
    bars["value"] = [f"{_size(size)}, {size / profile.peak_bytes:.1%}" for size in bars["bytes"]]
    base = alt.Chart(bars).encode(y=alt.Y("where:N", sort=names, title=None, axis=None))
    held = alt.X("bytes:Q", axis=None, scale=alt.Scale(domain=[0, max(bars["bytes"], default=1)], nice=False))
    tooltip = ["label:N", "bytes:Q", "count:Q", "value:N", "stack:N"]
    who = alt.layer(
        base.mark_bar(height=8, yOffset=9, cornerRadius=2).encode(x=held, color=colour, tooltip=tooltip),
        base.mark_text(align="left", dy=-5, limit=width - 150, color=INK, fontSize=12).encode(x=alt.value(0), text="label:N"),
        base.mark_text(align="right", dy=-5, color=INK, fontSize=12).encode(x=alt.value(width), text="value:N"),
    ).properties(width=width, height=alt.Step(36), title=alt.Title("Held at the peak; grey is all else", fontSize=13, anchor="start"))

    caption = f"{profile.device}, torch {torch.__version__}; {_size(profile.end_bytes)} still held at the end"
    headline = f"Peak memory: {_size(profile.peak_bytes)} beyond the start"
    chart = alt.vconcat(timeline, who, spacing=26) if rows else alt.vconcat(timeline)
    chart = chart.properties(title=alt.Title(headline, subtitle=caption, anchor="start", fontSize=16, offset=14), padding=16)
    chart = chart.configure_axis(grid=False, labelColor=INK, titleColor=INK, domainColor=GREY, tickColor=GREY)
    return chart.configure_view(stroke=None).configure_title(color=INK, subtitleColor=INK)


class _HtmlSafe(json.JSONEncoder):
    """A name like '</script>' ends no script: JSON may write '<' as an escape."""

    def encode(self, value: object) -> str:
        return super().encode(value).replace("<", "\\u003c")


def save(profile: MemoryProfile, path: Path | str) -> None:
    """Write the chart (.png, .svg, .html that needs no network) or the timeline (.csv), whole or not at all.

    Raises:
        Mistake: another suffix.
        OSError: where nothing can be written.
    """
    suffix = _known(path).suffix
    path = destination(Path(path))
    partial = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
    try:
        if suffix == ".csv":
            profile.frame().to_csv(partial, index=False)
        elif suffix == ".html":
            # "view source" in the menu would write the names unescaped, and the editor is on the network
            menu = {"actions": {"export": True, "source": False, "compiled": False, "editor": False}}
            timeline_chart(profile).save(partial, inline=True, embed_options=menu, json_kwds={"cls": _HtmlSafe})
        else:
            timeline_chart(profile).save(partial, scale_factor=2 if suffix == ".png" else 1)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _known(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise Mistake(f"{str(path)!r} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    return path


def load_step(text: str) -> Callable[[], object]:
    """'package.module:attribute.path' -> what it names, imported with the current folder on the path, as ``python -m`` has it.

    Raises:
        Mistake: no such form, module or attribute, or something that cannot be called without arguments.
        Whatever the module raises while it is imported.
    """
    name, colon, attributes = text.partition(":")
    if not (colon and attributes and all(map(str.isidentifier, name.split(".")))):
        raise Mistake(f"step is {text!r}, expected module:function, as in train:step")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a module that is there and imports one that is not has an error of its own
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise Mistake(f"step {text!r}: there is no module {error.name!r} in this folder or installed") from None
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise Mistake(f"step {text!r}: {getattr(found, '__name__', type(found).__name__)!r} has no attribute {attribute!r}")
        found = getattr(found, attribute)
    if not callable(found):
        raise Mistake(f"step {text!r} is {type(found).__name__}, expected something to call")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise Mistake(f"step {text!r} is called without arguments, but {error}") from None
    except ValueError:
        pass  # builtins may have no signature
    return found


def show(profile: MemoryProfile, console: "Console", top: int = 12) -> None:
    """Peak, end, and a table of what is alive at the peak."""
    from rich.table import Table
    from rich.text import Text

    console.print(f"peak [bold]{_size(profile.peak_bytes)}[/bold] beyond the start, after {profile.peak_ms:.1f} ms", highlight=False)
    console.print(f"{_size(profile.end_bytes)} still held at the end, after {profile.timeline[-1].ms:.1f} ms", highlight=False)
    if not profile.alive:
        return
    table = Table("where", "size", "share", title=f"Held at the peak, {profile.device}")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for group in profile.alive[:top]:
        times = f" ({group.count} allocations)" if group.count > 1 else ""
        table.add_row(Text(group.where + times, overflow="fold"), _size(group.bytes), f"{group.share:.1%}")
    rest = profile.alive[top:]
    if rest:
        size = sum(group.bytes for group in rest)
        table.add_row(f"and {len(rest)} more", _size(size), f"{size / profile.peak_bytes:.1%}")
    console.print(table)


def main(step: str, out: Path | None = None, warmup: int = 1) -> MemoryProfile:
    """Load 'module:function', measure it, show it, draw it; Mistake for a step, a suffix or a file that cannot be."""
    from rich.console import Console
    from rich.markup import escape

    if out is not None:
        _known(out)
    console = Console()
    run = load_step(step)
    # torch 2.13: its profiler writes two lines to stderr each time
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with console.status(f"measuring {escape(step)}"):
        profile = profile_memory(run, warmup=warmup)
    show(profile, console)
    if out is not None:
        try:
            save(profile, out)
        except OSError as error:
            raise Mistake(f"{out} cannot be written: {error.strerror or error}") from error
        console.print(f"written: {out}", markup=False)
    return profile
