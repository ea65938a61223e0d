"""Errors in units of their bounds: within them, no larger than they were, and none of the mistakes
somebody shipped is."""

from pathlib import Path

import pytest
import torch

for name in ("filelock", "pandas", "rich"):
    pytest.importorskip(name)

from conftest import GPU  # noqa: E402
from lossfuse.perf import bounds, rows  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.bounds import (  # noqa: E402
    Head,
    HeadResult,
    LogitsResult,
    Roundings,
    exceeded,
    grown,
    load,
    measure,
    upstream,
)
from lossfuse.perf.environment import stamp  # noqa: E402
from lossfuse.perf.rows import BOUNDS, BadRows, append, read  # noqa: E402

CPU = torch.device("cpu")
KEPT = Path(__file__).parent.parent / "perf" / "results" / "bounds-cpu.csv"
QUICK = ("a sure model", "rows apart", "one target")


def check(made):
    kept = read([KEPT], BOUNDS)
    known = {tuple(bounds._key(row)) for row in kept.to_dict("records")}
    assert made and all(tuple(bounds._key(row)) in known for row in made)
    # what an error was is a fact about one processor, whose orders of sums are its own
    processor = stamp(CPU)["device"].split(",")[0]
    there = kept[kept["device"].str.split(",").str[0] == processor]
    said = [*exceeded(made), *grown(made, there)]
    assert not said, "\n".join(said)


def test_errors_are_within_their_bounds_and_no_larger_than_they_were(monkeypatch):
    # the interpreter's rows are for slow runs
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check(list(measure(CPU, dtypes=("fp32", "bf16"), cases=QUICK)))


@pytest.mark.slow
def test_every_error_is_within_its_bound_and_no_larger_than_it_was():
    check(list(measure(CPU)))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_errors_on_a_gpu_are_within_their_bounds():
    made = list(measure(torch.device("cuda")))
    assert {row["method"].split()[0].strip(",") for row in made} == {"torch", "triton"}
    said = exceeded(made)
    assert not said, "\n".join(said)


def test_the_file_has_all_methods_and_cases():
    kept = read([KEPT], BOUNDS)
    assert not exceeded(kept.to_dict("records"))
    assert set(kept["case"]) == {*bounds.LOGITS, *bounds.HEADS} and set(kept["dtype"]) == {
        "fp32",
        "bf16",
        "fp16",
    }
    # Triton's interpreter truncates what it stores in bfloat16
    triton = kept[kept["method"].str.startswith("triton")]
    assert len(triton) and set(triton["dtype"]) == {"fp32"}
    assert not kept["dirty"].any()


def one(**changes):
    row = {
        "case": "all equal",
        "op": "logits",
        "dtype": "fp32",
        "n": 4,
        "v": 2053,
        "d": None,
        "method": "torch",
        "output": "loss",
        "ratio": 0.3,
        "error": 3e-6,
        "bound": 1e-5,
        "place": "2",
        "torch": "2",
        "commit": "abc",
        "dirty": False,
        "date": "2026-01-01",
    }
    return [row | changes]


def test_an_error_that_grew_is_a_sentence(tmp_path):
    append(tmp_path / "kept.csv", one(ratio=0.9) + one(date="2026-01-02"), BOUNDS)
    kept = read([tmp_path / "kept.csv"], BOUNDS)
    for fine in (
        one(ratio=0.59),
        one(ratio=5.0, case="another"),
        one(ratio=5.0, output="loss, mean"),
    ):
        assert grown(fine, kept) == []
    (said,) = grown(one(ratio=0.7, place="3"), kept)
    about = "loss of logits all equal in fp32 by torch"
    assert (
        said
        == f"{about}: the error has become 0.7 of its bound, at 3, and was 0.3 at commit abc (torch 2)"
    )
    # next to nothing differs from one CPU to another
    append(tmp_path / "quiet.csv", one(ratio=0.0), BOUNDS)
    quiet = read([tmp_path / "quiet.csv"], BOUNDS)
    assert grown(one(ratio=0.09), quiet) == [] and len(grown(one(ratio=0.11), quiet)) == 1
    (said,) = exceeded(one(ratio=1.5, error=3e-6, bound=2e-6, place="3"))
    assert said == f"{about}: the error is 1.5 of its bound, 3e-06 at 3 where 2e-06 is allowed"
    assert (
        exceeded(one(ratio=float("nan")))
        and exceeded(one(ratio=float("inf")))
        and not exceeded(one(ratio=1.0))
    )


def test_files_of_one_kind_are_not_taken_for_the_other(tmp_path):
    append(tmp_path / "bounds.csv", one(), BOUNDS)
    assert rows.holds(tmp_path / "bounds.csv", BOUNDS) and not rows.holds(
        tmp_path / "bounds.csv", rows.MEASUREMENTS
    )
    assert not rows.holds(tmp_path / "absent.csv", BOUNDS)
    for use in (
        lambda: read([tmp_path / "bounds.csv"]),
        lambda: append(tmp_path / "bounds.csv", []),
    ):
        with pytest.raises(
            BadRows, match="bounds.csv holds errors against bounds and was to hold measurements"
        ):
            use()


def test_the_dashboard_passes_over_them(tmp_path, monkeypatch, capsys):
    for name in ("altair", "vl_convert"):
        pytest.importorskip(name)
    from fake_rows import row as whole_row
    from lossfuse.perf import dashboard

    append(tmp_path / "bounds.csv", one(), BOUNDS)
    monkeypatch.setattr(dashboard, "build", lambda frame: f"{len(frame)} rows")
    append(tmp_path / "empty.csv", [])
    append(tmp_path / "rows.csv", [whole_row()])
    page, idle = (
        tmp_path / "page.html",
        [str(tmp_path / name) for name in ("bounds.csv", "empty.csv")],
    )
    assert main(["dashboard", *idle, "--out", str(page)]) == 2
    said = f"nothing to show: {idle[0]} holds errors against bounds; {idle[1]} has no rows; measure first"
    assert said in capsys.readouterr().err and not page.exists()
    assert main(["dashboard", *idle, str(tmp_path / "rows.csv"), "--out", str(page)]) == 0
    assert page.read_text() == "1 rows"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{page}: 0 KB, 1 row of 1 file"
    assert said[1:] == [
        f"nothing to show: {idle[0]} holds errors against bounds",
        f"nothing to show: {idle[1]} has no rows",
    ]


def test_the_command_prints_the_worst_and_keeps_all(tmp_path, monkeypatch, capsys):
    made = one() + one(output="dlogits", ratio=0.25)
    for column in rows.WHERE:
        for row in made:
            row.pop(column, None)
    monkeypatch.setattr(bounds, "measure", lambda device: made)
    assert main(["bounds", "--out", str(tmp_path / "rows.csv")]) == 0
    kept = read([tmp_path / "rows.csv"], BOUNDS)
    assert len(kept) == len(made) and kept["torch"].tolist() == [torch.__version__] * len(made)
    said = capsys.readouterr().out
    assert "dlogits" in said and "0.25" in said
    made[0]["ratio"] = 2.0
    assert main(["bounds"]) == 1
    assert "the error is 2 of its bound" in " ".join(capsys.readouterr().out.split())


# --- mistakes


def truncated(t):
    """As bfloat16, the lower bits cut off."""
    return (t.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()


def loss_and_gradient(
    z,
    target,
    *,
    lse_dtype=torch.float32,
    p_dtype=torch.float32,
    least=0.0,
    difference=False,
    loss_dtype=torch.float32,
):
    """Losses of rows and the gradients of their sum in float32; the arguments are the mistakes."""
    valid = target != -100
    y = target.where(valid, 0)[:, None]
    top = z.amax(1, keepdim=True)
    e = torch.exp(z - top)
    others = e.scatter(1, y, 0.0).sum(1, keepdim=True)
    margin = (z - top).gather(1, y)
    log_sum = torch.log1p(others + torch.expm1(margin))
    if lse_dtype != torch.float32:
        log_sum = (top + log_sum).to(lse_dtype).float() - top
    p = torch.exp(z - top - log_sum)
    p = torch.where(p < least, 0.0, p).to(p_dtype).float()
    own = (
        p.gather(1, y) - 1.0
        if difference or p_dtype != torch.float32
        else -others * torch.exp(-log_sum)
    )
    loss = (log_sum - margin)[:, 0].to(loss_dtype).float()
    return loss.where(valid, 0.0), p.scatter(1, y, own).where(valid[:, None], 0.0)


def result_of_logits(problem, store=None, **mistake):
    loss, g = loss_and_gradient(problem.logits.float(), problem.target, **mistake)
    count = (problem.target != -100).sum()
    g = g * (upstream(problem.n) / count)
    return LogitsResult(loss, loss.sum() / count, store(g) if store else g.to(problem.logits.dtype))


def too_large(findings):
    return {finding.output for finding in findings if not finding.ratio <= 1.0}


LOGITS_MISTAKES = {
    "the right one": ("like a model's", "bf16", {}, set()),
    "the right one of a sure model": ("a sure model", "fp32", {}, set()),
    "probabilities rounded before the subtraction": (
        "like a model's",
        "bf16",
        {"p_dtype": torch.bfloat16},
        {"dlogits"},
    ),
    "log-sum-exp in bfloat16": (
        "like a model's",
        "bf16",
        {"lse_dtype": torch.bfloat16},
        {"loss", "dlogits"},
    ),
    "truncated": ("like a model's", "bf16", {"store": truncated}, {"dlogits", "dlogits, mean"}),
    "small probabilities dropped": (
        "like a model's",
        "bf16",
        {"least": 2.0**-12},
        {"dlogits", "dlogits, mean"},
    ),
    "p - 1 of a sure model": ("a sure model", "fp32", {"difference": True}, {"dlogits"}),
    "a loss in bfloat16": ("like a model's", "bf16", {"loss_dtype": torch.bfloat16}, {"loss"}),
}


@pytest.mark.parametrize("mistake", LOGITS_MISTAKES)
def test_mistakes_with_logits_are_beyond_the_bounds(mistake):
    case, dtype, how, outputs = LOGITS_MISTAKES[mistake]
    problem = load("logits", case, dtype, CPU)
    assert isinstance(problem, bounds.Logits)
    found = too_large(problem.judge(result_of_logits(problem, **how)))
    assert outputs <= found and bool(found) == bool(outputs), found


def result_of_head(
    problem, *, z_dtype=torch.float32, acc_dtype=torch.float32, chunk=512, store=None, **mistake
):
    x, w = problem.hidden.float(), problem.weight.float()
    z = (x @ w.T).to(z_dtype).float()
    loss, g = loss_and_gradient(z, problem.target, **mistake)
    count = (problem.target != -100).sum()
    g = g * (upstream(problem.n) / count)
    dweight = torch.zeros_like(w, dtype=acc_dtype)
    for some in torch.arange(len(x)).split(chunk):
        dweight = (dweight.float() + g[some].T @ x[some]).to(acc_dtype)
    store = store or (lambda t: t.to(problem.hidden.dtype))
    return HeadResult(loss, loss.sum() / count, store(g @ w), store(dweight.float()))


HEAD_MISTAKES = {
    "the right one": ("like a model's", {}, set()),
    "the right one in many chunks": ("one target", {"chunk": 2}, set()),
    "sums over many chunks in bfloat16": (
        "one target",
        {"acc_dtype": torch.bfloat16, "chunk": 2},
        {"dweight"},
    ),
    "logits in bfloat16": ("like a model's", {"z_dtype": torch.bfloat16}, {"loss"}),
    "log-sum-exp in bfloat16": ("like a model's", {"lse_dtype": torch.bfloat16}, {"loss"}),
    "truncated": ("like a model's", {"store": truncated}, {"dhidden, mean", "dweight, mean"}),
    "small probabilities dropped": (
        "like a model's",
        {"least": 2.0**-12},
        {"dhidden, mean", "dweight, mean"},
    ),
}


@pytest.mark.parametrize("mistake", HEAD_MISTAKES)
def test_mistakes_with_heads_are_beyond_the_bounds(mistake):
    case, how, outputs = HEAD_MISTAKES[mistake]
    problem = load("head", case, "bf16", CPU)
    assert isinstance(problem, Head)
    found = too_large(problem.judge(result_of_head(problem, **how), Roundings()))
    assert outputs <= found and bool(found) == bool(outputs), found


def test_a_call_that_differs_from_itself_is_found(monkeypatch):
    problem = load("logits", "all equal", "fp32", CPU)
    right, calls = result_of_logits(problem), iter([0.0, 1e-6])
    monkeypatch.setattr(
        bounds.Method,
        "of_logits",
        lambda self, problem: right._replace(losses=right.losses + next(calls)),
    )
    (repeated,) = (
        f for f in bounds.Method("torch", "torch").findings(problem) if f.output == "repeated"
    )
    assert repeated.ratio == float("inf") and repeated.place == "losses"
