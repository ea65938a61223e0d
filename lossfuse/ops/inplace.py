"""``inplace=True``: which logits may be overwritten, and errors of later uses of their tensor."""

import warnings
import weakref
from typing import Any, cast

import torch
from torch import Tensor

from ..inputs import Rows

ERR_LOGITS_CONSUMED = (
    "these logits were consumed by a loss of lossfuse with inplace=True and their memory holds a"
    " gradient"
)

# functions of a consumed tensor that read no values
_HARMLESS = {
    "__dir__",
    "__hash__",
    "__len__",
    "_is_view",
    "backward",
    "data_ptr",
    "dim",
    "element_size",
    "get_device",
    "grad",
    "is_complex",
    "is_conj",
    "is_contiguous",
    "is_floating_point",
    "is_inference",
    "is_neg",
    "is_same_size",
    "nelement",
    "ndimension",
    "numel",
    "size",
    "storage_offset",
    "stride",
}
_ALIASES = {"alias", "detach", "view_as"}
_ATTRIBUTES_THAT_READ = {"data", "T", "mT", "H", "mH", "real", "imag"}


class Consumed(Tensor):
    """The class of the caller's tensor after its logits were overwritten: shape and graph still
    work, every use of the values raises."""

    # the edge before the write, which gives a view a new grad_fn that the loss does not depend on
    _edge: torch.autograd.graph.GradientEdge | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = (
            getattr(getattr(func, "__self__", None), "__name__", "")
            if name in ("__get__", "__set__", "__delete__")
            else None
        )
        if name in ("__repr__", "__format__"):
            return f"<{ERR_LOGITS_CONSUMED}>"
        edge = args[0]._edge if args and isinstance(args[0], cls) else None
        if attribute == "grad_fn" and name == "__get__" and edge is not None:
            return edge.node
        if name in ("register_hook", "retain_grad") and edge is not None:
            raise RuntimeError(f"{ERR_LOGITS_CONSUMED}; on a view, {name} before the loss")
        harmless = name in _HARMLESS or name in ("register_hook", "retain_grad")
        harmless |= (
            name == "__get__" and attribute not in _ATTRIBUTES_THAT_READ
        ) or attribute == "grad"
        if not harmless and name not in _ALIASES:
            raise RuntimeError(
                f"{ERR_LOGITS_CONSUMED}; use them before the loss, keep a copy, or pass"
                " inplace=False"
            )
        if name == "grad":
            args = tuple(_in_graph(a) for a in args)
            kwargs = {key: _in_graph(a) for key, a in (kwargs or {}).items()}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if name in _ALIASES:
            result.__class__ = cls
        return result


def _in_graph(argument: Any) -> Any:
    """Replace consumed views among the inputs of ``torch.autograd.grad`` by their edges."""
    if isinstance(argument, list | tuple):
        return type(argument)(map(_in_graph, argument))
    return (
        argument._edge
        if isinstance(argument, Consumed) and argument._edge is not None
        else argument
    )


def may_consume(input: Tensor, rows: Rows) -> bool:
    """True if the gradient may overwrite the logits. Warns if not, because another tensor shares
    their memory.

    Raises ValueError for leaves and for elements that share memory.
    """
    for t, what in ((input, "a leaf"), (input._base, "a view of a leaf")):
        if t is not None and t.is_leaf and t.requires_grad:
            raise ValueError(
                f"inplace=True writes the gradient over input, but input is {what} that requires"
                " grad; pass inplace=False"
            )
    if _may_overlap(input):
        raise ValueError(
            "inplace=True writes the gradient over input, but input has shape"
            f" {tuple(input.shape)} and strides {input.stride()}, so that elements share memory;"
            " pass inplace=False or input.contiguous()"
        )
    if type(input) is Tensor and not shares_memory(input, rows):
        # the rows are a copy, which no other tensor shares
        return True
    reason = _reason_against(input, rows)
    if reason is not None and not torch.compiler.is_compiling():
        warnings.warn(
            f"inplace=True has no effect: {reason}. The gradient gets its own memory.",
            UserWarning,
            stacklevel=4,
        )
    return reason is None


def _reason_against(input: Tensor, rows: Rows) -> str | None:
    if type(input) is not Tensor:
        return f"input is a {type(input).__name__}, not a plain Tensor"
    if input._base is not None and input._base.numel() != input.numel():
        return "input is a part of a larger tensor"
    if input.is_neg():
        return "input is a negative view, whose memory holds other numbers"
    if rows.soft and rows.target.untyped_storage()._cdata == rows.logits.untyped_storage()._cdata:
        return "target lies in the memory of input"
    if not is_sole_owner(input, input._base, rows.logits):
        return (
            "another tensor shares the memory of input (a view, a detached alias, or an output that"
            " was saved for a backward)"
        )
    return None


def is_sole_owner(*tensors: Tensor | None) -> bool:
    """True if only these tensors, and those they are views of, share their memory."""
    known = {id(t): t for t in tensors if t is not None}
    known |= {id(t._base): t._base for t in list(known.values()) if t._base is not None}
    storage = next(iter(known.values())).untyped_storage()
    # private API; without it, assume that the storage is shared. The Python storage object holds
    # one more reference
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and bool(count(storage._cdata) <= len(known) + 1)


def _may_overlap(t: Tensor) -> bool:
    """True if two indices can have one address, and for some exotic strides without such a pair."""
    if t.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def shares_memory(input: Tensor, rows: Rows) -> bool:
    """False if the rows are a copy of the layout: then the copy is consumed."""
    return input.untyped_storage()._cdata == rows.logits.untyped_storage()._cdata


class Owner:
    """Weak references to the caller's tensors of the logits, taken before the logits are
    overwritten."""

    def __init__(self, input: Tensor, rows: Rows) -> None:
        mine = (input, input._base) if shares_memory(input, rows) else ()
        self._tensors = [
            (weakref.ref(t), torch.autograd.graph.get_gradient_edge(t) if t._is_view() else None)
            for t in mine
            if t is not None
        ]

    def alive(self) -> list[Tensor]:
        return [t for ref, _ in self._tensors if (t := ref()) is not None]

    def mark(self) -> None:
        """Make later uses of the values raise."""
        for ref, edge in self._tensors:
            t = ref()
            if t is not None and type(t) is Tensor:
                t.__class__ = Consumed
                cast(Consumed, t)._edge = edge

    def unmark(self) -> None:
        """Undo ``mark``, as the logits were not overwritten."""
        for t in self.alive():
            if type(t) is Consumed:
                cast(Tensor, t).__class__ = Tensor
