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


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--length", type=int, required=True, help="positions of a row")
    parser.add_argument("--column", default="text", help="column of the texts (default: text)")
    args = parser.parse_args(arguments)
    try:
        count = write_packed(args.files, args.out, load(args.tokenizer), args.length, args.column)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {count} rows of at most {args.length} positions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
