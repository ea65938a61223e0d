"""The formulas of the softmax family, on one tile in registers: no load, no store, no program id.

All of it is fp32 with natural logarithms. z is a shaped logit, p its softmax probability.

Words that the kernels share:

=============  ===================================================================================
``shaped``     a logit after ``scale`` and ``softcap``: z = softcap * tanh(scale * x / softcap)
``top``        the largest z so far, per lane or per slice; over the whole row it is ``row_max``
``ties``       how many z are equal to ``top``
``rest``       sum of exp(z - top) over the z below ``top``
``excess``     sum of exp(z - top) over all z, minus 1; log_sum = log1p(excess) and
               lse = row_max + log_sum
``mass``       sum of q, where q is class weight times target probability
``shortfall``  sum of q * (top - z). ``mean_shortfall`` is row_max - z averaged over the softmax
``spread``     sum of exp(z - top) * (top - z), from which the entropy is computed
``first``      the lowest class whose z is ``top``
=============  ===================================================================================

Two rules keep the results accurate. The maximum is counted apart from the rest of the sum, so that
log_sum = log1p(rest + ties - 1) does not lose precision when one class holds nearly all of the
probability. Differences are taken from the maximum, so that an offset common to a row cancels.

``*_start`` gives the state before the first tile, ``*_update`` folds a tile into the state of each
lane, ``*_finish`` reduces lanes to a row. ``*_join`` combines two slices elementwise, ``*_merge``
all slices of a row.

The gradient of the loss against class y, w being the class weights, which are 1 if not given::

    dz_v = (target_coef + softmax_coef) * p_v - smoothing_coef * w_v - target_coef * [v == y]

    target_coef    = (1 - smoothing) * w_y
    smoothing_coef = smoothing / V
    softmax_coef   = smoothing_coef * sum(w) + 2 * lse_square_scale * lse

It is linear in the coefficients, so they also carry the upstream gradients: the coefficients of the
loss are multiplied by dloss, then dlse is added to ``softmax_coef`` and dlogprob is subtracted from
``target_coef``.
"""

import triton
import triton.language as tl

# in place of "no logit seen yet": finite, so that -inf logits subtract from it without NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)
# in place of a +inf maximum: +inf - HIGHEST is +inf, where +inf - +inf is NaN
HIGHEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
# a distance from the top at which exp is 0
FAR = tl.constexpr(200.0)
# in place of "no class seen yet": above every class
NO_CLASS = tl.constexpr(2147483647)


@triton.jit
def only_if(condition, mask):
    """``mask`` where the scalar ``condition`` holds, else False."""
    # condition & mask is int32 in the interpreter of triton 3.9, which rejects it as a mask
    return tl.where(condition, mask, False)


@triton.jit
def exp_flushed(x):
    """exp(x), with 0 for subnormal results: two instructions, where tl.exp takes six."""
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p_from_minus_one(u):
    """log(1 + u) for u >= -1, with full relative accuracy around 0."""
    r = u / (2.0 + u)
    r2 = r * r
    # atanh series; r <= 0.2 where it is used, so the first omitted term is below 1e-9 of the sum
    tail = r2 * (1.0 / 3 + r2 * (1.0 / 5 + r2 * (1.0 / 7 + r2 * (1.0 / 9 + r2 * (1.0 / 11)))))
    return tl.where((u > -0.25) & (u < 0.5), 2.0 * r * (1.0 + tail), tl.log(1.0 + u))


@triton.jit
def expm1_to_zero(x):
    """exp(x) - 1 for x <= 0, with full relative accuracy around 0, rounding above 0 included."""
    tail = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9)))
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * tail))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def tanh_and_grad(u):
    """tanh(u) and 1 - tanh(u)^2, each with full relative accuracy near 0 and in the tails."""
    t = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(u < 0, -far, far)
    # 1 - t cancels near 0: polynomial for tanh(u) / u fitted on |u| < 0.625, relative error 4e-9
    w = u * u
    high = -0.0537201076566 + w * (0.0205881914546 - w * 0.00565713518437)
    near = u * (1.0 + w * (-0.333332598629 + w * (0.133311140557 + w * high)))
    return tl.where(tl.abs(u) < 0.625, near, far), 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def shaped(x, scale, softcap):
    """z = softcap * tanh(scale * x / softcap), the logit the loss sees; either may be None."""
    z = x
    if scale is not None:
        z = z * scale
    if softcap is not None:
        squashed, _ = tanh_and_grad(z / softcap)
        z = softcap * squashed
    return z


@triton.jit
def shaped_grad(x, scale, softcap):
    """dz/dx of ``shaped``."""
    z = x
    grad = 1.0
    if scale is not None:
        z = z * scale
        grad = scale
    if softcap is not None:
        _, dsquashed = tanh_and_grad(z / softcap)
        grad = grad * dsquashed
    return grad


# Log-sum-exp


@triton.jit
def lse_start(BLOCK_V: tl.constexpr):
    """(top, ties, rest) of each lane before the first tile."""
    top = tl.full([BLOCK_V], LOWEST, tl.float32)
    return top, tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)


@triton.jit
def lse_update(top, ties, rest, z):
    """Fold a tile into (top, ties, rest). A z of -inf adds nothing; only a NaN makes ``rest``
    NaN."""
    d = z - top
    e = tl.exp(-tl.abs(d))
    higher = d > 0
    # not d == 0, which is false for a second +inf
    equal = z == top
    rest = tl.where(higher, (rest + ties) * e, tl.where(equal, rest, rest + e))
    ties = tl.where(higher, 1.0, tl.where(equal, ties + 1.0, ties))
    return tl.where(higher, z, top), ties, rest


@triton.jit
def lse_finish(top, ties, rest):
    """Lanes to (row_max, log_sum) of the row: both NaN for a NaN logit, only log_sum for +inf."""
    row_max = tl.max(top, 0)
    at_max = top == row_max
    others = tl.sum(tl.where(at_max, rest, (rest + ties) * tl.exp(top - row_max)), 0)
    count = tl.sum(tl.where(at_max, ties, 0.0), 0)
    log_sum = log1p_from_minus_one(others + (count - 1.0))
    log_sum = tl.where(row_max == float("inf"), float("nan"), log_sum)
    return tl.where(others == others, row_max, float("nan")), log_sum


@triton.jit
def higher(a, b):
    """The maximum, or NaN if one of the two is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def halves(t):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def below_sums(z, top, SPREAD: tl.constexpr):
    """Per lane, the sums of exp(z - top) and, with SPREAD, of exp(z - top) * (top - z) over the
    columns of a tile (L, R), or of one column (L,)."""
    below = z - (top if len(z.shape) == 1 else top[:, None])
    e = exp_flushed(below)
    weighted = tl.zeros_like(e)
    if SPREAD:
        # bounded, so that an e of 0 removes a logit of -inf from the sum
        weighted = e * tl.minimum(-below, FAR)
    if len(z.shape) == 1:
        return e, weighted
    else:
        return tl.sum(e, 1), tl.sum(weighted, 1)


@triton.jit
def group_start(LANES: tl.constexpr):
    """(top, excess, spread, first) of each lane before the first tile."""
    top = tl.full([LANES], LOWEST, tl.float32)
    excess = tl.full([LANES], -1.0, tl.float32)
    return top, excess, tl.zeros([LANES], tl.float32), tl.full([LANES], NO_CLASS, tl.int32)


@triton.jit
def group_update(top, excess, spread, first, z, start, SPREAD: tl.constexpr, FIRST: tl.constexpr):
    """Fold a tile (L, R) into (top, excess, spread, first): a lane takes R neighboring classes, R
    being 4 or 8, the first of which is ``start`` (L,).

    Of two logits the lower one is added to the sum of exponentials and the higher one goes on, so
    that the largest is never added, and ties need no count. A lane's ``first`` is the ``start`` of
    the first group that has its ``top``. A NaN makes top, excess and spread NaN.
    """
    a, b = halves(z)
    winner, lower = higher(a, b), tl.minimum(a, b)
    if z.shape[1] == 8:
        a, b = halves(winner)
        winner, lower_2 = higher(a, b), tl.minimum(a, b)
    a, b = tl.split(winner)
    winner, lower_1 = higher(a, b), tl.minimum(a, b)
    new_top, lower_0 = higher(winner, top), tl.minimum(winner, top)

    e, weighted = below_sums(lower, new_top, SPREAD)
    if z.shape[1] == 8:
        e_2, weighted_2 = below_sums(lower_2, new_top, SPREAD)
        e, weighted = e + e_2, weighted + weighted_2
    e_1, weighted_1 = below_sums(lower_1, new_top, SPREAD)
    e_0, weighted_0 = below_sums(lower_0, new_top, SPREAD)
    # the excess counts all logits but the old top, which is lower_0 if there is a new one
    rescale = exp_flushed(top - new_top)
    if SPREAD:
        moved = spread + tl.minimum(new_top - top, FAR) * excess
        spread = moved * rescale + (weighted + (weighted_1 + weighted_0))
    if FIRST:
        # a lane that has seen no finite logit has an excess of -1, and its top may be one
        reached = (winner > top) | ((winner == top) & (excess == -1.0))
        first = tl.where(reached, start, first)
    return new_top, excess * rescale + (e + (e_1 + e_0)), spread, first


@triton.jit
def group_merge(top, excess):
    """``lse_merge`` of lanes, whose top may be NaN: then both are NaN."""
    merged_top, merged_excess = lse_merge(top, excess)
    any_nan = tl.max((top != top).to(tl.int32), 0) > 0
    return tl.where(any_nan, float("nan"), merged_top), merged_excess


@triton.jit
def group_finish(top, excess):
    """Lanes to (row_max, log_sum, excess) of the row: all NaN for a NaN logit; for +inf the last
    two."""
    row_max, excess = group_merge(top, excess)
    excess = tl.where(row_max == float("inf"), float("nan"), excess)
    return row_max, log1p_from_minus_one(excess), excess


@triton.jit
def lse_of(row_max, log_sum):
    """The log-sum-exp of the row: +inf for a +inf logit, as in torch.logsumexp."""
    return tl.where(row_max == float("inf"), row_max, row_max + log_sum)


@triton.jit
def lse_merge(tops, excesses):
    """(top, excess) of slices to that of the row.

    A slice without a finite logit is (LOWEST, -1) and contributes exactly 0.
    """
    top = tl.max(tops, 0)
    at_top = tops == top
    others = tl.sum(tl.where(at_top, excesses, exp_flushed(tops - top) * (1.0 + excesses)), 0)
    return top, others + (tl.sum(tl.where(at_top, 1.0, 0.0), 0) - 1.0)


@triton.jit
def lse_join(top, excess, other_top, other_excess):
    """``lse_merge`` of two slices, elementwise."""
    higher = top >= other_top
    row_max = tl.maximum(top, other_top)
    lower_sum = 1.0 + tl.where(higher, other_excess, excess)
    distance = tl.minimum(top, other_top) - tl.minimum(row_max, HIGHEST)
    rescaled = exp_flushed(distance) * lower_sum
    return row_max, tl.where(higher, excess, other_excess) + rescaled


# The largest class


@triton.jit
def first_update(first, top, ties, z, offs_v):
    """Per lane, the first class that reached the maximum. Call after ``lse_update``."""
    return tl.where((z == top) & (ties == 1.0), offs_v, first)


@triton.jit
def first_finish(first, top, row_max):
    """Lanes to the first class at the row's maximum; 0 if no logit is finite."""
    # if row_max is LOWEST, so is the top of lanes that have seen no finite logit
    row_first = tl.min(tl.where(top == row_max, first, NO_CLASS), 0)
    return tl.where(row_first == NO_CLASS, 0, row_first)


@triton.jit
def first_merge(tops, firsts):
    """The first maximum of each slice to that of the row."""
    return tl.min(tl.where(tops == tl.max(tops, 0), firsts, NO_CLASS), 0)


@triton.jit
def first_join(top, first, other_top, other_first):
    """``first_merge`` of two slices, elementwise."""
    lower = tl.where(top > other_top, first, other_first)
    return tl.where(top == other_top, tl.minimum(first, other_first), lower)


# The target's mass: smoothing and probabilities


@triton.jit
def shortfall_update(mass, shortfall, q, z, top_before, top):
    """Fold a tile into (sum of q, sum of q * (top - z)), first moving the sum to the new top."""
    # a class of zero mass adds 0 even if its logit is -inf
    shift = tl.where(mass == 0.0, 0.0, mass * (top - top_before))
    return mass + q, shortfall + shift + tl.where(q == 0.0, 0.0, q * (top - z))


@triton.jit
def shortfall_finish(mass, shortfall, top, row_max):
    """Lanes to (sum of q, sum of q * (row_max - z)) of the row."""
    shift = tl.where(mass == 0.0, 0.0, mass * (row_max - top))
    return tl.sum(mass, 0), tl.sum(shortfall + shift, 0)


@triton.jit
def shortfall_of(q, z, top):
    """Sum of q * (top - z) over a tile."""
    # a class of zero mass adds 0 even if its logit is -inf
    return tl.sum(tl.where(q == 0.0, 0.0, q * (top - z)), 0)


# Entropy


@triton.jit
def spread_update(spread, top, ties, rest, z):
    """Fold a tile into the sum of exp(z - top) * (top - z). Call before ``lse_update``."""
    d = z - top
    far = tl.abs(d)
    e = tl.exp(-far)
    higher = d > 0
    # below the top, z adds e * far; above it, z is the new top, to which the sum is rescaled
    factor = tl.where(higher, spread + far * (rest + ties), far)
    # a class of zero probability adds 0 even if its logit is -inf
    return tl.where(higher, 0.0, spread) + tl.where(e == 0.0, 0.0, e * factor)


@triton.jit
def spread_finish(spread, top, ties, rest, row_max, log_sum):
    """Lanes to ``mean_shortfall``; entropy = log_sum + mean_shortfall, and both are >= 0."""
    far = row_max - top
    e = tl.exp(-far)
    about_row_max = tl.where(e == 0.0, 0.0, e * (spread + far * (rest + ties)))
    return tl.sum(about_row_max, 0) * tl.exp(-log_sum)


@triton.jit
def spread_about(row_max, top, excess, spread):
    """The spread of a slice about ``row_max`` instead of its own ``top``, which is not higher."""
    distance = row_max - top
    factor = exp_flushed(-distance)
    # the distance from LOWEST, the top of a slice without a finite logit, may be inf
    return tl.where(factor == 0.0, 0.0, factor * (spread + distance * (1.0 + excess)))


@triton.jit
def spread_merge(tops, excesses, spreads):
    """The spreads of slices to that of the row, about the maximum that ``lse_merge`` gives."""
    top = tl.max(tops, 0)
    return tl.sum(spread_about(top[None, :], tops, excesses, spreads), 0)


@triton.jit
def spread_join(top, excess, spread, other_top, other_excess, other_spread):
    """``spread_merge`` of two slices, elementwise."""
    row_max = tl.maximum(top, other_top)
    one = spread_about(row_max, top, excess, spread)
    return one + spread_about(row_max, other_top, other_excess, other_spread)


@triton.jit
def entropy_grad(p, below, mean_shortfall):
    """d(entropy)/dz; ``below`` is z - row_max."""
    return tl.where(p == 0.0, 0.0, -p * (below + mean_shortfall))


# The loss against a class id. Its gradient's formula is at the top of this file


@triton.jit
def lse_square(row_max, log_sum, lse_square_scale):
    """The z-loss of a row."""
    lse = row_max + log_sum
    return lse_square_scale * lse * lse


@triton.jit
def lse_square_grad(p, row_max, log_sum, lse_square_scale):
    """d(z-loss)/dz."""
    return 2.0 * lse_square_scale * (row_max + log_sum) * p


@triton.jit
def id_loss(z_y, w_y, row_max, log_sum, w_sum, shortfall, V, smoothing, lse_square_scale):
    """The loss of a row against class y.

    ``w_y`` is None without class weights. Only smoothing reads ``w_sum``, the sum of the class
    weights, and ``shortfall``, whose mass is the class weights.
    """
    loss = (row_max - z_y) + log_sum
    if w_y is not None:
        loss = loss * w_y
    if smoothing is not None:
        loss = (1.0 - smoothing) * loss + smoothing / V * (w_sum * log_sum + shortfall)
    if lse_square_scale is not None:
        loss = loss + lse_square(row_max, log_sum, lse_square_scale)
    return loss


@triton.jit
def id_grad_coefs(w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale):
    """(target_coef, softmax_coef, smoothing_coef) of a row."""
    target_coef, softmax_coef, smoothing_coef = 1.0, 0.0, 0.0
    if w_y is not None:
        target_coef = w_y
    if smoothing is not None:
        target_coef = (1.0 - smoothing) * target_coef
        smoothing_coef = smoothing / V
        softmax_coef = smoothing_coef * w_sum
    if lse_square_scale is not None:
        softmax_coef = softmax_coef + 2.0 * lse_square_scale * (row_max + log_sum)
    return target_coef, softmax_coef, smoothing_coef


@triton.jit
def smoothed(dz, w, smoothing_coef, smoothing):
    """dz - smoothing_coef * w, or dz without smoothing; ``w`` is None without class weights."""
    if smoothing is not None:
        dz = dz - smoothing_coef if w is None else dz - smoothing_coef * w
    return dz


@triton.jit
def id_grad_at_target(logp, w_y, target_coef, softmax_coef, smoothing_coef, smoothing):
    """dz of the target, from its log-probability: p - 1 would cancel for a confident prediction."""
    dz = target_coef * expm1_to_zero(logp) + softmax_coef * tl.exp(logp)
    return smoothed(dz, w_y, smoothing_coef, smoothing)


@triton.jit
def id_grad_elsewhere(p, w, p_coef, smoothing_coef, smoothing):
    """dz of the other classes: ``p_coef`` is target_coef + softmax_coef.

    Both coefficients may be multiplied by a factor, and p divided by it: the fused kernels pass
    exp(z - top) for p, and the coefficients divided by the sum of exponentials.
    """
    return smoothed(p_coef * p, w, smoothing_coef, smoothing)


@triton.jit
def soft_target_grad(p, logp, q, mass):
    """d/dz of sum(q * (lse - z)): mass * p - q, without cancellation where p is nearly 1."""
    return tl.where(p > 0.5, mass * expm1_to_zero(logp) + (mass - q), mass * p - q)


# Binary cross entropy


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1: polynomial for log1p(e) / e, relative error 3e-8."""
    high = -0.1367476971 + e * (0.07836166802 + e * (-0.02958850739 + e * 0.005253457797))
    middle = 0.3331927134 + e * (-0.2484436989 + e * (0.1911143108 + e * high))
    return e * (0.9999999705 + e * (-0.4999950152 + e * middle))


@triton.jit
def sigmoid_parts(x):
    """(sigmoid(x), sigmoid(-x), log(1 + exp(-|x|))), each with full relative accuracy."""
    e = tl.exp(-tl.abs(x))
    near = 1.0 / (1.0 + e)
    far = e * near
    positive = x >= 0
    return tl.where(positive, near, far), tl.where(positive, far, near), log1p_of_fraction(e)


@triton.jit
def label_loss(x, t, pos_weight, tail):
    """pos_weight * t * softplus(-x) + (1 - t) * softplus(x); NaN at -inf, as in torch.

    ``tail`` is log(1 + exp(-|x|)); adding it to max(x, 0) or max(-x, 0) never cancels.
    """
    yes = t if pos_weight is None else t * pos_weight
    no = 1.0 - t
    both = tail if pos_weight is None else tail * (yes + no)
    loss = both + no * tl.maximum(x, 0.0) + yes * tl.maximum(-x, 0.0)
    return tl.where(x == -float("inf"), float("nan"), loss)


@triton.jit
def label_grad(t, pos_weight, p, not_p):
    """d(label_loss)/dx from p = sigmoid(x) and not_p = sigmoid(-x); exact for t of 0 or 1."""
    yes = t if pos_weight is None else t * pos_weight
    return (1.0 - t) * p - yes * not_p


@triton.jit
def label_target_grad(x, pos_weight, tail):
    """d(label_loss)/dt."""
    if pos_weight is None:
        return -x
    else:
        return pos_weight * (tl.maximum(-x, 0.0) + tail) - (tl.maximum(x, 0.0) + tail)
