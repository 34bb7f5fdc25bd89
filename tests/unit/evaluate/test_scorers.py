"""Scorers on hand-computed cases, and beside a library where there is one."""

from __future__ import annotations

import shutil

import pytest
from anls import anls_score
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.task_prompts import TASKS
from accessory.evaluate.captions import caption_scores, words
from accessory.evaluate.scorers import (
    SCORERS,
    Scored,
    Truth,
    anls,
    box_iou,
    chosen,
    levenshtein,
    pope_yes,
    relaxed,
    scorer,
    yes_no,
)


def scored(name: str, rows: list[tuple[str, Truth]]) -> dict[str, float]:
    """Totals of answers, each with its truth."""
    s = scorer(name)
    return s.total([Scored(a, t, s.item(a, t)) for a, t in rows])


def test_every_scorer_has_a_prompt() -> None:
    assert {s.prompt for s in SCORERS.values()} <= TASKS.keys()
    with pytest.raises(ValueError, match="no scorer 'vqaa'"):
        scorer("vqaa")


def test_levenshtein_by_hand() -> None:
    assert [levenshtein(a, b) for a, b in (("", ""), ("", "ab"), ("kitten", "sitting"), ("ab", "ba"))] == [0, 2, 3, 2]


def test_anls_by_hand() -> None:
    assert anls("Hello  World", ["hello world"]) == 1
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("hxxxo", ["hello"]) == 0  # 0.4 is below the threshold
    assert anls("hxxxo", ["hello"], threshold=0.4) == pytest.approx(0.4)
    assert anls("hallo", ["nothing", "hello"]) == pytest.approx(0.8)
    assert anls("", ["x"]) == 0


@settings(max_examples=200, deadline=None)
@given(st.text("ab 1A", max_size=12), st.lists(st.text("ab 1A", min_size=1, max_size=12), min_size=1, max_size=3))
def test_anls_equals_the_library(answer: str, truths: list[str]) -> None:
    ours = anls(answer, truths)
    # The library also drops what is exactly at the threshold, which the evaluator of the challenge keeps.
    if all(t.strip() for t in truths) and ours != 0.5:
        assert ours == pytest.approx(anls_score(answer, truths))


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("105", "100", True),
        ("5%", "0.05", True),
        ("5%", "5", False),
        ("-95", "-100", True),
        ("0", "0", True),
        ("0.01", "0", False),
        ("Red ", "red", True),
        ("reds", "red", False),
        ("2010", "red", False),
    ],
)
def test_relaxed_accuracy(answer: str, truth: str, right: bool) -> None:
    assert relaxed(answer, truth) is right
    assert scored("relaxed", [(answer, Truth(("nothing", truth)))]) == {"accuracy": float(right)}


def test_boxes_on_a_wide_picture_by_hand() -> None:
    """RefCOCO's rule: pixels of the padded square, IoU of at least a half."""
    assert box_iou("it is at [0,0,0.5,0.5].", "[0,0,0.5,1]") == pytest.approx(0.5)
    assert box_iou("[0.5,0.5,0,0;0.9,0.9,1,1]", "[0,0,0.5,0.5]") == 1  # the first box counts, in any order of corners
    assert box_iou("somewhere", "[0,0,0.5,1]") == 0
    rows = [("[0,0,0.5,0.5]", Truth(("[0,0,0.5,1]",))), ("[0,0,0.5,0.49]", Truth(("[0,0,0.5,1]",)))]
    assert scored("box", rows) == {"accuracy": 0.5, "iou": pytest.approx((0.5 + 0.49) / 2)}
    with pytest.raises(ValueError, match="holds no box"):
        box_iou("[0,0,1,1]", "left")


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes", "yes"), ("no.", "no"), ("n", "no"), ("y", "yes"), (" Yes, it is", "yes"), ("No!", "no"),
     ("I do not", "other"), ("It is not", "other"), ("", "other"), ("know", "no")],
)  # fmt: skip
def test_what_mme_reads(answer: str, read: str) -> None:
    assert yes_no(answer) == read


def test_mme_by_hand() -> None:
    """Two pictures of one sub-task (one wholly right, one half) and one of another (nothing right)."""
    rows = [
        ("yes", Truth(("Yes",), category="count", group="a")),
        ("no", Truth(("No",), category="count", group="a")),
        ("yes", Truth(("Yes",), category="count", group="b")),
        ("yes", Truth(("No",), category="count", group="b")),
        ("maybe", Truth(("Yes",), category="code_reasoning", group="a")),
        ("yes", Truth(("No",), category="code_reasoning", group="a")),
    ]
    # count: acc 3/4, acc+ 1/2; code_reasoning: 0 and 0
    assert scored("mme", rows) == {
        "score": 125, "perception": 125, "cognition": 0, "count": 125, "code_reasoning": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="two questions a picture, 'a' of 'code_reasoning' has 1"):
        scored("mme", rows[:5])
    with pytest.raises(ValueError, match="must be yes or no, got 'red'"):
        scorer("mme").item("yes", Truth(("red",)))


def test_pope_by_hand() -> None:
    said = ["yes", "Yes, there is", "no", "yes", "There is no dog", "No.", "not here", "maybe"]
    real = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    # said yes: 1, 2, 4, 8 (what is no clear no counts as a yes); hits 2, false 2, missed 1
    assert [pope_yes(s) for s in said] == [True, True, False, True, False, False, False, True]
    got = scored("pope", [(s, Truth((r,))) for s, r in zip(said, real, strict=True)])
    assert got == pytest.approx({"accuracy": 5 / 8, "precision": 0.5, "recall": 2 / 3, "f1": 4 / 7, "yes_ratio": 0.5})
    never = scored("pope", [("no", Truth(("yes",)))])
    assert (never["precision"], never["f1"], never["yes_ratio"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. a dog", "B"), ("The answer is B", "B"), ("a dog", "B"),
     ("A Dog.", "B"), ("A dog sits", None), ("E", None), ("", None), ("a bird", None), ("option: (C)", "C"),
     ("the answer is a mouse", None)],
)  # fmt: skip
def test_what_is_chosen_is_never_guessed(answer: str, letter: str | None) -> None:
    assert chosen(answer, ("a cat", "a dog", "a cow")) == letter
    truth = Truth(("B",), ("a cat", "a dog", "a cow"))
    assert scorer("choice").item(answer, truth) == {"accuracy": float(letter == "B"), "unread": float(letter is None)}


def test_exact_match_normalises_as_it_says() -> None:
    truth = Truth(("a dog", "puppy"))
    assert [scorer("exact").item(a, truth)["accuracy"] for a in ("A  dog.", "Puppy", "dog")] == [1, 1, 0]
    assert [scorer("vqa-exact").item(a, truth)["accuracy"] for a in ("the dog", "puppies")] == [1, 0]
    assert [scorer("text").item(a, truth)["accuracy"] for a in ("a dog ", "A dog")] == [1, 0]


CAPTIONS = ["a man rides a horse", "two dogs play", "a red bus on a street"]
REFERENCES = [
    ["a man riding a horse", "a man rides a brown horse"],
    ["two dogs are playing", "dogs play in the grass"],
    ["a red bus on the street", "the bus is red"],
]


def test_captions_by_hand() -> None:
    same = caption_scores([r[0] for r in REFERENCES], [[r[0]] for r in REFERENCES])
    assert [same["bleu_1"], same["bleu_4"]] == pytest.approx([1, 1], abs=1e-6)
    assert same["cider"] == pytest.approx(10)  # ten times a cosine of 1
    got = caption_scores(CAPTIONS, REFERENCES)
    # BLEU-1: 5 of 5, 3 of 3 and 5 of 6 words are in a reference (which has "a" once), closest lengths 5, 4, 6
    assert got["bleu_1"] == pytest.approx(13 / 14 * 2.718281828 ** (1 - 15 / 14), abs=1e-6)
    shifted = caption_scores(CAPTIONS[1:] + CAPTIONS[:1], REFERENCES)
    assert shifted["cider"] < 0.2 < got["cider"]
    with pytest.raises(ValueError, match="1 captions for 2 lists"):
        caption_scores(["a"], [["a"], ["b"]])


def test_captions_are_cut_into_words() -> None:
    assert words("A dog's T-shirt, isn't it?") == "a dog 's t-shirt is n't it"
    assert words("Two, 3.5 -- and... done!") == "two 3.5 and done"


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java, which the challenge's own tokeniser is written in")
def test_words_are_the_challenge_s() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = [
        "A man riding a wave on top of a surfboard.",
        "Two dogs' toys, and the cat's bed; isn't it nice?",
        "A black-and-white photo of 3.5 pizzas!",
        "It's a T-shirt... they're wearing \"blue\" hats",
        "People don't sit - they stand, we've seen.",
    ]
    theirs = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    assert [words(c) for c in captions] == [theirs[i][0] for i in range(len(captions))]
