"""A page of rows that opens offline: time and memory by case, method and version."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import CHARTS, STEP, pictures, spec
from .methods import BASELINE, OURS
from .pages import THEMES, page, theme
from .rows import BOUNDS, BadRows, holds, read, write_atomically
from .shown import FIELDS, dtypes, prepare, summary

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = (
    "place",
    "op",
    "dtype",
    "mode",
    "case",
    "shape",
    "reason",
    "faster",
    "within_spread",
    "saved",
    "saved_share",
    "share",
    "bound",
    "faster_text",
    "time_text",
    "saved_text",
    "memory_text",
    "peer",
    "peer_faster",
    "peer_within_spread",
    "peer_faster_text",
    "peer_text",
    "why",
    "memory_why",
)


def build(frame: "pd.DataFrame") -> str:
    """The whole page: rows, charts, scripts and style in one HTML text, without a network."""
    rows, left_out = prepare(frame)
    data = {
        "rows": _columns(rows, FIELDS),
        "summary": _columns(summary(rows), SUMMARY),
        "step": STEP,
        "charts": {name: spec(name) for name in CHARTS},
        "themes": {name: theme(name) for name in THEMES},
        "names": {"ours": OURS, "baseline": BASELINE},
        "dtypes": {row["place"]: dtypes(row["place"]) for row in rows},
    }
    return page("dashboard.html", data, header=_header(rows), warnings=_warnings(rows, left_out))


def main(paths: list[Path], out: Path, pngs: Path | None) -> None:
    """Write the page, and pictures for a README into the folder ``pngs``; print the files.

    Files of errors against bounds are skipped. BadRows, before anything is written, if no row is
    left."""
    idle = [f"{path} holds errors against bounds" for path in paths if holds(path, BOUNDS)]
    mine = [path for path in paths if not holds(path, BOUNDS)]
    idle += [f"{path} has no rows" for path in mine if not len(read([path]))]
    frame = read(mine)
    if not len(frame):
        raise BadRows(
            f"there is nothing to show: {'; '.join(idle)}; measure first, with bench --out FILE.csv"
        )
    written = []
    path = out
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = build(frame).encode("utf-8", errors="replace")
        write_atomically(path, content)
        files = len(paths) - len(idle)
        counted = f"{len(frame):,} row{'s' * (len(frame) != 1)} of {files} file{'s' * (files != 1)}"
        written.append(f"{path}: {len(content) / 1e3:,.0f} KB, {counted}")
        for name, content in pictures(frame).items() if pngs else ():
            path = (pngs or Path()) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            written.append(f"{path}: {len(content) / 1e3:,.0f} KB")
    except OSError as error:
        raise BadRows(f"{path} cannot be written: {error.strerror or error}") from error
    print("\n".join([*written, *(f"nothing to show: {line}" for line in idle)]))


def _columns(records: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """For each name its distinct values, and the index of each record's value among them."""
    columns = {}
    for name in names:
        places: dict[Any, int] = {}
        columns[name] = {
            "at": [places.setdefault(record[name], len(places)) for record in records],
            "values": list(places),
        }
    return columns


def _header(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>There are no rows to show: measure some first.</p>"
    newest = max(rows, key=lambda row: (row["date"], row["shown"]))
    places = list(dict.fromkeys(row["place"] for row in rows))
    facts = {"device" if len(places) == 1 else "devices": "; ".join(places)}
    facts |= {name: newest[name] for name in ("torch", "triton", "lossfuse")}
    date = newest["date"].replace("T", " ")[:16]
    facts |= {"newest run": f"{date} UTC" if date else "", "commit": newest["commit"]}
    facts["rows"] = f"{len(rows):,}"
    entries = (
        f"<div><dt>{name}</dt><dd>{html.escape(text)}</dd></div>"
        for name, text in facts.items()
        if text
    )
    return f"<dl>{''.join(entries)}</dl>"


def _warnings(rows: list[dict[str, Any]], left_out: int) -> str:
    shown = [row for row in rows if row["shown"]]
    dirty = sum(row["commit"].endswith("*") for row in shown)
    red = sum(row["tests"] == "failed" for row in shown)
    of_all, said = f"of the {len(shown)} rows in the charts", []
    if dirty:
        changes = "were measured with uncommitted changes; their commit has a *."
        said.append(f"{dirty} {of_all} {changes}")
    if red:
        said.append(f"{red} {of_all} belong to a commit with failed tests and have no ratio.")
    if left_out:
        said.append(f"{left_out} rows of an earlier shape of their case are left out.")
    return "".join(f'<p class="warning">{line}</p>' for line in said)
