"""Whether a model that dreams knows when a picture is wanted: what it would say first after a turn of the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from accessory.data import builtin
from accessory.models.conditioner import DreamConditioner

SETS = {"emoji-requests": True, "small-talk": False, "emoji-names": False}
"""Test sets of single turns, and whether the answer is a picture."""
HEAD = "| what the user says | of | a picture comes | should |\n|---|---:|---:|---|"


@torch.inference_mode()
def rates(conditioner: DreamConditioner, cache: Path | None = None, limit: int | None = None) -> Iterator[str]:
    """Lines of a Markdown table (see ``HEAD``): for each set how often the trigger is what greedy decoding says first.

    Rows of several turns are left out: whether their earlier turns held a picture would be asked as well.
    """
    dream = conditioner.dream
    for name, wanted in SETS.items():
        rows = builtin.build(name, "test", cache=cache, turns=1 if name == "emoji-names" else None)
        asked = [turns[:1] for turns in (rows[i].turns for i in range(len(rows))) if len(turns) == 2]
        step = 1 if limit is None else max(1, len(asked) // limit)
        asked = asked[::step][:limit]
        drawn = 0
        for turns in asked:
            ids, tiles = conditioner.context(turns)
            device = dream.queries.device
            states = dream.read(ids[None].to(device), tiles.to(device) if len(tiles) else None)
            drawn += int(dream.logits(states.final[:, -1]).argmax()) == dream.trigger_id
        yield f"| {name} | {len(asked)} | {100 * drawn / len(asked):.1f} % | {'yes' if wanted else 'no'} |"
