"""Mix the weights of models of one architecture.

    python tools/mix_weights.py NEW_FOLDER --parents A B --alpha 0.3
    python tools/mix_weights.py NEW_FOLDER --parents A B --method slerp --alpha 0.5 --part towers=0
    python tools/mix_weights.py NEW_FOLDER --parents BASE A B --method task --weights 0.5,0.4 --part "layers.0.*=0,0"

A parent is a folder of safetensors: a model folder, or a language model in this project's or Hugging Face's layout.
--alpha is the share of the second of two parents, --weights has one number a parent (task: one for each but the
first). --part gives a part (backbone, towers, projector, adapters) or names that match a pattern weights of their own.

Before it is done, the ends of the same recipe must give back the parents' logits on fixed prompts, and the mixture
finite ones; otherwise nothing is kept and the exit status is 1.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.backbone.mix import Recipe, ends, mix
from accessory.models.gate import GateError, check, difference, measure, open_model, remove
from tools.command import parser, told


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments ask for; ValueError for numbers that are none."""
    count = len(args.parents)

    def weights(text: str, what: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"{what}: {text!r} is not a list of numbers such as 0.3,0.7") from None
        # One number for a linear mixture of two is the share of the second, as --alpha.
        two = args.method == "linear" and count == 2 and len(numbers) == 1
        return (1 - numbers[0], numbers[0]) if two else numbers

    if (args.alpha is None) == (args.weights is None):
        raise ValueError("exactly one of --alpha and --weights is needed")
    given = weights(args.weights, "--weights") if args.alpha is None else weights(str(args.alpha), "--alpha")
    parts = {}
    for part in args.part:
        name, _, text = part.rpartition("=")
        if not name:
            raise ValueError(f"--part {part!r} is not of the form NAME=WEIGHT")
        parts[name] = weights(text, f"--part {name}")
    return Recipe(args.method, given, parts)


def gate(parents: list[Path], out: Path, recipe: Recipe) -> float:
    """Check that the mixture gives finite logits and the ends of its recipe those of the parents.

    Returns how far the mixture's logits are from the first parent's, relative to their largest.

    Raises:
        GateError: when they do not; ``out`` is removed then.
    """
    try:
        first = measure(open_model(parents[0]))
        moved = difference(first, measure(open_model(out)))
        if not math.isfinite(moved):
            raise GateError(f"the mixture {out} gives logits that are no finite numbers")
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            for i, end in ends(recipe, len(parents)):
                made = Path(folder) / str(i)
                mix(parents, made, end)
                before = first if i == 0 else measure(open_model(parents[i]))
                check(before, measure(open_model(made)), f"the end of {parents[i]}")
    except (ValueError, RuntimeError, OSError) as error:
        remove(out)
        raise GateError(f"{error}; {out} was removed") from error
    return moved


def mixed(args: argparse.Namespace) -> str:
    """Do it."""
    recipe = recipe_of(args)
    mix(args.parents, args.out, recipe)
    moved = gate(args.parents, args.out, recipe)
    return (
        f"{args.out}: {args.method} of {len(args.parents)} models; both ends give back their parents' logits\n"
        f"logits of the fixed prompts lie {moved:.3g} from those of {args.parents[0]} (of their largest)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    p = parser(__doc__)
    p.add_argument("out", type=Path, metavar="NEW_FOLDER")
    p.add_argument("--parents", type=Path, nargs="+", required=True, metavar="FOLDER")
    p.add_argument("--method", choices=("linear", "slerp", "task"), default="linear")
    p.add_argument("--alpha", type=float, help="share of the second of two parents")
    p.add_argument("--weights", metavar="W,W", help="one number a parent; task: one for each but the first")
    p.add_argument("--part", action="append", default=[], metavar="NAME=W", help="weights of a part or a pattern")
    return told(mixed, p, arguments)


if __name__ == "__main__":
    sys.exit(main())
