"""``python -m accessory fetch [NAMES] [--cache DIR]``: bring the default assets into the cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("fetch", help="bring the default assets into the cache")
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to bring (default: all)")
    parser.add_argument("--cache", type=Path, help="cache folder (default: $ACCESSORY_CACHE or ~/.cache/accessory)")
    parser.add_argument("--archives", type=Path, help="folder with archives downloaded earlier, looked in first")
    parser.add_argument("--list", action="store_true", help="only show what there is, with licences")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Fetch, and print one line an asset. 1 when one could not be had (the message says what to do).

    Raises:
        ValueError: for an unknown name.
    """
    from accessory.data.assets import ASSETS, AssetError, find, look_up
    from accessory.data.fetch import fetch

    if args.list:
        for asset in ASSETS.values():
            where = find(asset.name, args.cache) or "not in the cache"
            print(f"{asset.name:20} {asset.version:16} {asset.size / 1e6:6.1f} MB  {asset.licence:24.24} {where}")
        return 0
    for name in args.names:
        look_up(name)  # before any is fetched: a misspelt name is a mistake of the user's
    failed = 0
    for name in args.names or list(ASSETS):
        try:
            print(f"{name}: {fetch([name], args.cache, not args.quiet, args.archives)[name]}")
        except (AssetError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0
