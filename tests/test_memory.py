"""How much is allocated, watched operator by operator on the CPU: one tensor like the logits for
the gradient, one block beside it."""

import pytest
import torch

import lossfuse
from allocations import Largest, least_peak
from lossfuse.backends import torch_rows
from lossfuse.spec import LossSpec
from rows import logits_and_ids, probabilities


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 30.0, "label_smoothing": 0.1, "lse_square_scale": 1e-4}],
    ids=["plain", "every option"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_nothing_larger_than_a_block_is_allocated(dtype, soft, options):
    n, v = 2048, 8000
    x, target = logits_and_ids(n, v, dtype)
    x = x.detach()
    target = probabilities(n, v, dtype).detach() if soft else target
    grad = torch.empty_like(x)
    with Largest() as largest:
        torch_rows.row_loss_and_grads(
            x, target, None, torch.ones(()).expand(n), LossSpec(**options), grad, None
        )
    assert 0 < largest.bytes <= torch_rows.CPU_BLOCK_BYTES < n * v * x.element_size() / 3
    with Largest() as largest:
        torch_rows.row_loss(x, target, None, LossSpec(**options))
    assert 0 < largest.bytes <= torch_rows.CPU_BLOCK_BYTES


def test_the_gradient_is_handed_over_not_copied():
    """While autograd holds it nobody else does: a leaf takes it as its .grad without a clone."""
    x, target = logits_and_ids(64, 4000)
    with Largest():
        lossfuse.cross_entropy(x, target).backward()
    assert x.grad is not None and x.grad.is_contiguous()
    n_like_logits = []

    class Count(Largest):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and func.overloadpacket.__name__ == "clone":
                n_like_logits.append(args[0].numel())
            return super().__torch_dispatch__(func, types, args, kwargs)

    x.grad = None
    with Count():
        lossfuse.cross_entropy(x, target).backward()
    assert x.numel() not in n_like_logits


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 1.05),
        pytest.param({"softcap": 30.0}, 1.15, marks=pytest.mark.slow),
        ({"label_smoothing": 0.1, "lse_square_scale": 1e-4}, 1.15),
        ({"reduction": "none"}, 1.05),
    ],
    ids=["plain", "softcap", "smoothing and z-loss", "none"],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_peak_of_a_call(dtype, options, share):
    """Loss and gradient, in units of logits of 125 or 63 MiB; torch takes 3."""
    x, target = logits_and_ids(1024, 32000, dtype)
    torch.use_deterministic_algorithms(False)  # which fills new memory twice
    size = x.numel() * x.element_size()

    def call():
        return torch.autograd.grad(lossfuse.cross_entropy(x, target, **options).sum(), x)

    peak = least_peak(call, x.device)
    if peak is None:
        pytest.skip("no /proc to ask")
    assert 0.9 * size < peak < share * size + (4 << 20)
