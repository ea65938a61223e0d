"""Named shapes, the least work on them, and inputs with the statistics of a trained model."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .mistakes import Mistake

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("no_grad", "forward", "forward+backward")
IGNORED = 7  # every seventh row is ignored, like padding and prompts


@dataclass(frozen=True)
class Case:
    """N rows over V classes. With D: a head, hidden (N, D) times weight (V, D).

    With P: multi-label targets, at most P positives per row."""

    name: str
    n: int
    v: int
    d: int | None
    reason: str
    p: int | None = None

    @property
    def op(self) -> str:
        return "labels" if self.p is not None else "logits" if self.d is None else "head"

    @property
    def size(self) -> str:
        """N x V, N x D x V, or N x V with P."""
        labels = "" if self.p is None else f", {self.p:,} of them 1"
        return " x ".join(f"{x:,}" for x in (self.n, self.d, self.v) if x) + labels

    def logits_bytes(self, itemsize: int) -> int:
        return self.n * self.v * itemsize

    def input_bytes(self, itemsize: int) -> int:
        """Logits, or hidden and weight, and int64 targets: P ids per row for labels."""
        if self.d is None:
            return self.logits_bytes(itemsize) + 8 * self.n * (self.p or 1)
        return (self.n + self.v) * self.d * itemsize + 8 * self.n

    def moved_bytes(self, mode: str, itemsize: int) -> int:
        """The minimum for logits: read them once, and write the gradient once if there is one."""
        return self.logits_bytes(itemsize) * (2 if mode == "forward+backward" else 1)

    def flops(self, mode: str) -> int:
        """Matrix products of a head: logits, and with a backward both gradients."""
        return 2 * self.n * self.v * (self.d or 0) * (3 if mode == "forward+backward" else 1)


@dataclass(frozen=True)
class _Named:
    v: int
    d: int | None
    rows: dict[str, int]  # by device type; "cuda" stands for every accelerator
    reason: str
    p: int | None = None


def _logits(v: int, cuda: int, cpu: int, reason: str) -> _Named:
    return _Named(v, None, {"cuda": cuda, "cpu": cpu}, reason)


def _head(v: int, d: int, cuda: int, cpu: int, reason: str) -> _Named:
    return _Named(v, d, {"cuda": cuda, "cpu": cpu}, reason)


def _labels(v: int, p: int, cuda: int, cpu: int, reason: str) -> _Named:
    return _Named(v, None, {"cuda": cuda, "cpu": cpu}, reason, p)


CASES: dict[str, _Named] = {
    "llama2": _logits(
        32000, 8192, 1024, "Llama 2 and Mistral: the small vocabulary of the large models"
    ),
    "gpt2": _logits(
        50257, 8192, 1024, "GPT-2: an odd vocabulary, so that no row but the first is aligned"
    ),
    "llama3": _logits(128256, 8192, 1024, "Llama 3: the logits of 8192 tokens are 2 GiB in bf16"),
    "unaligned": _logits(
        128257,
        4096,
        512,
        "Llama 3 and one added token: what resizing a tokenizer does to the alignment",
    ),
    "qwen": _logits(151936, 4096, 512, "Qwen 2 and 3"),
    "gemma2": _logits(256000, 4096, 512, "Gemma 1 and 2"),
    "gemma3": _logits(262144, 4096, 512, "Gemma 3: the largest vocabulary in use, a power of two"),
    "few-rows": _logits(
        32000,
        512,
        16,
        "fewer rows than a GPU can run at once: a small batch, the last tokens of a prompt",
    ),
    "many-rows": _logits(
        512, 131072, 131072, "more rows than 65,535, few classes: bytes, images, characters"
    ),
    "head-llama3": _head(128256, 4096, 8192, 32, "Llama 3 8B: one sequence of 8192 tokens"),
    "head-qwen": _head(
        151936, 2048, 16384, 32, "Qwen 3 1.7B: a small model, whose head is a third of the work"
    ),
    "head-gemma2": _head(256000, 2304, 8192, 32, "Gemma 2 2B: the most classes per unit of width"),
    "head-smollm": _head(
        49152,
        576,
        16384,
        512,
        "SmolLM 135M: narrow, so that the loss costs more than the products",
    ),
    "labels-wiki10": _labels(
        30938,
        19,
        8192,
        256,
        "Wiki10-31K: tags of a page, and rows that are not aligned to 16 bytes",
    ),
    "labels-amazon": _labels(
        670091,
        5,
        1024,
        32,
        "Amazon-670K: few positives; dense targets are as large as the logits",
    ),
    "labels-million": _labels(
        1000000,
        64,
        1024,
        32,
        "a million labels and long lists of ids: the cost of finding those of a block",
    ),
}


def named(name: str, device: torch.device) -> Case:
    """The named case with rows for a kind of device, or a shape NxV, NxDxV or NxVpP."""
    if name in CASES:
        found = CASES[name]
        return Case(
            name,
            found.rows["cpu" if device.type == "cpu" else "cuda"],
            found.v,
            found.d,
            found.reason,
            found.p,
        )
    # at most 18 digits fit an int64
    size = "([1-9][0-9]{0,17})"
    sizes = re.fullmatch(f"{size}x(?:{size}x)?{size}(?:p{size})?", name.lower(), re.ASCII)
    if sizes:
        n, d, v, p = (None if size is None else int(size) for size in sizes.groups())
        assert n is not None and v is not None
        # with P = V ids would have the shape of a dense target
        if p is None or (d is None and p < v):
            return Case(name.lower(), n, v, d, "a shape of your own", p)
    shapes = "NxV (logits), NxDxV (head) or NxVpP (labels, at most P < V of a row 1)"
    raise Mistake(f"case is {name!r}, expected one of {', '.join(CASES)}, or a shape {shapes}")


def logits_like_a_model(
    n: int, v: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and targets (N,) with the statistics of a trained language model.

    A logit is the log of a Zipf-Mandelbrot frequency ``1 / (rank + 2.7)``, the same for all rows,
    plus N(0, 1.5**2) of its row, plus an offset N(0, 3**2) common to the row. The target is drawn
    by frequency, and its logit set so that its probability is a draw of Beta(0.4, 0.8): many rows
    are confident, many are wrong, and the mean loss is digamma(1.2) - digamma(0.4) = 2.27 nats.
    Every seventh row is ignored."""
    generator = torch.Generator(device).manual_seed(seed)
    frequency = 1.0 / (torch.arange(v, device=device, dtype=torch.float32) + 2.7)
    # frequent classes have random ids
    frequency = frequency[torch.randperm(v, generator=generator, device=device)]
    target = torch.multinomial(frequency, n, replacement=True, generator=generator)
    odds = _log_odds(n, generator)
    logits = torch.empty(n, v, dtype=dtype, device=device)
    rows = max(1, (64 << 20) // (4 * v))
    for start in range(0, n, rows):
        block = (
            torch.randn(min(rows, n - start), v, generator=generator, device=device)
            .mul_(1.5)
            .add_(frequency.log())
        )
        block += 3.0 * torch.randn(len(block), 1, generator=generator, device=device)
        mine = target[start : start + rows, None]
        if v > 1:
            block.scatter_(1, mine, -math.inf)
            block.scatter_(
                1, mine, block.logsumexp(1, keepdim=True) + odds[start : start + rows, None]
            )
        logits[start : start + rows] = block
    target[::IGNORED] = -100
    return logits, target


def labels_like_a_model(
    n: int, v: int, p: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of a trained tagger, and ids (N, P) of the positives, padded with -100.

    A logit is the log of the expected count of its label among P draws, by the frequencies of
    ``logits_like_a_model``, plus N(0, 1.5**2). P labels are drawn for a row by frequency; 1 to P of
    them are positives, and their logits are set so that the probability is a draw of
    Beta(0.4, 0.8). Most labels are improbable, with a loss of 1e-7 each, which adds up."""
    generator = torch.Generator(device).manual_seed(seed)
    frequency = 1.0 / (torch.arange(v, device=device, dtype=torch.float32) + 2.7)
    frequency = frequency[torch.randperm(v, generator=generator, device=device)]
    frequency /= frequency.sum()
    ids = torch.multinomial(frequency, n * p, replacement=True, generator=generator).view(n, p)
    odds = _log_odds(n * p, generator).view(n, p)
    logits = torch.empty(n, v, dtype=dtype, device=device)
    rows = max(1, (64 << 20) // (4 * v))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        block = (
            torch.randn(len(ids[part]), v, generator=generator, device=device)
            .mul_(1.5)
            .add_((p * frequency).log())
        )
        logits[part] = block.scatter_(1, ids[part], odds[part])
    kept = torch.randint(1, p + 1, (n, 1), generator=generator, device=device)
    return logits, ids.masked_fill_(torch.arange(p, device=device) >= kept, -100)


def head_like_a_model(
    n: int, d: int, v: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden (N, D), weight (V, D) and targets (N,) with logits as peaked as a trained model's.

    The weight is N(0, 4 / D) and the hidden state N(0, 1) plus a multiple of the target's row of
    the weight, so that logits of the other classes have a deviation of 2 and the target's
    probability is about a draw of Beta(0.4, 0.8)."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(v, d, generator=generator, device=device).mul_(2.0 / math.sqrt(d))
    hidden = torch.randn(n, d, generator=generator, device=device)
    target = torch.randint(0, v, (n,), generator=generator, device=device)
    mine = weight[target]
    # log of a sum of V lognormals of deviation 2, minus the target's logit from the noise
    wanted = math.log(v) + 2.0 + _log_odds(n, generator)
    hidden += ((wanted - (hidden * mine).sum(1)) / mine.square().sum(1))[:, None] * mine
    target[::IGNORED] = -100
    return hidden.to(dtype), weight.to(dtype), target


def _log_odds(n: int, generator: torch.Generator) -> Tensor:
    """log(p / (1 - p)) of n draws p of Beta(0.4, 0.8): a difference of logs of gamma draws."""
    device = generator.device

    def log_gamma_draws(shape: float) -> Tensor:
        # gamma(a) = gamma(a + 1) * uniform ** (1 / a), whose log does not underflow
        bulk = torch._standard_gamma(torch.full((n,), shape + 1.0, device=device), generator)
        return (
            bulk.log()
            + torch.rand(n, generator=generator, device=device).clamp(min=1e-30).log() / shape
        )

    return log_gamma_draws(0.4) - log_gamma_draws(0.8)
