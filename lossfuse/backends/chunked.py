"""Torch code over blocks of rows that fit a cache: the CPU's backend, and that of any device without Triton.

On a CPU the wall is page faults and memory traffic, not arithmetic: a softmax is written straight into the rows that will hold the
gradient, and everything else happens to that block while it is in cache. Beyond the gradient there is one block at most. Nothing is
read back to the host except on the CPU itself, where that is free.
"""

import torch
from torch import Tensor

from ..spec import LossSpec

# blocks of 2 to 8 MiB are alike within 10 % on a CPU; smaller ones pay for python, larger ones leave the cache
CPU_BLOCK_BYTES = 4 << 20
# half precision keeps one block beside the gradient, which is small for a vocabulary of 32k and 1024 rows: 62 MiB of bf16
CPU_HALF_BLOCK_BYTES = 2 << 20
# elsewhere a block is a handful of kernel launches
DEVICE_BLOCK_BYTES = 64 << 20

# above it, 1 - p is summed from the other classes instead of subtracted: log(p) in fp32 is off by 3e-6 of itself there
CONFIDENT = 0.9
# below it, p comes near the smallest fp32 numbers and its logarithm is taken by log_softmax
FAINT = 1e-30


def row_loss(logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    loss = _rows(logits, target, class_weight, None, spec, None, None)
    return loss, loss.new_empty(0, logits.shape[0])


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    _rows(logits, target, class_weight, dloss, spec, dlogits, dtarget)


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> Tensor:
    return _rows(logits, target, class_weight, dloss, spec, dlogits, dtarget)


def _rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
) -> Tensor:
    """Losses of all rows; with ``dloss``, their gradients into the tensors given."""
    n, v = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.to(dtype)
    loss = torch.empty(n, dtype=dtype, device=logits.device)
    in_place = dlogits is not None and dlogits.dtype == dtype
    rows = _rows_per_block(v, dtype, logits.device, in_place)
    scratch = torch.empty(0 if in_place else min(rows, n), v, dtype=dtype, device=logits.device)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        p = dlogits[block] if in_place and dlogits is not None else scratch[: block.stop - block.start]
        slope = None if dloss is None else dloss[block, None].to(dtype)
        if target.is_floating_point():
            dt = None if dtarget is None else dtarget[block]
            loss[block] = _soft_block(logits[block], target[block], weight, slope, spec, p, dt)
        else:
            loss[block] = _id_block(logits[block], target[block, None], weight, slope, spec, p)
        if dlogits is not None and not in_place:
            dlogits[block].copy_(p)
    return loss


def _rows_per_block(v: int, dtype: torch.dtype, device: torch.device, in_place: bool) -> int:
    size = DEVICE_BLOCK_BYTES if device.type != "cpu" else CPU_BLOCK_BYTES if in_place else CPU_HALF_BLOCK_BYTES
    return max(1, size // (v * dtype.itemsize))


def _id_block(x: Tensor, target: Tensor, weight: Tensor | None, dloss: Tensor | None, spec: LossSpec, p: Tensor) -> Tensor:
    """(n,) losses of a block against (n, 1) class ids; ``p`` is left holding the gradient if there is a ``dloss``, anything otherwise."""
    v = x.shape[-1]
    ignored = target == spec.ignore_index
    valid = ~ignored & (target >= 0) & (target < v)
    y = torch.where(valid, target, 0)
    z, dz_dx = _shaped(x, spec, p)
    lse = torch.logsumexp(z, -1, keepdim=True) if spec.lse_square_scale else None
    smooth = spec.label_smoothing / v
    smooth_nll = _expected_nll(torch.log_softmax(z, -1), weight) if spec.label_smoothing else None

    torch.softmax(z, -1, out=p)
    p_y = p.gather(1, y)
    p.scatter_(1, y, 0.0)
    nll, p_y_minus_1 = -p_y.log(), p_y - 1.0
    if _anywhere(confident := p_y > CONFIDENT):
        others = p.sum(-1, keepdim=True)
        nll = torch.where(confident, -torch.log1p(-others), nll)
        p_y_minus_1 = torch.where(confident, -others, p_y_minus_1)
    if _anywhere(faint := p_y < FAINT):
        faint_rows = faint[:, 0].nonzero()[:, 0] if x.device.type == "cpu" else torch.arange(len(x), device=x.device)
        z, _ = _shaped(x[faint_rows], spec, torch.empty_like(p[faint_rows]))
        exact = -torch.log_softmax(z, -1).gather(1, y[faint_rows])
        nll = torch.where(faint, nll.index_copy(0, faint_rows, exact), nll)

    w_y = 1.0 - spec.label_smoothing if weight is None else (1.0 - spec.label_smoothing) * weight[y]
    loss = nll * w_y
    if smooth_nll is not None:
        loss = loss + smooth * smooth_nll
    if lse is not None:
        loss = loss + spec.lse_square_scale * lse * lse
    if dloss is not None:
        p_factor = torch.zeros_like(p_y)
        if smooth_nll is not None:
            p_factor += smooth * (v if weight is None else weight.sum())
        if lse is not None:
            p_factor += 2.0 * spec.lse_square_scale * lse
        target_slope = w_y * p_y_minus_1 + p_factor * p_y
        # a target outside [0, V) makes its row NaN
        dloss = torch.where(valid, dloss, torch.nan)
        p.mul_((w_y + p_factor) * dloss)
        if smooth_nll is not None:
            w = torch.ones_like(p[:1]) if weight is None else weight
            p.addcmul_(w.expand_as(p), dloss.expand_as(p), value=-smooth)
            target_slope -= smooth * (1.0 if weight is None else weight[y])
        p.scatter_(1, y, target_slope * dloss)
        if dz_dx is not None:
            p.mul_(dz_dx)
        if _anywhere(ignored):
            # not by a factor of 0: ignored rows may hold NaN
            p.masked_fill_(ignored, 0.0) if x.device.type != "cpu" else p.index_fill_(0, ignored[:, 0].nonzero()[:, 0], 0.0)
    return torch.where(ignored, 0.0, torch.where(valid, loss, torch.nan))[:, 0]


def _soft_block(
    x: Tensor, target: Tensor, weight: Tensor | None, dloss: Tensor | None, spec: LossSpec, p: Tensor, dtarget: Tensor | None
) -> Tensor:
    """(n,) losses of a block against (n, V) probabilities; with ``dloss``, ``p`` is left holding the gradient and ``dtarget`` is filled."""
    v = x.shape[-1]
    z, dz_dx = _shaped(x, spec, p)
    lse = torch.logsumexp(z, -1, keepdim=True) if spec.lse_square_scale else None
    logp = torch.log_softmax(z, -1)
    q = target.to(p.dtype)
    if spec.label_smoothing:
        q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / v
    if weight is not None:
        q = q * weight

    torch.exp(logp, out=p)
    logp_top, top = logp.max(-1, keepdim=True)
    p_top = logp_top.exp()
    if _anywhere(confident := p_top > CONFIDENT):
        p.scatter_(1, top, 0.0)
        logp_top = torch.where(confident, torch.log1p(-p.sum(-1, keepdim=True)), logp_top)
        logp.scatter_(1, top, logp_top)
        p.scatter_(1, top, p_top)
    loss = _expected_nll(logp, q)
    if lse is not None:
        loss = loss + spec.lse_square_scale * lse * lse
    if dloss is None:
        return loss[:, 0]

    if dtarget is not None:
        dt = logp * (-(1.0 - spec.label_smoothing) * dloss)
        if weight is not None:
            dt *= weight
        dtarget.copy_(dt.masked_fill_((q == 0) & (logp == -torch.inf), 0.0))
    mass = q.sum(-1, keepdim=True)
    q_top = q.gather(1, top)
    top_slope = torch.where(p_top > 0.5, mass * torch.expm1(logp_top) + (mass - q_top), mass * p_top - q_top)
    p_factor = mass
    if lse is not None:
        z_factor = 2.0 * spec.lse_square_scale * lse
        p_factor = mass + z_factor
        top_slope += z_factor * p_top
    p.mul_(p_factor).sub_(q).scatter_(1, top, top_slope).mul_(dloss)
    if dz_dx is not None:
        p.mul_(dz_dx)
    return loss[:, 0]


def _shaped(x: Tensor, spec: LossSpec, scratch: Tensor) -> tuple[Tensor, Tensor | float | None]:
    """The logits the loss sees and their derivative (None for 1); in ``scratch`` if ``x`` is not in its dtype, and maybe ``x`` itself."""
    z = x if x.dtype == scratch.dtype else scratch.copy_(x)
    slope: Tensor | float | None = None
    if spec.logit_scale is not None:
        z = z * spec.logit_scale
        slope = spec.logit_scale
    if spec.softcap is not None:
        u = z / spec.softcap
        z = spec.softcap * torch.tanh(u)
        # 1 / cosh^2 keeps its digits where 1 - tanh^2 has none left
        slope = (1.0 if slope is None else slope) / torch.cosh(u).square_()
    return z, slope


def _expected_nll(logp: Tensor, q: Tensor | None) -> Tensor:
    """(n, 1) sum of q * -logp (q None for ones), leaving out classes of zero q and -inf logit."""
    if q is None:
        return -logp.sum(-1, keepdim=True)
    return -(q * torch.where((q == 0) & (logp == -torch.inf), 0.0, logp)).sum(-1, keepdim=True)


def _anywhere(mask: Tensor) -> bool:
    """Whether a rare case occurs: looked up on the CPU, assumed elsewhere rather than synchronise."""
    return mask.device.type != "cpu" or bool(mask.any())
