"""Functions that can be given the same logits, each in its own way and place, so that one test
holds a law for all of them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lossfuse
import program
from conftest import Place
from lossfuse import LinearOptions, VocabShard
from lossfuse.ops import head_chunks

# a weight of so many classes may be the identity
MOST_CLASSES = 64


def two_rows(v, **options):
    """Chunks of two rows."""
    return LinearOptions(chunk_bytes=2 * head_chunks.padded(max(v, 1)) * 4, **options)


def operands(x):
    """Hidden states and a weight whose product is ``x``, to the bit where that is finite: one is
    the identity, the other is ``x``."""
    n, v = x.shape
    if v <= MOST_CLASSES:
        return x, torch.eye(v, dtype=x.dtype, device=x.device)
    return torch.eye(n, dtype=x.dtype, device=x.device), x.t()


def of_logits(function, copied=False, **fixed):
    def call(x, target, weight, bias, classes, **options):
        x = x if bias is None else x + bias
        x = x[:, classes] if "shard" in options else x
        return function(x * 1.0 if copied else x, target, weight, **fixed, **options)

    return call


def of_head(function, **chunks):
    def call(x, target, weight, bias, classes, **options):
        hidden, linear_weight = operands(x)
        options = {"options": two_rows(x.shape[1], **chunks), **options}
        bias = None if bias is None else bias[classes]
        head = linear_weight[classes], target
        return function(hidden, *head, linear_bias=bias, weight=weight, **options)

    return call


def fused_head(x, target, weight, bias, classes, **options):
    hidden, linear_weight = operands(x)
    assert hidden is x, "the weight of a module is a leaf"
    kind = {"bias": bias is not None, "dtype": x.dtype, "device": x.device}
    model = nn.Sequential()
    model.lm_head = nn.Linear(*reversed(linear_weight.shape), **kind)
    with torch.no_grad():
        model.lm_head.weight.copy_(linear_weight)
        if bias is not None:
            model.lm_head.bias.copy_(bias)
    report = lossfuse.fuse_lm_head(model, options=options.pop("options", two_rows(x.shape[1])))
    loss = lossfuse.cross_entropy(model.lm_head(hidden), target, weight, **options)
    assert not report.made
    return loss


def of_labels(copied=False, **fixed):
    """One label a row, or none, given by its id."""
    loss = of_logits(lossfuse.binary_cross_entropy_with_logits, copied, **fixed)
    return lambda x, target, *rest, **options: loss(x, target[:, None], *rest, **options)


FUNCTIONS = {
    "logits": of_logits(lossfuse.cross_entropy),
    "in place": of_logits(lossfuse.cross_entropy, copied=True, inplace=True),
    "statistics": of_logits(lambda *a, **k: lossfuse.cross_entropy_stats(*a, **k).loss),
    "head": of_head(lossfuse.linear_cross_entropy),
    "head, every row": of_head(lossfuse.linear_cross_entropy, drop_ignored=False),
    "head statistics": of_head(lambda *a, **k: lossfuse.linear_cross_entropy_stats(*a, **k).loss),
    "fused head": fused_head,
    "labels": of_labels(),
    "labels in place": of_labels(copied=True, inplace=True),
}


class Results(NamedTuple):
    rows: Tensor
    grads: Tensor  # of the losses of rows, summed
    total: Tensor
    total_grads: Tensor  # of the sum as one number, whose gradient may be computed elsewhere

    @property
    def both_grads(self):
        return self.grads, self.total_grads


@dataclass(frozen=True)
class Subject:
    """A function and where it runs; with a ``cut`` on two ranks, of which the first has that share
    of the classes."""

    name: str
    place: Place
    cut: float | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.place}"

    @property
    def is_head(self) -> bool:
        return "head" in self.name

    @property
    def is_labels(self) -> bool:
        return self.name.startswith("labels")

    @property
    def consumes(self) -> bool:
        """Return True if the loss writes over its logits."""
        return self.name.endswith("in place") and self.place.impl != "reference"

    @property
    def interpreted(self) -> bool:
        """Return True under Triton's interpreter, which is a hundred times slower."""
        return (self.place.impl, self.place.device) == ("triton", "cpu")

    @property
    def reference(self) -> "Subject":
        return Subject(self.name, Place("reference", self.place.device))

    def some(self, *cases: Any) -> tuple[Any, ...]:
        """The cases of a test; in the interpreter the first."""
        return cases[:1] if self.interpreted else cases

    def loss(self, x, target, weight=None, *, bias=None, **options) -> Tensor:
        """The loss of the logits ``x + bias``, with ``bias`` (V): so a head, too, has logits of
        -inf."""
        options = {"impl": self.place.impl} | options
        classes = slice(None)
        if self.cut is not None:
            v = x.shape[1]
            edge = round(self.cut * v)
            classes = slice(edge, v) if dist.get_rank() else slice(0, edge)
            # the gradient of x on a rank is that rank's part
            options["shard"] = VocabShard(classes.start, v, hidden_grad="partial")
            target = target[:, classes] if target.is_floating_point() else target
        return FUNCTIONS[self.name](x, target, weight, bias, classes, **options)

    def grad(self, loss: Tensor, x: Tensor, dloss: Tensor | None = None, **how: Any) -> Tensor:
        (grad,) = torch.autograd.grad(loss, x, dloss, **how)
        if self.cut is not None:
            dist.all_reduce(grad)
        return grad

    def results(self, x, target, weight=None, **options) -> Results:
        """On the CPU, with a leaf of its own."""
        x, made = x.detach().requires_grad_(), []
        for reduction in ("none", "sum"):
            loss = self.loss(x, target, weight, reduction=reduction, **options)
            made += [loss.detach().cpu(), self.grad(loss.sum(), x).cpu()]
        return Results(*made)

    def wanted(self, x, target, weight=None, dloss=None, **options) -> list[Tensor]:
        """[loss, d x] of the torch program in float64."""
        if not self.is_labels:
            return program.value_and_grads(x, target, weight, dloss, **options)
        wide, v = x.detach().double().requires_grad_(), x.shape[1]
        ones = torch.zeros(len(x), v + 1, dtype=wide.dtype, device=x.device)
        ones = ones.scatter(1, target.where(target >= 0, v)[:, None], 1.0)[:, :v]
        loss = F.binary_cross_entropy_with_logits(wide, ones, weight, **options)
        dloss = torch.ones_like(loss) if dloss is None else dloss.double()
        return [loss.detach(), *torch.autograd.grad(loss, wide, dloss)]
