"""How answers are judged: boxes, words, letters."""

from __future__ import annotations

import random

import pytest

from accessory.evaluate.metrics import iou, judge, normalise, parse_box, same_box, same_text, same_words


def boxes(n: int) -> list[tuple[float, float, float, float]]:
    rng = random.Random(0)
    made = []
    for _ in range(n):
        x, y = sorted(rng.random() for _ in range(2)), sorted(rng.random() for _ in range(2))
        made.append((round(x[0], 3), round(y[0], 3), round(x[1], 3), round(y[1], 3)))
    return made


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1,0.2,0.3,0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("It is at [0.100, 0.2 ,0.3,1].", (0.1, 0.2, 0.3, 1.0)),
        ("[0.3,0.4,0.1,0.2]", (0.1, 0.2, 0.3, 0.4)),
        ("[-1,0,1,2] and [0,0,9,9]", (-1.0, 0.0, 1.0, 2.0)),
        ("[0.1,0.2,0.3]", None),
        ("[0.1,0.2,0.3,0.4,0.5]", None),
        ("0.1,0.2,0.3,0.4", None),
        ("[a,b,c,d]", None),
        ("", None),
    ],
)
def test_parse_box(text: str, box: object) -> None:
    assert parse_box(text) == box


def test_boxes_survive_being_written() -> None:
    made = boxes(200)
    for b in made:
        assert parse_box("see [" + ",".join(f"{v:.3f}" for v in b) + "] there") == b
    assert len(set(made)) == 200


def test_iou_properties() -> None:
    made = boxes(60)
    seen = 0
    for a in made:
        assert iou(a, a) == pytest.approx(1.0)
        for b in made:
            value = iou(a, b)
            assert 0 <= value <= 1
            assert value == iou(b, a)
            moved = [tuple(3 * v + 2 for v in box) for box in (a, b)]
            assert iou(*moved) == pytest.approx(value, abs=1e-9)  # type: ignore[arg-type]
            assert (value == 0) == (a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1])
            seen += 0 < value < 1
    assert seen > 500
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0


def test_normalise_is_idempotent_and_forgives_only_form() -> None:
    for text in ("A  Red\nCat.", "a red cat", " a red cat ...", "A RED CAT."):
        assert normalise(text).strip(". ") == "a red cat"
        assert normalise(normalise(text)) == normalise(text)
    assert same_words("Red  cat.", "red cat")
    assert not same_words("red cats", "red cat")
    assert not same_words("a red cat", "red cat")
    assert same_text(" MoOn ", "MoOn")
    assert not same_text("moon", "MoOn")


def test_same_box_needs_half_and_a_good_reference() -> None:
    truth = "[0.0,0.0,1.0,1.0]"
    assert same_box("[0.0,0.0,1.0,0.51]", truth)
    assert not same_box("[0.0,0.0,1.0,0.49]", truth)
    assert not same_box("somewhere", truth)
    with pytest.raises(ValueError, match="holds no box"):
        same_box(truth, "somewhere")


def test_every_task_has_its_judge() -> None:
    assert judge("scenes-grounding") is same_box
    assert judge("words-ocr") is same_text
    assert judge("emoji-names") is judge("anything else") is same_words
