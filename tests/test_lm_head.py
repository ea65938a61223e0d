"""``fuse_lm_head`` on a small model in plain torch: everything that may be done with its logits is
what it was, or raises."""

import contextlib
import copy
import io
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lossfuse
from allocations import Largest
from tiny_models import idioms

B, T, D, V = 2, 6, 8, 37
SMALL = lossfuse.LinearOptions(chunk_bytes=2 * 48 * 4)


class Lora(nn.Module):
    """A wrapper with its own second path."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)

    def forward(self, x, *args, **kwargs):
        return self.base(x, *args, **kwargs) + 2.0 * self.b(self.a(x))


class OtherLinear(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight * 1.5, self.bias)


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(D, V))


HEADS = {
    "linear": lambda: nn.Linear(D, V, bias=False),
    "linear with a bias": lambda: nn.Linear(D, V),
    "tied": lambda: nn.Linear(D, V, bias=False),
    "Sequential": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, V)),
    "LoRA": lambda: Lora(nn.Linear(D, V)),
    "subclass": lambda: OtherLinear(D, V),
    "parametrized weight": parametrized,
}


class Tiny(nn.Module):
    """As nanoGPT: embedding, something, head."""

    def __init__(self, head="linear with a bias", cap=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.lm_head = HEADS[head]()
        self.cap = cap
        if head == "tied":
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        z = self.lm_head(torch.tanh(self.body(self.embedding(ids))) * 3)
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


def fuse_any(model, **options):
    """As a caller does who knows that the heads of his own compute every row alone."""
    return lossfuse.fuse_lm_head(model, row_wise=True, **options)


IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
TARGET = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(4))
TARGET[0, :2] = -100
VALID = TARGET.clamp(min=0)
PROBABILITIES = torch.rand(B, T, V, generator=torch.Generator().manual_seed(5)).softmax(-1)
CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(6)) + 0.1
ROW = torch.randn(V, generator=torch.Generator().manual_seed(7))
MASK = TARGET != -100


def ce(z, target=TARGET, **options):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), target.reshape(-1), **options)


# what is done to logits and recorded -> logits again
RECORDED = idioms("z", globals(), """
z;  z * 0.7;  0.7 * z;  z * torch.tensor(0.7);  torch.mul(input=z, other=0.7);  z / 1.7;  -z
2.0 * torch.tanh(z / 2.0);  torch.tanh(z) * -2.0;  3.0 * torch.tanh(z * 0.5 / 3.0)
(3.0 * torch.tanh(z / 3.0)) / 0.5;  z + ROW;  ROW[None, None] + z
2.0 * torch.tanh((z * 0.5 + ROW) / 2.0);  z.float();  z.to(torch.float32)
z.to(torch.float32, copy=True);  z.type_as(ROW);  z.contiguous();  z.clone()
z[..., :, :][:, :, :V];  z.view(-1, V);  z.view_as(PROBABILITIES);  z.flatten(0, 1)
z.unsqueeze(1).squeeze(1);  z[torch.ones(B, T, dtype=torch.bool)]
z.transpose(1, 2).transpose(-1, 1);  z.permute(0, 2, 1).movedim(1, -1);  torch.stack(z.unbind(0))
torch.stack(list(z), 1);  torch.cat(z.split([1, 2, T - 3], 1), 1)
torch.cat(z.chunk(2, 1)[::-1], 1);  torch.cat(z.view(-1, V).tensor_split(5))
torch.cat([z.select(0, 1), z.narrow(0, 0, 1)[0]]);  z.index_select(1, torch.arange(T).flip(0))
z[[1, 0]];  z[torch.arange(B)[:, None], torch.arange(T).flip(0)];  z[:, None, ..., :]
torch.take_along_dim(z, torch.randperm(T, generator=torch.Generator().manual_seed(8))[None, :,
    None], 1)
z.transpose(0, 1).reshape(-1, V);  z.flip(0).roll(1, 1);  z.unflatten(1, (-1, 2))
z[None].squeeze();  z.expand(B, -1, V);  z[:1].repeat(B, 1, 1);  z[:, :3].repeat_interleave(2, 1)
z - 1.0;  z - ROW;  1.0 - z;  z * torch.full((), 1.3, requires_grad=True)
z / torch.linspace(0.5, 2.0, T)[:, None];  z.clamp(-0.5, 0.5);  torch.where(ROW > 0, z, z * 0.5)
z.masked_fill(ROW > 1.0, -5.0);  z.masked_fill(PROBABILITIES > 0.035, -5.0);  z.double()
(z * 0.7).double()
z.mul_(2.0);  z.__itruediv__(2.0);  (z.__setitem__((..., slice(30, None)), -7.0), z)[1]
z.clone().add_(ROW);  z.to(torch.float32, copy=True).sub_(1.0)
""")  # fmt: skip
# what is read -> a number
READERS = idioms("z", globals(), """
ce(z);  ce(z, reduction="sum");  (ce(z, reduction="none") * torch.linspace(-1, 1, B * T)).sum()
ce(z, weight=CLASS_WEIGHT);  ce(z, weight=CLASS_WEIGHT, reduction="sum")
ce(z, label_smoothing=0.2);  ce(z, label_smoothing=0.2, weight=CLASS_WEIGHT)
ce(z, TARGET.masked_fill(TARGET == -100, -1), ignore_index=-1)
ce(z[..., :-1, :].contiguous(), TARGET[:, 1:]);  F.cross_entropy(z[MASK], TARGET[MASK])
F.cross_entropy(z.transpose(1, 2), TARGET)
F.cross_entropy(z.reshape(-1, V), PROBABILITIES.reshape(-1, V))
F.cross_entropy(z.transpose(1, 2), PROBABILITIES.transpose(1, 2), label_smoothing=0.1)
F.cross_entropy(z[1, 2], TARGET[1, 2])
nn.CrossEntropyLoss(reduction="sum")(z.view(-1, V), TARGET.view(-1))
F.cross_entropy(input=z.view(-1, V), target=TARGET.view(-1))
lossfuse.cross_entropy(z.view(-1, V), TARGET.view(-1), softcap=4.0, logit_scale=0.9,
    lse_square_scale=1e-2)
lossfuse.cross_entropy(z.view(-1, V), TARGET.view(-1), normalizer=5.0)
lossfuse.cross_entropy(z.transpose(1, 2), TARGET, row_weight=ROW[:B * T].view(B, T))
of_our_statistics(z)
F.nll_loss(F.log_softmax(z, dim=-1).view(-1, V), TARGET.view(-1))
nn.NLLLoss(CLASS_WEIGHT)(nn.LogSoftmax(-1)(z.view(-1, V)), TARGET.view(-1))
lossfuse.nll_loss(lossfuse.log_softmax(z, -1).view(-1, V), TARGET.view(-1), CLASS_WEIGHT)
z.log_softmax(-1).gather(-1, VALID.unsqueeze(-1)).squeeze(-1).sum()
torch.gather(z, -1, VALID.unsqueeze(-1)).sum();  z.softmax(-1).gather(-1, VALID.unsqueeze(-1)).sum()
torch.take_along_dim(torch.log_softmax(input=z, dim=-1), VALID.unsqueeze(-1), dim=-1).sum()
(z.gather(-1, VALID.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, dim=-1)).sum()
(z.logsumexp(-1, keepdim=True) ** 2).sum();  (z.transpose(1, 2).logsumexp(1) ** 2).sum()
(lambda lp: -(lp.exp() * lp).sum(-1))(F.log_softmax(z, dim=-1)).sum()
(z.logsumexp(-1) - (z.softmax(-1) * z).sum(dim=-1)).sum();  smoother(z)
ce(z) + (z.argmax(-1) == TARGET).sum() + z.view(-1, V).argmax(dim=1, keepdim=True).sum()
F.log_softmax(z, -1).sum(-1, keepdim=True).sum()
torch.stack([row.gather(-1, ids[:, None])[:, 0] - row.logsumexp(-1) for row, ids in zip(z, VALID,
    strict=True)]).sum()
torch.cat([entropy(part) for part in z.view(-1, V).split(5)]).square().sum()
F.log_softmax(z.view(-1, V), -1)[torch.arange(B * T), VALID.view(-1)].sum()
z[:, torch.arange(T), torch.arange(T)].square().sum()
z.log_softmax(-1).gather(-1, torch.stack([VALID, VALID, VALID.flip(0)], -1)).square().sum()
F.cross_entropy(z[:, -1, [5, 9]] * 2.0, torch.tensor([0, 1]))
F.cross_entropy((z + ROW)[..., 3:9].reshape(-1, 6), torch.zeros(B * T, dtype=torch.int64))
F.binary_cross_entropy_with_logits(2.0 * torch.tanh(z / 2.0)[:, -1, 7], torch.ones(B))
z[..., 1:].logsumexp(-1).square().sum()
z.max(-1).values.square().sum() + z.amax(-1, keepdim=True).sum() + z.min(-1)[0].sum()
z.max() + z.view(-1, V).min()
z.mean(-1).square().sum() + z.std(-1).sum() + z.mean() + z.norm(dim=-1).sum()
(z**2).sum() + z.sum((0, 2)).square().sum()
z.gather(1, torch.arange(T).flip(0)[None, :, None].expand(B, T, V)).logsumexp(-1).prod(-1).sum()
z.topk(3, -1).values.square().sum() + (z.topk(3, -1).indices == TARGET[..., None]).any(-1).sum()
ce(z) + torch.isnan(z).any() + z.isinf().any() + torch.isfinite(z).all()
of_categorical(z)
(torch.log(z.softmax(-1)) * PROBABILITIES).sum()
(torch.no_grad()(z.softmax)(-1) * z.log_softmax(-1)).sum()
-(PROBABILITIES * z.log_softmax(-1)).sum(-1).square().mean()
F.kl_div(z.log_softmax(-1), PROBABILITIES, reduction="batchmean") + F.kl_div(z, PROBABILITIES,
    reduction="sum")
-(F.one_hot(VALID, V) * z.log_softmax(-1)).sum(-1).square().mean()
F.cross_entropy(z.view(-1, V), (z * 0.5).softmax(-1).view(-1, V))
F.mse_loss(z, PROBABILITIES) + F.l1_loss(PROBABILITIES, z, reduction="sum")
F.multi_margin_loss(z.view(-1, V), VALID.view(-1))
F.nll_loss((z * 0.5 - 1.0).sigmoid().log().view(-1, V), TARGET.view(-1), weight=CLASS_WEIGHT)
ce(z.clamp(-1, 1), weight=CLASS_WEIGHT, label_smoothing=0.1)
ce(torch.cat([z, z]), torch.cat([TARGET, TARGET.flip(0)]))
""")  # fmt: skip


def of_our_statistics(z):
    read = lossfuse.cross_entropy_stats(z.view(-1, V), TARGET.view(-1), reduction="none")
    return read.lse.mean() + read.entropy.sum()


def of_categorical(z):
    read = torch.distributions.Categorical(logits=z)
    return read.log_prob(VALID).sum() + read.entropy().square().sum()


def entropy(z):
    p = z.softmax(-1)
    return z.logsumexp(-1) - (p * z).sum(-1)


def smoother(z):
    """transformers.trainer_pt_utils.LabelSmoother.__call__, its lines on logits."""
    logits, labels = z[..., :-1, :].contiguous(), TARGET[..., 1:].contiguous()
    log_probs = -nn.functional.log_softmax(logits, dim=-1)
    labels = labels.unsqueeze(-1)
    padding_mask = labels.eq(-100)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    active = padding_mask.numel() - padding_mask.long().sum()
    return 0.9 * nll_loss.sum() / active + 0.1 * smoothed_loss.sum() / (
        active * log_probs.shape[-1]
    )


def gradients(model, read, ids=IDS):
    model.zero_grad(set_to_none=True)
    loss = read(model(ids))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def same(model, read, *, rtol=2e-5, atol=2e-6, vouched=True):
    """Loss and every gradient, stock and fused; the fused model's report."""
    lossfuse.unfuse_lm_head(model)
    want, want_grads = gradients(model, read)
    report = lossfuse.fuse_lm_head(model, options=SMALL, row_wise=vouched)
    got, grads = gradients(model, read)
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    for name, g in want_grads.items():
        assert (g is None) == (grads[name] is None), name
        if g is not None:
            torch.testing.assert_close(
                grads[name],
                g,
                rtol=rtol,
                atol=atol * max(1.0, float(g.abs().max())),
                msg=lambda m, n=name: f"{n}: {m}",
            )
    return report


@pytest.mark.parametrize("name", READERS)
def test_reading_logits_is_fused_and_equals_torch(name):
    report = same(Tiny(), READERS[name])
    assert report.fused and not report.made


@pytest.mark.parametrize("name", RECORDED)
def test_operations_before_a_loss_are_recorded_and_equal_torch(name):
    report = same(Tiny(), lambda z: ce(RECORDED[name](z)))
    assert report.fused == {"cross_entropy": 1} and not report.made


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_operations_are_materialized_bit_for_bit(name):
    model = Tiny()
    want = RECORDED[name](model(IDS))
    report = lossfuse.fuse_lm_head(model)
    lazy = RECORDED[name](model(IDS))
    for ask in ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf"):
        assert getattr(lazy, ask) == getattr(want, ask)
    for ask in ("size", "dim", "numel", "__len__", "stride", "is_contiguous", "storage_offset"):
        # how rows that a mask takes lie follows from its values
        if "torch.bool" not in name or ask in ("size", "dim", "numel", "__len__"):
            assert getattr(lazy, ask)() == getattr(want, ask)()
    assert not report.made
    with pytest.warns(
        UserWarning,
        match=r"sin materializes the logits of a fused head, shape \(2, 6\) times 37 classes",
    ) as warned:
        made = torch.sin(lazy)
    assert (
        torch.equal(made, torch.sin(want)) and len(warned) == 1 and warned[0].filename == __file__
    )
    assert report.made == {"sin": 1} and not report.fused
    # the second time there is no warning, and nothing is computed again
    assert torch.equal(torch.sin(lazy), made) and report.made == {"sin": 1}


def test_an_operator_that_refuses_an_operand_materializes_nothing():
    model = Tiny()
    report = lossfuse.fuse_lm_head(model)
    one_class = model(IDS)[..., 3]
    assert (one_class == "a") is False
    with pytest.raises(TypeError):
        object() - one_class
    assert not report.made


TWO_CALLS = idioms("z, y", globals(), """
ce(torch.cat([z, y]), torch.cat([TARGET, TARGET.flip(0)]))
ce(torch.cat([y[:, 1:] * 0.5, z * 0.5], 1), torch.cat([TARGET[:, 1:], TARGET], 1))
torch.stack([z, y]) .log_softmax(-1) .gather(-1, torch.stack([VALID, VALID]).unsqueeze(-1))
    .square() .sum()
ce(torch.cat([z, y, z]), torch.cat([TARGET] * 3)) + z.logsumexp(-1).square().sum() + ce(y)
""")  # fmt: skip


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("head", ["linear", "tied"])
def test_rows_of_two_calls_of_a_head_are_joined(name, head):
    found = []
    for fuse in (False, True):
        model = Tiny(head)
        report = lossfuse.fuse_lm_head(model, options=SMALL) if fuse else None
        loss = TWO_CALLS[name](model(IDS), model(IDS.flip(0)))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=5e-5, atol=1e-5)
    assert report.fused and not report.made


def test_joined_rows_are_what_they_were_when_a_call_is_written_to():
    model = Tiny("linear")
    z, y = model(IDS), model(IDS.flip(0))
    want = torch.cat([z, y]).detach() * 1.0
    report = lossfuse.fuse_lm_head(model)
    z, y = model(IDS), model(IDS.flip(0))
    both = torch.cat([z, y])
    with pytest.warns(UserWarning, match="abs_ materializes"):
        y.abs_()
    assert torch.equal(both.detach(), want) and report.made == {"abs_": 1}
    with pytest.raises(RuntimeError, match="retain_grad needs the gradient"):
        z, y = model(IDS), model(IDS.flip(0))
        ce(torch.cat([z, y]), torch.cat([TARGET, TARGET]))
        y.retain_grad()


# of a tensor, for which values are not needed
QUESTIONS = idioms("z", globals(), """
z._is_view();  z.is_conj();  z.is_neg();  z.is_inference();  z.is_shared();  z.is_pinned()
z.is_signed();  z.dim_order();  z.stride();  z.get_device();  z.is_mkldnn;  z.is_xla;  z.is_mtia
z.output_nr;  z.retains_grad;  z.itemsize
torch.result_type(torch.zeros(3, dtype=torch.float16), z)
z.is_same_size(torch.zeros(z.shape));  torch.zeros_like(z);  z.new_ones(2, 3)
torch.full_like(z, 2, dtype=torch.int64);  torch.empty_like(z).stride()
""")  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize(
    "part",
    [lambda z: z, lambda z: z[:, 1:], lambda z: z.transpose(1, 2)],
    ids=["whole", "a part", "transposed"],
)
def test_questions_that_need_no_values_are_answered_without_them(name, part):
    want = QUESTIONS[name](part(Tiny("linear")(IDS)))
    model = Tiny("linear")
    report = lossfuse.fuse_lm_head(model)
    got = QUESTIONS[name](part(model(IDS)))
    assert type(got) is type(want) and not report.made
    if isinstance(want, torch.Tensor):
        assert got.stride() == want.stride() and torch.equal(got, want)
    else:
        assert got == want


ON_ALL_HEADS = idioms("z", globals(), """
ce(z);  ce(z, label_smoothing=0.2, weight=CLASS_WEIGHT)
lossfuse.cross_entropy(z.transpose(1, 2), TARGET, row_weight=ROW[:B * T].view(B, T))
F.cross_entropy(z.reshape(-1, V), PROBABILITIES.reshape(-1, V));  of_our_statistics(z)
z.log_softmax(-1).gather(-1, VALID.unsqueeze(-1)).squeeze(-1).sum()
""")  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ON_ALL_HEADS)
def test_losses_are_fused_with_every_kind_of_head(head, name):
    """Those that are not linear make a chunk of logits at a time, and again in the backward."""
    report = same(Tiny(head, cap=3.0), ON_ALL_HEADS[name])
    assert report.fused and not report.made


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
def test_a_loss_of_the_first_classes_equals_torch(head):
    target = TARGET.clamp(max=V - 4)
    report = same(Tiny(head), lambda z: ce(z[..., : V - 3].float(), target))
    assert report.fused == {"cross_entropy": 1} and not report.made


# of logits (rows, V) and ids
WITHOUT_LOGITS = idioms("z, y", globals(), """
ce(z, y);  ce(z.clamp(-1, 1), y);  ce(z.masked_fill(ROW > 1.0, -5.0), y)
ce(z / torch.full((len(z), 1), 1.5, requires_grad=True), y)
sum(ce(part, ids) for part, ids in zip(z.split(99), y.split(99), strict=True))
ce(torch.cat([z[:200], z[200:]]), y);  z.max(-1)[0].sum() + z.max();  z.topk(2, -1)[0].sum()
z.mean() + z.sum(-1).mean();  z.isnan().any() + ce(z, y)
entropy(z / torch.full((len(z), 1), 1.5)).sum()
(lambda c: (c.log_prob(y) + c.entropy()).sum())(torch.distributions.Categorical(logits=z))
z.log_softmax(-1)[torch.arange(len(z)), y].sum();  z[:, 3].sum() + z[:, [1, 2]].sum()
""")  # fmt: skip


@pytest.mark.parametrize("head", ["linear", "LoRA"])
@pytest.mark.parametrize("name", WITHOUT_LOGITS)
def test_no_tensor_of_all_logits(name, head):
    """Forward and backward of training, watched operator by operator."""
    model = Tiny(head, cap=3.0)
    ids, target = (torch.randint(0, V, (16, 33)) for _ in range(2))
    for fuse in (False, True):
        if fuse:
            fuse_any(model, options=lossfuse.LinearOptions(chunk_bytes=64 * 48 * 4))
        with Largest() as largest:
            WITHOUT_LOGITS[name](
                model(ids)[..., :-1, :].float().flatten(0, 1), target[:, 1:].flatten()
            ).backward()
        logits = 16 * 32 * V * 4
        assert (largest.bytes < logits / 3) == fuse
    report = fuse_any(model)
    assert report.fused and not report.made


# --- autograd


def test_detached_logits_have_no_gradient():
    """No gradient, in whichever way it is cut."""
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    assert z.requires_grad and not z.is_leaf and z.grad_fn is not None
    assert (
        not z.detach().requires_grad
        and not ce(z.detach()).requires_grad
        and not z.detach().logsumexp(-1).requires_grad
    )
    with torch.no_grad():
        cut = z[:, :-1] * 2
        assert not ce(z).requires_grad
    assert not cut.requires_grad and not ce(cut, TARGET[:, 1:]).requires_grad
    bias = torch.zeros(V, requires_grad=True)
    ce(z.detach() + bias).backward()
    assert bias.grad is not None and all(p.grad is None for p in model.parameters())
    assert ce(z).requires_grad


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
def test_gradient_of_an_added_bias(head):
    grads = []
    for fuse in (False, True):
        model, bias = Tiny(head), ROW.clone().requires_grad_()
        if fuse:
            report = fuse_any(model)
        ce(model(IDS) * 0.5 + bias).backward()
        grads.append((bias.grad, model.body.weight.grad))
    torch.testing.assert_close(grads[1], grads[0])
    assert not report.made


class Squares(torch.autograd.Function):
    """A user's loss, which autograd calls without ``__torch_function__``."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z * z).sum()

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return 2 * g * z


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):
        return -g


class AsItIs(Reversed):
    @staticmethod
    def forward(ctx, z):
        return z


def hooked(z):
    z.register_hook(lambda g: 3 * g)
    return ce(z)


def retained(z):
    z.retain_grad()
    ce(z).backward(retain_graph=True)
    return (z.grad.clone() * z).sum()


def divided(z):
    twice = z * 2
    view = twice[:, :-1]
    twice.div_(3)
    return (view**2).sum()


def assigned(z):
    scaled, z[:, 0, :3] = z * 2, 0.0
    return ce(z) + ce(scaled)


def written_out(z):
    other = z * 2
    out = z.detach().clone()
    torch.mul(z.detach(), 3.0, out=out)
    return ce(z) + other.sum() + out.sum()


def through_data(z):
    other = z.view(-1, V)
    z.data.mul_(2.0)
    return ce(other)


UNKNOWN = idioms("z", globals(), """
Squares.apply(z);  Squares.apply(z[:, :-1] * 3) + ce(z);  ce(z) + Squares.apply(2 * z)
ce(Reversed.apply(z));  ce(AsItIs.apply(z));  hooked(z);  retained(z)
torch.autograd.backward([z], [torch.ones(B, T, V)], retain_graph=True) or ce(z);  divided(z)
assigned(z);  written_out(z);  through_data(z);  ce(F.relu(z, inplace=True))
ce(torch.stack([z, 2 * z])[1]);  z.sort(-1).values[..., 0].sum();  z.softmax(0).square().sum()
(lambda view: (z.mul_(2.0), ce(view))[1])(z.view(-1, V));  (torch.no_grad()(z.mul_)(2.0), ce(z))[1]
(z[..., 3].mul_(2.0), ce(z))[1];  (z.__setitem__((..., 3), z[..., 3] + 1.0), ce(z))[1]
ce(F.pad(z, (0, 0, 0, 1))[:, :-1])
(lambda s: torch.as_strided(s, s.shape, s.stride()))(z[:, :-1]).square().sum()
torch.vmap(lambda row: (row**2).sum())(z).sum()
""")  # fmt: skip


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_unknown_operations_materialize_logits_and_equal_torch(name, head):
    report = same(Tiny(head), UNKNOWN[name])
    # older torch.autograd.backward does not ask whose tensors it is given, so that nothing is
    # counted
    assert report.made or ("autograd.backward" in name and torch.__version__ < "2.11")


def test_operators_below_torch_function_materialize_logits():
    """TorchScript and extensions of C++ do not ask ``__torch_function__`` either."""
    model = Tiny()
    want, want_grads = gradients(model, lambda z: torch.ops.aten.mul.Tensor(z, z).sum())
    lossfuse.fuse_lm_head(model)

    def below(z):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.aten.mul.Tensor(z, z).sum()

    with pytest.warns(UserWarning, match="materializes the logits"):
        got, grads = gradients(model, below)
    torch.testing.assert_close((got, grads), (want, want_grads))
    with torch._C.DisableTorchFunctionSubclass(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = model(IDS)
        with torch.no_grad():
            assert z.add_(1.0) is z
    assert torch.equal(z + 0.0, Tiny()(IDS) + 1.0)


def test_a_write_that_is_not_seen_raises():
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    other = z * 2
    with pytest.warns(UserWarning, match="flatten materializes"):
        z.flatten().detach().mul_(3)
    with pytest.raises(RuntimeError, match="a tensor computed from them has been changed"):
        other + 1


def test_gradients_of_logits_that_a_loss_went_past():
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    loss = ce(z)
    with pytest.raises(
        RuntimeError,
        match="retain_grad needs the gradient of logits, but a loss was computed",
    ):
        z.retain_grad()
    seen = []
    with pytest.warns(UserWarning, match="register_hook needs"):
        z.register_hook(seen.append)
    loss.backward(retain_graph=True)
    assert seen == []
    with pytest.warns(UserWarning, match="sum materializes"):
        z.sum().backward()
    assert len(seen) == 1


GRADIENTS_OF_LOGITS = idioms("loss, z", globals(), """
torch.autograd.grad(loss, z);  torch.autograd.grad([loss], inputs=[z], allow_unused=True)
loss.backward(inputs=[z]);  torch.autograd.grad((loss * 2).exp(), z[:, :-1])
""")  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS_OF_LOGITS)
def test_gradients_with_respect_to_logits_that_a_loss_went_past(name):
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    picked = z.log_softmax(-1).gather(-1, VALID.unsqueeze(-1))
    picked.masked_fill_(VALID.unsqueeze(-1) == 0, 0.0)
    for loss in (ce(z), picked.sum()):
        with pytest.raises(
            RuntimeError, match="needs the gradient of logits, but a loss was computed"
        ):
            GRADIENTS_OF_LOGITS[name](loss, z)
    # of what has not gone past them there is one
    with pytest.warns(UserWarning, match="materializes the logits"):
        torch.testing.assert_close(torch.autograd.grad(z.cpu().sum(), z)[0], torch.ones(B, T, V))


def test_a_second_derivative_of_a_fused_head_names_the_remedy():
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    with pytest.raises(
        RuntimeError, match=r"no second derivative .*lossfuse.unfuse_lm_head\(model\)"
    ):
        torch.autograd.grad(ce(model(IDS)), model.body.weight, create_graph=True)


def test_a_second_backward_of_two_reads():
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    (ce(z) + 0.1 * z.logsumexp(-1).square().mean()).backward()
    got = model.lm_head.weight.grad
    other = Tiny()
    z = other(IDS)
    (ce(z) + 0.1 * z.logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(got, other.lm_head.weight.grad)


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return ce(self.model(ids))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_changed_parameter_between_loss_and_backward_is_noticed(head, reduction):
    """Torch raises; a head that is called again in the backward must not be another by then."""
    model = Tiny(head)
    fuse_any(model)
    loss = F.cross_entropy(model(IDS).flatten(0, 1), TARGET.flatten(), reduction=reduction).sum()
    want = Tiny(head)
    F.cross_entropy(want(IDS).flatten(0, 1), TARGET.flatten(), reduction=reduction).sum().backward()
    with torch.no_grad():
        for p in model.lm_head.parameters():
            p.mul_(2.0)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "has been changed" in str(error) or "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(
            [p.grad for p in model.parameters()], [p.grad for p in want.parameters()]
        )


def test_a_hook_for_backwards_of_a_tied_head():
    """The gradient of the logits reaches the hook, and the embedding behind them gets its own,
    each once."""
    found = []
    for fused in (False, True):
        model, seen = Tiny("tied"), []
        if fused:
            lossfuse.fuse_lm_head(model)
        model.lm_head.register_full_backward_hook(
            lambda module, grads, outputs, seen=seen: seen.append(outputs[0])
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ce(model(IDS)).backward()
        found.append((seen[0], *(p.grad for p in model.parameters())))
    torch.testing.assert_close(*found)


def test_a_weight_behind_its_own_hidden_states():
    """Where nothing of their graph is freed, a gradient that went too far would be counted
    twice."""
    found = []
    for fused in (False, True):
        model = Tiny("linear")
        if fused:
            lossfuse.fuse_lm_head(model)
        logits = Through.apply(model.lm_head(model.lm_head.weight[: B * T] * 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(logits, TARGET.flatten()).backward()
        found.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*found)


class Through(torch.autograd.Function):
    """As a user's wrapper around the outputs of a model does."""

    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_forward_mode_is_the_models_own():
    model, x, tangent = Tiny(), torch.randn(2, D), torch.randn(2, D)
    lossfuse.fuse_lm_head(model)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(model.lm_head(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, tangent @ model.lm_head.weight.T)


@pytest.mark.parametrize("option", ["softcap", "logit_scale"])
@pytest.mark.parametrize("value", [-1, 0, True, "1", float("nan"), torch.tensor(1.0)], ids=str)
def test_options_are_checked_before_they_are_recorded(option, value):
    """A cap that is negative, or a bool, would be a number to what is recorded."""
    model, plain = Tiny(), torch.randn(B * T, V)
    lossfuse.fuse_lm_head(model)
    options = {option: value}
    if option == "logit_scale" and type(value) is int:
        return
    with pytest.raises((TypeError, ValueError), match=option) as want:
        lossfuse.cross_entropy(plain, TARGET.flatten(), **options)
    with pytest.raises(want.type, match=re.escape(str(want.value))):
        lossfuse.cross_entropy(model(IDS).flatten(0, 1), TARGET.flatten(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_our_loss_has_the_dtype_of_its_logits(dtype):
    model = Tiny().double()
    lossfuse.fuse_lm_head(model)
    read = lossfuse.cross_entropy_stats(model(IDS).flatten(0, 1).to(dtype), TARGET.flatten())
    assert {t.dtype for t in read if t.is_floating_point()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


STALE = {
    "step": (
        lambda m, h: torch.optim.SGD(m.parameters(), 0.1).step(),
        "a parameter of the head has been changed",
    ),
    "hidden states": (lambda m, h: h[0].detach().add_(1.0), "the hidden states has been changed"),
}


@pytest.mark.parametrize("head", ["linear", "LoRA"])
@pytest.mark.parametrize("name", STALE)
@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_stale_logits_raise(name, head):
    model = Tiny(head)
    change, message = STALE[name]
    fuse_any(model)
    held = []
    handle = model.lm_head.register_forward_pre_hook(lambda m, args: held.append(args[0]))
    z = model(IDS)
    handle.remove()
    ce(z).backward()
    change(model, held)
    for read in (ce, torch.sin, lambda z: z.logsumexp(-1)):
        with pytest.raises(RuntimeError, match=message):
            read(z)


def test_functional_call_is_the_parameters_it_was_given():
    model = Tiny()
    others = {name: p.detach() * 2 for name, p in model.named_parameters()}
    want = torch.func.functional_call(model, others, (IDS,))
    fuse_any(model)
    z = torch.func.functional_call(model, others, (IDS,))
    with pytest.warns(UserWarning, match="sin materializes"):
        assert torch.equal(torch.sin(z), torch.sin(want))
    # a head that makes its logits again would make them of its own
    lora = Tiny("LoRA")
    whole = WithLoss(lora)
    fuse_any(lora)
    loss = torch.func.functional_call(
        whole, {n: (p.detach() * 2).requires_grad_() for n, p in whole.named_parameters()}, (IDS,)
    )
    with pytest.raises(RuntimeError, match="a parameter of the head has been changed"):
        loss.backward()
    want_grad = torch.func.grad(lambda p: ce(torch.func.functional_call(Tiny(), p, (IDS,))))(others)
    got_grad = torch.func.grad(lambda p: ce(torch.func.functional_call(model, p, (IDS,))))(others)
    torch.testing.assert_close(got_grad, want_grad)
    assert want.shape == z.shape


# --- which heads are deferred


class Flagged(nn.Module):
    """As an adapter that can be switched off."""

    def __init__(self):
        super().__init__()
        self.base, self.adapted, self.on, self.calls = nn.Linear(D, V), nn.Linear(D, V), True, 0
        self.register_buffer("mask", torch.zeros(V))

    def forward(self, h):
        self.calls += 1
        return (self.adapted(h) if self.on else self.base(h)) + self.mask


class Shift(nn.Linear):
    def forward(self, h):
        return super().forward(h + F.pad(h, (0, 0, 1, -1)))


class Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made * 2 if func is F.linear else made


def with_a_weight_of_its_own():
    head = nn.Linear(D, V, bias=False)
    head.weight = nn.Parameter(head.weight.data.as_subclass(Doubled))
    return head


def with_a_hook():
    head = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V))
    head[0].register_forward_hook(lambda module, args, out: out * 2)
    return head


def with_another_forward(at):
    head = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V))
    module = head.get_submodule(at)
    own = module.forward
    module.forward = lambda h: own(h) * 2
    return head


# heads that are not fused -> the reason that the warning gives
NOT_DEFERRED = {
    "a class of the caller": (Flagged, "its Flagged is not known to compute each row alone"),
    "a subclass that mixes rows": (lambda: Shift(D, V), "its Shift is not known"),
    "one of its modules": (lambda: before(Shift(D, D)), r"Shift \(0\) is not known"),
    "a weight with functions of its own": (
        with_a_weight_of_its_own, "has a parameter of class Doubled"),
    "dropout": (lambda: before(nn.Dropout(0.5)), r"Dropout \(0\) draws one mask for all rows"),
    "a hook inside": (with_a_hook, r"Linear \(0\) has hooks"),
    "another forward": (
        lambda: with_another_forward(""), "the forward of its Sequential has been replaced"),
    "another forward inside": (
        lambda: with_another_forward("1"), r"Linear \(1\) has a forward that has been replaced"),
    "power iteration": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(D, V)),
        "_SpectralNorm .* is not known"),
    "hidden states written over": (
        lambda: before(nn.ReLU(inplace=True)), r"ReLU \(0\) overwrites the hidden"),
    "a norm over rows": (
        lambda: before(nn.LayerNorm((T, D))), r"LayerNorm \(0\) normalizes over several"),
    "a softmax over rows": (lambda: before(nn.Softmax(1)), r"Softmax \(0\) works along"),
    "batch norm": (lambda: before(nn.BatchNorm1d(T)), r"BatchNorm1d \(0\) is not known"),
}  # fmt: skip


def before(module):
    return nn.Sequential(module, nn.Linear(D, V))


def with_head(head):
    model = Tiny()
    model.lm_head = head
    return model


def seeded(make):
    torch.manual_seed(1)
    return make()


def drawn(model, read):
    torch.manual_seed(9)
    return gradients(model, read)


@pytest.mark.parametrize("name", NOT_DEFERRED)
def test_a_head_that_cannot_be_repeated_is_the_models_own(name):
    make, why = NOT_DEFERRED[name]
    stock, model = (with_head(seeded(make)) for _ in range(2))
    report = lossfuse.fuse_lm_head(model, options=SMALL)
    want = drawn(stock, ce)
    with pytest.warns(
        UserWarning, match=f"did not defer the head of Tiny.*{why}.*row_wise=True"
    ) as warned:
        got = drawn(model, ce)
    assert warned[0].filename == __file__
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert (
        drawn(model, ce)[0] == drawn(stock, ce)[0]
        and report.made == {"forward": 2}
        and not report.fused
    )
    if name == "a class of the caller":
        assert model.lm_head.calls == stock.lm_head.calls == 2


DEFERRED = {
    "layers": lambda: nn.Sequential(
        nn.LayerNorm(D), nn.Dropout(0.0), nn.Linear(D, D), nn.ReLU(inplace=True), nn.RMSNorm(D),
        nn.Linear(D, V)),
    "dropout that is off": lambda: before(nn.Dropout(0.5).eval()),
    "weight norm": parametrized,
    "weight norm inside": lambda: nn.Sequential(nn.Identity(), parametrized()),
    "an older weight norm": lambda: older_weight_norm(nn.Linear(D, V)),
    "an older weight norm inside": lambda: nn.Sequential(
        nn.GELU(), older_weight_norm(nn.Linear(D, V))),
}  # fmt: skip


def older_weight_norm(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(head)


@pytest.mark.parametrize("name", DEFERRED)
def test_a_head_of_known_modules_is_deferred(name):
    report = same(with_head(seeded(DEFERRED[name])), ce, rtol=1e-4, atol=1e-5, vouched=False)
    assert report.fused == {"cross_entropy": 1} and not report.made


STATES = {
    "a flag": lambda head: setattr(head, "on", False),
    "the mode": lambda head: head.eval(),
    "a new attribute": lambda head: setattr(head, "scale", 3.0),
}


class Vouched(Flagged):
    def forward(self, h):
        h = h if self.training else h * 0.5
        return super().forward(h) * getattr(self, "scale", 1.0)


@pytest.mark.parametrize("when", ["before the loss", "before the backward"])
@pytest.mark.parametrize("read", [ce, lambda z: z.sin().sum()], ids=["read", "made"])
@pytest.mark.parametrize("name", STATES)
@pytest.mark.filterwarnings("ignore:sin materializes the logits")
def test_a_deferred_head_has_the_state_of_its_call(name, read, when):
    model = with_head(Vouched())
    want, want_grads = gradients(copy.deepcopy(model), read)
    fuse_any(model, options=SMALL)
    z = model(IDS)
    if when == "before the loss":
        STATES[name](model.lm_head)
    got = read(z)
    if when == "before the backward":
        STATES[name](model.lm_head)
    now = {k: v for k, v in model.lm_head.__dict__.items() if k != "calls"}
    got.backward()
    torch.testing.assert_close(got.detach(), want)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, want_grads)
    assert {k: v for k, v in model.lm_head.__dict__.items() if k != "calls"} == now


@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_buffer_of_a_deferred_head_that_has_changed_is_named(how):
    model = with_head(Flagged())
    fuse_any(model)
    z = model(IDS)
    loss = ce(z)
    if how == "written to":
        model.lm_head.mask[:10] = -5.0
    else:
        model.lm_head.mask = torch.zeros(V)
    for stale in (loss.backward, lambda: ce(z), lambda: z.sin()):
        with pytest.raises(RuntimeError, match="the buffer mask of the head has been changed"):
            stale()


def test_dropout_of_a_head_that_is_vouched_for_is_drawn_once_a_call():
    model = with_head(nn.Sequential(nn.Dropout(0.5), nn.Linear(D, V)))
    fuse_any(model, options=SMALL)
    z = model(IDS)
    first, again, other = ce(z), ce(z), ce(model(IDS))
    assert first == again != other
    first.backward(retain_graph=True)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.eval()
    again.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)


# --- heads that are never called


class Multiplies(Tiny):
    def forward(self, ids):
        return F.linear(self.body(self.embedding(ids)), self.lm_head.weight)


def test_a_forward_that_does_not_call_its_head_says_so_once():
    model = Multiplies()
    lossfuse.fuse_lm_head(model)
    with pytest.warns(
        UserWarning,
        match="the forward of Multiplies has not called its head, a Linear, .*has fused nothing",
    ) as warned:
        for _ in range(2):
            ce(model(IDS)).backward()
    assert len(warned) == 1 and warned[0].filename == __file__
    quiet = Multiplies()
    lossfuse.fuse_lm_head(quiet)
    quiet.body(torch.zeros(1, D))
    with torch.no_grad():
        quiet(IDS)
    quiet.eval()(IDS)


def test_a_head_that_is_called_within_another_model_or_a_checkpoint_is_called():
    model = Tiny()
    outer = WithLoss(model)
    lossfuse.fuse_lm_head(model)
    lossfuse.fuse_lm_head(outer, head="model.lm_head")
    outer(IDS).backward()
    checkpoint(outer, IDS, use_reentrant=False).backward()


class Says(Tiny):
    """A model that names its head, as those of transformers do."""

    said: object = None

    def get_output_embeddings(self):
        return self.said(self)


# --- dtypes


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upcast", [False, True], ids=["", "upcast"])
def test_results_have_torchs_dtypes_and_at_least_its_precision(dtype, head, upcast):
    """Of logits and of losses as torch's; half precision nearer the truth than torch's."""

    def read(z, upcast=upcast and dtype != torch.float64):
        z = z * 0.7
        return ce(z.float() if upcast else z)

    exact = dtype == torch.float64
    stock, model = Tiny(head).to(dtype), Tiny(head).to(dtype)
    truth, true_grads = gradients(copy.deepcopy(stock).double(), lambda z: ce(z * 0.7))
    want, want_grads = gradients(stock, read)
    report = fuse_any(model)
    got, grads = gradients(model, read)
    assert report.fused and not report.made
    assert got.dtype == want.dtype and model(IDS).dtype == dtype
    if exact:
        torch.testing.assert_close((got, grads), (want, want_grads))
        return
    eps = torch.finfo(dtype).eps
    assert abs(got.double() - truth) <= 1.1 * abs(want.double() - truth) + 4 * eps
    for name, true in true_grads.items():
        assert grads[name].dtype == dtype
        off, stock_off = (
            (g.double() - true).norm() / true.norm() for g in (grads[name], want_grads[name])
        )
        assert off <= 1.2 * stock_off + eps, name


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_autocast_has_torchs_dtypes_and_precision(head, double):

    def run(fuse, enabled):
        model = Tiny(head).double() if double else Tiny(head)
        report = fuse_any(model) if fuse else None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = model(IDS)
            loss, entropy = ce(z), (lambda lp: -(lp.exp() * lp).sum(-1))(z.log_softmax(-1))
        outside = ce(z)
        (loss + entropy.sum()).backward()
        values = {
            "loss": loss.detach(),
            "entropy": entropy.detach(),
            **{name: p.grad for name, p in model.named_parameters()},
        }
        return (z.dtype, loss.dtype, entropy.dtype, outside.dtype), values, report

    (dtypes, stock, _), (_, true, _), (got_dtypes, got, report) = (
        run(False, True),
        run(False, False),
        run(True, True),
    )
    assert got_dtypes == dtypes and report.fused and not report.made
    for name, t in true.items():
        off, stock_off = ((values[name].double() - t.double()).norm() for values in (got, stock))
        assert off <= 1.5 * stock_off + (1e-12 if double else 5e-3) * t.norm(), name


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_under_autocast_the_head_learns_from_logits_that_are_made(head):
    """torch 2.8 remembers what was cast without a gradient, as for a look at the shape of
    logits."""

    def read(z):
        return z.square().sum()

    model = Tiny(head)
    with torch.autocast("cpu", torch.bfloat16):
        want, want_grads = gradients(model, read)
    fuse_any(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, grads = gradients(model, read)
    assert got == want
    assert all(g is not None for g in want_grads.values())
    torch.testing.assert_close(grads, want_grads)


def test_a_float32_bias_is_not_rounded_to_bfloat16():
    """Added to float32 logits of a bfloat16 head: as a bias of the head it would be rounded."""
    prior = torch.randn(V) * 10
    model = Tiny().bfloat16()
    want = ce(model(IDS).float() + prior)
    lossfuse.fuse_lm_head(model)
    torch.testing.assert_close(ce(model(IDS).float() + prior), want, rtol=1e-6, atol=0.0)


# --- the model around


def snapshot(model):
    return [
        (
            name,
            {
                k: v
                for k, v in m.__dict__.items()
                if k not in ("_parameters", "_buffers", "_modules")
            },
            list(m._parameters),
        )
        for name, m in model.named_modules()
    ]


def test_unfuse_restores_the_model():
    model = Tiny()
    mine = model.lm_head.forward  # bound, not on the instance
    before, keys = repr(snapshot(model)), list(model.state_dict())
    report = lossfuse.fuse_lm_head(model)
    assert lossfuse.fuse_lm_head(model) is report and len(model._forward_pre_hooks) == 1
    assert list(model.state_dict()) == keys
    lossfuse.unfuse_lm_head(model)
    lossfuse.unfuse_lm_head(model)
    assert repr(snapshot(model)) == before and model.lm_head.forward == mine
    assert type(model(IDS)) is torch.Tensor


def test_a_forward_of_the_instance_is_put_back():
    model = Tiny()

    def patched(x):
        return F.linear(x, model.lm_head.weight * 2)

    model.lm_head.forward = patched
    report = same(model, ce)
    assert report.fused == {"cross_entropy": 1}
    lossfuse.unfuse_lm_head(model)
    assert model.lm_head.forward is patched


def test_unfuse_works_under_a_wrapper_of_the_forward():
    """As accelerate's hooks, which keep the forward they found."""
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: inner(x)
    assert type(model(IDS)) is not torch.Tensor
    lossfuse.unfuse_lm_head(model)
    assert type(model(IDS)) is torch.Tensor


def test_unfuse_works_on_the_model_and_on_one_around_it():
    for undo in (0, 1):
        model = Tiny()
        outer = nn.Sequential(model)
        lossfuse.fuse_lm_head(model)
        report = lossfuse.fuse_lm_head(outer, head="0.lm_head")
        ce(outer(IDS))
        assert report.fused == {"cross_entropy": 1}
        lossfuse.unfuse_lm_head((model, outer)[undo])
        assert type(model.lm_head(torch.zeros(1, D))) is torch.Tensor


def test_a_head_without_gradients_is_not_deferred():
    model = Tiny()
    report = lossfuse.fuse_lm_head(model)
    with torch.no_grad():
        assert type(model(IDS)) is torch.Tensor
    with torch.inference_mode():
        assert type(model(IDS)) is torch.Tensor
    assert type(model.eval()(IDS)) is torch.Tensor
    assert type(model.train()(IDS)) is not torch.Tensor
    assert not report.fused and not report.made


MODES = {
    "eval": lambda model: model.eval() and contextlib.nullcontext(),
    "no_grad": lambda model: torch.no_grad(),
    "inference": lambda model: torch.inference_mode(),
    "eval, no_grad, autocast": lambda model: (
        model.eval() and both(torch.no_grad(), torch.autocast("cpu", torch.bfloat16))
    ),
}


@contextlib.contextmanager
def both(one, other):
    with one, other:
        yield


@pytest.mark.parametrize("head", ["linear with a bias", "Sequential"])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_takes_no_memory_for_logits(mode, head):
    model = Tiny(head, cap=3.0)
    ids, target = (torch.randint(0, V, (16, 32)) for _ in range(2))
    with MODES[mode](model):
        want, logits = ce(model(ids), target), model(IDS)
    options = lossfuse.LinearOptions(chunk_bytes=64 * 48 * 4)
    report = lossfuse.fuse_lm_head(model, options=options, evaluation=True)
    with MODES[mode](model), Largest() as largest:
        got = ce(model(ids), target)
    assert got.requires_grad == want.requires_grad and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2 if "autocast" in mode else 1e-5, atol=1e-6)
    assert (
        largest.bytes < 16 * 32 * V * 4 / 3
        and report.fused == {"cross_entropy": 1}
        and not report.made
    )
    with MODES[mode](model), pytest.warns(UserWarning, match="sin materializes"):
        made = model(IDS).sin()
    assert torch.equal(made, logits.sin()) and made.requires_grad == logits.requires_grad


def test_generate_never_defers_the_head():
    class Generates(Tiny):
        def generate(self, ids):
            for _ in range(3):
                ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], dim=1)
            return ids

    model = Generates().eval()
    want = model.generate(IDS)
    report = lossfuse.fuse_lm_head(model, evaluation=True)
    with torch.no_grad():
        assert torch.equal(model.generate(IDS), want)
    assert not report.fused and not report.made and report.calls == 3


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_their_own(how):
    model = Tiny("tied")
    report = lossfuse.fuse_lm_head(model, options=SMALL)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert (
        other.lm_head.weight is other.embedding.weight
        and other.lm_head.weight is not model.lm_head.weight
    )
    loss = ce(other(IDS))
    loss.backward()
    assert model.lm_head.weight.grad is None and other.lm_head.weight.grad is not None
    assert lossfuse.fuse_lm_head(other).fused == {"cross_entropy": 1} and not report.fused
    lossfuse.unfuse_lm_head(other)
    assert type(other(IDS)) is torch.Tensor and type(model(IDS)) is not torch.Tensor


def test_a_copy_of_the_head_alone_is_not_fused():
    """It is not fused and brings no model along; and may be fused as another's."""
    model = Tiny()
    lossfuse.fuse_lm_head(model)
    head = copy.deepcopy(model.lm_head)
    assert type(head(torch.zeros(1, D))) is torch.Tensor
    other = Tiny()
    other.lm_head = head
    report = lossfuse.fuse_lm_head(other)
    ce(other(IDS)).backward()
    assert report.fused == {"cross_entropy": 1} and all(p.grad is None for p in model.parameters())


def test_state_dict_goes_in_and_out():
    model, other = Tiny("tied"), Tiny("tied")
    lossfuse.fuse_lm_head(model)
    with torch.no_grad():
        other.embedding.weight.add_(1.0)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(ce(model(IDS)), ce(other(IDS)))


def test_a_replaced_head_is_fused_at_the_next_forward():
    """A larger vocabulary, a wrapper: the head is asked for at every forward."""
    model = Tiny()
    report = fuse_any(model)
    first = model.lm_head
    ce(model(IDS))
    model.lm_head = Lora(first)
    ce(model(IDS))
    assert (
        "forward" not in first.__dict__ and report.fused == {"cross_entropy": 2} and not report.made
    )
    model.lm_head = nn.Linear(D, V + 3)
    assert model(IDS).shape == (B, T, V + 3) and not report.made


def test_a_head_is_given_by_name_or_module():
    class Two(Tiny):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(D, V)
            self.lm_head, self.second = None, nn.Sequential(nn.Identity(), nn.Linear(D, V))

        def forward(self, ids):
            x = self.body(self.embedding(ids))
            return self.first(x), self.second[1](x)

    for head in ("second.1", None):
        model = Two()
        lossfuse.fuse_lm_head(model, head=head or model.second[1])
        one, two = model(IDS)
        assert type(one) is torch.Tensor and type(two) is not torch.Tensor
        # two of them: the second stays as it was
        (ce(one) + ce(two)).backward()


def test_two_heads_one_after_the_other():
    """Two models of which each has a head, in one step."""
    policy, value = Tiny(), Tiny("LoRA")
    reports = [fuse_any(m) for m in (policy, value)]
    z, y = policy(IDS), value(IDS)
    (ce(z) + ce(y)).backward()
    with pytest.warns(UserWarning, match="cat materializes") as warned:
        torch.cat([z, y])
    assert len(warned) == 2 and [r.made["cat"] for r in reports] == [1, 1]


def test_forward_hooks_see_lazy_logits_and_backward_hooks_materialize_them():
    """Forward hooks see lazy logits and may change them; a hook of the backward needs their
    gradient, so they are made."""
    model, seen = Tiny(), []
    model.lm_head.register_forward_hook(lambda m, args, out: out * 0.5)
    assert same(model, ce).fused == {"cross_entropy": 1}
    model.lm_head.register_full_backward_hook(lambda m, din, dout: seen.append(dout[0].shape))
    with pytest.warns(UserWarning, match="materializes the logits"):
        same(model, ce)
    assert seen == [(B, T, V)] * 2


def fused_as(said):
    model = Says()
    model.heads, model.said = (
        nn.ModuleList(nn.Linear(D, V) for _ in range(2)),
        lambda _: said(model),
    )
    return lossfuse.fuse_lm_head(model)


fuse = lossfuse.fuse_lm_head
ERRORS = {
    "no module": (lambda: fuse("model"), TypeError, "model is a str but must be a torch.nn.Module"),
    "no head": (lambda: fuse(nn.Linear(2, 3)), ValueError,
        "model is a Linear in which no output head .*pass head="),
    "no such name": (lambda: fuse(Tiny(), head="lm_haed"), ValueError, "no module 'lm_haed'"),
    "head of another kind": (lambda: fuse(Tiny(), head=3), TypeError,
        "head is a int but must be a module, or the name"),
    "it has none": (
        lambda: fused_as(lambda m: setattr(m, "head", m.__dict__["_modules"].pop("lm_head"))),
        ValueError, r"no output head was found \(get_output_embeddings\(\) returned None\)"),
    "several": (lambda: fused_as(lambda m: m.heads), TypeError,
        "get_output_embeddings.* of Says is a ModuleList of 2 modules; expected one; .*"
        " head='heads.0'"),
    "an embedding": (lambda: fused_as(lambda m: m.embedding), TypeError,
        "of Says is an Embedding, whose forward takes ids"),
    "an embedding by name": (lambda: fuse(Tiny(), head="embedding"), TypeError,
        "head='embedding' of Tiny is an Embedding"),
    "row_wise": (lambda: fuse(Tiny(), row_wise=1), TypeError, "row_wise is 1 but must be True or"),
    "evaluation": (lambda: fuse(Tiny(), evaluation=None), TypeError,
        "evaluation is None but must be"),
    "options": (lambda: fuse(Tiny(), options={}), TypeError,
        "options is a dict but must be a lossfuse.LinearOptions"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
def test_gradient_checkpointing(head, reentrant):
    """Of the body, and of head and loss together."""
    model = Tiny(head)
    want, want_grads = gradients(model, ce)
    report = fuse_any(model)
    model.zero_grad()
    x = checkpoint(
        lambda e: torch.tanh(model.body(e)) * 3, model.embedding(IDS), use_reentrant=reentrant
    )
    loss = checkpoint(lambda h: ce(model.lm_head(h)), x, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, want_grads)
    assert report.fused and not report.made


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
def test_a_compiled_model_is_fused_and_equals_eager(head):
    """A cap between head and loss, where half a patch is silently wrong."""
    torch.compiler.reset()
    model = Tiny(head, cap=2.0)
    want, want_grads = gradients(model, ce)
    report = fuse_any(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        loss = ce(compiled(IDS))
        loss.backward()
        torch.testing.assert_close(loss.detach(), want)
        torch.testing.assert_close(
            {name: p.grad for name, p in model.named_parameters()}, want_grads
        )
    assert report.fused == {"cross_entropy": 2} and not report.made
    torch.compiler.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match="lossfuse.fuse_lm_head runs the head and the loss outside the graphs",
    ):
        torch.compile(model, backend="aot_eager", fullgraph=True)(IDS)


@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_trainers_may_inspect_and_copy_lazy_logits():
    model = Tiny()
    want = model(IDS).detach()
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    assert (
        isinstance(z, torch.Tensor)
        and torch.is_tensor(z)
        and z.size(-1) == V
        and z.size() == want.size()
    )
    assert (
        repr(z) == "LazyLogits(logits of shape (2, 6, 37), dtype=torch.float32, not materialized)"
        and z.type() == "torch.FloatTensor"
    )
    assert hash(z) == id(z) and z in {z: 1}
    assert z.new_zeros(2, 3).shape == (2, 3) and z.new_tensor([1.0]).dtype == z.dtype
    assert lossfuse.fuse_lm_head(model).made == {}
    assert torch.equal(z.detach().cpu(), want) and (z.detach().numpy() == want.numpy()).all()
    assert (
        z.data_ptr() == z.untyped_storage().data_ptr() != 0
        and hash(z) == id(z)
        and repr(z).startswith("tensor(")
    )
    for make in (
        lambda z: z.detach().cpu(),
        lambda z: torch.from_numpy(z.detach().numpy()),
        lambda z: torch.tensor(z.tolist()),
        lambda z: torch.load(saved(z)),
        lambda z: pickle.loads(pickle.dumps(z.detach())),
        lambda z: copy.deepcopy(z.detach()),
        lambda z: (
            torch.nn.parallel.scatter_gather.gather([z], "cpu")
            if torch.cuda.is_available()
            else z.detach().cpu()
        ),
        lambda z: torch.from_dlpack(z.detach()),
        lambda z: z.flatten()[torch.arange(B * T * V)].view(B, T, V),
    ):
        made = make(model(IDS))
        assert type(made) is torch.Tensor and torch.equal(made, want)


def saved(z):
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("head", ["linear with a bias", "LoRA"])
def test_a_loss_of_no_rows_equals_torch(head):
    report = same(Tiny(head), lambda z: ce(z[:0], TARGET[:0], reduction="sum"))
    assert report.fused == {"cross_entropy": 1} and not report.made


def test_logits_use_the_weight_of_their_call():
    """As FSDP2 does after a head's forward: loss and logits are of the weight that the call was
    given."""
    model, stock = Tiny("linear"), Tiny("linear")(IDS)
    lossfuse.fuse_lm_head(model)
    z = model(IDS)
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D))
    torch.testing.assert_close(ce(z), ce(stock))
    assert z._base is None
    with pytest.warns(UserWarning, match="sin materializes"):
        assert torch.equal(torch.sin(z), torch.sin(stock))


def replica_of(model):
    """As torch.nn.parallel.replicate makes one for every GPU: shallow copies of modules, with
    copies of parameters that are none."""
    modules = list(model.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        for name, child in m._modules.items():
            setattr(copies[id(m)], name, copies[id(child)])
        for name, p in m._parameters.items():
            setattr(copies[id(m)], name, None if p is None else p.clone())
    return copies[id(model)]


@pytest.mark.parametrize("by", ["its own word", "the head"])
def test_replicas_of_data_parallel_have_heads_of_their_own(by):
    model = Tiny()
    report = lossfuse.fuse_lm_head(model, head=None if by == "its own word" else model.lm_head)
    replicas, stock = [replica_of(model) for _ in range(2)], copy.deepcopy(model)
    lossfuse.unfuse_lm_head(stock)
    for doubled in (False, True):
        if doubled:
            # as if it were on another device
            replicas[1].lm_head.weight = replicas[1].lm_head.weight * 2.0
            with torch.no_grad():
                stock.lm_head.weight *= 2.0
        made = replicas[doubled](IDS)
        assert type(made) is torch.Tensor
        torch.testing.assert_close(made, stock(IDS))
    assert type(model(IDS)) is not torch.Tensor and not report.made
    ce(model(IDS)).backward()
    assert report.fused == {"cross_entropy": 1}
