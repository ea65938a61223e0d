"""The charts of the dashboard, and pictures of them for a README."""

import json
from typing import TYPE_CHECKING, Any

from .methods import OURS
from .pages import theme
from .shown import FIELDS, SPLIT, dtypes, prepare

if TYPE_CHECKING:
    import pandas as pd

STEP = 18
CHARTS = ("time", "share", "memory", "error", "history")
VALUE_COLUMN = {"time": 66, "share": 50, "memory": 118, "error": 104}
CASE, METHOD, SHAPE, OTHER = (f"split(datum.value, '\\u001f')[{part}]" for part in range(4))


def spec(name: str, width: int | None = None) -> dict[str, Any]:
    """A chart as Vega-Lite without rows: a line per case and method, marks, and a value column.

    The page sets ``rows``, the domain of the lines (in the history: of the runs), the height, and
    the parameters ``narrow`` and ``gutter``."""
    import altair as alt

    chart = _history() if name == "history" else _by_case(name, width)
    chart = chart.add_params(alt.param("narrow", value=False), alt.param("gutter", value=160))
    fit = alt.AutoSizeParams(type="fit-x" if width is None else "pad", contains="padding")
    return dict(chart.properties(width=width or "container", autosize=fit).to_dict())


def _by_case(name: str, width: int | None) -> Any:
    import altair as alt

    base = alt.Chart(alt.NamedData("rows")).encode(y=_case_axis())
    end = alt.ExprRef(f"max(40, {width or 'width'} - {VALUE_COLUMN[name]})")
    layers = _MARKS[name](base, [0, end])
    tip = alt.ExprRef("datum.tip")
    texts = {"memory": ["memory_text", "logits_text"], "error": ["grad_text", "loss_text"]}
    for i, text in enumerate(texts.get(name, [f"{name}_text"])):
        shift = -i * VALUE_COLUMN[name] * 0.57
        value = base.mark_text(style="value", align="right", dx=shift, tooltip=tip)
        layers.append(value.encode(x=alt.value("width"), text=f"{text}:N"))
    gap = {"memory": "gap", "share": "share_gap"}.get(name, "problem")
    missing = base.mark_text(style="gap", align="left", dx=2, tooltip=tip)
    layers.append(missing.encode(x=alt.value(0), text=f"{gap}:N"))
    return alt.layer(*layers)


def _case_axis() -> Any:
    """A line per method under the name of its case, which has no method: case, nothing, shape."""
    import altair as alt

    short = f"(narrow ? replace({METHOD}, 'cross_entropy', 'ce') : {METHOD})"
    name = f"{short} + ({METHOD} && {OTHER} ? ' \u2020' : '')"
    label = f"{SHAPE} ? {CASE} + ' \u00b7 ' + {SHAPE} : {name}"
    ours = f"indexof({METHOD}, 'lossfuse') == 0 && {METHOD} != 'lossfuse reference'"
    axis = alt.Axis(
        title=None,
        labelExpr=label,
        labelAlign="left",
        labelLimit=0,
        labelOverlap=False,
        labelFontWeight=alt.condition(f"{SHAPE} || {ours}", alt.value("bold"), alt.value("normal")),
        labelPadding=alt.ExprRef("gutter"),
        minExtent=alt.ExprRef("gutter"),
        maxExtent=alt.ExprRef("gutter"),
        domain=False,
        ticks=False,
        grid=False,
    )
    scale = alt.Scale(type="band", domain=["y"], paddingInner=0.3, paddingOuter=0.15)
    return alt.Y("line:N", axis=axis, scale=scale)


def _x(field: str, span: list[Any], labels: str = "~g", log: bool = True) -> Any:
    """The number of a row, on a logarithmic scale or on one from 0."""
    import altair as alt

    axis = alt.Axis(
        orient="top",
        format=labels,
        tickCount=4,
        title=None,
        domain=False,
        ticks=False,
        labelSeparation=4,
    )
    if labels == "~e":
        axis.labelExpr = "replace(replace(datum.label, '+', ''), /e0$/, '')"
    if not log:
        return alt.X(f"{field}:Q", scale=alt.Scale(zero=True, nice=False, range=span), axis=axis)
    round_number = "indexof('125', format(datum.value, '.0e')[0]) >= 0"
    axis.gridOpacity = alt.condition(round_number, alt.value(1), alt.value(0))
    scale = alt.Scale(type="log", nice=False, padding=10, range=span)
    return alt.X(f"{field}:Q", scale=scale, axis=axis)


def _solid() -> dict[str, Any]:
    """A filled mark; hollow for a row of another run."""
    import altair as alt

    fill, outline = (
        alt.condition("datum.other", alt.value(other), alt.value(own))
        for other, own in ((0.15, 1), (1, 0))
    )
    paint = {"fill": alt.Fill("color:N", scale=None), "stroke": alt.Stroke("color:N", scale=None)}
    return paint | {"fillOpacity": fill, "strokeOpacity": outline}


def _times(base: Any, span: list[Any]) -> list[Any]:
    import altair as alt

    paint, tip = alt.Color("color:N", scale=None), alt.ExprRef("datum.tip")
    ideal = base.mark_tick(style="ideal", thickness=2, height=STEP)
    spread = base.mark_rule(strokeWidth=2.5, opacity=0.5, tooltip=tip)
    point = base.mark_point(shape="circle", size=62, strokeWidth=1.6, opacity=1, tooltip=tip)
    return [
        ideal.encode(x=_x("ideal", span)),
        spread.encode(x=_x("ms_lo", span), x2="ms_hi:Q", color=paint),
        point.encode(x=_x("ms", span), **_solid()),
    ]


def _shares(base: Any, span: list[Any]) -> list[Any]:
    import altair as alt

    tip, scale = alt.ExprRef("datum.tip"), alt.Scale(zero=True, nice=False, range=span)
    one = alt.Chart(alt.InlineData(values=[{}])).mark_rule(style="ideal", strokeWidth=2)
    bar = base.mark_bar(cornerRadiusEnd=2, tooltip=tip)
    spread = base.mark_rule(style="spread", strokeWidth=1.2, tooltip=tip)
    return [
        one.encode(x=alt.datum(1, scale=scale)),
        bar.encode(x=_x("share", span, "~%", log=False), **_solid()),
        spread.encode(x=_x("share_lo", span, "~%", log=False), x2="share_hi:Q"),
    ]


def _sizes(base: Any, span: list[Any]) -> list[Any]:
    import altair as alt

    bar = base.mark_bar(cornerRadiusEnd=2, tooltip=alt.ExprRef("datum.tip"))
    return [bar.encode(x=_x("logits", span, log=False), **_solid())]


def _errors(base: Any, span: list[Any]) -> list[Any]:
    """A ring for the loss, a dot for the gradient."""
    import altair as alt

    paint, tip = alt.Color("color:N", scale=None), alt.ExprRef("datum.tip")
    ring, dot = (
        base.mark_point(size=48, filled=filled, opacity=1, strokeWidth=1.8, tooltip=tip)
        for filled in (False, True)
    )
    loss, grad = (_x(field, span, "~e") for field in ("loss_error", "grad_error"))
    return [ring.encode(x=loss, color=paint), dot.encode(x=grad, color=paint)]


_MARKS = {"time": _times, "share": _shares, "memory": _sizes, "error": _errors}


def _history() -> Any:
    import altair as alt

    tip, paint = alt.ExprRef("datum.tip"), alt.Color("color:N", scale=None)
    label = "[split(datum.value, '\\u001f')[1], slice(datum.value, 0, 10)]"
    axis = alt.Axis(
        title=None,
        labelExpr=label,
        labelAngle=0,
        labelOverlap="greedy",
        domain=False,
        ticks=False,
        grid=False,
        labelPadding=8,
    )
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("run:O", axis=axis, scale=alt.Scale(domain=["x"])), color=paint
    )

    def y(field: str) -> alt.Y:
        axis = alt.Axis(
            title="ms",
            titleAngle=0,
            titleAlign="left",
            titleY=-10,
            titleX=0,
            format="~g",
            tickCount=5,
            domain=False,
            ticks=False,
        )
        return alt.Y(f"{field}:Q", scale=alt.Scale(type="log", nice=False, padding=14), axis=axis)

    width = alt.condition("indexof(datum.method, 'lossfuse') == 0", alt.value(2.6), alt.value(1.4))
    layers = [
        base.mark_line(opacity=0.9).encode(y=y("ms"), detail="method:N", strokeWidth=width),
        base.mark_rule(strokeWidth=2, opacity=0.4, tooltip=tip).encode(y=y("ms_lo"), y2="ms_hi:Q"),
        base.mark_circle(size=55, opacity=1, tooltip=tip).encode(y=y("ms")),
        base.mark_text(style="gap", align="center", dy=-6, tooltip=tip).encode(
            y=alt.value("height"), text="problem:N"
        ),
    ]
    return alt.layer(*layers, height=300)


HEADINGS = {
    "logits": "Cross entropy of logits",
    "head": "Linear layer and cross entropy",
    "labels": "Binary cross entropy of labels",
}
PAPERS = {"light": "#ffffff", "dark": "#12161c"}


def pictures(frame: "pd.DataFrame") -> dict[str, bytes]:
    """PNGs by file name: time and memory of each op on the device measured last, light and dark."""
    import vl_convert

    rows, _ = prepare(frame)
    shown = [row for row in rows if row["shown"] and not row["other"]]
    if not shown:
        return {}
    place = max(shown, key=lambda row: row["date"])["place"]
    drawn = {}
    for op in OURS:
        mine = _first_choice([r for r in shown if (r["place"], r["op"]) == (place, op)], place)
        if not any(row["ms"] for row in mine):
            continue
        picture = _picture(mine, HEADINGS[op])
        for paper, background in PAPERS.items():
            config = theme(paper) | {"background": background}
            png = vl_convert.vegalite_to_png(json.dumps(picture | {"config": config}), scale=2)
            drawn[f"lossfuse-{op}{'-dark' * (paper == 'dark')}.png"] = png
    return drawn


def _first_choice(rows: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Rows of one dtype, one mode and at most six cases."""
    modes = ("forward+backward", "forward", "no_grad")
    for key, preferred in (("dtype", dtypes(place)), ("mode", modes)):
        found = {row[key] for row in rows}
        first = next((value for value in preferred if value in found), min(found, default=""))
        rows = [row for row in rows if row[key] == first]
    cases = list(dict.fromkeys(row["case"] for row in rows))[:6]
    return [r for r in rows if r["case"] in cases and r["method"] != "lossfuse reference"]


def _picture(rows: list[dict[str, Any]], heading: str) -> dict[str, Any]:
    """Time beside memory as Vega-Lite with its rows."""
    bounded = any(row["ideal"] for row in rows)
    time = "Time, ms" + ": the tick is the roofline" * bounded
    lines = _lines(rows)
    panels = [_panel("time", time, lines)]
    panels.append(_panel("memory", "Peak memory, in units of the logits", lines))
    first = rows[0]
    facts = [first["place"], first["dtype"], first["mode"].replace("+", " + ")]
    facts += [f"torch {first['torch']}", *dict.fromkeys(row["commit"] for row in rows)]
    title = {"text": heading, "subtitle": ", ".join(filter(None, facts))}
    gutter = 24 + 6.4 * max(len(row["method"]) for row in rows)
    return {
        "hconcat": panels,
        "spacing": 40,
        "padding": 16,
        "datasets": {"rows": [{field: row[field] for field in FIELDS} for row in rows]},
        "params": [{"name": "narrow", "value": False}, {"name": "gutter", "value": gutter}],
        "title": title | {"fontSize": 17, "subtitleFontSize": 12, "offset": 18},
    }


def _panel(name: str, text: str, lines: list[str]) -> dict[str, Any]:
    panel = spec(name, 420) | {"height": STEP * len(lines)}
    panel["title"] = {"text": text, "anchor": "start", "frame": "group"}
    for layer in panel["layer"]:
        if "y" in layer["encoding"]:
            layer["encoding"]["y"]["scale"]["domain"] = lines
    for key in ("params", "config", "$schema", "autosize"):
        panel.pop(key, None)
    return panel


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """Keys of the lines: an empty one, the name and the methods of each case."""
    return list(
        dict.fromkeys(
            line for row in rows for line in (3 * SPLIT + row["case"], row["head"], row["line"])
        )
    )[1:]
