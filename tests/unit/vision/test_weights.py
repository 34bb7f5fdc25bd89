"""Key maps: published files onto our names, every key accounted for."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from accessory.vision import weights
from accessory.vision.mixture import Mixture
from accessory.vision.presets import build

STAGES = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1)}


def published_lite(variant: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(file, timm state) of one random model; the file's names are written in the order its layers run."""
    model = timm.create_model(f"tf_efficientnet_{variant}")
    ours = model.state_dict()
    for value in ours.values():
        if value.is_floating_point():
            value.uniform_(0.1, 1)
    pairs = [("_conv_stem", "conv_stem"), ("_bn0", "bn1"), ("_conv_head", "conv_head"), ("_bn1", "bn2")]
    pairs.append(("_fc", "classifier"))
    number = 0
    for stage, depth in enumerate(STAGES[variant]):
        for block in range(depth):
            layers = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            theirs = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            if number == 0:
                layers, theirs = ["conv_dw", "bn1", "conv_pw", "bn2"], theirs[2:]
            pairs += [(f"_blocks.{number}.{t}", f"blocks.{stage}.{block}.{o}") for t, o in zip(theirs, layers)]
            number += 1
    file = {f"{t}.{k[len(o) + 1 :]}": v for t, o in pairs for k, v in ours.items() if k.startswith(f"{o}.")}
    assert len(file) == len(ours)
    return file, ours


@pytest.mark.parametrize("variant", ["lite0", "lite1"])
def test_lite_file_lands_on_timm_names(tmp_path: Path, variant: str) -> None:
    file, ours = published_lite(variant)
    torch.save(file, tmp_path / "w.pth")
    full = weights.load_efficientnet_lite(tmp_path / "w.pth", head=True, variant=variant)
    assert set(full) == set(ours)
    assert all(torch.equal(full[k], v) for k, v in ours.items())


def test_lite_file_fills_the_default_tower(tmp_path: Path) -> None:
    file, ours = published_lite("lite0")
    torch.save(file, tmp_path / "w.pth")
    tower = build("efficientnet-lite0")
    weights.load_tower(tower, weights.load_efficientnet_lite(tmp_path / "w.pth"))
    assert torch.equal(tower.get_parameter("model.blocks.6.0.conv_pwl.weight"), ours["blocks.6.0.conv_pwl.weight"])


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    file, _ = published_lite("lite0")
    del file["_blocks.3._bn1.bias"]
    file["_blocks.2._what.weight"] = torch.zeros(1)
    file["_fc.bias"] = torch.zeros(7)
    torch.save(file, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="do not fit EfficientNet-lite0") as caught:
        weights.load_efficientnet_lite(tmp_path / "w.pth")
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing blocks.2.0.bn2.bias",
        "unexpected _blocks.2._what.weight",
        "mis-shaped classifier.bias: (7,), expected (1000,)",
    ]


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Path("y")}, tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        weights.load_efficientnet_lite(tmp_path / "w.pth")


def published_sphinx(mix: Mixture) -> dict[str, Tensor]:
    """The mixture's own weights under the names of a SPHINX file, leftovers and language model included."""
    out: dict[str, Tensor] = {}
    clip = mix.member("clip").get_submodule("model").state_dict()
    out |= {f"clip.visual.{k}": v for k, v in clip.items()}
    text = ("visual.proj", "token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight")
    out |= {f"clip.{k}": torch.zeros(2, 2) for k in (*text, "logit_scale")}
    for name in ("openclip_convnext_xxl", "qformer"):
        out |= {f"{name}.{k}": v for k, v in mix.member(name).get_submodule("model").state_dict().items()}
    dino = mix.member("dinov2_vitg14").get_submodule("model").state_dict()
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "encoder.layer.0": "blocks.0",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    for end in ("weight", "bias"):
        parts = [dino.pop(f"encoder.layer.0.attention.{x}_proj.{end}") for x in "qkv"]
        out[f"dinov2_vitg14.blocks.0.attn.qkv.{end}"] = torch.cat(parts)
    for key, value in dino.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[f"dinov2_vitg14.{key}"] = value
    return {f"llma.{k}": v for k, v in out.items()}


def test_sphinx_file_fills_a_mixture_and_returns_the_rest() -> None:
    source, target = build("tiny-sphinx"), build("tiny-sphinx")
    assert isinstance(source, Mixture)
    assert isinstance(target, Mixture)
    x = torch.rand(1, 3, 32, 32)
    assert (source.tokens(x)[1] - target.tokens(x)[1]).abs().max() > 1e-3
    rest = {"llma.layers.0.attention.wq.weight": torch.zeros(2, 2), "llma.visual_proj.0.bias": torch.zeros(2)}
    back = weights.load_sphinx(target, {**published_sphinx(source), **rest})
    assert set(back) == {"layers.0.attention.wq.weight", "visual_proj.0.bias"}
    for a, b in zip(source.tokens(x), target.tokens(x), strict=True):
        assert torch.equal(a, b)


def test_sphinx_misfits_are_listed() -> None:
    mix = build("tiny-sphinx")
    assert isinstance(mix, Mixture)
    state = published_sphinx(mix)
    state["llma.qformer.extra"] = state.pop("llma.qformer.query_tokens")
    with pytest.raises(ValueError, match=r"missing members\.qformer\.model\.query_tokens") as caught:
        weights.load_sphinx(mix, state)
    assert "unexpected members.qformer.model.extra" in str(caught.value)


def test_an_encoder_that_the_mixture_lacks_is_an_error() -> None:
    mix = build("tiny-sphinx")
    assert isinstance(mix, Mixture)
    light = Mixture(32, {n: mix.member(n) for n in mix.channel}, resize={"openclip_convnext_xxl": "nearest"})
    with pytest.raises(ValueError, match=r"unexpected members\.qformer"):
        weights.load_sphinx(light, published_sphinx(mix))


def test_positions_that_fit_are_left_alone() -> None:
    table = torch.randn(1, 17, 4)
    assert weights.resize_positions(table, (4, 4)) is table
    out = weights.resize_positions(table.to(torch.bfloat16), (3, 3), legacy=True)
    assert out.shape == (1, 10, 4)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:, 0], table[:, 0].to(torch.bfloat16))
    with pytest.raises(ValueError, match="12 rows is not a square"):
        weights.resize_positions(torch.zeros(1, 12, 4), (3, 3))
