"""The mathematics of the softmax family on one tile: no load, no store, no program_id.

A row is summarised by a running maximum and by what lies around it. The maximum is counted apart (``ties``) from the rest of
the sum of exponentials (``rest``), so that ``log_sum = log(sum exp(z - max)) = log1p(rest + ties - 1)`` keeps its digits when one
class holds nearly all of the probability; and every difference is taken from the maximum, so that an offset common to a whole
row cancels exactly. The running state is one value per lane of the tile and is reduced once, after the loop.

Natural logarithms throughout. Everything is fp32.
"""

import triton
import triton.language as tl

# stands for "no logit seen yet"; finite, so that -inf logits subtract from it without NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)
# a distance from it is +inf for a logit of +inf, and not NaN
HIGHEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
# stands for "no class seen yet"; above every class
NO_CLASS = tl.constexpr(2147483647)


@triton.jit
def only_if(condition, mask):
    """A mask, or nothing of it."""
    # where & of a number and a block is int32, which triton 3.9 takes for no mask (its interpreter)
    return tl.where(condition, mask, False)


@triton.jit
def exp_flushed(x):
    """exp(x), 0 where it would be subnormal. Two instructions; tl.exp takes six, to scale what is subnormal."""
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p_from_minus_one(u):
    """log(1 + u) for u >= -1, with full relative accuracy around 0."""
    r = u / (2.0 + u)
    r2 = r * r
    # atanh series; r <= 0.2 where it is used, so the first term left out is below 1e-9 of the sum
    tail = r2 * (1.0 / 3 + r2 * (1.0 / 5 + r2 * (1.0 / 7 + r2 * (1.0 / 9 + r2 * (1.0 / 11)))))
    return tl.where((u > -0.25) & (u < 0.5), 2.0 * r * (1.0 + tail), tl.log(1.0 + u))


@triton.jit
def expm1_to_zero(x):
    """exp(x) - 1 for x <= 0 (and rounding above it), with full relative accuracy around 0."""
    tail = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9)))
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * tail))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 - tanh(u)^2, both accurate relative to themselves, near 0 and in the tails."""
    t = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(u < 0, -far, far)
    # (1 - t) cancels near 0; polynomial for tanh(u)/u fitted on |u| < 0.625, relative error 4e-9
    w = u * u
    near = u * (1.0 + w * (-0.333332598629 + w * (0.133311140557 + w * (-0.0537201076566 + w * (0.0205881914546 - w * 0.00565713518437)))))
    return tl.where(tl.abs(u) < 0.625, near, far), 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def shaped(x, scale, softcap):
    """The logit the loss sees, z = softcap * tanh(scale * x / softcap); scale and softcap may be None."""
    z = x
    if scale is not None:
        z = z * scale
    if softcap is not None:
        squashed, _ = tanh_and_slope(z / softcap)
        z = softcap * squashed
    return z


@triton.jit
def shaped_slope(x, scale, softcap):
    """dz/dx of ``shaped``."""
    z = x
    slope = 1.0
    if scale is not None:
        z = z * scale
        slope = scale
    if softcap is not None:
        _, dsquashed = tanh_and_slope(z / softcap)
        slope = slope * dsquashed
    return slope


@triton.jit
def lse_start(BLOCK_V: tl.constexpr):
    """(maximum, ties, rest) of no logits, per lane."""
    return tl.full([BLOCK_V], LOWEST, tl.float32), tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)


@triton.jit
def lse_update(top, ties, rest, z):
    """Fold one tile into the running state; -inf adds nothing, and NaN alone makes ``rest`` NaN."""
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
    """Lanes -> (row maximum, log of the sum of exp(z - maximum)); both NaN for a NaN logit, only the second for +inf."""
    row_max = tl.max(top, 0)
    at_max = top == row_max
    others = tl.sum(tl.where(at_max, rest, (rest + ties) * tl.exp(top - row_max)), 0)
    count = tl.sum(tl.where(at_max, ties, 0.0), 0)
    log_sum = log1p_from_minus_one(others + (count - 1.0))
    log_sum = tl.where(row_max == float("inf"), float("nan"), log_sum)
    return tl.where(others == others, row_max, float("nan")), log_sum


@triton.jit
def lse_of(row_max, log_sum):
    """The log-sum-exp of what ``lse_finish`` returns: +inf for a +inf logit, as in torch.logsumexp."""
    return tl.where(row_max == float("inf"), row_max, row_max + log_sum)


@triton.jit
def lse_merge(tops, excesses):
    """(maximum, sum of exp(z - maximum) less 1) of slices -> of the row. A slice without a finite logit is (LOWEST, -1), exactly 0."""
    top = tl.max(tops, 0)
    at_top = tops == top
    others = tl.sum(tl.where(at_top, excesses, exp_flushed(tops - top) * (1.0 + excesses)), 0)
    return top, others + (tl.sum(tl.where(at_top, 1.0, 0.0), 0) - 1.0)


@triton.jit
def lse_join(top, excess, other_top, other_excess):
    """``lse_merge`` of two slices, elementwise."""
    higher = top >= other_top
    row_max = tl.maximum(top, other_top)
    moved = exp_flushed(tl.minimum(top, other_top) - tl.minimum(row_max, HIGHEST)) * (1.0 + tl.where(higher, other_excess, excess))
    return row_max, tl.where(higher, excess, other_excess) + moved


@triton.jit
def shortfall_merge(tops, excesses, shortfalls):
    """sum of exp(z - maximum) * (maximum - z) of slices -> of the row; ``lse_merge`` has the others of the row."""
    top = tl.max(tops, 0)
    return tl.sum(raised(top[None, :], tops, excesses, shortfalls), 0)


@triton.jit
def shortfall_join(top, excess, shortfall, other_top, other_excess, other_shortfall):
    """``shortfall_merge`` of two slices, elementwise."""
    row_max = tl.maximum(top, other_top)
    return raised(row_max, top, excess, shortfall) + raised(row_max, other_top, other_excess, other_shortfall)


@triton.jit
def raised(row_max, top, excess, shortfall):
    """A slice's sum of exp(z - top) * (top - z) about a maximum that is not lower."""
    distance = row_max - top
    moved = exp_flushed(-distance)
    # a slice without a finite logit is far enough below to make a distance of inf
    return tl.where(moved == 0.0, 0.0, moved * (shortfall + distance * (1.0 + excess)))


@triton.jit
def first_merge(tops, firsts):
    """The index of the first maximum, of slices -> of the row."""
    return tl.min(tl.where(tops == tl.max(tops, 0), firsts, NO_CLASS), 0)


@triton.jit
def first_join(top, first, other_top, other_first):
    """``first_merge`` of two slices, elementwise."""
    lower = tl.where(top > other_top, first, other_first)
    return tl.where(top == other_top, tl.minimum(first, other_first), lower)


@triton.jit
def shortfall_update(mass, shortfall, q, z, top_before, top):
    """Fold q * (top - z) into the running sum, moving what was summed before to the new maximum."""
    # a class of zero mass is out of the sum even where its logit is -inf
    moved = tl.where(mass == 0.0, 0.0, mass * (top - top_before))
    return mass + q, shortfall + moved + tl.where(q == 0.0, 0.0, q * (top - z))


@triton.jit
def shortfall_finish(mass, shortfall, top, row_max):
    """Lanes -> (sum of q, sum of q * (row_max - z))."""
    moved = tl.where(mass == 0.0, 0.0, mass * (row_max - top))
    return tl.sum(mass, 0), tl.sum(shortfall + moved, 0)


@triton.jit
def shortfall_of(q, z, top):
    """Lanes -> sum of q * (top - z)."""
    # a class of zero mass is out of the sum even where its logit is -inf
    return tl.sum(tl.where(q == 0.0, 0.0, q * (top - z)), 0)


@triton.jit
def spread_update(spread, top, ties, rest, z):
    """Fold exp(z - top) * (top - z) into the running sum; takes the state from before ``lse_update``."""
    d = z - top
    far = tl.abs(d)
    e = tl.exp(-far)
    higher = d > 0
    moved = tl.where(higher, spread + far * (rest + ties), far)
    # a class of zero probability is out of the sum even where its logit is -inf
    return tl.where(higher, 0.0, spread) + tl.where(e == 0.0, 0.0, e * moved)


@triton.jit
def spread_finish(spread, top, ties, rest, row_max, log_sum):
    """Lanes -> (row_max - z) on average over the softmax; with ``log_sum`` it adds up to the entropy, and neither is negative."""
    far = row_max - top
    e = tl.exp(-far)
    moved = tl.where(e == 0.0, 0.0, e * (spread + far * (rest + ties)))
    return tl.sum(moved, 0) * tl.exp(-log_sum)


@triton.jit
def entropy_slope(p, below, mean_shortfall):
    """d (entropy) / dz, from z - row_max and what ``spread_finish`` makes."""
    return tl.where(p == 0.0, 0.0, -p * (below + mean_shortfall))


@triton.jit
def first_update(first, top, ties, z, offs_v):
    """Per lane, the first class that reached the maximum; takes the state from after ``lse_update``."""
    return tl.where((z == top) & (ties == 1.0), offs_v, first)


@triton.jit
def first_finish(first, top, row_max):
    """Lanes -> the first class at the row's maximum, 0 where no logit is finite."""
    # lanes that saw no finite logit are at the maximum if it is LOWEST
    row_first = tl.min(tl.where(top == row_max, first, NO_CLASS), 0)
    return tl.where(row_first == NO_CLASS, 0, row_first)


@triton.jit
def lse_square(row_max, log_sum, lse_square_scale):
    """The z-loss of a row."""
    lse = row_max + log_sum
    return lse_square_scale * lse * lse


@triton.jit
def softmax_slope(p, row_max, log_sum, lse_square_scale):
    """d (z-loss) / dz."""
    return 2.0 * lse_square_scale * (row_max + log_sum) * p


@triton.jit
def id_loss(z_y, w_y, row_max, log_sum, w_sum, shortfall, V, smoothing, lse_square_scale):
    """The loss of a row against class y; w_y is None without class weights, w_sum and shortfall are read for smoothing."""
    loss = (row_max - z_y) + log_sum
    if w_y is not None:
        loss = loss * w_y
    if smoothing is not None:
        loss = (1.0 - smoothing) * loss + smoothing / V * (w_sum * log_sum + shortfall)
    if lse_square_scale is not None:
        loss = loss + lse_square(row_max, log_sum, lse_square_scale)
    return loss


@triton.jit
def id_slopes(w_y, w_sum, row_max, log_sum, V, smoothing, lse_square_scale):
    """Numbers of a row, (kept, flat, off), that make d (id_loss) / dz of its classes, by ``target_slope`` and ``other_slope``."""
    kept, flat, off = 1.0, 0.0, 0.0
    if w_y is not None:
        kept = w_y
    if smoothing is not None:
        kept = (1.0 - smoothing) * kept
        off = smoothing / V
        flat = off * w_sum
    if lse_square_scale is not None:
        flat = flat + 2.0 * lse_square_scale * (row_max + log_sum)
    return kept, flat, off


@triton.jit
def target_slope(logp, w_y, kept, flat, off, smoothing):
    """d (id_loss) / dz of the target, whose log-probability keeps the digits of p - 1 when p is nearly 1."""
    dz = kept * expm1_to_zero(logp) + flat * tl.exp(logp)
    return dz if smoothing is None else dz - off if w_y is None else dz - off * w_y


@triton.jit
def other_slope(p, w, factor, off, smoothing):
    """d (id_loss) / dz of any other class: ``factor`` is kept + flat, w its weight, None without class weights.

    It is linear in the numbers of the row: with ``factor`` and ``off`` times what scales a row, so is the slope.
    """
    dz = factor * p
    return dz if smoothing is None else dz - off if w is None else dz - off * w


@triton.jit
def soft_target_slope(p, logp, q, mass):
    """d/dz of sum(q * (lse - z)): mass * p - q, without cancellation where p is nearly 1."""
    return tl.where(p > 0.5, mass * expm1_to_zero(logp) + (mass - q), mass * p - q)


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1, accurate relative to itself: polynomial for log1p(e)/e, relative error 3e-8."""
    high = -0.1367476971 + e * (0.07836166802 + e * (-0.02958850739 + e * 0.005253457797))
    return e * (0.9999999705 + e * (-0.4999950152 + e * (0.3331927134 + e * (-0.2484436989 + e * (0.1911143108 + e * high)))))


@triton.jit
def sigmoid_parts(x):
    """(sigmoid(x), sigmoid(-x), log(1 + exp(-|x|))), each accurate relative to itself."""
    e = tl.exp(-tl.abs(x))
    near = 1.0 / (1.0 + e)
    far = e * near
    up = x >= 0
    return tl.where(up, near, far), tl.where(up, far, near), log1p_of_fraction(e)


@triton.jit
def label_loss(x, t, pos_weight, tail):
    """pos_weight * t * softplus(-x) + (1 - t) * softplus(x), without a difference of the two; NaN at -inf, as torch."""
    yes = t if pos_weight is None else t * pos_weight
    no = 1.0 - t
    both = tail if pos_weight is None else tail * (yes + no)
    loss = both + no * tl.maximum(x, 0.0) + yes * tl.maximum(-x, 0.0)
    return tl.where(x == -float("inf"), float("nan"), loss)


@triton.jit
def label_slope(t, pos_weight, below, above):
    """d (label_loss) / dx from sigmoid(x) and sigmoid(-x); for t of 0 or 1 one of them, to its last digit."""
    yes = t if pos_weight is None else t * pos_weight
    return (1.0 - t) * below - yes * above


@triton.jit
def label_target_slope(x, pos_weight, tail):
    """d (label_loss) / dt."""
    if pos_weight is None:
        return -x
    else:
        return pos_weight * (tl.maximum(-x, 0.0) + tail) - (tl.maximum(x, 0.0) + tail)


# torch's: how low a logarithm of a probability may be, and what the slope is divided by, at least
LOWEST_LOG = tl.constexpr(-100.0)
LEAST_SPREAD = tl.constexpr(1e-12)


@triton.jit
def clamped_logs(x):
    """(log(x), log(1 - x)), not below -100; each accurate relative to itself, where it is near 0 too."""
    return tl.maximum(tl.log(x), LOWEST_LOG), tl.maximum(log1p_from_minus_one(-x), LOWEST_LOG)


@triton.jit
def if_probability(x, number):
    """NaN for what is no probability, so that nobody has to look."""
    return tl.where((x >= 0.0) & (x <= 1.0), number, float("nan"))


@triton.jit
def probability_loss(x, t):
    """-t * log(x) - (1 - t) * log(1 - x), the logarithms clamped."""
    log_yes, log_no = clamped_logs(x)
    return if_probability(x, -(t * log_yes + (1.0 - t) * log_no))


@triton.jit
def probability_slope(x, t):
    """d (probability_loss) / dx, as torch bounds it."""
    return if_probability(x, (x - t) / tl.maximum(x * (1.0 - x), LEAST_SPREAD))


@triton.jit
def probability_target_slope(x):
    """d (probability_loss) / dt."""
    log_yes, log_no = clamped_logs(x)
    return if_probability(x, log_no - log_yes)
