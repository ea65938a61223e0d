"""Real text without a download: Python's standard library, and a byte-level BPE of it."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def standard_library_sources(limit: int) -> list[str]:
    """Modules by name, about ``limit`` characters, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    texts: list[str] = []
    taken = 0
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        taken += len(text)
        if taken >= limit:
            break
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE of ``vocab_size`` entries; it can encode every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(
    ids: Tensor, batch: int, length: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, next tokens), each (batch, length), at random positions of the text."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length - 1, (batch,), generator=g)
        window = ids[starts[:, None] + torch.arange(length + 1)]
        yield window[:, :-1], window[:, 1:]
