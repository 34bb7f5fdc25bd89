"""``python -m accessory doctor CONFIG [a.b=value ...]``: look at a run before it starts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accessory.data.sources import Source
    from accessory.train.doctor import Report

LONGEST = 1500  # characters of a row that is shown
BAR = 40


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    from accessory.train.findings import CODES

    width = max(map(len, CODES))
    parser = sub.add_parser(
        "doctor",
        help="look at a run before it starts",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what can be found:\n" + "\n".join(f"  {c:{width}} {lv:7} {text}" for c, (lv, text) in CODES.items()),
    )
    parser.add_argument("config", help="the experiment, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="values that replace those of the file")
    parser.add_argument("--rows", type=int, default=1000, help="rows read of each source, 0 for all (default: 1000)")
    parser.add_argument("--show", type=int, default=1, metavar="N", help="rows shown of each source (default: 1)")
    parser.add_argument("--test", metavar="YAML", help="a data or task file that must share no row with the training")
    parser.add_argument("--ranks", type=int, help="processes that the run will have (default: one copy of the model)")
    parser.add_argument("--memory", type=float, metavar="GB", help="of the device (default: of the best one here)")
    parser.add_argument("--strict", action="store_true", help="a warning is an error")
    parser.add_argument("--json", metavar="FILE", help="write all that was found as JSON")


def main(args: argparse.Namespace) -> int:
    """Print what was found. 0 where all is well, 1 for an error (with ``--strict`` also for a warning); an experiment
    that cannot be read or built raises ValueError."""
    from accessory.train.doctor import Asked, examine

    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory must be above 0, got {args.memory:g}")
    size = None if args.memory is None else int(args.memory * 1e9)
    tests = () if args.test is None else tests_of(Path(args.test))
    report = examine(args.config, args.overrides, Asked(args.rows, args.show, tests, size, args.ranks))
    print(text(report, colour=sys.stdout.isatty(), strict=args.strict))
    if args.json is not None:
        plain = json.dumps(report.plain(args.strict), indent=1, ensure_ascii=False)
        Path(args.json).write_text(plain + "\n", encoding="utf-8")
    return report.code(args.strict)


def tests_of(path: Path) -> tuple[Source, ...]:
    """The files of a data configuration (``sources:``) or of a task file (``tasks:``)."""
    from accessory import config as configuration
    from accessory.data.sources import FileConfig, FileOptions, load_sources, open_source

    tree = configuration.parse_file(path)
    if not isinstance(tree, dict) or "tasks" not in tree:
        return tuple(s for s in load_sources(path) if not s.unbounded)
    from accessory.evaluate.tasks import read_tasks

    found = []
    for made in read_tasks(path):
        c = made.config
        options = FileOptions(task=c.prompt or made.scorer.prompt, boxes=c.boxes, decimals=c.decimals)
        found.append(open_source(FileConfig("task", c.path, c.root, c.columns, name=c.name, options=options)))
    return tuple(found)


def text(report: Report, *, colour: bool = False, strict: bool = False) -> str:
    """The report for people."""
    facts, out = report.facts, [report.config]
    for heading, plain, green in report.samples:
        shown = (green if colour else plain).rstrip()
        if len(plain) > LONGEST:
            shown = f"{plain[:LONGEST]}\n... {len(plain) - LONGEST} more characters"
        out += ["", heading + ("" if colour else "; ⟦what is learned⟧"), shown]
    out += ["", *_sources(facts["sources"]), ""]
    for name, what in (("text_positions", "positions of text"), ("picture_positions", "positions of pictures")):
        if facts[name]:
            out += [*_bars(facts[name], what), ""]
    trains = [f"{part} {own / 1e6:.2f} of {whole / 1e6:.2f} M" for part, (own, whole) in facts["trains"].items()]
    out.append(f"trains: {', '.join(trains)}")
    if "updates" in facts:
        u = facts["updates"]
        times = ", ".join(f"{n:.3g}" for n in u["epochs"])
        packs = f" in {u['packs_per_update']} packs" if "packs_per_update" in u else ""
        out.append(
            f"updates: {u['per_epoch']} an epoch of all rows, {u['rows_per_update']} rows each{packs}; "
            f"in {u['max_steps']} each source comes {times} times"
        )
    if "batches" in facts:
        b = facts["batches"]
        long = b["longest"]
        full = f"{b['real']:.1%} of the positions are real" if "real" in b else f"packs are {b['filled']:.1%} full"
        out.append(
            f"batches: {full}, {b['learned']:.1%} are learned; the longest is "
            f"{long['rows']} x {long['positions']} with {long['tiles']} tiles"
        )
    out.append(_memory(facts["memory"]))
    return "\n".join([*out, "", *_findings(report, strict)])


def _sources(sources: list[dict[str, Any]]) -> list[str]:
    """A table of sources."""
    names = ("rows", "read", "dropped", "longest", "positions", "learned", "tiles", "targets")
    width = max(len(s["name"]) for s in sources) if sources else 0
    lines = [" " * width + "".join(f"{n:>10}" for n in names)]
    return lines + [f"{s['name']:{width}}" + "".join(f"{s[n]:>10}" for n in names) for s in sources]


def _bars(found: Mapping[str, int], what: str) -> list[str]:
    most, width = max(found.values()), max(map(len, found))
    return [f"rows by {what}"] + [f"{k:>{width}} {'█' * -(-BAR * n // most)} {n}" for k, n in found.items()]


def _memory(m: Mapping[str, Any]) -> str:
    from accessory.models.plan import size

    kept = m["activations"]
    parts = [(name, m[name]) for name in ("weights", "gradients", "optimizer")]
    parts += [] if kept is None else [("longest batch", kept)]
    said = ", ".join(f"{name} {size(n)}" for name, n in parts)
    each = f" on each of {m['ranks']} ranks" if m["ranks"] > 1 else ""
    rest = "".join(f"; {what}" for what in m["unknown"])
    return f"memory{each}: {size(m['total'])} of the device's {size(m['device'])}: {said}{rest}"


def _findings(report: Report, strict: bool) -> list[str]:
    lines = []
    for f in report.findings:
        level = "error" if strict else f.level
        lines.append(f"{level} {f.code}: {f.text}")
        lines += [f"  {place}" for place in f.examples]
    errors = sum(strict or f.level == "error" for f in report.findings)
    lines.append(f"{errors} errors, {len(report.findings) - errors} warnings")
    return lines
