"""Compare this project with numbers of the published reference implementations.

    python tools/conformance.py DIR...

A DIR is a case (a folder with config.json, weights.safetensors and io.safetensors) or a folder of cases. One line a
case; the exit status is 1 when a case failed, 2 when nothing was found.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.conform import (
    data,
    dit,
    dream,
    families,
    meta,
    sampling,
    text,
    tokenizers,
    training,
    transport,
    vision,
    weights,
)
from tools.conform.comparison import Comparison, Handler, UnsupportedError

HANDLERS: dict[str, Handler] = {
    **data.HANDLERS,
    **dit.HANDLERS,
    **dream.HANDLERS,
    **families.HANDLERS,
    **meta.HANDLERS,
    **sampling.HANDLERS,
    **text.HANDLERS,
    **tokenizers.HANDLERS,
    **training.HANDLERS,
    **transport.HANDLERS,
    **vision.HANDLERS,
    **weights.HANDLERS,
}


def run_case(folder: Path) -> tuple[str, str]:
    """Verdict (passed, failed or unsupported) and the line that explains it."""
    config = json.loads((folder / "config.json").read_text())
    # A case without a model is known by its own name.
    reference = config.get("reference_class") or config.get("case", "no reference_class")
    handler = HANDLERS.get(reference)
    if handler is None:
        return "unsupported", f"{folder.name}: unsupported ({reference})"
    c = Comparison()
    try:
        handler(folder, config, c)
    except UnsupportedError as reason:
        return "unsupported", f"{folder.name}: unsupported ({reason})"
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError) as error:
        # A case that cannot even be run has failed, and the next one still deserves its line.
        c.problems.append(f"{type(error).__name__}: {error}")
    verdict = "failed" if c.problems or not c.compared else "passed"
    names = list(dict.fromkeys(c.compared))
    numbers = f"max abs {c.absolute:.2e}, relative {c.relative:.2e}"
    line = f"{folder.name}: {verdict} ({len(c.compared)} compared: {', '.join(names)}; {numbers})"
    line += "".join(f"\n    on purpose: {reason}" for reason in c.deviations)
    return verdict, line + "".join(f"\n    {problem}" for problem in c.problems)


def find_cases(folder: Path) -> Iterator[Path]:
    """The folder itself when it is a case, otherwise the cases below it, sorted."""
    if (folder / "config.json").is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from find_cases(child)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a case or a folder of cases")
    counts = {"passed": 0, "failed": 0, "unsupported": 0}
    for folder in parser.parse_args(arguments).folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
        for case in find_cases(folder):
            verdict, line = run_case(case)
            counts[verdict] += 1
            print(line, flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    if not sum(counts.values()):
        return 2
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
