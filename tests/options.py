"""Every option of the losses, and every pair of them."""

import itertools

import pytest
import torch

from lossfuse import LinearOptions
from lossfuse.ops import head_chunks
from rows import class_weight

OPTIONS: dict[str, dict] = {
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.7},
    "negative scale": {"logit_scale": -1.3},
    "z-loss": {"lse_square_scale": 0.01},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 7.5},
}
EXCLUSIVE = [
    {"smoothing", "all smoothing"},
    {"scale", "negative scale"},
    {"sum", "none"},
    {"sum", "normalizer"},
    {"none", "normalizer"},
]
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if set(pair) not in EXCLUSIVE]
# it multiplies the losses of rows that other options give
ROW_WEIGHTED = [
    ("row weight",),
    *(("row weight", name) for name in ("weight", "sum", "none", "normalizer")),
    ("row weight", "weight", "smoothing", "softcap", "scale", "z-loss"),
]
EVERYTHING = ("weight", "smoothing", "softcap", "scale", "z-loss")
COMBINATIONS = [
    (),
    *((name,) for name in OPTIONS),
    *PAIRS,
    EVERYTHING,
    (*EVERYTHING, "none"),
    (*EVERYTHING, "normalizer"),
    *ROW_WEIGHTED,
]
# where each case is many calls, pairs are for slow runs
THRIFTY_COMBINATIONS = [
    pytest.param(names, marks=pytest.mark.slow) if names in PAIRS else names
    for names in COMBINATIONS
]

# aot_eager is all that eager is, and more
COMPILERS = [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"]


def row_weights(n, device):
    """Of either sign, every fourth 0, in fp32."""
    signs = torch.tensor([1.0, -1.0, 1.0, 0.0], device=device).repeat(n // 4 + 1)
    return signs[:n] * torch.linspace(0.5, 2.0, n, device=device)


def options_of(names, v, device, n=5):
    """Class weights, or None, and the other options of ``n`` rows of ``v`` classes."""
    options = {}
    for name in names:
        options |= {"row_weight": row_weights(n, device)} if name == "row weight" else OPTIONS[name]
    weight = class_weight(v, device) if options.pop("weight", False) else None
    return weight, options


def upstream(x, options):
    """An upstream gradient: one number, or one for each row of ``x``."""
    if options.get("reduction") != "none":
        return torch.tensor(1.7, device=x.device)
    return torch.linspace(-1.0, 2.0, len(x), device=x.device)


DIFFERENTIABLE = ("loss", "lse", "target_logprob", "entropy", "z_loss")


def upstreams(stats, names=DIFFERENTIABLE):
    """Upstream gradients for some statistics, a number for each of their entries, in float64."""
    made = {}
    for i, name in enumerate(DIFFERENTIABLE):
        t = getattr(stats, name)
        if name in names:
            made[name] = (
                torch.linspace(-1.0 - i, 2.5, t.numel(), dtype=torch.float64)
                .roll(i)
                .reshape(t.shape)
                .to(t.device)
            )
    return made


def differentiated(stats, leaves, ups, **options):
    """The gradients of a mixture of statistics; 0 for leaves that are in none of them."""
    # a z-loss of scale 0 has no graph
    known = {name: u for name, u in ups.items() if getattr(stats, name).requires_grad}
    if not known:
        return [torch.zeros_like(t) for t in leaves]
    outputs = [getattr(stats, name) for name in known]
    given = [u.to(t.dtype) for u, t in zip(known.values(), outputs, strict=True)]
    return torch.autograd.grad(
        outputs, leaves, given, allow_unused=True, materialize_grads=True, **options
    )


def chunks_of(rows, v, itemsize=4, **options):
    """Options of a head for chunks of so many rows."""
    return LinearOptions(chunk_bytes=rows * head_chunks.padded(v) * itemsize, **options)
