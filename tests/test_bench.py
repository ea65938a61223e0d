"""The benchmark: every method checked before it is timed, and a row for whatever happens."""

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F

for name in ("filelock", "pandas", "rich"):
    pytest.importorskip(name)

from lossfuse.perf import bench, interrupts, methods, problems, rows  # noqa: E402
from lossfuse.perf.__main__ import main  # noqa: E402
from lossfuse.perf.cases import DTYPES, MODES, named  # noqa: E402
from lossfuse.perf.memory import profile_memory  # noqa: E402
from lossfuse.perf.methods import Method  # noqa: E402
from lossfuse.perf.rows import read  # noqa: E402

CPU = torch.device("cpu")
# torch 2.11 has none
TORCH_HEAD = ("F.linear_cross_entropy",) if hasattr(F, "linear_cross_entropy") else ()
EAGER_HEAD = ("linear + F.cross_entropy", "linear + F.cross_entropy(x.float())")
TORCH_LABELS = "F.binary_cross_entropy_with_logits"
LABELS = [
    TORCH_LABELS,
    f"{TORCH_LABELS}(x.float())",
    f"scatter + {TORCH_LABELS}",
    "lossfuse",
    "lossfuse in place",
    "lossfuse ids",
]
LABELS += ["lossfuse ids in place", "lossfuse reference"]
STATS = (
    "lossfuse stats",
    "lossfuse stats lean",
    "F.cross_entropy + stats",
    "lossfuse linear stats",
)
QUICK = bench.Effort(repeats=2, seconds=0.2)


def measured(case, dtype, modes, *chosen):
    return {
        (row["mode"], row["method"]): row
        for row in bench.measure(named(case, CPU), dtype, CPU, modes, chosen, QUICK)
    }


def by_name(op, *names):
    return [method for method in methods.METHODS if method.op == op and method.name in names]


@pytest.mark.parametrize(
    "dtype",
    [dtype if dtype == "bf16" else pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES],
)
@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            "40x500",
            [
                "F.cross_entropy",
                "F.cross_entropy(x.float())",
                "lossfuse",
                "lossfuse in place",
                "lossfuse reference",
            ],
        ),
        ("40x16x500", [*EAGER_HEAD, *TORCH_HEAD, "lossfuse linear", "lossfuse linear reference"]),
    ],
)
def test_a_row_for_every_mode_and_method(case, names, dtype):
    chosen = by_name(named(case, CPU).op, *names)
    got = measured(case, dtype, MODES, *chosen)
    assert set(got) == {(mode, name) for mode in MODES for name in names}
    for (mode, _), row in got.items():
        assert row["status"] == "ok", row
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["ideal_ms"] > 0
        assert (row["grad_error"] is None) == (mode != "forward+backward")
        assert ("copy_gbps" in row) == (row["op"] == "logits")
    if dtype == "bf16" and "lossfuse linear" in names:
        step = {name: got["forward+backward", name] for name in names}
        assert (
            step["lossfuse linear"]["loss_error"]
            < 1e-6
            < step["linear + F.cross_entropy"]["loss_error"]
        )
        assert (
            step["lossfuse linear"]["grad_error"]
            < 2**-7
            < step["linear + F.cross_entropy"]["grad_error"]
        )
    if dtype == "bf16" and "lossfuse" in names:
        step = {name: got["forward+backward", name] for name in names}
        assert step["lossfuse"]["loss_error"] < 1e-6 < step["F.cross_entropy"]["loss_error"]
        # torch's loses 1 - p where p is nearly 1
        assert step["lossfuse"]["grad_error"] < 2**-7 < step["F.cross_entropy"]["grad_error"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_labels_have_methods_of_their_own(dtype):
    modes = MODES[::2]
    got = measured("40x500p3", dtype, modes, *by_name("labels", *LABELS))
    assert set(got) == {(mode, name) for mode in modes for name in LABELS}
    for (mode, name), row in got.items():
        assert row["status"] == "ok" and row["op"] == "labels" and row["d"] == 3, row
        assert row["ms_p50"] > 0 and row["ideal_ms"] > 0 and row["copy_gbps"] > 0
        assert row["loss_error"] < 1e-6 or (
            dtype == "bf16" and name != f"{TORCH_LABELS}(x.float())" and "lossfuse" not in name
        )
        if mode == "forward+backward" and name.startswith("lossfuse"):
            assert row["grad_error"] < (2**-7 if dtype == "bf16" else 1e-5)
    if dtype == "bf16":
        # torch's loses the sure labels, which are most of them
        assert got["no_grad", TORCH_LABELS]["loss_error"] > 0.05
    assert not measured("40x500p3", "fp16", modes, *by_name("labels", *LABELS))


WRONG_LABELS = {
    "ones forgotten": lambda x, t, ids: F.binary_cross_entropy_with_logits(x, torch.zeros_like(t)),
    "a sum": lambda x, t, ids: F.binary_cross_entropy_with_logits(x, t, reduction="sum"),
    "the first id alone": lambda x, t, ids: F.binary_cross_entropy_with_logits(
        x, torch.zeros_like(t).scatter(1, ids[:, :1], 1.0)
    ),
    "twice the gradient": lambda x, t, ids: (lambda y: 2 * y - y.detach())(
        F.binary_cross_entropy_with_logits(x, t)
    ),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_found(name):
    row = measured(
        "40x500p3", "bf16", ["forward+backward"], Method(name, "labels", lambda: WRONG_LABELS[name])
    )["forward+backward", name]
    assert row["status"] == "wrong" and "ms_p50" not in row


@pytest.mark.parametrize("case", ["40x500", "40x16x500"])
def test_statistics_beside_the_loss_are_methods(case):
    step, no_grad = MODES[-1], MODES[0]
    got = measured(case, "bf16", [step, no_grad], *by_name(named(case, CPU).op, *STATS))
    assert {row["status"] for row in got.values()} == {"ok"}
    for name in {method for _, method in got} & {
        "lossfuse stats",
        "lossfuse stats lean",
        "lossfuse linear stats",
    }:
        assert got[step, name]["loss_error"] < 1e-6 and got[no_grad, name]["loss_error"] < 1e-6
        assert got[step, name]["grad_error"] < 2**-7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_is_a_method():
    row = measured("40x500", "fp32", ["forward+backward"], *by_name("logits", "torch.compile"))[
        "forward+backward", "torch.compile"
    ]
    assert row["status"] == "ok" or "compiler" in row["note"].lower(), row


def test_a_method_runs_in_its_dtypes_alone():
    lean = by_name("head", "lossfuse linear lean", "lossfuse linear leanest")
    assert len(measured("40x16x500", "bf16", ["forward+backward"], *lean)) == 2
    assert not measured("40x16x500", "fp32", ["forward+backward"], *lean)


def full(*_):
    raise torch.OutOfMemoryError("2 GiB asked for\nand a page of statistics")


WRONG = {
    "twice the gradient": (
        lambda x, t: 2 * F.cross_entropy(x, t) - F.cross_entropy(x, t).detach(),
        "wrong",
        "gradient is off by",
    ),
    "another loss": (lambda x, t: F.cross_entropy(x, t, ignore_index=3), "failed", "IndexError"),
    "padding counted": (lambda x, t: F.cross_entropy(x, t.clamp(min=0)), "wrong", "loss is off by"),
    "smoothed": (
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.01),
        "wrong",
        "loss is off by",
    ),
    "NaN": (lambda x, t: F.cross_entropy(x, t) * float("nan"), "wrong", "loss is off by nan"),
    "no gradient": (lambda x, t: F.cross_entropy(x.detach(), t), "failed", "RuntimeError"),
    "out of memory": (full, "out of memory", "OutOfMemoryError: 2 GiB asked for"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_or_fails_is_a_row_without_numbers(name):
    loss_fn, status, note = WRONG[name]
    got = measured(
        "40x500",
        "fp32",
        ["forward+backward"],
        Method(name, "logits", lambda: loss_fn),
        *by_name("logits", "lossfuse"),
    )
    row = got["forward+backward", name]
    assert row["status"] == status and row["note"].startswith(note)
    assert "ms_p50" not in row and "peak_extra_bytes" not in row
    assert got["forward+backward", "lossfuse"]["status"] == "ok"


def test_a_head_whose_weight_gradient_is_wrong_is_wrong():
    def half(hidden, weight, target):
        return F.cross_entropy(hidden @ (0.5 * weight + 0.5 * weight.detach()).T, target)

    row = measured("40x16x500", "fp32", ["forward+backward"], Method("half", "head", lambda: half))[
        "forward+backward", "half"
    ]
    assert row["status"] == "wrong" and row["grad_error"] == pytest.approx(0.5, rel=1e-3)


def test_a_method_that_does_not_fit_is_a_row_and_is_not_run(monkeypatch):
    ran = []

    def loss(x, target):
        ran.append("eager")
        return F.cross_entropy(x, target)

    chosen = [Method("F.cross_entropy", "logits", lambda: loss), *by_name("logits", "lossfuse")]
    # between the bytes of the two
    monkeypatch.setattr(bench, "available_bytes", lambda device: 2 * 400 * 5000 * 4)
    got = measured("400x5000", "fp32", ["forward+backward"], *chosen)
    row = got["forward+backward", "F.cross_entropy"]
    assert not ran and row["status"] == "out of memory" and "ms_p50" not in row
    assert (
        row["note"]
        == "by formula it needs 22.9 MiB beyond its inputs of 15.3 MiB available, and it was not run"
    )
    assert got["forward+backward", "lossfuse"]["status"] == "ok"


def test_a_case_that_does_not_fit_is_refused_and_others_run(monkeypatch, tmp_path, capsys):
    out, room = tmp_path / "rows.csv", 1 << 40
    monkeypatch.setattr(bench, "available_bytes", lambda device: room)
    large = "9999999x999999"
    command = [
        "bench",
        "--dtypes",
        "fp32",
        "--modes",
        "no_grad",
        "--methods",
        "lossfuse in place",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    assert main([*command, "--cases", large, "40x500"]) == 0
    assert (
        f"{large} in fp32 is not run: its inputs and their check in float64 need 74506.75 GiB of 1024.00 GiB"
        in capsys.readouterr().out
    )
    assert set(read([out])["case"]) == {"40x500"}
    assert main([*command, "--cases", large]) == 2
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", ["1024x32000", "64x128256", "32x1024x64000", "2048x256x20000", "64x100000p5"]
)
def test_the_bytes_of_a_case_are_counted_before_it_is_loaded(shape, dtype):
    torch.use_deterministic_algorithms(False)
    case = named(shape, CPU)
    held, most = problems.bytes_of(case, DTYPES[dtype])
    loaded = []
    load = profile_memory(
        lambda: loaded.append(problems.load(case, DTYPES[dtype], CPU)), device=CPU, warmup=0
    )
    truth = profile_memory(loaded[0]._fp64, device=CPU, warmup=0)
    assert load.end_bytes == pytest.approx(held, rel=0.01)
    peak = max(load.peak_bytes, held + truth.peak_bytes)
    assert peak <= most + (1 << 20) <= 1.5 * peak + (192 << 20)


def test_an_interrupt_keeps_the_modes_that_were_measured(monkeypatch, tmp_path, capsys):
    out, real = tmp_path / "rows.csv", bench._measure_mode

    def interrupted(problem, mode, *rest):
        if mode == "forward+backward":
            raise KeyboardInterrupt
        return real(problem, mode, *rest)

    monkeypatch.setattr(bench, "_measure_mode", interrupted)
    assert (
        main(
            [
                "bench",
                "--cases",
                "40x500",
                "--dtypes",
                "fp32",
                "--methods",
                "lossfuse in place",
                "--repeats",
                "1",
                "--out",
                str(out),
            ]
        )
        == 130
    )
    said = capsys.readouterr()
    assert set(read([out])["mode"]) == {"no_grad"} and "lossfuse in place" in said.out
    assert said.err == "lossfuse.perf bench: interrupted\n"


def test_how_far_it_is_and_about_what_time_is_left():
    now = [100.0]
    pace = bench.Pace(4, 20.0, lambda: now[0])
    assert (
        pace.said("llama2 fp32 no_grad, lossfuse")
        == "1 of 4: llama2 fp32 no_grad, lossfuse, about 80 s left"
    )
    now[0] = 160.0
    pace.finish()
    assert pace.said("x") == "2 of 4: x, about 3 min left"
    now[0] = 220.0
    assert pace.said("x") == "2 of 4: x, about 2 min left"
    now[0] = 1000.0
    assert pace.said("x") == "2 of 4: x, about 1 s left"


def test_methods_that_are_not_there_are_a_mistake_that_says_what_there_is(capsys):
    assert main(["bench", "--cases", "40x500", "--methods", "nosuch"]) == 2
    said = capsys.readouterr().err
    assert (
        "--methods is 'nosuch', which no method's name contains; there are, of logits: F.cross_entropy, "
        in said
    )
    assert "lossfuse in place" in said and "linear" not in said


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch):
    monkeypatch.setattr(bench, "load", full)
    got = measured("40x500", "fp32", ["no_grad", "forward"], *by_name("logits", "lossfuse"))
    assert [row["status"] for row in got.values()] == ["out of memory"] * 2


class Eats(torch.autograd.Function):
    """The gradient over the logits, as several packages do, without a word to autograd."""

    @staticmethod
    def forward(ctx, x, target):
        loss = F.cross_entropy(x.detach(), target)
        x.detach().copy_(torch.func.grad(F.cross_entropy)(x.detach(), target))
        ctx.eaten = x.detach()
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return ctx.eaten * dloss, None


def test_a_method_that_eats_its_logits_gets_fresh_ones_every_time():
    eater = Method("eater", "logits", lambda: Eats.apply, consumes=True)
    got = measured(
        "40x500",
        "fp32",
        ["forward", "forward+backward"],
        eater,
        *by_name("logits", "lossfuse", "F.cross_entropy"),
    )
    assert {row["status"] for row in got.values()} == {"ok"}
    assert max(row["loss_error"] for row in got.values()) < 1e-6


def test_the_gradient_is_taken_at_a_tensor_that_is_no_leaf():
    seen = []

    def look(x, target):
        seen.append((x.requires_grad, x.is_leaf, x._is_view()))
        return F.cross_entropy(x, target)

    measured(
        "40x500", "fp32", ["no_grad", "forward+backward"], Method("look", "logits", lambda: look)
    )
    assert set(seen) == {(False, True, False), (True, False, False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_truth_of_a_head_is_that_of_its_logits(dtype, monkeypatch):
    monkeypatch.setattr(problems, "BLOCK_BYTES", 8 * 100 * 30)
    problem = problems.Head(named("100x16x300", CPU), dtype, CPU)
    hidden, weight = (t.double().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = F.cross_entropy(hidden @ weight.T, problem.target)
    grads = torch.autograd.grad(loss, (hidden, weight))
    errors = problem.errors((loss, grads))
    assert errors.loss < 1e-12 and errors.grad < 1e-12


def test_methods_that_cannot_run_are_a_line():
    found, lines = methods.of("logits", CPU)
    ours = ["lossfuse", "lossfuse in place", "lossfuse reference"]
    assert [m.name for m in found] == [
        "F.cross_entropy",
        "F.cross_entropy(x.float())",
        "torch.compile",
        *ours,
        *STATS[:3],
    ]
    assert "Liger (logits) is skipped: does not run on cpu" in lines
    cuda = {line.split(" is ")[0]: line for line in methods.of("head", torch.device("cuda"))[1]}
    assert "lossfuse linear reference (head)" in cuda and cuda.pop(
        "lossfuse linear reference (head)"
    ).endswith("does not run on cuda")
    assert TORCH_HEAD or cuda.pop("F.linear_cross_entropy (head)").endswith("has none")
    assert all(line.endswith("is not installed") for line in cuda.values())
    head = [
        *EAGER_HEAD,
        "torch.compile",
        *TORCH_HEAD,
        "lossfuse linear",
        "lossfuse linear stats",
        "lossfuse linear reference",
    ]
    assert [m.name for m in methods.of("head", CPU)[0]] == head
    assert len(methods.of("head", CPU, "sweep")[0]) == 1 + 16
    only, _ = methods.of("logits", CPU, "lossfuse")
    assert [m.name for m in only] == ["F.cross_entropy", *ours, *STATS[:2]]


def test_the_command_appends_rows_and_prints_a_table(tmp_path, capsys, device):
    out = tmp_path / "results" / "rows.csv"
    for _ in range(2):
        command = [
            "bench",
            "--cases",
            "40x500",
            "30x8x100",
            "--dtypes",
            "fp32",
            "--modes",
            "no_grad",
            "--methods",
            "cross_entropy",
        ]
        assert main([*command, "--repeats", "2", "--out", str(out), "--tests", "passed"]) == 0
    frame = read([out])
    assert (
        len(frame) == 2 * (3 + 2 + len(TORCH_HEAD))
        and (frame["status"] == "ok").all()
        and (frame["tests"] == "passed").all()
    )
    assert (
        frame["date"].nunique() <= 2
        and (frame["device"].str.contains("threads") == (device == "cpu")).all()
    )
    printed = capsys.readouterr().out
    assert "40x500: 40 x 500" in printed and "30 x 8 x 100" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "--cases", "nobody"], "case is 'nobody' but must be one of llama2"),
        (["bench", "--cases", "4x5", "--out", "{}/file/rows.csv"], "cannot be written"),
        (["bench", "--cases", "4x5", "--out", "{}/foreign.csv"], "has columns ['a', 'b']"),
        (["estimate", "4xx5"], "case is '4xx5'"),
        (["compare", "{}/absent.csv", "{}/absent.csv"], "does not exist"),
        (["dashboard", "{}/foreign.csv", "--out", "{}/page.html"], "has columns ['a', 'b']"),
        (["memory", "nowhere"], "nowhere"),
        (["gpu", "--out", "{}/file/out"], "cannot be written"),
        (["bench", "--cases", "9" * 5000 + "x5"], "must be one of llama2"),
        (
            ["bench", "--cases", "4x5", "--repeats", "0"],
            "argument --repeats: '0' must be a whole number, at least 1",
        ),
        (
            ["bench", "--cases", "4x5", "--seconds", "-1"],
            "argument --seconds: '-1' must be a number, at least 0",
        ),
        (["bench", "--cases", "4x5", "--seconds", "nan"], "argument --seconds: 'nan'"),
        (["demo", "--steps", "0"], "argument --steps: '0' must be a whole number, at least 1"),
        (["demo", "--steps", "1.5"], "argument --steps: '1.5'"),
        (
            ["memory", "a:b", "--warmup", "-1"],
            "argument --warmup: '-1' must be a whole number, at least 0",
        ),
        (["estimate", "4x5", "--fits", "-1"], "argument --fits: '-1' must be a number, above 0"),
        (["estimate", "4x5", "--fits", "inf"], "argument --fits: 'inf'"),
        (
            ["estimate", "4x5", "--layout", "tp=2", "--chunk-bytes", "0"],
            "argument --chunk-bytes: '0'",
        ),
        (
            ["estimate", "4x5", "--layout", "tp=2", "--latency-us", "-1"],
            "argument --latency-us: '-1'",
        ),
        (
            ["gpu", "--out", "{}/out", "--minutes", "0"],
            "argument --minutes: '0' must be a number, above 0 and at most 1440",
        ),
        (["gpu", "--out", "{}/out", "--minutes", "1e300"], "argument --minutes: '1e300'"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(arguments, says, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    try:
        code = main([argument.format(tmp_path) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err
    assert (tmp_path / "foreign.csv").read_text() == "a,b\n1,2\n"
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "out").exists()


class Loses:
    """An interrupt while it is destroyed, which Python prints and forgets."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT ends a process there")
@pytest.mark.parametrize("how", ["raised", "lost", "while it waits for a thread"])
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

    released = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("lossfuse.perf.__main__.run", command)
    assert main(["estimate", "4x5"]) == 130
    released.set()
    assert capsys.readouterr().err.splitlines()[-1] == "lossfuse.perf estimate: interrupted"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_thread_raises_is_raised():
    def fails():
        raise LookupError("in a thread")

    assert interrupts.result_of(lambda: 3) == 3
    with pytest.raises(LookupError, match="in a thread"):
        interrupts.result_of(fails)


def test_rows_of_the_checkout_are_readable():
    for path in (bench.Path(bench.__file__).parent / "results").glob("*.csv"):
        (kind,) = (kind for kind in rows.KINDS if rows.holds(path, kind))
        assert (read([path], kind)["schema"] == kind.version).all()
