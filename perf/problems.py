"""A case in memory: the steps to measure, the least work beside them, and the fp64 result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, head_like_a_model, labels_like_a_model, logits_like_a_model
from .methods import Loss
from .protocol import Step

Result = tuple[Tensor, tuple[Tensor, ...]]
SAMPLES = 64  # rows, or classes of a weight, for which gradients are compared
BLOCK_BYTES = 256 << 20  # of fp64 tensors
# a loss scaler's factor: without it the gradients of a mean over thousands of rows underflow
SCALE = {torch.float16: 2.0**15}
# a larger error is wrong and gets no time; torch's half-precision loss is off by 4e-3, entries of
# its gradient by 1e-1
LOSS_GATE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# torch's loss of a label is a difference and 0 for a confident prediction: of 670,091 labels that
# is 8e-4 of the sum in fp32, 0.4 in bf16
LABELS_LOSS_GATE = {torch.float32: 1e-2, torch.bfloat16: 0.6, torch.float16: 0.6}
GRAD_GATE = {torch.float32: 1e-2, torch.bfloat16: 0.4, torch.float16: 0.4}
# allowed error of the target's probability: torch loses 1 - p for confident predictions, which is
# inaccurate but the same function
FORGIVEN = {torch.float32: 5e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Errors:
    """Relative errors against fp64; ``gated`` is ``grad`` less FORGIVEN. None: no gradient."""

    loss: float
    grad: float | None = None
    gated: float | None = None

    def complaint(
        self, dtype: torch.dtype, loss_gate: Mapping[torch.dtype, float] = LOSS_GATE
    ) -> str | None:
        # a NaN is not below the gate
        if not self.loss <= loss_gate[dtype]:
            return f"loss is off by {self.loss:.1e} of itself, {loss_gate[dtype]:.0e} is allowed"
        if self.gated is not None and not self.gated <= GRAD_GATE[dtype]:
            return (
                f"gradient is off by {self.gated:.1e} of itself, {GRAD_GATE[dtype]:.0e} is allowed"
            )
        return None


class _Produced(torch.autograd.Function):
    """Return a tensor like a model's output: it requires grad and is not a leaf.

    A copy if the method overwrites it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: list[Tensor], copy: bool) -> Tensor:
        return tensors[0].clone() if copy else tensors[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        return None, None, None


def _run(loss_fn: Loss, mode: str, count: int, scale: float | None) -> Callable[..., Result]:
    """A function that returns the loss, and in its mode gradients of the first ``count`` inputs."""

    def run(*arguments: Tensor) -> Result:
        loss = loss_fn(*arguments)
        if mode != "forward+backward":
            return loss, ()
        seed = None if scale is None else torch.full_like(loss, scale)
        return loss, torch.autograd.grad(loss, arguments[:count], seed)

    if mode == "no_grad":
        return torch.no_grad()(run)
    return run


class Logits:
    """(N, V) logits and (N,) targets."""

    loss_gate: Mapping[torch.dtype, float] = LOSS_GATE

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype = case, dtype
        self.logits, self.target = self._draw(device)
        # destination of a copy
        self.spare = torch.empty_like(self.logits)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._truth: tuple[float, Tensor, Tensor] | None = None

    def _draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return logits_like_a_model(self.case.n, self.case.v, self.dtype, device)

    @property
    def _targets(self) -> tuple[Tensor, ...]:
        return (self.target,)

    def step(self, loss_fn: Loss, mode: str, consumes: bool) -> Step:
        def prepare() -> tuple[Tensor, ...]:
            if mode == "no_grad":
                return (self.logits.clone() if consumes else self.logits), *self._targets
            return _Produced.apply(self._anchor, [self.logits], consumes), *self._targets

        return Step(_run(loss_fn, mode, 1, SCALE.get(self.dtype)), prepare)

    def least(self, mode: str) -> tuple[Step, float]:
        """A copy of the logits, and the share of it that the mode needs."""
        return Step(lambda: self.spare.copy_(self.logits)), self.case.moved_bytes(
            mode, 1
        ) / self.case.moved_bytes("forward+backward", 1)

    def errors(self, result: Result) -> Errors:
        loss, grads = result
        want_loss, rows, want = self._fp64()
        error = _off(float(loss.detach()), want_loss)
        if not grads:
            return Errors(error)
        got = grads[0][rows].double() / SCALE.get(self.dtype, 1.0)
        smallest = torch.finfo(self.dtype).smallest_normal / SCALE.get(self.dtype, 1.0)
        off, size = (got - want).abs(), want.abs() + smallest
        gated = size + self._forgiven(rows)
        return Errors(error, float((off / size).max()), float((off / gated).max()))

    def _forgiven(self, rows: Tensor) -> Tensor:
        """Allowed error of the gradient of each class."""
        none = torch.zeros(len(rows), self.case.v, dtype=torch.float64, device=rows.device)
        return none.scatter_(
            1, self.target[rows, None].clamp(min=0), FORGIVEN[self.dtype] / self.case.n
        )

    def _fp64(self) -> tuple[float, Tensor, Tensor]:
        if self._truth is None:
            valid = self.target != -100
            rows = _spread(self.case.n, self.target.device)
            total = torch.zeros((), dtype=torch.float64, device=self.target.device)
            for block in torch.arange(self.case.n, device=self.target.device).split(
                max(1, BLOCK_BYTES // (8 * self.case.v))
            ):
                total += torch.nn.functional.cross_entropy(
                    self.logits[block[0] : block[-1] + 1].double(),
                    self.target[block],
                    reduction="sum",
                )
            want = self.logits[rows].double().softmax(1)
            want[torch.arange(len(rows), device=rows.device), self.target[rows].clamp(min=0)] -= 1.0
            want *= (valid[rows].double() / valid.sum())[:, None]
            self._truth = float(total / valid.sum()), rows, want
        return self._truth


class Labels(Logits):
    """(N, V) logits, ids (N, P) of the positives, padded, and the same as a dense target."""

    loss_gate = LABELS_LOSS_GATE

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(case, dtype, device)
        self.ones = self._ones(slice(None), dtype)

    def _draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.case.p is not None
        return labels_like_a_model(self.case.n, self.case.v, self.case.p, self.dtype, device)

    @property
    def _targets(self) -> tuple[Tensor, ...]:
        return self.ones, self.target

    def _ones(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        ids = self.target[rows]
        none = torch.zeros(len(ids), self.case.v, dtype=dtype, device=ids.device)
        return none.scatter_reduce_(1, ids.clamp(min=0), (ids >= 0).to(dtype), "amax")

    def _forgiven(self, rows: Tensor) -> Tensor:
        return self._ones(rows, torch.float64) * (
            FORGIVEN[self.dtype] / (self.case.n * self.case.v)
        )

    def _fp64(self) -> tuple[float, Tensor, Tensor]:
        if self._truth is None:
            rows = _spread(self.case.n, self.target.device)
            count = self.case.n * self.case.v
            total = torch.zeros((), dtype=torch.float64, device=self.target.device)
            for block in torch.arange(self.case.n, device=self.target.device).split(
                max(1, BLOCK_BYTES // (8 * self.case.v))
            ):
                total += torch.nn.functional.softplus(self._wrongness(block), threshold=40.0).sum()
            want = torch.sigmoid(self._wrongness(rows))
            want *= torch.where(self.ones[rows] > 0, -1.0, 1.0) / count
            self._truth = float(total / count), rows, want
        return self._truth

    def _wrongness(self, rows: Tensor) -> Tensor:
        """The logit of the opposite label."""
        x = self.logits[rows].double()
        return torch.where(self.ones[rows] > 0, -x, x)


class Head:
    """(N, D) hidden states, (V, D) weight and (N,) targets."""

    loss_gate: Mapping[torch.dtype, float] = LOSS_GATE

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        assert case.d is not None
        self.case, self.dtype = case, dtype
        self.hidden, self.weight, self.target = head_like_a_model(
            case.n, case.d, case.v, dtype, device
        )
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._truth: tuple[float, list[tuple[Tensor, Tensor]]] | None = None

    def step(self, loss_fn: Loss, mode: str, consumes: bool) -> Step:
        def prepare() -> tuple[Tensor, Tensor, Tensor]:
            if mode == "no_grad":
                return self.hidden, self.weight, self.target
            # the hidden state comes from a layer, the weight is a parameter
            hidden = _Produced.apply(self._anchor, [self.hidden], False)
            return hidden, self.weight.detach().requires_grad_(), self.target

        return Step(_run(loss_fn, mode, 2, SCALE.get(self.dtype)), prepare)

    def least(self, mode: str) -> tuple[Step, float]:
        """The matrix products alone: logits, and in their mode both gradients."""

        def products() -> list[Tensor]:
            logits = self.hidden @ self.weight.T
            if mode != "forward+backward":
                return [logits]
            return [logits, logits @ self.weight, logits.T @ self.hidden]

        return Step(products), 1.0

    def errors(self, result: Result) -> Errors:
        loss, grads = result
        want_loss, wants = self._fp64()
        error = _off(float(loss.detach()), want_loss)
        if not grads:
            return Errors(error)
        worst = [0.0, 0.0]
        for grad, (rows, want) in zip(grads, wants, strict=True):
            off = (grad[rows].double() / SCALE.get(self.dtype, 1.0) - want).abs().amax(1)
            largest = want.abs().amax(1)
            for i, floor in enumerate((0.0, FORGIVEN[self.dtype] / self.case.n)):
                # ignored rows must have a zero gradient; max() would drop a NaN
                relative = torch.where(off == 0, 0.0, off / (largest + floor * (largest > 0))).max()
                worst[i] = float(torch.maximum(relative, relative.new_tensor(worst[i])))
        return Errors(error, *worst)

    def _fp64(self) -> tuple[float, list[tuple[Tensor, Tensor]]]:
        if self._truth is None:
            n, v, device = self.case.n, self.case.v, self.target.device
            valid = self.target != -100
            ids = self.target.clamp(min=0)
            hidden = self.hidden.double()
            rows = _spread(n, device)
            # targets and other classes
            classes = torch.cat([ids[rows], _spread(v, device)])
            blocks = torch.arange(v, device=device).split(
                max(1, BLOCK_BYTES // (8 * max(n, hidden.shape[1])))
            )
            lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
            for block in blocks:
                lse = torch.logaddexp(lse, (hidden @ self.weight[block].double().T).logsumexp(1))
            loss = (
                torch.where(valid, lse - (hidden * self.weight[ids].double()).sum(1), 0.0).sum()
                / valid.sum()
            )
            dhidden = torch.zeros(len(rows), hidden.shape[1], dtype=torch.float64, device=device)
            for block in blocks:
                weight = self.weight[block].double()
                dhidden += (
                    self._dlogits(hidden[rows] @ weight.T, lse[rows], ids[rows], valid[rows], block)
                    @ weight
                )
            dlogits = self._dlogits(
                hidden @ self.weight[classes].double().T, lse, ids, valid, classes
            )
            self._truth = float(loss), [(rows, dhidden), (classes, dlogits.T @ hidden)]
        return self._truth

    def _dlogits(
        self, logits: Tensor, lse: Tensor, ids: Tensor, valid: Tensor, classes: Tensor
    ) -> Tensor:
        """The gradient of these logits."""
        share = valid.double() / (self.target != -100).sum()
        return ((logits - lse[:, None]).exp() - (ids[:, None] == classes).double()) * share[:, None]


def bytes_of(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a loaded case, and the peak of loading it and computing the fp64 result."""
    b, n, v, d = dtype.itemsize, case.n, case.v, case.d or 0
    samples = min(n, SAMPLES)
    if case.op == "head":
        held = case.input_bytes(b)
        drawn = held + (4 * (n + v) * d if b < 4 else 8 * n)
        block = min(BLOCK_BYTES, 8 * v * max(n, d))
        return held, max(drawn, held + 5 * block // 2 + 16 * n * d + 32 * n * 2 * samples)
    # logits, the destination of a copy and, for labels, a dense target
    held = case.input_bytes(b) + case.logits_bytes(b) * (1 if case.p is None else 2)
    drawn = held + (192 << 20)
    truth = max(min(BLOCK_BYTES, 8 * n * v), 8 * samples * v) * (2 if case.p is None else 4)
    return held, max(drawn, held + truth)


def load(case: Case, dtype: torch.dtype, device: torch.device) -> Logits | Head:
    """Draw the inputs of a case."""
    kinds: dict[str, type[Logits] | type[Head]] = {"logits": Logits, "head": Head, "labels": Labels}
    return kinds[case.op](case, dtype, device)


def _spread(n: int, device: torch.device) -> Tensor:
    """At most SAMPLES indices over the whole range, with both ends."""
    return torch.linspace(0, n - 1, min(n, SAMPLES), device=device).round().long().unique()


def _off(got: float, want: float) -> float:
    return abs(got - want) / max(abs(want), 1e-30)
