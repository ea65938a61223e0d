"""The demo, small: real text, a real tokenizer, both losses agreeing, a table and a picture."""

import re
from types import SimpleNamespace

import pytest
import torch

for name in ("altair", "pandas", "rich", "tokenizers", "vl_convert"):
    pytest.importorskip(name)

from lossfuse.perf import demo, protocol  # noqa: E402
from lossfuse.perf.corpus import batches, standard_library_sources, train_tokenizer  # noqa: E402
from lossfuse.perf.protocol import Step, Timing, peak_extra_bytes, time_interleaved  # noqa: E402

CPU = torch.device("cpu")


def test_the_text_is_the_standard_library_and_survives_the_tokenizer():
    texts = standard_library_sources(200_000)
    assert 200_000 <= sum(map(len, texts)) < 1_000_000
    assert any("def " in text for text in texts)
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.get_vocab_size() == 400
    sample = "def f(x):\n    return x + 1  # é\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_batches_are_next_tokens_and_repeat_with_their_seed():
    ids = torch.arange(1000)
    first = list(batches(ids, 3, 10, 2, seed=4))
    assert all(torch.equal(target, tokens + 1) for tokens, target in first)
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(first, batches(ids, 3, 10, 2, seed=4), strict=True)
    )


def test_both_losses_train_alike_and_are_drawn(tmp_path, capsys):
    setup = demo.Setup(
        vocab_size=600, characters=300_000, steps=6, batch=4, length=16, width=16, layers=1, heads=2
    )
    result = demo.main(tmp_path / "demo.png", setup)
    theirs, ours = (result.runs[name] for name in (demo.TORCH, demo.OURS))
    assert len(ours.losses) == 6 and len(set(ours.losses)) == 6
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Training loss" in printed and "peak memory beyond logits" in printed
    assert list(result.costs) == list(demo.STEPS) == ["torch", "drop-in", "in place", "linear"]
    peaks = [cost.profile.peak_bytes for cost in result.costs.values()]
    assert peaks[0] > peaks[1] > peaks[2] > 0 and peaks[0] > peaks[3] > 0
    for name, cost in result.costs.items():
        assert re.search(rf"^\W*{name}\W+{cost.timing.p50:.0f} ", printed, re.MULTILINE), name


def test_whole_steps_compute_the_same_loss():
    torch.manual_seed(0)
    model, tokens = demo.Transformer(600, 16, 16, 1, 2), torch.randint(0, 600, (4, 17))
    losses = [
        loss(model, tokens[:, :-1], tokens[:, 1:].flatten()) for loss, _ in demo.STEPS.values()
    ]
    assert [loss.item() for loss in losses] == pytest.approx([losses[0].item()] * 4, rel=1e-5)


@pytest.mark.parametrize(
    ("load", "said"),
    [(0.9, None), (1.0, "a load of 1.0 on 2 CPUs"), (7.25, "a load of 7.2 on 2 CPUs")],
)
def test_a_busy_machine_is_said(load, said, monkeypatch):
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    assert said is None if demo.busy() is None else said in demo.busy()


def test_what_comes_and_how_long_it_takes_is_said_first(tmp_path, capsys, monkeypatch):
    class Read(Exception):
        pass

    def read(limit):
        said = capsys.readouterr().out
        assert "7 steps" in said and "about 37 s on two quiet CPU cores" in said
        raise Read

    monkeypatch.setattr(demo, "standard_library_sources", read)
    with pytest.raises(Read):
        demo.main(tmp_path / "demo.png", demo.Setup(steps=7))


def test_too_little_text_is_said():
    with pytest.raises(RuntimeError, match="raise characters or lower vocab_size"):
        demo.train(
            demo.Setup(vocab_size=50_000, characters=1000, steps=1),
            CPU,
            lambda line: None,
            lambda runs: None,
        )


def test_timing_is_interleaved_and_drops_the_first_round():
    calls = []
    steps = {name: Step(calls.append, lambda name=name: (name,)) for name in "ab"}
    times = time_interleaved(steps, CPU, repeats=3)
    assert calls == ["a", "b"] * 4
    assert times["a"].repeats == 3
    assert times["a"].p20 <= times["a"].p50 <= times["a"].p80
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0]).p50 == 3.0


def test_what_prepares_a_step_is_not_timed_and_time_ends_the_rounds(monkeypatch):
    now = 0.0

    def takes(seconds):
        nonlocal now
        now += seconds
        return ()

    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: now))
    step = Step(lambda: takes(0.25), lambda: takes(0.75))
    (timing,) = time_interleaved({"a": step}, CPU, repeats=1000, seconds=10.5).values()
    # ten rounds, the first of which is not counted
    assert timing == Timing(250.0, 250.0, 250.0, 9)


def test_peak_memory_sees_what_is_freed_before_the_call_returns():
    size = 64 << 20
    kept_by_malloc = [torch.ones(4 << 20) for _ in range(16)]
    del kept_by_malloc
    peak = peak_extra_bytes(Step(lambda: torch.ones(size // 4).sum()), CPU)
    if peak is None:
        pytest.skip("no /proc to ask")
    assert 0.95 * size < peak < 1.5 * size
