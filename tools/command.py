"""How the small tools are called, and how they say that something could not be done."""

import argparse
import sys
from collections.abc import Callable, Sequence

from accessory.models.gate import GateError


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line whose help is the text of the tool's module."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def told(work: Callable[[argparse.Namespace], str], p: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Print what ``work`` says. The exit status: 1 for a ValueError, whose words go to stderr."""
    try:
        print(work(p.parse_args(arguments)))
    except ValueError as error:
        print(f"{'not done' if isinstance(error, GateError) else 'error'}: {error}", file=sys.stderr)
        return 1
    return 0
