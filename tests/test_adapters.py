"""PEFT's adapters, put on before and after the head is fused: losses and gradients are stock's, and
fused from the second step on."""

import copy

import pytest
import torch

import lossfuse

transformers = pytest.importorskip("transformers")
# fused heads under adapters are of interest to those who have them
peft = pytest.importorskip("peft", reason="no peft here, so there are no adapters to try")

V = 515
CONFIGS = {
    "body": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "body and head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def base():
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def adapted(model, name):
    torch.manual_seed(1)
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False, **CONFIGS[name])
    )
    for p in made.parameters():
        # else nothing is trained where an adapter is off
        p.requires_grad_()
    return made.train()


def step(model):
    ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(2))
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, g in want[1].items():
        torch.testing.assert_close(
            got[1][name],
            g,
            rtol=1e-4,
            atol=1e-5 * float(g.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def fused(name, when):
    model = base()
    if when == "before":
        report = lossfuse.fuse_lm_head(model)
        return adapted(model, name), report
    model = adapted(model, name)
    return model, lossfuse.fuse_lm_head(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_steps(name, when):
    want = step(adapted(base(), name))
    model, report = fused(name, when)
    for at in range(3):
        made = report.made.total()
        assert_same(step(model), want)
        assert at == 0 or report.made.total() == made, "logits were made after the first step"
    assert report.fused["cross_entropy"] >= 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["head", "head trained whole"])
@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_adapters_off_and_on(name, when):
    stock = adapted(base(), name)
    with stock.disable_adapter():
        want_off = step(stock)
    want_on = step(stock)
    model, report = fused(name, when)
    step(model)
    for _ in range(2):
        with model.disable_adapter():
            assert_same(step(model), want_off)
        assert_same(step(model), want_on)
    assert report.fused["cross_entropy"] >= 4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_merged_and_unloaded(when):
    stock = adapted(base(), "head").merge_and_unload().train()
    want = step(stock)
    model, _ = fused("head", when)
    step(model)
    model.merge_adapter()
    torch.testing.assert_close(step(model)[0], want[0])
    model.unmerge_adapter()
    model = model.merge_and_unload().train()
    # unload puts back the model that was adapted, fused or not as it was
    report = lossfuse.fuse_lm_head(model)
    assert_same(step(model), want)
    before = report.fused["cross_entropy"]
    assert_same(step(model), want)
    assert report.fused["cross_entropy"] == before + 1


HEAD = {"target_modules": ["lm_head"]}
# methods of PEFT for a Linear -> a config for the head
METHODS = {
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, **HEAD),
    "LoRA with a bias": lambda: peft.LoraConfig(r=2, lora_bias=True, **HEAD),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **HEAD),
    "LoHa": lambda: peft.LoHaConfig(r=2, **HEAD),
    "LoKr": lambda: peft.LoKrConfig(r=2, **HEAD),
    "VeRA": lambda: peft.VeraConfig(r=4, **HEAD),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, **HEAD),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **HEAD),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **HEAD),
    "HRA": lambda: peft.HRAConfig(r=2, **HEAD),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, **HEAD),
    "trained tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], **HEAD),
}
NOT_DEFERRED = {
    "dropout": (
        lambda: peft.LoraConfig(r=2, lora_dropout=0.3, **HEAD),
        r"Dropout \(lora_dropout.default\) draws one mask",
    ),
    "dropped ranks": (
        lambda: peft.LoHaConfig(r=2, rank_dropout=0.5, **HEAD),
        "draws random numbers",
    ),
}


def with_method(config):
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config()).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_method_for_a_linear(name):
    model = with_method(METHODS[name])
    want = step(model)
    report = lossfuse.fuse_lm_head(model, options=lossfuse.LinearOptions(chunk_bytes=3 * 528 * 4))
    assert_same(step(model), want)
    assert report.fused == {"cross_entropy": 1} and not report.made


@pytest.mark.parametrize("name", NOT_DEFERRED)
def test_an_adapter_that_draws_numbers_is_not_deferred(name):
    config, why = NOT_DEFERRED[name]
    model = with_method(config)
    torch.manual_seed(2)
    want = step(model)
    report = lossfuse.fuse_lm_head(model)
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=why):
        got = step(model)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert report.made == {"forward": 1} and not report.fused


def test_logits_of_a_disabled_adapter_that_are_read_after_it_is_on_again():
    ids = torch.arange(24).view(2, 12)

    def reference(model, read):
        with model.disable_adapter():
            logits = model(input_ids=ids).logits
        value = read(logits[:, :-1])
        model.zero_grad()
        value.backward()
        return value.detach(), {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora" not in n
        }

    model = adapted(base(), "body and head")
    reads = (
        lambda z: z.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum(),
        lambda z: torch.nn.functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten()),
    )
    want = [reference(model, read) for read in reads]
    report = lossfuse.fuse_lm_head(model)
    for read, wanted in zip(reads, want, strict=True):
        assert_same(reference(model, read), wanted)
    assert report.fused == {"gather": 1, "cross_entropy": 1} and not report.made


SWITCHES = {
    "another adapter": lambda model: model.set_adapter("other"),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "another scale": lambda model: [
        m.scale_layer(3.0) for m in model.modules() if hasattr(m, "scale_layer")
    ],
    "eval": lambda model: model.eval(),
    "taken off": lambda model: model.unload(),
}


@pytest.mark.parametrize("when", ["before the loss", "before the backward"])
@pytest.mark.parametrize("name", SWITCHES)
def test_adapters_switched_after_the_forward(name, when):
    """PEFT freezes what is not active; the loss and its gradients are those of the forward."""

    def run(fuse):
        torch.manual_seed(1)
        model = peft.get_peft_model(base(), peft.LoraConfig(r=2, init_lora_weights=False, **HEAD))
        model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **HEAD))
        model.train()
        report = lossfuse.fuse_lm_head(model) if fuse else None
        ids = torch.arange(24).view(2, 12)
        logits = model(input_ids=ids).logits
        if when == "before the loss":
            SWITCHES[name](model)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if when == "before the backward":
            SWITCHES[name](model)
        flags = [p.requires_grad for p in model.parameters()]
        loss.backward()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert report is None or (report.fused == {"cross_entropy": 1} and not report.made)
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_same(run(True), run(False))


def test_adapters_merged_before_the_loss_are_named():
    model = adapted(base(), "head")
    lossfuse.fuse_lm_head(model)
    ids = torch.arange(24).view(2, 12)
    logits = model(input_ids=ids).logits
    model.merge_adapter()
    with pytest.raises(
        RuntimeError,
        match="merged_adapters of Linear has been changed|a parameter of the head has been changed",
    ):
        logits.logsumexp(-1)


def test_the_model_without_its_adapters_is_fused_still():
    model = adapted(base(), "body and head")
    report = lossfuse.fuse_lm_head(model)
    step(model)
    step(model.merge_and_unload().train())
    assert report.fused == {"cross_entropy": 2} and not report.made


@pytest.mark.parametrize("outer", [False, True], ids=["by the model", "by the adapted model"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_undone(when, outer):
    model, _ = fused("body", when)
    lossfuse.unfuse_lm_head(model if outer else model.get_base_model())
    ids = torch.arange(8)[None]
    assert type(model(input_ids=ids).logits) is torch.Tensor


@pytest.mark.filterwarnings("ignore:.* materializes the logits of a fused head")
def test_a_copy_has_its_own_adapter():
    model, report = fused("head", "after")
    other = copy.deepcopy(model)
    assert_same(step(other), step(model))
    assert report.fused == {"cross_entropy": 1}


def test_accelerate_makes_outputs_float32():
    """Under mixed precision every tensor of an output is cast, the logits too."""
    operations = pytest.importorskip("accelerate.utils.operations", reason="no accelerate here")
    ids = torch.arange(24).view(2, 12)
    losses = []
    for fuse in (False, True):
        model = base().bfloat16()
        report = lossfuse.fuse_lm_head(model) if fuse else None
        model.forward = operations.convert_outputs_to_fp32(model.forward)
        out = model(input_ids=ids)
        assert out.logits.dtype == torch.float32 and out["logits"].shape == (2, 12, V)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    assert report.fused == {"cross_entropy": 1} and not report.made
