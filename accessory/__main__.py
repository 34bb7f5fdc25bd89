"""``python -m accessory VERB``: one module of ``accessory.cli`` a verb, imported only when it is asked for."""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import re
import sys
import traceback
from collections.abc import Sequence

from accessory.data.assets import AssetError

VERBS: tuple[tuple[str, str], ...] = (
    ("train", "train what an experiment file says"),
    ("chat", "talk about pictures in the terminal"),
    ("evaluate", "score a model"),
    ("generate", "make pictures of prompts"),
    ("fetch", "bring the default assets into the cache"),
    ("convert", "change the layout of weights"),
    ("doctor", "look at a run before it starts"),
    ("plan", "memory and rough time of a model before it is loaded"),
)

EXAMPLES = {
    "train": "train exps/own.yaml data.sources=data_configs/own_data.yaml --dry-run",
    "chat": 'chat --model weights/nano-sphinx --image samples/guitar.png --ask "What is this?"',
    "evaluate": "evaluate --model weights/nano-sphinx --tasks emoji-names --limit 50",
    "generate": 'generate --model runs/nano_dit/final --prompt "a red circle"',
    "fetch": "fetch --list",
    "convert": "convert path/to/model out/model --to hf",
    "doctor": "doctor exps/own.yaml --rows 200",
    "plan": "plan llama2-13b+sphinx --prompt 2048",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. 2 for a mistake of the user's or a missing asset (one clear line), 130 for an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="accessory",
        usage="python -m accessory VERB ...",
        epilog="verbs:\n" + "\n".join(f"  {name:10} {text}" for name, text in VERBS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    verb, names = arguments[0], [name for name, _ in VERBS]
    if verb not in names:
        near = difflib.get_close_matches(verb, names, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        print(f"error: unknown verb {verb!r}{hint} Verbs: {', '.join(names)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"accessory.cli.{verb}")
    sub = parser.add_subparsers(dest="verb", prog="python -m accessory")
    module.add_parser(sub)
    sub.choices[verb].description = dict(VERBS)[verb] + "; for example: python -m accessory " + EXAMPLES[verb]
    sub.choices[verb].add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = _parse(parser, sub.choices[verb], arguments)
    try:
        return int(module.main(args))
    except (ValueError, AssetError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(parser: argparse.ArgumentParser, verb: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Also overrides that stand after options: argparse ends a list of positionals at the first option."""
    # First: argparse would rather miss a required option than name the misspelt one.
    if wrong := misspelt(arguments[1:], [name for action in verb._actions for name in action.option_strings]):
        verb.error(f"unrecognized arguments: {', '.join(wrong)}")
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(r.startswith("-") for r in rest)):
        verb.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def misspelt(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Options that are none of the ``known`` ones or a beginning of one, each with the nearest that is."""
    found = []
    for word in itertools.takewhile(lambda w: w != "--", arguments):
        name = word.partition("=")[0]
        # What holds a blank or is a number is the value of an option, to argparse too.
        if re.fullmatch(r"-[^\s\d.].*", word) and " " not in word and not any(k.startswith(name) for k in known):
            near = difflib.get_close_matches(name, known, n=1)
            found.append(name + (f" (did you mean {near[0]}?)" if near else ""))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
