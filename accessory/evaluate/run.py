"""A model on test sets of one's own: every item is written as it is answered, and a run that was cut off goes on.

The scores are computed from the file of items alone, so that an interrupted and an uninterrupted run cannot differ.
Items are asked in the order of the file, in batches that always begin at the same places: a run that goes on repeats
the batch that it was cut off in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accessory.data.task_prompts import letters, write_options
from accessory.evaluate.score import Control, answers, without
from accessory.evaluate.scorers import Scored, Scorer, Truth
from accessory.evaluate.tasks import TestSet, truth
from accessory.models.build import CONFIG_FILE, WEIGHTS_FILE, Model
from accessory.models.likelihood import rank
from accessory.schema import Sample


@dataclass(frozen=True)
class Result:
    """The scores of one test set under one control. ``seconds``: of this run, 0 where all items were there already."""

    task: str
    control: Control
    items: int
    totals: Mapping[str, float]
    by_category: Mapping[str, Mapping[str, float]]
    seconds: float


def model_digest(folder: Path) -> str:
    """SHA-256 over what a model folder holds: its configuration and what was trained."""
    out = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (Path(folder) / name).open("rb") as file:
            out.update(hashlib.file_digest(file, "sha256").digest())
    return out.hexdigest()


def run(
    model: Model,
    tests: TestSet,
    file: Path,
    *,
    model_id: str,
    control: Control = "none",
    limit: int | None = None,
    batch_size: int = 64,
) -> Result:
    """Ask ``model`` every row (or ``limit`` of them, spread evenly) that ``file`` does not hold yet, and score all.

    ``model_id`` says which model it is (:func:`model_digest`). ``control``: see
    :func:`accessory.evaluate.score.score`. In fp32 the result does not depend on ``batch_size``.

    Raises:
        ValueError: when ``file`` belongs to another run, for a limit that cannot be met, or a row that cannot be read.
    """
    begin = time.monotonic()
    chosen = _chosen(tests, limit, control)
    head = {
        "task": tests.config.name, "score": tests.config.score, "control": control, "limit": limit, "model": model_id,
        "data": tests.digest(),
    }  # fmt: skip
    done = _resume(file, head, batch_size, len(chosen))
    with file.open("a", encoding="utf-8") as out:
        if done == 0 and file.stat().st_size == 0:
            out.write(json.dumps({"run": head, "batch_size": batch_size}) + "\n")
            out.flush()
        for start in range(done, len(chosen), batch_size):
            part = range(start, min(start + batch_size, len(chosen)))
            samples = [tests[chosen[k]] for k in part]
            shown = samples
            if control != "none":
                others = (chosen[(k + len(chosen) // 2) % len(chosen)] for k in part)
                shown = [without(s, tests[o] if control == "shuffled" else s, control) for s, o in zip(samples, others)]
            lines = [_line(tests.scorer, s, a) for s, a in zip(samples, _answers(model, tests, shown), strict=True)]
            out.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            out.flush()  # one write a batch: a killed process leaves whole batches and at most one broken line
    seconds = time.monotonic() - begin if done < len(chosen) else 0.0
    return _result(tests, control, list(_items(file)), seconds)


def _chosen(tests: TestSet, limit: int | None, control: Control) -> list[int]:
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}, it must be at least 2 (a shuffle of one picture changes nothing)")
    if limit is not None and limit < len(tests) and tests.config.score == "mme":
        raise ValueError("score: mme counts pairs of questions, which --limit would part: leave it out")
    if control == "shuffled" and len(tests) < 2:
        raise ValueError(f"{tests.config.path}: one row has no other row's picture to be shown with")
    total = len(tests) if limit is None else min(limit, len(tests))
    return [k * len(tests) // total for k in range(total)]


def _answers(model: Model, tests: TestSet, samples: Sequence[Sample]) -> list[tuple[str, dict[str, Any]]]:
    """Answers, and what else is worth keeping of each."""
    if tests.scorer.how == "text":
        texts = answers(model, samples, tests.max_new_tokens, prefill=tests.config.prefill)
        return [(text, {}) for text in texts]
    found: list[tuple[str, dict[str, Any]]] = []
    for sample in samples:
        options = sample.meta["options"]
        # A prompt that lists the options wants a letter, one that does not the option itself.
        listed = write_options(options) in sample.turns[-2].text
        names = letters(len(options))
        scored = rank(model, sample.turns[:-1], names if listed else options)
        totals = [s.total for s in scored]
        best = names[int(np.argmax(totals))]
        by_length = [s.total / max(1, len(o)) for s, o in zip(scored, options)]
        more = {"log_likelihoods": totals, "tokens": [s.tokens for s in scored]}
        found.append((best, more if listed else {**more, "by_length": names[int(np.argmax(by_length))]}))
    return found


def _line(scorer: Scorer, sample: Sample, said: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    answer, more = said
    known = truth(sample)
    scores = scorer.item(answer, known)
    if "by_length" in more:
        scores["accuracy_by_length"] = float(more["by_length"] in known.answers)
    return {
        "index": sample.index, "id": sample.meta["id"], "question": sample.turns[-2].text,
        "answer": answer, "scores": scores, **dataclasses.asdict(known), **more,
    }  # fmt: skip


def _resume(file: Path, head: Mapping[str, Any], batch_size: int, total: int) -> int:
    """How many items ``file`` already holds, after cutting off the batch that was being written."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return 0
    lines = list[bytes]()
    with file.open("rb") as opened:
        for line in opened:
            if not line.endswith(b"\n"):
                break  # cut off in the middle
            lines.append(line)
    if not lines:
        file.write_bytes(b"")
        return 0
    try:
        first = json.loads(lines[0])
    except json.JSONDecodeError:
        first = None
    before = first.get("run") if isinstance(first, dict) else None
    if not isinstance(before, dict):
        raise ValueError(
            f"{file} is no file of items (its first line names no run): remove it, or choose another --out"
        )
    changed = [f"{k} ({before.get(k)!r} then, {v!r} now)" for k, v in head.items() if before.get(k) != v]
    if changed:
        raise ValueError(
            f"{file} belongs to another run, changed: {'; '.join(changed)}. Remove it, or choose another --out"
        )
    done = len(lines) - 1
    if first.get("batch_size") == batch_size and done < total:
        done -= done % batch_size  # the same batches as without an interruption, to the last bit
    with file.open("r+b") as opened:
        opened.truncate(sum(len(line) for line in lines[: done + 1]))
    return done


def _items(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        next(lines)
        yield from (json.loads(line) for line in lines)


def _result(tests: TestSet, control: Control, items: Sequence[Mapping[str, Any]], seconds: float) -> Result:
    scored = [
        Scored(
            i["answer"],
            Truth(tuple(i["answers"]), tuple(i["options"]), i["category"], i["group"]),
            i["scores"],
        )
        for i in items
    ]
    totals = dict(tests.scorer.total(scored))
    if scored and all("accuracy_by_length" in s.scores for s in scored):
        totals["accuracy_by_length"] = sum(s.scores["accuracy_by_length"] for s in scored) / len(scored)
    named = sorted({s.truth.category for s in scored})
    by_category = {}
    if len(named) > 1 and tests.config.score != "mme":
        by_category = {n: tests.scorer.total([s for s in scored if s.truth.category == n]) for n in named}
    return Result(tests.config.name, control, len(scored), totals, by_category, seconds)


def write_scores(file: Path, results: Sequence[Result]) -> None:
    """All results of a run as JSON: the numbers, without the seconds, so that equal runs write equal files."""
    tree: dict[str, dict[str, Any]] = {}
    for r in results:
        entry = {
            "items": r.items,
            "totals": dict(r.totals),
            "by_category": {k: dict(v) for k, v in r.by_category.items()},
        }
        tree.setdefault(r.task, {})[r.control] = entry
    file.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
