"""The demo, small: real text, a real tokenizer, both losses agree, a table and a picture."""

import re
from types import SimpleNamespace

import pytest
import torch

import perf_commands  # noqa: F401
from lossfuse.perf import demo, protocol
from lossfuse.perf.corpus import batches, standard_library_sources, train_tokenizer
from lossfuse.perf.protocol import Step, Timing, peak_extra_bytes, time_interleaved

CPU = torch.device("cpu")


def test_the_standard_library_survives_its_tokenizer():
    texts = standard_library_sources(200_000)
    assert 200_000 <= sum(map(len, texts)) < 1_000_000 and any("def " in text for text in texts)
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.get_vocab_size() == 400
    sample = "def f(x):\n    return x + 1  # é\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_batches_are_next_tokens_and_repeat_with_their_seed():
    first, again = (list(batches(torch.arange(1000), 3, 10, 2, seed=4)) for _ in range(2))
    for (tokens, target), (same, _) in zip(first, again, strict=True):
        assert torch.equal(target, tokens + 1) and torch.equal(tokens, same)


def test_both_losses_train_alike_and_are_drawn(tmp_path, capsys):
    sizes = {"vocab_size": 600, "characters": 300_000, "batch": 32, "length": 64, "width": 16}
    setup = demo.Setup(steps=6, layers=1, heads=2, **sizes)
    result = demo.main(tmp_path / "demo.png", setup)
    theirs, ours = (result.runs[name] for name in (demo.TORCH, demo.OURS))
    assert len(ours.losses) == 6 == len(set(ours.losses))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Training loss" in printed and "peak memory beyond logits" in printed
    assert list(result.costs) == list(demo.STEPS) == ["torch", "drop-in", "in place", "linear"]
    eager, drop_in, in_place, linear = (c.profile.peak_bytes for c in result.costs.values())
    assert eager > drop_in > in_place > 0 and eager > linear > 0
    for name, cost in result.costs.items():
        assert re.search(rf"^\W*{name}\W+{cost.timing.p50:.0f} ", printed, re.MULTILINE), name


def test_all_training_steps_compute_the_same_loss():
    torch.manual_seed(0)
    model, ids = demo.Transformer(600, 16, 16, 1, 2), torch.randint(0, 600, (4, 17))
    tokens, target = ids[:, :-1], ids[:, 1:].flatten()
    losses = [loss(model, tokens, target).item() for loss, _ in demo.STEPS.values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.mark.parametrize(("load", "said"), [(0.9, None), (1.0, "1.0 on 2"), (7.25, "7.2 on 2")])
def test_a_busy_machine_is_reported(load, said, monkeypatch):
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    assert demo.busy() is None if said is None else f"a load of {said} CPUs" in demo.busy()


def test_the_duration_is_announced_before_any_work(tmp_path, capsys, monkeypatch):
    def read(limit):
        said = capsys.readouterr().out
        assert "7 steps" in said and "about 37 s on two quiet CPU cores" in said
        raise InterruptedError

    monkeypatch.setattr(demo, "standard_library_sources", read)
    with pytest.raises(InterruptedError):
        demo.main(tmp_path / "demo.png", demo.Setup(steps=7))


def test_too_little_text_is_an_error():
    setup, ignore = demo.Setup(vocab_size=50_000, characters=1000, steps=1), lambda *_: None
    with pytest.raises(RuntimeError, match="raise characters or lower vocab_size"):
        demo.train(setup, CPU, ignore, ignore)


def test_steps_are_timed_in_turn_without_the_first_round():
    calls = []
    steps = {name: Step(calls.append, lambda name=name: (name,)) for name in "ab"}
    times = time_interleaved(steps, CPU, repeats=3)
    assert calls == ["a", "b"] * 4 and times["a"].repeats == 3
    assert times["a"].p20 <= times["a"].p50 <= times["a"].p80
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0]).p50 == 3.0


def test_preparation_is_not_timed_and_a_time_limit_ends_the_rounds(monkeypatch):
    now = 0.0

    def takes(seconds):
        nonlocal now
        now += seconds
        return ()

    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: now))
    step = Step(lambda: takes(0.25), lambda: takes(0.75))
    (timing,) = time_interleaved({"a": step}, CPU, repeats=1000, seconds=10.5).values()
    # ten rounds, the first of which does not count
    assert timing == Timing(250.0, 250.0, 250.0, 9)


def test_peak_memory_counts_what_is_freed_before_the_call_returns():
    size = 64 << 20
    cached_by_malloc = [torch.ones(4 << 20) for _ in range(16)]
    del cached_by_malloc
    peak = peak_extra_bytes(Step(lambda: torch.ones(size // 4).sum()), CPU)
    if peak is None:
        pytest.skip("needs /proc")
    assert 0.95 * size < peak < 1.5 * size
