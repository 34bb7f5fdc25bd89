"""How an answer is judged."""

from __future__ import annotations

from collections.abc import Callable

from accessory.data.grounding import Box, parse_boxes


def normalise(text: str) -> str:
    """Lower case, single blanks, no full stop at the end: how names and short answers are compared."""
    return " ".join(text.lower().split()).rstrip(". ")


def same_words(answer: str, truth: str) -> bool:
    """Exact match of the whole answer, after :func:`normalise`."""
    return normalise(answer) == normalise(truth)


def same_text(answer: str, truth: str) -> bool:
    """Exact match of the characters (reading)."""
    return answer.strip() == truth.strip()


def parse_box(text: str) -> Box | None:
    """The first ``[x1,y1,x2,y2]`` in a text, or None. Corners may come in any order."""
    return next(iter(parse_boxes(text)), None)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where the union is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def same_box(answer: str, truth: str) -> bool:
    """Grounding: the boxes overlap with an IoU of at least 0.5. An answer without a box is wrong."""
    wanted = parse_box(truth)
    if wanted is None:
        raise ValueError(f"the reference answer {truth!r} holds no box [x1,y1,x2,y2]")
    found = parse_box(answer)
    return found is not None and iou(found, wanted) >= 0.5


JUDGES: dict[str, Callable[[str, str], bool]] = {"scenes-grounding": same_box, "words-ocr": same_text}
"""Tasks that are not judged by :func:`same_words`."""


def judge(task: str) -> Callable[[str, str], bool]:
    """The judge of a task: ``(answer, truth) -> right``."""
    return JUDGES.get(task, same_words)
