"""What a skip token saves: encoder time and sequence length of square and wide pictures, with and without it.

``python -m benchmarks.skip_tokens [--grid N|aspect ...] [--repeats 5] [--threads N] [--no-heavy]``

Without skip tokens the padded square is resized onto the canvas and every tile is encoded; with them the picture lies
in the canvas' corner and tiles that hold nothing of it become one learned vector. The default encoder has its published
weights where they are in the cache; weights change no time. All cells take turns in one process; medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from accessory.data.assets import find
from accessory.data.tiling import TilingConfig, cut
from accessory.models.build import TowerSource, build_tower
from accessory.vision.presets import build as build_preset
from accessory.vision.projector import Projector
from accessory.vision.tower import Tower
from accessory.vision.towers import TowerConfig
from benchmarks.floors import interleaved, median

RATIOS = ((1, 1), (2, 1), (4, 1))
DIM = 576  # of the default language model
HEAVY = TowerConfig("timm", "vit_base_patch16_224", 224)
Grid = int | Literal["aspect"]


@dataclass(frozen=True)
class Line:
    """One picture through one encoder, without (``all_``) and with skip tokens."""

    encoder: str
    grid: str
    ratio: str
    all_tiles: int
    tiles: int
    all_positions: int
    positions: int
    all_ms: float
    ms: float


def towers(heavy: bool) -> dict[str, Tower]:
    """Encoders by the name in the table."""
    known = find("efficientnet-lite0") is not None
    light = build_tower(TowerSource(weights="asset:efficientnet-lite0" if known else None))
    made = {f"EfficientNet-Lite0, 128 px{'' if known else ' (random weights)'}": light}
    if heavy:
        made["ViT-B/16, 224 px (random weights)"] = build_preset(HEAVY)
    return {name: tower.eval() for name, tower in made.items()}


def picture(ratio: tuple[int, int], side: int) -> Image.Image:
    """Noise of the given ratio, longest side ``side``."""
    width, height = side, side * ratio[1] // ratio[0]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cells(name: str, tower: Tower, grids: list[Grid]) -> tuple[dict[str, Callable[[], object]], dict[str, list[int]]]:
    """What to time, and (tiles, positions) of every cell, by ``encoder|grid|ratio|skip``."""
    projector = Projector(tower.groups, DIM, "mlp").eval()
    runs: dict[str, Callable[[], object]] = {}
    sizes: dict[str, list[int]] = {}
    for grid in grids:
        for ratio in RATIOS:
            for skip in (False, True):
                tiling = TilingConfig(tower.size, grid, skip=skip, max_grid=4)
                image = picture(ratio, 4 * tower.size)
                plan = tiling.plan(*image.size)
                tiles = cut(image, plan)
                blank = len(plan.tiles) - plan.num_real
                key = f"{name}|{grid}|{ratio[0]}:{ratio[1]}|{int(skip)}"
                runs[key] = lambda t=tiles: projector(tower.tokens(t))  # type: ignore[misc]
                sizes[key] = [plan.num_real, plan.num_real * projector.num_tokens + blank]
    return runs, sizes


def measure(grids: list[Grid], repeats: int, heavy: bool) -> list[Line]:
    """Every line of the table."""
    lines = []
    for name, tower in towers(heavy).items():
        runs, sizes = cells(name, tower, grids)
        with torch.inference_mode():
            ms = {key: 1e3 * median(s) for key, s in interleaved(runs, repeats).items()}
        for key in runs:
            if key.endswith("|1"):
                other = key[:-1] + "0"
                _, grid, ratio, _ = key.split("|")
                a, b = sizes[other], sizes[key]
                lines.append(Line(name, grid, ratio, a[0], b[0], a[1], b[1], ms[other], ms[key]))
    return lines


def _grid(text: str) -> Grid:
    return "aspect" if text == "aspect" else int(text)


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", nargs="+", type=_grid, default=[2, "aspect"], help="tiles a canvas side, or aspect")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-heavy", action="store_true", help="leave the vision transformer out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lines = measure(args.grid, args.repeats, not args.no_heavy)
    if args.json:
        print(json.dumps([asdict(x) for x in lines]))
        return
    print(
        f"{args.threads} threads, fp32, medians of {args.repeats} interleaved runs; a view of the whole comes first.\n"
    )
    print(
        "| encoder | grid | picture | tiles encoded | with skip | positions | with skip | ms | with skip | time saved |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for x in lines:
        print(
            f"| {x.encoder} | {x.grid} | {x.ratio} | {x.all_tiles} | {x.tiles} | {x.all_positions} | {x.positions} "
            f"| {x.all_ms:.1f} | {x.ms:.1f} | {1 - x.ms / x.all_ms:.0%} |"
        )


if __name__ == "__main__":
    main()
