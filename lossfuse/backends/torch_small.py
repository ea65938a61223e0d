"""Total and gradient of few logits against class ids on a CPU, in as few operators as possible.

Where N x V is small, the time is that of calling operators, some 2 us each. ``torch_rows``, which
saves memory traffic, takes about sixty of them, these formulas twenty. For the target y of a row,
with the softmax ``s`` over all other classes::

    margin = logsumexp(z_v for v != y) - z_y = max(z_v) - z_y - log(max(s))
    loss   = softplus(margin)            miss = 1 - p_y = sigmoid(margin)
    dz_v   = miss * s_v                  dz_y = -miss

The maximum is subtracted before the exponentials and the target is in no sum, so that an offset
common to a row cancels and loss and gradient stay accurate for confident predictions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# limit of the temporaries, that of ``torch_rows``
MOST_BYTES = 3 << 20


def total_and_grad(
    logits: Tensor, target: Tensor, divisor: Tensor | None, mean: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(total, dloss, dlogits) as ``row_total_and_grads`` returns them, () , () and (N, V).

    None if ``torch_rows`` must compute them: more logits, rows that are ignored or have a bad
    target, rows without a finite logit or loss.
    """
    n, v = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temporaries = 1 + (logits.dtype != dtype)
    if not 0 < n * v * dtype.itemsize * temporaries <= MOST_BYTES:
        return None
    least, most = target.aminmax()
    if least.item() < 0 or most.item() >= v or 0 <= ignore_index < v:
        return None
    y = target.unsqueeze(1)
    z = logits.to(dtype, copy=True)
    z_y = z.gather(1, y)
    z.scatter_(1, y, -torch.inf)
    grad = z.softmax(1)
    margin = (z.amax(1, keepdim=True) - z_y) - grad.amax(1, keepdim=True).log_()
    loss = F.softplus(margin)
    total = loss.sum()
    if not math.isfinite(total.item()):
        return None
    if not mean:
        dloss = torch.ones((), dtype=dtype)
    elif divisor is None:
        dloss = torch.full((), 1.0 / n, dtype=dtype)
    else:
        dloss = divisor.reciprocal()
    miss = margin.sigmoid_().mul_(dloss)
    grad.mul_(miss).scatter_(1, y, miss.neg_())
    return total * dloss, dloss, grad.to(logits.dtype)
