"""Trainers as they are, with a model whose head is fused and with the same one without: equal runs,
and counters that say how."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossfuse
from tiny_models import MODELS, VOCABULARY, examples, llama

STEPS, ACCUMULATION = 3, 4
# a bf16 loss of stock torch is rounded to 3 digits, and steps carry it on
BF16 = {"rtol": 5e-3, "atol": 5e-3}
SIX_DIGITS = {"rtol": 1e-6, "atol": 1e-6}


class Run(SimpleNamespace):
    """The state after training; all of them run SGD, because Adam makes a step of any rounding of
    a gradient near 0."""

    losses: list[float]
    model: nn.Module
    report: lossfuse.LogitsReport | None


def assert_same_run(
    fused: Run, stock: Run, *, fused_by: dict[str, int], bf16: bool = False
) -> None:
    near = BF16 if bf16 else SIX_DIGITS
    assert len(fused.losses) == len(stock.losses) > 0
    torch.testing.assert_close(torch.tensor(fused.losses), torch.tensor(stock.losses), **near)
    if not bf16:
        for (name, got), want in zip(
            fused.model.named_parameters(), stock.model.parameters(), strict=True
        ):
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert fused.report is not None
    assert fused.report.made == Counter(), "logits were made"
    assert fused.report.fused == Counter(fused_by)


@pytest.fixture
def needs_accelerate(monkeypatch):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from accelerate.state import AcceleratorState

    # where transformers 4 leaves it
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    # mixed precision of one test is the next one's otherwise
    AcceleratorState._reset_state(reset_partial_state=True)


def hf_run(model: Any, path: Any, *, fused: bool, **options: Any) -> Run:
    from transformers import Trainer, TrainingArguments

    class Watched(Trainer):
        """Logs are rounded."""

        losses: list[float]
        counts: list[Any]

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            made = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            if model.training:
                self.losses.append(float((made[0] if return_outputs else made).detach()))
                self.counts.append(num_items_in_batch)
            return made

    given = {
        name: options.pop(name)
        for name in ("compute_loss_func", "compute_metrics")
        if name in options
    }
    report = lossfuse.fuse_lm_head(model) if fused else None
    arguments = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        logging_steps=1,
        learning_rate=0.1,
        optim="sgd",
        seed=5,
        **options,
    )
    data = examples(2 * ACCUMULATION * STEPS)
    trainer = Watched(model, arguments, train_dataset=data, eval_dataset=data[:6], **given)
    trainer.losses, trainer.counts = [], []
    before = trainer.evaluate()
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        losses=trainer.losses,
        logged=logged,
        counts=trainer.counts,
        evaluated=before,
        evaluated_after=trainer.evaluate(),
        model=model,
        report=report,
        trainer=trainer,
    )


def users_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """As in the documentation of Trainer."""
    logits = outputs.logits.float()[..., :-1, :].contiguous()
    total = F.cross_entropy(
        logits.view(-1, logits.size(-1)), labels[..., 1:].contiguous().view(-1), reduction="sum"
    )
    return total / num_items_in_batch


TRAINING_STEPS = STEPS * ACCUMULATION
TRAINER_CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "gradient accumulation": ({}, {"cross_entropy": TRAINING_STEPS}),
    "compute_loss_func": ({"compute_loss_func": users_loss}, {"cross_entropy": TRAINING_STEPS}),
    "label smoothing": (
        {"label_smoothing_factor": 0.1},
        {"gather": TRAINING_STEPS, "sum": TRAINING_STEPS},
    ),
    "bf16 autocast": ({"bf16": True}, {"cross_entropy": TRAINING_STEPS}),
}


@pytest.mark.parametrize("name", TRAINER_CASES)
@pytest.mark.parametrize("model", MODELS)
def test_trainer_of_transformers(needs_accelerate, tmp_path, model, name):
    options, fused_by = TRAINER_CASES[name]
    stock = hf_run(MODELS[model](), tmp_path, fused=False, **options)
    fused = hf_run(MODELS[model](), tmp_path, fused=True, **options)
    assert_same_run(fused, stock, fused_by=fused_by, bf16="bf16" in name)
    assert all(n is not None for n in fused.counts) or name == "label smoothing"
    assert [int(n) for n in fused.counts if n is not None] == [
        int(n) for n in stock.counts if n is not None
    ]
    # in eval mode the head is the model's own
    assert fused.evaluated["eval_loss"] == stock.evaluated["eval_loss"]
    near = BF16 if "bf16" in name else {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(
        torch.tensor(fused.evaluated_after["eval_loss"]),
        torch.tensor(stock.evaluated_after["eval_loss"]),
        **near,
    )
    torch.testing.assert_close(
        torch.tensor(fused.logged),
        torch.tensor(stock.logged),
        **(near if "bf16" in name else SIX_DIGITS),
    )


def test_trainer_evaluates_with_metrics_as_without(needs_accelerate, tmp_path):
    seen: list[Any] = []

    def metrics(predicted: Any) -> dict[str, float]:
        seen.append(predicted.predictions)
        return {
            "accuracy": float(
                (predicted.predictions.argmax(-1)[:, :-1] == predicted.label_ids[:, 1:]).mean()
            )
        }

    runs = [
        hf_run(llama(), tmp_path, fused=fused, compute_metrics=metrics) for fused in (False, True)
    ]
    stock, fused = runs
    assert_same_run(fused, stock, fused_by={"cross_entropy": TRAINING_STEPS})
    times = ("time", "per_second")
    first, second = (
        {k: v for k, v in run.evaluated.items() if not k.endswith(times)} for run in runs
    )
    assert first == second and "eval_accuracy" in first
    # logits of the models before training: two evaluations each
    assert seen[0].shape == (6, 12, VOCABULARY) and (seen[0] == seen[2]).all()


def evaluated_by_transformers(model: Any, data: Any, path: Any) -> float:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return float(Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"])


def validated_by_lightning(model: Any, data: Any, path: Any) -> float:
    lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert torch.is_inference_mode_enabled()
            self.losses.append(float(self.model(**batch).loss))

    module = Module()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }
    trainer = lightning.Trainer(accelerator="cpu", **quiet)
    trainer.validate(module, torch.utils.data.DataLoader(data, batch_size=8), verbose=False)
    return sum(module.losses)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "evaluate", [evaluated_by_transformers, validated_by_lightning], ids=["Trainer", "Lightning"]
)
@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_that_wants_the_loss_alone_makes_no_logits(
    needs_accelerate, tmp_path, model, evaluate
):
    made, data = MODELS[model](), examples(8)
    want = evaluate(made, data, tmp_path)
    report = lossfuse.fuse_lm_head(made, evaluation=True)
    assert evaluate(made, data, tmp_path) == pytest.approx(want, rel=1e-5)
    assert report.fused == {"cross_entropy": 1} and not report.made


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"]
)
def test_generate_of_transformers_never_meets_a_deferred_head(options):
    model = llama().eval()
    ids = torch.arange(2, 12).view(2, 5)

    def generate() -> Tensor:
        torch.manual_seed(0)
        made: Tensor = model.generate(ids, max_new_tokens=5, pad_token_id=0, **options)
        return made

    want = generate()
    report = lossfuse.fuse_lm_head(model, evaluation=True)
    assert torch.equal(generate(), want)
    assert not report.fused and not report.made


@pytest.mark.parametrize("first", ["offloaded", "fused"])
def test_a_frozen_head_whose_weights_accelerate_fetches(needs_accelerate, first):
    from accelerate import cpu_offload

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 30).requires_grad_(False)

        def forward(self, x: Tensor) -> Any:
            return self.lm_head(self.body(x))

    def run(fused: bool) -> Any:
        model = Model()
        report = lossfuse.fuse_lm_head(model) if fused and first == "fused" else None
        cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
        report = lossfuse.fuse_lm_head(model) if fused and report is None else report
        x = torch.arange(48.0).view(6, 8).sin()
        for _ in range(2):
            model.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(6))
            loss.backward()
        made = model(x)
        if report is not None:
            assert report.fused == {"cross_entropy": 2} and type(made) is not Tensor
            lossfuse.unfuse_lm_head(model)
            assert type(model(x)) is Tensor
        return loss.detach(), model.body.weight.grad

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.parametrize("model", MODELS)
def test_label_smoother_of_transformers(model):
    """log_softmax of (B, T, V) logits, gathered and summed."""
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import LabelSmoother

    def run(fused: bool) -> Run:
        made = MODELS[model]()
        report = lossfuse.fuse_lm_head(made) if fused else None
        batch = {
            name: torch.stack([x[name] for x in examples(4)]) for name in ("input_ids", "labels")
        }
        loss = LabelSmoother(epsilon=0.1)(
            made(input_ids=batch["input_ids"]), batch["labels"], shift_labels=True
        )
        loss.backward()
        torch.optim.SGD(made.parameters(), lr=0.1).step()
        return Run(losses=[float(loss.detach())], model=made, report=report)

    assert_same_run(run(True), run(False), fused_by={"gather": 1, "sum": 1})


def batches() -> Any:
    data = examples(2 * ACCUMULATION * STEPS)
    return torch.utils.data.DataLoader(data, batch_size=2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_loop_of_accelerate(needs_accelerate, precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(fused: bool) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATION
        )
        model = llama()
        report = lossfuse.fuse_lm_head(model) if fused else None
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), batches()
        )
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                logits = model(input_ids=batch["input_ids"]).logits
                # what ConvertOutputsToFp32 hands over
                assert logits.dtype == torch.float32
                loss = F.cross_entropy(
                    logits[:, :-1].reshape(-1, VOCABULARY), batch["labels"][:, 1:].reshape(-1)
                )
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return Run(losses=losses, model=accelerator.unwrap_model(model), report=report)

    assert_same_run(
        run(True), run(False), fused_by={"cross_entropy": TRAINING_STEPS}, bf16=precision == "bf16"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_module_of_lightning(tmp_path, precision):
    lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.model = llama()
            self.report = lossfuse.fuse_lm_head(self.model) if fused else None
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert type(self.model(**batch).logits) is Tensor

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(fused: bool) -> Run:
        module = Module(fused)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            accumulate_grad_batches=ACCUMULATION,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, batches(), torch.utils.data.DataLoader(examples(2), batch_size=2))
        return Run(losses=module.losses, model=module.model, report=module.report)

    assert_same_run(
        run(True), run(False), fused_by={"cross_entropy": TRAINING_STEPS}, bf16="bf16" in precision
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm1(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The shape of nanoGPT: a tied head without bias, and a loss inside forward."""

    def __init__(self, vocabulary: int = 211, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.h = nn.ModuleList(Block(width) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_loop_like_that_of_nanogpt(dtype):
    def run(fused: bool) -> Run:
        model = GPT()
        report = lossfuse.fuse_lm_head(model) if fused else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        g = torch.Generator().manual_seed(7)
        losses = []
        for _ in range(STEPS):
            data = torch.randint(0, 211, (4, 17), generator=g)
            targets = data[:, 1:].clone()
            targets[torch.rand(targets.shape, generator=g) < 0.2] = -1
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                _, loss = model(data[:, :-1], targets)
            assert loss is not None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return Run(losses=losses, model=model, report=report)

    assert_same_run(
        run(True), run(False), fused_by={"cross_entropy": STEPS}, bf16=dtype != torch.float32
    )


# --- torchtitan and torchtune


class Decoder(nn.Module):
    """A model as torchtitan's trainer knows it: its head, and that it can be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.tok_embeddings, self.layer = nn.Embedding(211, 24), Block(24)
        self.norm, self.lm_head = nn.LayerNorm(24), nn.Linear(24, 211, bias=False)
        self._skip_lm_head = False

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.layer(self.tok_embeddings(tokens)))
        made: Tensor = h if self._skip_lm_head else self.lm_head(h)
        return made


def titan_run(loss_config: Any, *, fused: bool = False) -> Run:
    """The calls of torchtitan's Trainer: set_lm_head once, then (pred, labels, global_valid_tokens)
    for each micro-batch."""
    from torchtitan.components.loss import ChunkedLossWrapper

    model = Decoder()
    report = lossfuse.fuse_lm_head(model) if fused else None
    loss_fn = loss_config.build()
    if isinstance(loss_fn, ChunkedLossWrapper):
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 211, (ACCUMULATION, 2, 17), generator=g)
        labels = tokens[..., 1:].clone()
        labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
        valid = (labels != -100).sum().float()
        total = 0.0
        for some, theirs in zip(tokens[..., :-1], labels, strict=True):
            loss, _ = loss_fn(model(some), theirs, valid)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    with torch.no_grad():
        losses.append(float(loss_fn(model.eval()(tokens[0, :, :-1]), labels[0], valid)[0]))
    return Run(losses=losses, model=model, report=report)


@pytest.mark.filterwarnings("ignore")
def test_losses_of_torchtitan():
    loss = pytest.importorskip("torchtitan.components.loss", reason="needs torchtitan")
    from lossfuse.integrations.torchtitan import FusedCrossEntropyLoss

    stock = titan_run(loss.CrossEntropyLoss.Config())
    chunked = titan_run(loss.ChunkedLossWrapper.Config(num_chunks=4))
    ours = titan_run(FusedCrossEntropyLoss.Config())
    for run in (chunked, ours):
        torch.testing.assert_close(
            torch.tensor(run.losses), torch.tensor(stock.losses), **SIX_DIGITS
        )
        for got, want in zip(run.model.parameters(), stock.model.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # and without a loss of ours: the model's head is fused
    assert_same_run(
        titan_run(loss.CrossEntropyLoss.Config(), fused=True),
        stock,
        fused_by={"cross_entropy": TRAINING_STEPS},
    )


@pytest.mark.filterwarnings("ignore")
def test_loss_of_torchtune():
    """Its chunks of logits are chunks that are not made."""
    try:
        from torchtune.models.llama3 import llama3
        from torchtune.modules.loss import CEWithChunkedOutputLoss
    except Exception as e:
        pytest.skip(f"needs torchtune, and torchao 0.9: {e}")

    def run(fused: bool) -> Run:
        torch.manual_seed(6)
        model = llama3(
            vocab_size=211,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            embed_dim=32,
            max_seq_len=32,
            intermediate_dim=48,
        )
        loss_fn = CEWithChunkedOutputLoss(num_output_chunks=4)
        model.set_num_output_chunks(loss_fn.num_output_chunks)
        report = lossfuse.fuse_lm_head(model) if fused else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        g = torch.Generator().manual_seed(7)
        losses = []
        for _ in range(STEPS):
            tokens = torch.randint(0, 211, (2, 17), generator=g)
            loss = loss_fn(model(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return Run(losses=losses, model=model, report=report)

    assert_same_run(run(True), run(False), fused_by={"cross_entropy": 4 * STEPS})


# Dynamo looks at the gradients of all tensors that it meets (torch 2.13)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("model", MODELS)
def test_a_compiled_model_of_transformers_has_as_many_graphs_as_without_fusing(model):
    pytest.importorskip("transformers")
    batch = {
        name: torch.stack([one[name] for one in examples(2)]) for name in ("input_ids", "labels")
    }

    def graphs(net: Any) -> tuple[int, int, Tensor]:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        loss = torch.compile(net, backend="aot_eager")(**batch).loss
        loss.backward()
        counted = torch._dynamo.utils.counters
        return (
            counted["stats"]["unique_graphs"],
            sum(counted["graph_break"].values()),
            loss.detach(),
        )

    stock, net = MODELS[model]().train(), MODELS[model]().train()
    want = graphs(stock)
    report = lossfuse.fuse_lm_head(net)
    got = graphs(net)
    assert got[0] == want[0] and got[1] <= 2 and report.fused and not report.made
    torch.testing.assert_close(got[2], want[2])
    for p, q in zip(net.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    lossfuse.unfuse_lm_head(net)
    assert graphs(net)[:2] == want[:2]
