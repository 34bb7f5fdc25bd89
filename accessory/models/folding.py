"""A model folder without LoRA and scales: they are folded into the weights that they hang on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from accessory.models import build
from accessory.models.gate import hold, measure, merge_checked
from accessory.peft.attach import BiasSpec, PrefixSpec, TrainSpec, slotted


def fold_folder(source: Path, out: Path, *, tolerance: float | None = None) -> float:
    """Write the model of ``source`` to the new folder ``out`` with its LoRA and scales folded in, behind the gate.

    The folder then also holds the weights that were folded into; biases and prefixes stay what they are. Returns how
    far the logits of the fixed prompts moved, relative to their largest.

    Raises:
        ValueError: when there is nothing to fold, and as :func:`accessory.models.build.load`.
        GateError: when the logits moved too far; nothing is left of ``out`` then.
    """
    model = build.load(source, train=True)
    net = model.net.eval()
    full = [(n, m) for n, m in slotted(net) if not (m.delta is None and m.scale is None)]
    if not full:
        raise ValueError(f"{source} has neither LoRA nor scales: there is nothing to fold")
    before = measure(model)
    merge_checked(model, tolerance)
    for _, linear in full:
        linear.weight.requires_grad_(True)
        if linear.bias is not None:
            linear.bias.requires_grad_(True)
    stays = tuple(s for s in model.config.tuning if isinstance(s, BiasSpec | PrefixSpec))
    config = replace(model.config, tuning=(*stays, TrainSpec(tuple(build.exported(net)))))
    build.save(replace(model, config=config), out)
    return hold(before, out, "folding into", tolerance=tolerance)
