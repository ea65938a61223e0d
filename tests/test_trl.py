"""TRL with its own fused head and with ours in its place: statistics against float64, trainers
against themselves."""

import sys
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lossfuse
from closeness import assert_formula_close
from lossfuse.integrations.trl import chunked_log_probs, fused_log_probs
from tiny_models import VOCABULARY, gemma2, llama

ALL = ("log_probs", "entropy", "is_top1", "log_sum_sq_probs", "mean_logits")


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    cap: float | None,
    scale: float,
) -> Any:
    """The program in the docstring."""
    z = scale * F.linear(hidden, weight, bias)
    z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
    logp = z.log_softmax(-1)
    log_probs, entropy = logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    return log_probs, entropy, (2 * logp).logsumexp(-1), z.mean(-1), z.argmax(-1) == targets


CASES = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "cap, scale and temperature": (1.3, 5.0, -0.8),
}


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_plain_torch(name, has_bias):
    temperature, cap, scale = CASES[name]
    hidden, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((40, 16), (99, 16), (99,))
    )
    targets, upstream = torch.randint(0, 99, (40,)), torch.randn(2, 40)
    operands = [hidden, weight, bias] if has_bias else [hidden, weight]
    got = chunked_log_probs(
        hidden, weight, bias if has_bias else None, targets, temperature, 32, cap, scale
    )
    wide = [t.detach().double().requires_grad_() for t in operands]
    want = plain(*wide[:2], wide[2] if has_bias else None, targets, temperature, cap, scale)
    for mine, theirs in zip(got[:2], want[:2], strict=True):
        assert_formula_close(mine.detach(), theirs.detach())
    # differences of numbers of the size of lse, which is 20 here
    for mine, theirs in zip(got[2:4], want[2:4], strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    assert (got[4] == want[4]).all()
    assert [t.requires_grad for t in got] == [True, True, False, False, False]
    grads = torch.autograd.grad((torch.stack(got[:2]) * upstream).sum(), operands)
    for mine, theirs in zip(
        grads, torch.autograd.grad((torch.stack(want[:2]) * upstream).sum(), wide), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_what_is_not_asked_for_is_none_and_unknown_names_are_refused():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3])
    got = chunked_log_probs(hidden, weight, None, targets, 1.0, outputs=("log_probs",))
    assert got[1:] == (None, None, None, None)
    with pytest.raises(
        ValueError, match=r"outputs names \['variance'\] but may name log_probs, entropy"
    ):
        chunked_log_probs(hidden, weight, None, targets, 1.0, outputs=("variance",))


def test_no_rows():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4)
    got = chunked_log_probs(hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0)
    assert all(t is not None and t.shape == (0,) for t in got)
    got[0].sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("fuse", [False, True], ids=["alone", "beside fuse_lm_head"])
def test_a_model_that_calls_its_own_head_in_training_is_told_of(monkeypatch, fuse):
    """As SFT of TRL does with ``compute_loss_func`` or label smoothing. TRL itself is not
    needed."""
    for name in ("trl", "trl.trainer", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    utils = sys.modules["trl.trainer.utils"]
    monkeypatch.setattr(sys.modules["trl.trainer"], "utils", utils, raising=False)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", object, raising=False)
    model = torch.nn.Sequential()
    model.lm_head = torch.nn.Linear(4, 7)
    if fuse:
        lossfuse.fuse_lm_head(model)
    hidden, targets = torch.randn(3, 4), torch.tensor([1, 2, 3])
    with warnings.catch_warnings(record=True) as caught, fused_log_probs(model) as report:
        warnings.simplefilter("always")
        made: Any = utils._ChunkedLogProbFunction
        made.apply(
            hidden,
            model.lm_head.weight,
            model.lm_head.bias,
            targets,
            1.0,
            32,
            outputs=("log_probs",),
        )
        with torch.no_grad():
            model(hidden)
        assert not caught and not report.made
        for _ in range(2):
            F.cross_entropy(model(hidden), targets, label_smoothing=0.1).backward()
    told = [
        w for w in caught if "the model calls its own head, a Linear, in training" in str(w.message)
    ]
    assert (len(told), report.made["forward"]) == ((0, 0) if fuse else (1, 2))
    assert all(w.filename == __file__ for w in told) and report.fused == {"log_probs": 1}
    assert not model.lm_head._forward_hooks


# --- with the library


@pytest.fixture
def trl():
    trl = pytest.importorskip("trl", reason="needs trl")
    pytest.importorskip("trl.kernels", reason="needs trl 1.16, whose head is fused")
    yield trl
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


pytestmark = pytest.mark.filterwarnings("ignore")


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(8)
    ids = torch.randint(2, VOCABULARY, (3, 11), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


def through_trl(
    model: Any, *, outputs: tuple[str, ...] = ALL, temperature: float = 1.0, base: Any = None
) -> Any:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model if base is None else base, outputs=outputs, temperature=temperature)
    return model(**batch(), fused_lm_head=True)


def gradients(model: Any, made: Any) -> dict[str, Tensor]:
    model.zero_grad()
    (made.loss + 0.1 * made.entropy.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [llama, gemma2])
def test_signature_and_results_are_those_of_trl(trl, make):
    theirs, ours = make(), make()
    want = through_trl(theirs, temperature=0.9)
    with fused_log_probs(ours) as report:
        got = through_trl(ours, temperature=0.9)
    assert report.fused == {"log_probs": 1}
    for name in ("loss", *ALL[:2], *ALL[3:]):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)
    assert (got.is_top1 == want.is_top1).all()
    expected = gradients(theirs, want)
    for name, grad in gradients(ours, got).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def adapted(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(9)
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
    )
    return model.train()


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "a copy of the head that is trained": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    "chunk_bytes", [None, 4 * VOCABULARY * 7], ids=["one chunk", "chunks of 7 rows"]
)
def test_a_head_that_is_an_adapter_counts_and_learns(trl, name, chunk_bytes):
    """Against transformers' own loss, which calls the head."""
    model = adapted(**ADAPTERS[name])
    stock = model(**batch())
    logp = stock.logits[:, :-1].log_softmax(-1)
    mask = batch()["labels"][:, 1:] != -100
    entropy = (-(logp.exp() * logp).sum(-1) * mask).sum()
    model.zero_grad()
    (stock.loss + 0.1 * entropy).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in name for name in want)
    with fused_log_probs(model, options=lossfuse.LinearOptions(chunk_bytes=chunk_bytes)) as report:
        made = through_trl(model, base=model.get_base_model())
        got = gradients(model, made)
        with torch.no_grad():
            again = model(**batch(), fused_lm_head=True)
    assert report.fused == {"log_probs of a head": 2}
    torch.testing.assert_close(made.loss, stock.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.loss, stock.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        made.mean_logits, stock.logits[:, :-1].mean(-1) * mask, rtol=1e-4, atol=1e-5
    )
    assert got.keys() == want.keys()
    for key, grad in got.items():
        torch.testing.assert_close(grad, want[key], rtol=1e-4, atol=1e-5)


def test_the_adapter_is_what_trl_leaves_out(trl):
    """If this fails TRL has learnt it, and half of the adapter for TRL can go."""
    model = adapted(target_modules=["lm_head"])
    stock = model(**batch()).loss
    assert abs(float(through_trl(model, base=model.get_base_model()).loss - stock)) > 1e-2


def test_a_disabled_adapter_is_a_reference_model(trl):
    model = adapted(target_modules=["lm_head"])
    with fused_log_probs(model), model.disable_adapter():
        made = through_trl(model, base=model.get_base_model())
        torch.testing.assert_close(made.loss, model(**batch()).loss, rtol=1e-6, atol=1e-6)


def test_the_function_is_put_back(trl):
    from trl.trainer import utils

    before = utils._ChunkedLogProbFunction
    with pytest.raises(KeyError), fused_log_probs():
        assert utils._ChunkedLogProbFunction is not before
        raise KeyError
    assert utils._ChunkedLogProbFunction is before


# --- its trainers


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}, unk_token="<pad>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def words(n: int, seed: int) -> str:
    return " ".join(
        f"w{int(i)}"
        for i in torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))
    )


def rows(n: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": words(3, i),
            "chosen": " " + words(4 + i % 3, 100 + i),
            "rejected": " " + words(5, 200 + i),
        }
        for i in range(n)
    ]


def options(path: Any, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "seed": 5,
        "gradient_checkpointing": False,
    } | more


def sft(trl: Any, model: Any, path: Any) -> Any:
    from datasets import Dataset

    data = Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(12)]
    )
    return trl.SFTTrainer(
        model, trl.SFTConfig(**options(path)), train_dataset=data, processing_class=tokenizer()
    )


def dpo(trl: Any, model: Any, path: Any) -> Any:
    from datasets import Dataset

    reference = type(model)(model.config)
    reference.load_state_dict(model.state_dict())
    config = trl.DPOConfig(**options(path, use_weighting=True))
    return trl.DPOTrainer(
        model,
        reference,
        config,
        train_dataset=Dataset.from_list(rows(12)),
        processing_class=tokenizer(),
    )


def grpo(trl: Any, model: Any, path: Any) -> Any:
    from datasets import Dataset

    config = trl.GRPOConfig(
        **options(
            path,
            num_generations=2,
            max_completion_length=5,
            temperature=0.8,
            beta=0.1,
            num_iterations=2,
            max_steps=4,
        )
    )
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows(12)])

    # where the trainer looks for a reference model
    model.save_pretrained(path / "model")
    model.config._name_or_path = str(path / "model")

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(len, c.split())) % 7) for c in completions]

    return trl.GRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer())


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}
TIMES = ("runtime", "per_second", "time", "flos")


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_log_and_learn_the_same(trl, tmp_path, name):
    logs, models = [], []
    for fused in (False, True):
        model = llama()
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
        trainer = TRAINERS[name](trl, model, tmp_path)
        if fused:
            with fused_log_probs(trainer.model) as report:
                trainer.train()
            assert (
                report.made == {}
                and set(report.fused) == {"log_probs"}
                and report.fused["log_probs"] >= 6
            )
        else:
            trainer.train()
        logs.append(
            [
                {k: v for k, v in entry.items() if not any(t in k for t in TIMES)}
                for entry in trainer.state.log_history
            ]
        )
        models.append(model)
    assert len(logs[0]) == len(logs[1]) >= 4
    for stock, ours in zip(*logs, strict=True):
        assert stock.keys() == ours.keys()
        for key, value in stock.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for got, want in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
