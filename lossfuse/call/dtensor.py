"""DTensor arguments, and hidden states that all ranks of a shard have alike."""

import sys
from typing import Any

import torch
from torch import Tensor

from ..ops.library import all_sum
from ..spec import VocabShard


def shard_options(shard: VocabShard | None) -> tuple[int, int, str] | tuple[()]:
    """Return the last fields of a ``LossSpec``."""
    # another object than a VocabShard is refused when the tensors are checked
    return shard.options if shard is not None and isinstance(shard, VocabShard) else ()


def shared(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Return hidden states that all ranks have alike, with a backward that sums their gradient over
    the ranks."""
    if not (hidden.requires_grad and torch.is_grad_enabled() and shard.hidden_grad == "reduced"):
        return hidden
    result: Tensor = _Shared.apply(hidden, shard.group_name)
    return result


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # each rank's part was rounded to the dtype of t, as gradients between modules are
        return all_sum(grad, ctx.group), None


def dtensor_module() -> Any:
    """Return ``torch.distributed.tensor``, or None if it is not imported (no DTensors)."""
    return sys.modules.get("torch.distributed.tensor")


def is_dtensor(t: object) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter) or t is None:
        return False
    module = dtensor_module()
    return module is not None and isinstance(t, module.DTensor)


def local_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Return the local tensors of DTensors and the shard they are; other tensors unchanged."""
    if type(input) is type(target) is Tensor and weight is None:
        return input, target, weight, shard
    if not is_dtensor(input):
        _refuse_dtensors("input is a plain tensor", target=target, weight=weight)
        return input, target, weight, shard
    class_dim = 0 if input.dim() == 1 else 1
    shard, mesh_dim = _shard_of("input", input, class_dim, shard)
    local: Any = input
    target = _local(
        "target", target, local, class_dim if target.dim() == input.dim() else None, mesh_dim
    )
    return local.to_local(), target, _local("weight", weight, local, 0, mesh_dim), shard


def local_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, VocabShard | None]:
    """Return the local tensors of DTensors and the shard of the head they are; other tensors
    unchanged."""
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
        # a weight sharded by FSDP looks the same, but there each rank has other rows
        raise ValueError(
            "linear_weight is a DTensor but input is a plain tensor. If every rank has the same"
            " rows, pass linear_weight.to_local() with"
            " shard=lossfuse.VocabShard.even(num_classes, group), or input as a DTensor; if not"
            " (FSDP), unshard the weight first"
        )
    shard, mesh_dim = _shard_of("linear_weight", linear_weight, 0, shard)
    head: Any = linear_weight
    given: Any = input
    placement = dtensor_module()
    if given.device_mesh != head.device_mesh or any(
        p != placement.Replicate() for p in given.placements
    ):
        raise ValueError(
            f"input is a DTensor placed {tuple(given.placements)} but linear_weight is sharded over"
            " classes; expected Replicate on its mesh"
        )
    # the classes of each rank contribute a partial gradient; DTensor reduces it where needed
    parts = [
        placement.Partial() if i == mesh_dim else placement.Replicate()
        for i in range(given.device_mesh.ndim)
    ]
    if shard is not None:
        shard = VocabShard(shard.start, shard.num_classes, shard.group, hidden_grad="partial")
    soft = target.dim() == input.dim() and target.is_floating_point()
    return (
        given.to_local(grad_placements=parts),
        head.to_local(),
        _local("linear_bias", linear_bias, head, 0, mesh_dim),
        _local("target", target, head, target.dim() - 1 if soft else None, mesh_dim),
        _local("weight", weight, head, 0, mesh_dim),
        shard,
    )


def local_row_weight(row_weight: Tensor, beside: object) -> Tensor:
    """Return the local tensor of row weights beside logits or a head that are a DTensor; a plain
    tensor unchanged."""
    if not is_dtensor(row_weight):
        return row_weight
    if not is_dtensor(beside):
        _refuse_dtensors("input and linear_weight are plain tensors", row_weight=row_weight)
    local: Tensor = _local("row_weight", row_weight, beside, None, None)
    return local


def _refuse_dtensors(why: str, **others: Tensor | None) -> None:
    for name, t in others.items():
        if is_dtensor(t):
            raise ValueError(
                f"{name} is a DTensor but {why}; expected both to be DTensors, or neither"
                " (.to_local())"
            )


def _shard_of(
    name: str, t: Any, class_dim: int, shard: VocabShard | None
) -> tuple[VocabShard | None, int | None]:
    """Return the shard of this rank and the mesh dimension that shards the classes; None for both
    if every rank has all classes."""
    if shard is not None:
        raise ValueError(
            f"shard is given but {name} is a DTensor, which knows its shard; pass"
            f" {name}.to_local(), or no shard"
        )
    placement, mesh_dims = dtensor_module(), []
    for i, p in enumerate(t.placements):
        # type(p), not isinstance: a strided shard, from data and tensor parallelism together, is a
        # subclass of Shard
        if type(p) is placement.Shard and p.dim % t.dim() == class_dim:
            mesh_dims.append(i)
        elif not p.is_replicate():
            mesh_dims = [-1, -1]
            break
    if len(mesh_dims) > 1:
        raise ValueError(
            f"{name} is a DTensor placed {tuple(t.placements)}; expected Shard({class_dim}), its"
            " classes, on at most one dimension of the"
            " mesh and Replicate on the others. Rows that are sharded go in by .to_local(), with"
            " normalizer for a global mean"
        )
    if not mesh_dims:
        return None, None
    return VocabShard.even(t.shape[class_dim], t.device_mesh.get_group(mesh_dims[0])), mesh_dims[0]


def _local(name: str, t: Any, like: Any, class_dim: int | None, mesh_dim: int | None) -> Any:
    """Return the local tensor of a target, weight or bias beside a DTensor: a plain tensor, or a
    DTensor on the same mesh that is replicated or sharded as the classes are."""
    if not is_dtensor(t):
        return t
    placement = dtensor_module()
    placed_alike = t.device_mesh == like.device_mesh and all(
        p.is_replicate()
        or (
            i == mesh_dim
            and class_dim is not None
            and type(p) is placement.Shard
            and p.dim % t.dim() == class_dim
        )
        for i, p in enumerate(t.placements)
    )
    if not placed_alike:
        raise ValueError(
            f"{name} is a DTensor placed {tuple(t.placements)}; expected Replicate on the mesh of"
            " the logits, or their shard"
        )
    return t.to_local()
