"""How near is near enough. Elementwise and relative: at a vocabulary of 128k most of a gradient is
below any habitual tolerance.

No bound is the error that one processor made. They are roundings counted: fp32 rounds by at most
``ROUNDING`` of a result, so a sum that passes through n additions is off by at most n of these of
the sum of its terms' sizes, in any order of additions."""

import torch
from torch import Tensor

# one unit in the last place of what is stored; fp32 leaves room for hardware exponentials at logits
# of size 30
GRADIENT_RTOL = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}


ROUNDING = 2.0**-24


def assert_loss_close(got: Tensor, want: Tensor, *, additions: float = 0.0) -> None:
    """The loss is fp32 for any input.

    ``additions`` is how many a term of the sum of exponentials passes through where they follow
    each other. The logarithm of a sum that is off by a fraction is off by this fraction."""
    rtol, atol = (
        (1e-12, 1e-13) if got.dtype == torch.float64 else (1e-5, 1e-6 + additions * ROUNDING)
    )
    torch.testing.assert_close(
        got.double(), want.double().to(got.device), rtol=rtol, atol=atol, equal_nan=True
    )


def assert_statistics_close(got, want, *, additions: float = 0.0) -> None:
    """Every statistic that was asked for, its dtype and its shape; classes and numbers of rows
    exactly."""
    for name, g, w in zip(got._fields, got, want, strict=True):
        if g is None:
            assert name in ("entropy", "argmax")
            continue
        assert g.shape == w.shape, name
        if name in ("argmax", "n_valid"):
            assert g.dtype == torch.int64 and torch.equal(g.cpu(), w.cpu()), name
        else:
            assert g.dtype == (
                torch.float64 if got.lse.dtype == torch.float64 else torch.float32
            ), name
            assert_loss_close(g.detach(), w.detach(), additions=additions)


def assert_formula_close(got: Tensor, want: Tensor) -> None:
    """Tier 1, small sizes in fp32: is it the right formula?

    An entry that cancels keeps the error of its terms, which are about as large as the largest
    entry: some 16 roundings of that, of sums over up to a dozen rows or classes and of the terms
    themselves."""
    want = want.double().to(got.device)
    finite = want.detach()[want.isfinite()].abs()
    largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
    torch.testing.assert_close(
        got.double(), want, rtol=1e-5, atol=16 * ROUNDING * largest, equal_nan=True
    )


def assert_gradient_close(got: Tensor, want: Tensor, *, terms: Tensor | float = 0.0) -> None:
    """Tier 2, real sizes and dtypes: is each entry right relative to itself?

    ``terms`` is the size of the numbers whose difference an entry is, where there is such a
    difference (smoothing, soft targets): fp32 holds it relative to them. The absolute allowance
    beyond is underflow, of fp32 arithmetic and of the dtype, coarse for fp16 alone."""
    info = torch.finfo(got.dtype)
    underflow = 2 * info.smallest_normal * info.eps + (
        0.0 if got.dtype == torch.float64 else torch.finfo(torch.float32).smallest_normal
    )
    want = want.double().to(got.device)
    terms = terms.to(got.device) if isinstance(terms, Tensor) else terms
    allowed = GRADIENT_RTOL[got.dtype] * want.abs() + 5e-6 * terms + underflow
    wrong = (
        ~((got.double() - want).abs() <= allowed) & ~(got.isnan() & want.isnan()) & ~(got == want)
    )
    _raise_at_the_first(wrong, got, want, allowed)


def gradient_terms(
    x: Tensor, target: Tensor, w: Tensor | None, options: dict, upstream: list[Tensor]
) -> Tensor:
    """(N, V) size of the numbers a class's gradient is a difference of: probabilities and masses,
    times what comes from above."""
    v = x.shape[1]
    z = _seen_by_the_loss(x, options)
    p = torch.softmax(z, 1)
    t = (
        target.double()
        if target.is_floating_point()
        else torch.arange(v, device=x.device) == target[:, None]
    )
    row = sum(value.abs().double() for value in upstream)
    row = row * (1.0 + 2 * options.get("lse_square_scale", 0.0) * torch.logsumexp(z, 1).abs())
    mass = p + t + options.get("label_smoothing", 0.0) / v
    return row[:, None] * (mass if w is None else mass * (1.0 + w.double())) * distances(x, options)


def distances(x: Tensor, options: dict) -> Tensor:
    """(N, V) how much further off a probability is than its exponential: 1 + the distance to the
    largest logit, whose rounding it has."""
    z = _seen_by_the_loss(x, options)
    return 1.0 + torch.where(torch.softmax(z, 1) == 0.0, 0.0, z.amax(1, keepdim=True) - z)


def _seen_by_the_loss(x: Tensor, options: dict) -> Tensor:
    z = x.detach().double() * options.get("logit_scale", 1.0)
    return options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z


def assert_product_close(got: Tensor, want: Tensor) -> None:
    """A gradient that is a sum over rows or classes: each entry relative to itself, and to the
    largest beside it for what cancels."""
    want = want.double().to(got.device)
    beside = want.abs().amax(-1, keepdim=True) if want.numel() else want
    info = torch.finfo(got.dtype)
    cancelled = (1e-13 if got.dtype == torch.float64 else 2e-6) * beside
    allowed = GRADIENT_RTOL[got.dtype] * want.abs() + cancelled + info.smallest_normal * info.eps
    wrong = ~((got.double() - want).abs() <= allowed) & ~(got.isnan() & want.isnan())
    _raise_at_the_first(wrong, got, want, allowed)


def _raise_at_the_first(wrong: Tensor, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    if not wrong.any():
        return
    at = tuple(int(i) for i in wrong.nonzero()[0])
    numbers = f"got {got[at].item():.6e}, want {want[at].item():.6e}"
    where = f"{int(wrong.sum())} of {wrong.numel()} entries differ; the first at {at}"
    raise AssertionError(f"{where}: {numbers}, allowed {allowed[at].item():.1e}")


def relative_error(got: Tensor, want: Tensor) -> float:
    """In the root mean square of all entries."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm())
