"""What exps/quickstart.sh does once everything is installed: fetch, score, fine-tune, report, chat.

What was measured is kept in ``result.json`` of the output folder with a hash of what it came from, so that a second run
goes straight to the chat page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accessory import log  # noqa: E402
from accessory.data import assets  # noqa: E402
from accessory.data.fetch import fetch  # noqa: E402

BASE = ("smollm2", "efficientnet-lite0")  # without these there is no model; the rest are pictures
# Questions a task: enough to tell good from bad, few enough for a minute on two cores.
LIMITS = {
    "emoji-names": 128,
    "scenes-count": 48,
    "scenes-colour": 48,
    "scenes-relation": 48,
    "scenes-grounding": 32,
    "words-ocr": 48,
    "easy-vqa": 64,
}
TASK = "flags"
SHOWN = 12  # pictures of the new task on the page


@dataclass(frozen=True)
class Options:
    """Where things are, and how long to fine-tune (None: as the experiment says)."""

    model: Path
    out: Path
    experiment: Path
    cache: Path | None
    again: bool
    seconds: float | None
    quick: bool

    @property
    def tuned(self) -> Path:
        """The output folder of the fine-tuning."""
        return self.out / TASK


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="exps/quickstart.sh", description="From a bare clone to a model that sees.")
    made.add_argument("--no-demo", action="store_true", help="end before the chat page")
    made.add_argument("--port", type=int, default=7860, metavar="N", help="port of the chat page (default: 7860)")
    made.add_argument("--again", action="store_true", help="measure and fine-tune again although nothing changed")
    made.add_argument("--model", type=Path, default=Path("weights/nano-sphinx"), metavar="DIR", help="model folder")
    made.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="where results go")
    made.add_argument("--cache", type=Path, metavar="DIR", help="cache folder of the assets")
    made.add_argument("--seconds", type=float, metavar="S", help="fine-tune this long (default: 110)")
    made.add_argument("--quick", action="store_true", help="only a few questions a task, for a first look")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. 1 when the model cannot be had, 130 when interrupted while training."""
    args = parser().parse_args(argv)
    experiment = ROOT / "exps" / f"{TASK}.yaml"
    options = Options(args.model, args.out, experiment, args.cache, args.again, args.seconds, args.quick)
    log.setup()
    try:
        missing = bring(options.cache)
        run(options, missing)
    except (assets.AssetError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"report: {(options.out / 'report.html').resolve().as_uri()}")
    if args.no_demo:
        return 0
    command = [sys.executable, str(ROOT / "demos" / "chat.py"), "--model", str(options.model), "--port", str(args.port)]
    if options.cache is not None:
        command += ["--cache", str(options.cache)]
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:
        return 0


def bring(cache: Path | None) -> list[str]:
    """Fetch the default assets; the names of picture sets that could not be had, told in one line.

    Raises:
        AssetError: when the language model or the encoder is missing.
    """
    say("assets")
    fetch(BASE, cache, progress=sys.stderr.isatty())
    missing: list[str] = []
    why: list[str] = []
    for name in assets.ASSETS:
        if name in BASE or assets.find(name, cache) is not None:
            continue
        if assets.ASSETS[name].registry == "npm" and shutil.which("npm") is None:
            missing.append(name)
            why.append("npm is not installed")
            continue
        try:
            fetch([name], cache, progress=sys.stderr.isatty())
        except assets.AssetError as error:
            missing.append(name)
            why.append(str(error))
    if missing:
        reasons = "; ".join(dict.fromkeys(why))
        print(f"note: no {', '.join(missing)} ({reasons}): what needs them is left out, the shipped samples are used")
    return missing


def run(options: Options, missing: Sequence[str]) -> None:
    """Score, fine-tune and write the page, unless the results at hand came from the same things."""
    key = fingerprint(options, missing)
    kept = options.out / "result.json"
    if not options.again and kept.is_file() and (options.out / "report.html").is_file():
        result = json.loads(kept.read_text(encoding="utf-8"))
        if result["key"] == key:
            say(f"nothing changed since {result['when']}: showing its results (--again repeats)")
            show(result)
            return
    options.out.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    result = measure(options)
    show_page(options, result)
    kept.write_text(json.dumps({"key": key, **result}, indent=1), encoding="utf-8")


def fingerprint(options: Options, missing: Sequence[str]) -> str:
    """A hash of what the results depend on."""
    from accessory.models import build

    digest = hashlib.sha256(json.dumps([sorted(missing), options.seconds, options.quick, LIMITS]).encode())
    for path in (
        options.model / build.CONFIG_FILE,
        options.model / build.WEIGHTS_FILE,
        options.experiment,
        ROOT / "data_configs" / f"{TASK}.yaml",
    ):
        if not path.is_file():
            raise ValueError(f"{options.model} is not a model folder or the checkout is torn: {path} is missing")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def measure(options: Options) -> dict[str, Any]:
    """Everything that takes time, as plain values."""
    from accessory.models import build

    begin = time.monotonic()
    say(f"loading {options.model}")
    model = build.load(options.model, cache=options.cache)
    say("scores on held-out pictures")
    result: dict[str, Any] = {"when": time.strftime("%Y-%m-%d %H:%M"), "model": str(options.model), "scores": []}
    header()
    for task, limit in LIMITS.items():
        found = scored(model, task, 8 if options.quick else limit, options.cache)
        if found is not None:
            result["scores"].append(found)
    result["samples"] = ask_samples(model)
    if not has(TASK, options):
        return result
    say(f"{TASK} to countries: never seen in training")
    before = scored(model, TASK, 8 if options.quick else None, options.cache, control=False)
    del model  # the fine-tuning builds its own
    result["tuning"] = tune(options)
    tuned = build.load(options.tuned / "final", cache=options.cache)
    after = scored(tuned, TASK, 8 if options.quick else None, options.cache, control=False)
    result["tuning"] |= {"before": before, "after": after}
    say(f"done in {time.monotonic() - begin:.0f} s")
    return result


def has(task: str, options: Options) -> bool:
    """Whether the assets of a task are there."""
    from accessory.data.builtin import build

    try:
        build(task, "test", cache=options.cache)
    except assets.AssetError:
        return False
    return True


def scored(model: Any, task: str, limit: int | None, cache: Path | None, control: bool = True) -> dict[str, Any] | None:
    """One line of the table, printed; None when the task's assets are missing."""
    from accessory.evaluate.score import score

    try:
        row = score(model, task, limit=limit, cache=cache)
        other = score(model, task, limit=limit, control="shuffled", cache=cache) if control else None
    except assets.AssetError:
        return None
    found = {**asdict(replace(row, items=row.items[:0])), "control": None if other is None else other.correct}
    # Those shown on the page, spread over the set, with their places.
    step = max(1, len(row.items) // SHOWN)
    found["items"] = [asdict(item) for item in row.items[::step][:SHOWN]]
    line(found)
    return found


def ask_samples(model: Any) -> list[dict[str, Any]]:
    """The first question about every shipped picture."""
    from accessory.data.image import open_picture
    from accessory.evaluate.metrics import judge
    from accessory.evaluate.score import answers
    from accessory.schema import Picture, Sample, Turn

    entries = json.loads((ROOT / "samples" / "samples.json").read_text(encoding="utf-8"))
    asked = []
    for entry in entries:
        picture = Picture(open_picture(str(ROOT / "samples" / entry["image"])))
        question, truth = entry["turns"][0]
        asked.append(Sample((Turn("user", (picture, question)), Turn("assistant", (truth,)))))
    said = answers(model, asked)
    out = []
    for entry, answer in zip(entries, said, strict=True):
        question, truth = entry["turns"][0]
        right = judge("scenes-grounding" if truth.startswith("[") else "emoji-names")(answer, truth)
        out.append({"image": entry["image"], "question": question, "truth": truth, "answer": answer, "right": right})
    print(f"shipped samples: {sum(o['right'] for o in out)} of {len(out)} right")
    return out


def tune(options: Options) -> dict[str, Any]:
    """Fine-tune a fresh adapter; what its log says."""
    from accessory.train import run as training

    clear(options.tuned)
    overrides = [f"model.base={options.model.resolve()}", f"train.output_dir={options.tuned}"]
    if options.cache is not None:
        overrides.append(f"cache={options.cache.resolve()}")
    if options.seconds is not None:
        overrides.append(f"train.max_seconds={options.seconds}")
    result = training.main_config(options.experiment, overrides)
    if result is None or result.final is None:
        raise KeyboardInterrupt
    rows = [json.loads(text) for text in (options.tuned / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    return {
        "steps": result.step,
        "seconds": rows[-1]["seconds"],
        "parameters": trained_parameters(result.final),
        "tokens_per_s": sum(r["tokens_per_s"] for r in rows) / len(rows),
        "images_per_s": sum(r["images_per_s"] for r in rows) / len(rows),
        "history": [(r["seconds"], r["loss"]) for r in rows],
    }


def clear(folder: Path) -> None:
    """Remove an earlier fine-tuning; ValueError when ``folder`` holds files and none is the log of one."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "metrics.jsonl").is_file()):
        raise ValueError(f"{folder} is there and holds no earlier fine-tuning; move it away, or name another --out")
    shutil.rmtree(folder)


def trained_parameters(folder: Path) -> int:
    """Numbers in the exported tensors."""
    from safetensors import safe_open

    from accessory.models.build import WEIGHTS_FILE

    total = 0
    with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            size = 1
            for n in file.get_slice(name).get_shape():
                size *= n
            total += size
    return total


def show_page(options: Options, result: dict[str, Any]) -> None:
    """Write report.html."""
    from accessory import config
    from accessory.data.builtin import build
    from accessory.evaluate import report

    def task_line(found: dict[str, Any]) -> report.Line:
        return report.Line(found["task"], found["correct"], found["total"], found["control"])

    def picture(task: str, index: int) -> Any:
        return build(task, "test", cache=options.cache)[index].turns[0].pictures[0].source

    opened: Callable[[str], Any] = report.Image.open
    cards = [
        report.Card(opened(ROOT / "samples" / s["image"]), s["question"], s["truth"], s["answer"], s["right"])
        for s in result["samples"]
    ]
    for found in result["scores"]:
        cards += [
            report.Card(picture(found["task"], i["index"]), i["question"], i["truth"], i["answer"], i["right"])
            for i in found["items"][:3]
        ]
    tuning = None
    if "tuning" in result:
        found = result["tuning"]
        pairs = zip(found["before"]["items"], found["after"]["items"], strict=True)
        shown = tuple(
            report.Card(picture(TASK, a["index"]), a["question"], a["truth"], a["answer"], a["right"], b["answer"])
            for b, a in pairs
        )
        tuning = report.Tuning(
            "Fine-tuned on a new task: flags to countries", found["parameters"], found["steps"], found["seconds"],
            found["tokens_per_s"], found["images_per_s"], task_line(found["before"]), task_line(found["after"]),
            tuple((x, y) for x, y in found["history"]), shown,
        )  # fmt: skip
    facts = (
        ("model", result["model"]),
        ("measured", result["when"]),
        ("machine", f"{os.cpu_count()} cores"),
        *((name, value[:12]) for name, value in config.versions().items()),
    )
    notes = [
        "Held out: the drawings in the table and below it were never in the training data. Flags are the exception: "
        "each is scored as it is, and training shows the same flags turned, cropped and tinted."
    ]
    if not result["scores"]:
        notes = ["The picture sets could not be fetched on this machine, so only the shipped samples are shown."]
    made = report.Report(
        "A nano model that sees", facts, tuple(map(task_line, result["scores"])), tuple(cards), tuning, tuple(notes)
    )
    (options.out / "report.html").write_text(report.page(made), encoding="utf-8")


def show(result: dict[str, Any]) -> None:
    """Print the numbers of an earlier run."""
    header()
    for found in result["scores"]:
        line(found)
    if "tuning" in result:
        line(result["tuning"]["before"])
        line(result["tuning"]["after"])


def header() -> None:
    """The head of the table."""
    print(f"  {'task':18} {'right':>8} {'shuffled':>9} {'questions':>10} {'seconds':>8}", flush=True)


def line(found: dict[str, Any]) -> None:
    """One row of the table."""
    control = "" if found["control"] is None else f"{found['control'] / found['total']:.1%}"
    right = f"{found['correct'] / found['total']:.1%}"
    print(f"  {found['task']:18} {right:>8} {control:>9} {found['total']:>10} {found['seconds']:>8.1f}", flush=True)


def say(text: str) -> None:
    """A step begins."""
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
