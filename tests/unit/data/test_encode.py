"""Placeholders, labels and lengths of encoded rows; training rows begin with the prompt that generation uses."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from accessory.data.audit import count, histogram, oddities, pictures, render_row
from accessory.data.encode import Encoder, RowRejected
from accessory.data.template import TEMPLATES, get
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import Tokenizer, load
from accessory.schema import Encoded, Picture, Sample, Turn
from accessory.tokens import IGNORE, IMAGE, IMAGE_END, IMAGE_START, SKIP

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "llm"
PICTURE = Picture(Image.new("RGB", (8, 8)))
WIDE = Picture(Image.new("RGB", (16, 8)))
QUESTIONS = [("What is it?",), (PICTURE, "What?"), ("a", PICTURE, "b ", WIDE, "c"), ("  blanks ",), ("</s><image>",)]
ANSWERS = ["A cat.", "Yes\nno", " padded ", "naïve 🙂 <|im_end|>"]


def encoder(tokenizer: Tokenizer, name: str = "chatml_plain", grid: int = 1, **options: object) -> Encoder:
    settings = {"tokens_per_tile": 3, "max_length": 4000, **options}
    return Encoder(tokenizer, get(name), TilingConfig(8, grid), **settings)  # type: ignore[arg-type]


def dialogue(*said: tuple[str | Picture, ...] | str) -> Sample:
    turns = [Turn("assistant", (s,)) if isinstance(s, str) else Turn("user", s) for s in said]
    return Sample(tuple(turns), "file.json", 7)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_a_prefix_of_the_training_row(tokenizer: Tokenizer, name: str) -> None:
    made = encoder(tokenizer, name, grid=2)
    seen = 0
    for q, a, r, b in itertools.product(QUESTIONS, ANSWERS, QUESTIONS, ANSWERS[:2]):
        full = made.encode(dialogue(q, a, r, b)).ids.tolist()
        for cut in (dialogue(q), dialogue(q, a, r)):
            prompt = made.encode(cut, generate=True).ids.tolist()
            assert full[: len(prompt)] == prompt
            assert len(prompt) < len(full)
            seen += 1
    assert seen == 2 * 5 * 4 * 5 * 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_reads_as_the_answers(tokenizer: Tokenizer, name: str) -> None:
    row = encoder(tokenizer, name).encode(dialogue((PICTURE, "QUESTION"), "A cat.", ("MORE",), "A hat."))
    text = tokenizer.decode(row.ids[row.labels != IGNORE].tolist())
    assert text.replace("\n###", " ").split() == ["A", "cat.", "A", "hat."] or text.strip() == "A cat.A hat."
    assert torch.equal(row.labels[row.labels != IGNORE], row.ids[row.labels != IGNORE])
    assert not (row.labels[row.ids < 0] != IGNORE).any()


def test_runs_of_real_and_blank_tiles(tokenizer: Tokenizer) -> None:
    row = encoder(tokenizer, grid=2).encode(dialogue((WIDE, "?"), "A"))
    placeholders = [i for i in row.ids.tolist() if i < 0]
    assert placeholders == [IMAGE] * 9 + [SKIP] * 2
    assert row.tiles.shape == (3, 3, 8, 8)
    framed = encoder(tokenizer, grid=2, start_end=True).encode(dialogue((WIDE, "?"), "A"))
    assert [i for i in framed.ids.tolist() if i < 0] == [IMAGE_START, *[IMAGE] * 3, IMAGE_END] * 3 + [SKIP] * 2
    assert count(row).agrees(3)
    assert not count(row).agrees(4)
    assert (row.source, row.index) == ("file.json", 7)


def test_pictures_stand_where_the_text_has_them(tokenizer: Tokenizer) -> None:
    text = render_row(encoder(tokenizer).encode(dialogue(("a ", PICTURE, " b ", PICTURE), "c")), tokenizer)
    assert "a <image>×3 b <image>×3" in text
    assert "⟦c<|im_end|>⟧" in text


def test_typed_marks_are_characters(tokenizer: Tokenizer) -> None:
    row = encoder(tokenizer).encode(dialogue(("<image><|im_end|></s>",), "<image>"))
    assert not (row.ids < 0).any()
    assert row.tiles.shape == (0, 3, 8, 8)
    assert int((row.ids == tokenizer.special("<|im_end|>")).sum()) == 2
    assert int((row.ids == tokenizer.special("</s>")).sum()) == 0


def test_over_long_rows_are_rejected_whole(tokenizer: Tokenizer) -> None:
    sample = dialogue((PICTURE, "?"), "A", ("more " * 30,), "B")
    length = len(encoder(tokenizer).encode(sample).ids)
    assert len(encoder(tokenizer, max_length=length).encode(sample).ids) == length
    with pytest.raises(RowRejected, match=f"{length} positions") as caught:
        encoder(tokenizer, max_length=length - 1).encode(sample)
    assert (caught.value.source, caught.value.index) == ("file.json", 7)


def test_rows_that_teach_nothing_are_rejected(tokenizer: Tokenizer) -> None:
    for sample in (dialogue(("a",)), dialogue(("a",), ""), dialogue(("a",), "  ")):
        with pytest.raises(RowRejected, match="nothing to learn"):
            encoder(tokenizer).encode(sample)


def test_a_bad_picture_rejects_the_row_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(RowRejected, match=r"file\.json, row 7: .*gone\.png"):
        encoder(tokenizer).encode(dialogue((Picture("gone.png"), "?"), "A"))


def test_bad_settings_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="tokens_per_tile 0"):
        encoder(tokenizer, tokens_per_tile=0)


def test_golden_sphinx_rows_of_the_reference() -> None:
    folder = GOLDEN / "07d_conversation_dataset"
    if not folder.is_dir():
        pytest.skip("the golden data is not beside this checkout")
    made = encoder(load(folder / "tokenizer.model"), "sphinx", tokens_per_tile=1)
    order = json.loads((folder / "order.json").read_text())
    seen = 0
    for item in json.loads((folder / "items.json").read_text()):
        served = item.get("actually_served_index", item["index"])
        said = order[served]["conversations"]
        if "image" in order[served] or said[0]["from"].lower() != "human" or len(said) % 2:
            continue
        sample = dialogue(*[(str(t["value"]),) if i % 2 == 0 else str(t["value"]) for i, t in enumerate(said)])
        row = made.encode(sample)
        n = len(row.ids)
        if n > len(item["input"]):
            continue  # the reference cuts long rows
        assert item["input"][:n] == row.ids.tolist()
        assert [x or IGNORE for x in item["labels"][:n]] == row.labels.tolist()
        seen += 1
    assert seen >= 4


def test_render_row_marks_every_learned_stretch(tokenizer: Tokenizer) -> None:
    row: Encoded = encoder(tokenizer).encode(dialogue(("a",), "b", ("c",), "d"))
    text = render_row(row, tokenizer)
    assert text.count("⟦") == text.count("⟧") == 2


def test_pictures_are_named_where_they_stand(tokenizer: Tokenizer) -> None:
    made = encoder(tokenizer, "sphinx", grid=2)
    sample = dialogue(("a", WIDE, "b", PICTURE), "c", (PICTURE, "d"), "e")
    row = made.encode(sample)
    shown = pictures(sample, made)
    assert [s.positions for s in shown] == [11, 15, 15]
    text = render_row(row, tokenizer, shown)
    assert (
        "[image 1: 2x2 tiles and the whole, 2 blank, 11 positions][image 2: 2x2 tiles and the whole, 15 positions]"
        in text
    )
    assert text.index("[image 1") < text.index("A chat between") < text.index("[image 3: ") < text.index("d\n###")
    assert "<image>" not in text
    assert "<image>×15" in render_row(row, tokenizer, shown[:2])  # one that nobody named


def test_learned_text_is_green_and_data_gives_a_terminal_no_orders(tokenizer: Tokenizer) -> None:
    row = encoder(tokenizer).encode(dialogue(("Hi \x1b[2J\n",), "A\tcat\x07."))
    text = render_row(row, tokenizer, colour=True)
    assert "\x1b[32mA\tcat\\x07.<|im_end|>\x1b[0m" in text
    assert "Hi \\x1b[2J\n" in text
    assert text.count("\x1b") == 2


def test_what_looks_wrong_in_a_dialogue() -> None:
    def odd(*roles: str) -> list[str]:
        return oddities([Turn(r.strip("-"), () if "-" in r else ("x",)) for r in roles])  # type: ignore[arg-type]

    assert odd("system", "user", "assistant", "user", "assistant") == odd("assistant", "assistant") == []
    assert odd("assistant", "user", "assistant") == ["role order: the assistant speaks first"]
    assert odd("user", "user", "user", "assistant") == ["role order: two turns of the user in a row"]
    assert odd("user", "assistant", "user") == ["role order: the user speaks last, and nobody answers"]
    assert [o.split(":")[0] for o in odd("user-", "assistant-")] == ["an empty answer", "an empty question"]
    assert oddities([Turn("user", (PICTURE,)), Turn("assistant", (PICTURE,))]) == []


def test_the_first_position_is_never_learned(tokenizer: Tokenizer) -> None:
    row = encoder(tokenizer).packed([5, 6, 7])
    assert (count(row).learned, count(row).text, count(row).positions) == (2, 3, 3)


def test_histograms_hold_every_value() -> None:
    assert histogram([]) == {}
    assert histogram([7, 7]) == {"7": 2}
    found = histogram(list(range(10, 110)), bins=4)
    assert found == {"10-34": 25, "35-59": 25, "60-84": 25, "85-109": 25}
    assert sum(histogram([1, 500, 3, 77]).values()) == 4
