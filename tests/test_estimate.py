"""Bytes by formula: against torch's allocator on this CPU and against measurements on an H100."""

import pytest
import torch

from perf_commands import perf  # isort: skip
from lossfuse.ops import matmul
from lossfuse.perf import methods, problems
from lossfuse.perf.cases import DTYPES, MODES, named
from lossfuse.perf.estimate import FORMULAS, estimate
from lossfuse.perf.memory import profile_memory
from lossfuse.perf.protocol import peak_extra_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_GRAD, FORWARD, STEP = MODES
# the formulas leave out a few numbers per row
ROWS = 64 << 10
# three chunks; so few rows that the head is all there is
OUR_SHAPES = ("2500x64x3000", "32x1024x5000")
SHAPES = ("700x12345", "600x300x5000", "128x512x10000", "400x12345p5", *OUR_SHAPES)
COMPILED = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
    pytest.mark.slow,
]
slow = pytest.mark.slow


def needs_on(shape, dtype, mode=STEP, device=CPU):
    return {n.method: n for n in estimate(named(shape, device), dtype, mode, device.type)}


def peak_of(step):
    """Allocator's peak of a second call; a method may overwrite its arguments."""
    step.run(*step.prepare())
    arguments = step.prepare()
    return profile_memory(lambda: step.run(*arguments), device=CPU, warmup=0).peak_bytes


def runnable():
    for shape in SHAPES:
        only = "lossfuse linear" if shape in OUR_SHAPES else None
        for method in methods.of(named(shape, CPU).op, CPU, only)[0]:
            marks = COMPILED if method.name == "torch.compile" else ()
            yield pytest.param(shape, method, marks=marks, id=f"{shape}-{method.name}")


@pytest.fixture(autouse=True)
def plain_memory(nan_in_new_memory):
    """Filling new memory with NaN allocates more of it."""
    torch.use_deterministic_algorithms(False)


def require_formula(shape, method, dtype, mode):
    problem = problems.load(named(shape, CPU), DTYPES[dtype], CPU)
    peak = peak_of(problem.step(method.make(), mode, method.consumes))
    need = needs_on(shape, dtype, mode)[method.name].bytes
    assert abs(need - peak) <= 0.05 * peak + ROWS, (need / 2**20, peak / 2**20)


@pytest.mark.parametrize("mode", [STEP, *(pytest.param(m, marks=slow) for m in (NO_GRAD, FORWARD))])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=slow)])
@pytest.mark.parametrize(("shape", "method"), list(runnable()))
def test_a_formula_agrees_with_the_allocator(shape, method, dtype, mode):
    torch.compiler.reset()
    require_formula(shape, method, dtype, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["700x12345", "300x300x5000"])
def test_a_formula_agrees_with_the_allocator_in_fp16(shape, mode):
    found = methods.of(named(shape, CPU).op, CPU)[0]
    # products in fp16 are slow on a CPU, ours are in fp32
    quick = (
        ("lossfuse linear", "lossfuse linear stats") if "x300x" in shape and mode == STEP else ""
    )
    for method in found:
        if method.name != "torch.compile" and (not quick or method.name in quick):
            require_formula(shape, method, "fp16", mode)


def test_the_allocator_and_the_process_agree():
    problem = problems.load(named("2000x8000", CPU), torch.float32, CPU)
    step = problem.step(torch.nn.functional.cross_entropy, STEP, False)
    seen = peak_extra_bytes(step, CPU)
    if seen is None:
        pytest.skip("needs /proc")
    need = needs_on("2000x8000", "fp32")["F.cross_entropy"]
    assert seen == pytest.approx(need.bytes, rel=0.05)


def test_dense_labels_are_an_input_as_large_as_the_logits():
    needs = needs_on("labels-million", "bf16", device=CUDA)
    logits = 1024 * 10**6 * 2
    dense, ids = needs["lossfuse in place"], needs["lossfuse ids in place"]
    assert dense.inputs - ids.inputs == logits
    assert ids.inputs == logits + 1024 * 64 * 8 and ids.bytes < logits / 500


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("mode", [NO_GRAD, STEP])
def test_lean_takes_half_of_the_memory_on_a_cpu_too(amx, mode, monkeypatch):
    monkeypatch.setattr(matmul, "_has_amx", lambda: amx)
    problem = problems.load(named("128x512x10016", CPU), torch.bfloat16, CPU)
    losses = [methods._our_linear(options=options) for options in (None, methods.LEAN)]
    default, lean = (peak_of(problem.step(loss_fn, mode, False)) for loss_fn in losses)
    assert lean < 0.5 * default


# MiB beyond inputs of forward + backward in bf16 with 8192 rows, torch 2.11, Triton 3.6
EAGER, UPCAST = "linear + F.cross_entropy", "linear + F.cross_entropy(x.float())"
PEERS = ("torch.compile", "Liger", "CCE", "fla")
MEASURED_ON_AN_H100 = {
    "llama3": {"F.cross_entropy": 6012, "torch.compile": 2004},
    "head-llama3": {EAGER: 6012, UPCAST: 12024}
    | dict(zip(PEERS, (3070, 1129, 1067, 3337), strict=True)),
    "head-gemma2": {EAGER: 12000, UPCAST: 24000}
    | dict(zip(PEERS, (5161, 1225, 1164, 3921), strict=True)),
}
# buffers of a few numbers per row
SMALL = {"Liger", "quack", "flash-attention", "fla"}


@pytest.mark.parametrize("name", MEASURED_ON_AN_H100)
def test_a_formula_agrees_with_an_h100(name):
    needs, measured = needs_on(name, "bf16", device=CUDA), MEASURED_ON_AN_H100[name]
    for method, mib in measured.items():
        assert needs[method].bytes == pytest.approx(mib * 2**20, rel=0.05), method
    small = SMALL if name == "llama3" else set()
    assert all(needs[method].bytes < 2**18 for method in small)
    marked = {n.method for n in needs.values() if n.measured and "lossfuse" not in n.method}
    assert marked == measured.keys() | small


def test_the_linear_form_needs_what_its_prototype_needed_on_an_h100():
    """GiB beyond dX and dW; the prototype rounded no sum and copied no hidden states."""
    needs, gradients = needs_on("head-llama3", "bf16", device=CUDA), (8192 + 128256) * 4096 * 2
    for name, gib in (("lean", 0.98), ("leanest", 0.25)):
        need = needs[f"lossfuse linear {name}"].bytes
        assert need == pytest.approx(gradients + gib * 2**30, rel=0.05), name
    assert needs["lossfuse linear"].bytes <= 2.1 * 2**30


def test_every_method_has_a_formula():
    formulas = {(f.method, f.op, f.dtypes) for f in FORMULAS}
    # the torch backend on a GPU runs only if it is named
    extra = {("lossfuse torch", "logits", tuple(DTYPES))}
    assert {(m.name, m.op, m.dtypes) for m in methods.METHODS} == formulas | extra


def test_the_command_says_what_fits(capsys):
    assert perf("estimate 8192x128256 head-llama3 --dtypes bf16 --fits 8") == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("5.87 GiB", "11.74 GiB", "fits", "no ", "*"))
