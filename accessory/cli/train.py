"""``python -m accessory train exps/NAME.yaml [a.b=value ...]``: train what an experiment file says."""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

from accessory import log


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("train", help="train what an experiment file says")
    parser.add_argument("config", help="the experiment, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="values that replace those of the file")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest or from a named checkpoint")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="check everything and show the plan, but do not train")
    how.add_argument("--outline", action="store_true", help="say what it would be, without weights, data or a GPU")


def main(args: argparse.Namespace) -> int:
    """Train. 0 when done; when asked to stop, all is saved and ``--resume auto`` goes on: 143 after a SIGTERM, which
    tells a scheduler to queue it again, 130 after Ctrl-C.

    Under torchrun every rank runs this; only rank 0 logs.
    """
    if os.environ.get("RANK", "0") == "0":
        log.setup()
    from accessory import config as configuration

    verb: Any
    # A generator is another section with other parts, but the loop, the data and the options are the same.
    if "generator" in configuration.read(args.config):
        from accessory.train import generator_run as verb
    else:
        from accessory.train import run as verb
    if args.outline:
        from accessory.train.outline import main_outline

        print(main_outline(args.config, args.overrides))
        return 0
    result = verb.main_config(args.config, args.overrides, args.resume, dry_run=args.dry_run)
    stopped = result is not None and result.reason in ("SIGTERM", "SIGINT")
    return 128 + signal.Signals[result.reason] if stopped else 0
