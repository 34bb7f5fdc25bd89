"""Tables of what generators were scored with: from lines of ``evaluate --out`` to Markdown, without any computing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

Entry = dict[str, Any]
LEGEND = """\
R@k: share of pictures whose concept is among the k most similar of {n} real drawings in the style that was asked for,
with its 95 % interval; look-alikes do not count. cosine: plain compares an encoder's features as they are, centred
first subtracts the mean of the real drawings in the style. shuffled: the same pictures, taken for another prompt's
concept. chance: pictures that say nothing. real: the real drawing itself, through the generator's codec. other styles:
its concept as the other styles draw it."""
RANKS_HEAD = (
    "| prompts | pairs | style | pictures | cosine | R@1 (95 %) | R@5 (95 %) | shuffled R@1 / R@5 | chance R@1 / R@5 "
    "| real R@1 / R@5 | other styles R@1 / R@5 |\n|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|"
)
LIKENESS_HEAD = (
    "| prompts | pairs | pictures | in the style asked for | cosine to the real drawing "
    "| to the nearest other training drawing | the real one is nearer | from the real one to that |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|"
)
EVERY = "all"
Z = 1.959964  # of a two-sided interval of 95 %


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, both ends in 0 to 1.

    Raises:
        ValueError: unless ``0 <= right <= total`` and there is something to count.
    """
    if not 0 <= right <= total or not total:
        raise ValueError(f"{right} of {total} is no share")
    p, z2 = right / total, Z * Z / total
    half = Z * math.sqrt(p * (1 - p) / total + z2 / total / 4)
    # At the ends rounding would leave the interval a hair beside the share itself.
    low, high = ((p + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
    return (0.0 if right == 0 else low), (1.0 if right == total else high)


def recall(entries: Sequence[Entry], what: str, k: int, cosine: str = "plain") -> float:
    """Share of ranks up to k, 0 to 1, of ``own``, ``shuffled``, ``real`` or ``others``."""
    hits = [rank <= k for entry in entries for rank in _ranks(entry, what, cosine)]
    return sum(hits) / len(hits)


def chance(entries: Sequence[Entry], k: int) -> float:
    """R@k of pictures that say nothing: k drawings of the gallery at random hold an accepted one."""
    misses = (
        math.comb(e["gallery"] - len(e["accepted"]), k) / math.comb(e["gallery"], k) if k <= e["gallery"] else 0.0
        for e in entries
    )
    return 1 - sum(misses) / len(entries)


def pairs_of(entry: Entry) -> str:
    """What the pairs of an entry are called."""
    return {True: "held out", False: "training", None: "any"}[entry["held_out"]]


def rank_lines(entries: Sequence[Entry], style: str) -> list[str]:
    """Two lines of the table of ranks, one a cosine, for entries that share kind and pairs."""
    return [_rank_line(entries, style, cosine) for cosine in ("plain", "centred")]


def likeness_line(entries: Sequence[Entry]) -> str:
    """A line of the table of likenesses, for entries that share kind and pairs."""
    n = len(entries)
    found = [entry["likeness"] for entry in entries]
    nearer = sum(one["target"] > one["training"] for one in found)
    styled = sum(entry["nearest"]["style"] == entry["style"] for entry in entries)
    means = [sum(one[name] for one in found) / n for name in ("target", "training", "real_training")]
    return (
        f"| {entries[0]['kind']} | {pairs_of(entries[0])} | {n} | {_percent(styled / n)} | {means[0]:.3f} "
        f"| {means[1]:.3f} | {_percent(nearer / n)} | {means[2]:.3f} |"
    )


def split(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries that share kind and pairs, in the order in which these first appear."""
    parts: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        parts.setdefault((entry["kind"], pairs_of(entry)), []).append(entry)
    yield from parts.values()


def tables(entries: Sequence[Entry]) -> str:
    """Both tables; in that of ranks each style has its lines, then all together."""
    ranks, alike = [RANKS_HEAD], [LIKENESS_HEAD]
    for part in split(entries):
        for style in dict.fromkeys(entry["style"] for entry in part):
            ranks += rank_lines([entry for entry in part if entry["style"] == style], style)
        ranks += rank_lines(part, EVERY)
        alike.append(likeness_line(part))
    return "\n".join([*ranks, "", *alike])


def _ranks(entry: Entry, what: str, cosine: str) -> list[int]:
    value = entry["ranks"][cosine][what]
    return value if isinstance(value, list) else [value]


def _rank_line(entries: Sequence[Entry], style: str, cosine: str) -> str:
    n, cells = len(entries), []
    for k in (1, 5):
        right = sum(rank <= k for entry in entries for rank in _ranks(entry, "own", cosine))
        low, high = interval(right, n)
        cells.append(f"{_percent(right / n)} ({100 * low:.1f} to {100 * high:.1f})")
    for what in ("shuffled", "", "real", "others"):
        shares = [recall(entries, what, k, cosine) if what else chance(entries, k) for k in (1, 5)]
        cells.append(" / ".join(f"{100 * share:.1f}" for share in shares) + " %")
    first = f"| {entries[0]['kind']} | {pairs_of(entries[0])} | {style} | {n} | {cosine} |"
    return f"{first} {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
