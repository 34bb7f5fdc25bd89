"""Every published model that sees, at full size, without its weights: sizes, tokens, names, and what is published.

    python tools/presets.py [TYPE...]

One line a type of LLaMA2-Accessory. The list of a checkpoint's tensors is written out from the published sizes, laid
through the importer into the model, all on the device ``meta``: nothing is read and nothing computed. A number that is
not the published one is marked, and the exit status is 1.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from accessory.backbone import reference
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES
from accessory.models import published_keys
from accessory.models.mllm import MLLM
from accessory.models.published import LLAMA_TYPES, find_type
from accessory.models.reference import SKIP, assemble, read_published, text_specs
from accessory.vision.meta import tower_of

POSITIONS = {
    "llama": 257, "llama_peft": 257, "llama_adapter": 0, "llama_qformerv2": 34, "llama_qformerv2_peft": 34,
    "llama_ens": 291, "llama_ens_peft": 291, "llama_ens5": 1455, "llama_ens5p2": 687, "llama_ens10": 2910,
    "llama_ens_light": 259, "llama_ens5_light": 1295, "mixtral": 257, "mixtral_peft": 257, "mixtral_sparse": 257,
    "mixtral_sparse_ens": 291, "mixtral_sparse_ens5": 1455,
}  # fmt: skip
ENCODERS = {
    "qformer": (729, 1_091_114_496),
    "clip": (302, 342_562_049),
    "openclip_convnext_xxl": (378, 843_398_016),
    "dinov2_vitg14": (567, 1_136_480_768),
}
"""Tensors and parameters of the encoders, as counted in the published code's models. CLIP with its text half has 144
tensors more."""
CHECKPOINTS = {"llama_ens": (2349, 16_500_000_000), "llama_ens_light": (None, 3_100_000_000)}
"""Tensors (where they were counted) and parameters of whole checkpoints; the latter are published with one digit behind
the comma, in thousand millions: 16.5 for SPHINX, about 3.1 for SPHINX-Tiny."""
COLUMNS = "type,backbone,side,views,tokens,positions,encoders,joints,backbone parameters,all parameters,tensors,notes"


@dataclass(frozen=True)
class Row:
    """What is printed of a type."""

    kind: str
    cells: tuple[str, ...]
    problems: tuple[str, ...]


def arguments(config: LlamaConfig) -> dict[str, Any]:
    """A checkpoint's ``config.json``."""
    c = config
    out: dict[str, Any] = {
        "dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
    }  # fmt: skip
    if c.moe is None:
        return out | {"multiple_of": 256}
    return out | {"hidden_dim": c.ffn_dim, "moe": {"num_experts": c.moe.experts, "num_experts_per_tok": c.moe.top}}


def imported(kind: str, config: LlamaConfig) -> tuple[MLLM, published_keys.Shapes]:
    """The full list of a checkpoint's tensors, and the model that it becomes."""
    args = arguments(config)
    shapes = published_keys.checkpoint(kind, config, text_specs(args, kind))
    found = read_published(published_keys.on_meta(shapes), args, kind)
    with torch.device("meta"):
        return assemble(found, tower_of(cast(str, find_type(kind).tower))), shapes


def row_of(kind: str) -> Row:
    """A type at the size that its released weights have."""
    row = find_type(kind)
    config = SIZES[row.size]
    net, shapes = imported(kind, config)
    problems: list[str] = []
    tower = net.tower
    assert tower is not None
    groups = sum(g.num_tokens for g in tower.groups) if row.positions else 0
    positions = groups + 2 * len(tower.runs) * row.start_end
    same(problems, f"{kind}: positions", positions, POSITIONS[kind])
    same(problems, f"{kind}: positions of the preset", row.positions, POSITIONS[kind])
    parts = {p: published_keys.encoder(p, kind) for p in row.encoders}
    for prefix, found in parts.items():
        tensors, parameters = ENCODERS[prefix]
        if prefix == "clip" and row.before_bos:
            tensors, parameters = tensors + 144, parameters + 12 * 7_087_872
        same(problems, f"{kind}: tensors of {prefix}", len(found), tensors)
        same(problems, f"{kind}: parameters of {prefix}", published_keys.count(found), parameters)
    state = net.state_dict()
    backbone = sum(v.numel() for k, v in state.items() if k.startswith("backbone."))
    joints = sum(v.numel() for k, v in state.items() if k.startswith(("projector.", "resampler.")))
    joints -= state[f"projector.{SKIP}"].numel() if f"projector.{SKIP}" in state else 0
    encoders = sum(map(published_keys.count, parts.values()))
    total = published_keys.count(shapes)
    same(problems, f"{kind}: all parameters", backbone + joints + encoders, total)
    if kind in CHECKPOINTS:
        tensors, parameters = CHECKPOINTS[kind]
        same(problems, f"{kind}: tensors", len(shapes), len(shapes) if tensors is None else tensors)
        if abs(total - parameters) > 50_000_000:
            problems.append(f"{kind}: all parameters are {total:,}, published are about {parameters:,}")
    cells = (
        kind, row.size, str(row.image_size), str(len(tower.runs)), str(groups), str(positions), f"{encoders:,}",
        f"{joints:,}", f"{backbone:,}", f"{total:,}", str(len(shapes)), ", ".join(row.released),
    )  # fmt: skip
    return Row(kind, cells, tuple(problems))


def same(problems: list[str], what: str, ours: int, published: int) -> None:
    """Note a difference."""
    if ours != published:
        problems.append(f"{what} are {ours:,}, published are {published:,}")


def supported() -> list[str]:
    """Types with a tower whose language model can be read and whose full size is known."""
    texts = {*reference.TYPES, "llama_ens_peft"}
    return [k for k, r in LLAMA_TYPES.items() if r.tower is not None and r.text in texts and r.size in SIZES]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="llama_type (default: all that see)")
    rows = [row_of(kind) for kind in parser.parse_args(arguments).types or supported()]
    table = [COLUMNS.split(","), *(list(row.cells) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    problems = [p for row in rows for p in row.problems]
    print("\n".join(problems) if problems else f"{len(rows)} types, every number as published")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
