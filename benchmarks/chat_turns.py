"""What turn n of a chat costs when the cache lives on, against reading the whole dialogue again.

``python -m benchmarks.chat_turns --model DIR [--turns 6] [--repeats 3] [--threads N] [--json]``

A picture comes with the first question and another with the third. For every turn both ways answer the same question
after the same history, one after the other; the table shows medians over ``--repeats`` dialogues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from accessory.backbone.generate import Sampling
from accessory.schema import Turn
from accessory.serve.answer import Cost
from accessory.serve.chat import Chat, ChatModel, load

QUESTIONS = ("What is this?", "What colour is it?", "And what is this?", "How many are there?", "Where is it?", "Why?")
WITH_PICTURE = (0, 2)


@dataclass(frozen=True)
class Line:
    """One turn: prompt positions fed, tiles encoded, seconds to the first token; ``again`` is without the cache.

    ``same`` is the share of dialogues in which both gave the same answer (bf16 may split near ties otherwise).
    """

    turn: int
    fed: int
    fed_again: int
    tiles: int
    tiles_again: int
    seconds: float
    seconds_again: float
    same: float


@dataclass(frozen=True)
class _Asked:
    text: str
    cost: Cost
    seconds: float


def ask(chat: Chat, question: str, images: list[Image.Image]) -> _Asked:
    """The answer, with the wall time from the question to its first piece or end (rendering included)."""
    begin = time.perf_counter()
    pieces, first = [], 0.0
    for piece in chat.ask(question, images):
        first = first or time.perf_counter() - begin
        pieces.append(piece)
    assert chat.last_cost is not None
    return _Asked("".join(pieces), chat.last_cost, first or time.perf_counter() - begin)


def dialogue(model: ChatModel, turns: int, seed: int) -> list[tuple[_Asked, _Asked]]:
    """Every turn as (with the cache of the turns before, from nothing)."""
    rng = np.random.default_rng(seed)
    size = model.model.config.tiling.size
    kept = model.new_chat()
    out = []
    for n in range(turns):
        pixels = rng.integers(0, 256, (size, 2 * size, 3), dtype=np.uint8)  # 2:1, so that tiling has something to do
        images = [Image.fromarray(pixels)] if n in WITH_PICTURE else []
        history: tuple[Turn, ...] = kept.history
        question = QUESTIONS[n % len(QUESTIONS)]

        def again(asked: str = question, shown: list[Image.Image] = images, told: tuple[Turn, ...] = history) -> _Asked:
            return ask(model.new_chat(told), asked, shown)

        if (n + seed) % 2:  # neither way always goes first
            other = again()
            out.append((ask(kept, question, images), other))
        else:
            own = ask(kept, question, images)
            out.append((own, again()))
    return out


def measure(model: ChatModel, turns: int, repeats: int) -> list[Line]:
    """Every line of the table; a first dialogue warms up and is not counted."""
    dialogue(model, 2, 0)
    runs = [dialogue(model, turns, seed) for seed in range(repeats)]
    lines = []
    for n in range(turns):
        pairs = [run[n] for run in runs]

        def middle(values: list[float]) -> float:
            return statistics.median(values)

        lines.append(
            Line(
                turn=n + 1,
                fed=int(middle([a.cost.fed for a, _ in pairs])),
                fed_again=int(middle([b.cost.fed for _, b in pairs])),
                tiles=int(middle([a.cost.tiles for a, _ in pairs])),
                tiles_again=int(middle([b.cost.tiles for _, b in pairs])),
                seconds=middle([a.seconds for a, _ in pairs]),
                seconds_again=middle([b.seconds for _, b in pairs]),
                same=sum(a.text == b.text for a, b in pairs) / len(pairs),
            )
        )
    return lines


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder, or the name of a shipped model")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="asset cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model, cache=args.cache, device="cpu", sampling=Sampling(max_new_tokens=args.max_new_tokens))
    lines = measure(model, args.turns, args.repeats)
    if args.json:
        print(json.dumps([asdict(x) for x in lines]))
        return
    print(f"{args.model}, {args.threads} threads, medians of {args.repeats} dialogues; pictures with turns 1 and 3.\n")
    print(
        "| turn | positions fed | recomputed | tiles encoded | recomputed "
        "| seconds to first token | recomputed | ratio | same answer |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for x in lines:
        print(
            f"| {x.turn} | {x.fed} | {x.fed_again} | {x.tiles} | {x.tiles_again} | {x.seconds:.3f} "
            f"| {x.seconds_again:.3f} | {x.seconds_again / x.seconds:.1f} | {x.same:.0%} |"
        )


if __name__ == "__main__":
    main()
