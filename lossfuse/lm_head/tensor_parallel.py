"""Heads whose classes are sharded across ranks by tensor parallelism of torch or transformers.

Both make the head's weight a DTensor that is sharded over classes, and its hidden states a
replicated one. The linear form takes the local tensors and a ``VocabShard``; the backward of the
DTensors reduces the gradients."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..call.dtensor import dtensor_module, is_dtensor
from ..spec import VocabShard
from .fsdp import is_plain_linear


class HeadShard(NamedTuple):
    """The local part of a call of a head whose classes are sharded."""

    rows: Tensor  # local hidden states, replicated; their gradient is partial
    mesh: Any
    dim: int  # of the mesh, over which classes are sharded
    # of the logits that the head's forward returns; None if they are a plain tensor
    placements: tuple[Any, ...] | None

    def classes(self, num_classes: int, head_classes: int) -> tuple[slice, VocabShard]:
        """Return the local classes among the first ``num_classes`` of the head, as a slice of the
        local weight and as a shard."""
        even = VocabShard.even(head_classes, self.mesh.get_group(self.dim))
        size = min(-(-head_classes // self.mesh.size(self.dim)), head_classes - even.start)
        start = min(even.start, num_classes)
        num_local = max(0, min(even.start + size, num_classes) - start)
        return slice(0, num_local), VocabShard(
            start, num_classes, self.mesh.get_group(self.dim), hidden_grad="partial"
        )


def is_sharded(head: nn.Module) -> bool:
    return any(is_dtensor(p) for p in head.parameters())


def head_shard(
    head: nn.Module, hidden: Any, instance_forward: Any, wrapped: bool
) -> HeadShard | None:
    """Return the shard of a call, or None for an unsupported layout or a ``wrapped`` head."""
    weight: Any = head._parameters.get("weight")
    bias: Any = head._parameters.get("bias")
    if not is_plain_linear(head) or not is_dtensor(weight) or wrapped:
        return None
    placement = dtensor_module()
    replicate, mesh = placement.Replicate(), weight.device_mesh
    shard_dims = [
        i for i, p in enumerate(weight.placements) if type(p) is placement.Shard and p.dim == 0
    ]
    replicated = all(p == replicate for i, p in enumerate(weight.placements) if i not in shard_dims)
    if (
        len(shard_dims) != 1
        or not replicated
        or (bias is not None and (not is_dtensor(bias) or bias.placements != weight.placements))
    ):
        return None
    placements = None
    if instance_forward is None:
        shard_of_last = placement.Shard(hidden.dim() - 1)
        placements = tuple(
            shard_of_last if i in shard_dims else replicate for i in range(mesh.ndim)
        )
    else:
        hidden = _as_transformers(head, hidden, instance_forward, replicate)
    if (
        not is_dtensor(hidden)
        or hidden.device_mesh != mesh
        or any(p != replicate for p in hidden.placements)
    ):
        return None
    grad_placements = [
        placement.Partial() if i in shard_dims else replicate for i in range(mesh.ndim)
    ]
    return HeadShard(
        hidden.to_local(grad_placements=grad_placements), mesh, shard_dims[0], placements
    )


def _as_transformers(head: nn.Module, hidden: Any, forward: Any, replicate: Any) -> Any:
    """Return the hidden states as a DTensor, as tensor parallelism of transformers passes them to a
    head whose logits it gathers; None for any other forward."""
    code = getattr(forward, "__code__", None)
    if (
        code is None
        or code.co_name != "tp_forward"
        or not forward.__module__.startswith("transformers.")
    ):
        return None
    variables: dict[str, Any] = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, forward.__closure__, strict=True)
    }
    style, inner = variables["self"], variables["original_forward"]
    if (
        type(style).__name__ != "ColwiseParallel"
        or getattr(inner, "__func__", None) is not nn.Linear.forward
    ):
        return None
    if (
        style.output_layouts != replicate
        or not style.use_local_output
        or style.should_use_local_tensors(head)
    ):
        return None
    args, kwargs = style.transform_inputs_pre_forward(head, (hidden,), {}, variables["mesh"])
    return args[0] if len(args) == 1 and not kwargs else None


# --- functions of logits that are DTensors


def redistributed(logits: Any, placements: Any) -> Any:
    return logits.redistribute(placements=placements) if is_dtensor(logits) else logits


def as_local(logits: Any) -> Any:
    return logits.to_local() if is_dtensor(logits) else logits


def local_arguments(mesh: Any, arguments: list[Any]) -> list[Any] | None:
    """Replace replicated DTensors by plain tensors; None if one is not replicated on ``mesh``."""
    if any(
        is_dtensor(t) and (t.device_mesh != mesh or not all(p.is_replicate() for p in t.placements))
        for t in arguments
    ):
        return None
    return [t.to_local() if is_dtensor(t) else t for t in arguments]


def as_replicas(result: Tensor, mesh: Any) -> Any:
    """Return a result that is equal on every rank as a replicated DTensor."""
    return dtensor_module().DTensor.from_local(result, mesh, replicas(mesh), run_check=False)


def replicas(mesh: Any) -> list[Any]:
    return [dtensor_module().Replicate()] * mesh.ndim
