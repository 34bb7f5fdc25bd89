"""Copies of model and generator folders to be handed on: smaller, and naming what they stand on as others have it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import config as configuration
from accessory.backbone.store import atomic_folder, narrowed, read_file, write_file
from accessory.models import build
from accessory.models.build import ASSET, CONFIG_FILE, WEIGHTS_FILE, Model, ModelConfig, base_folder, beside, find
from accessory.models.conditioner import DreamConditioner, LabelConditioner, Prompt
from accessory.models.gate import (
    ABOUT_PICTURES,
    PROMPTS,
    TOLERANCE,
    Bound,
    Drift,
    Measure,
    check_codes,
    check_drift,
    drawings,
    hold,
    measure,
    tolerance_of,
)
from accessory.models.generator import load_generator
from accessory.models.generator_config import GeneratorConfig
from accessory.models.generator_net import Generator
from accessory.peft.attach import find_backbone
from accessory.peft.quantize import Quantization
from accessory.schema import Picture, Turn

CELLS = 8  # a side, of what a picture is compared by
# Fields of configurations that name a folder or a file.
_NAMES = ("base", "source", "model", "tokenizer", "weights", "neighbours")
# What a base may say otherwise than the one that was trained on: it is the same generator with the same weights.
_FREE = ("base", "base_sha256", "sampler", "tuning")


@dataclass(frozen=True)
class Exported:
    """What a copy holds; ``outside`` are names in its configuration that only this machine may know."""

    kind: str
    tensors: Mapping[str, Tensor]
    outside: tuple[str, ...]


def export(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    quantization: Quantization | None = None,
) -> Exported:
    """Write a copy of a model or generator folder; shipped models are named in it as every checkout has them.

    Args:
        dtype: of the tensors that it can hold (:func:`accessory.backbone.store.narrowed`); None leaves them.
        base: takes the place of the base in the configuration: the same weights in another precision.
        quantization: written into a model's configuration: its backbone is quantised whenever it is read.

    Raises:
        ValueError: when ``source`` is no such folder, ``target`` holds something, or ``base`` is not the same.
    """
    tree = _tree(source)
    if quantization is not None:
        if tree.get("kind") == "generator":
            raise ValueError(
                f"--quantize {quantization.kind}: {source} is a generator; generate --quantize keeps the language "
                "model that reads its prompts in fewer bits"
            )
        if tree.get("quantization") is not None:
            raise ValueError(f"--quantize {quantization.kind}: {source} is quantised already")
        tree["quantization"] = quantization.as_dict()
    state = read_file(source / WEIGHTS_FILE)
    if base is not None:
        if tree.get("base") is None:
            raise ValueError(f"{source} stands on no base, so {base} cannot take its place")
        with beside(source):
            old = base_folder(tree["base"])
        new = base_folder(base)
        if tree["base_sha256"] not in (None, found := _sha256(old)):
            raise ValueError(f"{old} is not what {source} was trained on: SHA-256 {found}, not {tree['base_sha256']}")
        _check_same(old, new)
        # What the base brings stands in the copy as the base itself says it: loading compares them.
        before, after = _tree(old), _tree(new)
        tree |= {n: value for n, value in after.items() if n not in _FREE and tree.get(n) == before.get(n)}
        tree |= {"base": base, "base_sha256": _sha256(new)}
    outside: list[str] = []
    with beside(source):
        _rename(tree, outside)
    with atomic_folder(target) as private:
        state = state if dtype is None else narrowed(state, dtype)
        write_file(state, private / WEIGHTS_FILE)
        (private / CONFIG_FILE).write_text(configuration.dump(tree), encoding="utf-8")
    return Exported(str(tree.get("kind", "model")), state, tuple(dict.fromkeys(outside)))


def hold_export(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    bound: Bound | None = None,
    base: str | None = None,
) -> float | Drift:
    """Compare what was exported with what it was made of, by fixed prompts with pictures, and remove it where it is not
    the same; returns how far it moved. ``bound`` of a quantised model, ``base`` as of :func:`export`; otherwise as
    :func:`accessory.models.gate.hold`.

    Raises:
        GateError: when it moved too far.
    """
    if build.is_generator(source):
        before = drawn(load_generator(source))
        limit = _limit(before, dtype, base, tolerance)
        return hold(before, target, "exporting to", tolerance=limit, opened=load_generator, measured=drawn)
    model = build.load(source)
    before = measure(model)
    if bound is None:
        del model
        return hold(before, target, "exporting to", tolerance=_limit(before, dtype, base, tolerance))
    found, backbone = [], find_backbone(model.net)

    def inspect(quantised: Model, after: Measure) -> None:
        found.append(check_drift(before, after, f"quantising {source}", bound))
        check_codes(quantised, lambda n: backbone.get_submodule(n).get_parameter("weight"), f"quantising {source}")

    hold(before, target, "exporting to", tolerance=float("inf"), inspect=inspect)
    return found[0]


def _limit(before: Measure, dtype: torch.dtype | None, base: str | None, tolerance: float | None) -> float:
    """What rounding to ``dtype``, and of the weights of another ``base``, explains, too."""
    if tolerance is not None:
        return tolerance
    dtypes = (
        {dtype} if base is None else {dtype, *(t.dtype for t in read_file(base_folder(base) / WEIGHTS_FILE).values())}
    )
    return max(tolerance_of(before), *(TOLERANCE.get(kind, 0.0) for kind in dtypes if kind is not None), 0.0)


def drawn(generator: Generator) -> Measure:
    """As :func:`accessory.models.gate.measure`, of a generator: the conditions (L, C) of fixed prompts, one of them
    with a picture where it sees, and what it draws of them in few steps, the means of its cells (64, 3).

    Not its pixels: sampling takes rounding a thousandth of a condition to a tenth of a single pixel, and to a hundredth
    of a cell; a denoiser with one spoilt matrix moves cells by more than a half.
    """
    read = generator.conditioner
    prompts: list[Prompt] = ["0"] if isinstance(read, LabelConditioner) else list(PROMPTS[1:3])
    if isinstance(read, DreamConditioner) and read.dream.net.tower is not None:
        prompts.append((Turn("user", (Picture(drawings()[0]), ABOUT_PICTURES[0])),))
    grid = generator.settings.grid
    settings = replace(generator.settings, grid=replace(grid, points=min(grid.points, 3)))
    found = []
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            seq = generator.condition([prompt]).seq
            found += [] if seq is None else [seq[0].float().cpu()]
            picture = np.asarray(generator.generate([prompt], seeds=[i], settings=settings)[0])
            pixels = torch.from_numpy(picture / 255.0).float().permute(2, 0, 1)
            found.append(F.adaptive_avg_pool2d(pixels, CELLS).flatten(1).T)
    dtype = next(generator.denoiser.parameters()).dtype
    return Measure(tuple(found), dtype if dtype in TOLERANCE else torch.float32)


def _tree(folder: Path) -> dict[str, Any]:
    """The checked configuration of a folder, as plain values."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is neither a model nor a generator folder: {name} is missing")
    path = folder / CONFIG_FILE
    tree = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    cls: type[Any] = GeneratorConfig if build.is_generator(folder) else ModelConfig
    plain: dict[str, Any] = configuration.plain(configuration.build(tree, cls, str(path)))
    return plain


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def _check_same(old: Path, new: Path) -> None:
    """Whether two folders hold one generator, in two precisions perhaps."""
    said = f"{new} is not {old} in another precision"
    trees = []
    for folder in (old, new):
        trees.append(_tree(folder))
        with beside(folder):
            _rename(trees[-1], [])
    if other := [n for n in trees[0] if n not in _FREE and trees[0][n] != trees[1].get(n)]:
        raise ValueError(f"{said}: {', '.join(other)} differ in {CONFIG_FILE}")
    before, after = (read_file(folder / WEIGHTS_FILE) for folder in (old, new))
    if before.keys() != after.keys():
        raise ValueError(f"{said}: it holds other tensors, {sorted(before.keys() ^ after.keys())[:8]}")
    for name, tensor in before.items():
        there = after[name]
        wide = [t.double() for t in (tensor, there)]
        eps = max(torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0 for t in (tensor, there))
        if there.shape != tensor.shape or bool(((wide[0] - wide[1]).abs() > eps * wide[0].abs().max()).any()):
            raise ValueError(f"{said}: {name} has other values")


def _rename(tree: dict[str, Any], outside: list[str]) -> None:
    """Paths of shipped models become ``weights/NAME``; what lies elsewhere is listed. What a base brings is left."""
    based = tree.get("base") is not None
    for key, value in tree.items():
        if isinstance(value, dict):
            if not based or key == "conditioner":
                _rename(value, outside)
        elif key in _NAMES and isinstance(value, str) and not value.startswith(ASSET):
            place, shipped = find(value).resolve(), build.SHIPPED.resolve()
            if place.is_relative_to(shipped):
                tree[key] = (Path("weights") / place.relative_to(shipped)).as_posix()
            else:
                outside.append(value)
