"""Losses over the ranks of torch.distributed, as callers see them: DTensors, and what all ranks
share."""

import sys
from typing import Any

import torch
from torch import Tensor

from ..ops.library import all_sum
from ..spec import VocabShard


def shard_options(shard: VocabShard | None) -> tuple[int, int, str] | tuple[()]:
    """As ``LossSpec`` takes them, after the others."""
    # what is no shard is refused with the tensors
    return shard.options if shard is not None and isinstance(shard, VocabShard) else ()


# --- what every rank holds alike


def shared(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Hidden states that all ranks hold alike, whose gradient is then the sum of what each rank
    makes of them."""
    wanted = hidden.requires_grad and torch.is_grad_enabled() and shard.hidden_grad == "reduced"
    made: Tensor = _Shared.apply(hidden, shard.group_name) if wanted else hidden
    return made


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # an addend of half precision is rounded, as gradients between modules are
        return all_sum(grad, ctx.group), None


# --- DTensors


def is_dtensor(t: object) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter) or t is None:
        return False
    # who has one has imported it
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """DTensors -> the tensors of this rank and which classes they are; others as they are."""
    if type(input) is type(target) is Tensor and weight is None:
        return input, target, weight, shard
    if not is_dtensor(input):
        _refuse_dtensors("input is a plain tensor", target=target, weight=weight)
        return input, target, weight, shard
    class_dim = 0 if input.dim() == 1 else 1
    shard, cut = _shard_of("input", input, class_dim, shard)
    local: Any = input
    target = _local(
        "target", target, local, class_dim if target.dim() == input.dim() else None, cut
    )
    return local.to_local(), target, _local("weight", weight, local, 0, cut), shard


def local_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, VocabShard | None]:
    """DTensors -> the tensors of this rank and which classes of the head they are; others as they
    are."""
    if not is_dtensor(linear_weight):
        _refuse_dtensors(
            "linear_weight is a plain tensor",
            input=input,
            linear_bias=linear_bias,
            target=target,
            weight=weight,
        )
        return input, linear_weight, linear_bias, target, weight, shard
    if not is_dtensor(input):
        # a weight that data parallelism has cut looks the same, and its ranks have other rows
        raise ValueError(
            "linear_weight is a DTensor but input is a plain tensor. If every rank has the same rows, pass linear_weight.to_local() with"
            " shard=lossfuse.VocabShard.even(num_classes, group), or input as a DTensor; if not (FSDP), unshard the weight first"
        )
    shard, cut = _shard_of("linear_weight", linear_weight, 0, shard)
    head: Any = linear_weight
    given: Any = input
    placement = _placements()
    if given.device_mesh != head.device_mesh or any(
        p != placement.Replicate() for p in given.placements
    ):
        raise ValueError(
            f"input is a DTensor placed {tuple(given.placements)} but linear_weight is sharded over classes; expected Replicate on its mesh"
        )
    # each rank's classes give a part of the gradient, which autograd sums up where it is needed
    parts = [
        placement.Partial() if i == cut else placement.Replicate()
        for i in range(given.device_mesh.ndim)
    ]
    if shard is not None:
        shard = VocabShard(shard.start, shard.num_classes, shard.group, hidden_grad="partial")
    soft = target.dim() == input.dim() and target.is_floating_point()
    return (
        given.to_local(grad_placements=parts),
        head.to_local(),
        _local("linear_bias", linear_bias, head, 0, cut),
        _local("target", target, head, target.dim() - 1 if soft else None, cut),
        _local("weight", weight, head, 0, cut),
        shard,
    )


def _placements() -> Any:
    return sys.modules["torch.distributed.tensor"]


def _refuse_dtensors(why: str, **others: Tensor | None) -> None:
    for name, t in others.items():
        if is_dtensor(t):
            raise ValueError(
                f"{name} is a DTensor but {why}; expected both to be DTensors, or neither (.to_local())"
            )


def _shard_of(
    name: str, t: Any, class_dim: int, shard: VocabShard | None
) -> tuple[VocabShard | None, int | None]:
    """The classes of this rank, and the dimension of the mesh that cuts them; None for both where
    every rank has all."""
    if shard is not None:
        raise ValueError(
            f"shard is given but {name} is a DTensor, which knows its shard; pass {name}.to_local(), or no shard"
        )
    placement, cuts = _placements(), []
    for i, p in enumerate(t.placements):
        # by type: shards of shards, as data and tensor parallelism together make them, are a kind
        # of Shard
        if type(p) is placement.Shard and p.dim % t.dim() == class_dim:
            cuts.append(i)
        elif not p.is_replicate():
            cuts = [-1, -1]
            break
    if len(cuts) > 1:
        raise ValueError(
            f"{name} is a DTensor placed {tuple(t.placements)}; expected Shard({class_dim}), its classes, on at most one dimension of the"
            " mesh and Replicate on the others. Rows that are sharded go in by .to_local(), with normalizer for a global mean"
        )
    if not cuts:
        return None, None
    return VocabShard.even(t.shape[class_dim], t.device_mesh.get_group(cuts[0])), cuts[0]


def _local(name: str, t: Any, like: Any, class_dim: int | None, cut: int | None) -> Any:
    """A target, weight or bias beside a DTensor: plain (of this rank), on the same mesh and whole,
    or cut as its classes are."""
    if not is_dtensor(t):
        return t
    placement = _placements()
    fine = t.device_mesh == like.device_mesh and all(
        p.is_replicate()
        or (
            i == cut
            and class_dim is not None
            and type(p) is placement.Shard
            and p.dim % t.dim() == class_dim
        )
        for i, p in enumerate(t.placements)
    )
    if not fine:
        raise ValueError(
            f"{name} is a DTensor placed {tuple(t.placements)}; expected Replicate on the mesh of the logits, or their shard"
        )
    return t.to_local()
