"""Fusing the output head of a model, any model, and undoing it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

# what is recorded and what is read registers itself
from . import lazy_logits, lazy_readers, lazy_recorded  # noqa: F401
from .cut_heads import cut_of, is_cut, is_dtensor
from .dispatch import tangents_possible
from .inputs import torch_func_active
from .lazy_head import HeadForward, LogitsReport, Shaping, Source
from .spec import LinearOptions
from .wrappers import must_not_be_entered

HEAD_NAMES = ("lm_head", "output", "embed_out", "head", "unembed")


def fuse_lm_head(model: nn.Module, *, head: str | nn.Module | None = None, options: LinearOptions | None = None) -> LogitsReport:
    """Fuse the output head of a model with whatever loss reads its logits, until ``unfuse_lm_head``.

    In training mode, with gradients enabled, the head then returns logits that are not made. They have the shape, dtype and device of
    logits. Scaling by a number, ``tanh``, casts, a bias, slices of classes and any indexing or reshaping of rows are recorded;
    ``F.cross_entropy`` and ``nn.CrossEntropyLoss`` with any arguments, ``lossfuse.cross_entropy``, ``log_softmax`` followed by ``gather``,
    ``nll_loss`` or a sum over classes, ``logsumexp``, ``argmax`` and entropies run ``linear_cross_entropy`` or its statistics instead.
    Any other use makes the logits as the model would have, bit for bit, and warns once, naming the operation. In eval mode, under
    ``no_grad`` and in ``generate()`` the head is the model's own.

    Equal to the model without: losses and gradients up to rounding (logits of half-precision heads are float32 here).

    Args:
        model: any module. Transformers models are asked for ``get_output_embeddings()``, at every forward, so that the head may be wrapped
            or replaced (LoRA, a resized vocabulary) before or after. Others are searched for a module called ``lm_head``, ``output``,
            ``embed_out``, ``head`` or ``unembed``.
        head: the head itself, or its name in ``model``, where that finds none or another.
        options: of the linear form; see ``LinearOptions``. ``main_grad`` and heads other than ``nn.Linear`` do not go together.

    Returns:
        What becomes of the logits from now on, as counters of operations: ``fused`` and ``made``. A second call for the same model
        changes its options and returns the same report.

    Raises:
        TypeError, ValueError: if no head can be found, naming what was looked for.
        RuntimeError, later: where logits are wanted after their hidden states or the head's parameters have been changed in place, as by
            an optimizer's step; a model of torch has made them before.

    A head that is a plain ``nn.Linear`` runs ``linear_cross_entropy``. Any other (adapters, wrappers, several layers) is called for a chunk
    of rows at a time, and again in the backward.

    Nothing of the model changes but its head's ``forward`` and one forward hook of the model: state dict, tied weights, hooks, pickling and
    ``copy.deepcopy`` (whose copy is fused too) are unaffected. Under ``torch.compile`` the head and the loss run outside the graphs.

    Under DDP, FSDP2 and tensor parallelism the head is fused too, called before or after them (docs/sharded_models.md). Parameters that
    FSDP2 has freed by the time logits are read are gathered again, so that reading is a collective: do it on every rank. Heads that are a
    unit of FSDP1, parameters of ZeRO-3, or sharded in parts are not fused, nor are the replicas of ``nn.DataParallel``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__} but must be a torch.nn.Module")
    if head is not None and not isinstance(head, str | nn.Module):
        raise TypeError(f"head is a {type(head).__name__} but must be a module, or the name of one in model")
    options = LinearOptions() if options is None else options
    if not isinstance(options, LinearOptions):
        raise TypeError(f"options is a {type(options).__name__} but must be a lossfuse.LinearOptions")
    if find_lm_head(model, head) is None:
        where = f"no module {head!r}" if head is not None else "neither get_output_embeddings() nor " + ", ".join(HEAD_NAMES)
        raise ValueError(f"model is a {type(model).__name__} in which no output head was found ({where}); pass head=, a module or its name")
    finder = _finder_of(model)
    if finder is None:
        finder = _HeadFinder(model)
        model.register_forward_pre_hook(finder)
    finder.name, finder.options = head, options
    finder(model, ())
    return finder.report


def unfuse_lm_head(model: nn.Module) -> None:
    """Undo ``fuse_lm_head``, of this model, one in it or one around it; nothing of it is left. Others stay as they are."""
    for module in list(model.modules()):
        forward = module.__dict__.get("forward")
        finders = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _HeadFinder)]
        for finder in (*finders, *([forward.finder] if isinstance(forward, LazyForward) else [])):
            finder.close()


def _finder_of(model: nn.Module) -> "_HeadFinder | None":
    # one that is closed was interrupted before it had left
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _HeadFinder) and not hook.closed), None)


def find_lm_head(model: nn.Module, head: str | nn.Module | None = None) -> nn.Module | None:
    """The output head of a model, by ``head``, its own word or one of the usual names."""
    if isinstance(head, nn.Module):
        return head
    if head is not None:
        try:
            return model.get_submodule(head)
        except AttributeError:
            return None
    ask: Any = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    if found is None:
        found = next((m for name in HEAD_NAMES if isinstance(m := getattr(model, name, None), nn.Module)), None)
    return found if isinstance(found, nn.Module) else None


class LazyForward(HeadForward):
    """What a fused head has in place of its ``forward``."""

    def __new__(cls, *args: Any) -> "LazyForward":
        # copies and unpickled ones come this way too
        _keep_outside_graphs(lazy_logits, "_of_lazy")
        _keep_outside_graphs(cls, "__call__")
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Any = args[0] if args else kwargs.get("input")
        plain = type(hidden) in (Tensor, nn.Parameter) or is_dtensor(hidden)
        plain = plain and len(args) + len(kwargs) == 1 and hidden.is_floating_point() and hidden.dim() > 0
        training = self.head.training and torch.is_grad_enabled() and not torch_func_active() and not tangents_possible()
        if not (plain and training) or torch.is_inference_mode_enabled() or hidden.is_inference():
            return self.original(*args, **kwargs)
        if not self.finder.finds(self.head):
            # wrapped since, by an adapter
            return self.original(*args, **kwargs)
        if must_not_be_entered(self.head):
            # a group would reduce gradients of which half are missing
            return self.original(*args, **kwargs)
        cut = None
        if is_dtensor(hidden) or is_cut(self.head):
            cut = cut_of(self.head, hidden, self.instance_forward, self.head.__dict__.get("forward") is not self)
            if cut is None:
                return self.original(*args, **kwargs)
        source = Source(self, hidden, cut)
        made = source.shape_of_logits()
        if made is None:
            return self.original(*args, **kwargs)
        rows, placements = (hidden, None) if cut is None else (cut.rows, cut.placements)
        shaping = Shaping(*made, placements=placements)
        return lazy_logits.lazy_logits(source, shaping, rows, leaves=(hidden, *source.parameters))


class _HeadFinder:
    """A forward hook of a model: sees to it that the head it has now is the one that is fused."""

    def __new__(cls, *args: Any) -> "_HeadFinder":
        _keep_outside_graphs(cls, "__call__")
        return super().__new__(cls)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = LogitsReport()
        self.name: str | nn.Module | None = None
        self.options = LinearOptions()
        self.fused: nn.Module | None = None
        self.closed = False

    def finds(self, head: nn.Module) -> bool:
        """Whether it is this; if not, what it is is fused from now on."""
        if self.closed:
            # somebody else's wrapper still calls what has been undone
            return False
        if find_lm_head(self.model, self.name) is head:
            return True
        self(self.model, ())
        return False

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model is not self.model:
            # DataParallel's replica, whose head has this one's forward, and parameters on another device
            for module in model.modules():
                forward = module.__dict__.get("forward")
                if isinstance(forward, LazyForward) and forward.head is not module:
                    forward.leave(module)
            return
        head = find_lm_head(self.model, self.name)
        if head is self.fused or self.closed:
            return
        self.release()
        if head is None:
            return
        known = head.__dict__.get("forward")
        if isinstance(known, LazyForward) and known.finder.closed:
            # left in a copy
            known = known.instance_forward
        if isinstance(known, LazyForward):
            # fused by way of another model that has it
            self.report = known.finder.report
        else:
            head.forward = LazyForward(head, known, self)
        self.fused = head

    def close(self) -> None:
        self.closed = True
        self.release()
        hooks = self.model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_HeadFinder":
        """A model's copy is fused; a copy of the head alone, as PEFT's ``modules_to_save`` makes, is not, and copies no model."""
        other = _HeadFinder(self.model)
        memo[id(self)] = other
        if id(self.model) in memo:
            other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        else:
            other.closed = True
        return other

    def release(self) -> None:
        forward = None if self.fused is None else self.fused.__dict__.get("forward")
        if self.fused is not None and isinstance(forward, LazyForward):
            forward.leave(self.fused)
        self.fused = None


_kept: set[Any] = set()


def _keep_outside_graphs(owner: Any, name: str) -> None:
    """``torch.compiler.disable`` of a function by its place, for those who fuse a head: it imports Dynamo, and Triton with it."""
    fn = getattr(owner, name)
    if fn not in _kept:
        fn = torch.compiler.disable(fn)
        setattr(owner, name, fn)
        _kept.add(fn)
