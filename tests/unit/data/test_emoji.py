"""Emoji concepts and pictures, the words drawn from their names, and the built-in sets made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accessory.data import builtin, emoji, words
from accessory.data.flags import countries, flag_pictures
from accessory.schema import Sample


def pixels_of(sample: Sample) -> bytes:
    source = sample.turns[0].pictures[0].source
    assert isinstance(source, Image.Image)
    return source.tobytes()


def text_of(sample: Sample) -> list[str]:
    return [t.text for t in sample.turns]


def disc(size: int = 136) -> emoji.Pixels:
    """A red disc left of the middle on clear ground."""
    y, x = np.mgrid[:size, :size]
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[(x - size * 0.4) ** 2 + (y - size / 2) ** 2 < (size * 0.3) ** 2] = (220, 30, 30, 255)
    return rgba


def test_compose_and_plain_put_the_background_where_nothing_is_drawn() -> None:
    rgba = disc()
    composed = np.asarray(emoji.compose(rgba, (1, 2, 3)))
    clear = rgba[..., 3] == 0
    assert clear.any()
    assert not clear.all()
    assert (composed[clear] == (1, 2, 3)).all()
    assert (composed[~clear] == (220, 30, 30)).all()
    view = emoji.plain(rgba, 64)
    assert view.shape == (64, 64, 3)
    assert (view[0, 0] == 255).all()


def test_augment_depends_on_the_generator_alone() -> None:
    rgba = disc()
    first = [emoji.augment(rgba, 96, np.random.default_rng((5, i))) for i in range(40)]
    again = [emoji.augment(rgba, 96, np.random.default_rng((5, i))) for i in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert len({v.tobytes() for v in first}) == 40
    assert all(v.shape == (96, 96, 3) and v.dtype == np.uint8 for v in first)


def test_augment_never_mirrors_and_keeps_the_thing_in_view() -> None:
    """A mark at the left edge of the drawing stays left of its middle, in every view."""
    rgba = np.zeros((136, 136, 4), np.uint8)
    rgba[40:96, 20:116] = (250, 250, 250, 255)
    rgba[58:78, 24:44] = (10, 10, 10, 255)
    seen = 0
    for i in range(60):
        rng = np.random.default_rng(i)
        a, b, c, d, e, f = emoji._affine(136, 128, rng)
        assert a * e - b * d > 0, "a mirrored view"
        y, x = np.mgrid[:128, :128] + 0.5
        sx, sy = a * x + b * y + c, d * x + e * y + f
        mark = (sx > 24) & (sx < 44) & (sy > 58) & (sy < 78)
        body = (sx > 20) & (sx < 116) & (sy > 40) & (sy < 96)
        assert body.mean() > 0.1
        assert x[mark].mean() < x[body].mean()
        seen += 1
    assert seen == 60


def test_colour_matrix_keeps_grey_near_grey_and_varies() -> None:
    mats = np.array([emoji.colour_matrix(np.random.default_rng(i)) for i in range(50)]).reshape(50, 3, 4)
    grey = mats[..., :3].sum(-1)  # what (1, 1, 1) becomes, before the offset
    assert np.abs(grey - grey.mean(1, keepdims=True)).max() < 1e-6
    assert mats.std(0).max() > 0.1


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emoji.write_atomically(tmp_path / "x.npy", broken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.assets
def test_concepts(asset_cache: Path) -> None:
    known = emoji.concepts(asset_cache)
    assert len(known) >= 1300
    assert [c.hexcode for c in known] == sorted({c.hexcode for c in known})
    assert len({c.label for c in known}) == len(known), "two concepts with one name cannot be told apart"
    assert {c.group for c in known} == set(emoji.GROUPS.values())
    for c in known:
        points = [int(p, 16) for p in c.hexcode.split("-")]
        assert not any(0x1F3FB <= p <= 0x1F3FF or 0x1F1E6 <= p <= 0x1F1FF or p == 0x200D for p in points), c


@pytest.mark.assets
def test_three_styles_draw_the_same_concepts_differently(asset_cache: Path) -> None:
    known = emoji.concepts(asset_cache)
    drawn = {s: emoji.pictures(s, cache=asset_cache) for s in emoji.STYLES}
    rows = range(0, len(known), 9)
    for style, array in drawn.items():
        assert array.shape == (len(known), 136, 136, 4), style
        assert not array.flags.writeable
        assert min(int((array[k, ..., 3] > 128).sum()) for k in rows) > 100, f"{style} has an empty picture"
    means = {s: np.array([np.asarray(emoji.plain(a[k], 16), float).ravel() for k in rows]) for s, a in drawn.items()}
    for one, two in (("fluent", "noto"), ("openmoji", "noto"), ("fluent", "openmoji")):
        x, y = (m - m.mean(0) for m in (means[one], means[two]))
        near = (x @ y.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))).argmax(1)
        right = float((near == np.arange(len(rows))).mean())
        # Same concepts in the same rows (chance is 0.6 %), yet drawings that plain pixels do not match.
        assert 0.08 < right < 0.9, (one, two, right)


@pytest.mark.assets
def test_pictures_are_drawn_once_and_the_stored_ones_are_used(asset_cache: Path, tmp_path: Path) -> None:
    for name in ("emojibase-data", "fluent-emoji-3d", "openmoji", "noto-color-emoji"):
        folder = next(p for p in asset_cache.iterdir() if p.name.startswith(f"{name}-"))
        (tmp_path / folder.name).symlink_to(folder)
    assert emoji.concepts(tmp_path) == emoji.concepts(asset_cache), "the stored list is out of date"
    small = emoji.pictures("noto", 16, tmp_path)
    stored = sorted(p.name for p in (tmp_path / "prepared").iterdir())
    assert len(stored) == 2, stored
    assert np.array_equal(emoji.pictures("noto", 16, tmp_path), small)
    with pytest.raises(ValueError, match="'apple' is unknown"):
        emoji.pictures("apple", 16, tmp_path)
    with pytest.raises(ValueError, match="emoji size 8 "):
        emoji.pictures("noto", 8, tmp_path)


@pytest.mark.assets
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", sorted(builtin.NAMES.keys() - builtin.DRAWN))
def test_every_set_is_a_function_of_seed_and_index(name: str, split: builtin.Split, asset_cache: Path) -> None:
    made = builtin.build(name, split, cache=asset_cache, seed=3, size=96)
    again = builtin.build(name, split, cache=asset_cache, seed=3, size=96)
    picks = [0, 1, 7, len(made) - 1]
    for i in picks:
        assert pixels_of(made[i]) == pixels_of(again[i])
        assert text_of(made[i]) == text_of(again[i])
        sample = made[i]
        assert [t.role for t in sample.turns] == ["user", "assistant"] * (len(sample.turns) // 2)
        assert not isinstance(sample.turns[0].parts[0], str), "the picture comes first"
        assert sum(len(t.pictures) for t in sample.turns) == 1
        assert sample.meta["task"] == name
        assert sample.meta["answer"] == sample.turns[1].text != ""
        assert sample.index == i
    if name != "easy-vqa":  # there several questions are about one picture, and none is drawn anew
        assert len({pixels_of(made[i]) for i in range(12)}) >= 10
        later = made[5 + len(made)]
        assert (pixels_of(later) == pixels_of(made[5])) is (split == "test")
        other = builtin.build(name, split, cache=asset_cache, seed=4, size=96)
        differs = any(pixels_of(other[i]) != pixels_of(made[i]) for i in range(5))
        assert differs is (split == "train" or name.startswith(("scenes", "words")))
    with pytest.raises(IndexError):
        made[-1]


@pytest.mark.assets
def test_names_test_is_the_held_out_style_once_in_order(asset_cache: Path) -> None:
    known = emoji.concepts(asset_cache)
    test = builtin.build("emoji-names", "test", cache=asset_cache)
    train = builtin.build("emoji-names", "train", cache=asset_cache)
    assert len(test) == len(known)
    assert len(train) == 2 * len(known)
    for k in range(0, len(test), 50):
        sample = test[k]
        assert (sample.meta["concept"], sample.meta["style"]) == (k, "noto")
        assert text_of(sample) == ["What is this?", known[k].label]
    styles = {train[i].meta["style"] for i in range(0, len(train), 40)}
    assert styles == {"fluent", "openmoji"}
    assert len({train[i].turns[0].text for i in range(60)}) == len(builtin.NAME_QUESTIONS)


@pytest.mark.assets
def test_words_of_training_and_test_are_disjoint(asset_cache: Path) -> None:
    train, test = words.word_list("train", asset_cache), words.word_list("test", asset_cache)
    assert len(train) > 2000
    assert len(test) > 200
    assert not set(train) & set(test)
    drawn = builtin.build("words-ocr", "test", cache=asset_cache)
    assert {drawn[i].meta["answer"].lower() for i in range(len(drawn))} == set(test)


@pytest.mark.assets
def test_a_word_is_drawn_whole_and_legible(asset_cache: Path) -> None:
    rng = np.random.default_rng(0)
    for text in ("I", "rainbow", "WWWWWWWW", "jgy") * 15:
        picture = words.draw_word(text, 128, rng, asset_cache)
        assert picture.size == (128, 128)
        grey = np.asarray(picture.convert("L"), float)
        assert np.ptp(grey) > 60, text
        ring = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        assert np.ptp(ring) < 60, f"{text} touches the border"


@pytest.mark.assets
def test_easy_vqa_keeps_the_published_split(asset_cache: Path) -> None:
    test = builtin.build("easy-vqa", "test", cache=asset_cache)
    train = builtin.build("easy-vqa", "train", cache=asset_cache)
    assert len(test) == 9673
    assert text_of(test[0]) == ["what is the red shape?", "triangle"]
    asked = [len(train[i].turns) // 2 for i in range(60)]
    assert max(asked) == 4
    whole = builtin.build("easy-vqa", "train", cache=asset_cache, turns=1)
    assert len(whole) == 38575
    assert sum(len(train[i].turns) // 2 for i in range(0, len(train), 10)) == pytest.approx(3857.5, rel=0.05)


@pytest.mark.assets
def test_flags(asset_cache: Path) -> None:
    known = countries(asset_cache)
    assert len(known) > 190
    assert flag_pictures(cache=asset_cache).shape == (len(known), 136, 136, 4)
    facts = {c.code: c for c in known}
    assert (facts["fr"].name, facts["fr"].capital, facts["jp"].capital) == ("France", "Paris", "Tokyo")
    assert len({c.name for c in known}) == len(known)
    capital = builtin.build("flags", "test", cache=asset_cache, ask="capital")
    row = [c.code for c in known].index("fr")
    assert text_of(capital[row]) == ["What is the capital of this country?", "Paris"]


def test_build_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'emoji' is unknown.*emoji-names"):
        builtin.build("emoji", "train", cache=tmp_path)
    with pytest.raises(ValueError, match="turns=0"):
        builtin.build("flags", "train", cache=tmp_path, turns=0)
    with pytest.raises(ValueError, match="size=5000"):
        builtin.build("flags", "train", cache=tmp_path, size=5000)
    with pytest.raises(ValueError, match="ask='king'"):
        builtin.build("flags", "train", cache=tmp_path, ask="king")
