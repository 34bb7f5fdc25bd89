"""Options of the one backbone beside LLaMA's own: they decode from a cache, are accelerated and tuned like the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from accessory.backbone.fast import accelerate
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.nn.block import Block
from accessory.nn.moe import MoEConfig
from accessory.nn.norm import LayerNorm
from accessory.peft.attach import LINEARS, LoraSpec, NormSpec, attach, merge, trainable_state
from tests.tiny_backbone import TINY, logits, model

FALCON = replace(TINY, norm="layer", gated=False, activation="gelu", n_kv_heads=1)
OPTIONS = {
    "mixtral": replace(TINY, moe=MoEConfig(4, 2)),
    "internlm": replace(TINY, qkv_bias=True, out_bias=True),
    "falcon-7b": replace(FALCON, order="parallel_one_norm"),
    "falcon-40b": replace(FALCON, order="parallel", n_kv_heads=2),
    "falcon-1b": replace(FALCON, qkv_bias=True, out_bias=True, mlp_bias=True),
}


@pytest.fixture(params=list(OPTIONS))
def config(request: pytest.FixtureRequest) -> LlamaConfig:
    return OPTIONS[request.param]


def test_acceleration_changes_no_logit(config: LlamaConfig) -> None:
    m = model(config)
    before = logits(m)
    accelerate(m)
    filled = [n for n, x in m.named_modules() if n.endswith(("kernel", "fused"))]
    assert len(filled) >= 2 * 3 + 1  # attention, its output and both halves of every feed-forward layer; the table
    torch.testing.assert_close(logits(m), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1.5)  # a packed copy of what was is not used
    assert not torch.allclose(logits(m), before, atol=1e-2)


@torch.no_grad()
def test_decoding_from_the_cache_is_the_whole_forward(config: LlamaConfig) -> None:
    m, ids = model(config), torch.randint(0, 40, (2, 12))
    whole, cache = m(m.embed(ids)), m.cache(2, 12)
    parts = [m(part, cache=cache) for part in m.embed(ids).split((5, 1, 4, 1, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(m(m.embed(ids[:, 5:])), whole[:, 5:], atol=1e-2)


def test_tuning_and_folding(config: LlamaConfig) -> None:
    m = model(config)
    before = logits(m)
    linears = [n for n in LINEARS if config.gated or n != "w3"]
    attach(m, (LoraSpec(rank=2, targets=tuple(linears)), NormSpec()))
    assert torch.equal(logits(m), before)
    trained = trainable_state(m)
    assert not any("gate" in name for name in trained)
    norms = 2 * (1 if config.order == "parallel_one_norm" else 2) + 1
    assert sum("norm" in n for n in trained) == norms * (2 if config.norm == "layer" else 1)
    for name, p in m.named_parameters():
        if "delta.b" in name:
            nn.init.normal_(p, std=0.1)
    tuned = logits(m)
    assert not torch.allclose(tuned, before, atol=1e-2)
    m.logits(m(m.embed(torch.arange(20)[None]))).square().sum().backward()
    missing = [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert merge(m) < 1e-5
    torch.testing.assert_close(logits(m), tuned, rtol=1e-3, atol=1e-3)


def test_a_layer_norm_that_trains_is_fp32_in_a_bf16_model() -> None:
    m = model(OPTIONS["falcon-40b"]).bfloat16()
    before = logits(m)
    for module in m.modules():
        if isinstance(module, LayerNorm):
            module.float()
    assert logits(m).dtype == torch.bfloat16
    assert torch.equal(logits(m), before)
    m.norm.bias.data += 1.0
    assert not torch.equal(logits(m), before)


def test_the_order_of_the_halves_matters() -> None:
    m = model(replace(TINY, order="parallel"))
    turn = Llama(TINY).eval()
    turn.load_state_dict(m.state_dict())
    assert not torch.allclose(logits(m), logits(turn), atol=1e-2)
    one = Llama(replace(TINY, order="parallel_one_norm")).eval()
    state = {k: v for k, v in m.state_dict().items() if "ffn_norm" not in k}
    one.load_state_dict(state)
    for block in m.layers:
        block.get_parameter("ffn_norm.weight").data.copy_(block.get_parameter("attention_norm.weight"))
    torch.testing.assert_close(logits(one), logits(m))
    with pytest.raises(ValueError, match="must be parallel"):
        Block(nn.Identity(), nn.Identity(), nn.Identity(), None)
