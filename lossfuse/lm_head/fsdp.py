"""Heads whose parameters others move: FSDP2 frees them when the head's forward is over, and
wrappers wait for a backward to begin.

FSDP2 and DDP learn that a backward backward_hooks from hooks and functions they put on what a forward
returns. No gradient comes by way of logits that are not made, so what is read off them has to tell.
What is known of FSDP2 here beyond its ``unshard()`` and ``reshard()`` is which group holds a
parameter, and the sharded parameter an optimizer writes to; of DDP, the name of its function."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

ERR_PARAM_FREED = (
    "these logits were never made, and what they are made of, a parameter of the head of shape {shape}, holds no values any more; whoever"
    " partitions parameters has let go of it after the head's forward. FSDP2 (fully_shard) is asked for it again; for others call"
    " lossfuse.unfuse_lm_head(model)"
)


class ShardedParam(NamedTuple):
    """A parameter that one of FSDP2's groups lends to a head."""

    parameter: Tensor  # as the head's forward sees it
    sharded: Tensor  # as the optimizer does
    module: Any  # that unshards the group


def _fsdp(name: str) -> Any:
    """A class of it, if anybody has imported it; an empty tuple is nobody's class."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def is_fsdp2(module: Any) -> bool:
    return isinstance(module, _fsdp("FSDPModule"))


def is_plain_linear(head: nn.Module) -> bool:
    """Also under another name, as FSDP2 gives it."""
    return type(head) is nn.Linear or (
        is_fsdp2(head) and isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    )


def fsdp_obstacle(head: nn.Module) -> str | None:
    """Why a call of the head for the loss alone would go wrong: hooks of FSDP's groups in it,
    parameters that ZeRO-3 has put aside."""
    if any(isinstance(m, _fsdp("FullyShardedDataParallel")) for m in head.modules()):
        return "it is a unit of FullyShardedDataParallel (FSDP1); wrap the model and not its head, or use fully_shard"
    if any(m is not head and is_fsdp2(m) for m in head.modules()):
        return "a part of it is a unit of fully_shard; call fully_shard on the whole head"
    return (
        "its parameters are partitioned by ZeRO-3"
        if any(hasattr(p, "ds_id") for p in head.parameters())
        else None
    )


class ShardedParams:
    """Finds who lends a head its parameters, and remembers."""

    def __init__(self) -> None:
        self.found: list[ShardedParam] = []
        self.of: tuple[weakref.ref[Tensor], ...] = ()

    def __call__(self, parameters: tuple[Tensor, ...], model: nn.Module) -> list[ShardedParam]:
        if not _fsdp("FSDPModule"):
            return []
        if len(self.of) != len(parameters) or any(
            ref() is not p for ref, p in zip(self.of, parameters, strict=True)
        ):
            self.found = find_sharded_params(parameters, model.modules())
            self.of = tuple(weakref.ref(p) for p in parameters)
        return self.found

    def __reduce__(self) -> Any:
        return ShardedParams, ()


def find_sharded_params(
    parameters: tuple[Tensor, ...], modules: Iterable[Any]
) -> list[ShardedParam]:
    found: dict[int, ShardedParam] = {}
    for module in modules:
        if not is_fsdp2(module):
            continue
        state = module._get_fsdp_state()
        # one group, until torch 2.11
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for entry in (
            entry for group in groups if group is not None for entry in group.fsdp_params
        ):
            for p in parameters:
                if getattr(entry, "_unsharded_param", None) is p:
                    found.setdefault(id(p), ShardedParam(p, entry.sharded_param, module))
    return list(found.values())


@contextmanager
def unsharded(found: list[ShardedParam], needed: Iterable[tuple[Tensor, Any]]) -> Iterator[None]:
    """With the values of what a head needs, of these shapes, wherever they have gone since the
    forward; as it was before, afterwards."""
    with ExitStack() as after:
        for one in found:
            # one call may have brought the next ones back too
            if _is_absent(one.parameter):
                one.module.unshard()
                after.callback(one.module.reshard)
        for p, shape in needed:
            if p.shape != shape or _is_absent(p):
                raise RuntimeError(ERR_PARAM_FREED.format(shape=tuple(shape)))
        yield


def _is_absent(p: Tensor) -> bool:
    # of a DTensor, what this rank has of it
    t: Tensor = getattr(p, "_local_tensor", p)
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.numel() > 0
        and t.device.type != "meta"
        and t.untyped_storage().nbytes() == 0
    )


def fsdp_hook_modules(hook: Any) -> tuple[nn.Module, ...] | None:
    """Of a hook for a tensor's gradient that only asks when the backward of these backward_hooks; None for
    any other."""
    if isinstance(hook, partial):
        # FSDP1's
        told = getattr(
            hook.func, "__name__", ""
        ) == "_pre_backward_hook" and hook.func.__module__.startswith("torch.distributed.fsdp.")
        return () if told else None
    owner = getattr(hook, "__self__", None)
    told = getattr(hook, "__name__", "") == "_pre_backward" and type(owner).__module__.startswith(
        "torch.distributed."
    )
    return tuple(getattr(owner, "_modules", ())) if told else None


def ddp_backward_hook(node: Any) -> Callable[[Any], None] | None:
    """Of DDP's function around outputs, which passes gradients on and asks when the backward
    backward_hooks; None for any other."""
    if type(node).__name__ != "_DDPSinkBackward":
        return None

    def hook(dloss: Any) -> None:
        node._forward_cls.backward(node, dloss)

    return hook
