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
HOW = pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
V = 40
X, IDS = logits_and_ids(6, V)
WEIGHT, LABELS = class_weight(V), torch.rand(6, V, generator=torch.Generator().manual_seed(0))
OPTIONS = [
    LossSpec(softcap=3.0, ignore_index=7),
    lossfuse.LinearOptions(chunk_bytes=77, drop_ignored=True),
]
# a module and its arguments; the head's, with parameters of its own, is in test_autograd
MODULES = {
    "CrossEntropyLoss": (lossfuse.CrossEntropyLoss(WEIGHT, reduction="sum", softcap=5.0), X, IDS),
    "NLLLoss": (lossfuse.NLLLoss(WEIGHT, reduction="sum"), X, IDS),
    "LogSoftmax": (lossfuse.LogSoftmax(1), X),
    "BCEWithLogitsLoss": (lossfuse.BCEWithLogitsLoss(pos_weight=WEIGHT), X, LABELS),
    "BCELoss": (lossfuse.BCELoss(reduction="sum"), X.sigmoid(), LABELS),
}


@HOW
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_a_module_computes_the_same(name, how):
    module, *args = MODULES[name]
    other = how(module)
    assert other is not module and repr(other) == repr(module)
    assert torch.equal(other(*args), module(*args))


@HOW
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: type(o).__name__)
def test_a_copy_of_options_is_equal(options, how):
    assert how(options) == options and hash(how(options)) == hash(options)


@HOW
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_consumed_logits_have_no_copies(reduction, how):
    """A copy would pass a gradient for logits."""
    logits = X * 1.0
    lossfuse.cross_entropy(logits, IDS, reduction=reduction, inplace=True).sum().backward()
    with pytest.raises(RuntimeError, match="were consumed"):
        how(logits)
