"""Frozen heads in few bits, of torchao and bitsandbytes: their own product, chunk by chunk, with
the gradients of what is before them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossfuse

D, V, N = 64, 96, 24
TARGET = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
X = torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def of_torchao(name, **options):
    quantization = pytest.importorskip("torchao.quantization", reason="no torchao here")
    inner = nn.Sequential(nn.Linear(D, V, bias=False))
    quantization.quantize_(inner, getattr(quantization, name)(**options))
    return inner[0]


def of_torchao_float8(recipe):
    float8 = pytest.importorskip("torchao.float8", reason="no torchao here")
    inner = nn.Sequential(nn.Linear(D, V, bias=False))
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    float8.convert_to_float8_training(inner, config=config)
    return inner[0]


def fake_quantized():
    qat = pytest.importorskip("torchao.quantization.qat", reason="no torchao here")
    quantization = pytest.importorskip("torchao.quantization")
    inner = nn.Sequential(nn.Linear(D, V, bias=False))
    activation = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantization.quantize_(
        inner, qat.QATConfig(activation_config=activation, weight_config=weight, step="prepare")
    )
    return inner[0]


def of_bitsandbytes(bits, **options):
    bnb = pytest.importorskip("bitsandbytes", reason="no bitsandbytes here").nn
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(2)) * 0.2
    if bits == 4:
        head = bnb.Linear4bit(D, V, bias=False, compute_dtype=torch.float32)
        head.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        head = bnb.Linear8bitLt(D, V, bias=False, has_fp16_weights=False, **options)
        head.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return head.to("cpu")


# heads -> why they are not deferred, or None
HEADS = {
    "torchao, int8 weights": (lambda: of_torchao("Int8WeightOnlyConfig"), None),
    "torchao, int4 in int8": (lambda: of_torchao("IntxWeightOnlyConfig"), None),
    "torchao, float8 weights": (lambda: of_torchao("Float8WeightOnlyConfig"), None),
    "torchao, float8 training by rows": (lambda: of_torchao_float8("rowwise"), None),
    "torchao, float8 training by tensors": (
        lambda: of_torchao_float8("tensorwise"),
        r"scales all rows together \(tensorwise\)",
    ),
    "torchao, fake quantization": (fake_quantized, None),
    "bitsandbytes, 4 bits": (lambda: of_bitsandbytes(4), None),
    "bitsandbytes, 8 bits": (lambda: of_bitsandbytes(8), None),
    "bitsandbytes, 8 bits and outliers": (
        lambda: of_bitsandbytes(8, threshold=6.0),
        "determines outliers from all rows together",
    ),
}


def step(model):
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(X), TARGET)
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_head(name):
    make, why = HEADS[name]
    torch.manual_seed(3)
    model = nn.Sequential()
    model.body, model.lm_head = nn.Linear(D, D), make()
    model.train()
    want = copy.deepcopy(step(model))
    report = lossfuse.fuse_lm_head(model, options=lossfuse.LinearOptions(chunk_bytes=5 * V * 4))
    if why is None:
        got = step(model)
        assert report.fused == {"cross_entropy": 1} and not report.made
    else:
        with pytest.warns(UserWarning, match=why):
            got = step(model)
        assert report.made == {"forward": 1} and not report.fused
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
