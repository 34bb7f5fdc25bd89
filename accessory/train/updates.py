"""What the updates of a run will hold: how full its batches or packs are, and how often its rows come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accessory.data.loader import Loader
from accessory.data.mixture import BLOCK
from accessory.data.survey import Reader, batches
from accessory.tokens import IGNORE
from accessory.train.config import TrainConfig
from accessory.train.findings import Finding
from accessory.train.footprint import Shape

MOST_DRAWS = 8192  # that the share of padding is taken from


@dataclass(frozen=True)
class Filling:
    """The first ``number`` batches of a run, of so many ``rows``. ``wide``: positions that padded rows take together,
    or that their packs could hold; ``real`` of them hold a row, ``learned`` are learned. ``longest``: the batch that
    computes most."""

    number: int
    rows: int
    wide: int
    real: int
    learned: int
    longest: Shape


@dataclass(frozen=True)
class Course:
    """What a run's updates come to: plain values, what is wrong with them, and the shape of the largest batch."""

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    longest: Shape | None = None


def shares(loader: Loader) -> list[float]:
    """Of all draws, those from each source."""
    return [q / BLOCK for q in loader.mixture.quotas]


def filling(loader: Loader, reader: Reader, most: int) -> Filling | None:
    """How full the batches of the first ``most`` draws are; None where rows have no positions, or hardly one can be
    used: a batch would be long in coming."""
    positions = sum(c.positions for s in reader.surveys for c in s.counts)
    if not positions or sum(s.dropped for s in reader.surveys) > 0.9 * len(reader.known):
        return None
    number = rows = wide = real = learned = 0
    longest, packing = Shape(0, 0, 0, 0), loader.packing
    for batch in batches(loader, reader, most):
        filled, own = int(batch.mask.sum()), int((batch.labels[:, 1:] != IGNORE).sum())
        number, rows, real, learned = number + 1, rows + len(batch.ids), real + filled, learned + own
        wide += batch.ids.numel() if packing is None else loader.batch_size * packing.length
        # What is packed is computed as one row without padding.
        shape = (len(batch.ids), batch.ids.shape[1]) if packing is None else (1, filled)
        if shape[0] * shape[1] > longest.rows * longest.positions:
            longest = Shape(*shape, own, len(batch.tiles))
    return Filling(number, rows, wide, real, learned, longest)


def course(loader: Loader, reader: Reader, train: TrainConfig, copies: int) -> Course:
    """What the updates of ``train`` come to with ``copies`` data ranks."""
    rows, packing = sum(len(s.source) for s in reader.surveys), loader.packing
    found = filling(loader, reader, min(MOST_DRAWS, max(rows, loader.window * loader.batch_size)))
    at_once = train.accumulation * copies
    if packing is None:
        update: float = train.batch_size * at_once
    elif found is None:
        return Course()
    else:
        update = round(found.rows / found.number * at_once, 1)
    facts: dict[str, Any] = {"updates": _updates(reader, shares(loader), train, update, rows)}
    findings = []
    for survey, epochs in zip(reader.surveys, facts["updates"]["epochs"], strict=True):
        if epochs < 1 and not survey.source.unbounded:
            text = f"{survey.source.name}: train.max_steps {train.max_steps} draws {epochs:.0%} of its rows"
            findings.append(Finding("unseen", text))
    if packing is not None:
        facts["updates"]["packs_per_update"] = train.batch_size * at_once
    if found is None:
        return Course(facts, findings)
    full, name = found.real / found.wide, "real" if packing is None else "filled"
    facts["batches"] = {"looked_at": found.number, name: full, "learned": found.learned / found.wide}
    facts["batches"]["longest"] = dataclasses.asdict(found.longest)
    if full < 0.5 and packing is None:
        text = f"{1 - full:.0%} of what is computed is padding; a larger data.window sorts more rows by length"
        findings.append(Finding("padding", text))
    elif full < 0.5 and packing is not None:
        scarce = "" if packing.tiles is None else f", or data.packing.tiles {packing.tiles} is used up first"
        text = f"packs are {full:.0%} full: data.packing.length {packing.length} is much for these rows{scarce}"
        findings.append(Finding("packs", text))
    return Course(facts, findings, found.longest)


def _updates(reader: Reader, shares: Sequence[float], train: TrainConfig, update: float, rows: int) -> dict[str, Any]:
    times = [
        round(train.max_steps * update * share / len(s.source), 3)
        for s, share in zip(reader.surveys, shares, strict=True)
    ]
    each = -int(-rows // update)
    return {"rows_per_update": update, "per_epoch": each, "max_steps": train.max_steps, "epochs": times}
