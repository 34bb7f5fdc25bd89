"""Mixing the weights of models: averages, SLERP and task arithmetic, with coefficients of their own for every part.

Sources: model soups (Wortsman et al. 2022), SLERP (Shoemake 1985) tensor by tensor, task arithmetic (Ilharco et al.
2023). SPHINX mixes models tuned on different domains linearly (Lin et al. 2023, section 3.1). Everything is streamed:
memory for a few pieces of a tensor is enough whatever the size of the models.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from accessory import config as configuration
from accessory.backbone import store
from accessory.backbone.stream import CHUNK, Weights, write

Method = Literal["linear", "slerp", "task"]
PARTS = ("adapters", "towers", "projector", "backbone")
_ADAPTERS = re.compile(r"(^|\.)(delta|prefix|lora_[ab]|prefix_gate|prefix_new_gate|scale)(\.|$)")
_TOWERS = re.compile(r"(tower|qformer|clip|openclip_convnext_xxl|dinov2_vitg14)\.")
_JOINTS = re.compile(r"(projector|resampler|aligner|visual_\w+|qformer_proj|clip_proj\w*|start_img|end_img)(\.|$)")
_FREE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}  # keys of a configuration that may differ
MARK = "mix.json"


@dataclass(frozen=True)
class Recipe:
    """``linear``: the sum of ``weights`` times the parents, one weight a parent, which add up to 1. ``slerp``: one
    weight t, from the first of two parents (0) to the second (1) along the arc between the tensors. ``task``: the
    first parent plus each weight times how far another parent is from it.

    ``parts``: weights of their own, by a name of :data:`PARTS` or a pattern of tensor names (``*`` and ``?``); the
    first that matches counts.
    """

    method: Method
    weights: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def check(self, parents: int) -> None:
        """Raise ValueError where the weights do not suit the method and the number of parents."""
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r} is none of {', '.join(get_args(Method))}")
        wanted = {"linear": parents, "slerp": 1, "task": parents - 1}[self.method]
        if parents < 2 or (self.method == "slerp" and parents != 2):
            raise ValueError(
                f"{self.method} needs {'two' if self.method == 'slerp' else 'at least two'} parents, got {parents}"
            )
        for name, weights in {"weights": self.weights, **self.parts}.items():
            if len(weights) != wanted or not all(map(math.isfinite, weights)):
                raise ValueError(f"{name}: {self.method} of {parents} parents takes {wanted} weight(s), got {weights}")
            if self.method == "linear" and abs(sum(weights) - 1) > 1e-6:
                raise ValueError(f"{name}: linear weights must add up to 1, {weights} make {sum(weights):g}")

    def of(self, name: str) -> tuple[float, ...]:
        """The weights of a tensor."""
        part = part_of(name)
        for key, weights in self.parts.items():
            if key == part or (key not in PARTS and fnmatch.fnmatchcase(name, key)):
                return weights
        return self.weights

    def factors(self, name: str) -> tuple[float, ...]:
        """What every parent is multiplied with in a tensor (SLERP: at a right angle of 0, where it is linear)."""
        weights = self.of(name)
        if self.method == "slerp":
            return (1 - weights[0], weights[0])
        return weights if self.method == "linear" else (1 - sum(weights), *weights)


def part_of(name: str) -> str:
    """Which of :data:`PARTS` a tensor belongs to, by its name in any of the layouts."""
    name = name.removeprefix("llma.")
    if _ADAPTERS.search(name):
        return "adapters"
    if _JOINTS.match(name):
        return "projector"
    return "towers" if _TOWERS.match(name) else "backbone"


def mix(parents: Sequence[Path], out: Path, recipe: Recipe, *, chunk: int = CHUNK) -> None:
    """Write the mixture of model folders of one layout to the new folder ``out``, atomically.

    Types of numbers, files and everything beside the weights are those of the first parent; arithmetic is in fp32. A
    tensor of which one parent has the weight 1 and the others 0 is copied bit by bit. ``mix.json`` and the metadata of
    every file say what was mixed: names and digests of the parents' files, method, weights.

    Raises:
        ValueError: for weights that do not suit, tensors that not all parents have in the same shape and kind (all of
            them listed), configurations that differ, or an ``out`` that exists.
    """
    recipe.check(len(parents))
    opened = [Weights(p) for p in parents]
    check_alike(opened, recipe)
    facts = {
        "method": recipe.method,
        "weights": list(recipe.weights),
        "parts": {k: list(v) for k, v in recipe.parts.items()},
        "parents": [{"name": w.folder.resolve().name, "sha256": w.sha256()} for w in opened],
    }
    first = opened[0]
    with store.atomic_folder(out) as private:
        for file in first.files:
            wanted = {k: (e.dtype, e.shape) for k, e in first.entries.items() if e.file == file}
            write(private / file.name, wanted, lambda n: mixed(opened, n, recipe, chunk), {"mix": json.dumps(facts)})
        taken = {f.name for f in first.files}
        for path in sorted(first.folder.iterdir()):
            if path.is_file() and path.name not in taken | {MARK}:
                shutil.copyfile(path, private / path.name)
        store.write_json(private / MARK, facts)


def mixed(parents: Sequence[Weights], name: str, recipe: Recipe, chunk: int = CHUNK) -> Iterator[Tensor]:
    """The mixture of one tensor, piece by piece."""
    factors = recipe.factors(name)
    used = [i for i, f in enumerate(factors) if f != 0]
    if len(used) == 1 and factors[used[0]] == 1:
        yield from parents[used[0]].pieces(name, chunk)
        return
    if recipe.method == "slerp":
        factors = arc(parents[0].pieces(name, chunk), parents[1].pieces(name, chunk), factors[1])
    for pieces in zip(*(p.pieces(name, chunk) for p in parents), strict=True):
        wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in pieces]
        total = torch.zeros_like(wide[0])
        for factor, piece in zip(factors, wide, strict=True):
            total.add_(piece, alpha=factor)
        yield total


def arc(a: Iterator[Tensor], b: Iterator[Tensor], t: float) -> tuple[float, float]:
    """What SLERP multiplies two tensors with, from their pieces; straight where they (almost) share a line."""
    dot = aa = bb = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        dot, aa, bb = dot + float(x @ y), aa + float(x @ x), bb + float(y @ y)
    if aa == 0 or bb == 0:
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb))))
    if math.sin(angle) < 1e-6:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def check_alike(parents: Sequence[Weights], recipe: Recipe) -> None:
    """Raise ValueError for parents that cannot be mixed, or a part that no tensor belongs to."""
    first, problems = parents[0], list[str]()
    for other in parents[1:]:
        where = f"{other.folder} beside {first.folder}"
        missing = sorted(first.entries.keys() - other.entries.keys())
        extra = sorted(other.entries.keys() - first.entries.keys())
        shaped = [
            f"{k}: {o.shape} {o.dtype}, not {e.shape} {e.dtype}"
            for k, e in first.entries.items()
            if (o := other.entries.get(k)) is not None
            and (o.shape != e.shape or o.dtype.is_floating_point != e.dtype.is_floating_point)
        ]
        for kind, names in (("missing", missing), ("unexpected", extra), ("mis-shaped", shaped)):
            if names:
                problems.append(f"{where}: {len(names)} {kind}: {', '.join(names[:20])}")
        differ = _configs(first.folder, other.folder)
        if differ:
            problems.append(f"{where}: the configurations differ in {', '.join(differ)}")
    whole = [k for k, e in first.entries.items() if not e.dtype.is_floating_point and not _copies(recipe, k)]
    if whole:
        problems.append(f"{len(whole)} tensors are no fractions and cannot be mixed: {', '.join(whole[:20])}")
    if "adapters" not in recipe.parts:
        factored = [k for k in first.entries if re.search(r"\.(delta|lora_[ab])\.", k) and not _copies(recipe, k)]
        if factored:
            problems.append(
                f"{len(factored)} tensors are factors of LoRA, whose product does not mix as they do: {factored[0]}; "
                "merge them first, or give the part 'adapters' weights of its own"
            )
    for key in recipe.parts:
        if not any(key == part_of(n) or (key not in PARTS and fnmatch.fnmatchcase(n, key)) for n in first.entries):
            problems.append(f"part {key!r} matches no tensor (parts are {', '.join(PARTS)}, or a pattern of names)")
    if problems:
        raise ValueError("these models cannot be mixed so. " + "; ".join(problems))


def _copies(recipe: Recipe, name: str) -> bool:
    return sorted(recipe.factors(name))[-1] == 1 and sum(f != 0 for f in recipe.factors(name)) == 1


def _configs(a: Path, b: Path) -> list[str]:
    if all((p / "config.yaml").is_file() for p in (a, b)):
        one, two = (configuration.parse((p / "config.yaml").read_text(encoding="utf-8"), str(p)) for p in (a, b))
    elif all((p / "config.json").is_file() for p in (a, b)):
        one, two = (store.read_json(p / "config.json") for p in (a, b))
    else:
        return []
    return sorted(str(k) for k in (one.keys() | two.keys()) - _FREE if one.get(k) != two.get(k))


def difference(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tuned - base`` in fp32, to be laid over another copy of the base (``reference_folders.overlay``); names that
    only ``tuned`` has stay whole.

    Raises:
        ValueError: for shapes that differ.
    """
    out = {}
    for name, value in tuned.items():
        other = base.get(name)
        if other is not None and other.shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} and {tuple(other.shape)}: not of the same model")
        out[name] = value.float() if other is None else value.float() - other.float()
    return out


def ends(recipe: Recipe, parents: int) -> list[tuple[int, Recipe]]:
    """The recipes of the same method that must give back a parent, with its number."""

    def unit(i: int, n: int) -> tuple[float, ...]:
        return tuple(float(k == i) for k in range(n))

    if recipe.method == "linear":
        return [(i, Recipe("linear", unit(i, parents))) for i in range(parents)]
    if recipe.method == "slerp":
        return [(0, Recipe("slerp", (0.0,))), (1, Recipe("slerp", (1.0,)))]
    return [(i, Recipe("task", unit(i - 1, parents - 1))) for i in range(parents)]
