"""Every option of the losses, and every pair of them."""

import itertools

import torch

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
EXCLUSIVE = [{"smoothing", "all smoothing"}, {"scale", "negative scale"}, {"sum", "none"}, {"sum", "normalizer"}, {"none", "normalizer"}]
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if set(pair) not in EXCLUSIVE]
EVERYTHING = ("weight", "smoothing", "softcap", "scale", "z-loss")
COMBINATIONS = [(), *((name,) for name in OPTIONS), *PAIRS, EVERYTHING, (*EVERYTHING, "none"), (*EVERYTHING, "normalizer")]


def options_of(names, v, device):
    options = {}
    for name in names:
        options |= OPTIONS[name]
    weight = class_weight(v, device) if options.pop("weight", False) else None
    return weight, options


def upstream(x, options):
    """What comes from above: one number, or one for each row of ``x``."""
    if options.get("reduction") != "none":
        return torch.tensor(1.7, device=x.device)
    return torch.linspace(-1.0, 2.0, len(x), device=x.device)
