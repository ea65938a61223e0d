"""Goals for speed and memory on one H100, and for statistics on a CPU, and their verdicts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cases import DTYPES
from .methods import OURS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Goal:
    """Bounds on one row, or on its time relative to the loss in the same run."""

    case: str
    dtype: str
    mode: str
    method: str
    roofline: float | None = None  # at least this fraction
    peak_gib: float | None = None  # at most, beyond inputs
    peak_logits: float | None = None  # at most, in units of the logits
    loss_times: float | None = None  # at most, its time in units of the time of the loss alone

    def __str__(self) -> str:
        bounds = [
            f"at least {self.roofline:.3g} of the roofline" if self.roofline else "",
            f"at most {self.peak_gib} GiB" if self.peak_gib else "",
            f"at most {self.peak_logits} of the logits" if self.peak_logits else "",
            f"at most {self.loss_times} times the loss" if self.loss_times else "",
        ]
        where = f"{self.case} {self.dtype} {self.mode}, {self.method}"
        return f"{where}: {' and '.join(filter(None, bounds))}"


IN_PLACE, DEFAULT = "lossfuse in place", "lossfuse"
LINEAR, KEPT = "lossfuse linear", "lossfuse linear kept"
LEAN, LEANEST = "lossfuse linear lean", "lossfuse linear leanest"
STATS, LINEAR_STATS = "lossfuse stats", "lossfuse linear stats"
IDS, IDS_IN_PLACE = "lossfuse ids", "lossfuse ids in place"
LARGE = ("llama2", "llama3", "qwen", "gemma2", "gemma3")
STEP = "forward+backward"


def _goals() -> Iterable[Goal]:
    for dtype in DTYPES:
        for method, peak in ((IN_PLACE, 0.01), (DEFAULT, 1.01)):
            # a gradient in float16 is formed in the backward, from a second read of the logits
            most = 2 / 3 if dtype == "fp16" else 1.0
            for case in LARGE:
                yield Goal(case, dtype, STEP, method, roofline=most * 0.94, peak_logits=peak)
            yield Goal("16384x8192", dtype, STEP, method, roofline=most * 0.97, peak_logits=peak)
            for case in ("gpt2", "unaligned"):
                yield Goal(case, dtype, STEP, method, roofline=most * 0.90, peak_logits=peak)
            yield Goal("few-rows", dtype, STEP, method, roofline=most * 0.70)
        for case in LARGE:
            for mode in (STEP, "no_grad"):
                yield Goal(case, dtype, mode, STATS, loss_times=1.10)
            yield Goal(case, dtype, "no_grad", DEFAULT, roofline=0.94, peak_logits=0.01)
    yield Goal("head-llama3", "bf16", STEP, LINEAR, roofline=0.90, peak_gib=2.1)
    yield Goal("head-llama3", "bf16", STEP, KEPT, roofline=0.93)
    yield Goal("head-llama3", "bf16", STEP, LEANEST, roofline=0.92, peak_gib=1.04 + 0.3)
    yield Goal("head-llama3", "bf16", STEP, LEAN, roofline=0.94, peak_gib=1.04 + 1.0)
    yield Goal("head-llama3", "bf16", "no_grad", LINEAR, roofline=1.0, peak_gib=0.3)
    yield Goal("head-llama3", "bf16", "no_grad", LINEAR_STATS, loss_times=1.10)
    for case in ("head-llama3", "head-qwen", "head-gemma2"):
        yield Goal(case, "bf16", STEP, LINEAR_STATS, loss_times=1.10)
    for case in ("head-qwen", "head-gemma2"):
        yield Goal(case, "bf16", STEP, LINEAR, roofline=0.88)
    # in place reads once and writes once; otherwise a second read, and dense targets are read
    # too: at best two thirds of a copy
    for case, dtype in (
        ("labels-amazon", "bf16"),
        ("labels-amazon", "fp32"),
        ("labels-million", "bf16"),
    ):
        yield Goal(case, dtype, STEP, IDS_IN_PLACE, roofline=0.85, peak_logits=0.01)
        yield Goal(case, dtype, STEP, IN_PLACE, roofline=0.60, peak_logits=0.01)
        yield Goal(case, dtype, STEP, IDS, roofline=0.60, peak_logits=1.01)
    # unaligned rows are read element by element
    yield Goal("labels-wiki10", "bf16", STEP, IDS_IN_PLACE, peak_logits=0.01)


GOALS = list(_goals())


@dataclass(frozen=True)
class Outcome:
    """A goal, its verdict (pass, miss, not measured) and the numbers."""

    goal: Goal
    verdict: str
    measured: str


def judge(goal: Goal, rows: "pd.DataFrame") -> Outcome:
    """Judge a goal by its last row."""
    mine = rows
    for column in ("case", "dtype", "mode"):
        mine = mine[mine[column] == getattr(goal, column)]
    beside, mine = mine, mine[mine["method"] == goal.method]
    if not len(mine):
        return Outcome(goal, "not measured", "no row")
    row: dict[str, Any] = mine.sort_values("date", kind="stable").iloc[-1].to_dict()
    if row["status"] != "ok":
        return Outcome(goal, "miss", f"{row['status']}: {row['note']}")
    # a missing number is NaN, which fails every comparison
    met, said = [], []
    if goal.roofline is not None:
        fraction = row["ideal_ms"] / row["ms_p50"]
        met.append(fraction >= goal.roofline)
        said.append(f"{fraction:.3f} ({row['ms_p50']:.4g} ms)")
    if goal.peak_gib is not None:
        met.append(row["peak_extra_bytes"] <= goal.peak_gib * 2**30)
        said.append(f"{row['peak_extra_bytes'] / 2**30:.3f} GiB")
    if goal.peak_logits is not None:
        share = row["peak_extra_bytes"] / (row["n"] * row["v"] * DTYPES[row["dtype"]].itemsize)
        met.append(share <= goal.peak_logits)
        said.append(f"{share:.4f} of the logits")
    if goal.loss_times is not None:
        # of the same run: times that were not interleaved drift
        loss = beside[
            (beside["method"] == OURS[row["op"]])
            & (beside["date"] == row["date"])
            & (beside["device"] == row["device"])
        ]
        times = row["ms_p50"] / (loss["ms_p50"].iloc[-1] if len(loss) else float("nan"))
        met.append(times <= goal.loss_times)
        said.append(f"{times:.3f} times the loss ({row['ms_p50']:.4g} ms)")
    return Outcome(goal, "pass" if all(met) else "miss", ", ".join(said))
