"""Fusing the output head of a model, any model, and undoing it."""

import copy
import sys
import warnings
import weakref
from collections import Counter
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..call.dispatch import tangents_possible
from ..call.dtensor import is_dtensor
from ..inputs import torch_func_active
from ..spec import LinearOptions, require_bool

# what is recorded and what is read registers itself
from . import fused_ops, lazy_logits, recorded_ops, row_ops, value_ops  # noqa: F401
from .deferrable import obstacle
from .deferred_call import SLOTS, DeferredCall, HeadForward, LogitsReport, fused_forward
from .fsdp import fsdp_obstacle
from .tensor_parallel import head_shard, is_sharded
from .transform import LogitTransform

HEAD_NAMES = ("lm_head", "output", "embed_out", "head", "unembed")


def fuse_lm_head(
    model: nn.Module,
    *,
    head: str | nn.Module | None = None,
    options: LinearOptions | None = None,
    row_wise: bool = False,
    evaluation: bool = False,
) -> LogitsReport:
    """Fuse the output head of a model with whatever loss reads its logits, until
    ``unfuse_lm_head``.

    In training mode, with gradients enabled, the call of the head is then deferred: it returns
    logits that are not made. They have the shape, dtype and device of logits. Scaling by a number,
    ``tanh``, casts, a bias, slices of classes and any indexing or reshaping of rows are recorded;
    ``F.cross_entropy`` and ``nn.CrossEntropyLoss`` with any arguments, ``lossfuse.cross_entropy``,
    ``log_softmax`` followed by ``gather``, ``nll_loss`` or a sum over classes, ``logsumexp``,
    ``argmax`` and entropies run ``linear_cross_entropy`` or its statistics instead. Any other use
    makes the logits as the model would have, bit for bit, and warns once, naming the operation. In
    eval mode and under ``no_grad`` the head is the model's own, unless ``evaluation=True``; in
    ``generate()`` always.

    Equal to the model without: losses and gradients up to rounding (logits of half-precision heads
        are float32 here).

    Args:
        model: any module. Transformers models are asked for ``get_output_embeddings()``, at every
            forward, so that the head may be wrapped or replaced (LoRA, a resized vocabulary) before
            or after. Models without that method are searched for a module called ``lm_head``,
            ``output``, ``embed_out``, ``head`` or ``unembed``; those that answer None, for all but
            ``output`` and ``head``.
        head: the head itself, or its name in ``model``, where that finds none or another. Of
            several heads (MusicGen) name one, ``head="lm_heads.0"``.
        options: of the linear form; see ``LinearOptions``. ``main_grad`` and heads other than
            ``nn.Linear`` do not go together.
        row_wise: defer a head of an unknown class too. You promise that its forward computes every
            row alone (no convolution, shift, normalization or quantization over rows), keeps no
            state (no counters, running averages or observers), has no side effects (no auxiliary
            loss, no hooks that count), and gives the same result when it runs again with the same
            attributes and random state. It is called for one row to learn the number of classes,
            for a chunk of rows at a time, and again in the backward. Its dropout draws a mask for
            each chunk, from a seed that is drawn at the call. Unknown heads without this are called
            once, by the model, with a warning.
        evaluation: defer the head in eval mode, under ``no_grad`` and in ``inference_mode`` too, so
            that the loss of an evaluation takes no memory for logits. Calls within ``generate()``
            are never deferred. Tensors of ``inference_mode`` have no version, so hidden states that
            are written to between head and loss are noticed everywhere but there.

    Returns:
        What becomes of the logits from now on, as counters of operations: ``fused`` and ``made``. A
        second call for the same model changes its options and returns the same report.

    Raises:
        TypeError, ValueError: if no head can be found, naming what was looked for, or if what was
            found has no logits (an ``nn.Embedding``, an ``nn.ModuleList``).
        RuntimeError, later: where logits are wanted after their hidden states or the head's
            parameters have been changed in place, as by an optimizer's step; a model of torch has
            made them before. In a second backward (``retain_graph=True``) of a mean or a sum, but
            with ``options=LinearOptions(allow_retain_graph=True)``, and in a second derivative
            (``create_graph=True``). For a gradient with respect to logits that a loss has been read
            off (``torch.autograd.grad(loss, logits)``).

    A head that is a plain ``nn.Linear`` runs ``linear_cross_entropy``. Others that are deferred
    (adapters of PEFT, quantized linears of bitsandbytes and torchao, ``nn.Sequential`` of row-wise
    modules; ``lossfuse/lm_head/deferrable.py`` has the list) are called for a chunk of rows at a
    time, and again in the backward, with the flags and modes they had when the model called them.

    A forward of the model in training mode that has not called its head, so that nothing can be
    fused, warns once.

    Nothing of the model changes but its head's ``forward`` and two forward hooks of the model:
    state dict, tied weights, hooks, pickling and ``copy.deepcopy`` (whose copy is fused too) are
    unaffected. Under ``torch.compile`` the head and the loss run outside the graphs.

    Under DDP, FSDP2 and tensor parallelism the head is fused too, called before or after them
    (docs/sharded_models.md). Parameters that FSDP2 has freed by the time logits are read are
    gathered again, so that reading is a collective: do it on every rank. Heads that are a unit of
    FSDP1, parameters of ZeRO-3, or sharded in parts are not fused, nor are the replicas of
    ``nn.DataParallel``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__} but must be a torch.nn.Module")
    if head is not None and not isinstance(head, str | nn.Module):
        raise TypeError(
            f"head is a {type(head).__name__} but must be a module, or the name of one in model"
        )
    options = LinearOptions() if options is None else options
    if not isinstance(options, LinearOptions):
        raise TypeError(
            f"options is a {type(options).__name__} but must be a lossfuse.LinearOptions"
        )
    require_bool("row_wise", row_wise)
    require_bool("evaluation", evaluation)
    given = model
    if head is None:
        model = _without_adapters(model)
    _require_head(model, head)
    fuser = _fuser_of(model)
    if fuser is None:
        fuser = HeadFuser(model)
        model.register_forward_pre_hook(fuser)
    if fuser.is_over not in model._forward_hooks.values():
        model.register_forward_hook(fuser.is_over)
    fuser.name, fuser.options, fuser.row_wise, fuser.evaluation = (
        head,
        options,
        row_wise,
        evaluation,
    )
    fuser.given = weakref.ref(given)
    fuser(model, ())
    _compile_the_layers_alone(fuser)
    return fuser.report


def unfuse_lm_head(model: nn.Module) -> None:
    """Undo ``fuse_lm_head``, of this model, one in it or one around it; nothing of it is left.
    Others stay as they are."""
    for module in list(model.modules()):
        finders = [
            hook for hook in module._forward_pre_hooks.values() if isinstance(hook, HeadFuser)
        ]
        # one that was interrupted while it left
        finders += [
            f
            for hook in module._forward_hooks.values()
            if isinstance(f := getattr(hook, "__self__", None), HeadFuser)
        ]
        forward = fused_forward(module)
        for fuser in (*finders, *([] if forward is None else [forward.fuser])):
            fuser.close()


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model in a ``PeftModel``, which outlives it (``merge_and_unload``)."""
    peft = sys.modules.get("peft")
    while isinstance(model, getattr(peft, "PeftModel", ())):
        ask: Any = model.get_base_model
        model = ask()
    return model


def _fuser_of(model: nn.Module) -> "HeadFuser | None":
    # one that is closed was interrupted before it had left
    return next(
        (
            hook
            for hook in model._forward_pre_hooks.values()
            if isinstance(hook, HeadFuser) and not hook.closed
        ),
        None,
    )


def _asked(model: nn.Module, head: str | nn.Module | None) -> tuple[Any, str]:
    """The output head of a model by ``head``, its own word or one of the usual names, of whatever
    class, and who named it."""
    if isinstance(head, nn.Module):
        return head, "head"
    if head is not None:
        try:
            return model.get_submodule(head), f"head={head!r}"
        except AttributeError:
            return None, f"no module {head!r}"
    ask: Any = getattr(model, "get_output_embeddings", None)
    asked = callable(ask)
    if asked and (found := ask()) is not None:
        return found, "get_output_embeddings()"
    # what a model that says it has none calls `head` or `output` is a classifier's
    for name in [name for name in HEAD_NAMES if not asked or name not in ("head", "output")]:
        if isinstance(found := getattr(model, name, None), nn.Module):
            return found, name
    return (
        None,
        "get_output_embeddings() returned None"
        if asked
        else "neither get_output_embeddings() nor " + ", ".join(HEAD_NAMES),
    )


def _require_head(model: nn.Module, head: str | nn.Module | None) -> None:
    found, by = _asked(model, head)
    kind = type(model).__name__
    if isinstance(found, nn.ModuleList | nn.ModuleDict):
        name = next((name for name, m in model.named_modules() if m is found), "lm_heads")
        names = [f"{name}.{key}" for key in found._modules]
        raise TypeError(
            f"{by} of {kind} is a {type(found).__name__} of {len(names)} modules, each a head of its own;"
            f" pass one of them, head={names[0] if names else name!r}"
        )
    if isinstance(found, nn.Embedding):
        raise TypeError(
            f"{by} of {kind} is an {type(found).__name__}, whose forward takes ids: the model multiplies by its weight itself, and there is"
            " no call to defer; pass head=, the module that returns the logits, or call lossfuse.linear_cross_entropy(hidden, weight,"
            " target) in the model's forward"
        )
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"model is a {kind} in which no output head was found ({by}); pass head=, a module or its name"
        )


def find_lm_head(model: nn.Module, head: str | nn.Module | None = None) -> nn.Module | None:
    """The output head of a model, by ``head``, its own word or one of the usual names."""
    found, _ = _asked(model, head)
    return (
        found
        if isinstance(found, nn.Module)
        and not isinstance(found, nn.ModuleList | nn.ModuleDict | nn.Embedding)
        else None
    )


def is_generating() -> bool:
    """Return True if the call comes from a ``generate()``, of transformers or of a model's own."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" or frame.f_globals.get("__name__", "").startswith(
            "transformers.generation."
        ):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class FusedForward(HeadForward):
    """The ``forward`` of a fused head: returns deferred logits, or calls the original."""

    def __new__(cls, *args: Any) -> "FusedForward":
        # copies and unpickled ones come this way too
        _keep_outside_graphs(lazy_logits.LazyLogits, "__torch_function__")
        _keep_outside_graphs(cls, "__call__")
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        fuser = self.fuser
        fuser.report.calls += 1
        hidden: Any = args[0] if args else kwargs.get("input")
        plain = type(hidden) in (Tensor, nn.Parameter) or is_dtensor(hidden)
        plain = (
            plain
            and len(args) + len(kwargs) == 1
            and hidden.is_floating_point()
            and hidden.dim() > 0
        )
        if not plain or torch_func_active() or tangents_possible() or not self._is_wanted(hidden):
            return self.original(*args, **kwargs)
        if not fuser.is_current_head(self.head):
            fuser.fuse_current_head()
            # wrapped since, by an adapter
            return self.original(*args, **kwargs)
        why = fsdp_obstacle(self.head)
        shard = None
        if why is None and (is_dtensor(hidden) or is_sharded(self.head)):
            shard = head_shard(
                self.head,
                hidden,
                self.instance_forward,
                self.head.__dict__.get("forward") is not self,
            )
            why = "its parameters are sharded in a way that is not known" if shard is None else None
        elif why is None and not self.is_linear:
            why = obstacle(self.head, self.instance_forward, row_wise=fuser.row_wise)
        if why is not None:
            fuser.not_deferred(why)
            return self.original(*args, **kwargs)
        call = DeferredCall(self, hidden, shard)
        made = call.shape_of_logits()
        if made is None:
            return self.original(*args, **kwargs)
        rows, placements = (hidden, None) if shard is None else (shard.rows, shard.placements)
        transform = LogitTransform(*made, placements=placements)
        return lazy_logits.lazy_logits(call, transform, rows, leaves=(hidden, *call.parameters))

    def _is_wanted(self, hidden: Tensor) -> bool:
        """Return True if a loss may be read from this call: training with gradients, or evaluation
        if that is deferred too."""
        if (
            self.head.training
            and torch.is_grad_enabled()
            and not hidden.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            return True
        return self.fuser.evaluation and not is_generating()


class HeadFuser:
    """A forward hook of a model: sees to it that the head it has now is the one that is fused."""

    def __new__(cls, *args: Any) -> "HeadFuser":
        _keep_outside_graphs(cls, "__call__")
        return super().__new__(cls)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = LogitsReport()
        self.name: str | nn.Module | None = None
        self.options = LinearOptions()
        self.row_wise, self.evaluation = False, False
        # the PeftModel around it, if that was given: FSDP2 may hold its parameters
        self.given: weakref.ref[nn.Module] | None = None
        self.fused: nn.Module | None = None
        self.closed = False
        # how often the head had been called when a forward in training mode began
        self.calls: int | None = None
        self.warned: set[str] = set()
        # code objects of forwards that Dynamo leaves to Python
        self.uncompiled: list[CodeType] = []

    def is_current_head(self, head: nn.Module) -> bool:
        """Return True if ``head`` is still the model's output head and has not been unfused."""
        return not self.closed and find_lm_head(self.model, self.name) is head

    def fuse_current_head(self) -> None:
        """Fuse the head that the model has now, after it was replaced."""
        # closed: another wrapper still calls a head that has been unfused
        if not self.closed:
            self(self.model, ())

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model is not self.model:
            # DataParallel's replica, whose head has this one's forward, and parameters on another
            # device
            for module in model.modules():
                forward = fused_forward(module)
                if forward is not None and forward.head is not module:
                    forward.restore(module)
            return
        self.calls = self.report.calls if model.training and torch.is_grad_enabled() else None
        head = find_lm_head(self.model, self.name)
        if head is self.fused or self.closed:
            return
        self.release()
        if head is None:
            return
        for module in head.modules():
            copied = fused_forward(module)
            if copied is not None and copied.fuser.closed:
                copied.restore(module)
        # within accelerate's hooks the weights are there
        slot = next((slot for slot in reversed(SLOTS) if slot in head.__dict__), "forward")
        known = fused_forward(head)
        if known is not None:
            # fused by way of another model that has it
            self.report = known.fuser.report
        else:
            head.__dict__[slot] = FusedForward(head, head.__dict__.get(slot), self)
        self.fused = head

    def is_over(self, model: nn.Module, args: Any, output: Any) -> None:
        """After a forward of the model: one that has not called the head cannot be fused."""
        if (
            torch.compiler.is_compiling()
            or self.calls is None
            or self.closed
            or model is not self.model
        ):
            return
        if self.calls == self.report.calls:
            head = "" if self.fused is None else f", a {type(self.fused).__name__}"
            self._warn(
                f"the forward of {type(model).__name__} has not called its head{head}, so that lossfuse.fuse_lm_head has fused nothing: the"
                " model multiplies by the weight itself, or its head is another module. Pass head=, the module that returns the logits, or"
                " call lossfuse.linear_cross_entropy in the forward"
            )
        self.calls = None

    def not_deferred(self, why: str) -> None:
        self.report.made["forward"] += 1
        self._warn(
            f"lossfuse.fuse_lm_head leaves the head of {type(self.model).__name__} as it is, and its logits are made: {why}"
        )

    def _warn(self, message: str) -> None:
        if message not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=lazy_logits.frames_to_the_user())

    def close(self) -> None:
        self.closed = True
        self.release()
        for code in self.uncompiled:
            _compile_again(code)
        self.uncompiled = []
        for hooks, mine in (
            (self.model._forward_pre_hooks, self),
            (self.model._forward_hooks, self.is_over),
        ):
            for key in [key for key, hook in hooks.items() if hook == mine]:
                del hooks[key]

    @property
    def outermost(self) -> nn.Module:
        given = None if self.given is None else self.given()
        return self.model if given is None else given

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None, "uncompiled": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadFuser":
        """A model's copy is fused; a copy of the head alone, as PEFT's ``modules_to_save`` makes,
        is not, and copies no model."""
        other = HeadFuser(self.model)
        memo[id(self)] = other
        if id(self.model) in memo:
            other.__dict__.update(
                {name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()}
            )
        else:
            other.closed = True
        return other

    def release(self) -> None:
        forward = None if self.fused is None else fused_forward(self.fused)
        if self.fused is not None and forward is not None:
            forward.restore(self.fused)
        self.fused = None


OUTSIDE = (
    "lossfuse.fuse_lm_head runs the head and the loss outside the graphs; compile the layers (model.model.compile()) instead of the whole"
    " model, or call lossfuse.unfuse_lm_head(model)"
)
_disabled: set[Any] = set()
# how many fused models keep a code object from Dynamo
_uncompiled: Counter[CodeType] = Counter()


def _compile_the_layers_alone(fuser: HeadFuser) -> None:
    """Leave the forwards of a transformers model around its head to Python under ``torch.compile``.

    Dynamo would break them at the head and at every operation on its logits. The model without its
    head is a module of its own there, which is compiled as it is without fusing, in as many graphs.
    """
    model = fuser.outermost
    if not hasattr(fuser.model, "loss_function") or fuser.fused is None:
        return
    try:
        # not public; without it there are more graphs
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return
    around = [
        m
        for m in model.modules()
        if m is not fuser.fused and any(inner is fuser.fused for inner in m.modules())
    ]
    loss: Any = fuser.model.loss_function
    parts = (
        [loss.__globals__.get(name) for name in loss.__code__.co_names]
        if isinstance(loss, FunctionType)
        else []
    )
    functions: list[Any] = [
        *(type(m).forward for m in around),
        loss,
        *(fn for fn in parts if isinstance(fn, FunctionType)),
    ]
    for fn in functions:
        while fn is not None:
            code = getattr(fn, "__code__", None)
            if (
                isinstance(code, CodeType)
                and not getattr(fn, "__module__", "torch").startswith("torch.")
                and code not in fuser.uncompiled
            ):
                fuser.uncompiled.append(code)
                _uncompiled[code] += 1
                skip_code(code)
            fn = getattr(fn, "__wrapped__", None)


def _compile_again(code: CodeType) -> None:
    _uncompiled[code] -= 1
    if _uncompiled[code] <= 0:
        from torch._C._dynamo.eval_frame import reset_code

        del _uncompiled[code]
        reset_code(code)


def _keep_outside_graphs(owner: type, name: str) -> None:
    """``torch.compiler.disable`` a method, once a head is fused and not before: it imports Dynamo,
    and Triton with it."""
    if (owner, name) not in _disabled:
        method = vars(owner)[name]
        if isinstance(method, classmethod):
            setattr(
                owner, name, classmethod(torch.compiler.disable(method.__func__, reason=OUTSIDE))
            )
        else:
            setattr(owner, name, torch.compiler.disable(method, reason=OUTSIDE))
        _disabled.add((owner, name))
