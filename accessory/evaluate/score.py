"""Scores of a model on built-in test sets, each beside its controls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from accessory.backbone.generate import Sampling, generate
from accessory.data.builtin import build
from accessory.evaluate.metrics import judge
from accessory.models.build import Model
from accessory.schema import Sample, Turn

Control = Literal["none", "shuffled", "blind"]
TASKS: tuple[str, ...] = (
    "emoji-names",
    "scenes-grounding",
    "scenes-count",
    "scenes-relation",
    "scenes-colour",
    "scenes-region",
    "scenes-wide",
    "words-ocr",
    "easy-vqa",
)
MAX_NEW_TOKENS = 32  # a box takes 24


@dataclass(frozen=True)
class Item:
    """One question: what was asked, the truth, the answer, and the verdict."""

    index: int
    question: str
    truth: str
    answer: str
    right: bool


@dataclass(frozen=True)
class ScoreRow:
    """The result of one task under one control. ``seconds`` is wall time, drawing the pictures included."""

    task: str
    control: Control
    correct: int
    total: int
    seconds: float
    items: tuple[Item, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total


def score(
    model: Model,
    task: str,
    *,
    limit: int | None = None,
    control: Control = "none",
    cache: Path | None = None,
    batch_size: int = 64,
) -> ScoreRow:
    """Ask ``model`` every question of a task's test split (or the first ``limit``, spread evenly), greedily.

    ``control`` shuffled: each question gets another question's picture; blind: it gets none. What remains is what
    the words alone give away. The score does not depend on ``batch_size`` (up to ties in low precision).

    Raises:
        ValueError: for an unknown task or a limit below 2; AssetError when its asset is missing.
    """
    begin = time.monotonic()
    rows = build(task, "test", cache=cache, size=model.config.tiling.size)
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}, it must be at least 2 (a shuffle of one picture changes nothing)")
    total = len(rows) if limit is None else min(limit, len(rows))
    chosen = [k * len(rows) // total for k in range(total)]
    right = judge(task)
    items: list[Item] = []
    for start in range(0, total, batch_size):
        part = range(start, min(start + batch_size, total))
        samples = [rows[chosen[k]] for k in part]
        if control != "none":
            # Half a turn around the set: no picture stays, and neighbours of one kind are left far behind.
            samples = [without(s, rows[chosen[(k + total // 2) % total]], control) for k, s in zip(part, samples)]
        for k, sample, answer in zip(part, samples, answers(model, samples), strict=True):
            truth = sample.turns[-1].text
            items.append(Item(chosen[k], sample.turns[-2].text, truth, answer, right(answer, truth)))
    return ScoreRow(task, control, sum(i.right for i in items), total, time.monotonic() - begin, tuple(items))


def without(sample: Sample, other: Sample, control: Control) -> Sample:
    """The same question without its picture, or with another's."""
    pictures = other.turns[0].pictures if control == "shuffled" else ()
    words = tuple(p for p in sample.turns[0].parts if isinstance(p, str))
    return replace(sample, turns=(Turn(sample.turns[0].role, (*pictures, *words)), *sample.turns[1:]))


@torch.inference_mode()
def answers(
    model: Model,
    samples: Sequence[Sample],
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    sampling: Sampling | None = None,
    prefill: str = "",
) -> list[str]:
    """Answers to the last question of each dialogue (its own last answer is not shown to the model).

    Greedy with at most ``max_new_tokens``, unless a ``sampling`` says otherwise, whose stops are added to the
    template's. ``prefill`` is put into the model's mouth: answers begin behind it.
    """
    rows = [model.encoder.encode(replace(s, turns=s.turns[:-1]), generate=True) for s in samples]
    if prefill:
        said = torch.tensor(model.tokenizer.encode(prefill, glued=True), dtype=torch.long)
        rows = [replace(r, ids=torch.cat((r.ids, said))) for r in rows]
    sampling = sampling or Sampling(max_new_tokens=max_new_tokens)
    stop = tuple(model.tokenizer.special(n) for n in model.template.stop_controls)
    sampling = replace(sampling, stop_ids=tuple(dict.fromkeys((*stop, *sampling.stop_ids))))
    x, context = model.net.prompts(rows)
    tokens = generate(model.net.backbone, x, sampling=sampling, context=context)
    texts = [model.tokenizer.decode([t for t in row if t not in sampling.stop_ids]) for row in tokens]
    return [_cut(text, (*model.template.stop_texts, *sampling.stop)).strip() for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
