"""PEFT's adapters, put on before and after the head is fused: losses and gradients are stock's, and fused from the second step on."""

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
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def adapted(model, name):
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False, **CONFIGS[name]))
    for p in made.parameters():
        # else nothing is trained where an adapter is off
        p.requires_grad_()
    return made.train()


def step(model):
    ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(2))
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, g in want[1].items():
        torch.testing.assert_close(got[1][name], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def fused(name, when):
    model = base()
    if when == "before":
        report = lossfuse.fuse_lm_head(model)
        return adapted(model, name), report
    model = adapted(model, name)
    return model, lossfuse.fuse_lm_head(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.* makes the logits of a fused head")
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
@pytest.mark.filterwarnings("ignore:.* makes the logits of a fused head")
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
@pytest.mark.filterwarnings("ignore:.* makes the logits of a fused head")
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


@pytest.mark.parametrize("outer", [False, True], ids=["by the model", "by the adapted model"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_undone(when, outer):
    model, _ = fused("body", when)
    lossfuse.unfuse_lm_head(model if outer else model.get_base_model())
    ids = torch.arange(8)[None]
    assert type(model(input_ids=ids).logits) is torch.Tensor


@pytest.mark.filterwarnings("ignore:.* makes the logits of a fused head")
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
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    assert report.fused == {"cross_entropy": 1} and not report.made
