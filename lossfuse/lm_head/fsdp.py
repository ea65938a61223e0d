"""Heads under FSDP2 and DDP: unshard parameters again, and call backward hooks.

FSDP2 frees the head's parameters after its forward. FSDP2 and DDP detect the beginning of a
backward by hooks and autograd functions on the output of a forward. No gradient passes through lazy
logits, so the losses computed from them call these hooks. Besides ``unshard()`` and ``reshard()``,
this file reads FSDP2's parameter groups and their sharded parameters, and the name of DDP's
autograd function."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

ERR_PARAM_FREED = (
    "these logits were never materialized, and a parameter of the head of shape {shape} was freed"
    " after the head's forward; expected a parameter in memory, or one that FSDP2 (fully_shard) can"
    " gather again. With other wrappers call lossfuse.unfuse_lm_head(model)"
)


class ShardedParam(NamedTuple):
    """A parameter of a head that FSDP2 shards."""

    parameter: Tensor  # unsharded, in the head's forward
    sharded: Tensor  # updated by the optimizer
    module: Any  # its unshard() gathers the parameter


def _fsdp(name: str) -> Any:
    """Return a class of ``torch.distributed.fsdp``, or an empty tuple if it is not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def is_fsdp2(module: Any) -> bool:
    return isinstance(module, _fsdp("FSDPModule"))


def is_plain_linear(head: nn.Module) -> bool:
    """Return True for ``nn.Linear``, also with the class that FSDP2 gives it."""
    return type(head) is nn.Linear or (
        is_fsdp2(head) and isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    )


def fsdp_obstacle(head: nn.Module) -> str | None:
    """Return the reason why FSDP or ZeRO-3 prevents deferring the head, or None."""
    if any(isinstance(m, _fsdp("FullyShardedDataParallel")) for m in head.modules()):
        return (
            "it is a unit of FullyShardedDataParallel (FSDP1); wrap the model and not its head, or"
            " use fully_shard"
        )
    if any(m is not head and is_fsdp2(m) for m in head.modules()):
        return "a submodule of it is a unit of fully_shard; call fully_shard on the whole head"
    return (
        "its parameters are partitioned by ZeRO-3"
        if any(hasattr(p, "ds_id") for p in head.parameters())
        else None
    )


class ShardedParams:
    """Caches the sharded parameters of a head."""

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
    """Unshard freed parameters within the context. Raise if an operand of the head (tensor, shape)
    is still absent."""
    with ExitStack() as after:
        for one in found:
            # one call unshards all parameters of its group
            if _is_absent(one.parameter):
                one.module.unshard()
                after.callback(one.module.reshard)
        for p, shape in needed:
            if p.shape != shape or _is_absent(p):
                raise RuntimeError(ERR_PARAM_FREED.format(shape=tuple(shape)))
        yield


def _is_absent(p: Tensor) -> bool:
    # of a DTensor, its local tensor
    t: Tensor = getattr(p, "_local_tensor", p)
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.numel() > 0
        and t.device.type != "meta"
        and t.untyped_storage().nbytes() == 0
    )


def fsdp_hook_modules(hook: Any) -> tuple[nn.Module, ...] | None:
    """Return the modules of a hook by which FSDP detects the beginning of a backward, or None for
    any other hook."""
    if isinstance(hook, partial):
        name, module = getattr(hook.func, "__name__", ""), hook.func.__module__
        is_fsdp1 = name == "_pre_backward_hook" and module.startswith("torch.distributed.fsdp.")
        return () if is_fsdp1 else None
    owner = getattr(hook, "__self__", None)
    is_fsdp2_hook = getattr(hook, "__name__", "") == "_pre_backward" and type(
        owner
    ).__module__.startswith("torch.distributed.")
    return tuple(getattr(owner, "_modules", ())) if is_fsdp2_hook else None


def ddp_backward_hook(node: Any) -> Callable[[Any], None] | None:
    """Return a hook that runs the backward of DDP's autograd function around outputs, or None for
    any other node."""
    if type(node).__name__ != "_DDPSinkBackward":
        return None

    def hook(dloss: Any) -> None:
        node._forward_cls.backward(node, dloss)

    return hook
