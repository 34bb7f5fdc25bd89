"""The zero-init prefix: its formula written out, context, caching, grouped queries."""

import math

import pytest
import torch
from torch import Tensor

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.nn.attention import Attention
from accessory.peft.attach import BiasSpec, LoraSpec, PrefixSpec, attach
from accessory.peft.prefix import Gate, ZeroInitPrefix
from tests.tiny import disturb
from tests.tiny_peft import CONFIG, inputs, make


@pytest.fixture
def x() -> Tensor:
    return inputs()


def reference(q: Tensor, attention: Attention, prefix: ZeroInitPrefix, context: Tensor | None, gate: Gate) -> Tensor:
    """The published formula, one head of one row at a time."""
    b, n_heads, _, a = q.shape
    out = torch.zeros_like(q)
    group = n_heads // (attention.wk.out_features // a)
    for row in range(b):
        tokens = prefix.tokens if context is None else prefix.tokens + context[row]
        k, v = attention.wk(tokens), attention.wv(tokens)
        for h in range(n_heads):
            cut = slice(h // group * a, (h // group + 1) * a)
            weights = torch.softmax(q[row, h] @ k[:, cut].T / math.sqrt(a), dim=-1)
            g = prefix.gate[h].tanh() if gate == "tanh" else prefix.gate[h]
            out[row, h] = g * (1 if prefix.new_gate is None else prefix.new_gate) * (weights @ v[:, cut])
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("gate", ["tanh", "raw"])
@pytest.mark.parametrize("new_gate", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
def test_the_formula(kv_heads: int, gate: Gate, new_gate: bool, with_context: bool) -> None:
    attention = Attention(16, 4, kv_heads, 4, qkv_bias=True)
    prefix = ZeroInitPrefix(4, 4, 16, length=5, gate=gate, new_gate=new_gate)
    for p in prefix.parameters():
        torch.nn.init.normal_(p)
    context = torch.randn(2, 5, 16) if with_context else None
    q = torch.randn(2, 4, 3, 4)
    expected = reference(q, attention, prefix, context, gate)
    torch.testing.assert_close(prefix(q, attention, context), expected)
    assert expected.abs().max() > 0.05


def test_context_reaches_the_prefix_and_differs_by_row(x: Tensor) -> None:
    model = make(PrefixSpec(length=4, layers=2))
    disturb(model, 0.3)
    context = torch.randn(2, 4, CONFIG.dim, requires_grad=True)
    y = model(x, context)
    assert (y - model(x)).abs().max() > 1e-3
    alone = model(x[1:], context[1:])
    torch.testing.assert_close(y[1:], alone)
    y.square().sum().backward()
    assert context.grad is not None
    assert (context.grad.abs().amax(dim=(1, 2)) > 0).all()


def test_context_of_another_length_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"3 tokens.*length 4"):
        make(PrefixSpec(length=4))(x, torch.zeros(2, 3, CONFIG.dim))


def test_context_without_prefix_changes_nothing(x: Tensor) -> None:
    model = make()
    assert torch.equal(model(x), model(x, torch.randn(2, 4, CONFIG.dim)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_equals_uncached(kv_heads: int) -> None:
    config = LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=kv_heads, ffn_dim=48, vocab_size=50)
    model = Llama(config).eval()
    attach(model, [PrefixSpec(length=5, layers=2, new_gate=True), LoraSpec(rank=2)])
    ids, context = torch.randint(0, 50, (2, 9)), torch.randn(2, 5, 32)
    plain = model(model.embed(ids))
    disturb(model, 0.3)
    x = model.embed(ids)
    whole = model(x, context=context)
    cache = model.cache(2, 9)
    parts = [model(part, cache=cache, context=context) for part in x.split((4, 3, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert (whole - plain).abs().max() > 0.01  # and the prefix mattered


def test_the_prefix_takes_no_position_and_uses_the_top_blocks() -> None:
    model = make(PrefixSpec(length=4, layers=2))
    assert [block.attention.prefix is not None for block in model.backbone.layers] == [False, True, True]
    cache = model.backbone.cache(1, 3)
    model.backbone(torch.randn(1, 3, CONFIG.dim), cache=cache)
    assert cache.length == 3


def test_the_prefix_goes_through_what_hangs_on_keys_and_values(x: Tensor) -> None:
    """With the prompt's own keys and values unchanged in size, LoRA on wv must change what the prefix returns."""
    model = make(PrefixSpec(length=4), LoraSpec(rank=2, targets=("wv",)))
    disturb(model, 0.3)
    attention = model.backbone.layers[0].attention
    q = torch.randn(1, 4, 2, 8)
    tuned = attention.prefix(q, attention, None)
    attention.wv.delta = None
    assert (attention.prefix(q, attention, None) - tuned).abs().max() > 1e-3


def test_a_plain_prefix_meets_the_weights_alone(x: Tensor) -> None:
    """As LLaMA-Adapter's own files have it: what hangs on wk and wv is for the prompt."""
    model = make(PrefixSpec(length=4, plain=True), LoraSpec(rank=2), BiasSpec())
    disturb(model, 0.3)
    attention = model.backbone.layers[0].attention
    q = torch.randn(1, 4, 2, 8)
    tuned = attention.prefix(q, attention, None)
    for linear in (attention.wk, attention.wv):
        linear.delta = None
        linear.bias = None
    assert torch.equal(attention.prefix(q, attention, None), tuned)


def test_initial_values_follow_the_reference() -> None:
    prefix = ZeroInitPrefix(4, 8, 64, length=50, new_gate=True)
    assert 0.95 < prefix.tokens.std() < 1.05
    assert prefix.gate.count_nonzero() == 0
    assert prefix.new_gate is not None
    assert prefix.new_gate.tolist() == [1.0]
    assert 0.09 < ZeroInitPrefix(4, 8, 64, length=50, init_std=0.1).tokens.std() < 0.11
