"""The charts of the dashboard, and pictures of them for a README."""

import json
from typing import TYPE_CHECKING, Any

from .methods import OURS
from .pages import THEMES, theme
from .shown import FIELDS, SPLIT, dtypes, prepare

if TYPE_CHECKING:
    import pandas as pd

STEP = 18
CHARTS = ("time", "share", "memory", "error", "history")
VALUE_COLUMN = {"time": 66, "share": 50, "memory": 118, "error": 104}
CASE, METHOD, SHAPE, OTHER = (f"split(datum.value, '\\u001f')[{part}]" for part in range(4))


def spec(name: str, width: int | None = None) -> dict[str, Any]:
    """A chart as Vega-Lite without its rows: a line per case and method, the marks, and what they
    say in a column at the right.

    Whoever draws it sets ``rows``, the domain of the lines and the height for them (of history: the
    domain of the runs), and the parameters ``narrow`` and ``gutter``."""
    import altair as alt

    chart = _history() if name == "history" else _by_case(name, width)
    chart = chart.add_params(alt.param("narrow", value=False), alt.param("gutter", value=160))
    fit = alt.AutoSizeParams(type="fit-x" if width is None else "pad", contains="padding")
    return dict(chart.properties(width=width or "container", autosize=fit).to_dict())


def _by_case(name: str, width: int | None) -> Any:
    import altair as alt

    # the head of a case has no method: its key is case, nothing, shape
    name_of = f"(narrow ? replace({METHOD}, 'cross_entropy', 'ce') : {METHOD}) + ({METHOD} && {OTHER} ? ' \u2020' : '')"
    label = f"{SHAPE} ? {CASE} + ' \u00b7 ' + {SHAPE} : {name_of}"
    ours = f"indexof({METHOD}, 'lossfuse') == 0 && {METHOD} != 'lossfuse reference'"
    strong = alt.condition(f"{SHAPE} || {ours}", alt.value("bold"), alt.value("normal"))
    axis = alt.Axis(
        title=None,
        labelExpr=label,
        labelAlign="left",
        labelLimit=0,
        labelOverlap=False,
        labelFontWeight=strong,
        labelPadding=alt.ExprRef("gutter"),
        minExtent=alt.ExprRef("gutter"),
        maxExtent=alt.ExprRef("gutter"),
        domain=False,
        ticks=False,
        grid=False,
    )
    y = alt.Y(
        "line:N",
        axis=axis,
        scale=alt.Scale(type="band", domain=["y"], paddingInner=0.3, paddingOuter=0.15),
    )
    base = alt.Chart(alt.NamedData("rows")).encode(y=y)
    room: list[Any] = [0, alt.ExprRef(f"max(40, {width or 'width'} - {VALUE_COLUMN[name]})")]
    log = alt.Scale(type="log", nice=False, padding=10, range=room)
    linear = alt.Scale(zero=True, nice=False, range=room)
    paint, tip = alt.Color("color:N", scale=None), alt.ExprRef("datum.tip")
    # rows of another run are hollow
    solid: dict[str, Any] = {
        "fill": alt.Fill("color:N", scale=None), "stroke": alt.Stroke("color:N", scale=None),
        "fillOpacity": alt.condition("datum.other", alt.value(0.15), alt.value(1)),
        "strokeOpacity": alt.condition("datum.other", alt.value(1), alt.value(0)),
    }  # fmt: skip

    def x(field: str, scale: alt.Scale, labels: str = "~g") -> alt.X:
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
        if scale is log:
            axis.gridOpacity = alt.condition(
                "indexof('125', format(datum.value, '.0e')[0]) >= 0", alt.value(1), alt.value(0)
            )
        return alt.X(f"{field}:Q", scale=scale, axis=axis)

    if name == "time":
        layers = [
            base.mark_tick(style="ideal", thickness=2, height=STEP).encode(x=x("ideal", log)),
            base.mark_rule(strokeWidth=2.5, opacity=0.5, tooltip=tip).encode(
                x=x("ms_lo", log), x2="ms_hi:Q", color=paint
            ),
            base.mark_point(
                shape="circle", size=62, strokeWidth=1.6, opacity=1, tooltip=tip
            ).encode(x=x("ms", log), **solid),
        ]
    elif name == "share":
        one = alt.Chart(alt.InlineData(values=[{}])).mark_rule(style="ideal", strokeWidth=2)
        layers = [
            one.encode(x=alt.datum(1, scale=linear)),
            base.mark_bar(cornerRadiusEnd=2, tooltip=tip).encode(
                x=x("share", linear, "~%"), **solid
            ),
            base.mark_rule(style="spread", strokeWidth=1.2, tooltip=tip).encode(
                x=x("share_lo", linear, "~%"), x2="share_hi:Q"
            ),
        ]
    elif name == "memory":
        layers = [
            base.mark_bar(cornerRadiusEnd=2, tooltip=tip).encode(x=x("logits", linear), **solid)
        ]
    else:
        ring, dot = (
            base.mark_point(size=48, filled=filled, opacity=1, strokeWidth=1.8, tooltip=tip)
            for filled in (False, True)
        )
        layers = [
            ring.encode(x=x("loss_error", log, "~e"), color=paint),
            dot.encode(x=x("grad_error", log, "~e"), color=paint),
        ]
    texts = {
        "time": ["time_text"],
        "share": ["share_text"],
        "memory": ["memory_text", "logits_text"],
        "error": ["grad_text", "loss_text"],
    }[name]
    for i, text in enumerate(texts):
        value = base.mark_text(
            style="value", align="right", dx=-i * VALUE_COLUMN[name] * 0.57, tooltip=tip
        )
        layers.append(value.encode(x=alt.value("width"), text=f"{text}:N"))
    gap = {"memory": "gap", "share": "share_gap"}.get(name, "problem")
    layers.append(
        base.mark_text(style="gap", align="left", dx=2, tooltip=tip).encode(
            x=alt.value(0), text=f"{gap}:N"
        )
    )
    return alt.layer(*layers)


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


def pictures(frame: "pd.DataFrame") -> dict[str, bytes]:
    """Time and memory of each op on the device measured last, PNG by file name, for light and for
    dark pages."""
    import vl_convert

    rows, _ = prepare(frame)
    shown = [row for row in rows if row["shown"] and not row["other"]]
    made = {}
    place = ""
    if shown:
        place = max(shown, key=lambda row: row["date"])["place"]
        shown = [row for row in shown if row["place"] == place]
    headings = {
        "logits": "Cross entropy of logits",
        "head": "Linear layer and cross entropy",
        "labels": "Binary cross entropy of labels",
    }
    for op in OURS:
        mine = [row for row in shown if row["op"] == op]
        for key, wanted in (
            ("dtype", dtypes(place)),
            ("mode", ("forward+backward", "forward", "no_grad")),
        ):
            found = {row[key] for row in mine}
            first = next((value for value in wanted if value in found), min(found, default=""))
            mine = [row for row in mine if row[key] == first]
        cases = list(dict.fromkeys(row["case"] for row in mine))[:6]
        mine = [
            row for row in mine if row["case"] in cases and row["method"] != "lossfuse reference"
        ]
        if not any(row["ms"] for row in mine):
            continue
        lines = _lines(mine)
        panels = []
        bounded = any(row["ideal"] for row in mine)
        titles = {
            "time": "Time, ms" + ": the tick is the roofline" * bounded,
            "memory": "Peak memory, in units of the logits",
        }
        for name, title in titles.items():
            panel = spec(name, 420) | {
                "height": STEP * len(lines),
                "title": {"text": title, "anchor": "start", "frame": "group"},
            }
            panels.append(
                {
                    key: value
                    for key, value in panel.items()
                    if key not in ("params", "config", "$schema", "autosize")
                }
            )
            for layer in panel["layer"]:
                if "y" in layer["encoding"]:
                    layer["encoding"]["y"]["scale"]["domain"] = lines
        gutter = 24 + 6.4 * max(len(row["method"]) for row in mine)
        first_row = mine[0]
        commits = dict.fromkeys(row["commit"] for row in mine)
        facts = [
            place,
            first_row["dtype"],
            first_row["mode"].replace("+", " + "),
            f"torch {first_row['torch']}",
            *commits,
        ]
        heading = {
            "text": headings[op],
            "subtitle": ", ".join(filter(None, facts)),
            "fontSize": 17,
            "subtitleFontSize": 12,
            "offset": 18,
        }
        for paper in THEMES:
            whole = {
                "hconcat": panels,
                "spacing": 40,
                "padding": 16,
                "datasets": {"rows": [{field: row[field] for field in FIELDS} for row in mine]},
                "params": [{"name": "narrow", "value": False}, {"name": "gutter", "value": gutter}],
                "title": heading,
                "config": theme(paper)
                | {"background": {"light": "#ffffff", "dark": "#12161c"}[paper]},
            }
            made[f"lossfuse-{op}{'-dark' * (paper == 'dark')}.png"] = vl_convert.vegalite_to_png(
                json.dumps(whole), scale=2
            )
    return made


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """Keys of the lines: of each case an empty one, its head, and its methods."""
    return list(
        dict.fromkeys(
            line for row in rows for line in (3 * SPLIT + row["case"], row["head"], row["line"])
        )
    )[1:]
