"""Scenes: every answer is derived again from the pixels or from the placed boxes, not from the maker's own words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accessory.data import emoji, scenes
from accessory.data.scene_words import NAMES, PATCH_COLOURS, PHRASES, plural

MANY = 60


def ink(image: Image.Image) -> np.ndarray:
    """Where something was drawn: pixels that differ from the background (the colour in most of the border)."""
    pixels = np.asarray(image).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    values, counts = np.unique(border, axis=0, return_counts=True)
    return np.abs(pixels - values[counts.argmax()]).max(-1) > 6


def test_box_text_is_a_fraction_of_the_padded_square() -> None:
    assert scenes.box_text((12, 30, 55, 71), 100, 100) == "[0.12,0.30,0.55,0.71]"
    # 200 x 100: 50 rows of padding above.
    assert scenes.box_text((0, 0, 200, 100), 200, 100) == "[0.00,0.25,1.00,0.75]"
    assert scenes.box_text((0, 0, 100, 200), 100, 200) == "[0.25,0.00,0.75,1.00]"
    # An odd difference: the offset is rounded down, (103 - 100) // 2 = 1.
    assert scenes.box_text((0, 0, 100, 103), 100, 103) == "[0.01,0.00,0.98,1.00]"


def test_words() -> None:
    assert len(NAMES) >= 120
    singular = ("cat", "fox", "octopus", "butterfly", "tomato", "avocado", "glasses", "peach", "key")
    assert " ".join(plural(n) for n in singular) == (
        "cats foxes octopuses butterflies tomatoes avocados pictures of glasses peaches keys"
    )
    colours = np.array(list(PATCH_COLOURS.values()))
    gaps = np.abs(colours[:, None] - colours[None]).sum(-1)[np.triu_indices(len(colours), 1)]
    assert gaps.min() > 60, "two patch colours look alike"


@pytest.mark.assets
def test_all_names_are_concepts(asset_cache: Path) -> None:
    known = emoji.concepts(asset_cache)
    found = scenes.vocabulary(asset_cache)
    assert {n for n, _ in found} == NAMES
    assert all(known[k].label == n for n, k in found)


@pytest.mark.assets
@pytest.mark.parametrize("size", [64, 128, 200])
@pytest.mark.parametrize("task", scenes.TASKS)
def test_placed_boxes_are_disjoint_inside_and_large_enough(task: str, size: int, asset_cache: Path) -> None:
    for i in range(MANY):
        z = scenes.scene(task, 0, i, "train", size=size, cache=asset_cache)
        assert min(z.image.size) == size
        for k, b in enumerate(z.boxes):
            assert 0 <= b.x1 < b.x2 <= z.image.width
            assert 0 <= b.y1 < b.y2 <= z.image.height
            assert max(b.x2 - b.x1, b.y2 - b.y1) >= round(36 / 128 * size) - 4 - 2 * (task == "colour"), (i, b)
            for c in z.boxes[:k]:
                assert b.x2 <= c.x1 or c.x2 <= b.x1 or b.y2 <= c.y1 or c.y2 <= b.y1, (i, b, c)


@pytest.mark.assets
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", ["count", "relation", "grounding", "wide"])
def test_boxes_are_tight_on_what_is_drawn(task: str, split: scenes.Split, asset_cache: Path) -> None:
    """Nothing is drawn outside the boxes (but for the faint edge), and each box is filled to its four sides."""
    checked = 0
    for i in range(MANY):
        z = scenes.scene(task, 1, i, split, cache=asset_cache)
        drawn = ink(z.image)
        outside = drawn.copy()
        for b in z.boxes:
            outside[max(0, b.y1 - 1) : b.y2 + 1, max(0, b.x1 - 1) : b.x2 + 1] = False
            inner = drawn[b.y1 : b.y2, b.x1 : b.x2]
            if inner.mean() < 0.2:  # jittered until it is nearly the background's colour
                continue
            rows, cols = np.flatnonzero(inner.any(1)), np.flatnonzero(inner.any(0))
            slack = (rows[0], cols[0], inner.shape[0] - 1 - rows[-1], inner.shape[1] - 1 - cols[-1])
            assert max(slack) <= 3, (i, b, slack)
            checked += 1
        assert not outside.any(), i
    assert checked > MANY


@pytest.mark.assets
def test_counts(asset_cache: Path) -> None:
    singular = {plural(n): n for n in NAMES}
    seen: list[int] = []
    for i in range(MANY * 5):
        z = scenes.scene("count", 0, i, "test", turns=3, cache=asset_cache)
        for question, answer in z.turns:
            named = singular[re.fullmatch(r"How many (.+) are there\?", question)[1]]
            assert sum(b.name == named for b in z.boxes) == int(answer)
        seen.append(int(z.turns[0][1]))
    share = np.bincount(seen, minlength=6)[1:] / len(seen)
    assert len(share) == 5
    assert share.min() > 0.12, "an answer that is rare can be guessed against"


@pytest.mark.assets
def test_colours_are_those_of_the_pixels_around_the_thing(asset_cache: Path) -> None:
    names, values = list(PATCH_COLOURS), np.array(list(PATCH_COLOURS.values()))
    checked = 0
    for i in range(MANY):
        z = scenes.scene("colour", 0, i, "test", turns=9, cache=asset_cache)
        pixels = np.asarray(z.image).astype(int)
        behind = {}
        for b in z.boxes:
            area = pixels[max(0, b.y1 - 1) : b.y2 + 1, max(0, b.x1 - 1) : b.x2 + 1]
            edge = np.concatenate([area[0], area[-1], area[:, 0], area[:, -1]])
            exact = (np.abs(edge[:, None] - values).max(-1) < 12).sum(0)
            behind[b.name] = names[int(exact.argmax())]
        for question, answer in z.turns:
            if found := re.fullmatch(r"What color is behind the (.+)\?", question):
                assert behind[found[1]] == answer
            else:
                colour = re.fullmatch(r"What is on the (.+) patch\?", question)
                assert colour is not None
                assert behind[answer] == colour[1]
            checked += 1
    assert checked > 2 * MANY


@pytest.mark.assets
def test_relations_hold_between_the_boxes(asset_cache: Path) -> None:
    answers: list[str] = []
    for i in range(MANY * 3):
        z = scenes.scene("relation", 0, i, "test", turns=2, cache=asset_cache)
        at = {b.name: b for b in z.boxes}

        def holds(a: scenes.Box, relation: str, b: scenes.Box) -> bool:
            return {
                "to the left of": a.x2 <= b.x1,
                "to the right of": a.x1 >= b.x2,
                "above": a.y2 <= b.y1,
                "below": a.y1 >= b.y2,
            }[relation]

        words = "|".join(("to the left of", "to the right of", "above", "below"))
        for question, answer in z.turns:
            if found := re.fullmatch(rf"Is the (.+) ({words}) the (.+)\?", question):
                assert holds(at[found[1]], found[2], at[found[3]]) == (answer == "yes")
                answers.append(answer)
            else:
                found = re.fullmatch(rf"What is ({words}) the (.+)\?", question)
                assert found is not None
                assert holds(at[answer], found[1], at[found[2]])
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


@pytest.mark.assets
@pytest.mark.parametrize("task", ["grounding", "region", "wide"])
def test_boxes_in_text_are_those_of_the_things(task: str, asset_cache: Path) -> None:
    checked = 0
    for i in range(MANY):
        z = scenes.scene(task, 0, i, "test", turns=9, cache=asset_cache)
        at = {b.name: b for b in z.boxes}
        side = max(z.image.size)
        square = Image.new("RGB", (side, side))
        offset = ((side - z.image.width) // 2, (side - z.image.height) // 2)
        square.paste(z.image, offset)
        for question, answer in z.turns:
            text = answer if answer.startswith("[") else question
            found = re.search(r"\[(\d\.\d\d),(\d\.\d\d),(\d\.\d\d),(\d\.\d\d)\]", text)
            if not found:
                continue
            name = answer if text is question else re.fullmatch(r"Where is the (.+)\? Give the box\.", question)[1]
            b = at[name]
            true = (b.x1 + offset[0], b.y1 + offset[1], b.x2 + offset[0], b.y2 + offset[1])
            assert np.abs(np.array([float(v) for v in found.groups()]) * side - true).max() <= side * 0.005 + 1e-6
            checked += 1
    assert checked >= MANY


@pytest.mark.assets
def test_wide_canvases_are_read_in_order(asset_cache: Path) -> None:
    shapes = set()
    for i in range(MANY):
        z = scenes.scene("wide", 0, i, "test", turns=9, cache=asset_cache)
        w, h = z.image.size
        shapes.add((w // min(w, h), h // min(w, h)))
        order = [b.name for b in sorted(z.boxes, key=lambda b: b.x1 if w > h else b.y1)]
        told = dict(z.turns)
        first, last = ("left", "right") if w > h else ("top", "bottom")
        assert told[f"What is at the far {first}?"] == order[0]
        assert told[f"What is at the far {last}?"] == order[-1]
        assert told["How many things are there?"] == str(len(order))
        for k, nth in enumerate(("first", "second", "third", "fourth", "fifth", "sixth")):
            question = f"What is {nth} from the {first}?"
            assert told.get(question, order[k] if k < len(order) else "") == (order[k] if k < len(order) else "")
    assert shapes == set(scenes.ASPECTS)


@pytest.mark.assets
def test_scenes_are_functions_of_their_arguments(asset_cache: Path) -> None:
    base = scenes.scene("count", 0, 5, "train", cache=asset_cache)
    same = scenes.scene("count", 0, 5, "train", cache=asset_cache)
    assert base.image.tobytes() == same.image.tobytes()
    assert (base.turns, base.boxes) == (same.turns, same.boxes)
    for other in (
        ("count", 1, 5, "train"),
        ("count", 0, 6, "train"),
        ("count", 0, 5, "test"),
        ("region", 0, 5, "train"),
    ):
        assert scenes.scene(*other, cache=asset_cache).image.tobytes() != base.image.tobytes(), other


@pytest.mark.assets
def test_styles_of_training_and_test_differ(asset_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[str]] = {"train": set(), "test": set()}
    split = "train"
    true = emoji.pictures

    def spy(style: str, *args: object, **kwargs: object) -> emoji.Pixels:
        used[split].add(style)
        return true(style, cache=asset_cache)

    monkeypatch.setattr(emoji, "pictures", spy)
    for split in ("train", "test"):
        for i in range(20):
            scenes.scene("grounding", 0, i, split, cache=asset_cache)
    assert used == {"train": {"fluent", "openmoji"}, "test": {"noto"}}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'sorting' is unknown.*grounding"):
        scenes.scene("sorting", 0, 0, "train")
    with pytest.raises(ValueError, match="size 32 is below 64"):
        scenes.scene("count", 0, 0, "train", size=32)
    assert all(len(v) >= 1 for v in PHRASES.values())
