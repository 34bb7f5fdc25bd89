"""What is said before a picture: greedy, the same in a batch, and part of what the picture is dreamt from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.evaluate.trigger import named
from accessory.models.conditioner import DreamConditioner
from accessory.models.dream import Dream
from accessory.models.dream_reply import Reply, replies
from accessory.models.generator import load_generator, save_generator
from accessory.models.generator_config import DreamSource
from accessory.schema import Turn
from tests.tiny_generator import DREAM, PROFILE, tiny_generator
from tests.unit.models.dreams import VOCAB, dream, mllm, text

LIMIT = 6


def one_by_one(bridge: Dream, row: Tensor, stops: set[int]) -> Reply:
    """The same without a cache or a batch."""
    said: list[int] = []
    for _ in range(LIMIT):
        ids = torch.cat((row, torch.tensor(said, dtype=row.dtype)))[None]
        token = int(bridge.logits(bridge.read(ids).final[0, -1]).argmax())
        if token == bridge.trigger_id or token in stops:
            return Reply(tuple(said), token == bridge.trigger_id)
        said.append(token)
    return Reply(tuple(said), False)


@pytest.mark.parametrize("trigger", [None, 11])
@torch.no_grad()
def test_a_batch_is_answered_as_each_alone(trigger: int | None) -> None:
    bridge = dream(net=mllm(), trigger=trigger)
    rows = [row for seed in range(12) for row in text(3, 9, 5, seed=seed)]
    alone = [one_by_one(bridge, row, set()) for row in rows]
    stops = {alone[0].ids[1]}  # a token that is said
    alone = [one_by_one(bridge, row, stops) for row in rows]
    assert replies(bridge, rows, None, LIMIT, stops, 9) == alone
    assert len({reply.ids for reply in alone}) > 6  # what is said depends on the context
    assert {len(reply.ids) for reply in alone} >= {LIMIT}
    assert replies(bridge, rows[:1], None, LIMIT, stops, 9) == alone[:1]


@torch.no_grad()
def test_the_trigger_ends_a_reply() -> None:
    bridge = dream(net=mllm())
    (row,) = text(5)
    (plain,) = replies(bridge, [row], None, LIMIT, set(), 9)
    assert not plain.draws
    assert bridge.start_output is not None
    at = torch.cat((row, torch.tensor(plain.ids[:2])))[None]
    bridge.start_output.copy_(bridge.read(at).final[0, -1] * 100)
    (drawn,) = replies(bridge, [row], None, LIMIT, set(), 9)
    assert drawn.draws
    assert drawn.ids == plain.ids[: len(drawn.ids)]
    assert len(drawn.ids) <= 2
    assert max(drawn.ids, default=0) < VOCAB


@torch.no_grad()
def test_a_dialogue_is_drawn_from_what_was_said(tmp_path: Path) -> None:
    asked = [(Turn("user", ("a red square",)),), (Turn("user", ("blue, please, and large",)),)]
    made = {}
    for reply in (0, 5):
        source = DreamSource(str(tmp_path / "tiny"), DREAM, PROFILE, reply=reply)
        model = tiny_generator(tmp_path, "dream", conditioner=source)
        save_generator(model, tmp_path / f"saved{reply}")
        made[reply] = load_generator(tmp_path / f"saved{reply}").conditioner
    said, silent = made[5], made[0]
    assert isinstance(said, DreamConditioner)
    assert isinstance(silent, DreamConditioner)
    assert (said.reply, silent.reply) == (5, 0)
    found = said.replies(asked, 5)
    assert any(reply.ids for reply in found)
    longer = [torch.cat((said.context(p)[0], torch.tensor(r.ids))) for p, r in zip(asked, found, strict=True)]
    told, by_hand = said.condition(asked), [said.dream.condition(row[None]) for row in longer]
    assert told.seq is not None
    assert told.mask is not None
    for i, one in enumerate(by_hand):
        assert one.seq is not None
        torch.testing.assert_close(told.seq[i][told.mask[i]], one.seq[0], atol=1e-5, rtol=1e-5)
    at_once = silent.condition(asked)
    assert at_once.seq is not None
    assert at_once.seq.shape[1] < told.seq.shape[1]
    texts = said.condition(["a red square"]), silent.condition(["a red square"])
    assert torch.equal(texts[0].seq, texts[1].seq)  # type: ignore[arg-type]  # a caption is no request: nothing is said


def test_a_reply_counts_tokens() -> None:
    with pytest.raises(ValueError, match=r"conditioner\.reply is -1"):
        DreamSource(reply=-1)


def test_a_name_counts_whole() -> None:
    assert named("Here you are: flat emoji of Dog.", ["poodle", "dog"])
    assert not named("Here you are: flat emoji of hot dog.", ["dog"])
    assert not named("Here you are: flat emoji of dog face.", ["dog"])
    assert not named("", ["dog"])
