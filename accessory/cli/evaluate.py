"""``python -m accessory evaluate --model DIR``: scores on the built-in test sets, each beside its controls.

A chat model is asked questions (:mod:`accessory.evaluate.score`), a generator for pictures
(:mod:`accessory.evaluate.drawn`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.cli.chat import QUANTIZE, quantization
from accessory.cli.generate import add_sampler_options, adjusted, described, whole_entries

if TYPE_CHECKING:
    from accessory.evaluate.asking import Query
    from accessory.evaluate.drawn import Scorer
    from accessory.evaluate.score import Control
    from accessory.models.generator import Generator

CONTROLS: tuple[Control, ...] = ("none", "shuffled", "blind")
OF_CHAT = ("controls", "retrieval", "data", "quantize")
OF_GENERATORS = ("seed", "steps", "guidance", "solver", "time_shift", "sheet")
SHEET = 24  # rows of a contact sheet, of all kinds together
Sets = dict[str, "list[Query]"]
Done = dict[str, dict[int, dict[str, Any]]]


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    p = sub.add_parser("evaluate", help="score a model on the built-in test sets")
    p.add_argument("--model", required=True, metavar="DIR", help="a model folder, or the name of a shipped model")
    p.add_argument(
        "--tasks", nargs="+", metavar="TASK",
        help="test sets (default: all but flags); of a generator: caption request indirect riddle",
    )  # fmt: skip
    p.add_argument("--limit", type=int, metavar="N", help="ask only N questions of each set, spread evenly")
    p.add_argument("--batch-size", type=int, default=64, help="questions asked together (default: 64)")
    p.add_argument("--device", metavar="cpu|cuda|cuda:N", help="where to compute (default: cuda where there is one)")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--cache", type=Path, help="asset cache")
    p.add_argument(
        "--out", type=Path, metavar="FILE.jsonl",
        help="write every question, answer and verdict; a generator's file is gone on with, and with --data this is a "
        "folder that is (default: outputs/evaluate/MODEL)",
    )  # fmt: skip
    chat = p.add_argument_group("of chat models alone")
    chat.add_argument("--controls", nargs="+", choices=CONTROLS, help="default: none shuffled")
    chat.add_argument("--data", type=Path, metavar="FILE.yaml", help="test sets of your own, see data_configs/examples")
    chat.add_argument("--retrieval", action="store_true", help="also name emoji by nearest neighbour in the encoder")
    chat.add_argument("--quantize", metavar="KIND", help=QUANTIZE)
    drawn = p.add_argument_group("of generators alone")
    drawn.add_argument("--seed", type=int, help="what the noise of all pictures is derived from (default: 0)")
    drawn.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw a contact sheet, three pictures a prompt")
    add_sampler_options(drawn)


def main(args: argparse.Namespace) -> int:
    """Print Markdown tables, line by line as they are done.

    Raises:
        ValueError: for options that cannot be, or belong to the other kind of model; AssetError for a missing asset.
    """
    import torch

    from accessory.models.build import is_generator
    from accessory.serve.chat import find_model

    folder = find_model(args.model, generators=True)
    drawing = is_generator(folder)
    if given := [name for name in (OF_CHAT if drawing else OF_GENERATORS) if getattr(args, name) not in (None, False)]:
        kind, other = ("a generator", "chat models") if drawing else ("a chat model", "generators")
        raise ValueError(f"--{given[0].replace('_', '-')} is an option of {other}, and {args.model} is {kind}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.data is not None:
        return _own(folder, args)
    return _draws(folder, args) if drawing else _answers(args)


def _answers(args: argparse.Namespace) -> int:
    from accessory.evaluate.score import TASKS, score
    from accessory.serve.chat import load

    model = load(args.model, cache=args.cache, device=args.device, quantization=quantization(args)).model
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("", encoding="utf-8")
    print("| task | pictures | right | of | accuracy | seconds |\n|---|---|---:|---:|---:|---:|", flush=True)
    for task in args.tasks or TASKS:
        for control in args.controls or CONTROLS[:2]:
            row = score(model, task, limit=args.limit, control=control, cache=args.cache, batch_size=args.batch_size)
            shown = "own" if control == "none" else control
            cells = f"{row.correct} | {row.total} | {100 * row.accuracy:.1f} % | {row.seconds:.0f}"
            print(f"| {task} | {shown} | {cells} |", flush=True)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    for item in row.items:
                        entry = {"task": task, "control": control, **dataclasses.asdict(item)}
                        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    if args.retrieval:
        _retrieval(model.config, args.cache, model.net.tower)
    return 0


def _own(folder: Path, args: argparse.Namespace) -> int:
    """Test sets of one's own: one file of items a set and control, and ``scores.json`` beside them."""
    from accessory.evaluate.run import model_digest, run, write_scores
    from accessory.evaluate.tasks import read_tasks
    from accessory.serve.chat import load

    if args.tasks or args.retrieval:
        raise ValueError("--data names test sets of your own, --tasks and --retrieval are for the built-in ones")
    sets = read_tasks(args.data)  # first: a mistake should not cost the loading of a model
    out = args.out or Path("outputs") / "evaluate" / folder.resolve().name
    model, results = load(folder, cache=args.cache, device=args.device).model, []
    print("| task | pictures | items | scores | seconds |\n|---|---|---:|---|---:|", flush=True)
    for tests in sets:
        for control in args.controls or CONTROLS[:2]:
            result = run(
                model, tests, out / f"{tests.config.name}.{control}.jsonl", model_id=model_digest(folder),
                control=control, limit=args.limit, batch_size=args.batch_size,
            )  # fmt: skip
            shown = "own" if control == "none" else control
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.totals.items())
            print(f"| {result.task} | {shown} | {result.items} | {numbers} | {result.seconds:.0f} |", flush=True)
            results.append(result)
    write_scores(out / "scores.json", results)
    return 0


def _retrieval(config: object, cache: Path | None, tuned: object) -> None:
    from accessory.evaluate.retrieval import retrieval_accuracy
    from accessory.models.build import ModelConfig, build_tower
    from accessory.vision.tower import Tower

    assert isinstance(config, ModelConfig)
    if config.tower is None or not isinstance(tuned, Tower):
        raise ValueError("--retrieval needs a model with a tower")
    frozen = build_tower(config.tower, cache).to(tuned.mean.device)
    print(
        "nearest neighbour: how many drawings of the unseen style are most like the same concept in a style of training"
        "\n(cosine of mean features; with sets centred the mean of each style is subtracted first, that of the whole "
        "test set too, which a model that is shown one picture does not know)"
    )
    for name, tower in (("encoder as published", frozen), ("encoder of this model", tuned)):
        plain, centred = retrieval_accuracy(tower.eval(), cache)
        print(f"nearest neighbour, {name}: {100 * plain:.1f} %; with sets centred: {100 * centred:.1f} %", flush=True)


# --- generators -------------------------------------------------------------------------------------------------------


def _draws(folder: Path, args: argparse.Namespace) -> int:
    from accessory.config import plain
    from accessory.evaluate import trigger
    from accessory.evaluate.asking import partners
    from accessory.evaluate.drawn import Scorer
    from accessory.evaluate.gallery import Gallery, encoder
    from accessory.evaluate.tally import LEGEND, LIKENESS_HEAD, RANKS_HEAD, likeness_line, split
    from accessory.models.conditioner import DreamConditioner
    from accessory.models.generator import digest, for_inference, load_generator
    from accessory.parallel.groups import choose_device

    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    device = choose_device(args.device)
    model = for_inference(load_generator(folder, cache=args.cache), device)
    settings, seed = adjusted(model.settings, args), args.seed or 0
    run = json.loads(json.dumps({"model": digest(folder), "settings": plain(settings), "seed": seed}))
    done = _done(args.out, run)
    sets = _sets(model, args)
    scorer = Scorer(model, Gallery(encoder(device, args.cache), args.cache), settings, seed, args.batch_size)
    n = len(scorer.gallery)
    print(f"{folder}: {described(settings)}\n\n{LEGEND.format(n=n)}\n\n{RANKS_HEAD}", flush=True)
    entries = []
    for kind, asked in sets.items():
        entries += _kind(scorer, asked, _checked(scorer, asked, done.get(kind, {}), args.out), args.out, run)
    print("\n" + LIKENESS_HEAD)
    for part in split(entries):
        print(likeness_line(part), flush=True)
    if isinstance(model.conditioner, DreamConditioner):
        print("\n" + trigger.HEAD)
        for line in trigger.rates(model.conditioner, args.cache, args.limit):
            print(line, flush=True)
        if model.conditioner.reply:
            print("\n" + trigger.NAMES_HEAD)
        for asked in sets.values() if model.conditioner.reply else ():
            if not isinstance(asked[0].prompt, str):
                for line in trigger.names(model.conditioner, asked, partners(asked), scorer.gallery.known):
                    print(line, flush=True)
    if args.sheet is not None:
        _sheet(scorer, sets, args.sheet)
    return 0


def _sets(model: Generator, args: argparse.Namespace) -> Sets:
    """Queries by kind, all readable for the generator; says what is left out of them."""
    from accessory.evaluate.asking import KINDS, queries
    from accessory.evaluate.drawn import reads_dialogues

    sets: Sets = {}
    for kind in args.tasks or (KINDS if reads_dialogues(model) else KINDS[:1]):
        sets[kind], skipped = queries(kind, cache=args.cache, limit=args.limit)
        cut = sum(lost > 0 for lost in model.lost([query.prompt for query in sets[kind]]))
        if skipped:
            print(f"{kind}: {skipped} pairs are left out: no two keywords hide the name and are not those of training")
        if cut:
            print(f"warning: {cut} prompts of {kind} are too long and lose their end", file=sys.stderr)
    return sets


def _kind(
    scorer: Scorer, asked: Sequence[Query], done: Mapping[int, dict[str, Any]], out: Path | None, run: dict[str, Any]
) -> list[dict[str, Any]]:
    """Draw what is not ``done``; a picture's line is in the file before its group's is in the table."""
    from tqdm import tqdm

    from accessory.evaluate.tally import EVERY, rank_lines

    sizes = Counter(query.held_out for query in asked)
    entries: list[dict[str, Any]] = []
    group: list[dict[str, Any]] = []
    with tqdm(total=len(asked), unit="picture", desc=asked[0].kind, disable=None) as bar:
        for batch, ended in scorer.groups(asked, done):
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    for entry in batch:
                        if entry["number"] not in done:
                            file.write(json.dumps({**entry, "run": run}, ensure_ascii=False) + "\n")
            entries += batch
            group += batch
            bar.update(len(batch))
            if not ended:
                continue
            lines = rank_lines(group, group[0]["style"])
            whole = [entry for entry in entries if entry["held_out"] == group[0]["held_out"]]
            if len(whole) == sizes[group[0]["held_out"]]:
                lines += rank_lines(whole, EVERY)
            group = []
            tqdm.write("\n".join(lines), file=sys.stdout)
            sys.stdout.flush()
    return entries


def _done(out: Path | None, run: Mapping[str, Any]) -> Done:
    """Entries of the file by kind and number.

    Raises:
        ValueError: when one of them is of another run.
    """
    found: Done = {}
    if out is None:
        return found
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(whole_entries(out), 1):
        its = entry.get("run") if isinstance(entry, dict) else None
        if not isinstance(its, dict):
            raise ValueError(f"{out}:{number} is no picture's line; --out takes another file")
        if other := [name for name in run if its.get(name) != run[name]]:
            raise ValueError(f"{out}:{number} is of another {' and '.join(other)}; --out takes another file")
        found.setdefault(entry["kind"], {})[entry["number"]] = entry
    return found


def _checked(
    scorer: Scorer, asked: Sequence[Query], done: Mapping[int, dict[str, Any]], out: Path | None
) -> dict[int, dict[str, Any]]:
    """Those of ``done`` that answer a query; ValueError when one answers another."""
    for query in asked:
        if query.number in done and not scorer.same(query, done[query.number]):
            raise ValueError(f"{out}: {query.kind} {query.number} asked for something else; --out takes another file")
    return {query.number: done[query.number] for query in asked if query.number in done}


def _sheet(scorer: Scorer, sets: Sets, path: Path) -> None:
    from accessory.evaluate.drawn import sheet_rows
    from accessory.evaluate.sheet import sheet

    rows = [row for asked in sets.values() for row in sheet_rows(scorer, asked, -(-SHEET // len(sets)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(path, "PNG")
    print(f"\n{len(rows)} prompts in {path}")
