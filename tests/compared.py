"""Gradients of heads and of statistics, in the form in which tests compare them."""

import torch

import lossfuse
from options import differentiated


def head_loss_and_grads(operands, target, weight=None, dloss=None, **options):
    """[loss, then the gradients of operands and target that require one]."""
    hidden, head, bias = operands
    given = {"linear_bias": bias, "weight": weight}
    loss = lossfuse.linear_cross_entropy(hidden, head, target, **given, **options)
    dloss = torch.ones_like(loss) if dloss is None else dloss.to(loss).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, requiring(*operands, target), dloss)]


def requiring(*tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def gradient_pairs(got, leaves, want, wide, ups):
    """(ours, the program's) for each leaf, of a mixture of statistics. The graphs are retained."""
    ours = differentiated(got, leaves, ups, retain_graph=True)
    return zip(ours, differentiated(want, wide, ups, retain_graph=True), strict=True)
