"""Fold the LoRA and the scales of a model folder into its weights.

    python tools/merge_lora.py FOLDER NEW_FOLDER

The logits of fixed prompts, pictures among them where the model sees, are compared before and after; when they move
by more than the tolerance, nothing is written and the exit status is 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.models.folding import fold_folder
from tools.command import parser, told


def fold(args: argparse.Namespace) -> str:
    """Do it."""
    moved = fold_folder(args.source, args.out, tolerance=args.tolerance)
    return f"{args.out}: folded; logits of the fixed prompts moved by {moved:.2g} of their largest"


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    p = parser(__doc__)
    p.add_argument("source", type=Path, metavar="FOLDER")
    p.add_argument("out", type=Path, metavar="NEW_FOLDER")
    p.add_argument("--tolerance", type=float, help="relative to the largest logit (default: by type of number)")
    return told(fold, p, arguments)


if __name__ == "__main__":
    sys.exit(main())
