"""The loss of a head without a gradient, from the product whose logits stay in registers: through
the public function."""

import pytest
import torch

import lossfuse
from closeness import assert_formula_close
from test_linear import relative_error

pytest.importorskip("triton")
from lossfuse.kernels import linear_rows

OPTIONS = {
    "plain": {},
    "cap and scale": {"softcap": 9.0, "logit_scale": -0.7},
    "z-loss": {"lse_square_scale": 1e-2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored rows dropped": {"options": lossfuse.LinearOptions(drop_ignored=True)},
    "ignored rows kept": {"options": lossfuse.LinearOptions(drop_ignored=False)},
}


@pytest.fixture
def used(monkeypatch):
    """How many rows the product got."""
    rows = []
    row_loss = linear_rows.row_loss

    def watched(hidden, *rest, **options):
        rows.append(len(hidden))
        return row_loss(hidden, *rest, **options)

    monkeypatch.setattr(linear_rows, "row_loss", watched)
    return rows


def inputs(device, n=70, d=24, v=300):
    g = torch.Generator().manual_seed(0)
    # the product takes no fp32 on a GPU
    dtype = torch.float32 if device == "cpu" else torch.float16
    hidden, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((n, d), (v, d), (v,))
    )
    target = torch.randint(0, v, (n,), generator=g)
    target[::7] = -100
    obstacle = None if device == "cpu" else linear_rows._device_obstacle(torch.device(device))
    if obstacle is not None:
        pytest.skip(obstacle)
    return hidden, weight, bias, target.to(device)


@pytest.mark.parametrize("name", OPTIONS)
def test_as_the_reference(used, device, name):
    hidden, weight, bias, target = inputs(device)
    class_weight = torch.rand(300, generator=torch.Generator().manual_seed(1)).to(device)
    given = {"linear_bias": bias, "weight": class_weight, **OPTIONS[name]}
    got = lossfuse.linear_cross_entropy(hidden, weight, target, impl="triton", **given)
    given |= {"linear_bias": bias.double(), "impl": "reference"}
    want = lossfuse.linear_cross_entropy(hidden.double(), weight.double(), target, **given)
    assert_formula_close(got, want)
    # looking for ignored rows costs nothing on a CPU
    dropped = name == "ignored rows dropped" or (device == "cpu" and name != "ignored rows kept")
    assert used == [60 if dropped else 70]


BEYOND = {
    "label_smoothing": lambda hidden: 0.1,
    "linear_weight": lambda hidden: torch.randn(24, 300).to(hidden).T,
    "target": lambda hidden: torch.rand(70, 300).to(hidden),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_it_cannot_do_goes_by_chunks(used, device, name):
    hidden, weight, _, target = inputs(device)
    given = {"linear_weight": weight, "target": target, name: BEYOND[name](hidden)}
    got = lossfuse.linear_cross_entropy(hidden, impl="triton", **given)
    want = lossfuse.linear_cross_entropy(hidden, impl="reference", **given)
    assert_formula_close(got, want)
    assert used == []


def test_per_token_losses_have_a_backward(used, device):
    """Their forward needs no gradient either; the backward makes the logits again."""
    hidden, weight, _, target = inputs(device)
    operands = [hidden.requires_grad_(), weight.requires_grad_()]
    grads = []
    for impl in ("triton", "reference"):
        loss = lossfuse.linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl)
        grads.append(
            torch.autograd.grad((loss * torch.linspace(-1, 1, 70, device=device)).sum(), operands)
        )
    assert used == [60 if device == "cpu" else 70]
    for got, want in zip(*grads, strict=True):
        if got.dtype == torch.float32:
            assert_formula_close(got, want)
        else:
            # the gradient of the logits is rounded before the products
            assert relative_error(got, want) < 2 * torch.finfo(got.dtype).eps
