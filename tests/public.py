"""Every public function, forwards and backwards, on one set of tensors; and calls in several
threads."""

import threading
from types import SimpleNamespace

import torch

import lossfuse
from rows import class_weight, head_and_ids, logits_and_ids, probabilities


def tensors(device="cpu", dtype=torch.float32, *, seed=0, n=12, d=16, v=40):
    """Leaves and targets."""
    hidden, weight, bias, _ = head_and_ids(n, d, v, dtype, device, seed=seed)
    logits, ids = logits_and_ids(n, v, dtype, device, seed=seed)
    soft = probabilities(n, v, dtype, device, seed=seed + 1)
    factor, classes = torch.tensor(3.0 + seed, device=device), class_weight(v, device, seed=seed)
    return SimpleNamespace(
        hidden=hidden, weight=weight, bias=bias, logits=logits, ids=ids, soft=soft, factor=factor,
            classes=classes
    )  # fmt: skip


def into(there, fresh):
    """Copy the numbers of other tensors into these."""
    with torch.no_grad():
        for name, t in vars(there).items():
            t.copy_(getattr(fresh, name))


binary_logits = lossfuse.binary_cross_entropy_with_logits
# name -> (a call, the leaves that get gradients)
LOSSES = {
    "cross_entropy": (lambda t, **how: lossfuse.cross_entropy(t.logits, t.ids, t.classes, **how),
        "logits"),
    "cross_entropy in place": (lambda t, **how: lossfuse.cross_entropy(t.logits * 1.0, t.ids,
        inplace=True, label_smoothing=0.1, **how), "logits"),
    "cross_entropy none": (lambda t, **how: lossfuse.cross_entropy(t.logits * 1.0, t.ids,
        inplace=True, reduction="none", softcap=9.0, **how), "logits"),
    "cross_entropy of probabilities": (lambda t, **how: lossfuse.cross_entropy(t.logits, t.soft,
        **how), "logits soft"),
    "cross_entropy_stats": (lambda t, **how: lossfuse.cross_entropy_stats(t.logits, t.ids, **how),
        "logits"),
    "cross_entropy_stats none, probabilities": (lambda t, **how: lossfuse.cross_entropy_stats(
        t.logits, t.soft, reduction="none", **how), "logits soft"),
    "linear_cross_entropy": (lambda t, **how: lossfuse.linear_cross_entropy(t.hidden, t.weight,
        t.ids, linear_bias=t.bias, **how), "hidden weight bias"),
    "linear_cross_entropy none": (lambda t, **how: lossfuse.linear_cross_entropy(t.hidden, t.weight,
        t.ids, reduction="none", **how), "hidden weight"),
    "linear_cross_entropy of probabilities": (lambda t,
        **how: lossfuse.linear_cross_entropy(t.hidden, t.weight, t.soft, label_smoothing=0.1,
        **how), "hidden weight soft"),
    "linear_cross_entropy_stats": (lambda t, **how: lossfuse.linear_cross_entropy_stats(t.hidden,
        t.weight, t.ids, **how), "hidden weight"),
    "linear_cross_entropy_stats none": (lambda t, **how: lossfuse.linear_cross_entropy_stats(
        t.hidden, t.weight, t.ids, reduction="none", **how), "hidden weight"),
    "log_softmax": (lambda t, **how: lossfuse.log_softmax(t.logits, 1, **how), "logits"),
    # the next two take no impl
    "nll_loss": (lambda t, impl, **how: lossfuse.nll_loss(t.logits, t.ids, t.classes, **how),
        "logits"),
    "binary_cross_entropy": (lambda t, impl, **how: lossfuse.binary_cross_entropy(t.soft,
        t.soft.detach(), **how), "soft"),
    "binary_cross_entropy_with_logits": (lambda t, **how: binary_logits(t.logits, t.soft, **how),
        "logits soft"),
    "binary_cross_entropy_with_logits of ids": (lambda t, **how: binary_logits(t.logits * 1.0,
        t.ids[:, None], inplace=True, **how), "logits"),
}  # fmt: skip


def outputs_and_gradients(t, call, leaves):
    """[outputs, then gradients of the leaves], of ``t.factor`` upstream for every output."""
    got = call()
    outputs = [o for o in (got if isinstance(got, tuple) else (got,)) if o is not None]
    known = [o for o in outputs if o.requires_grad]
    ups = [t.factor.to(o.dtype).expand_as(o) for o in known]
    grads = torch.autograd.grad(known, [getattr(t, name) for name in leaves.split()], ups)
    return [*(o.detach() for o in outputs), *grads]


def _with_gradients(loss, leaves):
    return lambda t, impl: outputs_and_gradients(t, lambda: loss(t, impl=impl), leaves)


CALLS = {name: _with_gradients(*of) for name, of in LOSSES.items()}


def together(calls):
    """The result of each call, all of them run at once in threads."""
    start, results = threading.Barrier(len(calls)), [None] * len(calls)

    def work(i):
        start.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    callers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(600)
        assert not caller.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
