"""The launches beside the kernel of loss and gradient: the divisor of a mean, zeros, the total."""

import contextlib

import pytest
import torch

from guarded import Guards, Interpreter

pytest.importorskip("triton")

from lossfuse.kernels import row_totals

BLOCK = row_totals.BLOCK.block_v


def losses_and_ids(n, device, ignore_index=-100):
    g = torch.Generator().manual_seed(n)
    loss = torch.randn(n, generator=g).exp()
    ids = torch.randint(0, 7, (n,), generator=g)
    ids[::3] = ignore_index
    return loss.masked_fill(ids == ignore_index, 0).to(device), ids.to(device)


@pytest.mark.parametrize("ignore_index", [-100, 2**40])
@pytest.mark.parametrize("n", [0, 5, BLOCK + 1, row_totals.MOST_ROWS + 1])
def test_the_divisor_is_the_number_of_valid_rows(n, ignore_index, device):
    loss, ids = losses_and_ids(n, device, ignore_index)
    mean = {"mean": True, "ignore_index": ignore_index}
    valid = (ids != ignore_index).sum(dtype=torch.float64)
    total = row_totals.total_of(loss, ids, None, **mean)
    torch.testing.assert_close(total.double(), loss.double().sum() / valid, equal_nan=True)
    divisor, dloss = row_totals.divisor_of_many(ids, None, **mean), torch.empty((), device=device)
    row_totals.prepare_rows(ids, divisor, dloss, None, None, **mean)
    assert dloss == valid.float().reciprocal()


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "divisor"])
def test_a_given_divisor_is_used(mean, device):
    loss, ids = losses_and_ids(9, device)
    divisor, dloss = torch.tensor(7.0, device=device), torch.empty((), device=device)
    row_totals.prepare_rows(
        ids, divisor if mean else None, dloss, None, None, mean=mean, ignore_index=-100
    )
    total = row_totals.total_of(loss, ids, divisor if mean else None, mean=mean, ignore_index=-100)
    torch.testing.assert_close(total, loss.sum() / (7.0 if mean else 1.0))
    assert dloss == (divisor.reciprocal() if mean else 1.0)


@pytest.mark.parametrize("n_words", [1, BLOCK - 1, 2 * BLOCK])
def test_they_write_no_memory_outside_their_tensors(n_words, device):
    guards = Guards()
    ids, words, smooth_words = (
        guards.place(torch.full((n,), 3, device=device)) for n in (5, n_words, n_words)
    )
    loss, dloss = (guards.place(torch.full((n,), 2.0, device=device)) for n in (5, 1))
    watch = contextlib.nullcontext() if device != "cpu" else Interpreter()
    with guards.allocations(), watch:
        row_totals.prepare_rows(ids, None, dloss, words, smooth_words, mean=True, ignore_index=-100)
        total = row_totals.total_of(loss, ids, None, mean=True, ignore_index=-100)
    guards.check()
    assert not words.any() and not smooth_words.any()
    assert (dloss.item(), total.item()) == (torch.tensor(0.2).item(), 2.0)
