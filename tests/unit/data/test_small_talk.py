"""Talk without a picture, and whether a model that dreams is silent with pictures then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.data import builtin
from accessory.data.small_talk import OPENERS
from accessory.evaluate import trigger
from accessory.models.conditioner import DreamConditioner
from tests.tiny_generator import tiny_generator

pytestmark = pytest.mark.assets


def test_the_last_answer_is_never_a_picture_unless_it_was_asked_for() -> None:
    rows = builtin.build("small-talk", "train")
    drawn = 0
    for i in range(200):
        turns = rows[i].turns
        assert [t.role for t in turns] == ["user", "assistant"] * (len(turns) // 2)
        pictures = [bool(t.pictures) for t in turns]
        assert (sum(pictures) == 1) == (len(turns) > 2)  # what is drawn was asked for in two more turns or four
        assert not any(p for t, p in zip(turns, pictures, strict=True) if t.role == "user")
        drawn += sum(pictures)
    assert 50 < drawn < 110
    assert rows[3].turns[0].text == rows[3].turns[0].text


def test_the_test_says_what_training_never_said() -> None:
    train, test = (builtin.build("small-talk", split) for split in ("train", "test"))
    said = {t.text for i in range(len(train)) for t in train[i].turns}
    openers = {asked for asked, _ in OPENERS}
    new = {turn.text for i in range(300) for turn in test[i].turns if turn.role == "user"} & openers
    assert len(new) == len(OPENERS) // 4
    assert not new & said
    assert said & openers


@pytest.mark.parametrize(("direction", "share"), [(1.0, "100.0"), (-1.0, "0.0")])
def test_rates_count_the_trigger(tmp_path: Path, direction: float, share: str) -> None:
    model = tiny_generator(tmp_path, "dream").eval()
    assert isinstance(model.conditioner, DreamConditioner)
    dream = model.conditioner.dream
    assert dream.start_output is not None
    ids, _ = model.conditioner.context(builtin.build("small-talk", "test")[0].turns[:1])
    with torch.no_grad():
        # Final states are normed: one direction scores high wherever the state leans to it.
        state = dream.read(ids[None]).final[0, -1].float()
        dream.start_output.copy_(direction * 1e4 * state)
    line = next(line for line in trigger.rates(model.conditioner, limit=2) if "small-talk" in line)
    assert f"| 2 | {share} % | no |" in line
