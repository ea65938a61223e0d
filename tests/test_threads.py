"""Blocks in several threads: the numbers, errors and modes of one thread, and nothing left
behind."""

import os
import signal
import sys
import threading
import time

import pytest
import torch

import lossfuse
import public
from lossfuse import targets
from lossfuse.backends import threads, torch_rows
from lossfuse.spec import LossSpec
from public import together
from rows import head_and_ids, logits_and_ids, probabilities


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a small call has many."""
    monkeypatch.setattr(torch_rows, "THREAD_LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(threads, "workers", lambda: 3)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "softcap": 9.0, "lse_square_scale": 1e-3}],
    ids=["plain", "all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_numbers_are_those_of_one_thread(dtype, options, soft, monkeypatch):
    n, v = 131, 400
    x, target = logits_and_ids(n, v, dtype)
    target = probabilities(n, v, dtype).detach() if soft else target
    arguments = (x.detach(), target, None, torch.rand(n), LossSpec(**options))
    got, want = torch.empty(n, v, dtype=dtype), torch.empty(n, v, dtype=dtype)
    used = []
    real = threads.run
    monkeypatch.setattr(
        threads, "run", lambda tasks, count: used.append((len(tasks), count)) or real(tasks, count)
    )
    loss = torch_rows.row_loss_and_grads(*arguments, got, None)
    monkeypatch.setattr(threads, "workers", lambda: 1)
    want_loss = torch_rows.row_loss_and_grads(*arguments, want, None)
    assert len(used) == 1 and used[0][0] > 3 and used[0][1] == 3
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_temporaries_of_all_threads_together_are_those_of_one():
    for n, v, itemsize in ((1024, 32000, 2), (4096, 128256, 2), (64, 262144, 4)):
        for temporaries in (1, 7):
            alone = torch_rows.block_rows(n, v, itemsize, 4, True, temporaries)
            shared = torch_rows.block_rows(n, v, itemsize, 4, True, temporaries, 2)
            # a row is the least
            assert shared == 1 or 2 * shared <= max(alone, 1) * 1.01


def test_inference_mode_and_no_grad_hold_in_every_thread():
    x, target = logits_and_ids(200, 400)
    with torch.inference_mode():
        loss = lossfuse.cross_entropy(x, target, reduction="none")
        assert loss.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(lossfuse.cross_entropy(x, target, reduction="none"), loss)


def test_an_error_in_a_thread_is_raised_and_the_next_call_works():
    def fail():
        raise KeyError("row 7")

    with pytest.raises(KeyError, match="row 7"):
        threads.run([int, fail, int], 3)
    assert threads.run([lambda i=i: i * i for i in range(20)], 3) == [i * i for i in range(20)]


def test_the_number_of_threads_of_others_stays():
    before = torch.get_num_threads()
    threads._forget_pool()
    threads.run([int] * 5, 3)
    assert torch.get_num_threads() == before and together([torch.get_num_threads]) == [before]


def test_several_callers_at_once():
    x, target = logits_and_ids(200, 400)
    x = x.detach()
    want = lossfuse.cross_entropy(x, target)
    got = together([lambda: lossfuse.cross_entropy(x, target)] * 6)
    assert all(torch.equal(loss, want) for loss in got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)
def test_a_forked_process_makes_threads_of_its_own():
    threads.run([int] * 5, 3)
    child = os.fork()
    if child == 0:
        # the pool of the parent would never answer
        os._exit(0 if threads.run([lambda: 3] * 5, 2) == [3] * 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def often():
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("name", public.CALLS)
@pytest.mark.not_reference
@pytest.mark.slow_interpreted
def test_every_function_in_several_threads(place, often, name):
    impl, device = place.impl, place.device
    size = {"n": 6, "v": 40} if impl == "triton" and device == "cpu" else {"n": 100, "v": 400}
    call, seeds = public.CALLS[name], range(4)
    cases = [public.tensors(device, seed=seed, **size) for seed in seeds]
    want = [call(t, impl) for t in cases]
    for _ in range(3):
        for got, wanted in zip(
            together([lambda t=t: call(t, impl) for t in cases]), want, strict=True
        ):
            assert len(got) == len(wanted) and all(
                torch.equal(a, b) for a, b in zip(got, wanted, strict=True)
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_the_interpreter_takes_one_caller_at_a_time(often):
    pytest.importorskip("triton")
    cases = [public.tensors(seed=seed, n=6, v=40) for seed in range(4)]
    call = public.CALLS["cross_entropy"]
    want = [call(t, "triton") for t in cases]
    for got, wanted in zip(
        together([lambda t=t: call(t, "triton") for t in cases]), want, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"inplace": True}, {"inplace": True, "reduction": "none"}], ids=str
)
def test_backward_in_another_thread_than_forward(options):
    x, target = logits_and_ids(200, 400)
    losses = [lossfuse.cross_entropy(x * 1.0, target, **options).sum() for _ in range(4)]
    (want,) = torch.autograd.grad(lossfuse.cross_entropy(x * 1.0, target, **options).sum(), x)
    grads = together([lambda loss=loss: torch.autograd.grad(loss, x)[0] for loss in losses])
    assert all(torch.equal(grad, want) for grad in grads)


def test_one_leaf_gathers_the_gradients_of_several_threads():
    hidden, weight, _, ids = head_and_ids(60, 16, 40)
    lossfuse.linear_cross_entropy(hidden, weight, ids).backward()
    once, hidden.grad, weight.grad = weight.grad, None, None
    together(
        [lambda: lossfuse.linear_cross_entropy(hidden, weight, ids).backward() for _ in range(4)]
    )
    torch.testing.assert_close(weight.grad, 4 * once)


def test_what_a_thread_debugs_is_its_own():
    inside, told = threading.Event(), []

    def debug():
        with lossfuse.debug_targets():
            told.append(targets.debugging())
            inside.set()
            done.wait()

    done = threading.Event()
    other = threading.Thread(target=debug)
    other.start()
    inside.wait()
    told.append(targets.debugging())
    done.set()
    other.join()
    with lossfuse.debug_targets():
        told += together([targets.debugging])
    assert told == [True, False, False]


def test_without_threads_the_caller_does_the_work(monkeypatch):
    """As at the end of the interpreter, or where a process may have no more."""
    before = torch.get_num_threads()
    real, started = threading.Thread.start, []

    def start(thread):
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patch:
        threads._forget_pool()
        patch.setattr(threading.Thread, "start", start)
        assert threads.run([lambda i=i: i * i for i in range(20)], 3) == [i * i for i in range(20)]
    assert len(started) == 2 and torch.get_num_threads() == before
    # the one that did start is not left waiting
    started[0].join(600)
    assert not started[0].is_alive()
    seen = together([torch.get_num_threads])
    assert seen == [before] and threads.run([lambda: 3] * 5, 3) == [3] * 5


@pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="needs a signal that wakes the main thread"
)
def test_an_interrupt_stops_every_thread_first():
    """The second one too, which interrupts the wait for the tasks that are still writing."""
    main, running, finish = threading.main_thread().ident, threading.Semaphore(0), threading.Event()
    begun, ended, handled, expected = [], [], [], threading.Semaphore(0)

    def slow(i):
        begun.append(i)
        running.release()
        finish.wait()
        ended.append(i)

    def handler(signum, frame):
        if expected.acquire(blocking=False):
            handled.append(len(ended))
            raise KeyboardInterrupt

    def main_waits():
        frame = sys._current_frames()[main]
        return (frame.f_code.co_filename, frame.f_code.co_name) == (threading.__file__, "wait")

    def interrupt():
        for _ in range(2):
            running.acquire()
        for i in range(2):
            while not main_waits():
                time.sleep(0.001)
            expected.release()
            while len(handled) == i:
                # Python looks for a signal before it blocks: one that arrives in between is not
                # seen until the next
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.001)
        # it waits once more, and only then may the tasks end
        while not main_waits():
            time.sleep(0.001)
        finish.set()

    # a process that was started in the background may ignore the signal
    before = signal.signal(signal.SIGINT, handler)
    try:
        other = threading.Thread(target=interrupt)
        other.start()
        with pytest.raises(KeyboardInterrupt):
            threads.run([lambda i=i: slow(i) for i in range(10)], 2)
        other.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert handled == [0, 0] and sorted(begun) == sorted(ended) == [0, 1]
    assert threads.run([lambda: 3] * 5, 2) == [3] * 5 and sorted(begun) == [0, 1]


def test_a_pool_interrupted_while_it_is_made(monkeypatch):
    before, real = torch.get_num_threads(), threading.Barrier.wait

    def wait(barrier, timeout=None):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return real(barrier, timeout)

    threads._forget_pool()
    alive = threading.active_count()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Barrier, "wait", wait)
        threads.run([int] * 5, 3)
    # no thread waits for a barrier, or the process would never end
    assert (
        threading.active_count() <= alive
        and torch.get_num_threads() == before
        and not threads._making.locked()
    )
    assert threads.run([lambda: 3] * 5, 3) == [3] * 5
