"""Pack texts into rows of one length for pre-training.

    python tools/pack_text.py OUT.jsonl --tokenizer FOLDER --length 2048 FILE...

A FILE is JSON, JSONL, CSV, TSV or parquet with texts in the column "text" (--column names another). What comes out is
read by a source of kind "packed".
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.data.packing import write_packed
from accessory.data.tokenizer import load
from tools.command import parser, told


def pack(args: argparse.Namespace) -> str:
    """Do it."""
    count = write_packed(args.files, args.out, load(args.tokenizer), args.length, args.column)
    return f"{args.out}: {count} rows of at most {args.length} positions"


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    p = parser(__doc__)
    p.add_argument("out", type=Path, metavar="OUT.jsonl")
    p.add_argument("files", type=Path, nargs="+", metavar="FILE")
    p.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--length", type=int, required=True, help="positions of a row")
    p.add_argument("--column", default="text", help="column of the texts (default: text)")
    return told(pack, p, arguments)


if __name__ == "__main__":
    sys.exit(main())
