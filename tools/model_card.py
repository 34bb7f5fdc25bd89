"""Write the numbers of a model card: scores from ``evaluate --out`` files, curves from training runs.

    python tools/model_card.py --runs runs/nano_align runs/nano_sphinx --scores runs/nano_sphinx/scores.jsonl \
        --out weights/nano-sphinx

Writes ``curve-RUN.svg`` and ``scores.md`` into the folder; the words around them are written by hand in its README.md.
Scores may be those of a chat model, of a generator (a table of ranks and one of likenesses), or of both.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from accessory.evaluate.report import curve
from accessory.evaluate.tally import tables

CONTROLS = ("none", "shuffled", "blind")
STYLE = (  # the report page brings its own; a file that stands alone needs one
    "<style>text{font:12px sans-serif;fill:#888}.grid{stroke:#8884}polyline{fill:none}.raw{stroke:#8886}"
    ".line{stroke:#27c;stroke-width:2}</style>"
)


def rows(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSONL file; ValueError when there is none."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def score_table(items: list[dict[str, Any]]) -> str:
    """Markdown: the scores of answers, those of pictures, or both.

    Raises:
        ValueError: for pictures of several generators, or of one with several settings.
    """
    drawn = [item for item in items if "ranks" in item]
    answers = [item for item in items if "ranks" not in item]
    for name in ("model", "settings", "seed"):
        if len(values := {json.dumps(item["run"][name], sort_keys=True) for item in drawn}) > 1:
            raise ValueError(
                f"--scores: pictures of {len(values)} runs that differ in their {name}; one table is of one"
            )
    return "\n\n".join([*([answer_table(answers)] if answers else []), *([tables(drawn)] if drawn else [])])


def answer_table(items: list[dict[str, Any]]) -> str:
    """A task a line, a control a column, in per cent of the questions asked."""
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for item in items:
        right[item["task"], item["control"]].append(item["right"])
    shown = [c for c in CONTROLS if any(control == c for _, control in right)]
    names = {"none": "own picture", "shuffled": "another's picture", "blind": "no picture"}
    lines = [f"| task | questions | {' | '.join(names[c] for c in shown)} |", "|---|---:|" + "---:|" * len(shown)]
    for task in dict.fromkeys(task for task, _ in right):
        cells = []
        for control in shown:
            verdicts = right.get((task, control))
            cells.append(f"{100 * sum(verdicts) / len(verdicts):.1f} %" if verdicts else "")
        lines.append(f"| {task} | {len(right[task, shown[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_facts(folder: Path) -> tuple[str, list[tuple[float, float]]]:
    """One Markdown line about a run, and its (seconds, loss) history."""
    history = [r for r in rows(folder / "metrics.jsonl") if "loss" in r]
    last = history[-1]
    images = sum(
        r["images_per_s"] * (r["seconds"] - p) for r, p in zip(history, [0.0, *(h["seconds"] for h in history)])
    )
    line = (
        f"| {folder.name} | {last['step']} | {last['seconds'] / 60:.0f} min | {images:,.0f} "
        f"| {history[0]['loss']:.2f} | {last['loss']:.2f} |"
    )
    return line, [(r["seconds"], r["loss"]) for r in history]


def main() -> int:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", nargs="+", type=Path, required=True, help="training output folders, in order")
    p.add_argument("--scores", nargs="+", type=Path, required=True, help="files written by evaluate --out")
    p.add_argument("--out", type=Path, required=True, help="the model folder")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["| stage | updates | time | pictures | first loss | last loss |", "|---|---:|---:|---:|---:|---:|"]
    for folder in args.runs:
        line, history = run_facts(folder)
        lines.append(line)
        (args.out / f"curve-{folder.name}.svg").write_text(
            curve(history).replace(">", f">{STYLE}", 1), encoding="utf-8"
        )
    table = score_table([item for path in args.scores for item in rows(path)])
    (args.out / "scores.md").write_text(table + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
