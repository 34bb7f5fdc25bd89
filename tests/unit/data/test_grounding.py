"""Boxes in words: written as SPHINX writes them, read back, and counted on the padded square."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from accessory.data import grounding as g
from accessory.data.grounding import Located
from accessory.data.image import pad_to_square


def test_a_box_is_where_its_pixels_are_on_the_padded_square() -> None:
    picture = Image.new("RGB", (80, 41), (0, 0, 0))
    picture.paste((255, 255, 255), (10, 6, 30, 21))
    assert g.to_square((10, 6, 30, 21), 80, 41) == pytest.approx((10 / 80, 25 / 80, 30 / 80, 40 / 80))
    x1, y1, x2, y2 = (round(v * 80) for v in g.to_square((10, 6, 30, 21), 80, 41))
    square = np.asarray(pad_to_square(picture))[..., 0]
    assert (square[y1:y2, x1:x2] == 255).all()
    assert (square == 255).sum() == (y2 - y1) * (x2 - x1)
    assert g.to_square((10, 6, 20, 15), 80, 41, "xywh") == g.to_square((10, 6, 30, 21), 80, 41)
    assert g.to_square((0.1, 0.2, 0.3, 0.4), 80, 41, "square") == (0.1, 0.2, 0.3, 0.4)


@given(st.integers(8, 400), st.integers(8, 400), st.data())
def test_pixels_come_back(width: int, height: int, data: st.DataObject) -> None:
    x1, y1 = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    assert g.to_pixels(g.to_square((x1, y1, x2, y2), width, height), width, height) == pytest.approx((x1, y1, x2, y2))


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (0, 0, 81, 9), (-1, 0, 4, 4), (1, 2, 3)])
def test_bad_boxes_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"empty or outside|four numbers"):
        g.to_square(box, 80, 41)


def test_what_is_written_is_read_back() -> None:
    boxes = [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 0.75)]
    assert g.write_boxes(boxes) == "[0.100,0.200,0.300,0.400;0.500,0.500,1.000,0.750]"
    assert g.parse_boxes(g.write_boxes(boxes)) == tuple(boxes)
    found = [Located("a dog", (boxes[0],)), Located("stars", tuple(boxes))]
    caption = g.write_caption("Here a dog sees stars.", found, 2)
    assert caption == (
        "Here <p>a dog</p>[0.10,0.20,0.30,0.40] sees <p>stars</p>[0.10,0.20,0.30,0.40;0.50,0.50,1.00,0.75]."
    )
    assert g.parse_located(caption) == ("Here a dog sees stars.", tuple(found))
    assert g.parse_located(g.write_located(found, 1))[1][1].name == "stars"
    points = {"nose": (0.25, 0.5), "left eye": (0.125, 0.75)}
    assert g.parse_points(g.write_points(points)) == points


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("no box", ()),
        ("[1,2,3]", ()),
        ("it is [0.5, 0.6 ,0.1,0.2] and [1,2,3]", ((0.1, 0.2, 0.5, 0.6),)),
        ("[.1,.2,.3,.4]", ()),
        ("[0,0,1,1;0.5,0.5,1,1] [0.1,0.1,0.2,0.2]", ((0, 0, 1, 1), (0.5, 0.5, 1, 1), (0.1, 0.1, 0.2, 0.2))),
    ],
)
def test_boxes_in_a_model_s_words(text: str, boxes: tuple[g.Box, ...]) -> None:
    assert g.parse_boxes(text) == boxes


def test_a_name_without_a_box_is_still_a_name() -> None:
    assert g.parse_located("<p>sky</p> over <p>sea</p>[0,0,1,1]") == (
        "sky over sea",
        (Located("sky", ()), Located("sea", ((0, 0, 1, 1),))),
    )
    assert g.parse_points("<p>nose</p>[0,0,1,1], <p>ear</p>[0.5,0.5], <p>ear</p>[0,0]") == {"ear": (0.5, 0.5)}


def test_names_that_would_break_the_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="holds the marks"):
        g.write_points({"a</p>": (0, 0)})
    with pytest.raises(ValueError, match="not in the caption behind"):
        g.write_caption("a b", [Located("b", ((0, 0, 1, 1),)), Located("a", ((0, 0, 1, 1),))])
    with pytest.raises(ValueError, match="no box to write"):
        g.write_boxes([])


def test_marks_are_drawn_where_the_boxes_are() -> None:
    picture = Image.new("RGB", (240, 120), (200, 30, 30))
    boxes = [g.to_square(b, 240, 120) for b in ((0, 0, 120, 120), (120, 0, 240, 120))]
    marked = g.draw_marks(picture, boxes)
    changed = (np.asarray(marked) != np.asarray(picture)).any(-1)
    assert changed[:, 50:70].any()
    assert changed[:, 170:190].any()
    assert not changed[:, 90:150].any()
    assert marked.tobytes() == g.draw_marks(picture, boxes).tobytes()
    assert np.asarray(picture).max() == 200  # the given picture is as it was
    assert g.draw_marks(picture, boxes[:1]).tobytes() != marked.tobytes()
