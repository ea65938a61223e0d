"""A KeyboardInterrupt just before logits are written and during the write: they are unchanged or
marked as consumed, and the next call is right."""

import contextlib
import ctypes
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossfuse
from lossfuse import targets
from lossfuse.backends import threads, torch_rows
from lossfuse.ops.inplace import Consumed
from rows import logits_and_ids

N, V = 6, 40
X, TARGET = logits_and_ids(N, V)
PACKAGE = str(Path(lossfuse.__file__).parent)


class AtLine:
    """Raises KeyboardInterrupt at the ``n``-th line of the package; counts lines otherwise, and
    calls ``look`` at each."""

    def __init__(self, n=0, look=lambda: None):
        self.n, self.look, self.seen = n, look, 0

    def __enter__(self):
        sys.settrace(self.traced)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)

    def traced(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.seen += 1
            self.look()
            if self.seen == self.n:
                raise KeyboardInterrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self.traced


class Step:
    """A training step whose logits the caller can still see afterwards."""

    def __init__(self, loss, view=False):
        self.loss, self.view, self.logits = loss, view, None

    def __call__(self):
        leaf = X.detach().clone().requires_grad_()
        self.whole = leaf.view(2, 3, V) * 1.0 if self.view else leaf * 1.0
        self.logits = self.whole.view(N, V) if self.view else self.whole
        self.address = self.whole.data_ptr()
        loss = self.loss(self.logits)
        return [loss.detach(), *torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))]

    def memory(self):
        """The bytes of the logits; a tensor that shares them would forbid the write."""
        return ctypes.string_at(self.address, 4 * N * V) if self.logits is not None else b""


def cross_entropy(**options):
    return lambda z: lossfuse.cross_entropy(z, TARGET, impl="torch", **options)


def labels(z):
    given = {"impl": "torch", "inplace": True}
    return lossfuse.binary_cross_entropy_with_logits(z, X.detach().sigmoid(), **given)


STEPS = {
    "in place": Step(cross_entropy(inplace=True)),
    "a view in place": Step(cross_entropy(inplace=True), view=True),
    "none in place": Step(cross_entropy(inplace=True, reduction="none")),
    "none of a view in place": Step(cross_entropy(inplace=True, reduction="none"), view=True),
    "labels in place": Step(labels),
}


def line_of_the_write(step):
    """The number of the first line at which the logits have changed."""
    before, found = X.detach().numpy().tobytes(), []

    def look():
        if not found and step.logits is not None and step.memory() != before:
            found.append(lines.seen)

    step.logits = None
    with AtLine(look=look) as lines:
        step()
    return found[0]


@pytest.fixture
def one_row_blocks(monkeypatch):
    """So that a write has several blocks."""
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 4 * V)


@pytest.mark.usefixtures("one_row_blocks")
@pytest.mark.parametrize("during", [False, True], ids=["before", "during"])
@pytest.mark.parametrize("name", STEPS)
def test_an_interrupted_write_leaves_logits_whole_or_consumed(name, during):
    step = STEPS[name]
    want, threads_before = step(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), AtLine(line_of_the_write(step) - (not during)):
        step()
    untouched = step.memory() == X.detach().numpy().tobytes()
    assert untouched == (not during), "the interrupt was not where it should be"
    for t in {step.whole, step.logits}:
        if during or isinstance(t, Consumed):
            with pytest.raises(RuntimeError, match="were consumed"):
                t.sum()
        else:
            assert torch.equal(t.view(N, V), X.detach())
    assert torch.get_num_threads() == threads_before and torch.is_grad_enabled()
    assert not threads._making.locked()
    assert all(map(torch.equal, want, step()))


@pytest.mark.usefixtures("one_row_blocks")
def test_an_interrupted_write_has_stopped_in_every_thread(monkeypatch):
    monkeypatch.setattr(torch_rows, "THREAD_LEAST_BYTES", 64)
    monkeypatch.setattr(threads, "workers", lambda: 3)
    step, real = STEPS["in place"], threads.run
    want = step()

    def run(tasks, count):
        assert count == 3 and len(tasks) > 3

        def interrupt():
            raise KeyboardInterrupt

        return real([*tasks[:2], interrupt, *tasks[2:]], count)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threads, "run", run)
        step()
    written = step.memory()
    with pytest.raises(RuntimeError, match="were consumed"):
        step.logits.sum()
    threads.run([int] * 5, 3)
    assert step.memory() == written
    assert all(map(torch.equal, want, step()))


def test_debugging_of_targets_ends_with_its_block():
    def debugged():
        with lossfuse.debug_targets():
            lossfuse.cross_entropy(X, TARGET)

    with AtLine() as lines:
        debugged()
    with pytest.raises(KeyboardInterrupt), AtLine(lines.seen // 2):
        debugged()
    assert not targets.debugging()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, V)

    def forward(self, x):
        return self.lm_head(self.body(x))


def train(model):
    model.zero_grad()
    F.cross_entropy(model(X.detach()[:, :8]), TARGET).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_interrupted_step_of_a_fused_head_can_be_repeated(share):
    want, model = train(Model()), Model()
    report = lossfuse.fuse_lm_head(model)
    with AtLine() as lines:
        train(model)
    with pytest.raises(KeyboardInterrupt), AtLine(int(share * lines.seen)):
        train(model)
    torch.testing.assert_close(train(model), want)
    assert report.fused["cross_entropy"] >= 2 and not report.made


@pytest.mark.parametrize("own", [False, True], ids=["", "a forward of its own"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_interrupted_fusing_can_be_repeated_and_undone(own, share):
    forward = lambda x: F.linear(x, head.weight, head.bias)  # noqa: E731

    def model_and_head():
        model = Model()
        if own:
            model.lm_head.forward = forward
        return model, model.lm_head

    def fuse_and_undo():
        lossfuse.fuse_lm_head(model, row_wise=own)
        lossfuse.unfuse_lm_head(model)

    model, head = model_and_head()
    fuse_and_undo()
    with AtLine() as lines:
        fuse_and_undo()
    model, head = model_and_head()
    with contextlib.suppress(KeyboardInterrupt), AtLine(int(share * lines.seen)):
        fuse_and_undo()
    report = lossfuse.fuse_lm_head(model, row_wise=own)
    train(model)
    assert report.fused["cross_entropy"] == 1
    lossfuse.unfuse_lm_head(model)
    assert head.__dict__.get("forward") is (forward if own else None)
    assert not model._forward_pre_hooks and not model._forward_hooks
