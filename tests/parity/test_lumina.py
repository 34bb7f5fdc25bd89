"""The same numbers as diffusers' port of Next-DiT (LuminaNextDiT2DModel), in fp32, weights going both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Steering
from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.diffusion.dit_weights import diffusers_arguments, from_tensors, to_diffusers
from accessory.diffusion.flag_dit import FlagDiT
from tests.unit.diffusion.dits import NEXT, far, noise, randomised, told

CONFIGS = {"grouped": replace(NEXT, keep_sigma=True), "full": replace(NEXT, keep_sigma=True, n_kv_heads=None)}
X, T = noise(2, 4, 6, 8), torch.tensor([0.2, 0.7])


def theirs(config: FlagDiTConfig) -> LuminaNextDiT2DModel:
    """The library's model with every parameter random."""
    torch.manual_seed(3)
    model = LuminaNextDiT2DModel(sample_size=16, **diffusers_arguments(config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.15)
            if "norm" in name and name.endswith("weight") and p.ndim == 1:
                p.add_(1)
        for layer in model.layers:
            layer.attn2.to_q.load_state_dict(layer.attn1.to_q.state_dict())
            layer.attn2.norm_q.load_state_dict(layer.attn1.norm_q.state_dict())
    return model


def call(
    model: LuminaNextDiT2DModel, x: torch.Tensor, condition: Condition, linear: float = 1.0, ntk: float = 1.0
) -> torch.Tensor:
    rope = get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384, linear_factor=linear, ntk_factor=ntk)
    assert condition.mask is not None
    return model(x, T[: len(x)], condition.seq, condition.mask.long(), rope, {}, return_dict=False)[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_their_weights_here(kind: str) -> None:
    config = CONFIGS[kind]
    library = theirs(config)
    ours = from_tensors(library.state_dict(), keep_sigma=True).eval()
    condition = told(config, 2)
    x = X.clone().requires_grad_()
    mine, other = ours(x, T, condition), call(library, x, condition)
    assert other.abs().max() > 0.1
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mine, other)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)
    shuffled = ours.state_dict()
    shuffled["layers.0.attention.gate"] = -shuffled["layers.0.attention.gate"]
    ours.load_state_dict(shuffled)
    with torch.no_grad():
        assert far(ours(x, T, condition), other) > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_our_weights_there(kind: str) -> None:
    config = CONFIGS[kind]
    ours = randomised(config)
    library = LuminaNextDiT2DModel(sample_size=16, **diffusers_arguments(config)).eval()
    library.load_state_dict(to_diffusers(ours.state_dict()))
    condition = told(config, 2)
    with torch.no_grad():
        plain = call(library, X, condition)
        torch.testing.assert_close(ours(X, T, condition), plain, atol=2e-5, rtol=1e-4)
        for method, factors in (("linear", {"linear": 1.5}), ("ntk", {"ntk": 1.5})):
            stretched = call(library, X, condition, **factors)
            steering = Steering(rope_scale=1.5, rope_method=method)  # type: ignore[arg-type]
            torch.testing.assert_close(ours(X, T, condition, steering=steering), stretched, atol=2e-5, rtol=1e-4)
            assert far(stretched, plain) > 1e-3


def test_the_library_has_the_same_parameters_at_full_size() -> None:
    from accessory.diffusion.dit_sizes import SIZES

    for name in ("next_t2i_2b", "next_t2i_2b_mha"):
        with torch.device("meta"):
            ours = to_diffusers(FlagDiT(SIZES[name]).state_dict())
            library = LuminaNextDiT2DModel(**diffusers_arguments(SIZES[name])).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in library.items()}
