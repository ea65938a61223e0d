"""Every public function, forwards and backwards, on one set of tensors; and calls in several
threads."""

import threading
from types import SimpleNamespace

import torch

import lossfuse
from rows import class_weight, head_and_ids, logits_and_ids, probabilities


def tensors(device="cpu", dtype=torch.float32, *, seed=0, n=12, d=16, v=40):
    """Leaves and targets; ``into`` puts the numbers of others there."""
    hidden, weight, bias, _ = head_and_ids(n, d, v, dtype, device, seed=seed)
    logits, ids = logits_and_ids(n, v, dtype, device, seed=seed)
    soft = probabilities(n, v, dtype, device, seed=seed + 1)
    factor = torch.tensor(3.0 + seed, device=device)
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        bias=bias,
        logits=logits,
        ids=ids,
        soft=soft,
        factor=factor,
        classes=class_weight(v, device, seed=seed),
    )


def into(there, fresh):
    with torch.no_grad():
        for name, t in vars(there).items():
            t.copy_(getattr(fresh, name))


def _with_gradients(t, outputs, *leaves):
    outputs = [o for o in outputs if o is not None]
    known = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad(known, leaves, [t.factor.to(o.dtype).expand_as(o) for o in known])
    return [*(o.detach() for o in outputs), *grads]


CALLS = {
    "cross_entropy": lambda t, impl: _with_gradients(
        t, [lossfuse.cross_entropy(t.logits, t.ids, t.classes, impl=impl)], t.logits
    ),
    "cross_entropy in place": lambda t, impl: _with_gradients(
        t,
        [
            lossfuse.cross_entropy(
                t.logits * 1.0, t.ids, inplace=True, label_smoothing=0.1, impl=impl
            )
        ],
        t.logits,
    ),
    "cross_entropy none": lambda t, impl: _with_gradients(
        t,
        [
            lossfuse.cross_entropy(
                t.logits * 1.0, t.ids, inplace=True, reduction="none", softcap=9.0, impl=impl
            )
        ],
        t.logits,
    ),
    "cross_entropy of probabilities": lambda t, impl: _with_gradients(
        t, [lossfuse.cross_entropy(t.logits, t.soft, impl=impl)], t.logits, t.soft
    ),
    "cross_entropy_stats": lambda t, impl: _with_gradients(
        t, lossfuse.cross_entropy_stats(t.logits, t.ids, impl=impl), t.logits
    ),
    "linear_cross_entropy": lambda t, impl: _with_gradients(
        t,
        [lossfuse.linear_cross_entropy(t.hidden, t.weight, t.ids, linear_bias=t.bias, impl=impl)],
        t.hidden,
        t.weight,
        t.bias,
    ),
    "linear_cross_entropy none": lambda t, impl: _with_gradients(
        t,
        [lossfuse.linear_cross_entropy(t.hidden, t.weight, t.ids, reduction="none", impl=impl)],
        t.hidden,
        t.weight,
    ),
    "linear_cross_entropy_stats": lambda t, impl: _with_gradients(
        t,
        lossfuse.linear_cross_entropy_stats(t.hidden, t.weight, t.ids, impl=impl),
        t.hidden,
        t.weight,
    ),
    "log_softmax": lambda t, impl: _with_gradients(
        t, [lossfuse.log_softmax(t.logits, 1, impl=impl)], t.logits
    ),
    "nll_loss": lambda t, impl: _with_gradients(
        t, [lossfuse.nll_loss(t.logits, t.ids, t.classes)], t.logits
    ),
    "binary_cross_entropy": lambda t, impl: _with_gradients(
        t, [lossfuse.binary_cross_entropy(t.soft, t.soft.detach())], t.soft
    ),
    "binary_cross_entropy_with_logits": lambda t, impl: _with_gradients(
        t,
        [lossfuse.binary_cross_entropy_with_logits(t.logits, t.soft, impl=impl)],
        t.logits,
        t.soft,
    ),
    "binary_cross_entropy_with_logits of ids": lambda t, impl: _with_gradients(
        t,
        [
            lossfuse.binary_cross_entropy_with_logits(
                t.logits * 1.0, t.ids[:, None], inplace=True, impl=impl
            )
        ],
        t.logits,
    ),
}


def together(calls):
    """What each call gives, all of them at once."""
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
