"""Whole tensors on every rank, for the reference: it knows no shards."""

from typing import Any

import torch
from torch import Tensor

from ..inputs import Targets, torch_func_active
from ..spec import LossSpec, VocabShard
from ..vocab_parallel.backend import check_ranks_agree, gather, process_group


def whole_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard,
    rows: Targets,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors of all ranks, made on every rank."""
    _refuse_transforms()
    check_ranks_agree(rows.target, rows.classes_at_hand, spec)
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
    check_ranks_agree(rows.target, rows.classes_at_hand, spec)
    return (
        input if shard.hidden_grad == "reduced" else _Addend.apply(input, shard),
        _Whole.apply(linear_weight, 0, shard),
        None if linear_bias is None else _Whole.apply(linear_bias, 0, shard),
        _Whole.apply(target, target.dim() - 1, shard) if target.is_floating_point() else target,
        _whole_weight(weight, shard),
    )


def _refuse_transforms() -> None:
    if torch_func_active() or torch.autograd.forward_ad._current_level >= 0:
        raise ValueError(
            "shard is given but torch.func transforms and forward-mode derivatives know no ranks; pass whole logits"
        )


def _whole_weight(weight: Tensor | None, shard: VocabShard) -> Tensor | None:
    made: Tensor | None = (
        weight
        if weight is None or len(weight) == shard.num_classes
        else _Whole.apply(weight, 0, shard)
    )
    return made


class _Addend(torch.autograd.Function):
    """Hidden states whose gradient, whole on every rank, is to be summed over the ranks all the
    same."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, shard: VocabShard) -> Tensor:
        ctx.ranks = process_group(shard.group_name).size()
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


class _Whole(torch.autograd.Function):
    """Shards -> the whole, on every rank. Each rank makes the same of it, so that its gradient is
    the shard of the whole's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, shard: VocabShard) -> Tensor:
        ctx.dim, ctx.shard, ctx.size = dim, shard, t.shape[dim]
        # waits for the device: shapes are the host's, and who asks for the reference asks for its
        # pace
        places = gather(
            torch.tensor([shard.start, t.shape[dim]], device=t.device), shard.group_name
        ).tolist()
        length = max(size for _, size in places)
        rest = t.shape[:dim] + t.shape[dim + 1 :]
        lines = t.movedim(dim, 0).reshape(t.shape[dim], rest.numel())
        padded = lines.new_zeros(length, rest.numel())
        padded[: len(lines)] = lines
        ordered = sorted(
            zip(places, gather(padded, shard.group_name), strict=True), key=lambda at: at[0]
        )
        ends = [0, *(start + size for (start, size), _ in ordered)]
        if [start for (start, _), _ in ordered] != ends[:-1] or ends[-1] != shard.num_classes:
            raise ValueError(
                f"shard: the ranks hold (start, classes) {places}; expected each of [0, {shard.num_classes}) once"
            )
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
