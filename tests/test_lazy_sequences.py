"""Random sequences of what torch can do to the logits of a fused head: numbers and gradients as of
a model without, or an error."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossfuse
from tiny_models import idioms

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

    def __init__(self, rng, other=None):
        # logits of another call of the head
        self.other = other
        self.seed = rng.randrange(10**6)
        self.factor = rng.choice([0.5, 2.0, -1.5, 3, torch.tensor(0.7), 0.0])
        self.index = rng.randrange(-3, 4)

    def like(self, *shape):
        return torch.rand(
            *shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64
        )

    def ids(self, z, *shape):
        return torch.randint(
            0,
            max(1, z.shape[-1] if z.dim() else 1),
            shape,
            generator=torch.Generator().manual_seed(self.seed),
        )


def rows(z):
    return z.reshape(-1, z.shape[-1])


def loss(z, s, **options):
    y = s.ids(z, z.numel() // max(1, z.shape[-1]))
    return F.cross_entropy(
        rows(z), torch.where(s.like(len(y)) < 0.3, -100, y), reduction="sum", **options
    )


def entropy(z, s):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def one_for_each_row(z, s):
    return s.ids(z, *z.shape[:-1])


def categorical(z, s):
    made = torch.distributions.Categorical(logits=z)
    return made.log_prob(one_for_each_row(z, s)) + made.entropy()


def with_extremes(z, s):
    """Rows that are equal, of which each has a part in the gradient of the largest."""
    return torch.stack([z, z]).max() + z.min()


# of z, logits or what a step before has computed from them, and s, of class Some
TABLE = idioms("z, s", globals(), """
z * s.factor;  s.factor * z;  z / 1.25;  -z;  torch.tanh(z);  3.0 * torch.tanh(z / 3.0)
z + s.like(z.shape[-1]);  z + s.like(*z.shape);  z - 1.0;  z.clone();  z.contiguous();  z.detach()
z.to(torch.float64, copy=True);  z.exp();  z**2;  z.clamp(-1, 1);  z + z;  z * z;  z[:, :-1]
z[..., 1:, :];  z[s.index];  z[..., :5];  z[..., 2:5];  z[s.like(*z.shape[:-1]) > 0.4]
z[torch.tensor([0, 1])];  z[None];  z[..., 0];  z.view(-1, z.shape[-1]);  z.flatten(0, 1)
z.view(B, -1, z.shape[-1]);  z.mT;  z.transpose(1, 2);  z.movedim(-1, 1);  z.squeeze(0)
z.unsqueeze(s.index);  z.split(2, 0)[0];  z.unbind(0)[0];  torch.cat([z, z * 2])
z.expand(2, *z.shape);  z.mul_(1.5);  z.add_(s.like(z.shape[-1]))
(z.__setitem__((..., 0), 0.25), z)[1];  (z[..., :3].mul_(2.0), z)[1]
z.masked_fill_(s.like(*z.shape) > 0.8, -3.0);  z.tanh_();  z.log_softmax(-1);  z.softmax(-1)
F.log_softmax(z, 1);  z.logsumexp(-1);  z.logsumexp(-1, keepdim=True);  z.argmax(-1);  z.max(-1)[0]
z.sum(-1);  z.mean();  z.gather(-1, s.ids(z, *z.shape[:-1], 1));  z.topk(2, -1)[0];  entropy(z, s)
z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1);  (z.softmax(-1) * (z * 2).log_softmax(-1)).sum(-1)
loss(z, s);  loss(z, s, label_smoothing=0.1);  loss(z, s, weight=s.like(z.shape[-1]) + 0.1)
F.cross_entropy(z.transpose(1, 2), s.ids(z, *z.shape[:-1]))
F.cross_entropy(rows(z), s.like(*rows(z).shape))
F.cross_entropy(rows(z), rows(z).detach().softmax(-1))
F.cross_entropy(rows(z), rows(z).argmax(-1))
F.nll_loss(rows(z.log_softmax(-1)), s.ids(z, z.numel() // z.shape[-1]))
lossfuse.cross_entropy(rows(z), rows(z))
lossfuse.cross_entropy(rows(z), s.ids(z, z.numel() // z.shape[-1]), softcap=4.0, logit_scale=-0.5)
torch.no_grad()(lambda: z.argmax(-1))()
F.kl_div(z.log_softmax(-1), s.like(*z.shape), reduction="sum")
torch.tensor([*z.shape, z.dim(), z.numel(), z.requires_grad, z.is_leaf]);  torch.zeros_like(z)
z.select(s.index % z.dim(), 0);  z.narrow(s.index % z.dim(), 0, 1);  z.unbind(1)[-1]
z.split([1, z.shape[1] - 1], 1)[1];  z.chunk(2, s.index % 2)[-1];  z.tensor_split(2, 1)[0]
z.index_select(s.index % 2, torch.tensor([0, 0, 1]));  z[[1, 0, 1]];  z[:, [0, 2]];  z[0, None]
z[..., None, :];  z[torch.tensor([[0, 1], [1, 0]])];  z[::2]
z[torch.arange(z.shape[0])[:, None], torch.tensor([0, 1])]
z[:, torch.tensor([True, False, True, True])];  torch.stack(list(z), 1)
torch.cat([z[:1], z, z[1:]], 0);  torch.cat(z.unbind(1));  torch.cat([z * 2, z * 2], 1)
torch.cat([z, z.detach()]);  z.repeat(2, *[1] * (z.dim() - 1));  z.repeat_interleave(2, s.index % 2)
z.repeat_interleave(torch.tensor([2, 1]), 0);  z.flip(0, 1);  z.flip(s.index % z.dim())
z.roll(1, s.index % 2);  z.permute(*range(z.dim())[::-1]);  z.transpose(0, 1)
z.transpose(s.index % z.dim(), 0);  z.unflatten(0, (-1, 2));  z.squeeze()
z.flatten(s.index % 2, 1);  z.expand(-1, *z.shape[1:])
torch.take_along_dim(z, torch.tensor([[[1], [0]]]), 1);  z.movedim(0, 1)
z.gather(0, torch.tensor([[[1]]]).expand(1, *z.shape[1:]));  torch.no_grad()(lambda: z[:, 1:])()
torch.cat([z, s.other]);  torch.stack([s.other, z]);  torch.cat([s.other[:, 1:], z], 1)
torch.cat([z * 2, s.other * 2, z * 2]);  s.other
torch.cat([z.log_softmax(-1), s.other.log_softmax(-1)]);  s.other - z
(torch.cat([z, s.other]), s.other.mul_(2.0))[0];  z / (s.like(*z.shape[:-1], 1) + 0.5)
z * s.like(z.shape[0], *[1] * (z.dim() - 1)).requires_grad_()
z * torch.nn.Parameter(s.like(()) + 0.5);  z - z.logsumexp(-1, keepdim=True);  z.div(0.7)
z - z.detach().max(-1, keepdim=True)[0];  z - z.amax(-1, keepdim=True);  1.0 - z
z.masked_fill(s.like(z.shape[-1]) > 0.7, -5.0);  z.masked_fill(s.like(*z.shape[:-1], 1) > 0.7, -2.0)
torch.where(s.like(z.shape[-1]) > 0.5, z, -z);  z.clamp(min=-0.5);  z > 0.1;  (z > 0.1).double()
z.sigmoid();  F.softplus(z);  torch.no_grad()(z.softmax)(-1);  z.softmax(-1).log();  z.detach() * z
torch.sin(z);  z.relu();  z.abs() + 1e-3;  z[..., [1, 3]];  z[:, -1, [2, 0, 2]];  z[..., -2]
z.select(-1, 1);  z[0, :, torch.tensor([[1, 2], [0, 0]])];  z[..., s.like(z.shape[-1]) > 0.6]
z[..., 1:];  z.index_select(-1, torch.tensor([4, 1]));  z.narrow(-1, 1, 3);  z[..., ::2]
rows(z)[torch.arange(len(rows(z))), one_for_each_row(rows(z), s)]
z.gather(-1, s.ids(z, *z.shape[:-1], 3))
z[torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([[2], [3]])]
z[:, torch.tensor([0, 1]), torch.tensor([-1, 3])];  z.take_along_dim(s.ids(z, *z.shape[:-1], 2), -1)
z[s.like(*z.shape[:-1]) > 0.5, 1];  z.div_(0.7);  z.detach().mul_(2.0);  z.sub_(1.0)
z.clamp_(-1.0, 1.0);  (z.__setitem__((..., slice(4, None)), -7.0), z)[1]
(z.__setitem__((..., [0, 2]), -3.0), z * 1.5)[1];  (z.clone().mul_(3.0), z)[1]
(z[..., 0].mul_(2.0), z)[1];  (z[0].neg_(), z)[1];  (z.__setitem__((..., 1), z[..., 1] + 1.0), z)[1]
torch.no_grad()(z.mul_)(2.0);  z.__imul__(2.0);  z.max(-1, keepdim=True)[0];  z.max();  z.min(-1)[0]
z.amin(-1);  with_extremes(z, s);  z.mean(-1, keepdim=True);  z.mean((0, -1));  z.sum()
z.sum((0, 1, 2), keepdim=True);  z.mean(0);  z.std(-1) if z.dim() > 1 else z
torch.linalg.vector_norm(z, dim=-1);  z.norm(dim=-1)
(z.topk(3, -1)[1] == one_for_each_row(z, s)[..., None]).any(-1);  torch.isnan(z).any()
z.isfinite().all();  (z > 0.1).sum(-1);  (z < -0.03).any(-1, keepdim=True)
(z > 0.07).double().mean();  categorical(z, s)
-(s.like(*z.shape).softmax(-1) * z.log_softmax(-1)).sum(-1)
(F.one_hot(one_for_each_row(z, s), z.shape[-1]) * z).sum(-1)
F.kl_div(z.log_softmax(-1), s.like(*z.shape).softmax(-1), reduction="batchmean")
F.mse_loss(z, s.like(*z.shape));  F.mse_loss(z, (z * 0.5).detach(), reduction="none")
F.l1_loss(s.like(*z.shape), z, reduction="sum")
F.cross_entropy(rows(z), (rows(z) * 0.5).softmax(-1))
(z.softmax(-1) * (z.log_softmax(-1) - s.like(z.shape[-1]))).sum(-1)
F.nll_loss(rows(z), one_for_each_row(rows(z), s), weight=s.like(z.shape[-1]))
F.multi_margin_loss(rows(z), one_for_each_row(rows(z), s))
F.binary_cross_entropy_with_logits(z[..., -1, 1], s.like(*z.shape[:-2]))
(z.softmax(-1).square()).sum(-1)
""")  # fmt: skip
STEPS = list(TABLE.values())


def done(model, seed):
    """Every tensor that a random sequence of steps makes, or the error of one, and the gradients of
    a mixture of them."""
    rng = random.Random(seed)
    pool, other = [model(IDS)], model(IDS.flip(1))
    for _ in range(rng.randrange(1, 7)):
        at = rng.randrange(len(pool)) if rng.random() < 0.5 else -1
        made = rng.choice(STEPS)(pool[at], Some(rng, other))
        pool.append(made)
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.rand(z.shape, generator=g, dtype=torch.float64) for z in pool]
    # a view that was taken under no_grad requires grad in torch, and has no graph
    mixed = [(z * u).sum() for z, u in zip(pool, upstream, strict=True) if z.requires_grad]
    parameters = list(model.parameters())
    grads = (
        torch.autograd.grad(sum(mixed), parameters, allow_unused=True, materialize_grads=True)
        if mixed
        else ()
    )
    return [z.detach().cpu() + 0 for z in pool], list(grads)


def compare(seeds):
    same = 0
    for seed in seeds:
        torch.manual_seed(seed)
        model = Model(random.Random(-1 - seed).choice(list(HEADS))).double()
        fused = copy.deepcopy(model)
        # chunks of 3 rows of 16 float64
        lossfuse.fuse_lm_head(fused, options=lossfuse.LinearOptions(chunk_bytes=3 * 16 * 8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                want = done(model, seed)
            except (
                RuntimeError,
                IndexError,
                ValueError,
                TypeError,
                AttributeError,
                ZeroDivisionError,
            ):
                continue
            try:
                got = done(fused, seed)
            except RuntimeError as error:
                assert "these logits were never made" in str(error), f"seed {seed}: {error}"
                continue
        try:
            for mine, stock in zip(
                [t for part in got for t in part], [t for part in want for t in part], strict=True
            ):
                # an exponential of a sum over all logits has gradients of 1e16 that cancel
                size = (
                    float(stock.double().abs().nan_to_num(1.0, 1.0).max()) if stock.numel() else 0.0
                )
                torch.testing.assert_close(
                    mine, stock, rtol=1e-8, atol=1e-9 * max(1.0, size), equal_nan=True
                )
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        same += 1
    return same


@pytest.mark.parametrize(
    ("seeds", "least"),
    [
        # most of the others are errors of torch's, such as of a shape
        pytest.param(range(120), 60, id="few"),
        pytest.param(range(1000, 9000), 4500, id="many", marks=pytest.mark.slow),
    ],
)
def test_random_sequences_equal_torch(seeds, least):
    assert compare(seeds) > least
