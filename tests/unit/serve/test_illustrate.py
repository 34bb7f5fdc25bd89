"""The interleaved engine and the illustrated chat on tiny random parts: what is drawn, when, and that caches agree."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from accessory.backbone.generate import Sampling
from accessory.models.generator import Generator
from accessory.schema import Picture, Turn
from accessory.serve.chat import Chat, ChatModel, Notice
from accessory.serve.illustrate import (
    Controls,
    Done,
    ImageDone,
    ImagePreview,
    ImageStart,
    TextDelta,
    needed,
)
from accessory.serve.illustrated_chat import IllustratedChat, IllustratedModel, join, of_mode
from accessory.serve.pictures import draw, load_records, picture_seed, save_records
from accessory.serve.reader import Memory, Reader
from accessory.tokens import DREAM_START
from tests.tiny import disturb, tiny_model
from tests.tiny_generator import DREAM as BRIDGE
from tests.tiny_generator import tiny_generator

SAID = Sampling(max_new_tokens=10)
FORCED = Controls(force=True, max_images=1)


def generator_of(path: Path, kind: Any = "dream", **options: Any) -> Generator:
    made = tiny_generator(path, kind, **options)
    if kind == "dream":
        made.conditioner.dream.requires_grad_(True)
        disturb(made.conditioner.dream, 0.05)  # so that queries matter
        made.conditioner.dream.requires_grad_(False)
    return made.eval()


@pytest.fixture(scope="module", params=["hidden", "seen"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> IllustratedModel:
    """With a bridge that hides its queries from later text, and with one that does not."""
    from accessory.models.generator_config import DreamSource
    from tests.tiny_generator import PROFILE

    path = tmp_path_factory.mktemp(request.param)
    bridge = replace(BRIDGE, hide_queries_from_future=request.param == "hidden")
    source = DreamSource(str(path / "tiny"), bridge, PROFILE)
    generator = generator_of(path, conditioner=source)
    model = ChatModel(generator.conditioner.model, sampling=SAID)
    out = IllustratedModel(model, generator)
    assert out.dream is not None
    return out


def shown(parts: Sequence[object]) -> list[Image.Image]:
    return [p.source for p in parts if isinstance(p, Picture)]


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def test_a_forced_picture_comes_first_and_events_are_in_order(made: IllustratedModel) -> None:
    chat = made.new_chat()
    events = list(chat.ask("Draw a red cat.", controls=replace(FORCED, previews=1)))
    kinds = [type(e) for e in events]
    start, done = kinds.index(ImageStart), kinds.index(ImageDone)
    assert start == 0
    assert kinds[start + 1 : done] == [ImagePreview] * 2, "three steps, of which the last is the picture"
    assert kinds[-1] is Done
    assert kinds.count(ImageDone) == 1
    texts = "".join(e.text for e in events if isinstance(e, TextDelta))
    assert events[-1].stats.pictures == 1
    picture = events[done]
    assert isinstance(picture, ImageDone)
    assert picture.picture.size == (16, 16)
    assert chat.history[-1] == Turn("assistant", (Picture(picture.picture), *((texts,) if texts else ())))
    assert picture.seed == picture_seed(0, 0) == events[0].seed


@pytest.mark.parametrize("at", [3, 100])
def test_a_picture_is_forced_later_or_at_the_end(made: IllustratedModel, at: int) -> None:
    chat = made.new_chat()
    events = list(chat.ask("Draw a cat.", controls=Controls(force_image_at=at, max_images=1)))
    kinds = [type(e) for e in events]
    assert kinds.count(ImageDone) == 1
    plain = Chat(made.model, sampling=SAID)
    text = plain.say("Draw a cat.")
    before = "".join(e.text for e in events[: kinds.index(ImageStart)] if isinstance(e, TextDelta))
    assert text.startswith(before)
    if at == 100:
        assert before == text, "the whole answer, then what was owed"
        assert isinstance(chat.history[-1].parts[-1], Picture)


def scripted(made: IllustratedModel, monkeypatch: pytest.MonkeyPatch, wants: Sequence[int]) -> None:
    """A model that wants a picture at the given numbers of tokens, and never otherwise."""
    count = [0]
    read = Reader.read

    def scores(self: Reader, memory: Memory, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = read(self, memory, ids, *rest).clone()
        assert self.trigger is not None
        out[:6] = -1e4  # control tokens: the answer does not end by itself
        out[self.trigger] = 1e4 if count[0] in wants else -1e4
        count[0] += 1
        return out

    monkeypatch.setattr(Reader, "read", scores)


def test_the_trigger_calls_for_a_picture(made: IllustratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(made, monkeypatch, [2, 6])
    parts = made.new_chat().say("Tell a story.", controls=Controls())
    assert len(shown(parts)) == 2
    assert isinstance(parts[0], str)
    assert isinstance(parts[1], Picture)


def test_and_it_is_kept_off_where_it_may_not(made: IllustratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for controls, pictures in (
        (Controls(forbid_images=True), 0),
        (Controls(max_images=0), 0),
        (Controls(max_images=1), 1),
        (Controls(max_images=3), 3),
        (Controls(min_text_between=3), 3),
    ):
        with monkeypatch.context() as patch:
            scripted(made, patch, range(100))
            events = list(made.new_chat().ask("Tell a story.", controls=controls))
        assert sum(isinstance(e, ImageDone) for e in events) == pictures, controls
        assert events[-1].stats.tokens == SAID.max_new_tokens


def test_the_trigger_takes_part_in_sampling_without_a_script(made: IllustratedModel) -> None:
    text = Chat(made.model, sampling=SAID).say("What is this?")
    assert "".join(p for p in made.new_chat().say("What is this?", controls=of_mode(Controls(), "never"))) == text


def test_cached_scores_after_a_picture_equal_those_of_one_whole_run(made: IllustratedModel) -> None:
    """The scores that the engine chooses the first word after a picture from, in the second round of a chat."""
    seen: list[torch.Tensor] = []
    chat = made.new_chat()
    chat.say("Draw a red cat.", [Image.new("RGB", (40, 50), "red")], FORCED)
    read = Reader.read

    def spy(self: Reader, *rest: Any) -> torch.Tensor:
        seen.append(read(self, *rest))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", spy)
        chat.say("And a blue one.", controls=FORCED)
    assert chat.last_cost is not None
    assert chat.last_cost.reused > 20, "the cache was used"
    assert chat.last_cost.tiles == 0, "no picture was encoded again"
    drawn = chat.history[-1].pictures
    # What was just drawn, as a turn of its own: its span and tiles follow the prompt directly.
    assert made.dream is not None
    reader = Reader(made.model, made.dream)
    prompt = reader.prompt(chat.history[:-1])
    ids, _, tiles = reader.see(drawn[0])
    spans = [s for i in prompt.ids.tolist() for s in ([i] if not reader.cropped or i != DREAM_START else reader.span)]
    row = torch.tensor([*spans, *reader.span, *ids.tolist()])[None]
    with torch.no_grad():
        whole = made.dream.logits(made.dream.read(row, torch.cat((prompt.tiles, tiles))).final[0, -1])
        other = made.dream.logits(made.dream.read(row, torch.cat((prompt.tiles, 1 - tiles))).final[0, -1])
    torch.testing.assert_close(seen[1], whole, atol=1e-4, rtol=1e-4)
    assert (seen[1] - other).abs().max() > 1e-3, "and it matters what is seen"


def test_a_second_round_equals_one_that_starts_from_its_history(made: IllustratedModel) -> None:
    chat = made.new_chat()
    first = shown(chat.say("Draw a red cat.", controls=FORCED))
    second = chat.say("Now a hat for it.", controls=FORCED)
    again = made.new_chat(chat.history[:2])
    assert [p for p in again.say("Now a hat for it.", controls=FORCED) if isinstance(p, str)] == [
        p for p in second if isinstance(p, str)
    ]
    a, b = again.records[0], chat.records[1]
    assert (a.seed, a.context, a.index) == (b.seed, b.context, 1)
    assert a.condition.seq is not None
    assert b.condition.seq is not None
    torch.testing.assert_close(a.condition.seq, b.condition.seq, atol=1e-4, rtol=1e-4)
    # And it matters what was drawn before.
    white = replace(
        chat.history[1], parts=(Picture(Image.new("RGB", first[0].size, "white")), *chat.history[1].parts[1:])
    )
    other = made.new_chat((chat.history[0], white))
    other.say("Now a hat for it.", controls=FORCED)
    assert other.records[0].context != b.context
    assert other.records[0].condition.seq is not None
    assert not torch.allclose(other.records[0].condition.seq, b.condition.seq, atol=1e-3)


def test_a_picture_is_drawn_again_from_the_log(made: IllustratedModel, tmp_path: Path) -> None:
    chat = made.new_chat()
    pictures = shown(chat.say("Draw a cat.", controls=replace(FORCED, negative=("a dog",), sizes=((24, 16),))))
    pictures += shown(chat.say("Another.", controls=FORCED))
    save_records(chat.records, tmp_path / "log")
    records = load_records(tmp_path / "log")
    assert [r.index for r in records] == [0, 1]
    for picture, record in zip(pictures, records, strict=True):
        assert same(draw(made.generator, record), picture)
    assert pictures[0].size == (24, 16)
    assert not same(draw(made.generator, replace(records[1], seed=records[1].seed + 1)), pictures[1])
    assert not same(draw(made.generator, replace(records[0], negative=None)), pictures[0])
    with pytest.raises(ValueError, match=r"pictures\.jsonl is missing"):
        load_records(tmp_path)


def test_seeds_follow_from_document_and_index(made: IllustratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert picture_seed(0, 0) == 1576848291327681832, "logs and documents of yesterday name it"
    assert len({picture_seed(d, i) for d in range(9) for i in range(9)}) == 81
    scripted(made, monkeypatch, [1, 4, 7])
    seeds = [e.seed for e in made.new_chat().ask("A story.", controls=Controls(seed=5)) if isinstance(e, ImageDone)]
    assert seeds == [picture_seed(5, i) for i in range(3)]


def test_what_pictures_are_dreamt_from(made: IllustratedModel) -> None:
    history = (
        Turn("user", (Picture(Image.new("RGB", (40, 40), "red")), "What is this?")),
        Turn("assistant", ("A cat.",)),
        Turn("user", ("And now?",)),
        Turn("assistant", ("A dog.",)),
    )
    contexts, states = {}, {}
    for name, controls in {
        "all": FORCED,
        "text": replace(FORCED, history="text"),
        "one": replace(FORCED, history="last_k", last_k=1),
        "two": replace(FORCED, history="last_k", last_k=2),
    }.items():
        chat = made.new_chat(history)
        chat.say("Draw it.", controls=controls)
        contexts[name], states[name] = chat.records[0].context, chat.records[0].condition.seq
    assert contexts["two"] == contexts["all"]
    torch.testing.assert_close(states["two"], states["all"], atol=1e-4, rtol=1e-4)
    assert len({contexts[n] for n in ("all", "text", "one")}) == 3


def test_closing_early_leaves_the_chat_usable(made: IllustratedModel) -> None:
    chat = made.new_chat()
    before = threading.active_count()
    events = chat.ask("Draw a cat.", controls=replace(FORCED, previews=1))
    assert isinstance(next(events), ImageStart)
    assert isinstance(next(events), ImagePreview)
    events.close()
    assert threading.active_count() == before, "nothing draws on"
    assert chat.history == ()
    events = chat.ask("Draw a cat.", controls=Controls(force_image_at=4, max_images=1))
    said = next(e.text for e in events if isinstance(e, TextDelta))
    events.close()
    assert chat.history[-1].text == said
    chat.undo()
    once, fresh = chat.say("Draw a cat.", controls=FORCED), made.new_chat().say("Draw a cat.", controls=FORCED)
    assert [p for p in once if isinstance(p, str)] == [p for p in fresh if isinstance(p, str)]
    assert chat.records[0].context == picture_context(made, "Draw a cat.")


def picture_context(made: IllustratedModel, text: str) -> str:
    chat = made.new_chat()
    return next(e.context for e in chat.ask(text, controls=FORCED) if isinstance(e, ImageDone))


def test_a_drawing_that_fails_is_no_turn(made: IllustratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    chat = made.new_chat()
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "render", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            chat.say("Draw a cat.", controls=FORCED)
    assert chat.history == ()
    assert len(shown(chat.say("Draw a cat.", controls=FORCED))) == 1


def test_long_chats_forget_and_keep_room_for_what_is_owed(made: IllustratedModel) -> None:
    model = replace(made.model, encoder=made.model.encoder.under(made.model.template, max_length=96))
    chat = IllustratedChat(model, made.generator, made.dream, sampling=SAID)
    notices = []
    for n in range(6):
        events = list(chat.ask(f"Draw cat {n}.", controls=FORCED))
        notices += [e for e in events if isinstance(e, Notice)]
        assert sum(isinstance(e, ImageDone) for e in events) == 1
    assert notices
    with pytest.raises(ValueError, match="this turn alone takes"):
        chat.ask("a cat " * 40, controls=FORCED)


def test_without_room_the_trigger_is_out_of_reach(made: IllustratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(made.model, encoder=made.model.encoder.under(made.model.template, max_length=48))
    chat = IllustratedChat(model, made.generator, made.dream, sampling=Sampling(max_new_tokens=40))
    scripted(made, monkeypatch, range(1000))
    events = list(chat.ask("Cat.", controls=Controls(max_images=9)))
    drawn = sum(isinstance(e, ImageDone) for e in events)
    reader, turns = Reader(made.model, made.dream), chat.history[:1]
    free = 48 - len(reader.prompt(turns).ids)
    kept = len(reader.marks) + reader.positions(16, 16)
    # One more would have to fit with its whole span, also where less of it stays.
    assert drawn == 1 + (free - needed(reader, Controls(), (16, 16), 0)) // kept < 9
    assert isinstance(events[-1], Done)


def test_a_generator_without_a_bridge_draws_the_question(tmp_path: Path) -> None:
    generator = generator_of(tmp_path, "text")
    model = ChatModel(tiny_model(tmp_path / "m"), sampling=SAID)
    made = IllustratedModel(model, generator)
    assert made.dream is None
    chat = made.new_chat()
    assert shown(chat.say("a red cat")) == []
    picture = shown(chat.say("a red cat", controls=FORCED))
    seed = picture_seed(0, 0)
    assert same(picture[0], generator.generate(["a red cat"], seeds=[seed])[0])
    assert not same(picture[0], generator.generate(["a blue boat"], seeds=[seed])[0])
    assert len(shown(chat.say("and again", controls=FORCED))) == 1


def test_a_bridge_on_other_weights_has_no_trigger(made: IllustratedModel, tmp_path: Path) -> None:
    assert join(tiny_model(tmp_path, seed=9), made.generator) is None


def test_controls_are_checked(made: IllustratedModel) -> None:
    for options in ({"max_images": -1}, {"last_k": 0}, {"force_image_at": -1}, {"force": True, "forbid_images": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Controls(**options)
    with pytest.raises(ValueError, match="'often' is not one of"):
        of_mode(Controls(), "often")
    chat = made.new_chat()
    with pytest.raises(ValueError, match="nearest"):
        chat.ask("Draw", controls=replace(FORCED, sizes=((15, 16),)))
    assert chat.history == ()
