"""Two sets of rows side by side, with a ratio only beyond the spread."""

from pathlib import Path
from typing import TYPE_CHECKING

from . import tables
from .mistakes import Mistake
from .rows import TEXT, read
from .shown import clean

if TYPE_CHECKING:
    import pandas as pd

# must be equal for two times to be comparable
KEY = ["case", "n", "v", "d", "dtype", "mode", "method"]


class Incomparable(Mistake):
    """Two sets that cannot be compared."""


def select(text: str) -> "pd.DataFrame":
    """The last run of each row of ``FILE@COMMIT``; of the newest commit for ``FILE``."""
    name, at, commit = text.partition("@")
    frame = read([Path(name)])
    frame[TEXT] = frame[TEXT].map(clean)
    if not len(frame):
        raise Incomparable(f"{name} has no rows")
    if not at:
        commit = frame.sort_values("date", kind="stable")["commit"].iloc[-1]
    frame = frame[frame["commit"].str.startswith(commit) if commit else frame["commit"] == ""]
    if not len(frame):
        raise Incomparable(f"{name} has no rows of commit {commit!r}")
    if frame["commit"].nunique() > 1:
        raise Incomparable(
            f"{name} has rows of {frame['commit'].nunique()} commits that begin with {commit!r}"
        )
    return frame.sort_values("date", kind="stable").drop_duplicates(
        [*KEY, "device", "settings"], keep="last"
    )


def compare(a: "pd.DataFrame", b: "pd.DataFrame") -> "pd.DataFrame":
    """One row per common case, dtype, mode and method, with the speedup of ``b`` beyond the spread.

    Incomparable if a side has uncommitted changes or failed tests, or if devices or settings
    differ."""
    for name, side in (("A", a), ("B", b)):
        commit = side["commit"].iloc[0] or "unknown"
        if side["dirty"].any():
            changed = f"{name} was measured with uncommitted changes on {commit}"
            raise Incomparable(f"{changed}: it cannot be measured again")
        if (side["tests"] == "failed").any():
            raise Incomparable(f"{name} is commit {commit}, whose tests failed: it has no ratio")
    for column in ("device", "settings"):
        if set(a[column]) != set(b[column]):
            raise Incomparable(
                f"A and B differ in {column}: {sorted(set(a[column]))} and {sorted(set(b[column]))}"
            )
    both = a.merge(b, on=[*KEY, "device", "settings"], suffixes=("_a", "_b"))
    if not len(both):
        raise Incomparable("A and B have no case, dtype, mode and method in common")
    apart = (both["ms_p20_a"] > both["ms_p80_b"]) | (both["ms_p20_b"] > both["ms_p80_a"])
    fine = (both["status_a"] == "ok") & (both["status_b"] == "ok")
    both["faster"] = (both["ms_p50_a"] / both["ms_p50_b"]).where(apart & fine)
    both["verdict"] = "within the spread"
    both.loc[apart, "verdict"] = ""
    both.loc[~fine, "verdict"] = both["status_a"] + " -> " + both["status_b"]
    return both


def main(a: str, b: str) -> None:
    """Print the comparison."""
    left, right = select(a), select(b)
    both = compare(left, right)
    console = tables.console()
    columns = [tables.Column("method", right=False)]
    columns += [tables.Column("A ms"), tables.Column("A p20-p80", rank=2)]
    columns += [tables.Column("B ms"), tables.Column("B p20-p80", rank=2)]
    columns += [tables.Column("B faster by", right=False)]
    columns += [tables.Column("memory A", rank=1), tables.Column("memory B", rank=1)]
    lines = []
    for row in both.to_dict("records"):
        cells = [row["method"]]
        for side in "ab":
            cells.append(f"{row[f'ms_p50_{side}']:.3g}")
            cells.append(f"{row[f'ms_p20_{side}']:.3g}-{row[f'ms_p80_{side}']:.3g}")
        cells.append(row["verdict"] or f"{row['faster']:.2f}")
        cells += [f"{row[f'peak_extra_bytes_{side}'] / 2**20:,.0f} MiB" for side in "ab"]
        lines.append(tables.Line(cells, f"{row['case']} {row['dtype']} {row['mode']}"))
    tables.show(console, columns, lines, "A against B")
    for name, rows in (("A", left), ("B", right)):
        first = rows.iloc[0]
        commit, triton = first["commit"] or "an unknown commit", first["triton"] or "none"
        versions = f"torch {first['torch']}, triton {triton}"
        state = f"{first['date']}, tests {first['tests']}"
        line = f"{name}: lossfuse {first['lossfuse']} at {commit}, {versions}, {state}"
        console.print(line, markup=False)
    console.print("The ratio of a peer shows the drift of the machine between runs.", style="dim")
