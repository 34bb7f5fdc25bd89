"""A self-contained page about a model: scores, answers beside their pictures, the curve of a fine-tuning."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

PICTURE = 128  # pixels of a thumbnail's longer side
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 240, 48, 32  # of the curve, and its margins for labels


@dataclass(frozen=True)
class Line:
    """One task: right answers of ``total``; ``control`` counts those that were right with pictures shuffled."""

    task: str
    correct: int
    total: int
    control: int | None = None


@dataclass(frozen=True)
class Card:
    """A picture and what was said about it; ``before`` is the answer of the model that was not tuned."""

    picture: Image.Image
    question: str
    truth: str
    answer: str
    right: bool
    before: str | None = None


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning run: ``history`` holds (seconds, loss), rates are of the whole run."""

    what: str
    parameters: int
    steps: int
    seconds: float
    tokens_per_s: float
    images_per_s: float
    before: Line
    after: Line
    history: tuple[tuple[float, float], ...]
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the page shows, in this order; ``facts`` are (name, value), ``notes`` are sentences under the title."""

    title: str
    facts: tuple[tuple[str, str], ...]
    scores: tuple[Line, ...]
    cards: tuple[Card, ...]
    tuning: Tuning | None
    notes: tuple[str, ...] = ()


def page(report: Report) -> str:
    """The report as one HTML document: no scripts, no addresses, pictures inside."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f"<p class=note>{escape(note)}</p>" for note in report.notes]
    parts.append(_facts(report.facts))
    if report.scores:
        parts += ["<h2>Held-out pictures</h2>", _scores(report.scores)]
    if report.cards:
        parts += ["<h2>What it says</h2>", _cards(report.cards)]
    if report.tuning is not None:
        parts += _tuning(report.tuning)
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(report.title)}</title>"
    top = f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>"
    return f"{top}\n<body><main>\n{body}\n</main></body></html>\n"


def data_uri(picture: Image.Image, size: int = PICTURE) -> str:
    """A PNG thumbnail as a ``data:`` address; small pictures are not enlarged."""
    small = picture.convert("RGB")
    small.thumbnail((2 * size, size))  # wide canvases stay readable
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def curve(history: Sequence[tuple[float, float]], label: str = "loss") -> str:
    """An inline SVG of (seconds, value) points, beside a smoothed line. Empty text for fewer than two points."""
    if len(history) < 2:
        return ""
    xs, ys = [x for x, _ in history], [y for _, y in history]
    right, top = xs[-1] or 1.0, max(ys) * 1.05 or 1.0

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 8) * x / right
        return f"{across:.1f},{8 + (HEIGHT - BOTTOM - 8) * (1 - y / top):.1f}"

    smooth, level = [], ys[0]
    for y in ys:
        level += 0.2 * (y - level)
        smooth.append(level)
    grid = []
    for k in range(5):
        y = top * k / 4
        down = at(0, y).split(",")[1]
        grid.append(f"<line x1='{LEFT}' x2='{WIDTH - 8}' y1='{down}' y2='{down}' class='grid' />")
        grid.append(f"<text x='{LEFT - 6}' y='{down}' dy='4' text-anchor='end'>{y:.2g}</text>")
        across = at(right * k / 4, 0).split(",")[0]
        grid.append(
            f"<text x='{across}' y='{HEIGHT - 10}' text-anchor='{'end' if k == 4 else 'middle'}'>"
            f"{right * k / 4:.0f} s</text>"
        )
    raw, line = (" ".join(at(x, y) for x, y in zip(xs, values)) for values in (ys, smooth))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{escape(label)} over time'>{''.join(grid)}"
        f"<polyline class='raw' points='{raw}' /><polyline class='line' points='{line}' /></svg>"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts) + "</dl>"


def _bar(line: Line) -> str:
    control = 0 if line.control is None else 100 * line.control / line.total
    mark = "" if line.control is None else f"<i style='left:{control:.1f}%' title='pictures shuffled'></i>"
    return f"<div class=bar><b style='width:{100 * line.correct / line.total:.1f}%'></b>{mark}</div>"


def _scores(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        control = "" if line.control is None else _percent(line.control, line.total)
        rows.append(
            f"<tr><td>{escape(line.task)}<td>{_bar(line)}<td class=n>{_percent(line.correct, line.total)}"
            f"<td class=n>{control}<td class=n>{line.correct} of {line.total}"
        )
    head = "<tr><th>task<th><th class=n>right<th class=n>pictures shuffled<th class=n>questions"
    return f"<table>{head}{''.join(rows)}</table>"


def _cards(cards: Sequence[Card]) -> str:
    out = []
    for card in cards:
        mark = (
            "<em class=yes>right</em>" if card.right else f"<em class=no>wrong</em> <small>{escape(card.truth)}</small>"
        )
        before = "" if card.before is None else f"<small>before: {escape(card.before[:60]) or '…'}</small>"
        out.append(
            f"<figure><img src='{data_uri(card.picture)}' alt='{escape(card.truth, quote=True)}'><figcaption>"
            f"<small>{escape(card.question)}</small><strong>{escape(card.answer[:60]) or '…'}</strong>"
            f"<span>{mark}</span>{before}</figcaption></figure>"
        )
    return f"<div class=cards>{''.join(out)}</div>"


def _tuning(tuning: Tuning) -> list[str]:
    b, a = tuning.before, tuning.after
    facts = (
        ("before", _percent(b.correct, b.total)),
        ("after", _percent(a.correct, a.total)),
        ("trained parameters", f"{tuning.parameters:,}"),
        ("time", f"{tuning.seconds:.0f} s, {tuning.steps} steps"),
        ("throughput", f"{tuning.tokens_per_s:.0f} tokens/s, {tuning.images_per_s:.1f} pictures/s"),
    )
    return [
        f"<h2>{escape(tuning.what)}</h2>", _facts(facts), f"<div class=plot>{curve(tuning.history)}</div>",
        _cards(tuning.cards),
    ]  # fmt: skip


STYLE = """
:root{color-scheme:light dark;--ink:#1c1e26;--soft:#5e6472;--paper:#fbfaf7;--card:#fff;--edge:#e3e1da;--main:#2f6f8f;
--yes:#2c7a4b;--no:#b3452c}
@media(prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#9aa0ad;--paper:#15171c;--card:#1e2128;--edge:#30343d;
--main:#6fb3d2;--yes:#6cc48d;--no:#ec8a70}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}h1{font-size:1.8rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem}.note,small,dt,th{color:var(--soft)}small{font-size:.8rem}
dl{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:1rem 0}dt{font-size:.8rem}
dd{margin:0;font-variant-numeric:tabular-nums}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:400;font-size:.8rem}
td,th{padding:.35rem .5rem;border-bottom:1px solid var(--edge)}
.n{text-align:right;white-space:nowrap}td:nth-child(2){width:35%}
.bar{position:relative;height:.6rem;background:var(--edge);border-radius:.3rem}
.bar b{display:block;height:100%;background:var(--main);border-radius:.3rem}
.bar i{position:absolute;top:-.2rem;bottom:-.2rem;width:2px;background:var(--no)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem}
figure{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:.5rem;overflow:hidden}
img{display:block;width:100%;height:8rem;object-fit:contain;background:#fff}
figcaption{padding:.5rem .6rem;display:flex;flex-direction:column;gap:.1rem;overflow-wrap:anywhere}
em{font-style:normal;font-size:.8rem}.yes{color:var(--yes)}.no{color:var(--no)}
.plot{background:var(--card);border:1px solid var(--edge);border-radius:.5rem;padding:.75rem;margin:0 0 1rem}
svg{display:block;width:100%}svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--edge)}
polyline{fill:none;stroke:var(--main)}.raw{opacity:.3}.line{stroke-width:2}
"""
