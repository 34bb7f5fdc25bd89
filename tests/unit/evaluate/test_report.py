"""The report page: whole, safe against what a model may say, and true to its numbers."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

from PIL import Image

from accessory.evaluate.report import Card, Line, Report, Tuning, curve, data_uri, page

CARD = Card(Image.new("RGB", (400, 100), "red"), "What is this?", "cat", "dog", False)
HISTORY = ((1.0, 4.0), (2.0, 3.0), (4.0, 1.0))
TUNING = Tuning(
    "flags", 12345, 80, 110.0, 900.0, 21.5, Line("flags", 1, 200), Line("flags", 90, 200), HISTORY,
    (replace(CARD, right=True, answer="cat", before="mouse"),),
)  # fmt: skip
WHOLE = Report("A model", (("torch", "2"),), (Line("emoji-names", 3, 4, 1),), (CARD,), TUNING, ("Held out.",))


class Balance(HTMLParser):
    """Notes every tag that opens."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_all_of_it_is_there() -> None:
    html = page(WHOLE)
    for text in (
        "75.0 %",
        "25.0 %",
        "3 of 4",
        "12,345",
        "0.5 %",
        "45.0 %",
        "21.5 pictures/s",
        "before: mouse",
        "Held out.",
    ):
        assert text in html, text
    parser = Balance()
    parser.feed(html)
    assert parser.seen.count("figure") == 2
    assert parser.seen.count("polyline") == 2
    assert all(
        html.count(f"<{t}") - html.count(f"</{t}>") == 0 for t in ("figure", "div", "table", "svg", "main", "dl")
    )


def test_parts_that_are_missing_leave_no_trace() -> None:
    html = page(Report("A model", (), (), (), None))
    assert "<table" not in html
    assert "<svg" not in html
    assert "<figure" not in html


def test_it_needs_nothing_from_outside() -> None:
    html = page(WHOLE)
    assert re.findall(r"(?:src|href)='(?!data:)", html) == []
    assert re.findall(r"(?<!xmlns=')https?:", html) == []  # the name of SVG's language is no address
    assert "<script" not in html


def test_what_a_model_says_is_only_text() -> None:
    bad = replace(CARD, answer="<script>alert(1)</script>", truth="' onload='x", question="<b>")
    html = page(replace(WHOLE, cards=(bad,), title="<i>"))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "alt='&#x27; onload=&#x27;x'" in html
    assert "<i>" not in html


def test_pictures_are_small_pngs_of_their_shape() -> None:
    kept = Image.open(io.BytesIO(base64.b64decode(data_uri(CARD.picture).partition(",")[2])))
    assert kept.format == "PNG"
    assert kept.size == (256, 64)
    assert CARD.picture.size == (400, 100)  # the caller's picture is as it was


def points(svg: str) -> list[tuple[float, float]]:
    raw = re.search(r"class='raw' points='([^']*)'", svg)
    assert raw is not None
    return [tuple(map(float, pair.split(","))) for pair in raw[1].split()]  # type: ignore[misc]


def test_the_curve_keeps_order_and_scale() -> None:
    (x1, y1), (x2, y2), (x3, y3) = points(curve(HISTORY))
    assert x1 < x2 < x3
    assert y1 < y2 < y3  # down the page as the loss falls
    assert abs((x3 - x2) - 2 * (x2 - x1)) < 0.3
    assert abs((y3 - y2) - 2 * (y2 - y1)) < 0.3
    assert curve(HISTORY[:1]) == ""
    assert "NaN" not in curve(((0.0, 0.0), (0.0, 0.0)))
