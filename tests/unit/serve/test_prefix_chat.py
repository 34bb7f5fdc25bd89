"""Chats with models whose pictures enter through the prefixes, and experts that tell of pictures in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from accessory.__main__ import main
from accessory.backbone.generate import Sampling
from accessory.data.template import get
from accessory.evaluate.score import answers
from accessory.models import build
from accessory.models.build import Model, ResamplerConfig
from accessory.peft.attach import TrainSpec
from accessory.schema import Picture, Sample, Turn
from accessory.serve.chat import Chat, ChatModel, load
from accessory.serve.experts import WORDINGS, Expert, Experts
from accessory.serve.sphinx import CLIP_MEAN, CLIP_STD, SPHINXModel
from tests.unit.models.pictured import FORMS, adapted, picture
from tests.unit.serve.test_chat import fresh

NEW = 6
GREEDY = Sampling(max_new_tokens=NEW)


def image(seed: int) -> Image.Image:
    found = picture(seed).source
    assert isinstance(found, Image.Image)
    return found


@pytest.fixture(scope="module", params=list(FORMS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return adapted(tmp_path_factory.mktemp("adapted"), request.param)


def from_scratch(model: Model, turns: tuple[Turn, ...]) -> str:
    """The answer of a batch of one, without a chat or its cache."""
    return answers(model, [Sample((*turns, Turn("assistant", ("",))))], NEW)[0]


def costs(chat: Chat) -> tuple[bool, int]:
    """Whether the last answer reused the cache, and the tiles that it encoded."""
    assert chat.last_cost is not None
    return chat.last_cost.reused > 0, chat.last_cost.tiles


def test_turns_over_the_cache_say_what_the_whole_dialogue_says(model: Model) -> None:
    chat = Chat(model, sampling=GREEDY)
    seen = []
    for text, images in (("What is this?", [image(1)]), ("How many birds are there?", []), ("Where?", [])):
        said = chat.say(text, images)
        seen.append(costs(chat))
        assert said.strip() == from_scratch(model, chat.history[:-1])
    assert seen == [(False, 1), (True, 0), (True, 0)]  # the picture is encoded once and goes with every turn
    # ... and it matters: the same words after another picture have other scores.
    other = (Turn("user", (picture(2), *chat.history[0].parts[1:])), *chat.history[1:-1])
    with torch.inference_mode():
        rows = [model.encoder.row(t, generate=True) for t in (chat.history[:-1], other)]
        scores = [model.net.logits(model.net(r.ids[None], r.tiles))[0, -1] for r in rows]
    assert (scores[0] - scores[1]).abs().max() > 1e-2


def test_another_picture_makes_every_position_anew(model: Model) -> None:
    chat = Chat(model, sampling=GREEDY)
    chat.say("What is this?", [image(1)])
    for shown, reused in (([image(2)], 0), ([image(2)], 1), ([], 0), ([image(1)], 0)):
        chat.undo()
        said = chat.say("What is this?", shown)
        assert costs(chat)[0] == bool(reused)
        assert said.strip() == from_scratch(model, chat.history[:-1])


def test_a_picture_may_come_after_words(model: Model) -> None:
    chat = Chat(model, sampling=GREEDY)
    chat.say("How many birds are there?")
    assert chat.say("What is this?", [image(1)]).strip() == from_scratch(model, chat.history[:-1])
    assert costs(chat) == (False, 1)  # all that was read before did not see it
    assert chat.say("Where is the apple?").strip() == from_scratch(model, chat.history[:-1])
    assert costs(chat) == (True, 0)


def test_a_second_picture_is_refused_and_changes_nothing(model: Model) -> None:
    chat = Chat(model, sampling=GREEDY)
    chat.say("What is this?", [image(1)])
    history = chat.history
    for images in ([image(2)], [image(2), image(3)]):
        with pytest.raises(ValueError, match=rf"{1 + len(images)} pictures .* takes 1 through its visual prefix"):
            chat.ask("And this?", images)
    assert chat.history == history
    assert chat.say("Where?").strip() == from_scratch(model, chat.history[:-1])
    assert costs(chat) == (True, 0)


def test_more_pictures_where_the_model_takes_them(tmp_path: Path) -> None:
    two = adapted(tmp_path, resampler=ResamplerConfig(length=3, width=16, depth=2, heads=2, max_tiles=2))
    chat = Chat(two, sampling=GREEDY)
    chat.say("What is this?", [image(1)])
    assert chat.say("And this?", [image(2)]).strip() == from_scratch(two, chat.history[:-1])
    assert costs(chat) == (False, 2)  # the mean of both is another prefix
    chat.say("Where?")
    assert costs(chat) == (True, 0)


def test_a_failed_answer_leaves_no_prefix_behind(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(model, sampling=GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(model.net.backbone, "logits", lambda h: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.say("What is this?", [image(1)])
    plain = chat.say("What is this?")
    assert plain == Chat(model, sampling=GREEDY).say("What is this?")
    assert plain == fresh(model, chat.history[:-1], GREEDY)[0]


# --- the published names ----------------------------------------------------------------------------------------------


def test_the_names_of_the_reference_see_too(model: Model) -> None:
    meta = SPHINXModel(model)
    prompts, shown = ["What is this?", "How many birds?", "What is this?"], [image(1), None, image(2)]
    whole = meta.generate(prompts, shown, max_gen_len=NEW)
    for prompt, one, text in zip(prompts, shown, whole, strict=True):
        assert meta.generate([prompt], [one], max_gen_len=NEW) == [text]
        events = list(meta.stream_generate(prompt, [one], max_gen_len=NEW))
        assert events[-1]["text"] == text
    scores = meta.compute_logits(prompts, shown)
    ids = torch.tensor(model.tokenizer.encode(prompts[1], bos=True))
    with torch.inference_mode():
        torch.testing.assert_close(scores[1], model.net.logits(model.net(ids[None]))[0], rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[2]).abs().max() > 1e-2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = torch.stack([(model.encoder.row((Turn("user", (Picture(image(1)),)),)).tiles[0] - mean) / std])
    torch.testing.assert_close(meta.compute_logits(prompts[:1], pixels)[0], scores[0], rtol=1e-3, atol=1e-3)
    found = meta.evaluate_examples(["What is this? a cat"] * 2, ["What is this?"] * 2, [image(1), image(2)])
    assert abs(found["log_likelihood"][0] - found["log_likelihood"][1]) > 1e-3
    response = meta.generate_response([["What is this?", "a cat"], ["Where?", None]], image(1), NEW, temperature=0.0)
    turns = (
        Turn("user", (Picture(image(1)), "What is this?")),
        Turn("assistant", ("a cat",)),
        Turn("user", ("Where?",)),
    )
    assert response.strip() == from_scratch(model, turns)


def test_a_folder_chats_in_three_lines_and_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # What is random and frozen is no part of a folder: here all of it trains.
    made = adapted(tmp_path, train=True, tuning=(*FORMS["v2 multimodal7b"], TrainSpec(("*",))))
    folder = tmp_path / "folder"
    build.save(made, folder)
    image(1).save(tmp_path / "a.png")
    own = ChatModel(replace(made, net=made.net.requires_grad_(False).eval())).chat(
        "What is this?", [image(1)], max_new_tokens=NEW
    )
    assert load(folder, device="cpu").chat("What is this?", [tmp_path / "a.png"], max_new_tokens=NEW) == own
    said = ["chat", "--model", str(folder), "--image", str(tmp_path / "a.png"), "--ask", "What is this?"]
    assert main([*said, "--max-new-tokens", str(NEW), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == own.strip()


# --- experts ----------------------------------------------------------------------------------------------------------


class Captioner:
    """Says how bright a picture is, and counts how often it is asked."""

    def __init__(self, text: str = "") -> None:
        self.text, self.asked = text, 0

    def __call__(self, image: Image.Image) -> str:
        self.asked += 1
        assert image.mode == "RGB"
        return self.text or f" brightness {image.resize((1, 1)).convert('L').getpixel((0, 0))}\n"


def test_what_experts_say_is_the_input_of_the_question(model: Model) -> None:
    caption, silent = Captioner("a red cat"), Expert("ocr", lambda image: " ")
    experts = Experts([Expert("captioner", caption), silent, Expert("sign", lambda i: "stop", "A sign says {text}.")])
    turns = (Turn("user", (picture(1), "What is this?")), Turn("assistant", ("a hat",)), Turn("user", ("Where?",)))
    told = experts.advise(turns)
    assert told[0].parts[1:] == ("What is this?\n", "The picture shows: a red cat\nA sign says stop.")
    assert told[1:] == turns[1:]
    assert experts.advise(told[1:]) == turns[1:]
    assert caption.asked == 1
    instruction = SPHINXModel(replace(model, encoder=model.encoder.under(get("alpaca"))))
    row = instruction.model.encoder.row(told[:1], generate=True)
    text = model.tokenizer.decode([i for i in row.ids.tolist() if i >= 0])
    assert "### Instruction:\nWhat is this?\n\n### Input:\nThe picture shows: a red cat\nA sign says stop.\n\n" in text
    assert "paired with an input" in text


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((), ("P",)),
        (("Who", "given"), ("Who", "given\nP")),
        ((picture(2), "Who"), (picture(2), "Who\n", "P\nP")),
        (("Who", picture(2), "is it"), ("Who", picture(2), "is it\nP\nP")),
    ],
)
def test_words_that_are_there_stay(parts: tuple[object, ...], told: tuple[object, ...]) -> None:
    advised = Experts([Expert("x", lambda image: "P", "{text}")]).advise([Turn("user", (picture(1), *parts))])[0]  # type: ignore[arg-type]
    assert [p for p in advised.parts if isinstance(p, str)] == [p for p in told if isinstance(p, str)]
    assert len(advised.pictures) == 1 + sum(isinstance(p, Picture) for p in parts)


def test_a_chat_hears_its_experts_once_a_picture(model: Model) -> None:
    caption = Captioner()
    chat = ChatModel(model, sampling=GREEDY, experts=Experts([Expert("captioner", caption)])).new_chat()
    said = chat.say("What is this?", [image(1)])
    assert chat.history[0].text == "What is this?"  # not what the expert said
    wording = WORDINGS["captioner"].replace("{text}", caption(image(1)).strip())
    asked = Turn("user", (picture(1), "What is this?\n", wording))
    assert said.strip() == from_scratch(model, (asked,))
    chat.say("Where is the apple?")
    assert costs(chat) == (True, 0)  # rendered again as it was
    assert caption.asked == 2  # one of them above
    # ... and it matters what is said
    with torch.inference_mode():
        rows = [model.encoder.row((t,), generate=True) for t in (asked, replace(asked, parts=asked.parts[:2]))]
        scores = [model.net.logits(model.net(r.ids[None], r.tiles))[0, -1] for r in rows]
    assert (scores[0] - scores[1]).abs().max() > 1e-2


def test_a_failing_expert_changes_nothing(model: Model) -> None:
    def look(image: Image.Image) -> str:
        raise ValueError("the captioner is out")

    chat = Chat(model, sampling=GREEDY, experts=Experts([Expert("captioner", look)]))
    with pytest.raises(ValueError, match="captioner is out"):
        chat.ask("What is this?", [image(1)])
    assert chat.history == ()
    assert chat.say("What is this?")


def test_experts_forget_the_oldest_picture() -> None:
    caption = Captioner()
    experts = Experts([Expert("captioner", caption)], remembered=2)
    for seed in (1, 2, 1, 3, 1, 2):
        experts.about(picture(seed))
    assert caption.asked == 4
    assert experts.about(Picture(Image.new("RGB", (4, 4), "white"))) == "The picture shows: brightness 255"


@pytest.mark.parametrize(
    ("name", "wording", "words"),
    [("smeller", None, "expert 'smeller' needs a wording"), ("ocr", "it reads", r"'it reads' of expert 'ocr' has no")],
)
def test_experts_without_words_are_refused(name: str, wording: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Expert(name, lambda image: "", wording)


def test_experts_that_remember_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="remembered is 0 pictures"):
        Experts([], remembered=0)
