"""Checks of a run before it starts: its template, its rows, and placeholders against features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from accessory.data.collate import collate
from accessory.data.encode import Encoder
from accessory.data.loader import RowEncoder
from accessory.data.survey import Place, Reader, Survey, Tally
from accessory.data.template import Control
from accessory.models.mllm import MLLM
from accessory.schema import Batch, Encoded
from accessory.tokens import DREAM, DREAM_END, DREAM_START, IMAGE, IMAGE_END, IMAGE_START, NAMES, SKIP
from accessory.train.findings import Finding, Meaning


def template_gaps(encoder: Encoder) -> list[Finding]:
    """Control tokens that the template names and the vocabulary does not have."""
    template, findings = encoder.template, list[Finding]()
    pieces = [p for f in fields(template) if isinstance(v := getattr(template, f.name), tuple) for p in v]
    for name in dict.fromkeys(p.name for p in pieces if isinstance(p, Control)):
        said: list[Finding] = []
        with Meaning("template", said):
            encoder.tokenizer.special(name)
        ends = " and ends answers with it" if Control(name) in template.end else ""
        findings += [Finding(f.code, f"template {template.name} writes {name}{ends}: {f.text}") for f in said]
    return findings


def prompts_cut(lost: Callable[[Encoded], list[int]], row: Encoded) -> list[Finding]:
    """What a generator does not read of the prompts of a row."""
    findings: list[Finding] = []
    with Meaning("prompt", findings):
        if any(lost(row)):
            findings.append(Finding("prompt", "prompts are longer than the text profile reads, and lose their end"))
    return [Finding(f.code, f.text, 1, (Place(row.source, row.index, None, ""),)) for f in findings]


# --- rows ---------------------------------------------------------------------------------------------------------


def after_reading(
    reader: Reader, shares: Sequence[float], max_bad_rate: float, encoder: RowEncoder, learned: int
) -> list[Finding]:
    """What the rows of all sources come to. ``shares`` of draws by source; ``learned``: labels and pictures in all."""
    findings: list[Finding] = []
    for survey in reader.surveys:
        findings += _of_rows(survey, encoder)
    rate = sum(share * s.dropped / s.read for share, s in zip(shares, reader.surveys, strict=False) if s.read)
    if rate > max_bad_rate:
        text = f"{rate:.1%} of the draws are dropped, data.max_bad_rate is {max_bad_rate:.1%}: the run would stop"
        findings.append(Finding("bad-rows", text))
    if reader.known and not learned:
        text = f"none of {len(reader.known)} rows has a label or a picture that the objective learns"
        findings.append(Finding("nothing-learned", text))
    return findings


def _of_rows(survey: Survey, encoder: RowEncoder) -> list[Finding]:
    name, read = survey.source.name, f"of {survey.read} rows that were read"
    findings: list[Finding] = []

    def add(code: str, tally: Tally, text: str) -> None:
        findings.append(Finding(code, f"{name}: {text}", tally.count, tuple(tally.examples)))

    for (verdict, _), tally in survey.rejected.items():
        reason = tally.examples[0].said
        if verdict == "too-long":
            reason = _too_long(survey, encoder)
        add(verdict, tally, f"{tally.count} {read} {_are(tally)} dropped: {reason}")
    if survey.unlearned.count:
        add("no-label", survey.unlearned, f"{survey.unlearned.count} {read} teach nothing: no label is learned")
    for said, tally in survey.odd.items():
        add("roles" if said.startswith("role") else "empty", tally, f"{tally.count} {read}: {said}")
    if survey.doubles.count:
        add("duplicate", survey.doubles, f"{survey.doubles.count} {read} repeat an earlier one")
    return findings


def _are(tally: Tally) -> str:
    return "is" if tally.count == 1 else "are"


def _too_long(survey: Survey, encoder: RowEncoder) -> str:
    assert isinstance(encoder, Encoder)
    limit, longest = encoder.max_length, max(c.positions for c in survey.over)
    full = sum(c.placeholders >= limit for c in survey.over)
    text = f"they are longer than max_length {limit}, the longest has {longest} positions (rows are never cut)"
    if full:
        text += f"; in {full} of them the pictures alone take that: too many pictures, or too many tiles a picture"
    return text


# --- placeholders -------------------------------------------------------------------------------------------------


def placeholders(reader: Reader, net: MLLM, embed: Callable[[Batch], Any], encoder: RowEncoder) -> list[Finding]:
    """Placeholders of all rows against the features that tower and projector really give, and a few rows embedded as
    the run embeds them."""
    findings: list[Finding] = []
    kept = [row for s in reader.surveys for _, row in s.kept]
    with torch.no_grad():
        tiles = next((row.tiles[:1] for row in kept if len(row.tiles)), None)
        if tiles is not None and net.projector is not None:
            features = int(net.encode(tiles).shape[1])
            for survey in reader.surveys:
                bad = [c for c in survey.counts if not c.agrees(features)]
                if bad:
                    text = (
                        f"{survey.source.name}: rows hold {bad[0].images} <image> placeholders for {bad[0].tiles} "
                        f"tiles, for which tower and projector give {bad[0].tiles * features} features"
                    )
                    findings.append(Finding("placeholders", text, len(bad)))
        for row in _few(kept):
            with Meaning("placeholders", findings):
                embed(collate([row], encoder.pad_id))
            strange = {i for i in row.ids.tolist() if i < 0} - _filled(net)
            if strange:
                names = ", ".join(NAMES[i] for i in sorted(strange))
                findings.append(Finding("placeholders", f"rows hold {names}, for which the model has no vector"))
    return findings


def _few(rows: Sequence[Encoded]) -> list[Encoded]:
    """Of rows with pictures, with drawn ones and with neither, the shortest."""
    kinds: dict[tuple[bool, bool], Encoded] = {}
    for row in sorted(rows, key=lambda r: len(r.ids)):
        kinds.setdefault((len(row.tiles) > 0, len(row.targets) > 0), row)
    return list(kinds.values())


def _filled(net: MLLM) -> set[int]:
    """Placeholders that some vector takes the place of (those of dreams are checked by the bridge itself)."""
    filled = {DREAM, DREAM_START, DREAM_END}
    if net.projector is None:
        return filled
    return filled | {IMAGE, SKIP} | ({IMAGE_START, IMAGE_END} if net.projector.start_end else set())
