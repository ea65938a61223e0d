"""``fuse_lm_head`` where parameters are sharded or gradients reduced over ranks: what one process makes of the whole batch."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lossfuse
from allocations import Largest
from closeness import assert_loss_close, assert_product_close
from ranks import cases_on_ranks

B, T, D, V = 2, 48, 16, 151
OPTIONS = lossfuse.LinearOptions(chunk_bytes=40 * 160 * 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """As nanoGPT: embedding, blocks, norm, head; makes the loss itself where it is given targets."""

    def __init__(self, *, tied=False, bias=False, unused=False, cap=None, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(V, D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(D, V, bias=bias)
        nn.init.normal_(self.lm_head.weight, std=0.5)
        if tied:
            self.lm_head.weight = self.embedding.weight
        if unused:
            self.unused = nn.Linear(D, D)
        self.cap, self.checkpointed = cap, checkpointed

    def forward(self, ids, targets=None):
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        z = self.lm_head(self.norm(x))
        if self.cap is not None:
            z = self.cap * torch.tanh(z / self.cap)
        return z if targets is None else (z, ce(z, targets))


def ce(z, targets, **options):
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), **options)


def batches(count, ranks):
    """[(ids, targets) of all ranks], of which as many count on each rank."""
    g = torch.Generator().manual_seed(1)
    made = torch.randint(0, V, (count, 2, ranks * B, T), generator=g)
    made[:, 1, :, 5::7] = -100
    return list(made.unbind(0))


def mine(batch):
    return batch[:, dist.get_rank() * B : (dist.get_rank() + 1) * B]


# --- layouts: a model -> what is called, and a context in which gradients stay where they are


def fsdp2(*groups, root=True, **options):
    """Sharded in groups of modules by name, and what is left with the root."""

    def wrapped(model):
        from torch.distributed.fsdp import fully_shard

        for group in groups:
            modules = [model.get_submodule(name) for name in group] if isinstance(group, tuple) else [model.get_submodule(group)]
            fully_shard(modules if len(modules) > 1 else modules[0], **options)
        fully_shard(model, **({k: v for k, v in options.items() if k != "reshard_after_forward"} if root is True else root))

        @contextlib.contextmanager
        def no_sync():
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)

        return model, no_sync

    return wrapped


def ddp(**options):
    def wrapped(model):
        made = nn.parallel.DistributedDataParallel(model, **options)
        return made, made.no_sync

    return wrapped


BLOCKS = "blocks.0", "blocks.1"
LAYOUTS = {
    "FSDP2, root": (fsdp2(), {}),
    "FSDP2, root that reshards": (fsdp2(root={"reshard_after_forward": True}), {}),
    "FSDP2, blocks": (fsdp2(*BLOCKS), {"bias": True, "cap": 3.0}),
    "FSDP2, head": (fsdp2(*BLOCKS, "lm_head"), {}),
    "FSDP2, head with a bias": (fsdp2("lm_head"), {"bias": True}),
    "FSDP2, head that stays": (fsdp2(*BLOCKS, "lm_head", reshard_after_forward=False), {}),
    "FSDP2, norm and head": (fsdp2(*BLOCKS, ("norm", "lm_head")), {}),
    "FSDP2, norm and head that stay": (fsdp2(*BLOCKS, ("norm", "lm_head"), reshard_after_forward=False), {}),
    "FSDP2, tied in root": (fsdp2(*BLOCKS), {"tied": True}),
    "FSDP2, tied in a group": (fsdp2(*BLOCKS, ("embedding", "lm_head")), {"tied": True}),
    "FSDP2, checkpointed": (fsdp2(*BLOCKS, "lm_head"), {"checkpointed": True}),
    "DDP": (ddp(), {}),
    "DDP, tied": (ddp(), {"tied": True}),
    "DDP, checkpointed": (ddp(gradient_as_bucket_view=True), {"checkpointed": True, "bias": True}),
    "DDP, unused": (ddp(find_unused_parameters=True), {"unused": True, "cap": 3.0}),
    "DDP, static graph": (ddp(static_graph=True), {}),
}


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def steps(run, model, optimizer, no_sync, loss_of, share):
    """Losses, and gradients by name, of an optimizer's steps; the second has two backwards."""
    losses, grads = [], []
    for micro in ((0,), (1, 2), (3,)):
        optimizer.zero_grad()
        for i in micro:
            with contextlib.nullcontext() if i == micro[-1] else no_sync():
                loss = loss_of(run, share(i))
                loss.backward()
            losses.append(loss.detach())
        # clones: later steps write over what is not sharded
        grads.append({n: None if p.grad is None else whole(p.grad).clone() for n, p in model.named_parameters()})
        optimizer.step()
    return losses, grads


LOSSES = {
    "outside": lambda run, b: ce(run(b[0]), b[1]),
    "inside": lambda run, b: run(b[0], b[1])[1],
    "none": lambda run, b: ce(run(b[0]), b[1], reduction="none").sum() / (b[1] != -100).sum(),
}


def in_layout(case):
    name, how = case
    layout, options = LAYOUTS[name]
    data = batches(4, dist.get_world_size())
    model = Tiny(**options)
    plain = copy.deepcopy(model)
    stock = steps(plain, plain, torch.optim.SGD(plain.parameters(), 0.1), contextlib.nullcontext, LOSSES[how], lambda i: data[i])

    fuse_first = how != "inside"
    report = lossfuse.fuse_lm_head(model, options=OPTIONS) if fuse_first else None
    run, no_sync = layout(model)
    report = report or lossfuse.fuse_lm_head(model, options=OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(), Largest() as largest:
        warnings.simplefilter("error")
        losses, grads = steps(run, model, optimizer, no_sync, LOSSES[how], lambda i: mine(data[i]))

    assert not report.made and report.fused == {"cross_entropy": 4}, report
    assert largest.bytes < B * T * V * 4, f"{largest.bytes} bytes are as large as logits"
    for got, want in zip(losses, stock[0], strict=True):
        dist.all_reduce(got)
        assert_loss_close(got / dist.get_world_size(), want)
    worst = 0.0
    for got, want in zip(grads, stock[1], strict=True):
        for key in want:
            if want[key] is None:
                assert got[key] is None or not got[key].any(), key
                continue
            worst = max(worst, float((got[key] - want[key]).abs().max() / want[key].abs().max()))
            try:
                assert_product_close(got[key], want[key])
            except AssertionError as error:
                raise AssertionError(f"{key}: {error}") from None
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_product_close(whole(p.detach()), q.detach())
    return worst


CASES = [(name, how) for name in LAYOUTS for how in LOSSES]
SHORT = [c for c in CASES if c[1] == "outside"] + [(n, "inside") for n in LAYOUTS if n.startswith(("FSDP2, norm and head", "DDP, unused"))]


def test_layouts():
    cases_on_ranks(2, in_layout, SHORT)


@pytest.mark.slow
def test_layouts_of_four_ranks():
    cases_on_ranks(4, in_layout, CASES, timeout=300)
