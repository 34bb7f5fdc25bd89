"""Every published model that sees, at full size, without its weights: sizes, tokens, names, and what is published.

    python tools/presets.py [TYPE...]

One line a type of LLaMA2-Accessory, and one a file that LLaMA-Adapter released. The list of a checkpoint's tensors is
written out from the published sizes, laid through the importer into the model, all on the device ``meta``: nothing is
read and nothing computed. A number that is not the published one is marked, and the exit status is 1.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from accessory.backbone import reference
from accessory.backbone.keys import build_meta
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.reference_folders import arguments
from accessory.backbone.sizes import SIZES
from accessory.models import published_keys
from accessory.models.adapter_release import Found, lay_over, spelled
from accessory.models.mllm import MLLM
from accessory.models.published import LLAMA_TYPES, find_type
from accessory.models.published_keys import Tuned
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


@dataclass(frozen=True)
class File:
    """A file of LLaMA-Adapter: what it tunes, and the numbers that are published of its parts."""

    name: str
    parts: dict[str, int]
    tuned: Tuned


_V2 = {"adapter_query": 1_269_760, "gates": 1024, "visual blocks": 56_702_976}
_BIAS = {"biases": 1_097_728, "norms": 266_240}
_LORA = {"LoRA": 39_976_960}
_BIND = {"bind blocks": 3 * 201_326_592}
RELEASED: dict[str, tuple[File, ...]] = {
    "adapter_v1": (File("len10_layer30", {"adapter_query": 1_228_800, "gates": 1024}, Tuned()),),
    "adapter_v1_caption": (File("len10_layer30_caption_vit_l", {"adapter_query": 1_228_800, "gates": 1024}, Tuned()),),
    "adapter_v2": (
        File("CAPTION-7B", _V2, Tuned()),
        File("BIAS-7B", _V2 | _BIAS, Tuned(True, True)),
        File("LORA-BIAS-7B, -v21", _V2 | _BIAS | _LORA, Tuned(True, True, 16, True)),
    ),
    "adapter_v2_chat65b": (File("chat65b", {}, Tuned()),),
    "imagebind_llm": (
        File("7B-pretrained", _BIND, Tuned()),
        File("7B", _BIND | _BIAS | _LORA, Tuned(True, True, 16)),
    ),
}
PARTS = {
    "adapter_query": r"adapter_query",
    "gates": r"(?<!new_)gate$",
    "visual blocks": r"visual_blocks\.",
    "biases": r"\.w[qkvo123]\.bias$",
    "norms": r"(^|\.)(attention_norm|ffn_norm|norm)\.weight$",
    "LoRA": r"\.lora_",
    "bind blocks": r"image_bind_f",
}
"""Which names a part has."""
FILES = "release,base,file,blocks,length,tensors,parameters,with base"
COLUMNS = "type,backbone,side,views,tokens,positions,encoders,joints,backbone parameters,all parameters,tensors,notes"


@dataclass(frozen=True)
class Row:
    """What is printed of a type."""

    kind: str
    cells: tuple[str, ...]
    problems: tuple[str, ...]


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


def files_of(kind: str) -> list[Row]:
    """The files of a release of LLaMA-Adapter, laid over a LLaMA of their size."""
    row, rows = find_type(kind), list[Row]()
    form, config = row.adapter, SIZES[row.size]
    assert form is not None
    base = {k: v.half() for k, v in build_meta(config).state_dict().items()}
    for file in RELEASED[kind]:
        shapes, problems = published_keys.release(kind, config, file.tuned), list[str]()
        for part, parameters in file.parts.items():
            found = {k: s for k, s in shapes.items() if re.search(PARTS[part], k) and "visual_blocks" not in k}
            found |= {k: s for k, s in shapes.items() if part == "visual blocks" and re.search(PARTS[part], k)}
            same(problems, f"{kind}: {part} of {file.name}", published_keys.count(found), parameters)
        tower = None if row.tower is None else tower_of(row.tower)
        clip = {} if tower is None else tower.get_submodule("model").state_dict()
        found_file = Found(
            {spelled(k): v for k, v in published_keys.on_meta(shapes).items()},
            clip={f"visual.{k}": v for k, v in clip.items()},
        )
        with torch.device("meta"):
            net = assemble(lay_over(config, base, found_file, kind), tower)
        held = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("tower."))
        numbers = (published_keys.count(shapes), held)
        cells = (kind, row.size, file.name, str(form.layers), str(form.length), str(len(shapes)))
        rows.append(Row(kind, (*cells, *(f"{n:,}" for n in numbers)), tuple(problems)))
    return rows


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
    parser.add_argument("types", nargs="*", metavar="TYPE", help="llama_type or release (default: all that see)")
    kinds = parser.parse_args(arguments).types or [*supported(), *RELEASED]
    rows = [row_of(kind) for kind in kinds if kind not in RELEASED]
    files = [row for kind in kinds if kind in RELEASED for row in files_of(kind)]
    for columns, lines in ((COLUMNS, rows), (FILES, files)):
        table = [columns.split(","), *(list(row.cells) for row in lines)] if lines else []
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))] if lines else []
        for line in table:
            print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    problems = [p for row in (*rows, *files) for p in row.problems]
    counted = [f"{len(found)} {what}" for what, found in (("types", rows), ("files", files)) if found]
    print("\n".join(problems) if problems else f"{' and '.join(counted)}, every number as published")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
