"""Rows as the page shows them: one run of each case, ours beside torch and peers, as text."""

import math
import re
import zlib
from typing import TYPE_CHECKING, Any

from .cases import CASES, DTYPES
from .methods import BASELINE, OURS
from .rows import TEXT

if TYPE_CHECKING:
    import pandas as pd

# contrast of 3:1 on the light and the dark page; in one op 0.05 apart in OKLab, also for protan and
# deutan vision; ours are warm
COLORS = {
    "lossfuse": "#c53943",
    "lossfuse linear": "#c53943",
    "lossfuse in place": "#d7676a",
    "lossfuse torch": "#b56f3d",
    "lossfuse ids": "#974783",
    "lossfuse ids in place": "#bf56b5",
    "lossfuse stats": "#974783",
    "lossfuse stats lean": "#bf56b5",
    "lossfuse linear stats": "#974783",
    "lossfuse linear lean": "#bf56b5",
    "lossfuse linear leanest": "#f16015",
    "lossfuse linear kept": "#fa5b70",
    "lossfuse reference": "#8d6263",
    "lossfuse linear reference": "#8d6263",
    "F.cross_entropy": "#8197a7",
    "linear + F.cross_entropy": "#8197a7",
    "F.binary_cross_entropy_with_logits": "#8197a7",
    "F.cross_entropy(x.float())": "#76778e",
    "linear + F.cross_entropy(x.float())": "#76778e",
    "F.binary_cross_entropy_with_logits(x.float())": "#76778e",
    "torch.compile": "#437fca",
    "F.linear_cross_entropy": "#196b95",
    "Liger": "#55957f",
    "CCE": "#a78651",
    "quack": "#bb8321",
    "flash-attention": "#6559b1",
    "fla": "#567019",
    "F.cross_entropy + stats": "#5b92fb",
    "scatter + F.binary_cross_entropy_with_logits": "#5b92fb",
}
OTHERS = ("#5b86a8", "#a07cb5", "#7f8c4a", "#4f9a9c", "#8a6f5c")
CASE = ("place", "op", "dtype", "mode", "case")
SPLIT = "\x1f"  # between the parts of a key; texts of rows have no control characters
# fields of a row that the page needs
FIELDS = (
    "place",
    "op",
    "dtype",
    "mode",
    "case",
    "method",
    "shown",
    "other",
    "line",
    "head",
    "run",
    "color",
    "status",
    "problem",
    "gap",
    "note",
    "ms",
    "ms_lo",
    "ms_hi",
    "ideal",
    "share",
    "share_lo",
    "share_hi",
    "share_gap",
    "logits",
    "loss_error",
    "grad_error",
    "time_text",
    "spread_text",
    "ideal_text",
    "share_text",
    "memory_text",
    "logits_text",
    "loss_text",
    "grad_text",
    "shape",
    "repeats",
    "commit",
    "tests",
    "date",
    "versions",
)


def prepare(frame: "pd.DataFrame") -> tuple[list[dict[str, Any]], int]:
    """Records of all rows in the order of the lines, and the number of rows of an earlier shape.

    One run of a case is ``shown``, and the newest row of each method outside that run, with a note
    in ``other``. The rest is history."""
    import pandas as pd

    frame = frame.copy()
    for name in TEXT:
        frame[name] = frame[name].map(clean)
    settings = frame["settings"].map(lambda text: f" ({text})" if text else "")
    frame["place"] = frame["device"].where(frame["device"] != "", "unnamed device") + settings
    frame["when"] = pd.to_datetime(frame["date"], utc=True, errors="coerce", format="ISO8601")
    frame = frame.sort_values("when", kind="stable", na_position="first").reset_index(drop=True)
    frame["shape"] = [
        _shape(*row) for row in zip(frame["op"], frame["n"], frame["v"], frame["d"], strict=True)
    ]
    if len(frame):
        current = (
            frame.groupby(["place", "op", "case"])["shape"].transform("last") == frame["shape"]
        )
        left_out, frame = int((~current).sum()), frame[current]
    else:
        left_out = 0
    frame = frame.drop_duplicates([*CASE, "method", "date", "commit"], keep="last")
    records = [
        _record({str(name): value for name, value in row.items()})
        for row in frame.to_dict("records")
    ]
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in records:
        cases.setdefault(tuple(row[key] for key in CASE), []).append(row)
    for rows in cases.values():
        _choose_run(rows)
        _require_bound(rows)
    return sorted(records, key=lambda row: (_case_rank(row), _method_rank(row["method"]))), left_out


def _record(row: dict[str, Any]) -> dict[str, Any]:
    ok = row["status"] == "ok"
    ms, lo, hi = (_positive(row[name]) if ok else None for name in ("ms_p50", "ms_p20", "ms_p80"))
    if ms is None or lo is None or hi is None:
        lo = hi = None
    ideal = _positive(row["ideal_ms"])
    peak, loss_error, grad_error = (
        _finite(row[name]) if ok else None
        for name in ("peak_extra_bytes", "loss_error", "grad_error")
    )
    itemsize = DTYPES[row["dtype"]].itemsize if row["dtype"] in DTYPES else 0
    size = row["n"] * row["v"] * itemsize
    logits = peak / size if peak is not None and size > 0 else None
    share, share_lo, share_hi = (_finite(ideal / t) if ideal and t else None for t in (ms, hi, lo))
    names = {"torch": "torch", "triton": "triton", "lossfuse": "lossfuse", "package": ""}
    versions = (f"{name} {row[column]}".strip() for column, name in names.items() if row[column])
    dirty = "*" if row["dirty"] else ""
    problem = "" if ok else row["status"]
    keys = {
        "line": f"{row['case']}{SPLIT}{row['method']}",
        "head": f"{row['case']}{SPLIT}{SPLIT}{row['shape']}",
        "run": f"{row['date']}{SPLIT}{row['commit'] or 'no commit'}{dirty}",
    }
    numbers = {"ms": ms, "ms_lo": lo, "ms_hi": hi, "ideal": ideal, "peak": peak, "logits": logits}
    numbers |= {"share": share, "share_lo": share_lo, "share_hi": share_hi}
    numbers |= {"loss_error": _positive(loss_error), "grad_error": _positive(grad_error)}
    texts = {
        "time_text": _time(ms),
        "spread_text": "" if lo is None else f"{_time(lo)} \u2013 {_time(hi)}",
        "ideal_text": _time(ideal),
        "share_text": _percent(share),
        "memory_text": _bytes(peak),
        "logits_text": _times(logits),
        "loss_text": _error(loss_error),
        "grad_text": _error(grad_error),
        "repeats": "" if _finite(row["repeats"]) is None else f"{row['repeats']:.0f}",
        "versions": ", ".join(versions),
        "commit": row["commit"] + dirty,
    }
    gaps = {"problem": problem, "share_gap": problem, "gap": problem}
    if ok and peak is None:
        gaps["gap"] = "not measured"
    state = {"shown": False, "other": "", "color": color(row["method"])}
    return row | state | keys | numbers | texts | gaps


def _choose_run(rows: list[dict[str, Any]]) -> None:
    """Mark the newest run with ours and torch's, and methods that only other runs have.

    ``rows`` are those of one case, oldest first."""
    ours, base = (names.get(rows[0]["op"]) for names in (OURS, BASELINE))
    methods: dict[str, set[str]] = {}
    for row in rows:
        methods.setdefault(row["run"], set()).add(row["method"])
    order = {run: place for place, run in enumerate(methods)}
    chosen = max(
        methods,
        key=lambda run: (len({ours, base} & methods[run]), ours in methods[run], order[run]),
    )
    newest = {row["method"]: row for row in rows}
    for row in rows:
        if row["run"] == chosen:
            row["shown"] = True
        elif row["method"] not in methods[chosen] and row is newest[row["method"]]:
            row |= {
                "shown": True,
                "other": "another run",
                "line": row["line"] + 2 * SPLIT + "other",
            }


def _require_bound(rows: list[dict[str, Any]]) -> None:
    """Drop the roofline of a run in which a method was faster: it is not a bound there."""
    beaten = {row["run"] for row in rows if row["share"] and (row["share_lo"] or row["share"]) > 1}
    for row in rows:
        if row["run"] in beaten:
            row |= dict.fromkeys(("ideal", "share", "share_lo", "share_hi")) | {"share_text": ""}
            row["ideal_text"] += ", not a bound" * bool(row["ideal_text"])
            row["share_gap"] = row["problem"] or "not a bound"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare ours with torch and the fastest peer: a record per device, op, dtype, mode and case.

    Only ``ok`` rows of the same run are compared, because times of different runs drift. A commit
    with failed tests has no ratio."""
    runs: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["shown"] and not row["other"]:
            runs.setdefault(tuple(row[key] for key in CASE), {})[row["method"]] = row
    return [
        _compared(run, OURS[op], BASELINE[op])
        for (_, op, *_), run in runs.items()
        if OURS.get(op) in run
    ]


def _compared(run: dict[str, dict[str, Any]], our_name: str, name: str) -> dict[str, Any]:
    ours, base = run[our_name], run.get(name)
    why = memory_why = _obstacle(ours, base, name)
    faster = saved = saved_share = peer = None
    if base is not None and not why:
        faster = _finite(base["ms"] / ours["ms"])
        # F.cross_entropy(x.float()) is a form of the baseline and no peer
        own = ("lossfuse", name)
        peers = [r for r in run.values() if r["ms"] and not r["method"].startswith(own)]
        peer = min(peers, key=lambda row: row["ms"], default=None)
        if ours["peak"] is None or base["peak"] is None:
            memory_why = "not measured"
        else:
            saved = base["peak"] - ours["peak"]
            saved_share = _finite(saved / base["peak"]) if base["peak"] else None
    peer_faster, peer_texts = None, []
    if peer is not None:
        peer_faster = _finite(peer["ms"] / ours["ms"])
        peer_texts = [peer["method"], peer["time_text"], peer["memory_text"]]
    return {key: ours[key] for key in (*CASE, "shape")} | {
        "share": None if ours["tests"] == "failed" else ours["share"],
        "reason": CASES[ours["case"]].reason if ours["case"] in CASES else "",
        "bound": ours["share_gap"] != "not a bound",
        "faster": faster,
        "within_spread": faster is not None and _overlap(ours, base),
        "saved": saved,
        "saved_share": saved_share,
        "faster_text": _times(faster),
        "saved_text": _saved(saved, saved_share),
        "time_text": _change("time_text", base, ours),
        "memory_text": _change("memory_text", base, ours),
        "peer": peer["method"] if peer else "",
        "peer_faster": peer_faster,
        "peer_within_spread": _overlap(ours, peer),
        "peer_faster_text": _times(peer_faster),
        "peer_text": ", ".join(filter(None, peer_texts)),
        "why": why,
        "memory_why": memory_why,
    }


def _obstacle(ours: dict[str, Any], base: dict[str, Any] | None, name: str) -> str:
    """The reason why there is no ratio, or ''."""
    if ours["status"] != "ok":
        return f"{ours['method']}: {ours['status']}"
    if ours["tests"] == "failed":
        return "tests of this commit failed"
    if base is None:
        return f"{name} was not in this run"
    if base["status"] != "ok":
        return f"{name}: {base['status']}"
    return "no time" if ours["ms"] is None or base["ms"] is None else ""


def _overlap(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    if other is None or not (one["ms_lo"] and other["ms_lo"]):
        return False
    return bool(max(one["ms_lo"], other["ms_lo"]) <= min(one["ms_hi"], other["ms_hi"]))


def _change(field: str, base: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    before = (base[field] or base["problem"]) if base else ""
    return f"{before} \u2192 {ours[field]}" if before and ours[field] else ours[field]


def _method_rank(method: str) -> tuple[int, str]:
    known = list(COLORS)
    unknown = known.index("lossfuse reference") if method.startswith("lossfuse") else len(known)
    return known.index(method) if method in COLORS else unknown, method


def _case_rank(row: dict[str, Any]) -> tuple[Any, ...]:
    known = list(CASES)
    return (
        known.index(row["case"]) if row["case"] in CASES else len(known),
        row["n"] * row["v"],
        row["case"],
    )


def clean(text: object) -> str:
    """Replace control characters, which a terminal obeys, and lone surrogates."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", str(text))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _positive(value: float | None) -> float | None:
    value = _finite(value)
    return value if value is not None and value > 0 else None


def digits(value: float) -> str:
    """Three significant digits, never an exponent within reason: 0.0123, 1.23, 12.3, 1,230."""
    if value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def _time(ms: float | None) -> str:
    if ms is None:
        return ""
    scale, unit = (1e3, "\u00b5s") if ms < 1 else (1, "ms") if ms < 1e4 else (1e-3, "s")
    return f"{digits(ms * scale)} {unit}"


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    power = min(3, int(math.log2(max(abs(count), 1)) // 10))
    return f"{digits(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _times(value: float | None) -> str:
    if value is None:
        return ""
    if 0 < value < 0.01:
        return "<0.01\u00d7"
    return f"{value:.2f}\u00d7" if abs(value) < 100 else f"{digits(value)}\u00d7"


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.0f}%" if 0.1 <= abs(value) < 100 else f"{digits(100 * value)}%"


def _error(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    digit, _, power = f"{value:.0e}".partition("e")
    return f"{digit}e{int(power)}" if int(power) else digit


def _saved(saved: float | None, share: float | None) -> str:
    if saved is None:
        return ""
    if share is None:
        return _bytes(saved)
    if abs(share) < 0.005:
        return "the same"
    return f"{_percent(share)} less" if share > 0 else f"{_percent(-share)} more"


def _shape(op: str, n: int, v: int, d: float) -> str:
    if op == "labels" and _finite(d) is not None:
        return f"{int(n):,} \u00d7 {int(v):,}, {int(d):,} of them 1"
    return " \u00d7 ".join(
        f"{int(size):,}" for size in ((n, v) if _finite(d) is None else (n, d, v))
    )


def dtypes(place: str) -> tuple[str, ...]:
    """Dtypes in order of interest: fp32 on a CPU, which may lack bf16 instructions, bf16 on a GPU.

    The name of a CPU ends with its threads."""
    return (
        ("fp32", "bf16", "fp16")
        if re.search(r", \d+ threads(?: \(|$)", place)
        else ("bf16", "fp16", "fp32")
    )


def color(method: str) -> str:
    """The colour of a method, the same in all charts."""
    if method not in COLORS and method.startswith("lossfuse"):
        return COLORS["lossfuse reference"]
    return COLORS.get(method) or OTHERS[zlib.crc32(method.encode("utf-8", "replace")) % len(OTHERS)]
