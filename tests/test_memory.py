"""Memory of a call on a CPU: one tensor like the logits for the gradient, and one block."""

import pytest
import torch

import lossfuse
from allocations import Largest, least_peak
from lossfuse.backends import torch_rows
from lossfuse.spec import LossSpec
from rows import logits_and_ids, probabilities

EVERY_OPTION = {"softcap": 30.0, "label_smoothing": 0.1, "lse_square_scale": 1e-4}
slow = pytest.mark.slow


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "probabilities"])
def test_nothing_larger_than_a_block_is_allocated(dtype, soft, options):
    n, v = 2048, 8000
    x, target = logits_and_ids(n, v, dtype)
    x, spec, grad = x.detach(), LossSpec(**options), torch.empty_like(x)
    target = probabilities(n, v, dtype).detach() if soft else target
    upstream = torch.ones(()).expand(n)
    with Largest() as with_gradient:
        torch_rows.row_loss_and_grads(x, target, None, upstream, spec, grad, None)
    with Largest() as loss_alone:
        torch_rows.row_loss(x, target, None, spec)
    assert x.nbytes > 3 * torch_rows.CPU_BLOCK_BYTES
    for largest in (with_gradient, loss_alone):
        assert 0 < largest.bytes <= torch_rows.CPU_BLOCK_BYTES


def test_a_leaf_takes_the_gradient_without_a_copy():
    x, target = logits_and_ids(64, 4000)
    cloned = []

    class Clones(Largest):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and func.overloadpacket.__name__ == "clone":
                cloned.append(args[0].numel())
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Clones():
        lossfuse.cross_entropy(x, target).backward()
    assert x.grad is not None and x.grad.is_contiguous()
    assert x.numel() not in cloned


PEAKS = {
    "plain": ({}, 1.05),
    "softcap": ({"softcap": 30.0}, 1.15),
    "smoothing and z-loss": ({"label_smoothing": 0.1, "lse_square_scale": 1e-4}, 1.15),
    "none": ({"reduction": "none"}, 1.05),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow if name == "softcap" else ()) for name in PEAKS]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=str
)
def test_loss_and_gradient_take_little_more_than_the_gradient(dtype, name):
    """In units of the logits; torch takes 3."""
    options, share = PEAKS[name]
    x, target = logits_and_ids(1024, 32000, dtype)
    torch.use_deterministic_algorithms(False)  # fills new memory, with a copy of it

    def call():
        return torch.autograd.grad(lossfuse.cross_entropy(x, target, **options).sum(), x)

    peak, size = least_peak(call, x.device), x.nbytes
    if peak is None:
        pytest.skip("needs /proc")
    assert 0.9 * size < peak < share * size + (4 << 20)
