"""Heads whose classes are cut over ranks: what tensor parallelism of torch and of transformers
makes of them.

Both make the head's weight a DTensor, sharded over classes, and its hidden states one that is whole
on every rank. The linear form takes this rank's part of both and a ``VocabShard``; autograd puts
gradients together on the way back through the DTensors."""

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..call.dtensor import is_dtensor
from ..spec import VocabShard
from .fsdp import is_plain_linear


class HeadShard(NamedTuple):
    """A call of a head that has some of the classes on this rank."""

    rows: Tensor  # hidden states, whole; their gradient is this rank's part
    mesh: Any
    dim: int  # of the mesh, over which classes are cut
    placements: (
        tuple[Any, ...] | None
    )  # of the logits as the head's forward leaves them; None if they are whole and plain

    def classes(self, num_classes: int, of: int) -> tuple[slice, VocabShard]:
        """Which of the rank's own classes, and which of the first ``num_classes`` they are; ``of``,
        the classes of the head."""
        even = VocabShard.even(of, self.mesh.get_group(self.dim))
        size = min(-(-of // self.mesh.size(self.dim)), of - even.start)
        start = min(even.start, num_classes)
        kept = max(0, min(even.start + size, num_classes) - start)
        return slice(0, kept), VocabShard(
            start, num_classes, self.mesh.get_group(self.dim), hidden_grad="partial"
        )


def _tensor() -> Any:
    # who has a DTensor has imported it
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(head: nn.Module) -> bool:
    return _tensor() is not None and any(is_dtensor(p) for p in head.parameters())


def head_shard(
    head: nn.Module, hidden: Any, instance_forward: Any, wrapped: bool
) -> HeadShard | None:
    """How this call is cut; None where it is none that is known. ``wrapped``, somebody has put
    something around the fused head."""
    weight: Any = head._parameters.get("weight")
    bias: Any = head._parameters.get("bias")
    if not is_plain_linear(head) or not is_dtensor(weight) or wrapped:
        return None
    placement = _tensor()
    replicate, mesh = placement.Replicate(), weight.device_mesh
    cuts = [i for i, p in enumerate(weight.placements) if type(p) is placement.Shard and p.dim == 0]
    whole = all(p == replicate for i, p in enumerate(weight.placements) if i not in cuts)
    if (
        len(cuts) != 1
        or not whole
        or (bias is not None and (not is_dtensor(bias) or bias.placements != weight.placements))
    ):
        return None
    placements = None
    if instance_forward is None:
        shard_of_last = placement.Shard(hidden.dim() - 1)
        placements = tuple(shard_of_last if i in cuts else replicate for i in range(mesh.ndim))
    else:
        hidden = _as_transformers(head, hidden, instance_forward, replicate)
    if (
        not is_dtensor(hidden)
        or hidden.device_mesh != mesh
        or any(p != replicate for p in hidden.placements)
    ):
        return None
    parts = [placement.Partial() if i in cuts else replicate for i in range(mesh.ndim)]
    return HeadShard(hidden.to_local(grad_placements=parts), mesh, cuts[0], placements)


def _as_transformers(head: nn.Module, hidden: Any, forward: Any, replicate: Any) -> Any:
    """The hidden states as its tensor parallelism hands them to a head whose logits it makes whole;
    None for anything else."""
    code = getattr(forward, "__code__", None)
    if (
        code is None
        or code.co_name != "tp_forward"
        or not forward.__module__.startswith("transformers.")
    ):
        return None
    held: dict[str, Any] = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, forward.__closure__, strict=True)
    }
    style, inner = held["self"], held["original_forward"]
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
    args, kwargs = style.transform_inputs_pre_forward(head, (hidden,), {}, held["mesh"])
    return args[0] if len(args) == 1 and not kwargs else None


# --- what is done to logits that are DTensors


def redistributed(logits: Any, placements: Any) -> Any:
    return logits.redistribute(placements=placements) if is_dtensor(logits) else logits


def localised(logits: Any) -> Any:
    return logits.to_local() if is_dtensor(logits) else logits


def local_arguments(cut_mesh: Any, arguments: list[Any]) -> list[Any] | None:
    """Targets and weights beside them that are whole on every rank, as plain tensors; None if one
    is not."""
    if any(
        is_dtensor(t)
        and (t.device_mesh != cut_mesh or not all(p.is_replicate() for p in t.placements))
        for t in arguments
    ):
        return None
    return [t.to_local() if is_dtensor(t) else t for t in arguments]


def as_replicas(result: Tensor, mesh: Any) -> Any:
    """A result that is equal on every rank, as a replicated DTensor."""
    return _tensor().DTensor.from_local(result, mesh, replicas(mesh), run_check=False)


def replicas(mesh: Any) -> list[Any]:
    return [_tensor().Replicate()] * mesh.ndim
