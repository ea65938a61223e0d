"""Causal language models of transformers, built tiny from their configs: fused, each is what it
was. None has code of its own here.

What a family does between head and loss is said beside it; it is why the family is in the list.
"""

# ruff: noqa: C408 (tables of keywords are shorter)

import copy
import functools
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lossfuse

transformers = pytest.importorskip("transformers")

B, T, V = 2, 12, 515
# rows of a chunk of logits: fewer than a twelfth of them
OPTIONS = lossfuse.LinearOptions(chunk_bytes=2 * 528 * 4)
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2)  # fmt: skip
SEQ2SEQ = dict(vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, dropout=0.0)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)  # fmt: skip
T5 = dict(vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A class of transformers and what of its config is not in ``base``."""

    model: str
    between: str
    config: dict = field(default_factory=dict)
    base: dict = field(default_factory=lambda: SMALL)
    seq2seq: bool = False
    rare: bool = False
    # operations that make the logits on the way to the loss
    makes: tuple[str, ...] = ()


FAMILIES = [
    Family("LlamaForCausalLM", "nothing"),
    Family("LlamaForCausalLM", "nothing, tied", dict(tie_word_embeddings=True)),
    Family("MistralForCausalLM", "nothing", rare=True),
    Family("MixtralForCausalLM", "nothing; experts and their loss", dict(num_local_experts=4,
        output_router_logits=True)),
    Family("Qwen2ForCausalLM", "nothing", rare=True),
    Family("Qwen3ForCausalLM", "nothing", rare=True),
    Family("Qwen3MoeForCausalLM", "nothing; experts", MOE, rare=True),
    Family("GemmaForCausalLM", "nothing, tied", rare=True),
    Family("Gemma2ForCausalLM", "soft cap, tied", dict(final_logit_softcapping=3.0)),
    Family("Gemma3ForCausalLM", "soft cap", dict(final_logit_softcapping=3.0)),
    Family("PhiForCausalLM", "nothing; a bias in the head"),
    Family("Phi3ForCausalLM", "nothing", rare=True),
    Family("GraniteForCausalLM", "divided by a scale", dict(logits_scaling=3.0)),
    Family("CohereForCausalLM", "times a scale, tied", dict(logit_scale=0.3)),
    Family("Cohere2ForCausalLM", "times a scale, tied", dict(logit_scale=0.3), rare=True),
    Family("GPT2LMHeadModel", "nothing, tied", dict(resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0), base=GPT),
    Family("GPTNeoXForCausalLM", "nothing; the head is embed_out", dict(hidden_dropout=0.0),
        rare=True),
    Family("GPTJForCausalLM", "nothing; a bias in the head", dict(rotary_dim=8), base=GPT,
        rare=True),
    Family("GPTNeoForCausalLM", "a cast to float32", dict(num_layers=1, num_heads=2,
        attention_types=[[["global"], 1]]), rare=True),
    Family("OPTForCausalLM", "contiguous", dict(ffn_dim=48, word_embed_proj_dim=32,
        dropout=0.0)),
    Family("BloomForCausalLM", "nothing, tied", dict(n_layer=1, n_head=2), rare=True),
    Family("FalconForCausalLM", "nothing", base={k: v for k, v in SMALL.items() if k !=
        "head_dim"}, rare=True),
    Family("StableLmForCausalLM", "nothing", rare=True),
    Family("OlmoForCausalLM", "nothing", rare=True),
    Family("Olmo2ForCausalLM", "nothing", rare=True),
    Family("GlmForCausalLM", "nothing", rare=True),
    Family("Starcoder2ForCausalLM", "nothing", dict(residual_dropout=0.0,
        embedding_dropout=0.0), rare=True),
    Family("MambaForCausalLM", "a cast to float32", dict(state_size=8)),
    Family("FalconMambaForCausalLM", "a cast to float32", dict(state_size=8), rare=True),
    Family("Mamba2ForCausalLM", "a cast to float32", dict(num_heads=4, state_size=8, n_groups=1,
        chunk_size=8), rare=True),
    Family("RecurrentGemmaForCausalLM", "soft cap by another name", dict(logits_soft_cap=3.0,
        lru_width=32), rare=True),
    Family("NanoChatForCausalLM", "soft cap by a third name", dict(final_logit_softcapping=3.0),
        rare=True),
    Family("GptOssForCausalLM", "nothing; experts", dict(num_local_experts=4,
        num_experts_per_tok=2), rare=True),
    Family("Ernie4_5ForCausalLM", "nothing", rare=True),
    Family("SmolLM3ForCausalLM", "nothing", rare=True),
    Family("HeliumForCausalLM", "nothing", rare=True),
    Family("BertLMHeadModel", "nothing; a head of layers before the product",
        dict(is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        rare=True),
    Family("DeepseekV3ForCausalLM", "nothing; experts", dict(n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, head_dim=8, num_key_value_heads=2, qk_nope_head_dim=8, v_head_dim=8,
        n_group=1, topk_group=1, first_k_dense_replace=1), rare=True),
    Family("FalconH1ForCausalLM", "times a scale by another name", dict(lm_head_multiplier=0.3,
        mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=8, mamba_d_head=8,
        mamba_n_groups=1), rare=True),
    Family("XGLMForCausalLM", "nothing; labels padded", dict(d_model=32, ffn_dim=48,
        num_layers=1, attention_heads=2, dropout=0.0, attention_dropout=0.0), rare=True),
    Family("CTRLLMHeadModel", "nothing; a bias in the head", dict(dff=48, resid_pdrop=0.0,
        embd_pdrop=0.0), base=GPT, rare=True),
    Family("InklingForCausalLM", "classes cut off", dict(unpadded_vocab_size=V - 5,
        swa_num_attention_heads=2, swa_num_key_value_heads=1, swa_head_dim=16, d_rel=4,
        rel_extent=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        rare=True),
    Family("T5ForConditionalGeneration", "hidden states scaled; its own loss", base=T5,
        seq2seq=True),
    Family("MT5ForConditionalGeneration", "its own loss, not tied", base=T5, seq2seq=True,
        rare=True),
    Family("BartForConditionalGeneration", "a buffer is added", base=SEQ2SEQ, seq2seq=True),
    Family("PegasusForConditionalGeneration", "a buffer is added", base=SEQ2SEQ, seq2seq=True,
        rare=True),
    Family("M2M100ForConditionalGeneration", "its own loss", base=SEQ2SEQ, seq2seq=True,
        rare=True),
    Family("BartForCausalLM", "nothing", base=SEQ2SEQ, rare=True),
]  # fmt: skip


def names(families):
    return [
        f"{f.model}, tied" if f.config.get("tie_word_embeddings") else f.model for f in families
    ]


ALL = [
    pytest.param(f, marks=pytest.mark.slow if f.rare else (), id=name)
    for f, name in zip(FAMILIES, names(FAMILIES), strict=True)
]


@functools.cache
def _built(at):
    """The model, float32 and in training mode; one test after the other has it, so it is left as it
    was."""
    family = FAMILIES[at]
    kind = getattr(transformers, family.model, None)
    if kind is None:
        return None
    config = kind.config_class(**{**family.base, **family.config})
    # what belongs to the sizes and is not in every config
    for name in ("layer_types", "mlp_layer_types"):
        if name in vars(config) and len(getattr(config, name) or []) > 1:
            setattr(config, name, getattr(config, name)[:1])
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    try:
        model = kind(config).train()
    except AssertionError as error:
        # Mamba of transformers 4 asks for a stream of CUDA
        if "not compiled with CUDA" not in str(error):
            raise
        return None
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.normal_()
        # heads are made small, and a cap or a scale of small logits is nothing
        head = model.get_output_embeddings()
        head.weight.mul_(0.8 / head.weight.std())
    return model


def built(family):
    model = _built(FAMILIES.index(family))
    if model is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model} that runs here")
    return model


def batch(family):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V - 8, (B, T), generator=g)
    labels = ids.clone()
    labels[0, :3] = -100
    if family.seq2seq:
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


class NoLogits(TorchDispatchMode):
    """Tensors of as many elements as all logits have, by the operator that made them."""

    def __init__(self, *few):
        super().__init__()
        self.made, self.few = [], few

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if (
                isinstance(t, torch.Tensor)
                and t.dim()
                and t.shape[-1] in self.few
                and t.numel() // t.shape[-1] in (B * T, B * (T - 1))
            ):
                self.made.append(str(func))
        return result


def step(model, family):
    """Loss and gradients by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    out = model(**batch(family))
    out.loss.backward()
    out.loss.detach_()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out, grads


def distance(got, want):
    """Over all gradients, relative."""
    off = sum((got[name].double() - want[name].double()).square().sum() for name in want)
    return float((off / sum(g.double().square().sum() for g in want.values())).sqrt())


@pytest.fixture
def fused():
    """Fuses for the time of a test."""
    models = []

    def fuse(model):
        models.append(model)
        return lossfuse.fuse_lm_head(model, options=OPTIONS)

    yield fuse
    for model in models:
        lossfuse.unfuse_lm_head(model)


@pytest.mark.parametrize("family", ALL)
def test_loss_and_gradients_equal_the_stock_model_in_float32(family, fused):
    """Tight, for every parameter, without a tensor of logits; and made on demand they are the
    model's own, bit for bit."""
    model = built(family)
    with NoLogits(V, V - 5) as watch:
        want, want_grads = step(model, family)
    assert watch.made, "logits of the stock model are not seen"
    report = fused(model)
    with NoLogits(V, V - 5) as watch:
        got, grads = step(model, family)
    assert watch.made == [], "a tensor like the logits was made"
    assert sum(report.fused.values()) == 1 and set(report.made) == set(family.makes), (
        report.fused,
        report.made,
    )
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-6, atol=1e-6)
    assert grads.keys() == want_grads.keys()
    for name, g in want_grads.items():
        beside = float(g.abs().max())
        torch.testing.assert_close(
            grads[name],
            g,
            rtol=1e-4,
            atol=1e-5 * beside + 1e-9,
            msg=lambda m, name=name: f"{name}: {m}",
        )

    assert got.logits.shape == want.logits.shape and got.logits.dtype == want.logits.dtype
    with pytest.warns(UserWarning, match="cpu makes the logits"):
        made = got.logits.cpu()
    assert torch.equal(made, want.logits)


@pytest.mark.parametrize(
    "family", [f for f in ALL if not f.values[0].seq2seq or f.values[0].model.startswith("Bart")]
)
def test_generate_equals_the_stock_model(family, fused):
    model = built(family)
    ids = batch(family)["input_ids"][:1, :4]
    told = {
        "max_new_tokens": 3,
        "do_sample": False,
        "use_cache": False,
        "attention_mask": torch.ones_like(ids),
    }
    mode = model.training
    try:
        # training mode too: generate() is under no_grad
        want = model.generate(ids, **told)
        report = fused(model)
        assert torch.equal(model.generate(ids, **told), want)
        assert not report.fused and not report.made
    finally:
        model.train(mode)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_bfloat16_is_as_precise_as_the_stock_model(family, fused):
    """The truth is the float32 model of the same rounded parameters; stock bfloat16 is off by its
    rounding, and we by no more."""
    built(family)
    # a fresh one: RecurrentGemma keeps its last state, which cannot be copied
    model = _built.__wrapped__(FAMILIES.index(family)).bfloat16()
    exact = copy.deepcopy(model).float()
    (true, true_grads), (stock, stock_grads) = step(exact, family), step(model, family)
    report = fused(model)
    with NoLogits(V, V - 5) as watch:
        got, grads = step(model, family)
    assert watch.made == [] and sum(report.fused.values()) == 1 and not report.made
    assert abs(float(got.loss - true.loss)) <= 1.2 * abs(
        float(stock.loss - true.loss)
    ) + 2e-3 * float(true.loss)
    assert distance(grads, true_grads) <= 1.2 * distance(stock_grads, true_grads) + 1e-3
    assert got.logits.dtype == stock.logits.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(got.logits + 0.0, stock.logits)


def test_a_saved_model_is_the_stock_model(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "stock")
    lossfuse.fuse_lm_head(model)
    model.save_pretrained(tmp_path / "fused")
    written = [
        sorted((f.name, f.read_bytes()) for f in (tmp_path / name).iterdir())
        for name in ("stock", "fused")
    ]
    assert written[0] == written[1]
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused")
    assert "forward" not in again.lm_head.__dict__ and torch.equal(
        again.lm_head.weight, model.lm_head.weight
    )
