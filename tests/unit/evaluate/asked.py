"""A test set without assets, in place of the built-in ones."""

from __future__ import annotations

import pytest

from accessory.evaluate import score as scoring
from accessory.schema import Sample
from tests.unit.models.pictured import picture, sample

QUESTIONS = ("What is this?", "How many birds are there in the picture?", "Where is the apple?")


def asked(count: int) -> list[Sample]:
    """Noise with questions of several lengths, every third picture wide; no answer is in it."""
    return [
        sample(picture(k, 96 if k % 3 == 0 else 48, 48), QUESTIONS[k % 3], answer=f"truth {k}") for k in range(count)
    ]


def stand_in(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Every built-in test set has these ``count`` questions."""
    monkeypatch.setattr(scoring, "build", lambda task, split, cache, size: asked(count))
