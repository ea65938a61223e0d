"""Blocks in threads of their own: the same numbers, errors and modes as in one thread, and nothing left behind."""

import os
import threading

import pytest
import torch

import lossfuse
from lossfuse.backends import chunked, threads
from lossfuse.spec import LossSpec
from rows import logits_and_ids, probabilities


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a small call has many."""
    monkeypatch.setattr(chunked, "THREAD_LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(chunked, "CPU_BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(threads, "workers", lambda: 3)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 9.0, "lse_square_scale": 1e-3}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_numbers_are_those_of_one_thread(dtype, options, soft, monkeypatch):
    n, v = 131, 400
    x, target = logits_and_ids(n, v, dtype)
    target = probabilities(n, v, dtype).detach() if soft else target
    arguments = (x.detach(), target, None, torch.rand(n), LossSpec(**options))
    got, want = torch.empty(n, v, dtype=dtype), torch.empty(n, v, dtype=dtype)
    used = []
    real = threads.run
    monkeypatch.setattr(threads, "run", lambda tasks, count: used.append((len(tasks), count)) or real(tasks, count))
    loss = chunked.row_loss_and_grads(*arguments, got, None)
    monkeypatch.setattr(threads, "workers", lambda: 1)
    want_loss = chunked.row_loss_and_grads(*arguments, want, None)
    assert len(used) == 1 and used[0][0] > 3 and used[0][1] == 3
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_temporaries_of_all_threads_together_stay_what_they_are():
    for n, v, itemsize in ((1024, 32000, 2), (4096, 128256, 2), (64, 262144, 4)):
        for temporaries in (1, 7):
            alone = chunked.block_rows(n, v, itemsize, 4, True, temporaries)
            shared = chunked.block_rows(n, v, itemsize, 4, True, temporaries, 2)
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


def test_the_number_of_threads_of_everybody_else_stays():
    before = torch.get_num_threads()
    threads._forget()
    threads.run([int] * 5, 3)
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert torch.get_num_threads() == before and seen == [before]


def test_several_callers_at_once():
    x, target = logits_and_ids(200, 400)
    x = x.detach()
    want = lossfuse.cross_entropy(x, target)
    got = []
    callers = [threading.Thread(target=lambda: got.append(lossfuse.cross_entropy(x, target))) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(got) == 6 and all(torch.equal(loss, want) for loss in got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own():
    threads.run([int] * 5, 3)
    child = os.fork()
    if child == 0:
        # the pool of the parent would never answer
        os._exit(0 if threads.run([lambda: 3] * 5, 2) == [3] * 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
