"""Emoji to be drawn: who asks, what is kept from training."""

from __future__ import annotations

import pytest

from accessory.data import builtin, emoji
from accessory.data.targets import TargetEncoder
from accessory.schema import CAPTION

pytestmark = pytest.mark.assets


def test_held_out_pairs_are_never_trained() -> None:
    train, test = (builtin.build("emoji-captions", s, size=64) for s in ("train", "test"))
    known = emoji.concepts()
    hidden = {(s, c.hexcode) for s in emoji.STYLES for c in known if emoji.held_out(s, c.hexcode)}
    assert 0.035 < len(hidden) / (3 * len(known)) < 0.065
    assert len(train) == 3 * len(known) - len(hidden)
    assert len(test) == 2 * len(hidden)
    rows = [test[i] for i in range(len(test))]
    pairs = {(r.meta["style"], known[r.meta["concept"]].hexcode) for r in rows if r.meta["held_out"]}
    assert pairs == hidden
    shown = {(r.meta["style"], known[r.meta["concept"]].hexcode) for r in rows if not r.meta["held_out"]}
    assert len(shown) == len(hidden)
    assert not shown & hidden
    seen = {(r.meta["style"], known[r.meta["concept"]].hexcode) for r in (train[i] for i in range(0, len(train), 7))}
    assert not seen & hidden


def test_a_caption_asks_for_one_plain_picture() -> None:
    made = builtin.build("emoji-captions", "test", size=64)
    row = TargetEncoder(64).encode(made[0])
    [target] = row.targets
    label = made[0].meta["answer"]
    assert target.prompt == f"{emoji.STYLE_WORDS[made[0].meta['style']]} emoji of {label}"
    assert target.pixels.shape == (3, 64, 64)
    assert target.key == TargetEncoder(64).encode(made[len(made)]).targets[0].key  # a later pass draws the same
    train = builtin.build("emoji-captions", "train", size=64)
    asked = {train[k * len(train)].turns[0].text for k in range(40)}
    assert len(asked) > 1  # keywords and groups come along now and then


def test_requests_are_dialogues() -> None:
    made = builtin.build("emoji-requests", "train", size=64)
    sample = made[3]
    assert not sample.meta[CAPTION]
    assert TargetEncoder(64).encode(sample).targets[0].prompt == sample.turns[:1]
