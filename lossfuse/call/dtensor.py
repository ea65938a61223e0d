"""Losses over the ranks of torch.distributed, as callers see them: DTensors, what all ranks share, and whole tensors for the reference."""

import sys
from typing import Any

import torch
from torch import Tensor

from ..inputs import Targets, torch_func_active
from ..ops import library
from ..spec import LossSpec, VocabShard
from ..vocab_parallel.backend import gather, look_together, process_group


def shard_options(shard: VocabShard | None) -> tuple[int, int, str] | tuple[()]:
    """As ``LossSpec`` takes them, after the others."""
    # what is no shard is refused with the tensors
    return shard.options if shard is not None and isinstance(shard, VocabShard) else ()


# --- what every rank holds alike


def shared(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Hidden states that all ranks hold alike, whose gradient is then the sum of what each rank makes of them."""
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
        return library.all_sum(grad, ctx.group), None


# --- DTensors


def _is_dtensor(t: object) -> bool:
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
    if not _is_dtensor(input):
        _refuse_dtensors("input is a plain tensor", target=target, weight=weight)
        return input, target, weight, shard
    class_dim = 0 if input.dim() == 1 else 1
    shard, cut = _shard_of("input", input, class_dim, shard)
    local: Any = input
    target = _local("target", target, local, class_dim if target.dim() == input.dim() else None, cut)
    return local.to_local(), target, _local("weight", weight, local, 0, cut), shard


def local_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, VocabShard | None]:
    """DTensors -> the tensors of this rank and which classes of the head they are; others as they are."""
    if not _is_dtensor(linear_weight):
        _refuse_dtensors("linear_weight is a plain tensor", input=input, linear_bias=linear_bias, target=target, weight=weight)
        return input, linear_weight, linear_bias, target, weight, shard
    if not _is_dtensor(input):
        # a weight that data parallelism has cut looks the same, and its ranks have other rows
        raise ValueError(
            "linear_weight is a DTensor but input is a plain tensor. If every rank has the same rows, pass linear_weight.to_local() with"
            " shard=lossfuse.VocabShard.even(num_classes, group), or input as a DTensor; if not (FSDP), unshard the weight first"
        )
    shard, cut = _shard_of("linear_weight", linear_weight, 0, shard)
    head: Any = linear_weight
    given: Any = input
    placement = _placements()
    if given.device_mesh != head.device_mesh or any(p != placement.Replicate() for p in given.placements):
        raise ValueError(
            f"input is a DTensor placed {tuple(given.placements)} but linear_weight is sharded over classes; expected Replicate on its mesh"
        )
    # each rank's classes give a part of the gradient, which autograd sums up where it is needed
    parts = [placement.Partial() if i == cut else placement.Replicate() for i in range(given.device_mesh.ndim)]
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
        if _is_dtensor(t):
            raise ValueError(f"{name} is a DTensor but {why}; expected both to be DTensors, or neither (.to_local())")


def _shard_of(name: str, t: Any, class_dim: int, shard: VocabShard | None) -> tuple[VocabShard | None, int | None]:
    """The classes of this rank, and the dimension of the mesh that cuts them; None for both where every rank has all."""
    if shard is not None:
        raise ValueError(f"shard is given but {name} is a DTensor, which knows its shard; pass {name}.to_local(), or no shard")
    placement, cuts = _placements(), []
    for i, p in enumerate(t.placements):
        # by type: shards of shards, as data and tensor parallelism together make them, are a kind of Shard
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
    """A target, weight or bias beside a DTensor: plain (of this rank), on the same mesh and whole, or cut as its classes are."""
    if not _is_dtensor(t):
        return t
    placement = _placements()
    fine = t.device_mesh == like.device_mesh and all(
        p.is_replicate() or (i == cut and class_dim is not None and type(p) is placement.Shard and p.dim % t.dim() == class_dim)
        for i, p in enumerate(t.placements)
    )
    if not fine:
        raise ValueError(f"{name} is a DTensor placed {tuple(t.placements)}; expected Replicate on the mesh of the logits, or their shard")
    return t.to_local()


# --- whole tensors, for the reference


def whole_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, shard: VocabShard, rows: Targets, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors of all ranks, made on every rank."""
    _refuse_transforms()
    look_together(rows.target, rows.classes_at_hand, spec)
    class_dim = 0 if input.dim() == 1 else 1
    soft = target.is_floating_point()
    return (
        _Whole.apply(input, class_dim, shard),
        _Whole.apply(target, class_dim, shard) if soft else target,
        _whole_weight(weight, shard),
    )


def whole_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard,
    rows: Targets,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """As ``whole_logits``, of a head."""
    _refuse_transforms()
    look_together(rows.target, rows.classes_at_hand, spec)
    return (
        input if shard.hidden_grad == "reduced" else _Addend.apply(input, shard),
        _Whole.apply(linear_weight, 0, shard),
        None if linear_bias is None else _Whole.apply(linear_bias, 0, shard),
        _Whole.apply(target, target.dim() - 1, shard) if target.is_floating_point() else target,
        _whole_weight(weight, shard),
    )


def _refuse_transforms() -> None:
    if torch_func_active() or torch.autograd.forward_ad._current_level >= 0:
        raise ValueError("shard is given but torch.func transforms and forward-mode derivatives know no ranks; pass whole logits")


def _whole_weight(weight: Tensor | None, shard: VocabShard) -> Tensor | None:
    made: Tensor | None = weight if weight is None or len(weight) == shard.num_classes else _Whole.apply(weight, 0, shard)
    return made


class _Addend(torch.autograd.Function):
    """Hidden states whose gradient, whole on every rank, is to be summed over the ranks all the same."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, shard: VocabShard) -> Tensor:
        ctx.ranks = process_group(shard.group_name).size()
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


class _Whole(torch.autograd.Function):
    """Shards -> the whole, on every rank. Each rank makes the same of it, so that its gradient is the shard of the whole's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, shard: VocabShard) -> Tensor:
        ctx.dim, ctx.shard, ctx.size = dim, shard, t.shape[dim]
        # waits for the device: shapes are the host's, and who asks for the reference asks for its pace
        places = gather(torch.tensor([shard.start, t.shape[dim]], device=t.device), shard.group_name).tolist()
        length = max(size for _, size in places)
        rest = t.shape[:dim] + t.shape[dim + 1 :]
        lines = t.movedim(dim, 0).reshape(t.shape[dim], rest.numel())
        padded = lines.new_zeros(length, rest.numel())
        padded[: len(lines)] = lines
        ordered = sorted(zip(places, gather(padded, shard.group_name), strict=True), key=lambda at: at[0])
        ends = [0, *(start + size for (start, size), _ in ordered)]
        if [start for (start, _), _ in ordered] != ends[:-1] or ends[-1] != shard.num_classes:
            raise ValueError(f"shard: the ranks hold (start, classes) {places}; expected each of [0, {shard.num_classes}) once")
        whole = torch.cat([part[:size] for (_, size), part in ordered])
        return whole.reshape(shard.num_classes, *rest).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        part: Tensor = _Part.apply(grad, ctx.dim, ctx.shard, ctx.size)
        return part, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, shard: VocabShard, size: int) -> Tensor:
        ctx.dim, ctx.shard = dim, shard
        return t.narrow(dim, shard.start, size).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        whole: Tensor = _Whole.apply(grad, ctx.dim, ctx.shard)
        return whole, None, None, None
