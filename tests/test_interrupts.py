"""An interrupt anywhere in a call: logits are what they were or are known to be gone, and the next
call is right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossfuse
from interrupts import AtLine, lines
from lossfuse import targets
from lossfuse.backends import threads, torch_rows
from lossfuse.ops.inplace import Consumed
from rows import logits_and_ids

N, V = 6, 40
X, TARGET = logits_and_ids(N, V)


class Step:
    """One training step whose logits somebody else can still see."""

    def __init__(self, call, impl="torch"):
        self.call, self.impl = call, impl

    def __call__(self):
        """What a step gives."""
        self.leaf = X.detach().clone().requires_grad_()
        # whoever has logits, or what they are a view of
        self.seen = [self.leaf.view(2, 3, V) * 1.0]
        return self.call(self)

    @property
    def logits(self):
        self.seen.append(self.seen[0].view(N, V))
        return self.seen[1]

    @property
    def unviewed(self):
        self.seen = [self.leaf * 1.0]
        return self.seen[0]

    def loss(self, logits, **options):
        return lossfuse.cross_entropy(logits, TARGET, impl=self.impl, **options)

    def grad(self, loss):
        return [loss.detach(), *torch.autograd.grad(loss, self.leaf, torch.full_like(loss, 3.0))]


STEPS = {
    "in place": lambda s: s.grad(s.loss(s.unviewed, inplace=True)),
    "a view in place": lambda s: s.grad(s.loss(s.logits, inplace=True)),
    "none, in place": lambda s: s.grad(s.loss(s.unviewed, inplace=True, reduction="none")),
    "none, a view in place": lambda s: s.grad(s.loss(s.logits, inplace=True, reduction="none")),
    "new memory": lambda s: s.grad(s.loss(s.logits)),
    "statistics": lambda s: s.grad(
        lossfuse.cross_entropy_stats(s.logits, TARGET, impl=s.impl).entropy
    ),
    "head": lambda s: s.grad(
        lossfuse.linear_cross_entropy(s.logits, X.detach(), TARGET % N, impl=s.impl)
    ),
    "labels": lambda s: s.grad(
        lossfuse.binary_cross_entropy_with_logits(s.logits, X.detach().sigmoid(), impl=s.impl)
    ),
    "labels in place": lambda s: s.grad(
        lossfuse.binary_cross_entropy_with_logits(
            s.logits, X.detach().sigmoid(), impl=s.impl, inplace=True
        )
    ),
}


def assert_whole_or_gone(t):
    """Half a gradient is nobody's logits."""
    if isinstance(t, Consumed):
        with pytest.raises(RuntimeError, match="were consumed"):
            t.sum()
    else:
        assert torch.equal(t.view(N, V), X.detach())


def check(step, every=1, files=()):
    """How many interrupts there were."""
    want = step()
    count, done = lines(step, files), 0
    before = torch.get_num_threads()
    for n in range(1 + count % every, count + 1, every):
        try:
            with AtLine(n, files):
                step()
        except KeyboardInterrupt as interrupt:
            # as long as somebody has the traceback, nothing in its frames has ended
            kept = interrupt
        else:
            # who waits for threads does so in more steps or fewer
            continue
        where, done = str(kept), done + 1
        try:
            for t in step.seen:
                assert_whole_or_gone(t)
            assert (
                not threads._making.locked()
                and torch.get_num_threads() == before
                and torch.is_grad_enabled()
            )
            del kept
            assert not targets.debugging()
            for got, again in zip(want, step(), strict=True):
                assert torch.equal(got, again)
        except AssertionError as error:
            raise AssertionError(f"interrupted at {where}: {error}") from error
    assert done >= 0.9 * count // every
    return done


# what writes over logits; the others only have to end well
THRIFTY = {"in place": 1, "a view in place": 4, "none, a view in place": 8, "labels in place": 2}


@pytest.mark.parametrize(
    ("name", "every"),
    [*THRIFTY.items(), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in STEPS)],
    ids=str,
)
def test_every_line(name, every):
    assert check(Step(STEPS[name]), every) > 10


@pytest.mark.parametrize(
    "name", ["in place", pytest.param("none, in place", marks=pytest.mark.slow)]
)
def test_every_line_where_threads_share_the_work(name, monkeypatch):
    """From the making of the threads on; those that write have stopped before anybody is told."""
    monkeypatch.setattr(torch_rows, "THREAD_LEAST_BYTES", 64)
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 4 * V)
    monkeypatch.setattr(threads, "workers", lambda: 3)
    shared = []
    real = threads.run
    monkeypatch.setattr(
        threads, "run", lambda tasks, count: shared.append(count) or real(tasks, count)
    )

    def step(s):
        threads._forget()
        return STEPS[name](s)

    assert check(Step(step), files=("backends/threads", "autograd", "consumed")) > 30 and set(
        shared
    ) == {3}


def test_debugging_ends_with_its_block():
    """Interrupted in it; no block is safe from an interrupt while it is left."""

    def debugged(step):
        with lossfuse.debug_targets():
            return step.grad(step.loss(step.logits))

    assert (
        check(Step(debugged), 10, files=("functional", "inputs", "autograd", "ops", "backends")) > 5
    )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, V)
        for p in self.parameters():
            nn.init.normal_(p, generator=g)

    def forward(self, x):
        return self.lm_head(self.body(x))


def train(model):
    model.zero_grad()
    logits = model(X.detach()[:, :8])
    F.cross_entropy(logits, TARGET).backward()
    return [p.grad for p in model.parameters()]


def assert_same_gradients(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


FILES = ("lm_head", "lazy", "linear", "ops")


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_line_of_a_step_of_a_fused_head(every):
    want = train(Model())
    model = Model()
    report = lossfuse.fuse_lm_head(model)
    train(model)
    count = lines(lambda: train(model), FILES)
    for n in range(1 + count % every, count + 1, every):
        with pytest.raises(KeyboardInterrupt), AtLine(n, FILES):
            train(model)
        fused = report.fused["cross_entropy"]
        assert_same_gradients(train(model), want)
        assert report.fused["cross_entropy"] == fused + 1 and not report.made
    assert count > 50


@pytest.mark.parametrize(
    "own", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "a forward of its own"]
)
def test_every_line_of_fusing_and_undoing(own):
    """Each can be called again, and undone nothing is left."""

    def made():
        model = Model()
        if own:
            model.lm_head.forward = mine
        return model

    def mine(x):
        return F.linear(x, head.weight, head.bias)

    def both():
        lossfuse.fuse_lm_head(model, row_wise=own)
        lossfuse.unfuse_lm_head(model)

    model = made()
    head = model.lm_head
    both()
    count = lines(both, FILES)
    assert count > 30
    for n in range(1, count + 1):
        model = made()
        head = model.lm_head
        with pytest.raises(KeyboardInterrupt) as raised, AtLine(n, FILES):
            both()
        report = lossfuse.fuse_lm_head(model, row_wise=own)
        train(model)
        assert report.fused["cross_entropy"] == 1, raised.value
        lossfuse.unfuse_lm_head(model)
        assert head.__dict__.get("forward") is (mine if own else None), raised.value
        assert not model._forward_pre_hooks and not model._forward_hooks, raised.value
