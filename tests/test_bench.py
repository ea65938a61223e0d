"""The benchmark: every method is checked before it is timed, and every outcome is a row."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from perf_commands import main, perf  # isort: skip
from lossfuse.perf import bench, interrupts, methods, problems, rows
from lossfuse.perf.cases import DTYPES, MODES, named
from lossfuse.perf.memory import profile_memory
from lossfuse.perf.methods import Method
from lossfuse.perf.rows import read

CPU = torch.device("cpu")
NO_GRAD, FORWARD, STEP = MODES
QUICK = bench.Effort(repeats=2, seconds=0.2)
# since torch 2.12
TORCH_HEAD = ["F.linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []
EAGER_HEAD = ["linear + F.cross_entropy", "linear + F.cross_entropy(x.float())"]
OURS = ["lossfuse", "lossfuse in place", "lossfuse reference"]
OUR_HEAD = ["lossfuse linear", "lossfuse linear reference"]
STATS = ["lossfuse stats", "lossfuse stats lean", "F.cross_entropy + stats"]
LABELS = "F.binary_cross_entropy_with_logits"
OUR_LABELS = ["lossfuse", "lossfuse in place", "lossfuse ids", "lossfuse ids in place"]
ALL = {
    "40x500": ["F.cross_entropy", "F.cross_entropy(x.float())", *OURS, *STATS],
    "40x16x500": [*EAGER_HEAD, *TORCH_HEAD, *OUR_HEAD, "lossfuse linear stats"],
    "40x500p3": [LABELS, f"{LABELS}(x.float())", f"scatter + {LABELS}", *OUR_LABELS],
}


def measured(case, dtype, modes, *chosen):
    found = bench.measure(named(case, CPU), dtype, CPU, modes, chosen, QUICK)
    return {(row["mode"], row["method"]): row for row in found}


def measured_step(case, name, loss_fn, *others, dtype="fp32"):
    """The row of a loss, and those of other methods beside it."""
    method = Method(name, named(case, CPU).op, lambda: loss_fn)
    found = measured(case, dtype, [STEP], method, *others)
    return found.pop((STEP, name)), found


def by_name(op, *names):
    return [method for method in methods.METHODS if method.op == op and method.name in names]


@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != "bf16")]
)
@pytest.mark.parametrize("case", ALL)
def test_every_mode_and_method_is_a_row(case, dtype):
    op = named(case, CPU).op
    names = [] if op == "labels" and dtype == "fp16" else ALL[case]
    got = measured(case, dtype, MODES, *by_name(op, *ALL[case]))
    assert set(got) == {(mode, name) for mode in MODES for name in names}
    for (mode, name), row in got.items():
        assert row["status"] == "ok" and row["op"] == op, row
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["ideal_ms"] > 0
        assert (row["grad_error"] is None) == (mode != STEP)
        assert ("copy_gbps" in row) == (op != "head")
        if "lossfuse" in name:
            assert row["loss_error"] < 1e-6
            assert mode != STEP or row["grad_error"] < (1e-5 if dtype == "fp32" else 2**-7)
        elif dtype == "bf16" and name == methods.BASELINE[op]:
            # torch loses 1 - p of confident predictions
            assert row["loss_error"] > 1e-6
            assert mode != STEP or op == "labels" or row["grad_error"] > 2**-7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_is_a_method():
    row = measured("40x500", "fp32", [STEP], *by_name("logits", "torch.compile"))
    row = row[STEP, "torch.compile"]
    assert row["status"] == "ok" or "compiler" in row["note"].lower(), row


def test_a_method_runs_in_its_dtypes_alone():
    lean = by_name("head", "lossfuse linear lean", "lossfuse linear leanest")
    assert len(measured("40x16x500", "bf16", [STEP], *lean)) == 2
    assert not measured("40x16x500", "fp32", [STEP], *lean)


def full(*_):
    raise torch.OutOfMemoryError("2 GiB asked for\nand a page of statistics")


def twice_the_gradient(loss_fn):
    return lambda *arguments: 2 * (loss := loss_fn(*arguments)) - loss.detach()


def eager_head(hidden, weight, target):
    return F.cross_entropy(hidden @ weight.T, target)


def labels(x, ones, ids, **options):
    return F.binary_cross_entropy_with_logits(x, ones, **options)


def first_label(x, ones, ids):
    return labels(x, torch.zeros_like(ones).scatter(1, ids[:, :1], 1.0), ids)


CE = F.cross_entropy
WRONG = {
    "twice the gradient": ("40x500", twice_the_gradient(CE), "wrong: gradient is off by"),
    "padding": ("40x500", lambda x, t: CE(x, t.clamp(min=0)), "wrong: loss is off by"),
    "smoothed": ("40x500", lambda x, t: CE(x, t, label_smoothing=0.01), "wrong: loss is off by"),
    "NaN": ("40x500", lambda x, t: CE(x, t) * float("nan"), "wrong: loss is off by nan"),
    "ignore_index": ("40x500", lambda x, t: CE(x, t, ignore_index=3), "failed: IndexError"),
    "no gradient": ("40x500", lambda x, t: CE(x.detach(), t), "failed: RuntimeError"),
    "memory": ("40x500", full, "out of memory: OutOfMemoryError: 2 GiB asked for"),
    "half of dweight": (
        "40x16x500",
        lambda h, w, t: eager_head(h, 0.5 * w + 0.5 * w.detach(), t),
        "wrong: gradient is off by 5.0e-01 of itself",
    ),
    "no ones": ("40x500p3", lambda x, t, ids: labels(x, 0 * t, ids), "wrong: loss"),
    "sum": ("40x500p3", lambda *given: labels(*given, reduction="sum"), "wrong: loss"),
    "first id alone": ("40x500p3", first_label, "wrong: "),
    "twice, labels": ("40x500p3", twice_the_gradient(labels), "wrong: gradient"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_or_failing_method_is_a_row_without_times(name):
    case, loss_fn, expected = WRONG[name]
    others = by_name(named(case, CPU).op, "lossfuse", "lossfuse linear")
    row, beside = measured_step(case, name, loss_fn, *others)
    assert f"{row['status']}: {row['note']}".startswith(expected)
    assert "ms_p50" not in row and "peak_extra_bytes" not in row
    assert [other["status"] for other in beside.values()] == ["ok"]


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch):
    monkeypatch.setattr(bench, "load", full)
    got = measured("40x500", "fp32", [NO_GRAD, FORWARD], *by_name("logits", "lossfuse"))
    assert [row["status"] for row in got.values()] == ["out of memory"] * 2


def test_a_method_that_does_not_fit_is_not_run(monkeypatch):
    # between the needs of the two
    monkeypatch.setattr(bench, "available_bytes", lambda device: 2 * 400 * 5000 * 4)
    ours = by_name("logits", "lossfuse")
    row, beside = measured_step("400x5000", "F.cross_entropy", pytest.fail, *ours)
    need = "by formula it needs 22.9 MiB beyond its inputs and 15.3 MiB are available; not run"
    assert row["status"] == "out of memory" and row["note"] == need
    assert beside[STEP, "lossfuse"]["status"] == "ok"


BENCH = "bench --dtypes fp32 --repeats 1"


def test_a_case_that_does_not_fit_is_refused_and_others_run(monkeypatch, tmp_path, capsys):
    out, large = tmp_path / "rows.csv", "9999999x999999"
    monkeypatch.setattr(bench, "available_bytes", lambda device: 1 << 40)
    command = f"{BENCH} --modes no_grad --methods place --cases {large}"
    assert perf(f"{command} 40x500 --out", out) == 0
    why = f"{large} in fp32 is not run: its inputs and their check in float64 need 74506.75 GiB"
    assert why in capsys.readouterr().out and set(read([out])["case"]) == {"40x500"}
    assert perf(command) == 2
    assert "nothing was measured" in capsys.readouterr().err


SHAPES = ["1024x32000", "64x128256", "32x1024x64000", "2048x256x20000", "64x100000p5"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_of_a_case_are_known_before_it_is_loaded(shape, dtype):
    torch.use_deterministic_algorithms(False)
    case, loaded = named(shape, CPU), []
    stored, most = problems.bytes_of(case, DTYPES[dtype])
    draw = lambda: loaded.append(problems.load(case, DTYPES[dtype], CPU))  # noqa: E731
    load = profile_memory(draw, device=CPU, warmup=0)
    truth = profile_memory(loaded[0]._fp64, device=CPU, warmup=0)
    assert load.end_bytes == pytest.approx(stored, rel=0.01)
    peak = max(load.peak_bytes, stored + truth.peak_bytes)
    assert peak <= most + (1 << 20) <= 1.5 * peak + (192 << 20)


def test_an_interrupted_benchmark_saves_finished_modes(monkeypatch, tmp_path, capsys):
    out, real = tmp_path / "rows.csv", bench._measure_mode

    def interrupted(problem, mode, *rest):
        if mode == STEP:
            raise KeyboardInterrupt
        return real(problem, mode, *rest)

    monkeypatch.setattr(bench, "_measure_mode", interrupted)
    assert perf(f"{BENCH} --cases 40x500 --methods place --out", out) == 130
    said = capsys.readouterr()
    assert set(read([out])["mode"]) == {NO_GRAD} and "lossfuse in place" in said.out
    assert said.err == "lossfuse.perf bench: interrupted\n"


def test_progress_counts_parts_and_estimates_the_time_left():
    now = [100.0]
    pace = bench.Pace(4, 20.0, lambda: now[0])
    assert pace.said("llama2, lossfuse") == "1 of 4: llama2, lossfuse, about 80 s left"
    now[0] = 160.0
    pace.finish()
    for time, left in ((160.0, "3 min"), (220.0, "2 min"), (1000.0, "1 s")):
        now[0] = time
        assert pace.said("x") == f"2 of 4: x, about {left} left"


class Consumes(torch.autograd.Function):
    """Overwrites its logits with their gradient, unknown to autograd, as several packages do."""

    @staticmethod
    def forward(ctx, x, target):
        loss = F.cross_entropy(x.detach(), target)
        x.detach().copy_(torch.func.grad(F.cross_entropy)(x.detach(), target))
        ctx.grad = x.detach()
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return ctx.grad * dloss, None


def test_a_method_that_overwrites_its_logits_gets_new_ones_for_every_call():
    consumer = Method("consumes", "logits", lambda: Consumes.apply, consumes=True)
    others = by_name("logits", "lossfuse", "F.cross_entropy")
    got = measured("40x500", "fp32", [FORWARD, STEP], consumer, *others)
    assert {row["status"] for row in got.values()} == {"ok"}
    assert max(row["loss_error"] for row in got.values()) < 1e-6


def test_logits_require_grad_and_are_not_a_leaf():
    seen = set()

    def look(x, target):
        seen.add((x.requires_grad, x.is_leaf, x._is_view()))
        return F.cross_entropy(x, target)

    measured("40x500", "fp32", [NO_GRAD, STEP], Method("look", "logits", lambda: look))
    assert seen == {(False, True, False), (True, False, False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_float64_result_of_a_head_is_that_of_its_logits(dtype, monkeypatch):
    monkeypatch.setattr(problems, "BLOCK_BYTES", 8 * 100 * 30)
    problem = problems.Head(named("100x16x300", CPU), dtype, CPU)
    hidden, weight = (t.double().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = eager_head(hidden, weight, problem.target)
    errors = problem.errors((loss, torch.autograd.grad(loss, (hidden, weight))))
    assert errors.loss < 1e-12 and errors.grad < 1e-12


def test_methods_that_cannot_run_are_skipped_with_a_reason():
    found, skipped = methods.of("logits", CPU)
    eager = ["F.cross_entropy", "F.cross_entropy(x.float())"]
    assert [m.name for m in found] == [*eager, "torch.compile", *OURS, *STATS]
    assert "Liger (logits) is skipped: does not run on cpu" in skipped
    head = [m.name for m in methods.of("head", CPU)[0]]
    linear = [OUR_HEAD[0], "lossfuse linear stats", OUR_HEAD[1]]
    assert head == [*EAGER_HEAD, "torch.compile", *TORCH_HEAD, *linear]
    on_cuda = methods.of("head", torch.device("cuda"))[1]
    assert "lossfuse linear reference (head) is skipped: does not run on cuda" in on_cuda
    reasons = {line.rpartition(" ")[2] for line in on_cuda}
    assert reasons == {"cuda", "installed", *([] if TORCH_HEAD else ["none"])}
    assert len(methods.of("head", CPU, "sweep")[0]) == 1 + 16
    chosen = [m.name for m in methods.of("logits", CPU, "lossfuse")[0]]
    assert chosen == ["F.cross_entropy", *OURS, *STATS[:2]]


def test_the_command_appends_rows_and_prints_a_table(tmp_path, capsys, device):
    out = tmp_path / "results" / "rows.csv"
    command = "bench --cases 40x500 30x8x100 --dtypes fp32 --modes no_grad --methods cross_entropy"
    for _ in range(2):
        assert perf(f"{command} --repeats 2 --tests passed --out", out) == 0
    frame = read([out])
    assert len(frame) == 2 * (3 + 2 + len(TORCH_HEAD)) and frame["date"].nunique() <= 2
    assert (frame["status"] == "ok").all() and (frame["tests"] == "passed").all()
    assert (frame["device"].str.contains("threads") == (device == "cpu")).all()
    printed = capsys.readouterr().out
    assert "40x500: 40 x 500" in printed and "30 x 8 x 100" in printed


MISTAKES = {
    "bench --cases other": "case is 'other', expected one of llama2",
    f"bench --cases {'9' * 5000}x5": "expected one of llama2",
    "bench --cases 4x5 --out {}/foreign.csv": "has columns ['a', 'b']",
    "bench --cases 4x5 --methods other": "no method name contains it; there are, of logits: F.cr",
    "bench --cases 4x5 --repeats 0": "argument --repeats: '0', expected a whole number, at least 1",
    "bench --cases 4x5 --seconds -1": "argument --seconds: '-1', expected a number, at least 0",
    "bench --cases 4x5 --seconds nan": "argument --seconds: 'nan'",
    "compare {}/absent.csv {}/absent.csv": "does not exist",
    "dashboard {}/foreign.csv --out {}/page.html": "has columns ['a', 'b']",
    "demo --steps 1.5": "argument --steps: '1.5', expected a whole number, at least 1",
    "demo --out demo.gif": "expected .png",
    "estimate 4xx5": "case is '4xx5'",
    "estimate 4x5 --fits -1": "argument --fits: '-1', expected a number, above 0",
    "estimate 4x5 --fits inf": "argument --fits: 'inf'",
    "estimate 4x5 --layout tp=2 --chunk-bytes 0": "argument --chunk-bytes: '0'",
    "estimate 4x5 --layout tp=2 --latency-us -1": "argument --latency-us: '-1'",
    "gpu --out {}/file/out": "cannot be written",
    "gpu --out {}/out --minutes 0": "'0', expected a number, above 0 and at most 1440",
    "gpu --out {}/out --minutes 1e300": "argument --minutes: '1e300'",
    "memory nowhere": "nowhere",
    "memory a:b --warmup -1": "argument --warmup: '-1', expected a whole number, at least 0",
}


@pytest.mark.parametrize("command", MISTAKES, ids=lambda command: command[:60])
def test_a_mistake_is_a_sentence_and_exit_code_2(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    assert perf(command.replace("{}", str(tmp_path))) == 2
    said = capsys.readouterr().err
    assert MISTAKES[command] in said and "Traceback" not in said
    assert (tmp_path / "foreign.csv").read_text() == "a,b\n1,2\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "foreign.csv"}


class Loses:
    """Receives an interrupt in its destructor, where Python prints and drops it."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT ends a process there")
@pytest.mark.parametrize("how", ["raised", "lost", "in a thread"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_is_a_sentence_and_exit_code_130(how, monkeypatch, capsys):
    def command(options):
        if how == "lost":
            Loses()
        elif how == "raised":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            interrupts.result_of(lambda: (os.kill(os.getpid(), signal.SIGINT), released.wait()))
        return 0

    released, before = threading.Event(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("lossfuse.perf.__main__.run", command)
    assert main(["estimate", "4x5"]) == 130
    released.set()
    assert capsys.readouterr().err.splitlines()[-1] == "lossfuse.perf estimate: interrupted"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_exception_of_a_thread_is_raised():
    def fails():
        raise LookupError("in a thread")

    assert interrupts.result_of(lambda: 3) == 3
    with pytest.raises(LookupError, match="in a thread"):
        interrupts.result_of(fails)


def test_saved_rows_can_be_read():
    for path in (Path(bench.__file__).parent / "results").glob("*.csv"):
        (kind,) = (kind for kind in rows.KINDS if rows.holds(path, kind))
        assert (read([path], kind)["schema"] == kind.version).all()
