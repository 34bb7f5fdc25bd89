"""Attention: against the textbook formula, in every way it is called."""

import pytest
import torch
from torch import Tensor, nn

from accessory.nn.attention import Attention, attend, explicit
from accessory.nn.rope import table


def textbook(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def qkv(t: int, s: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 6, t, 8), torch.randn(2, kv_heads, s, 8), torch.randn(2, kv_heads, s, 8)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_causal(kv_heads: int) -> None:
    q, k, v = qkv(5, 5, kv_heads)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.allclose(attend(q, k, v, None), textbook(q, k, v, allowed), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("masked", ["no", "shared", "per head"])
def test_single_query(kv_heads: int, masked: str) -> None:
    """One new token: grouped heads must read their own keys, with and without padding."""
    q, k, v = qkv(1, 7, kv_heads)
    mask = torch.rand(2, {"no": 1, "shared": 1, "per head": 6}[masked], 1, 7) > 0.4
    mask[..., -1] = True
    allowed = torch.ones_like(mask) if masked == "no" else mask
    y = attend(q, k, v, None if masked == "no" else mask)
    assert torch.allclose(y, textbook(q, k, v, allowed), atol=1e-5)
    if 1 < kv_heads < 6:
        assert (y - textbook(q, k.flip(1), v.flip(1), allowed)).abs().max() > 0.1


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_general_mask(kv_heads: int) -> None:
    q, k, v = qkv(4, 9, kv_heads)
    mask = (torch.rand(2, 1, 4, 9) > 0.5) | (torch.arange(9) == 0)
    assert torch.allclose(attend(q, k, v, mask), textbook(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", ["causal", "shared", "per head", "one row for all"])
def test_explicit_formula(kv_heads: int, masked: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(5, 5, kv_heads))
    shape = {"causal": (5, 5), "shared": (2, 1, 5, 5), "per head": (2, 6, 5, 5), "one row for all": (2, 1, 1, 5)}[
        masked
    ]
    allowed = torch.ones(shape, dtype=torch.bool).tril() if masked == "causal" else torch.rand(shape) > 0.4
    allowed = allowed | (torch.arange(5) == 0)
    y, expected = explicit(q, k, v, None if masked == "causal" else allowed), textbook(q, k, v, allowed)
    assert torch.allclose(y, expected, atol=1e-5)
    g = torch.randn_like(y)
    for mine, theirs in zip(torch.autograd.grad(y, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g)):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert (explicit(q, k, v, torch.ones(1, 1, 5, 5, dtype=torch.bool)) - y).abs().max() > 0.1


def test_short_bf16_sequences_take_the_explicit_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("accessory.nn.attention.explicit", lambda *a: (calls.append(a), explicit(*a))[1])
    q, k, v = (x.bfloat16() for x in qkv(6, 6, 2))
    y = attend(q, k, v, None)
    assert len(calls) == 1
    exact = textbook(q.float(), k.float(), v.float(), torch.ones(6, 6, dtype=torch.bool).tril())
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.04
    attend(q.float(), k.float(), v.float(), None)
    attend(q[:, :, :1], k, v, None)
    attend(*(x.bfloat16() for x in qkv(600, 600, 2)), None)
    assert len(calls) == 1


def test_prefix_slot_adds_before_the_output_projection() -> None:
    attention = Attention(16, 4, 2, 4)
    x, rope = torch.randn(1, 3, 16), table(torch.arange(3)[None], 4, 100.0)
    added = torch.randn(1, 4, 3, 4)

    class Prefix(nn.Module):
        def forward(self, q: Tensor, owner: Attention, context: Tensor | None) -> Tensor:
            assert q.shape == added.shape
            assert owner is attention
            return added

    before = attention(x, rope, None)
    attention.prefix = Prefix()
    difference = attention(x, rope, None) - before
    assert torch.allclose(difference, attention.wo(added.transpose(1, 2).flatten(2)), atol=1e-6)
    assert difference.abs().max() > 0.01
