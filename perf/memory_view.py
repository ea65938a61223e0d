"""Table, picture and page of a memory profile, and the command for a user's training step."""

import html
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .memory import MemoryProfile, profile_memory
from .mistakes import Mistake
from .pages import THEMES, page, theme
from .rows import destination

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
    from rich.console import Console

SUFFIXES = (".png", ".svg", ".html", ".csv")
COLOURS = ["#4c78a8", "#e0a458", "#6ba292", "#b279a2", "#9ecae9", "#d98a7b", "#8c9f5e"]
OTHERS = "other allocations"
WIDTH = 760
GREY, INK, RED = "#c9d1d9", "#3c4650", "#d1495b"


def _unit(size: int) -> tuple[str, int]:
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
    return next(((name, unit) for name, unit in units.items() if size >= unit), ("bytes", 1))


def _size(size: int) -> str:
    name, unit = _unit(size)
    return f"{size / unit:,.{0 if unit == 1 else 1}f} {name}"


def _bytes_over_time(
    profile: MemoryProfile, places: list[str], moments: int = 200
) -> "pd.DataFrame":
    """Bytes of each of ``places`` and of all others over time, thinned without losing a spike."""
    import pandas as pd

    frame = profile.frame()
    place = frame["where"].where(frame["where"].isin(places), OTHERS)
    held = pd.DataFrame(
        {"ms": frame["ms"]}
        | {name: (frame["change"] * (place == name)).cumsum() for name in [*places, OTHERS]}
    )
    # of many changes within one moment: the lowest, the highest and the last
    moment = (frame["ms"] * (moments / max(frame["ms"].max(), 1e-9))).astype(int)
    groups = frame["bytes"].groupby(moment)
    keep = sorted(
        {0, *groups.idxmin(), *groups.idxmax(), *moment.index[~moment.duplicated(keep="last")]}
    )
    return held.loc[keep].melt("ms", var_name="where", value_name="bytes")


@dataclass(frozen=True)
class _Place:
    """Bytes of one place, or of all others together, at the peak, as text."""

    label: str
    bytes: int
    count: int
    value: str
    stack: tuple[str, ...]
    colour: str | None  # None: all others


def _largest_at_peak(profile: MemoryProfile, top: int = len(COLOURS)) -> list[_Place]:
    """The largest places at the peak, then all others, some of which are freed by then."""
    shown = [
        group for group in profile.alive[: min(top, len(COLOURS))] if group.share >= 0.002
    ] or list(profile.alive[:1])
    rest = profile.alive[len(shown) :]

    def value(size: int) -> str:
        return f"{_size(size)}, {size / max(profile.peak_bytes, 1):.1%}"

    made = [
        _Place(group.where, group.bytes, group.count, value(group.bytes), group.stack[:12], colour)
        for group, colour in zip(shown, COLOURS, strict=False)
    ]
    named, held, most = {group.where for group in shown}, 0, 0
    for change in profile.timeline:
        if change.where not in named:
            held += change.change
            most = max(most, held)
    # less than a pixel of the picture is left out
    if rest or most > 0.002 * profile.peak_bytes:
        label = OTHERS + f" ({len(rest)} {'place' if len(rest) == 1 else 'places'})" * bool(rest)
        size = sum(group.bytes for group in rest)
        if most > size:
            label += f", up to {_size(most)} at another time"
        made.append(_Place(label, size, sum(group.count for group in rest), value(size), (), None))
    return made


def _timeline(
    profile: MemoryProfile, held: list[_Place], width: int | str, others: "str | alt.ExprRef"
) -> "alt.LayerChart":
    """Memory over time, coloured by place."""
    import altair as alt

    end = profile.timeline[-1].ms
    unit, divisor = _unit(profile.peak_bytes)
    places = [one.label for one in held if one.colour]
    names = [*places, OTHERS]
    colours: list[Any] = [*COLOURS[: len(places)], others]

    areas = _bytes_over_time(profile, places)
    areas["held"], areas["rank"] = areas["bytes"] / divisor, areas["where"].map(names.index)
    ticks = alt.Axis(
        title="ms since the call began",
        tickCount=8,
        labelOverlap=True,
        labelSeparation=8,
        grid=False,
    )
    x = alt.X("ms:Q", axis=ticks, scale=alt.Scale(domain=[0, max(end, 1e-6)], nice=False))
    ceiling = alt.Scale(domain=[0, 1.15 * max(profile.peak_bytes, 1) / divisor], nice=False)
    title: dict[str, Any] = {
        "title": f"{unit} beyond the start",
        "titleAngle": 0,
        "titleAlign": "left",
        "titleX": 0,
        "titleY": -8,
    }
    y = alt.Y("held:Q", axis=alt.Axis(**title, tickCount=6), scale=ceiling)
    colour = alt.Color("where:N", legend=None, scale=alt.Scale(domain=names, range=colours))
    area = alt.Chart(areas).mark_area(interpolate="step-after", opacity=0.9)
    area = area.encode(x=x, y=y.stack("zero"), color=colour, order="rank:Q")
    layers = alt.layer(area, *_peak_marks(profile, divisor, x, y))
    return layers.properties(width=width, height=300)


def _peak_marks(profile: MemoryProfile, divisor: int, x: "alt.X", y: "alt.Y") -> "list[alt.Chart]":
    """A dashed line, a point and a label at the peak."""
    import altair as alt
    import pandas as pd

    label = f"peak {_size(profile.peak_bytes)}"
    point = {"ms": [profile.peak_ms], "held": [profile.peak_bytes / divisor], "label": [label]}
    base = alt.Chart(pd.DataFrame(point)).encode(x=x)
    late = profile.peak_ms > profile.timeline[-1].ms / 2
    where = {"align": "right" if late else "left", "dx": -7 if late else 7, "dy": -10}
    text = base.mark_text(**where, color=RED, fontSize=13, fontWeight="bold")
    return [
        base.mark_rule(color=RED, strokeDash=[4, 3]),
        base.mark_point(color=RED, filled=True, size=45, opacity=1).encode(y=y),
        text.encode(y=y, text="label:N"),
    ]


def _headline(profile: MemoryProfile) -> tuple[str, str]:
    where = f"{profile.device}, torch {torch.__version__}, peak after {profile.peak_ms:.1f} ms"
    return (
        f"Peak memory: {_size(profile.peak_bytes)} beyond the start",
        f"{where}; {_size(profile.end_bytes)} still held at the end",
    )


def timeline_chart(profile: MemoryProfile, top: int = 7) -> "alt.VConcatChart":
    """Memory over time, coloured by at most 7 places, above bars of their bytes at the peak."""
    import altair as alt

    held = _largest_at_peak(profile, top)
    charts: list[Any] = [_timeline(profile, held, WIDTH, GREY)]
    if held:
        charts.append(_bars(held))
    title, facts = _headline(profile)
    chart = alt.vconcat(*charts, spacing=26).resolve_scale(color="independent")
    chart = chart.properties(
        title=alt.Title(title, subtitle=facts, anchor="start", fontSize=16, offset=14), padding=16
    )
    chart = chart.configure_axis(
        grid=False, labelColor=INK, titleColor=INK, domainColor=GREY, tickColor=GREY
    )
    return chart.configure_view(stroke=None).configure_title(color=INK, subtitleColor=INK)


def _bars(held: list[_Place]) -> Any:
    """A bar, a name and a number for each place."""
    import altair as alt
    import pandas as pd

    names = [one.label if one.colour else OTHERS for one in held]
    rows = [
        (name, one.label, one.bytes, one.count, one.value, " < ".join(one.stack))
        for name, one in zip(names, held, strict=True)
    ]
    bars = pd.DataFrame(rows, columns=["where", "label", "bytes", "count", "value", "stack"])
    base = alt.Chart(bars).encode(y=alt.Y("where:N", sort=names, title=None, axis=None))
    scale = alt.Scale(domain=[0, max(bars["bytes"], default=1)], nice=False)
    size = alt.X("bytes:Q", axis=None, scale=scale)
    paints = alt.Scale(domain=names, range=[one.colour or GREY for one in held])
    colour = alt.Color("where:N", legend=None, scale=paints)
    tooltip = ["label:N", "bytes:Q", "count:Q", "value:N", "stack:N"]
    bar = base.mark_bar(height=8, yOffset=9, cornerRadius=2)
    dot = base.mark_point(shape="square", filled=True, size=70, xOffset=5, yOffset=-5, opacity=1)
    text = {"dy": -5, "color": INK, "fontSize": 12}
    label = base.mark_text(align="left", dx=16, limit=WIDTH - 166, **text)
    value = base.mark_text(align="right", **text)
    layers = alt.layer(
        bar.encode(x=size, color=colour, tooltip=tooltip),
        dot.encode(x=alt.value(0), color=colour),
        label.encode(x=alt.value(0), text="label:N"),
        value.encode(x=alt.value(WIDTH), text="value:N"),
    )
    title = alt.Title("Held at the peak", fontSize=13, anchor="start")
    layers = layers.properties(width=WIDTH, height=alt.Step(36), title=title)
    return layers.resolve_scale(color="independent")


def timeline_page(profile: MemoryProfile) -> str:
    """The chart as a page for any width, light or dark, without a network."""
    import altair as alt

    held = _largest_at_peak(profile)
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec = (
        _timeline(profile, held, "container", alt.ExprRef("others"))
        .properties(autosize=fit)
        .to_dict()
    )
    title, facts = map(html.escape, _headline(profile))
    data = {
        "spec": {name: value for name, value in spec.items() if name != "config"},
        "themes": {name: theme(name) for name in THEMES},
    }
    return page("memory.html", data, title=title, facts=facts, held=_list(held))


def _list(held: list[_Place]) -> str:
    most = max((one.bytes for one in held), default=0) or 1
    lines = []
    for one in held:
        times = f" ({one.count} allocations)" * (one.count > 1 and one.colour is not None)
        paint = f"background: {one.colour or 'var(--others)'}"
        name = f'<span><i style="{paint}"></i>{html.escape(one.label + times)}</span>'
        bar = f'<div class="bar" style="width: {100 * one.bytes / most:.2f}%; {paint}"></div>'
        stack = "".join(f"<div>{html.escape(step)}</div>" for step in one.stack)
        details = f"<details><summary>stack</summary>{stack}</details>" * bool(stack)
        lines.append(f"<li><div>{name}<span>{one.value}</span></div>{bar}{details}</li>")
    return "<h2>Held at the peak</h2>\n<ul>\n" + "\n".join(lines) + "\n</ul>" if lines else ""


def save(profile: MemoryProfile, path: Path | str) -> None:
    """Write the chart (.png, .svg, offline .html) or the timeline (.csv) in one step.

    Raises:
        Mistake: another suffix.
        OSError: the file cannot be written.
    """
    suffix = _known(path).suffix
    path = destination(Path(path))
    partial = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
    try:
        if suffix == ".csv":
            profile.frame().to_csv(partial, index=False)
        elif suffix == ".html":
            partial.write_text(timeline_page(profile), encoding="utf-8", errors="replace")
        else:
            timeline_chart(profile).save(partial, scale_factor=2 if suffix == ".png" else 1)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _known(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise Mistake(
            f"{str(path)!r} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
        )
    return path


def load_step(text: str) -> Callable[[], object]:
    """Import 'package.module:attribute.path' with the current folder on the path.

    Raises:
        Mistake: another form, no such module or attribute, or arguments are required.
        Any exception of the module during its import.
    """
    name, colon, attributes = text.partition(":")
    if not (colon and attributes and all(map(str.isidentifier, name.split(".")))):
        raise Mistake(f"step is {text!r}, expected module:function, as in train:step")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # the module exists, and imports one that does not
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise Mistake(
            f"step {text!r}: there is no module {error.name!r} in this folder or installed"
        ) from None
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            owner = getattr(found, "__name__", type(found).__name__)
            raise Mistake(f"step {text!r}: {owner!r} has no attribute {attribute!r}")
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
    """Print peak, end, and a table of the places at the peak."""
    from rich.table import Table
    from rich.text import Text

    peak = f"peak [bold]{_size(profile.peak_bytes)}[/bold] beyond the start"
    console.print(f"{peak}, after {profile.peak_ms:.1f} ms", highlight=False)
    console.print(
        f"{_size(profile.end_bytes)} still held at the end, after {profile.timeline[-1].ms:.1f} ms",
        highlight=False,
    )
    if not profile.alive:
        return
    table = Table("where", "size", "share", title=f"Held at the peak, {profile.device}")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for group in profile.alive[:top]:
        times = f" ({group.count} allocations)" if group.count > 1 else ""
        table.add_row(
            Text(group.where + times, overflow="fold"), _size(group.bytes), f"{group.share:.1%}"
        )
    rest = profile.alive[top:]
    if rest:
        size = sum(group.bytes for group in rest)
        table.add_row(f"and {len(rest)} more", _size(size), f"{size / profile.peak_bytes:.1%}")
    console.print(table)


def main(step: str, out: Path | None = None, warmup: int = 1) -> MemoryProfile:
    """Profile 'module:function', print it, write a picture."""
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
