"""A model on top of another: what its configuration may say, and how what it tunes goes onto the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from accessory.data import template
from accessory.nn import unread
from accessory.peft.attach import LoraSpec, PrefixSpec, ScaleSpec, TuningSpec, attach, attached, merge
from accessory.peft.quantize import found, quantize
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


def folds(name: str | None, there: Sequence[TuningSpec], tuning: Sequence[TuningSpec]) -> bool:
    """Whether LoRA and scales of the base ``name``, to which ``there`` is attached, are folded into its weights before
    ``tuning`` is attached: a linear holds one of each.

    Raises:
        ValueError: for a second prefix or bias, which cannot be folded, and for a second LoRA or scale of linears that
            the base's prefixes take without what hangs on them.
    """
    shared = {spec.kind for spec in tuning} & {spec.kind for spec in there}
    for kind in sorted(shared & {"prefix", "bias"}):
        raise ValueError(f"model.base {name} already has a {kind}, and there is room for one; {_further(kind)}")
    slots = shared & {"lora", "scale"}
    plain = any(isinstance(spec, PrefixSpec) and spec.plain for spec in there)
    for spec in there if slots and plain else ():
        if isinstance(spec, LoraSpec | ScaleSpec) and (on := [t for t in spec.targets if t in ("wk", "wv")]):
            raise ValueError(
                f"model.base {name} has plain prefixes and a {spec.kind} on {', '.join(on)}, which therefore cannot be "
                f"folded to make room for another {' and '.join(sorted(slots))}; {_further(spec.kind)}"
            )
    return bool(slots)


def _further(kind: str) -> str:
    slot = {"prefix": "prefix.*", "lora": "delta.*"}.get(kind, kind)
    return (
        f'to train that one further, write {{kind: train, patterns: ["backbone.*.{slot}"]}} in model.tuning in place '
        f"of kind {kind}"
    )


def stack(base: Model, config: ModelConfig, digest: str, train: bool) -> Model:
    """The base model, frozen as it was trained, with the tuning of ``config`` on top; ``digest``: its SHA-256.

    Raises:
        ValueError: for another base than ``config`` was trained on, for what only a base says, and as :func:`folds`.
    """
    if config.base_sha256 not in (None, digest):
        raise ValueError(
            f"model.base {config.base} is not the one that this model was trained on: its trained tensors have SHA-256 "
            f"{digest}, base_sha256 is {config.base_sha256}"
        )
    resolved = replace(over(config, base.config), base_sha256=digest)
    folded = folds(config.base, attached(base.net), config.tuning)
    quantised = config.quantization is not None and found(base.net) != config.quantization
    if folded or quantised:
        unread.read(base.net)  # both need whole weights
        unread.make(base.net)
    if folded:
        merge(base.net)
    if config.quantization is not None and quantised:
        quantize(base.net, config.quantization)
    attach(base.net, config.tuning, dtype=torch.float32)
    base.net.requires_grad_(False) if not train else promote(base.net)
    name, length = resolved.dialogues
    encoder = base.encoder.under(template.get(name), max_length=length)
    return replace(base, net=base.net.train(train), encoder=encoder, config=resolved)
