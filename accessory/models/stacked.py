"""A model on top of another: what its configuration may say, and how what it tunes goes onto the base."""

from __future__ import annotations

from copy import copy
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from accessory.data import template
from accessory.peft.attach import attach, attached, merge
from accessory.peft.quantize import Quantization, found, quantize
from accessory.peft.tuning import promote

if TYPE_CHECKING:  # which builds what stands below
    from accessory.models.build import Model, ModelConfig

BESIDE = ("tuning", "quantization", "template", "max_length")
"""What a configuration says beside its base; all else is the base's."""


def over(config: ModelConfig, base: ModelConfig) -> ModelConfig:
    """The configuration ``base`` with what ``config`` may say beside it; ValueError when that says more."""
    plain = type(config)(base=config.base, base_sha256=config.base_sha256)
    said = [f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
    if bad := [n for n in said if n not in BESIDE and getattr(config, n) != getattr(base, n)]:
        raise ValueError(
            f"model.base {config.base} brings its own {', '.join(bad)}; beside it only {', '.join(BESIDE)} are named"
        )
    own = {n: getattr(config, n) for n in said if n in BESIDE}
    return replace(base, **{"tuning": (), "base": config.base, **own})


def stack(base: Model, config: ModelConfig, digest: str, train: bool) -> Model:
    """The base model, frozen as it was trained, with the tuning of ``config`` on top; ``digest``: its SHA-256.

    Raises:
        ValueError: for another base than ``config`` was trained on, for what only a base says, and for a second prefix
            or bias.
    """
    if config.base_sha256 not in (None, digest):
        raise ValueError(
            f"model.base {config.base} is not the one that this model was trained on: its trained tensors have SHA-256 "
            f"{digest}, base_sha256 is {config.base_sha256}"
        )
    resolved = replace(over(config, base.config), base_sha256=digest)
    if config.tuning:
        kinds, there = {spec.kind for spec in config.tuning}, {spec.kind for spec in attached(base.net)}
        for kind in sorted(kinds & there & {"prefix", "bias"}):  # these cannot be folded into a weight
            way = f'{{kind: train, patterns: ["backbone.*.{kind}{".*" if kind == "prefix" else ""}"]}}'
            raise ValueError(
                f"model.base {config.base} already has a {kind}, and there is room for one; to train that one further, "
                f"write {way} in model.tuning in place of kind {kind}"
            )
        if kinds & there & {"lora", "scale"}:
            merge(base.net)  # a linear holds one delta: the base's own is folded into its weight
        _quantize(base.net, config.quantization)
        attach(base.net, config.tuning, dtype=torch.float32)
    _quantize(base.net, config.quantization)
    base.net.requires_grad_(False) if not train else promote(base.net)
    encoder = copy(base.encoder)
    encoder.template, encoder.max_length = template.get(resolved.template), resolved.max_length
    return replace(base, net=base.net.train(train), encoder=encoder, config=resolved)


def _quantize(net: nn.Module, wanted: Quantization | None) -> None:
    """Quantise the backbone, unless it is just so already."""
    if wanted is not None and found(net) != wanted:
        quantize(net, wanted)
