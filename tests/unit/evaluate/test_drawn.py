"""Pictures are looked up among real ones: the real ones are found, noise is not, and nothing survives a shuffle."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from accessory.data import builtin, emoji, requests
from accessory.data.requests import telling, withheld
from accessory.evaluate import asking, sheet, tally
from accessory.evaluate.asking import INDIRECT, KINDS, Query, partners, queries
from accessory.evaluate.drawn import Scorer, noise_seed, sheet_rows
from accessory.evaluate.gallery import Gallery
from tests.unit.evaluate.drawings import COUNT, Colours, noise, real, scorer, world


@pytest.fixture(autouse=True)
def _world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "asset_cache" not in request.fixturenames:
        world(monkeypatch)


def scored(made: Scorer, asked: list[Query], done: dict[int, Any] | None = None) -> list[dict[str, Any]]:
    return [entry for batch, _ in made.groups(asked, done or {}) for entry in batch]


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_test_split() -> None:
    asked = queries("caption")[0]
    rows = builtin.build("emoji-captions", "test")
    assert len(asked) == len(rows) > 10
    assert [q.held_out for q in asked] == [rows[k].meta["held_out"] for k in range(len(rows))]
    assert sum(q.held_out is True for q in asked) == len(asked) // 2
    known = emoji.concepts()
    assert all(emoji.held_out(q.style, known[q.accepted[0]].hexcode) == q.held_out for q in asked)
    assert asked[0].prompt == f"{emoji.STYLE_WORDS[asked[0].style]} emoji of {known[asked[0].accepted[0]].label}"
    requests = queries("request")[0]
    assert [(q.style, q.accepted, q.number) for q in requests] == [(q.style, q.accepted, q.number) for q in asked]
    assert all(len(q.prompt) == 1 and q.prompt[0].role == "user" for q in requests)  # type: ignore[union-attr]


def test_indirect_requests_keep_the_name_to_themselves() -> None:
    asked, skipped = queries("indirect")
    pairs = queries("caption")[0]
    bare = sum(q.accepted[0] % 3 == 0 for q in pairs)
    assert 0 < bare == skipped == len(pairs) - len(asked)
    for query in asked:
        row = query.accepted[0]
        said = " ".join(turn.text for turn in query.prompt)  # type: ignore[union-attr]
        assert f"word{row}" in said
        assert "many" in said
        assert emoji.STYLE_WORDS[query.style] in said
        assert f"thing {row}" not in said
        assert query.prompt[-1].role == "user"  # type: ignore[union-attr]
        assert query.fits == 1
    assert [q.number for q in asked] == [q.number for q in pairs if q.accepted[0] % 3]


def test_keywords_that_give_the_name_away_are_left_out() -> None:
    tags = ("dog", "doggy", "puppy", "face", "faces", "pet", "hot dog", "surface", "a+")
    assert telling(emoji.Concept("1", "dog face", tags, "", "")) == ["puppy", "pet", "a+"]
    assert telling(emoji.Concept("1", "person lifting weights", ("weightlifter", "lifter", "gym"), "", "")) == ["gym"]
    assert telling(emoji.Concept("1", "equals sign", ("equality", "math"), "", "")) == ["math"]


def test_the_rarest_keywords_are_taken_but_not_those_of_training() -> None:
    uses = {"animal": 9, "pet": 3, "puppy": 1, "woof": 2}
    made = [emoji.Concept("1", "dog", tags, "", "") for tags in (("animal", "pet", "puppy", "woof"), ("puppy", "woof"))]
    assert withheld(made[0], uses) == ("puppy", "woof")
    assert withheld(emoji.Concept("1", "dog", ("puppy", "woof", "pet"), "", ""), uses) == ("puppy", "pet")
    assert withheld(made[1], uses) == ()
    assert withheld(emoji.Concept("1", "dog", ("dog", "animal"), "", ""), uses) == ()


def test_wordings_are_not_those_of_training() -> None:
    trained = [text for said in (*requests.BY_NAME, *requests.BY_KEYWORDS) for text in said[::2]]
    shape = [re.sub(r"\{\w+\}", "_", text.lower()) for text in trained]
    own = [text for said in INDIRECT for text in said] + [asking.RIDDLE]
    assert len(INDIRECT) >= 6
    assert sum(len(said) == 3 for said in INDIRECT) >= 4
    for text in own:
        mine = re.sub(r"\{\w+\}", "_", text.lower())
        assert all(mine not in other and other not in mine for other in shape)
    for said in INDIRECT:
        assert len(said) % 2 == 1
        assert all("".join(said).count(slot) == 1 for slot in ("{a}", "{b}", "{style}"))


def test_every_riddle_has_answers_that_exist(asset_cache: Path) -> None:
    labels = {concept.label for concept in emoji.concepts(asset_cache)}
    assert len(asking.RIDDLES) >= 20
    for riddle, accepted in asking.RIDDLES:
        assert accepted, riddle
        assert set(accepted) <= labels, riddle
        words = set(re.findall(r"\w+", riddle))
        assert not any(words & set(label.split()) for label in accepted), riddle  # it does not say the name
    asked, skipped = queries("riddle", cache=asset_cache)
    assert (len(asked), skipped) == (3 * len(asking.RIDDLES), 0)
    assert len({q.number for q in asked}) == len(asked)


def test_real_indirect_requests_are_indirect(asset_cache: Path) -> None:
    known = emoji.concepts(asset_cache)
    asked, skipped = queries("indirect", cache=asset_cache)
    assert len(asked) + skipped == len(builtin.build("emoji-captions", "test", cache=asset_cache))
    assert len(asked) > 2 * skipped
    for query in asked:
        user = " ".join(turn.text for turn in query.prompt if turn.role == "user")  # type: ignore[union-attr]
        label = known[query.accepted[0]].label.lower()
        assert label not in user.lower() or label in " ".join(w for said in INDIRECT for w in said).lower()
        assert query.fits is not None
        assert query.fits >= 1
        trained = known[query.accepted[0]].tags[:2]
        asked_for = [asking.indirect(query.number, pair, query.style) for pair in (trained, trained[::-1])]
        assert query.prompt not in asked_for  # the pair that training asks with, in either order


def test_partners_ask_for_something_else() -> None:
    for kind in KINDS:
        for limit in (None, 2, 5):
            asked = queries(kind, limit=limit)[0]
            others = partners(asked)
            assert all(not set(a.accepted) & set(b.accepted) for a, b in zip(asked, others, strict=True))
    with pytest.raises(ValueError, match="same thing"):
        partners([asked[0], replace(asked[0], number=9)])


# --- what is found ----------------------------------------------------------------------------------------------------


def test_real_pictures_reach_the_ceiling() -> None:
    asked = queries("caption")[0]
    entries = scored(scorer(real(asked)), asked)
    assert [e["number"] for e in entries] == [q.number for q in asked]
    for cosine in ("plain", "centred"):
        assert tally.recall(entries, "own", 1, cosine) == tally.recall(entries, "real", 1, cosine) == 1
        assert tally.recall(entries, "others", 1, cosine) > 0.9
        assert tally.recall(entries, "shuffled", 5, cosine) <= 0.3
    assert all(
        e["named"] == e["concept"] == e["nearest"]["label"] and e["nearest"]["style"] == e["style"] for e in entries
    )
    assert all(e["likeness"]["target"] > e["likeness"]["training"] for e in entries)
    for likeness in (e["likeness"] for e in entries):
        assert likeness["training"] == pytest.approx(likeness["real_training"], abs=0.01)


def test_noise_is_near_chance() -> None:
    asked = [replace(q, number=q.number + 1000 * k) for k in range(8) for q in queries("caption")[0]]
    entries = scored(scorer(noise), asked)
    assert tally.chance(entries, 1) == pytest.approx(1 / COUNT)
    assert tally.chance(entries, 5) == pytest.approx(5 / COUNT)
    for what in ("own", "shuffled"):
        assert tally.recall(entries, what, 5) == pytest.approx(5 / COUNT, abs=0.08)
        ranks = [e["ranks"]["plain"][what] for e in entries]
        assert np.mean(ranks) == pytest.approx((COUNT + 1) / 2, abs=6)
    assert tally.recall(entries, "real", 1) == 1  # the ceiling is not the generator's


def test_the_wrong_style_is_seen_and_a_copy_is_no_drawing() -> None:
    asked = [q for q in queries("caption")[0] if q.style != "noto" and q.held_out]
    entries = scored(scorer(real(asked, "noto")), asked)
    assert tally.recall(entries, "own", 1) > 0.9  # right concept,
    assert all(e["nearest"]["style"] == "noto" for e in entries)  # wrong style,
    known = emoji.concepts()
    copies = [e for e, q in zip(entries, asked) if not emoji.held_out("noto", known[q.accepted[0]].hexcode)]
    assert copies
    for entry in copies:  # and nearer to a training picture than to the one that was asked for
        assert entry["likeness"]["training"] == pytest.approx(1, abs=2e-3)
        assert entry["likeness"]["training"] > entry["likeness"]["target"]
        assert entry["likeness"]["real_training"] < 0.995


def test_rank_counts_the_best_accepted_and_equals_against() -> None:
    gallery = Gallery(Colours())  # type: ignore[arg-type]
    x = gallery.features["noto"]
    assert [gallery.rank(x[5], "noto", rows, "plain") for rows in ((5,), (3, 5))] == [1, 1]
    assert gallery.rank(x[5], "noto", (3,), "plain") > 1
    likeness = torch.nn.functional.cosine_similarity(x, x[5][None])
    order = likeness.argsort(descending=True).tolist()
    assert [gallery.rank(x[5], "noto", (row,), "plain") for row in order[:6]] == [1, 2, 3, 4, 5, 6]
    gallery.units["plain"]["noto"][8] = gallery.units["plain"]["noto"][5]
    assert gallery.rank(x[5], "noto", (5,), "plain") == 2


def test_centring_takes_an_offset_away() -> None:
    gallery = Gallery(Colours())  # type: ignore[arg-type]
    offset = 30 * torch.ones(48)
    for table in (gallery.features, gallery.means):
        table["fluent"] = table["fluent"] + offset
    centred = [gallery.rank(gallery.features["fluent"][k], "noto", (k,), "centred", "fluent") for k in range(COUNT)]
    plain = [gallery.rank(gallery.features["fluent"][k], "noto", (k,), "plain") for k in range(COUNT)]
    assert np.mean(np.array(centred) == 1) > 0.9
    assert np.mean(np.array(plain) == 1) < 0.5


def test_pictures_depend_on_pair_and_run_alone() -> None:
    asked = queries("request", limit=7)[0]
    whole = scored(scorer(noise, batch_size=64), asked)
    assert scored(scorer(noise, batch_size=2), asked) == whole
    assert scored(scorer(noise, seed=1), asked) != whole
    captions = scored(scorer(noise), queries("caption", limit=7)[0])
    assert [e["seed"] for e in captions] == [e["seed"] for e in whole] == [noise_seed(0, q.number) for q in asked]
    assert len({noise_seed(s, n, d) for s in range(2) for n in range(9) for d in range(3)}) == 54


def test_what_is_done_is_not_drawn_again() -> None:
    asked = queries("caption")[0]
    whole = scored(scorer(real(asked)), asked)
    assert json.loads(json.dumps(whole)) == whole
    made = scorer(real(asked), batch_size=4)
    done = {e["number"]: e for e in whole[: len(whole) // 2 + 1]}
    resumed = scored(made, asked, done)
    assert sorted(resumed, key=lambda e: e["number"]) == whole
    assert sum(made.model.batches) == len(whole) - len(done)  # type: ignore[attr-defined]
    assert all(made.same(q, e) for q, e in zip(asked, whole, strict=True))
    assert not made.same(asked[0], whole[1])
    assert not replace(made, seed=5).same(asked[0], whole[0])


def test_groups_end_where_style_or_pairs_change() -> None:
    asked = queries("caption")[0]
    made = scorer(noise, batch_size=2)
    closed = [batch[-1]["number"] for batch, ended in made.groups(asked, {}) if ended]
    kinds = [(q.held_out, q.style) for q in asked]
    assert closed == [q.number for k, q in enumerate(asked) if k + 1 == len(asked) or kinds[k] != kinds[k + 1]]
    assert len(closed) == 6


def test_limits_and_names_are_checked() -> None:
    asked = queries("caption")[0]
    assert [q.number for q in queries("caption", limit=2)[0]] == [0, len(asked) // 2]
    assert {q.held_out for q in queries("caption", limit=2)[0]} == {True, False}
    with pytest.raises(ValueError, match="limit is 1"):
        queries("caption", limit=1)
    with pytest.raises(ValueError, match="'emoji-names' of a generator is unknown; there are: caption, request"):
        queries("emoji-names")  # type: ignore[arg-type]


def test_a_riddle_without_its_concept_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RIDDLES", (("what flies", ("thing 1", "a kite")),))
    with pytest.raises(ValueError, match=r"'what flies'.* no concept a kite"):
        queries("riddle")


def test_riddles_accept_any_of_their_answers() -> None:
    asked = queries("riddle")[0]
    entries = scored(scorer(real(asked)), asked)
    assert len(entries) == 9
    assert tally.recall(entries, "own", 1) == 1
    assert [e["held_out"] for e in entries] == [None] * 9
    even = [e for e in entries if len(e["accepted"]) == 2]
    assert tally.chance(even, 1) == pytest.approx(2 / COUNT)


# --- tables and sheets ------------------------------------------------------------------------------------------------


def test_intervals() -> None:
    low, high = tally.interval(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # published for Wilson's
    assert tally.interval(0, 10)[0] == 0
    assert 0.25 < tally.interval(0, 10)[1] < 0.32
    assert tally.interval(10, 10)[1] == 1
    for bad in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            tally.interval(*bad)


def test_tables_have_a_line_for_every_part() -> None:
    asked = queries("caption")[0]
    entries = scored(scorer(real(asked)), asked)
    lines = tally.tables(entries).splitlines()
    at = lines.index("")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:at]]
    styles = [*emoji.STYLES, "all"]
    assert [c[:3] + c[4:5] for c in cells] == [
        ["caption", pairs, style, cosine]
        for pairs in ("held out", "training") for style in styles for cosine in ("plain", "centred")
    ]  # fmt: skip
    assert all(len(c) == 11 and c[5].startswith("100.0 % (") and c[9] == "100.0 / 100.0 %" for c in cells)
    assert cells[0][8] == "1.7 / 8.3 %"
    assert len(lines[at + 1 :]) == 4
    assert lines[-1].startswith("| caption | training |")
    assert len({line.count("|") for line in lines[at + 1 :]}) == 1


def test_sheets_show_what_was_asked_drawn_and_real() -> None:
    asked = queries("caption")[0]
    rows = sheet_rows(scorer(noise, batch_size=3), asked, count=4, draws=2)
    assert len(rows) == 4
    assert all(len(row.drawn) == 2 for row in rows)
    assert rows[0].drawn[0].tobytes() != rows[0].drawn[1].tobytes()
    assert rows[0].drawn[0].tobytes() == noise("", noise_seed(0, asked[0].number)).tobytes()  # the one that is scored
    assert [row.marked for row in rows] == [True, True, False, False]
    assert "held out" in rows[0].note
    assert "in training" in rows[3].note
    page = sheet.sheet(rows)
    box = (sheet.TEXT, sheet.HEAD, sheet.TEXT + sheet.CELL, sheet.HEAD + sheet.CELL)
    shown = rows[0].drawn[0].resize((sheet.CELL, sheet.CELL), Image.Resampling.BICUBIC)
    assert page.crop(box).tobytes() == shown.tobytes()
    assert page.getpixel((1, sheet.HEAD + 5)) == sheet.MARK
    assert page.getpixel((1, sheet.HEAD + 3 * (sheet.CELL + sheet.GAP) + 5)) == sheet.PAPER
    long = replace(rows[0], words="word " * 400)
    assert sheet.sheet([long]).width == page.width
    with pytest.raises(ValueError, match="equally many"):
        sheet.sheet([rows[0], replace(rows[1], drawn=())])
