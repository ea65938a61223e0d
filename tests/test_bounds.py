"""Errors in units of their bounds: below 1, no larger than before, above 1 for known mistakes."""

import math
from pathlib import Path

import pytest
import torch

from perf_commands import perf, words  # isort: skip
from conftest import GPU
from fake_rows import bounds_row
from fake_rows import row as measured_row
from lossfuse.perf import bound_cases, bounds, dashboard, rows
from lossfuse.perf.bounds import HeadResult, LogitsResult, Variant, exceeded, load, measure
from lossfuse.perf.environment import stamp
from lossfuse.perf.error_bounds import Roundings, upstream
from lossfuse.perf.rows import BOUNDS, BadRows, append, read

CPU = torch.device("cpu")
SAVED = Path(__file__).parent.parent / "perf" / "results" / "bounds-cpu.csv"
KEY = ["op", "case", "dtype", "n", "v", "d", "method", "output"]
# small exponentials differ between CPUs: a ratio below QUIET may grow by more than GROWTH
GROWTH, QUIET = 2.0, 0.1


def grown(found, saved):
    """A sentence for each ratio above GROWTH times its last saved value; means are random."""
    last = (
        saved.sort_values("date", kind="stable").fillna({"d": -1}).drop_duplicates(KEY, keep="last")
    )
    before = last.set_index(KEY)["ratio"].to_dict()
    said = []
    for row in found:
        was = before.get(tuple(-1 if row[k] is None else row[k] for k in KEY))
        random = was is None or row["output"].endswith(", mean")
        if not random and row["ratio"] > GROWTH * max(was, QUIET / GROWTH):
            said.append(f"{bounds.about(row)}: {row['ratio']} at {row['place']}, was {was}")
    return said


def check(found):
    saved = read([SAVED], BOUNDS)
    known = set(map(tuple, saved.fillna({"d": -1})[KEY].values))
    assert found
    assert all(tuple(-1 if row[k] is None else row[k] for k in KEY) in known for row in found)
    # errors of another processor are those of another order of sums
    processor = stamp(CPU)["device"].split(",")[0]
    here = saved[saved["device"].str.split(",").str[0] == processor]
    said = [*exceeded(found), *grown(found, here)]
    assert not said, "\n".join(said)


def test_errors_are_within_their_bounds_and_not_larger_than_before(monkeypatch):
    # Triton's interpreter is slow
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    quick = ("a sure model", "rows apart", "one target")
    check(list(measure(CPU, dtypes=("fp32", "bf16"), cases=quick)))


@pytest.mark.slow
def test_errors_of_all_cases_are_within_their_bounds_and_not_larger_than_before():
    check(list(measure(CPU)))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_errors_on_a_gpu_are_within_their_bounds():
    found = list(measure(torch.device("cuda")))
    assert {row["method"].split()[0].strip(",") for row in found} == {"torch", "triton"}
    assert not exceeded(found)


def test_the_saved_file_has_all_cases_and_methods():
    saved = read([SAVED], BOUNDS)
    assert not exceeded(saved.to_dict("records")) and not saved["dirty"].any()
    assert set(saved["case"]) == {*bound_cases.LOGITS, *bound_cases.HEADS}
    assert set(saved["dtype"]) == {"fp32", "bf16", "fp16"}
    triton = saved[saved["method"].str.startswith("triton")]
    # Triton's interpreter truncates when it stores bfloat16
    assert set(triton["dtype"]) == {"fp32"}


def test_an_error_above_twice_its_saved_value_is_reported(tmp_path):
    path = tmp_path / "saved.csv"
    append(path, [bounds_row(ratio=0.9), bounds_row(date="2026-01-02")], BOUNDS)
    append(path, [bounds_row(case="quiet", ratio=0.0)], BOUNDS)
    saved = read([path], BOUNDS)
    fine = [{"ratio": 0.59}, {"ratio": 5.0, "case": "another"}, {"ratio": 5.0, "output": "x, mean"}]
    fine.append({"ratio": 0.09, "case": "quiet"})
    assert grown([bounds_row(**changes) for changes in fine], saved) == []
    large = [bounds_row(ratio=0.7), bounds_row(ratio=0.11, case="quiet")]
    assert len(grown(large, saved)) == 2


def test_an_error_above_its_bound_is_a_sentence():
    (sentence,) = exceeded([bounds_row(ratio=1.5, error=3e-6, bound=2e-6, place="3")])
    where = "loss of logits all equal in fp32 by torch"
    assert sentence == f"{where}: the error is 1.5 of its bound, 3e-06 at 3 where 2e-06 is allowed"
    assert len(exceeded([bounds_row(ratio=ratio) for ratio in (1.0, math.nan, math.inf)])) == 2


def test_files_of_bounds_and_of_measurements_are_not_mixed(tmp_path):
    path = tmp_path / "bounds.csv"
    append(path, [bounds_row()], BOUNDS)
    assert rows.holds(path, BOUNDS) and not rows.holds(path, rows.MEASUREMENTS)
    assert not rows.holds(tmp_path / "absent.csv", BOUNDS)
    for use in (lambda: read([path]), lambda: append(path, [])):
        with pytest.raises(
            BadRows, match=r"bounds\.csv holds errors against bounds, expected meas"
        ):
            use()


def test_the_dashboard_skips_files_of_bounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "build", lambda frame: f"{len(frame)} rows")
    files = bounds_csv, empty, full = [tmp_path / f"{n}.csv" for n in ("bounds", "empty", "rows")]
    append(bounds_csv, [bounds_row()], BOUNDS)
    append(empty, [])
    append(full, [measured_row()])
    page = tmp_path / "page.html"
    skipped = [f"{bounds_csv} holds errors against bounds", f"{empty} has no rows"]
    assert perf("dashboard", bounds_csv, empty, "--out", page) == 2
    assert f"nothing to show: {'; '.join(skipped)}; measure" in capsys.readouterr().err
    assert not page.exists()
    assert perf("dashboard", *files, "--out", page) == 0
    assert page.read_text() == "1 rows"
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{page}: 0 KB, 1 row of 1 file", *(f"nothing to show: {s}" for s in skipped)]


def test_the_command_prints_the_largest_ratios_and_saves_all_rows(tmp_path, monkeypatch, capsys):
    found = [bounds_row(), bounds_row(output="dlogits", ratio=0.25)]
    found = [{name: row[name] for name in row if name not in rows.WHERE} for row in found]
    monkeypatch.setattr(bounds, "measure", lambda device: found)
    assert perf("bounds --out", tmp_path / "rows.csv") == 0
    assert read([tmp_path / "rows.csv"], BOUNDS)["torch"].tolist() == [torch.__version__] * 2
    said = capsys.readouterr().out
    assert "dlogits" in said and "0.25" in said
    found[0]["ratio"] = 2.0
    assert perf("bounds") == 1
    assert "the error is 2 of its bound" in words(capsys.readouterr().out)


def truncate(t, dtype):
    """Convert to bfloat16 by dropping the lower bits."""
    return (t.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()


def loss_and_gradient(
    z,
    target,
    *,
    lse_dtype=torch.float32,
    p_dtype=torch.float32,
    least=0.0,
    subtracts=False,
    loss_dtype=torch.float32,
):
    """Losses and the gradient of their sum in float32; each option is a mistake."""
    valid = target != -100
    y = target.where(valid, 0)[:, None]
    top = z.amax(1, keepdim=True)
    others = torch.exp(z - top).scatter(1, y, 0.0).sum(1, keepdim=True)
    margin = (z - top).gather(1, y)
    log_sum = torch.log1p(others + torch.expm1(margin))
    if lse_dtype != torch.float32:
        log_sum = (top + log_sum).to(lse_dtype).float() - top
    p = torch.exp(z - top - log_sum)
    p = torch.where(p < least, 0.0, p).to(p_dtype).float()
    own = p.gather(1, y) - 1.0 if subtracts else -others * torch.exp(-log_sum)
    loss = (log_sum - margin)[:, 0].to(loss_dtype).float()
    return loss.where(valid, 0.0), p.scatter(1, y, own).where(valid[:, None], 0.0)


def logits_result(problem, store=torch.Tensor.to, **mistake):
    loss, g = loss_and_gradient(problem.logits.float(), problem.target, **mistake)
    count = (problem.target != -100).sum()
    g = g * (upstream(problem.n) / count)
    return LogitsResult(loss, loss.sum() / count, store(g, problem.logits.dtype))


def head_result(
    problem,
    z_dtype=torch.float32,
    acc_dtype=torch.float32,
    chunk=512,
    store=torch.Tensor.to,
    **mistake,
):
    x, w, dtype = problem.hidden.float(), problem.weight.float(), problem.hidden.dtype
    z = (x @ w.T).to(z_dtype).float()
    loss, g = loss_and_gradient(z, problem.target, **mistake)
    count = (problem.target != -100).sum()
    g = g * (upstream(problem.n) / count)
    dweight = torch.zeros_like(w, dtype=acc_dtype)
    for i in torch.arange(len(x)).split(chunk):
        dweight = (dweight.float() + g[i].T @ x[i]).to(acc_dtype)
    return HeadResult(loss, loss.sum() / count, store(g @ w, dtype), store(dweight.float(), dtype))


BF16 = torch.bfloat16
SMALL = {"least": 2.0**-12}
MODEL, CONFIDENT, ONE_TARGET = "like a model's", "a sure model", "one target"
MISTAKES = {
    "none": ("logits", MODEL, "bf16", {}, ""),
    "none, confident predictions": ("logits", CONFIDENT, "fp32", {}, ""),
    "p in bf16": ("logits", MODEL, "bf16", {"p_dtype": BF16, "subtracts": True}, "dlogits"),
    "log-sum-exp in bf16": ("logits", MODEL, "bf16", {"lse_dtype": BF16}, "loss; dlogits"),
    "truncated": ("logits", MODEL, "bf16", {"store": truncate}, "dlogits; dlogits, mean"),
    "small p dropped": ("logits", MODEL, "bf16", SMALL, "dlogits; dlogits, mean"),
    "p - 1": ("logits", CONFIDENT, "fp32", {"subtracts": True}, "dlogits"),
    "loss in bf16": ("logits", MODEL, "bf16", {"loss_dtype": BF16}, "loss"),
    "none, head": ("head", MODEL, "bf16", {}, ""),
    "none, many chunks": ("head", ONE_TARGET, "bf16", {"chunk": 2}, ""),
    "bf16 sums": ("head", ONE_TARGET, "bf16", {"acc_dtype": BF16, "chunk": 2}, "dweight"),
    "logits in bf16": ("head", MODEL, "bf16", {"z_dtype": BF16}, "loss"),
    "log-sum-exp in bf16, head": ("head", MODEL, "bf16", {"lse_dtype": BF16}, "loss"),
    "truncated, head": ("head", MODEL, "bf16", {"store": truncate}, "dhidden, mean; dweight, mean"),
    "small p dropped, head": ("head", MODEL, "bf16", SMALL, "dhidden, mean; dweight, mean"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_exceeds_a_bound(mistake):
    op, case, dtype, how, outputs = MISTAKES[mistake]
    problem = load(op, case, dtype, CPU)
    result = (logits_result if op == "logits" else head_result)(problem, **how)
    wrong = {f.output for f in problem.judge(result, Roundings()) if not f.ratio <= 1.0}
    expected = set(filter(None, outputs.split("; ")))
    assert expected <= wrong and bool(wrong) == bool(expected), wrong


def test_a_second_call_with_other_bits_is_found(monkeypatch):
    problem = load("logits", "all equal", "fp32", CPU)
    right, noise = logits_result(problem), iter([0.0, 1e-6])
    call = lambda how: right._replace(losses=right.losses + next(noise))  # noqa: E731
    monkeypatch.setattr(problem, "call", call)
    *_, repeated = bounds.findings(problem, Variant("torch", "torch"))
    assert repeated.ratio == math.inf and repeated.place == "losses"
