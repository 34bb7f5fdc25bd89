"""How answers are scored: one value a scorer. The rules are those of the published evaluators, named at each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from accessory.data.grounding import parse_boxes
from accessory.data.task_prompts import letters
from accessory.evaluate.captions import caption_scores
from accessory.evaluate.metrics import iou, same_text, same_words
from accessory.evaluate.vqa import normalise_vqa, vqa_accuracy

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's sub-tasks (Fu et al. 2023)."""


@dataclass(frozen=True)
class Truth:
    """What an answer is held against: all answers that count as right, and for a choice its options."""

    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    category: str = ""
    group: str = ""


@dataclass(frozen=True)
class Scored:
    """An answered item; ``scores`` is what :attr:`Scorer.item` gave it."""

    answer: str
    truth: Truth
    scores: Mapping[str, float] = field(default_factory=dict)


Totals = dict[str, float]


@dataclass(frozen=True)
class Scorer:
    """``item`` scores one answer, ``total`` sums up all; the first number of the totals is the one that is printed.

    ``how``: the model writes its answer, or the likelihoods of the options are compared.
    """

    item: Callable[[str, Truth], Totals]
    total: Callable[[Sequence[Scored]], Totals]
    max_new_tokens: int
    prompt: str
    how: Literal["text", "likelihood"] = "text"


def levenshtein(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace to make ``b`` of ``a``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest truth, 0 below ``threshold`` (Biten et al. 2019).

    Exactly at the threshold the challenge's evaluator keeps the value, which the paper's formula drops; we keep it.
    """
    best, said = 0.0, " ".join(answer.lower().split())
    for truth in truths:
        known = " ".join(truth.lower().split())
        longest = max(len(said), len(known))
        best = max(best, 1 - levenshtein(said, known) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def relaxed(answer: str, truth: str, tolerance: float = 0.05) -> bool:
    """Numbers within 5 % of the truth, anything else the same in lower case (ChartQA, Masry et al. 2022).

    A percent sign divides by 100; a truth of zero is compared as text.
    """
    said, known = _number(answer), _number(truth)
    if said is not None and known:
        return abs(said - known) / abs(known) <= tolerance
    return answer.strip().lower() == truth.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def box_iou(answer: str, truth: str) -> float:
    """IoU of the first box of the answer with the first of the truth, both in fractions of the padded square.

    The padded square scales both sides alike, so this is the IoU in pixels. 0 where the answer holds no box.
    """
    known, said = parse_boxes(truth), parse_boxes(answer)
    if not known:
        raise ValueError(f"the reference answer {truth!r} holds no box [x1,y1,x2,y2]")
    return iou(said[0], known[0]) if said else 0.0


def yes_no(answer: str) -> str:
    """``yes``, ``no`` or ``other``: what MME's evaluator reads from an answer's first four characters."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def pope_yes(answer: str) -> bool:
    """Whether POPE's evaluator takes an answer for a yes: its first sentence holds neither ``no`` nor ``not``."""
    said = answer.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(said)


def chosen(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses, None where it chooses none: nothing is guessed.

    Read in this order: a letter alone (also a small one) or a capital followed by a mark (``B``, ``(B)``, ``B. text``,
    ``answer is B``), then the text of exactly one option.
    """
    known = "".join(letters(len(options)))
    text = answer.strip()
    if len(text) == 1:
        text = text.upper()
    first = re.match(rf"\(?([{known}])(?:[).:,]|$)", text) or re.search(
        rf"(?i:answer|option|choice)(?: is)?:? *\(?([{known}])(?:[).:,\s]|$)", text
    )
    if first is not None:
        return first.group(1)
    same = [letter for letter, option in zip(known, options, strict=True) if same_words(text, option)]
    return same[0] if len(same) == 1 else None


def _truth_yes(truth: Truth) -> bool:
    said = truth.answers[0].lower().strip().rstrip(".")
    if said not in ("yes", "no"):
        raise ValueError(f"the reference answer must be yes or no, got {truth.answers[0]!r}")
    return said == "yes"


def mean_of(*names: str) -> Callable[[Sequence[Scored]], Totals]:
    """Totals that are means of the items' scores of these names."""

    def total(items: Sequence[Scored]) -> Totals:
        return {n: sum(i.scores[n] for i in items) / len(items) for n in names}

    return total


def mme_total(items: Sequence[Scored]) -> Totals:
    """``score``: the sum over sub-tasks of 100 (acc + acc+), where acc+ counts pictures whose two questions are right.

    With ``perception`` and ``cognition`` where their sub-tasks are there, and every sub-task's own score.

    Raises:
        ValueError: for a picture of a sub-task that has not two questions.
    """
    right: dict[str, dict[str, list[float]]] = {}
    for item in items:
        right.setdefault(item.truth.category, {}).setdefault(item.truth.group, []).append(item.scores["accuracy"])
    scores: Totals = {}
    for category, pictures in right.items():
        odd = [g for g, rows in pictures.items() if len(rows) != 2]
        if odd:
            raise ValueError(
                f"MME asks two questions a picture, {odd[0]!r} of {category!r} has {len(pictures[odd[0]])}"
            )
        accuracy = sum(sum(rows) for rows in pictures.values()) / (2 * len(pictures))
        scores[category] = 100 * (accuracy + sum(sum(rows) == 2 for rows in pictures.values()) / len(pictures))
    out = {"score": sum(scores.values())}
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if found := [scores[c] for c in group if c in scores]:
            out[name] = sum(found)
    return {**out, **{f"{c or 'all'}": v for c, v in scores.items()}}


def pope_total(items: Sequence[Scored]) -> Totals:
    """Accuracy, precision, recall and F1 of ``yes`` and the share of answers that are yes (Li et al. 2023)."""
    pairs = [(i.scores["yes"] > 0, _truth_yes(i.truth)) for i in items]
    hits, false = pairs.count((True, True)), pairs.count((True, False))
    missed, rest = pairs.count((False, True)), pairs.count((False, False))
    precision = hits / (hits + false) if hits + false else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    both = precision + recall
    return {
        "accuracy": (hits + rest) / len(pairs), "precision": precision, "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0, "yes_ratio": (hits + false) / len(pairs),
    }  # fmt: skip


def caption_total(items: Sequence[Scored]) -> Totals:
    """CIDEr and BLEU of all captions together."""
    return caption_scores([i.answer for i in items], [i.truth.answers for i in items])


def _any(same: Callable[[str, str], bool]) -> Callable[[str, Truth], Totals]:
    return lambda answer, truth: {"accuracy": float(any(same(answer, t) for t in truth.answers))}


def _box(answer: str, truth: Truth) -> Totals:
    found = max(box_iou(answer, t) for t in truth.answers)
    return {"accuracy": float(found >= 0.5), "iou": found}


def _mme(answer: str, truth: Truth) -> Totals:
    return {"accuracy": float(yes_no(answer) == ("yes" if _truth_yes(truth) else "no"))}


def _pope(answer: str, truth: Truth) -> Totals:
    said = pope_yes(answer)
    return {"accuracy": float(said == _truth_yes(truth)), "yes": float(said)}


def _choice(answer: str, truth: Truth) -> Totals:
    found = chosen(answer, truth.options)
    return {"accuracy": float(found in truth.answers), "unread": float(found is None)}


def _vqa_exact(answer: str, truth: Truth) -> Totals:
    return _any(lambda a, t: normalise_vqa(a) == normalise_vqa(t))(answer, truth)


_MEAN = mean_of("accuracy")

SCORERS: dict[str, Scorer] = {
    "exact": Scorer(_any(same_words), _MEAN, 32, "vqa"),
    "text": Scorer(_any(same_text), _MEAN, 64, "ocr"),
    "vqa": Scorer(lambda a, t: {"accuracy": vqa_accuracy(a, t.answers)}, _MEAN, 10, "vqa"),
    "vqa-exact": Scorer(_vqa_exact, _MEAN, 10, "vqa"),
    "anls": Scorer(lambda a, t: {"anls": anls(a, t.answers)}, mean_of("anls"), 32, "vqa"),
    "relaxed": Scorer(_any(relaxed), _MEAN, 10, "vqa"),
    "box": Scorer(_box, mean_of("accuracy", "iou"), 32, "grounding"),
    "mme": Scorer(_mme, mme_total, 10, "vqa"),
    "pope": Scorer(_pope, pope_total, 10, "vqa"),
    "choice": Scorer(_choice, mean_of("accuracy", "unread"), 10, "choice"),
    "choice-likelihood": Scorer(_choice, _MEAN, 1, "choice", how="likelihood"),
    "caption": Scorer(lambda a, t: {}, caption_total, 64, "caption"),
}
"""Scorers by name, with the longest answer in tokens and the prompt that their benchmarks use."""


def scorer(name: str) -> Scorer:
    """The scorer called ``name``; ValueError lists those that exist."""
    if name not in SCORERS:
        raise ValueError(f"no scorer {name!r}; there are: {', '.join(SCORERS)}")
    return SCORERS[name]
