"""A model folder without LoRA and scales: they are folded into the weights that they hang on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from accessory.models import build
from accessory.models.gate import hold, measure, merge_checked
from accessory.peft.attach import NormSpec, TrainSpec, attached, foldable


def fold_folder(source: Path, out: Path, *, tolerance: float | None = None) -> float:
    """Write the model of ``source`` to the new folder ``out`` with its LoRA and scales folded in, behind the gate.

    The folder then also holds the weights that were folded into; biases and prefixes stay what they are, and so does
    what hangs on weights that a prefix takes plain. Returns how far the logits of the fixed prompts moved, relative to
    their largest.

    Raises:
        ValueError: when there is nothing to fold, and as :func:`accessory.models.build.load`.
        GateError: when the logits moved too far; nothing is left of ``out`` then.
    """
    model = build.load(source, train=True)
    net = model.net.eval()
    full = foldable(net)
    if not full:
        raise ValueError(f"{source} has neither LoRA nor scales that can be folded: there is nothing to fold")
    before = measure(model)
    merge_checked(model, tolerance)
    for _, linear in full:
        linear.weight.requires_grad_(True)
        if linear.bias is not None:
            linear.bias.requires_grad_(True)
    own = {s.kind for s in model.config.tuning}  # and not what its base brings
    stays = tuple(s for s in attached(net) if s.kind in own and not isinstance(s, TrainSpec | NormSpec))
    config = replace(model.config, tuning=(*stays, TrainSpec(tuple(build.exported(net)))))
    build.save(replace(model, config=config), out)
    return hold(before, out, "folding into", tolerance=tolerance)
