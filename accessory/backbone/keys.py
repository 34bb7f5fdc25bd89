"""What a checkpoint of a config must hold, said strictly, and the config of our own folder layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.backbone import store
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.nn.moe import MoEConfig
from accessory.nn.rope import RopeScaling

SHOWN = 20


def build_meta(config: LlamaConfig) -> Llama:
    """The model without memory: parameters on ``meta``."""
    with torch.device("meta"):
        return Llama(config)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that a checkpoint of ``config`` must hold."""
    return {k: tuple(v.shape) for k, v in build_meta(config).state_dict().items()}


def check_keys(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare a checkpoint with what the model needs.

    Raises:
        ValueError: one, listing missing, unexpected and mis-shaped keys (the first 20 of each, and the count).
    """
    missing = [k for k in expected if k not in tensors]
    unexpected = [k for k in tensors if k not in expected]
    shaped = [
        f"{k}: {tuple(tensors[k].shape)}, needs {shape}"
        for k, shape in expected.items()
        if k in tensors and tuple(tensors[k].shape) != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "mis-shaped": shaped}
    lines = [
        f"{len(keys)} {name}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
        for name, keys in found.items()
        if keys
    ]
    if lines:
        raise ValueError(f"{where} does not fit the model. " + "; ".join(lines))


def config_to_dict(config: LlamaConfig) -> dict[str, Any]:
    """JSON-ready fields of ``config``."""
    return dataclasses.asdict(config)


def config_from_dict(fields: Mapping[str, Any]) -> LlamaConfig:
    """The inverse of :func:`config_to_dict`.

    Raises:
        ValueError: for a field that does not exist.
    """
    known = {f.name for f in dataclasses.fields(LlamaConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"unknown backbone option(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    values = dict(fields)
    scaling = values.get("rope_scaling")
    if scaling is not None:
        try:
            values["rope_scaling"] = RopeScaling(**scaling)
        except TypeError as error:
            raise ValueError(f"backbone.rope_scaling {scaling!r} is wrong: {error}") from None
    if values.get("moe") is not None:
        try:
            values["moe"] = MoEConfig(**values["moe"])
        except TypeError as error:
            raise ValueError(f"backbone.moe {values['moe']!r} is wrong: {error}") from None
    return LlamaConfig(**values)


def write_config(folder: Path, config: LlamaConfig, **more: Any) -> None:
    """Write the ``config.json`` of our layout, with further entries where there are any."""
    stated = {"format": "accessory", "backbone": config_to_dict(config), **more}
    store.write_json(Path(folder) / "config.json", stated)
