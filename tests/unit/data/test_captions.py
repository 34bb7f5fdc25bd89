"""Emoji to be drawn: who asks, what is kept from training."""

from __future__ import annotations

import numpy as np
import pytest

from accessory.data import builtin, emoji, requests
from accessory.data.targets import TargetEncoder
from accessory.schema import CAPTION, Picture

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
    kinds, unnamed = set(), 0
    for index in range(300):
        sample = made[index]
        assert not sample.meta[CAPTION]
        *said, drawn = sample.turns
        assert [turn.role for turn in said] == ["user", "assistant", "user"][: len(said)]
        assert drawn.role == "assistant"
        assert isinstance(drawn.parts[-1], Picture)
        style, answer = emoji.STYLE_WORDS[sample.meta["style"]], sample.meta["answer"]
        assert drawn.text in ("", f"Here you are: {style} emoji of {answer}.")
        unnamed += not drawn.text
        kinds.add((len(said), sample.meta["answer"] in " ".join(turn.text for turn in said)))
    assert kinds == {(turns, named) for turns in (1, 3) for named in (True, False)}
    assert 10 <= unnamed <= 60  # of 300: one in ten comes at once, as where it is forced
    at_once = next(made[i] for i in range(300) if not made[i].turns[-1].text)
    assert TargetEncoder(64).encode(at_once).targets[0].prompt == at_once.turns[:-1]
    test = builtin.build("emoji-requests", "test", size=64)
    assert all(len(test[i].turns) == 2 and test[i].meta["answer"] in test[i].turns[0].text for i in range(20))


def test_requests_by_keywords_hide_the_name_until_the_answer() -> None:
    made = builtin.build("emoji-keywords", "train", size=64)
    named = 0
    for index in range(200):
        *said, drawn = made[index].turns
        name = made[index].meta["answer"]
        named += any(f" {name} " in f" {turn.text} " for turn in said)
        assert not drawn.text or drawn.text.endswith(f"emoji of {name}.")
    assert named < 20  # where a keyword is the name


def test_keywords_that_are_held_back_never_come_together() -> None:
    tags = ("quux", "blip", "frob", "zonk")
    concept, rng = emoji.Concept("1", "thing", tags, "", ""), np.random.default_rng(0)
    held_back = requests.withheld(concept, {"quux": 3, "blip": 4, "frob": 1, "zonk": 2})
    assert held_back == ("frob", "zonk")
    together = set()
    for _ in range(400):
        said = " ".join(requests.said(concept, "flat", held_back, rng, training=True))
        together.add(tuple(tag for tag in tags if tag in said))
    assert not any(set(held_back) <= set(found) for found in together)
    assert {("quux", "blip"), ("blip", "frob"), ("zonk",), ()} <= together
