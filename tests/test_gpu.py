"""Tests that need a GPU: no synchronisation, captured graphs, memory to the byte, sizes beyond
2^31."""

import pytest
import torch
import torch.nn.functional as F

import lossfuse
import public
from closeness import assert_gradient_close
from conftest import GPU, nothing_waits
from public import together
from rows import logits_and_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]


@pytest.fixture
def memory_given_back():
    """Free the memory that the allocator of this process caches, for other processes."""
    yield
    torch.cuda.empty_cache()


CALLS = {
    "default": {},
    "in place": {"inplace": True},
    "none, in place": {"inplace": True, "reduction": "none"},
    "smoothing": {"label_smoothing": 0.1, "inplace": True},
}


def step(leaf, target, factor, **options):
    """Loss and gradient of logits that some layer made; ``factor`` lives on the device."""
    loss = lossfuse.cross_entropy(leaf * 1.0, target, **options)
    loss = loss.sum() if loss.dim() else loss
    (grad,) = torch.autograd.grad(loss * factor, leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("v", [1000, 8192, 32001, 128256])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name, v):
    x, target = logits_and_ids(64, v, torch.bfloat16, "cuda")
    factor = torch.tensor(3.0, device="cuda")
    step(x, target, factor, **CALLS[name])
    torch.cuda.synchronize()
    with nothing_waits():
        step(x, target, factor, **CALLS[name])
        with torch.no_grad():
            lossfuse.cross_entropy(x, target)


@pytest.mark.parametrize("v", [1000, 32001, 128256])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_step_replays_on_new_numbers(name, v):
    x, target = logits_and_ids(64, v, torch.bfloat16, "cuda")
    held, ids, factor = (
        x.detach().clone().requires_grad_(),
        target.clone(),
        torch.tensor(2.0, device="cuda"),
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(held, ids, factor, **CALLS[name])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step(held, ids, factor, **CALLS[name])
    for seed in (1, 2):
        fresh, new_ids = logits_and_ids(64, v, torch.bfloat16, "cuda", seed=seed)
        with torch.no_grad():
            held.copy_(fresh)
        ids.copy_(new_ids)
        graph.replay()
        want_loss, want = step(fresh, new_ids, factor, **CALLS[name])
        assert torch.equal(loss, want_loss) and torch.equal(grad, want)


@pytest.mark.parametrize("v", [4096, 16000, 32000, 32001, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_in_place_needs_numbers_per_row_alone(dtype, v):
    n = 256
    x, target = logits_and_ids(n, v, dtype, "cuda")
    leaf = x.detach().requires_grad_()
    size = leaf.numel() * leaf.element_size()
    for _ in range(2):
        logits = leaf * 1.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = lossfuse.cross_entropy(logits, target, inplace=True)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del logits, loss, grad
    assert extra < size // 50 + (64 << 10)


@pytest.mark.parametrize("v", [8192, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_run_gives_the_same_bits(dtype, v):
    x, target = logits_and_ids(500, v, dtype, "cuda")
    factor = torch.tensor(1.0, device="cuda")
    first = step(x, target, factor, inplace=True)
    for _ in range(20):
        again = step(x, target, factor, inplace=True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("v", [8192, 16000, 32000, 50257, 128256, 151643, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_widths_in_place_entry_by_entry(dtype, v):
    x, target = logits_and_ids(96, v, dtype, "cuda")
    leaf = x.detach().requires_grad_()
    got_loss, got = step(leaf, target, torch.tensor(64.0, device="cuda"), inplace=True)
    x64 = x.detach().double().requires_grad_()
    want_loss = lossfuse.cross_entropy(x64, target, impl="reference")
    (want,) = torch.autograd.grad(want_loss * 64.0, x64)
    torch.testing.assert_close(got_loss.double(), want_loss.detach(), rtol=2e-6, atol=1e-6)
    assert_gradient_close(got, want)


@pytest.mark.usefixtures("memory_given_back")
def test_more_than_two_to_the_31_elements():
    n, v = 17_000, 128256
    free, _ = torch.cuda.mem_get_info()
    if free < 10 << 30:
        pytest.skip("needs 10 GiB")
    # logits that are written must have no other owner
    held = [torch.randn(n, v, device="cuda", dtype=torch.bfloat16)]
    address = held[0].data_ptr()
    target = torch.randint(0, v, (n,), device="cuda")
    last = held[0][-8:].clone()
    want = torch.autograd.grad(
        F.cross_entropy(wide := last.double().requires_grad_(), target[-8:], reduction="sum"), wide
    )[0]
    anchor = torch.zeros((), device="cuda", requires_grad=True)

    class Hand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor):
            return held.pop()

        @staticmethod
        def backward(ctx, grad):
            arrived.append((grad.data_ptr(), grad[-8:].clone()))

    arrived = []
    lossfuse.cross_entropy(Hand.apply(anchor), target, reduction="sum", inplace=True).backward()
    ((where, got),) = arrived
    assert where == address
    assert_gradient_close(got, want)


def test_calls_on_several_streams_at_once():
    """Programs of a split row wait for each other; two such launches share the device."""
    x, target = logits_and_ids(300, 128256, torch.bfloat16, "cuda")
    factor = torch.tensor(1.0, device="cuda")
    want = step(x, target, factor, inplace=True)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(x, target, factor, inplace=True))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, want[0]) and torch.equal(grad, want[1]) for loss, grad in results)


def big(seed=0):
    """Rows that are split, unaligned, and a head of several chunks of classes."""
    return public.tensors("cuda", torch.bfloat16, seed=seed, n=100, d=64, v=32_001)


@pytest.mark.parametrize("aside", [False, True], ids=["", "on a side stream"])
@pytest.mark.parametrize("name", public.CALLS)
def test_every_function_can_be_captured(name, aside):
    call, there = public.CALLS[name], big()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(there, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream if aside else None):
        made = call(there, "triton")
    for seed in (1, 2):
        fresh = big(seed)
        public.into(there, fresh)
        graph.replay()
        for got, want in zip(made, call(fresh, "triton"), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", public.CALLS)
def test_every_function_on_streams_of_several_threads(name):
    call, cases = public.CALLS[name], [big(seed) for seed in range(4)]
    want = [call(t, "triton") for t in cases]
    torch.cuda.synchronize()

    def work(t):
        with torch.cuda.stream(torch.cuda.Stream()):
            made = call(t, "triton")
            torch.cuda.current_stream().synchronize()
        return made

    for _ in range(3):
        for got, wanted in zip(together([lambda t=t: work(t) for t in cases]), want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_backward_in_a_thread_of_autograd_on_the_stream_of_the_forward():
    x, target = logits_and_ids(300, 32_001, torch.bfloat16, "cuda")
    factor = torch.tensor(2.0, device="cuda")
    want = step(x, target, factor, inplace=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # a while before the logits are there
        torch.cuda._sleep(10_000_000)
        loss = lossfuse.cross_entropy(x * 1.0, target, inplace=True)
    # autograd runs the backward on that stream, also from another
    ((grad,),) = together([lambda: torch.autograd.grad(loss * factor, x)])
    torch.cuda.synchronize()
    assert torch.equal(loss, want[0]) and torch.equal(grad, want[1])


HEADS = {
    "default": {},
    "none": {"reduction": "none"},
    "cap": {"softcap": 20.0},
    "smoothing": {"label_smoothing": 0.1},
}


def head_step(hidden, weight, target, factor, **options):
    loss = lossfuse.linear_cross_entropy(hidden, weight, target, **options)
    grads = torch.autograd.grad(loss.sum() * factor, (hidden, weight))
    return loss.detach(), *grads


def head(n, d, v, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=g, device="cuda") * 2 / d**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,), generator=g, device="cuda")
    target[::5] = -100
    return hidden, weight, target


@pytest.mark.parametrize("name", HEADS)
def test_a_head_waits_for_nothing(name):
    hidden, weight, target = head(700, 256, 40_000)
    factor = torch.tensor(3.0, device="cuda")
    head_step(hidden, weight, target, factor, **HEADS[name])
    torch.cuda.synchronize()
    with nothing_waits():
        head_step(hidden, weight, target, factor, **HEADS[name])
        with torch.no_grad():
            lossfuse.linear_cross_entropy(hidden, weight, target)


@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize("v", [1000, 32_001, 50_257, 128_256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_as_near_as_eager_with_fp32_logits(name, dtype, v):
    """Several chunks, the gradient over the logits: a race of programs that share a row would show
    here."""
    hidden, weight, target = head(700, 128, v, dtype)
    factor = torch.tensor(64.0, device="cuda")
    options = lossfuse.LinearOptions(chunk_bytes=256 * 4 * v)
    got = head_step(hidden, weight, target, factor, options=options, **HEADS[name])
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = head_step(*exact, target, factor, impl="reference", **HEADS[name])
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    # fp32 products are as exact as torch's setting makes them
    bound = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}[dtype]
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()
    assert (got[1][::5] == 0.0).all()


def test_a_captured_head_replays():
    hidden, weight, target = head(500, 128, 40_000)
    factor = torch.tensor(2.0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            head_step(hidden, weight, target, factor)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = head_step(hidden, weight, target, factor)
    fresh, _, ids = head(500, 128, 40_000, seed=1)
    with torch.no_grad():
        hidden.copy_(fresh)
    target.copy_(ids)
    graph.replay()
    for a, b in zip(made, head_step(hidden, weight, target, factor), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lean", [False, True], ids=["default", "lean"])
def test_a_head_takes_a_chunk_and_its_sums(lean):
    n, d, v = 4096, 1024, 128_256
    hidden, weight, target = head(n, d, v)
    half = {"logits_dtype": torch.bfloat16, "acc_dtype": torch.bfloat16} if lean else {}
    options = lossfuse.LinearOptions(chunk_bytes=256 << 20, **half)
    factor = torch.tensor(1.0, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = head_step(hidden, weight, target, factor, options=options)
        extra = torch.cuda.max_memory_allocated() - before
        del made
    gradients = 2 * d * (n + v)
    chunk = 256 << 20
    assert extra <= max(
        chunk + gradients if lean else chunk + 2 * gradients, 3 * gradients
    ) * 1.05 + (64 << 20)
