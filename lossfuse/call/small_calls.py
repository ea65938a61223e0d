"""Plain calls on a CPU with so few logits that the time is that of calling operators.

torch's own operators take some 25 us for the forward and backward of 4 x 10 logits, an operator of
this package with its autograd 100. Their result is as accurate as this package promises wherever no
prediction is confident, which one more operator finds out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..inputs import torch_func_active

# torch's vectors have at least eight lanes: of so many classes the sum of exponentials has at most
# 512 additions a lane
MOST_CLASSES = 4096
MOST_LOGITS = 1 << 16
# as many in float64 take less time than calling the operators
MOST_IN_FLOAT64 = 4096
# largest log-probability with which ``loss = -log(p)`` and ``p - 1`` keep the precision of float32:
# the rounding of log(p) is a small part of them
CONFIDENT = {torch.float32: -1 / 4, torch.float64: -1e-9}


def is_plain(options: tuple[object, ...], numbers: tuple[object, ...]) -> bool:
    """Return True if all options are None and all numbers 0.0."""
    return all(option is None for option in options) and all(
        type(number) is float and number == 0.0 for number in numbers
    )


def small_loss(input: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """The cross entropy of few logits (N, C) on a CPU and class ids (N,), by operators of torch.

    None if this package's operators must compute it: the call is another, the arguments are
    invalid, a row has no finite loss, or a prediction is so confident that torch loses precision.
    """
    if torch.compiler.is_compiling() or not _is_small(input, target) or not _is_eager():
        return None
    if type(ignore_index) is not int or reduction not in ("none", "mean", "sum"):
        return None
    for dtype in CONFIDENT:
        if dtype == torch.float64 and input.numel() > MOST_IN_FLOAT64:
            break
        log_probs = torch.log_softmax(input, 1, dtype=dtype)
        # read at once, on a CPU; False for NaN, which every row without a finite logit has
        if log_probs.amax().item() <= CONFIDENT[dtype]:
            return _loss(log_probs, target, ignore_index, reduction)
    return None


def _loss(log_probs: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    try:
        loss = F.nll_loss(log_probs, target, ignore_index=ignore_index, reduction=reduction)
    except IndexError:
        # a target out of range, which is reported where arguments are checked
        return None
    total = loss.sum() if reduction == "none" else loss
    return loss.float() if math.isfinite(total.item()) else None


def _is_small(input: Tensor, target: Tensor) -> bool:
    """Return True for few plain logits (N, C) on a CPU in at most float32 with ids (N,)."""
    return (
        type(input) in (Tensor, Parameter)
        and type(target) is Tensor
        and input.layout == target.layout == torch.strided
        and input.device.type == "cpu" == target.device.type
        and input.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and target.dtype == torch.int64
        and input.dim() == 2
        and target.shape == input.shape[:1]
        and 0 < input.shape[1] <= MOST_CLASSES
        and 0 < input.numel() <= MOST_LOGITS
    )


def _is_eager() -> bool:
    """Return True if operators run as they are called: no tracer, transform or mode sees them."""
    return not (
        torch_func_active() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
    )
