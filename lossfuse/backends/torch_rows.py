"""Rows of logits by torch code, a block of rows at a time: for CPUs, and devices without Triton.

On a CPU page faults and memory traffic take the time, not arithmetic. Exponentials are therefore
written into the rows that will hold the gradient, and every other step runs while that block is in
cache. Beyond the gradient the memory is some blocks and O(N). The target (for probabilities, the
largest class) is left out of the sum of exponentials, so that ``1 - p`` and ``log p`` stay accurate
for confident predictions. Values are read back on a CPU only, where that does not synchronize.

The gradient of the loss against class y, w being the class weights, which are 1 if not given::

    dz_v = (target_coef + softmax_coef) * p_v - smoothing_coef * w_v - target_coef * [v == y]

    target_coef    = (1 - smoothing) * w_y
    smoothing_coef = smoothing / V
    softmax_coef   = smoothing_coef * sum(w) + 2 * lse_square_scale * lse

It is linear in the coefficients, so they also carry the upstream gradients: dloss multiplies them,
then dlse is added to ``softmax_coef`` and dlogprob subtracted from ``target_coef``. With ``p = e /
sum(e)``, ``e = exp(d)`` and ``d`` the distance z - row_max (<= 0), the entropy adds::

    dentropy * p_v * (sum(p * d) - d_v)
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..row_types import RowStats, Upstream, Wants, log_sum_exp, mask_row, no_class
from ..spec import LossSpec
from . import threads

# of a block in each thread: small ones cost Python calls, large ones leave the cache. With 1 MiB
# the loss takes 1.3 to 1.7 times as long as with 8 MiB (two cores)
CPU_BLOCK_BYTES = 8 << 20
# a thread for less work than this costs more than it saves
THREAD_LEAST_BYTES = 1 << 20
# on other devices a block is a handful of kernel launches
DEVICE_BLOCK_BYTES = 64 << 20
# limit of all temporaries together: 4 % of the logits, or this if it is more
TEMPORARY_BYTES = 3 << 20
TEMPORARY_SHARE = 25
# temporaries of a block alive at once with smoothing, scale, softcap or probabilities
FEATURE_BLOCKS = 6
# classes of a segment in ``largest``: a maximum with its index takes ten times as long as one
# without, so the index is looked for in the segment with the maximum only
SEGMENT = 256
# with fewer segments, one of each row is a good part of the block
LEAST_SEGMENTS = 16
# limits of the distances that are multiplied and summed at a time, in each thread; between them
# all threads together take 2 % of the logits
SUMMED_BYTES = (1 << 19, 4 << 20)
SUMMED_SHARE = 50


def row_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """(N,) losses, and no statistics: ``row_grads`` computes them again in its blocks."""
    (loss,) = _run(logits, target, class_weight, spec)
    return loss, loss.new_empty(0, logits.shape[0])


def row_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    saved: Tensor,
    upstream: Upstream,
    spec: LossSpec,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> None:
    """Fill the gradients that are given; ``dlogits`` may be ``logits``."""
    _run(logits, target, class_weight, spec, upstream, dlogits=dlogits, dtarget=dtarget)


def row_loss_and_grads(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    spec: LossSpec,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> Tensor:
    """(N,) losses; fills the gradients that are given in the same pass. ``dlogits`` may be
    ``logits``."""
    upstream = Upstream(dloss)
    (loss,) = _run(logits, target, class_weight, spec, upstream, dlogits=dlogits, dtarget=dtarget)
    return loss


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
    upstream: Upstream | None = None,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> RowStats:
    """Statistics of N rows; fills the gradients that are given in the same pass. ``dlogits`` may
    be ``logits``."""
    loss, lse, target_logprob, *more = _run(
        logits, target, class_weight, spec, upstream, wants, dlogits=dlogits, dtarget=dtarget
    )
    argmax = more.pop() if wants.argmax else None
    entropy = more.pop() if wants.entropy else None
    return RowStats(loss, lse, target_logprob, entropy, argmax, loss.new_empty(0, logits.shape[0]))


def head_row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> None:
    """None: torch has no matrix product that leaves the logits in registers."""


def head_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    wants: Wants,
) -> None:
    """None, for the reason of ``head_row_loss``."""


def multiply_in_place(t: Tensor, factor: Tensor) -> None:
    """t *= factor, a number on the device."""
    t.mul_(factor)


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _run(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    upstream: Upstream | None = None,
    wants: Wants | None = None,
    *,
    dlogits: Tensor | None = None,
    dtarget: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(N,) losses; with ``wants`` also log-sum-exps, log-probabilities of the targets, and the
    statistics it asks for."""
    dtype = compute_dtype(logits)
    weight = None if class_weight is None else class_weight.to(dtype)
    up = None if upstream is None else upstream.columns(dtype)
    n, v = logits.shape
    soft = target.is_floating_point()
    temporaries = FEATURE_BLOCKS if soft or spec.label_smoothing or spec.transforms_logits else 0
    temporaries += dlogits is None or dlogits.dtype != dtype
    # the gradient of the entropy needs the distances of a whole block, its value a few rows at a
    # time
    temporaries += up is not None and up.entropy is not None

    def part(rows: slice, block: int, count: int) -> tuple[Tensor, ...]:
        x, t, dx, dt = (None if a is None else a[rows] for a in (logits, target, dlogits, dtarget))
        u = None if up is None else up.of(rows)
        assert x is not None and t is not None
        if soft:
            columns = _soft_rows(
                x, t, weight, spec, u, wants, dlogits=dx, dtarget=dt, dtype=dtype, block=block
            )
        else:
            summed = summed_rows(n, v, dtype.itemsize, count)
            columns = _id_rows(
                x, t, weight, spec, u, wants, dlogits=dx, dtype=dtype, block=block, summed=summed
            )
        return tuple(column[:, 0] for column in columns)

    parts = map_row_ranges(logits, dtype, temporaries, part)
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


T = TypeVar("T")


def map_row_ranges(
    logits: Tensor, dtype: torch.dtype, temporaries: int, task: Callable[[slice, int, int], T]
) -> list[T]:
    """``task(rows, rows per block, threads)`` over ranges of all rows, in as many threads as have
    enough to do."""
    (n, v), on_cpu = logits.shape, logits.device.type == "cpu"
    count = threads_for(n * v, logits.element_size(), dtype.itemsize, temporaries) if on_cpu else 1
    block = block_rows(n, v, logits.element_size(), dtype.itemsize, on_cpu, temporaries, count)
    if count == 1:
        return [task(slice(0, n), block, count)]
    # whole blocks, and several ranges for each thread, in case one thread is delayed
    length = max(block, -(-n // (4 * count * block)) * block)
    return threads.run(
        [functools.partial(task, slice(i, i + length), block, count) for i in range(0, n, length)],
        count,
    )


def _needs_distances(up: Upstream | None, wants: Wants | None) -> bool:
    """True for entropies and their gradients, which take a copy of the distances."""
    return (wants is not None and wants.entropy) or (up is not None and up.entropy is not None)


def threads_for(numel: int, itemsize: int, work_itemsize: int, temporaries: int) -> int:
    """Number of threads that work on blocks: all, if each has enough to do and their temporaries
    stay within the limit."""
    enough = numel * work_itemsize // THREAD_LEAST_BYTES
    if temporaries:
        limit = max(TEMPORARY_BYTES, numel * itemsize // TEMPORARY_SHARE)
        enough = min(enough, limit // temporaries // THREAD_LEAST_BYTES)
    return max(1, min(threads.workers(), enough))


def block_rows(
    n: int, v: int, itemsize: int, work_itemsize: int, cpu: bool, temporaries: int, count: int = 1
) -> int:
    """Rows of a block of (N, V) logits, with ``temporaries`` blocks alive at once in each of
    ``count`` threads."""
    size = CPU_BLOCK_BYTES if cpu else DEVICE_BLOCK_BYTES
    if temporaries:
        limit = max(TEMPORARY_BYTES, n * v * itemsize // TEMPORARY_SHARE)
        size = min(size, limit // (temporaries * count))
    return max(1, min(n, size // (v * work_itemsize)))


def summed_rows(n: int, v: int, work_itemsize: int, count: int = 1) -> int:
    """Rows of (N, V) logits whose distances from the maximum are summed at a time, in each of
    ``count`` threads."""
    least, most = SUMMED_BYTES
    size = min(most, max(least, n * v * work_itemsize // (SUMMED_SHARE * count)))
    return max(1, size // (v * work_itemsize))


def _blocks(
    logits: Tensor, dlogits: Tensor | None, dtype: torch.dtype, rows: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their logits, a block to work in) in turn. The block is the rows of ``dlogits`` if
    those have the dtype; otherwise scratch, which is copied there after the work."""
    n, v = logits.shape
    direct = dlogits if dlogits is not None and dlogits.dtype == dtype else None
    scratch = torch.empty(
        0 if direct is not None else min(rows, n), v, dtype=dtype, device=logits.device
    )
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        work = direct[block] if direct is not None else scratch[: block.stop - block.start]
        yield block, logits[block], work
        if dlogits is not None and direct is None:
            dlogits[block].copy_(work)


# Class ids


def _id_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    up: Upstream | None,
    wants: Wants | None,
    *,
    dlogits: Tensor | None,
    dtype: torch.dtype,
    block: int,
    summed: int,
) -> list[Tensor]:
    """(N, 1) losses and statistics against (N,) class ids; entropies ``summed`` rows at a time."""
    id_rows = _IdRows(target[:, None], weight, spec, up, wants, logits.shape[1], dtype)
    if _needs_distances(up, wants):
        id_rows.reserve_distances(block, summed)
    for rows, x, e in _blocks(logits, dlogits, dtype, block):
        if _known_empty(id_rows.valid[rows]):
            continue
        z, derivative = transform_logits(x, spec, e)
        id_rows.read(rows, z, e)
        if dlogits is not None:
            id_rows.write_gradient(rows, e)
            if derivative is not None:
                e.mul_(derivative)
    if dlogits is not None:
        zero_rows(dlogits, id_rows.ignored)
    return id_rows.results()


class _IdRows:
    """Rows against class ids, as (N, 1) columns: targets and coefficients, which are known before
    the logits are read, and the statistics that ``read`` fills in.

    The sum of exponentials is stored in two parts: ``exp(margin)`` of the target, and ``others``.
    """

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        spec: LossSpec,
        up: Upstream | None,
        wants: Wants | None,
        num_classes: int,
        dtype: torch.dtype,
    ) -> None:
        n, device = len(target), target.device
        self.spec, self.weight, self.wants = spec, weight, wants
        self.up = up = Upstream() if up is None else up
        self.ignored = target == spec.ignore_index
        self.valid = ~self.ignored & (target >= 0) & (target < num_classes)
        self.y = torch.where(self.valid, target, 0)

        ones = torch.ones((), dtype=dtype, device=device)
        self.w_y = ones.expand(n, 1) if weight is None else weight[self.y]
        self.target_mass = (1.0 - spec.label_smoothing) * self.w_y
        self.smoothing_coef = spec.label_smoothing / num_classes
        # only with smoothing: a NaN weight of a class that is no target must not reach the loss
        self.smoothing_sum = 0.0 * ones
        if self.smoothing_coef:
            weight_sum = num_classes * ones if weight is None else weight.sum()
            self.smoothing_sum = self.smoothing_coef * weight_sum
        self.dloss = 0.0 * ones.expand(n, 1) if up.loss is None else up.loss
        target_coef = self.dloss * self.target_mass
        if up.target_logprob is not None:
            target_coef = target_coef - up.target_logprob
        # a target outside [0, V) makes its row NaN
        self.target_coef = torch.where(self.valid, target_coef, torch.nan)

        self.row_max, self.margin, self.others, self.shortfall, self.distance_sum = torch.empty(
            5, n, 1, dtype=dtype, device=device
        )
        n_argmax = n if wants is not None and wants.argmax else 0
        self.argmax = torch.empty(n_argmax, 1, dtype=torch.int64, device=device)
        self.distances: Tensor | None = None
        self.num_classes = num_classes

    def reserve_distances(self, block: int, summed: int) -> None:
        """Memory for distances: of a block for the gradient of the entropy, of fewer rows for its
        value."""
        rows = block if self.up.entropy is not None else min(block, summed)
        self.distances = self.margin.new_empty(min(rows, len(self.y)), self.num_classes)

    def read(self, rows: slice, z: Tensor, e: Tensor) -> None:
        """Fill in the statistics of a block; leave its exponentials in ``e``, 0 at the target."""
        y, margin = self.y[rows], self.margin[rows]
        if len(self.argmax):
            self.row_max[rows], self.argmax[rows] = largest(z)
        else:
            torch.amax(z, -1, keepdim=True, out=self.row_max[rows])
        if self.distances is not None:
            torch.gather(z, 1, y, out=margin).sub_(self.row_max[rows])
            self._sum_distances(rows, z, e)
        else:
            torch.sub(z, self.row_max[rows], out=e)
            torch.gather(e, 1, y, out=margin)
            if self.smoothing_coef:
                torch.sum(weighted(-e, self.weight), -1, keepdim=True, out=self.shortfall[rows])
            e.exp_()
        e.scatter_(1, y, 0.0)
        torch.sum(e, -1, keepdim=True, out=self.others[rows])

    def _sum_distances(self, rows: slice, z: Tensor, e: Tensor) -> None:
        """``distance_sum`` of a block, as many rows at a time as ``distances`` has. It then holds
        the distances times exponentials: of all of the block, if there is an upstream gradient."""
        assert self.distances is not None
        step = len(self.distances)
        for i in range(0, len(e), step):
            part = slice(i, i + step)
            at = slice(rows.start + i, min(rows.start + i + step, rows.stop))
            d = torch.sub(z[part], self.row_max[at], out=self.distances[: at.stop - at.start])
            if self.smoothing_coef:
                torch.sum(weighted(-d, self.weight), -1, keepdim=True, out=self.shortfall[at])
            self.distance_sum[at] = times_distance(torch.exp(d, out=e[part]), d)

    def write_gradient(self, rows: slice, e: Tensor) -> None:
        """Turn the exponentials that ``read`` left into the gradient, in place."""
        y, others, e_y = self.y[rows], self.others[rows], self.margin[rows].exp()
        inv_sum = 1.0 / (others + e_y)
        dloss, dentropy, distances = self.dloss[rows], None, None
        p_coef = self.target_coef[rows]
        # minus the gradient at the target, times the sum of exponentials: p - 1 is -others / sum
        dz_y = others * p_coef
        if self.smoothing_coef or self.spec.lse_square_scale or self.up.lse is not None:
            lse = self.row_max[rows] + _log_sum(others, e_y)
            dlse = None if self.up.lse is None else self.up.lse[rows]
            softmax_coef = softmax_coef_of(dloss, lse, self.spec, dlse, self.smoothing_sum)
            dz_y -= softmax_coef * e_y
            p_coef = p_coef + softmax_coef
        if self.up.entropy is not None and self.distances is not None:
            dentropy, distances = self.up.entropy[rows], self.distances[: len(e)]
            mean = self.distance_sum[rows] * inv_sum
            dz_y += dentropy * (distances.gather(1, y) - mean * e_y)
            p_coef = p_coef + dentropy * mean
        dz_y *= -inv_sum
        if self.smoothing_coef:
            dz_y -= self.smoothing_coef * self.w_y[rows] * dloss
        id_grad_elsewhere(
            e,
            p_coef,
            inv_sum,
            dloss,
            self.smoothing_coef,
            self.weight,
            distances=distances,
            dentropy=dentropy,
        )
        e.scatter_(1, y, dz_y)

    def results(self) -> list[Tensor]:
        """(N, 1) losses and statistics; 0 for ignored rows and NaN for bad targets."""
        e_y = self.margin.exp()
        log_sum = _log_sum(self.others, e_y)
        loss = (log_sum - self.margin) * self.target_mass
        if self.smoothing_coef:
            loss += self.smoothing_sum * log_sum + self.smoothing_coef * self.shortfall
        if self.spec.lse_square_scale:
            loss += self.spec.lse_square_scale * (self.row_max + log_sum).square_()
        columns = [loss]
        if self.wants is not None:
            columns += [log_sum_exp(self.row_max, log_sum), self.margin - log_sum]
            if self.wants.entropy:
                columns.append(log_sum - self.distance_sum / (self.others + e_y))
        columns = [mask_row(column, self.valid, self.ignored) for column in columns]
        if self.wants is not None and self.wants.argmax:
            columns.append(torch.where(self.valid, self.argmax, no_class(self.spec)))
        return columns


def softmax_coef_of(
    dloss: Tensor,
    lse: Tensor,
    spec: LossSpec,
    dlse: Tensor | None = None,
    smoothing_sum: Tensor | float | None = None,
) -> Tensor:
    """The softmax_coef of rows with its upstream gradients; ``smoothing_sum`` is smoothing_coef *
    sum(w)."""
    coef = 2.0 * spec.lse_square_scale * lse
    coef = (coef if smoothing_sum is None else smoothing_sum + coef) * dloss
    return coef if dlse is None else coef + dlse


def id_grad_elsewhere(
    e: Tensor,
    p_coef: Tensor,
    inv_sum: Tensor,
    dloss: Tensor,
    smoothing_coef: float,
    class_weight: Tensor | None,
    *,
    distances: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> None:
    """Turn exponentials into the gradient of every class but the target, in place.

    ``p_coef`` multiplies every p, ``inv_sum`` is one over the sum of exponentials, and
    ``distances`` are times exponentials.
    """
    e.mul_(p_coef * inv_sum)
    if dentropy is not None and distances is not None:
        e.addcmul_(distances, dentropy * inv_sum, value=-1.0)
    if smoothing_coef:
        w = dloss.new_ones(()) if class_weight is None else class_weight
        e.addcmul_(w.expand_as(e), dloss.expand_as(e), value=-smoothing_coef)


# Probabilities


def _soft_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    up: Upstream | None,
    wants: Wants | None,
    *,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    dtype: torch.dtype,
    block: int,
) -> list[Tensor]:
    """(N, 1) losses and statistics against (N, V) probabilities."""
    n = len(logits)
    # separate allocations: results of an operator share no memory
    loss, lse, target_logprob, entropy = (
        torch.empty(n, 1, dtype=dtype, device=logits.device) for _ in range(4)
    )
    argmax = torch.empty(n, 1, dtype=torch.int64, device=logits.device)
    needs_distances = _needs_distances(up, wants)
    for rows, x, e in _blocks(logits, dlogits, dtype, block):
        z, derivative = transform_logits(x, spec, e)
        b = _read_soft_block(z, target[rows], weight, spec, e, needs_distances, wants is not None)
        z_loss = spec.lse_square_scale * b.lse * b.lse
        loss[rows] = b.mass * b.log_sum - (b.q * b.d).sum(-1, keepdim=True) + z_loss
        if wants is not None and b.given_distance is not None:
            lse[rows], argmax[rows] = log_sum_exp(b.row_max, b.log_sum), b.top
            target_logprob[rows] = b.given_distance - b.t.sum(-1, keepdim=True) * b.log_sum
            if wants.entropy and b.distance_sum is not None:
                entropy[rows] = b.log_sum - b.distance_sum / (1.0 + b.others)
        if up is None:
            continue
        block_up = up.of(rows)
        dloss = torch.zeros_like(b.lse) if block_up.loss is None else block_up.loss
        if dlogits is not None:
            _write_soft_gradient(b, e, block_up, dloss, spec)
            if derivative is not None:
                e.mul_(derivative)
        if dtarget is not None:
            nll = b.log_sum - b.d
            dlogprob = block_up.target_logprob
            dtarget[rows].copy_(soft_target_grad(nll, b.t, b.absent, weight, dloss, dlogprob, spec))
    columns = [loss]
    if wants is not None:
        columns += [lse, target_logprob]
        columns += [entropy] if wants.entropy else []
        columns += [argmax] if wants.argmax else []
    return columns


class _SoftBlock(NamedTuple):
    """A block of rows against probabilities while it is in cache.

    The sum of exponentials is ``1 + others``: 1 is that of ``top``, the first largest class.
    """

    t: Tensor  # (B, V) probabilities
    q: Tensor  # (B, V) class weight * smoothed probability
    d: Tensor  # (B, V) distances z - row_max, 0 where ``absent``
    absent: Tensor  # (B, V) True where q is 0 and z is -inf: such classes are left out of sums
    row_max: Tensor  # (B, 1), as all below
    top: Tensor
    others: Tensor
    mass: Tensor  # sum of q
    log_sum: Tensor
    lse: Tensor
    given_distance: Tensor | None  # sum of t * d, for the log-probability
    distances: Tensor | None  # (B, V) d * exp(d), for the entropy
    distance_sum: Tensor | None


def _read_soft_block(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: LossSpec,
    e: Tensor,
    needs_distances: bool,
    needs_logprob: bool,
) -> _SoftBlock:
    """Leaves the exponentials in ``e``, 0 at the first largest class."""
    row_max, top = largest(z)
    d = z - row_max
    t, q = target_masses(target, weight, spec, z.shape[1], e.dtype)
    given_distance = distances = distance_sum = None
    if needs_logprob:
        # before ``absent`` is left out, which also depends on class weights
        products = torch.where((t == 0.0) & (d == -torch.inf), 0.0, t * d)
        given_distance = products.sum(-1, keepdim=True)
        del products
    absent = (q == 0.0) & (d == -torch.inf)
    d.masked_fill_(absent, 0.0)
    torch.exp(d, out=e)
    e.masked_fill_(absent, 0.0)
    if needs_distances:
        distances = d.clone()
        distance_sum = times_distance(e, distances)
    e.scatter_(1, top, 0.0)
    # a +inf logit is the top, whose NaN the line above has erased
    others = torch.where(row_max == torch.inf, torch.nan, e.sum(-1, keepdim=True))
    mass, log_sum = q.sum(-1, keepdim=True), torch.log1p(others)
    return _SoftBlock(
        t,
        q,
        d,
        absent,
        row_max,
        top,
        others,
        mass,
        log_sum,
        lse=row_max + log_sum,
        given_distance=given_distance,
        distances=distances,
        distance_sum=distance_sum,
    )


def _write_soft_gradient(
    b: _SoftBlock, e: Tensor, up: Upstream, dloss: Tensor, spec: LossSpec
) -> None:
    """Turn exponentials into ``(dmass + softmax_coef) * p - dq``, in place, with ``dq = dloss * q
    - dlogprob * t`` and ``dmass`` its sum."""
    sum_exp = 1.0 + b.others
    softmax_coef = softmax_coef_of(dloss, b.lse, spec, up.lse)
    dmass, dq_top = b.mass * dloss, b.q.gather(1, b.top) * dloss
    if up.target_logprob is not None:
        dmass = dmass - b.t.sum(-1, keepdim=True) * up.target_logprob
        dq_top = dq_top - b.t.gather(1, b.top) * up.target_logprob
    if up.entropy is not None and b.distance_sum is not None:
        softmax_coef = softmax_coef + up.entropy * b.distance_sum / sum_exp
    # dmass * p - dq cancels where p is nearly 1
    dz_top = torch.where(
        b.others < 1.0, (dmass - dq_top) - dmass * b.others / sum_exp, dmass / sum_exp - dq_top
    )
    e.mul_((dmass + softmax_coef) / sum_exp).addcmul_(b.q, dloss, value=-1.0)
    if up.target_logprob is not None:
        e.addcmul_(b.t, up.target_logprob)
    if up.entropy is not None and b.distances is not None:
        e.addcmul_(b.distances, up.entropy / sum_exp, value=-1.0)
    e.scatter_(1, b.top, dz_top + softmax_coef / sum_exp)


def target_masses(
    target: Tensor, weight: Tensor | None, spec: LossSpec, num_classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(t, q): probabilities as given, and as the loss weighs them, smoothed and times the class
    weights."""
    t = target.to(dtype)
    q = t
    if spec.label_smoothing:
        q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / num_classes
    return t, weighted(q, weight)


def soft_target_grad(
    nll: Tensor,
    t: Tensor,
    absent: Tensor,
    weight: Tensor | None,
    dloss: Tensor,
    dlogprob: Tensor | None,
    spec: LossSpec,
) -> Tensor:
    """(B, V) gradient of the probabilities, from ``nll = lse - z``, which is overwritten; 0 where
    ``absent``, unless the log-probability has an upstream gradient."""
    dt = weighted(nll, weight).mul((1.0 - spec.label_smoothing) * dloss).masked_fill_(absent, 0.0)
    if dlogprob is not None:
        nll.masked_fill_(absent, torch.inf)
        dt -= torch.where((t == 0.0) & (nll == torch.inf), 0.0, nll * dlogprob)
    return dt


# Both


def largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) -> the largest logit of each row and the first class that has it, each (B, 1)."""
    v = z.shape[1]
    segments = v // SEGMENT
    if segments < LEAST_SEGMENTS:
        return torch.max(z, -1, keepdim=True)
    tops = z[:, : segments * SEGMENT].unflatten(1, (segments, SEGMENT)).amax(-1)
    if v > segments * SEGMENT:
        tops = torch.cat([tops, z[:, segments * SEGMENT :].amax(-1, keepdim=True)], 1)
    start = tops.argmax(-1, keepdim=True) * SEGMENT
    # beyond the last class that class again, which is not the first then
    classes = (start + torch.arange(SEGMENT, device=z.device)).clamp_(max=v - 1)
    largest, at = torch.max(z.gather(1, classes), -1, keepdim=True)
    return largest, start + at


def times_distance(e: Tensor, d: Tensor) -> Tensor:
    """d *= e, and its sums (B, 1); 0 for a logit of -inf, whose exponential is 0."""
    sums = d.mul_(e).sum(-1, keepdim=True)
    if d.device.type != "cpu" or sums.isnan().any():
        sums = d.masked_fill_(d.isnan(), 0.0).sum(-1, keepdim=True)
    return sums


def transform_logits(
    x: Tensor, spec: LossSpec, scratch: Tensor
) -> tuple[Tensor, Tensor | float | None]:
    """(z, dz/dx) after scale and softcap, None for a derivative of 1. z may be ``x`` itself, and is
    in ``scratch`` if ``x`` has another dtype."""
    z = x if x.dtype == scratch.dtype else scratch.copy_(x)
    derivative: Tensor | float | None = None
    if spec.logit_scale is not None:
        z = z * spec.logit_scale
        derivative = spec.logit_scale
    if spec.softcap is not None:
        u = z / spec.softcap
        z = torch.tanh(u).mul_(spec.softcap)
        # 1 / cosh^2 stays accurate where 1 - tanh^2 cancels
        derivative = (1.0 if derivative is None else derivative) / u.cosh_().square_()
    return z, derivative


def _log_sum(others: Tensor, e_y: Tensor) -> Tensor:
    """log(others + e_y), accurate where e_y is 1 and others nearly 0."""
    return torch.log1p(others + (e_y - 1.0))


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """x * weight; 0 where the weight is 0, also for an infinite x."""
    return x if weight is None else (x * weight).masked_fill_((weight == 0.0) & x.isinf(), 0.0)


def _known_empty(mask: Tensor) -> bool:
    """True if no entry is True; False without a look where that would synchronize."""
    return mask.device.type == "cpu" and not mask.any()


def zero_rows(dlogits: Tensor, ignored: Tensor) -> None:
    """Fill ignored rows with 0. They may hold NaN, so a factor of 0 would not do."""
    if ignored.device.type == "cpu":
        dlogits.index_fill_(0, ignored[:, 0].nonzero()[:, 0], 0.0)
    else:
        dlogits.masked_fill_(ignored, 0.0)
