"""The names of LLaMA2-Accessory: scores, streams and answers, and the three lines that newcomers write."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import accessory
from accessory.data.image import pad_to_square, to_tensor
from accessory.models.build import Model
from accessory.serve.chat import ChatModel
from accessory.serve.sphinx import CLIP_MEAN, CLIP_STD, MetaModel, SPHINXModel
from accessory.tokens import IMAGE
from tests.tiny import tiny_model, tiny_model_dir


def drawn(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"), template="sphinx")


@pytest.fixture(scope="module")
def meta(made: Model) -> SPHINXModel:
    return SPHINXModel(made)


def test_logits_are_one_row_a_token(meta: SPHINXModel, made: Model) -> None:
    texts = ["What is this?", "a red cat on a hat"]
    found = meta.compute_logits(texts)
    for text, logits in zip(texts, found, strict=True):
        ids = torch.tensor(made.tokenizer.encode(text, bos=True))
        assert logits.dtype == torch.float32
        with torch.no_grad():
            wanted = made.net.logits(made.net(ids[None]))[0]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    ids = made.tokenizer.encode(texts[0], bos=True)
    torch.testing.assert_close(meta.compute_logits([ids])[0], found[0], atol=1e-4, rtol=1e-4)
    ended = meta.compute_logits(texts[:1], eos=True)[0]
    assert len(ended) == len(found[0]) + 1
    assert len(meta.compute_logits(texts[:1], bos=False)[0]) == len(found[0]) - 1
    assert meta.compute_logits([]) == []


def test_a_picture_stands_behind_the_first_mark(meta: SPHINXModel, made: Model) -> None:
    picture, text = drawn(1, 64, 40), "What is this?"
    ids = made.tokenizer.encode(text, bos=True)
    tiles = to_tensor(pad_to_square(picture))[None]
    whole = torch.tensor([ids[0], *[IMAGE] * made.encoder.tokens_per_tile, *ids[1:]])
    with torch.no_grad():
        wanted = made.net.logits(made.net(whole[None], tiles))[0]
    got = meta.compute_logits([text], [picture])[0]
    assert len(got) == len(ids)
    # Row 0 scores the text's first token, which the end of the picture predicts.
    torch.testing.assert_close(got, wanted[made.encoder.tokens_per_tile :], atol=1e-4, rtol=1e-4)
    blind = meta.compute_logits([text], [None])[0]
    assert (got - blind).abs().max() > 1e-3
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    normalised = ((tiles[0] - mean) / std)[None]
    torch.testing.assert_close(meta.compute_logits([text], normalised)[0], got, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="give the picture itself"):
        meta.compute_logits([text], normalised[:, :, :32, :32])


def test_examples_are_scored_behind_their_contexts(meta: SPHINXModel, made: Model) -> None:
    context, example = "What is this?", "What is this? a cat"
    picture = drawn(2)
    ids = made.tokenizer.encode(example, bos=True)
    n = len(made.tokenizer.encode(context, bos=True))
    got = meta.evaluate_examples([example, example], [context, context], [picture, None])
    logits = meta.compute_logits([example], [picture])[0]
    wanted = logits[n - 1 : -1].double().log_softmax(-1).gather(1, torch.tensor(ids[n:])[:, None])[:, 0]
    assert got["log_likelihood"][0] == pytest.approx(float(wanted.sum()), abs=1e-4)
    assert got["nll"][0] == pytest.approx(-float(wanted.mean()), abs=1e-4)
    assert got["ppl"][0] == pytest.approx(float((-wanted.mean()).exp()), rel=1e-4)  # a perplexity, not its logarithm
    assert got["non_context_logits"][0].shape == (len(ids) - n, made.tokenizer.vocab_size)
    torch.testing.assert_close(got["non_context_logits"][0], logits[n - 1 : -1], atol=1e-4, rtol=1e-4)
    assert abs(got["log_likelihood"][0] - got["log_likelihood"][1]) > 1e-4  # the picture matters
    best = [*ids[:n], int(logits[n - 1].argmax())]
    assert meta.evaluate_examples([best], [ids[:n]], [picture])["max_equal"] == [True]
    other = [*ids[:n], (best[-1] + 1) % made.tokenizer.vocab_size]
    assert meta.evaluate_examples([other], [ids[:n]], [picture])["max_equal"] == [False]
    free = meta.evaluate_examples([example])
    assert len(free["non_context_logits"][0]) == len(ids) - 1


def test_an_example_of_one_token_has_nothing_to_score(meta: SPHINXModel) -> None:
    with pytest.raises(ValueError, match="beginning of the 1 of its example"):
        meta.evaluate_examples([[7]])
    assert len(meta.evaluate_examples([[7, 0]])["non_context_logits"][0]) == 1  # id 0 counts


@pytest.mark.parametrize("context", ["Where", "What is this? a cat", ""])
def test_a_context_must_be_a_beginning(meta: SPHINXModel, context: str) -> None:
    with pytest.raises(ValueError, match="not the beginning"):
        meta.evaluate_examples(["What is this? a cat"], [context], bos=bool(context))


def test_streams_end_as_answers_do(meta: SPHINXModel) -> None:
    picture = drawn(3)
    prompts = ["What is this?", "How many birds are there in the picture?"]
    whole = meta.generate(prompts, [picture, None], max_gen_len=12)
    for prompt, image, text in zip(prompts, [picture, None], whole, strict=True):
        events = list(meta.stream_generate(prompt, [image], max_gen_len=12))
        assert [e["end_of_content"] for e in events] == [False] * (len(events) - 1) + [True]
        assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(events))
        assert events[-1]["text"] == text
        stop = text[2:4]
        cut = text.split(stop)[0].removesuffix(" ")
        assert meta.generate([prompt], [image], max_gen_len=12, additional_stop_symbols=[stop]) == [cut]
        stopped = list(meta.stream_generate(prompt, [image], max_gen_len=12, additional_stop_symbols=[stop]))
        assert stopped[-1] == {"text": cut, "end_of_content": True}
        assert all(cut.startswith(e["text"]) for e in stopped)  # no part of the stop was ever shown
    assert len(set(whole)) == 2
    hot = [meta.generate(prompts[:1], temperature=2.0, max_gen_len=12, seed=s)[0] for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_long_prompt_keeps_its_beginning_mark_and_its_end(meta: SPHINXModel, made: Model) -> None:
    long = "What is this? " * 400
    row, most = meta._fit(long, None, 32)
    ids = made.tokenizer.encode(long, bos=True)
    assert (len(row.ids), most) == (512 - 32, 32)
    assert row.ids[0] == made.tokenizer.bos_id
    assert row.ids[1:].tolist() == ids[-(512 - 33) :]
    with_picture, _ = meta._fit(long, meta._pictures([drawn(0)], 1)[0], 32)
    assert len(with_picture.ids) == 512 - 32
    assert (with_picture.ids[1:5] == IMAGE).all()
    with pytest.raises(ValueError, match="leave no room"):
        meta._fit(long, None, 512)
    row, most = meta._fit("What is this?", None, 512)  # the default length on a model that reads no more than that
    assert row.ids.tolist() == made.tokenizer.encode("What is this?", bos=True)
    assert most == 512 - len(row.ids)


def test_responses_are_the_chat_s(meta: SPHINXModel, made: Model) -> None:
    picture = drawn(4)
    options = {"max_gen_len": 10, "temperature": 0.0}
    first = meta.generate_response([["What is this?", None]], picture, **options)  # type: ignore[arg-type]
    chat = ChatModel(made)
    assert first == chat.chat("What is this?", [picture], max_new_tokens=10)
    second = meta.generate_response([["What is this?", "a cat"], ["Where?", None]], picture, **options)  # type: ignore[arg-type]
    assert second == chat.chat(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}],
            },
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "Where?"},
        ],
        max_new_tokens=10,
    )
    assert meta.generate_response([["What is this?", None]], None, **options) != first  # type: ignore[arg-type]
    state = torch.get_rng_state()
    warm = [meta.generate_response([["What is this?", None]], picture, 10, 1.5, 0.9, seed=s) for s in (3, 3, 4)]
    assert warm[0] == warm[1] != warm[2]
    assert torch.equal(torch.get_rng_state(), state)  # seeds stay inside


@pytest.mark.parametrize("qas", [[], [["a", "b"]], [["a", None], ["b", None]], [["a"]]])
def test_dialogues_that_are_none(meta: SPHINXModel, qas: list[list[str | None]]) -> None:
    with pytest.raises(ValueError, match=r"qas"):
        meta.generate_response(qas)


def test_three_lines_for_newcomers(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path)
    drawn(6).save(tmp_path / "cat.png")
    model = accessory.load(folder, device="cpu")
    said = model.chat("What is this?", images=[tmp_path / "cat.png"], max_new_tokens=8)
    parts = [{"type": "image", "image": str(tmp_path / "cat.png")}, {"type": "text", "text": "What is this?"}]
    assert model.chat([{"role": "user", "content": parts}], max_new_tokens=8) == said
    assert MetaModel.from_pretrained(folder, device="cpu").generate(["a"], max_gen_len=4)[0]


def test_images_and_texts_must_match(meta: SPHINXModel, made: Model) -> None:
    with pytest.raises(ValueError, match="2 images for 1 texts"):
        meta.compute_logits(["a"], [None, None])
    with pytest.raises(ValueError, match="an empty example"):
        meta.compute_logits([""], bos=False)
    short = MetaModel(replace(made, encoder=made.encoder.under(made.template, max_length=8)))
    with pytest.raises(ValueError, match="the limit is 8"):
        short.compute_logits(["What is this? What is this?"])
