"""Modules, options and consumed logits, copied and pickled."""

import copy
import io
import pickle

import pytest
import torch

import lossfuse
from lossfuse.spec import LossSpec
from rows import class_weight, logits_and_ids


def through_a_file(t):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "torch.save": through_a_file,
}
HOW = pytest.mark.parametrize("how", COPIES)
V = 40
OPTIONS = [
    LossSpec(softcap=3.0, ignore_index=7),
    lossfuse.LinearOptions(chunk_bytes=77, drop_ignored=True),
]
# with parameters of its own, the linear form's is in test_linear_autograd
MODULES = {
    "CrossEntropyLoss": lambda: lossfuse.CrossEntropyLoss(
        class_weight(V), reduction="sum", label_smoothing=0.1, softcap=5.0
    ),
    "NLLLoss": lambda: lossfuse.NLLLoss(class_weight(V), reduction="sum"),
    "LogSoftmax": lambda: lossfuse.LogSoftmax(1),
    "BCEWithLogitsLoss": lambda: lossfuse.BCEWithLogitsLoss(
        pos_weight=class_weight(V), reduction="sum"
    ),
    "BCELoss": lambda: lossfuse.BCELoss(reduction="sum"),
}


def call(name, module):
    x, ids = logits_and_ids(6, V)
    if name in ("BCEWithLogitsLoss", "BCELoss"):
        return module(
            x if "Logits" in name else x.sigmoid(),
            torch.rand(6, V, generator=torch.Generator().manual_seed(0)),
        )
    return module(x) if name == "LogSoftmax" else module(x, ids)


@HOW
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_a_module_computes_the_same(name, how):
    module = MODULES[name]()
    want = call(name, module)
    other = COPIES[how](module)
    assert other is not module and repr(other) == repr(module)
    assert torch.equal(call(name, other), want)


@HOW
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: type(o).__name__)
def test_a_copy_of_options_is_equal(options, how):
    assert COPIES[how](options) == options and hash(COPIES[how](options)) == hash(options)


@HOW
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_consumed_logits_have_no_copies(reduction, how):
    """Of a gradient that somebody would take for logits."""
    x, ids = logits_and_ids(6, V)
    logits = x * 1.0
    lossfuse.cross_entropy(logits, ids, reduction=reduction, inplace=True).sum().backward()
    with pytest.raises(RuntimeError, match="were consumed"):
        COPIES[how](logits)
