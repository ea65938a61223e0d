"""Functions of ours that can be given the same logits, each in its own way and place: one promise
is one test for all of them."""

from collections.abc import Callable
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


def two_rows(v: int, **options: Any) -> LinearOptions:
    """Chunks of two rows."""
    return LinearOptions(chunk_bytes=2 * head_chunks.padded(max(v, 1)) * 4, **options)


def operands(x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose product is ``x``, to the bit where that is finite: one is
    the identity, the other is ``x``."""
    n, v = x.shape
    if v <= MOST_CLASSES:
        return x, torch.eye(v, dtype=x.dtype, device=x.device)
    return torch.eye(n, dtype=x.dtype, device=x.device), x.t()


def of_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    classes: slice,
    **options: Any,
) -> Tensor:
    x = x if bias is None else x + bias
    return lossfuse.cross_entropy(
        x[:, classes] if "shard" in options else x, target, weight, **options
    )


def in_place(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    classes: slice,
    **options: Any,
) -> Tensor:
    x = x * 1.0 if bias is None else x + bias
    x = x[:, classes].clone() if "shard" in options else x
    return lossfuse.cross_entropy(x, target, weight, inplace=True, **options)


def statistics(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    classes: slice,
    **options: Any,
) -> Tensor:
    x = x if bias is None else x + bias
    return lossfuse.cross_entropy_stats(
        x[:, classes] if "shard" in options else x, target, weight, **options
    ).loss


def head_arguments(
    x: Tensor, target: Tensor, bias: Tensor | None, classes: slice
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    hidden, linear_weight = operands(x)
    return (hidden, linear_weight[classes], target), {
        "linear_bias": None if bias is None else bias[classes]
    }


def head(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    classes: slice,
    **options: Any,
) -> Tensor:
    given, named = head_arguments(x, target, bias, classes)
    return lossfuse.linear_cross_entropy(
        *given, weight=weight, **{"options": two_rows(x.shape[1])} | named | options
    )


def head_statistics(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    classes: slice,
    **options: Any,
) -> Tensor:
    given, named = head_arguments(x, target, bias, classes)
    return lossfuse.linear_cross_entropy_stats(
        *given, weight=weight, **{"options": two_rows(x.shape[1])} | named | options
    ).loss


def fused_head(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    classes: slice,
    **options: Any,
) -> Tensor:
    hidden, linear_weight = operands(x)
    assert hidden is x, "the weight of a module is a leaf"
    model = nn.Sequential()
    model.lm_head = nn.Linear(
        *reversed(linear_weight.shape), bias=bias is not None, dtype=x.dtype, device=x.device
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(linear_weight)
        if bias is not None:
            model.lm_head.bias.copy_(bias)
    report = lossfuse.fuse_lm_head(model, options=options.pop("options", two_rows(x.shape[1])))
    loss = lossfuse.cross_entropy(model.lm_head(hidden), target, weight, **options)
    assert not report.made
    return loss


def labels(
    x: Tensor, target: Tensor, weight: Tensor | None, bias: None, classes: slice, **options: Any
) -> Tensor:
    """A list of one label a row, or of none."""
    return lossfuse.binary_cross_entropy_with_logits(x, target[:, None], weight, **options)


def labels_in_place(
    x: Tensor, target: Tensor, weight: Tensor | None, bias: None, classes: slice, **options: Any
) -> Tensor:
    return lossfuse.binary_cross_entropy_with_logits(
        x * 1.0, target[:, None], weight, inplace=True, **options
    )


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "logits": of_logits,
    "in place": in_place,
    "statistics": statistics,
    "head": head,
    "head statistics": head_statistics,
    "fused head": fused_head,
    "labels": labels,
    "labels in place": labels_in_place,
}


class Results(NamedTuple):
    rows: Tensor
    slopes: Tensor  # of the sum of rows
    total: Tensor
    total_slopes: Tensor  # of the sum as one number, whose gradient may be formed in another place


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
        """Whether logits are written over."""
        return self.name.endswith("in place") and self.place.impl != "reference"

    @property
    def interpreted(self) -> bool:
        """By Triton's interpreter, which takes seconds where the others take milliseconds."""
        return (self.place.impl, self.place.device) == ("triton", "cpu")

    def some(self, *cases: Any) -> tuple[Any, ...]:
        """The cases of a test; in the interpreter the first."""
        return cases[:1] if self.interpreted else cases

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Of the logits ``x + bias``, ``bias`` (V): how a head, too, has logits of -inf."""
        options = {"impl": self.place.impl} | options
        classes = slice(None)
        if self.cut is not None:
            v = x.shape[1]
            edge = round(self.cut * v)
            classes = slice(edge, v) if dist.get_rank() else slice(0, edge)
            # what x gets on a rank is its part
            options["shard"] = VocabShard(classes.start, v, hidden_grad="partial")
            target = target[:, classes] if target.is_floating_point() else target
        return FUNCTIONS[self.name](x, target, weight, bias, classes, **options)

    def grad(self, loss: Tensor, x: Tensor, dloss: Tensor | None = None, **how: Any) -> Tensor:
        (slope,) = torch.autograd.grad(loss, x, dloss, **how)
        if self.cut is not None:
            dist.all_reduce(slope)
        return slope

    def results(
        self, x: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
    ) -> Results:
        """On the CPU, of a leaf of its own."""
        x, made = x.detach().requires_grad_(), []
        for reduction in ("none", "sum"):
            loss = self.loss(x, target, weight, reduction=reduction, **options)
            made += [loss.detach().cpu(), self.grad(loss.sum(), x).cpu()]
        return Results(*made)

    def wanted(
        self,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        dloss: Tensor | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """[loss, d x] of the torch program in float64."""
        if not self.is_labels:
            return program.value_and_grads(x, target, weight, dloss, **options)
        wide = x.detach().double().requires_grad_()
        v = x.shape[1]
        given = torch.zeros(len(x), v + 1, dtype=wide.dtype, device=x.device).scatter(
            1, target.where(target >= 0, v)[:, None], 1.0
        )[:, :v]
        loss = F.binary_cross_entropy_with_logits(wide, given, weight, **options)
        return [
            loss.detach(),
            *torch.autograd.grad(
                loss, wide, torch.ones_like(loss) if dloss is None else dloss.double()
            ),
        ]
