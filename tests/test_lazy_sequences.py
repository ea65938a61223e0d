"""Random sequences of what torch can do to the logits of a fused head: numbers and gradients as of a model without, or an error."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossfuse

B, T, D, V = 2, 4, 6, 11
IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
HEADS = {
    "linear": lambda: nn.Linear(D, V),
    "no bias": lambda: nn.Linear(D, V, bias=False),
    "tied": lambda: nn.Linear(D, V),
    "Sequential": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, V)),
}


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.embedding, self.body, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), HEADS[head]()
        if head == "tied":
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.body(self.embedding(ids))))


class Some:
    """Numbers that both models get alike."""

    def __init__(self, rng):
        self.seed = rng.randrange(10**6)
        self.factor = rng.choice([0.5, 2.0, -1.5, 3, torch.tensor(0.7), 0.0])
        self.index = rng.randrange(-3, 4)

    def like(self, *shape):
        return torch.rand(*shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def ids(self, z, *shape):
        return torch.randint(0, max(1, z.shape[-1] if z.dim() else 1), shape, generator=torch.Generator().manual_seed(self.seed))


def rows(z):
    return z.reshape(-1, z.shape[-1])


def loss(z, s, **options):
    y = s.ids(z, z.numel() // max(1, z.shape[-1]))
    return F.cross_entropy(rows(z), torch.where(s.like(len(y)) < 0.3, -100, y), reduction="sum", **options)


def entropy(z, s):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


# of elements, of rows and classes, in place, and what reads
STEPS = [
    lambda z, s: z * s.factor, lambda z, s: s.factor * z, lambda z, s: z / 1.25, lambda z, s: -z, lambda z, s: torch.tanh(z),
    lambda z, s: 3.0 * torch.tanh(z / 3.0), lambda z, s: z + s.like(z.shape[-1]), lambda z, s: z + s.like(*z.shape), lambda z, s: z - 1.0,
    lambda z, s: z.clone(), lambda z, s: z.contiguous(), lambda z, s: z.detach(), lambda z, s: z.to(torch.float64, copy=True),
    lambda z, s: z.exp(), lambda z, s: z**2, lambda z, s: z.clamp(-1, 1), lambda z, s: z + z, lambda z, s: z * z,
    lambda z, s: z[:, :-1], lambda z, s: z[..., 1:, :], lambda z, s: z[s.index], lambda z, s: z[..., :5], lambda z, s: z[..., 2:5],
    lambda z, s: z[s.like(*z.shape[:-1]) > 0.4], lambda z, s: z[torch.tensor([0, 1])], lambda z, s: z[None], lambda z, s: z[..., 0],
    lambda z, s: z.view(-1, z.shape[-1]), lambda z, s: z.flatten(0, 1), lambda z, s: z.view(B, -1, z.shape[-1]), lambda z, s: z.mT,
    lambda z, s: z.transpose(1, 2), lambda z, s: z.movedim(-1, 1), lambda z, s: z.squeeze(0), lambda z, s: z.unsqueeze(s.index),
    lambda z, s: z.split(2, 0)[0], lambda z, s: z.unbind(0)[0], lambda z, s: torch.cat([z, z * 2]), lambda z, s: z.expand(2, *z.shape),
    lambda z, s: z.mul_(1.5), lambda z, s: z.add_(s.like(z.shape[-1])), lambda z, s: (z.__setitem__((..., 0), 0.25), z)[1],
    lambda z, s: (z[..., :3].mul_(2.0), z)[1], lambda z, s: z.masked_fill_(s.like(*z.shape) > 0.8, -3.0), lambda z, s: z.tanh_(),
    lambda z, s: z.log_softmax(-1), lambda z, s: z.softmax(-1), lambda z, s: F.log_softmax(z, 1), lambda z, s: z.logsumexp(-1),
    lambda z, s: z.logsumexp(-1, keepdim=True), lambda z, s: z.argmax(-1), lambda z, s: z.max(-1)[0], lambda z, s: z.sum(-1),
    lambda z, s: z.mean(), lambda z, s: z.gather(-1, s.ids(z, *z.shape[:-1], 1)), lambda z, s: z.topk(2, -1)[0], entropy,
    lambda z, s: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1), lambda z, s: (z.softmax(-1) * (z * 2).log_softmax(-1)).sum(-1),
    loss, lambda z, s: loss(z, s, label_smoothing=0.1), lambda z, s: loss(z, s, weight=s.like(z.shape[-1]) + 0.1),
    lambda z, s: F.cross_entropy(z.transpose(1, 2), s.ids(z, *z.shape[:-1])), lambda z, s: F.cross_entropy(rows(z), s.like(*rows(z).shape)),
    lambda z, s: F.cross_entropy(rows(z), rows(z).detach().softmax(-1)), lambda z, s: F.cross_entropy(rows(z), rows(z).argmax(-1)),
    lambda z, s: F.nll_loss(rows(z.log_softmax(-1)), s.ids(z, z.numel() // z.shape[-1])),
    lambda z, s: lossfuse.cross_entropy(rows(z), rows(z)),
    lambda z, s: lossfuse.cross_entropy(rows(z), s.ids(z, z.numel() // z.shape[-1]), softcap=4.0, logit_scale=-0.5),
    lambda z, s: torch.no_grad()(lambda: z.argmax(-1))(), lambda z, s: F.kl_div(z.log_softmax(-1), s.like(*z.shape), reduction="sum"),
    lambda z, s: torch.tensor([*z.shape, z.dim(), z.numel(), z.requires_grad, z.is_leaf]), lambda z, s: torch.zeros_like(z),
]  # fmt: skip


def done(model, seed):
    """Every tensor that a random sequence of steps makes, or the error of one, and the gradients of a mixture of them."""
    rng = random.Random(seed)
    pool = [model(IDS)]
    for _ in range(rng.randrange(1, 7)):
        at = rng.randrange(len(pool)) if rng.random() < 0.5 else -1
        made = rng.choice(STEPS)(pool[at], Some(rng))
        pool.append(made)
    g = torch.Generator().manual_seed(seed)
    mixed = [(z * torch.rand(z.shape, generator=g, dtype=torch.float64)).sum() for z in pool if z.requires_grad]
    parameters = list(model.parameters())
    grads = torch.autograd.grad(sum(mixed), parameters, allow_unused=True, materialize_grads=True) if mixed else ()
    return [z.detach() + 0 for z in pool], list(grads)


def compare(seeds):
    same = 0
    for seed in seeds:
        torch.manual_seed(seed)
        model = Model(random.Random(-1 - seed).choice(list(HEADS))).double()
        fused = copy.deepcopy(model)
        lossfuse.fuse_lm_head(fused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                want = done(model, seed)
            except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
                continue
            try:
                got = done(fused, seed)
            except RuntimeError as error:
                assert "these logits were never made" in str(error), f"seed {seed}: {error}"
                continue
        try:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        same += 1
    return same


def test_a_few():
    # most of the others are errors of torch's, such as of a shape
    assert compare(range(120)) > 60


@pytest.mark.slow
def test_many():
    assert compare(range(1000, 9000)) > 4500
