"""Models and batches of transformers that train in milliseconds, without a download."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 311
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(**(SIZES | {"num_key_value_heads": 1, "initializer_range": 0.2} | options))
    )


def gemma2(**options: Any) -> Any:
    """Caps its logits, and has its head tied."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(3)
    sizes = SIZES | {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "final_logit_softcapping": 4.0,
        "initializer_range": 0.2,
    }
    return Gemma2ForCausalLM(Gemma2Config(**(sizes | options), attn_implementation="eager"))


MODELS = {"llama": llama, "gemma2, a soft cap": gemma2}


def examples(n: int, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences whose prompts, of many lengths, do not count."""
    g = torch.Generator().manual_seed(4)
    made = []
    for i in range(n):
        ids = torch.randint(2, VOCABULARY, (length,), generator=g)
        labels = ids.clone()
        labels[: i % (length - 3)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def idioms(arguments: str, names: dict[str, Any], table: str) -> dict[str, Callable[..., Any]]:
    """Functions of ``arguments`` by their expressions: one a line, or several with semicolons; an
    indented line continues the one before it."""
    found = [" ".join(text.split()) for text in re.split(r";|\n(?! )", table) if text.strip()]
    assert len(set(found)) == len(found)
    return {text: eval(f"lambda {arguments}: {text}", names) for text in found}
