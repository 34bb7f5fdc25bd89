"""VQA accuracy: hand-computed cases and the quirks of the official evaluator."""

from __future__ import annotations

import hashlib
import json

import pytest

from accessory.evaluate.vqa import CONTRACTIONS, normalise_vqa, vqa_accuracy, without_marks

# Of the table of contractions that the official evaluator publishes (as lmms-eval 0.7.3 ships it), sorted, as JSON.
OFFICIAL = "3e5960526f62912d3b70896069c43c13d7c21be38d50ca28efbb9095b499454f"


def test_the_contractions_are_the_official_ones() -> None:
    assert hashlib.sha256(json.dumps(sorted(CONTRACTIONS.items())).encode()).hexdigest() == OFFICIAL
    assert (CONTRACTIONS["dont"], CONTRACTIONS["y'alld've"]) == ("don't", "y'all'd've")
    other = {**CONTRACTIONS, "dont": "do not"}
    assert hashlib.sha256(json.dumps(sorted(other.items())).encode()).hexdigest() != OFFICIAL


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Two dogs", "2 dogs"),
        ("A cat.", "cat"),
        ("none", "0"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes, sir", "yes sir"),
        ("red/blue", "red blue"),  # a mark between letters parts them
        ("red /blue", "red blue"),  # beside a blank it vanishes
        ("a-b -c", "ab c"),  # and so does the same mark elsewhere in that text
        ("line\none", "line 1"),
        ("", ""),
    ],
)
def test_normalisation(text: str, plain: str) -> None:
    assert normalise_vqa(text) == plain


def test_only_the_first_32_points_go() -> None:
    assert without_marks("." * 40) == "." * 8


def test_accuracy_by_hand() -> None:
    """Ten people: an answer of n of them is right by min(1, others / 3), averaged over whom to leave out."""
    assert vqa_accuracy("red", ["red"] * 10) == 1
    assert vqa_accuracy("blue", ["red"] * 10) == 0
    one = ["red"] + ["blue"] * 9
    assert vqa_accuracy("red", one) == pytest.approx((9 * (1 / 3) + 0) / 10)
    two = ["red"] * 2 + ["blue"] * 8
    assert vqa_accuracy("red", two) == pytest.approx((8 * (2 / 3) + 2 * (1 / 3)) / 10)
    three = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy("red", three) == pytest.approx((7 * 1 + 3 * (2 / 3)) / 10)
    assert vqa_accuracy("The Red!", ["red"] * 4 + ["blue"] * 6) == 1


def test_where_all_agree_texts_are_compared_as_they_are() -> None:
    assert vqa_accuracy("The red", ["red"] * 10) == 0
    assert vqa_accuracy("The red", ["red"] * 9 + ["blue"]) == 1


def test_too_few_people_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 people, the row has 1"):
        vqa_accuracy("red", ["red"])
