"""Towers against the libraries used directly: random weights, fp32, outputs and input gradients."""

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.vision import weights
from accessory.vision.tower import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Tower
from accessory.vision.towers import OpenClipTower, TimmTower, open_clip_tower, transformers_tower

TINY_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0},
}
TINY_TRUNK = {
    "embed_dim": 12,
    "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
}
TINY_DINO = {
    "patch_size": 7,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "use_swiglu_ffn": True,
    "layer_norm_eps": 1e-6,
}


def scramble(model: nn.Module, seed: int = 1) -> None:
    """Every parameter and statistic away from its initial value, so that no zero or one hides a mistake."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=gen)
            if "running_var" in name or (value.ndim == 1 and name.endswith(("weight", "gamma", "lambda1"))):
                value.copy_(0.5 + noise)
            else:
                value.copy_((noise - 0.5) * 2 / max(1.0, (value.numel() / max(1, value.shape[0])) ** 0.5))


def normal(x: Tensor, mean: Any, std: Any) -> Tensor:
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def both(tower: Tower, reference: Callable[[Tensor], Tensor], size: int) -> None:
    """Outputs and input gradients of tower and reference agree on two tiles."""
    x = torch.rand(2, 3, size, size)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = tower.eval().tokens(a)[0], reference(b)
    assert out.std() > 1e-3
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-4)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (want * probe).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad, atol=1e-4 * float(b.grad.abs().max()), rtol=1e-3)


def test_efficientnet_equals_timm() -> None:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    scramble(model)
    tower = TimmTower("tf_efficientnet_lite0", 64, (-1, -2), norm=False, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    body = {k: v for k, v in model.state_dict().items() if not k.startswith(("conv_head", "bn2", "classifier"))}
    weights.load_tower(tower, body)

    def reference(x: Tensor) -> Tensor:
        maps = model.forward_intermediates((255 * x - 127) / 128, intermediates_only=True)
        return torch.cat([maps[4], F.pixel_unshuffle(maps[3], 2)], 1).flatten(2).mT

    both(tower, reference, 64)


def test_timm_transformer_equals_timm() -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    model = VisionTransformer(**args, num_classes=0).eval()
    scramble(model)
    tower = TimmTower(VisionTransformer(**args), 32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    weights.load_tower(tower, model.state_dict())
    both(tower, lambda x: model.forward_features(normal(x, IMAGENET_MEAN, IMAGENET_STD)), 32)


def _clip(activation: Any, projected: bool) -> tuple[Tower, nn.Module]:
    cfg = CLIPVisionCfg(**TINY_CLIP["vision_cfg"], image_size=32, pool_type="none")
    visual = _build_vision_tower(12, cfg, quick_gelu=activation == "quick_gelu").eval()
    scramble(visual)
    state = {f"visual.{k}": v for k, v in visual.state_dict().items()}
    if not projected:
        visual.proj = None
    tower = open_clip_tower("tiny", 32, config=TINY_CLIP, activation=activation, projected=projected)
    text = {"token_embedding.weight": torch.zeros(3, 4), "logit_scale": torch.zeros(()), "ln_final.bias": torch.ones(4)}
    weights.load_tower(tower, weights.open_clip_visual({**state, **text}, projected))
    return tower, visual


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_transformer_equals_open_clip(activation: str, projected: bool) -> None:
    tower, visual = _clip(activation, projected)
    both(tower, lambda x: visual(normal(x, CLIP_MEAN, CLIP_STD)), 32)


def test_clip_activation_matters() -> None:
    tower, _ = _clip("gelu", False)
    _, other = _clip("quick_gelu", False)
    x = torch.rand(1, 3, 32, 32)
    assert (tower.eval().tokens(x)[0] - other(normal(x, CLIP_MEAN, CLIP_STD))).abs().max() > 1e-3


def test_clip_pictures_do_not_see_each_other() -> None:
    tower, visual = _clip("gelu", False)
    x = torch.rand(3, 3, 32, 32)
    whole = tower.eval().tokens(x)[0]
    singles = torch.cat([tower.tokens(x[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(whole, singles, atol=1e-5, rtol=1e-4)
    # the trap: the same blocks fed sequence-first attend across the batch, and nothing raises
    seq = visual._embeds(normal(x, CLIP_MEAN, CLIP_STD)).transpose(0, 1)
    wrong = visual.ln_post(visual.transformer(seq).transpose(0, 1))
    assert (wrong - whole).abs().max() > 1e-2


def test_convnext_trunk_equals_open_clip() -> None:
    cfg = CLIPVisionCfg(**TINY_TRUNK["vision_cfg"], image_size=64)
    trunk = _build_vision_tower(12, cfg).eval().trunk
    scramble(trunk)
    tower = open_clip_tower("tiny", 64, config=TINY_TRUNK, grid=(4, 4))
    weights.load_tower(tower, trunk.state_dict())
    trunk.head.global_pool, trunk.head.flatten = nn.Identity(), nn.Identity()  # as SPHINX does; the norm stays

    def reference(x: Tensor) -> Tensor:
        return F.interpolate(trunk(normal(x, CLIP_MEAN, CLIP_STD)), scale_factor=2, mode="nearest").flatten(2).mT

    both(tower, reference, 64)


def test_convnext_last_norm_matters() -> None:
    tower = open_clip_tower("tiny", 64, config=TINY_TRUNK).eval()
    scramble(tower.model)
    x = torch.rand(1, 3, 64, 64)
    bare = tower.model.forward_features(tower.normalise(x)).flatten(2).mT
    assert (tower.tokens(x)[0] - bare).abs().max() > 1e-2


def test_dinov2_and_siglip_equal_transformers() -> None:
    from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

    dino = Dinov2Model(Dinov2Config(**TINY_DINO, image_size=28)).eval()
    scramble(dino)
    tower = transformers_tower("dinov2", 28, config=TINY_DINO)
    weights.load_tower(tower, dino.state_dict())
    both(tower, lambda x: dino(normal(x, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state, 28)
    tiny = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**tiny, image_size=32, vision_use_head=False)).eval()
    scramble(siglip)
    tower = transformers_tower("siglip", 32, config=tiny)
    weights.load_tower(tower, siglip.state_dict())
    both(tower, lambda x: siglip(2 * x - 1).last_hidden_state, 32)


def test_qformer_equals_blip2() -> None:
    from transformers import Blip2Config, Blip2Model, OPTConfig

    vision = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision["intermediate_size"] = 24
    core = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = OPTConfig(
        vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, word_embed_proj_dim=8
    )
    config = Blip2Config(
        vision_config={**vision, "image_size": 32},
        qformer_config={**core, "encoder_hidden_size": 16},
        text_config=text.to_dict(),
        num_query_tokens=5,
    )
    blip = Blip2Model(config).eval()
    scramble(blip)
    tower = transformers_tower("qformer", 32, config=vision, qformer=core, num_queries=5, group="qformer")
    language = ("language_model.", "language_projection.")
    weights.load_tower(tower, {k: v for k, v in blip.state_dict().items() if not k.startswith(language)})
    assert tower.groups[0].num_tokens == 5

    def reference(x: Tensor) -> Tensor:
        out = blip.get_qformer_features(pixel_values=normal(x, CLIP_MEAN, CLIP_STD))
        return out if isinstance(out, Tensor) else out.last_hidden_state

    both(tower, reference, 32)


def test_published_dinov2_keys_against_timm() -> None:
    """timm keeps DINOv2's own names but for the SwiGLU matrices, so it stands in for the original code."""
    args = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(
        **args, mlp_ratio=128 / 24 + 1e-6, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=0.1
    ).eval()
    scramble(model)
    state = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in model.state_dict().items()}
    tower = transformers_tower("dinov2", 28, config=TINY_DINO)
    mapped = weights.dinov2({**state, "mask_token": torch.zeros(1, 24)}, tower.grid)
    weights.load_tower(tower, mapped)
    both(tower, lambda x: model.forward_features(normal(x, IMAGENET_MEAN, IMAGENET_STD)), 28)
    # and the order of the two stacked halves matters
    key = "encoder.layer.0.mlp."
    swapped = {**mapped}
    for end in ("weight", "bias"):
        swapped[f"{key}gate_proj.{end}"] = mapped[f"{key}up_proj.{end}"]
        swapped[f"{key}up_proj.{end}"] = mapped[f"{key}gate_proj.{end}"]
    x = torch.rand(1, 3, 28, 28)
    right = tower.tokens(x)[0]
    weights.load_tower(tower, swapped)
    assert (tower.tokens(x)[0] - right).abs().max() > 1e-3


def test_resized_positions_equal_transformers_and_legacy_differs() -> None:
    from transformers import Dinov2Config, Dinov2Model

    big = Dinov2Model(Dinov2Config(**TINY_DINO, image_size=63)).eval()
    scramble(big)
    tower = transformers_tower("dinov2", 28, config=TINY_DINO)
    state = dict(big.state_dict())
    name = "embeddings.position_embeddings"
    exact = weights.resize_positions(state[name], (4, 4))
    weights.load_tower(tower, {**state, name: exact})
    both(tower, lambda x: big(normal(x, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state, 28)
    legacy = weights.resize_positions(state[name], (4, 4), legacy=True)
    assert legacy.shape == exact.shape
    assert (legacy - exact).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mean", "std"])
def test_the_constants_matter(name: str) -> None:
    tower, visual = _clip("gelu", False)
    x = torch.rand(1, 3, 32, 32)
    right = tower.eval().tokens(x)[0]
    getattr(tower, name).copy_(torch.tensor(IMAGENET_MEAN if name == "mean" else IMAGENET_STD).view(3, 1, 1))
    assert (tower.tokens(x)[0] - right).abs().max() > 1e-3
    assert isinstance(tower, OpenClipTower)
    assert visual(normal(x, CLIP_MEAN, CLIP_STD)).shape == right.shape


def test_open_clip_knows_our_names() -> None:
    for name in ("ViT-L-14", "convnext_xxlarge"):
        assert open_clip.get_model_config(name) is not None
