"""Rotary embedding: the property it exists for, and every context extension against transformers."""

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from accessory.nn.rope import RopeScaling, frequencies, rotate, table


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(m: int, n: int) -> float:
        at = [rotate(x, table(torch.tensor([[p]]), 16, 10000.0)) for x, p in ((q, m), (k, n))]
        return float((at[0] * at[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 7)) > 1e-2


def test_rotation_of_pairs() -> None:
    x = torch.randn(2, 3, 2, 8)
    angle = torch.rand(2, 3, 4)
    y = rotate(x, torch.complex(angle.cos(), angle.sin()))
    c, s = angle.cos()[:, :, None], angle.sin()[:, :, None]
    assert torch.allclose(y[..., 0::2], x[..., 0::2] * c - x[..., 1::2] * s, atol=1e-6)
    assert torch.allclose(y[..., 1::2], x[..., 0::2] * s + x[..., 1::2] * c, atol=1e-6)
    assert rotate(x.bfloat16(), torch.complex(c[:, :, 0], s[:, :, 0])).dtype == torch.bfloat16


def test_rotation_has_the_gradient_of_the_inverse_rotation() -> None:
    x = torch.randn(1, 2, 1, 4, requires_grad=True)
    rope = table(torch.tensor([[3, 8]]), 4, 100.0)
    g = torch.randn(1, 2, 1, 4)
    (dx,) = torch.autograd.grad(rotate(x, rope), x, g)
    assert torch.allclose(dx, rotate(g, rope.conj().resolve_conj()), atol=1e-6)


CASES = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        RopeScaling("llama3", 8.0, original_length=512),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        RopeScaling("yarn", 4.0, original_length=512),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_transformers(case: str) -> None:
    theirs, ours = CASES[case]
    config = HFConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10000.0, **theirs},
    )
    positions = torch.tensor([[0, 1, 77, 1500]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    mine = table(positions, 64, 10000.0, ours)
    assert torch.allclose(mine.real, cos[..., :32], atol=1e-4)
    assert torch.allclose(mine.imag, sin[..., :32], atol=1e-4)
    if ours is not None:
        assert (mine - table(positions, 64, 10000.0)).abs().max() > 0.1


def test_ntk_stretches_the_slowest_and_keeps_the_fastest() -> None:
    plain, _ = frequencies(64, 10000.0, None)
    ntk, factor = frequencies(64, 10000.0, RopeScaling("ntk", 8.0))
    assert factor == 1
    assert float(ntk[0]) == float(plain[0])
    assert float(plain[-1] / ntk[-1]) == pytest.approx(8.0, rel=1e-4)


def test_factor_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling.factor must be positive, got 0"):
        RopeScaling("linear", 0.0)
