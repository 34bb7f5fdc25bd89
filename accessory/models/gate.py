"""The equality gate: a conversion is done when a fixed set of prompts gets the same logits before and after.

``measure`` a model before, do what is to be done, then :func:`hold` what came out. Whatever reshards, exports, merges,
quantises or mixes weights goes through here, and what fails is removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.backbone.weights import load_backbone
from accessory.models import build
from accessory.models.build import Model
from accessory.models.mllm import MLLM
from accessory.nn.linear import Linear
from accessory.peft.attach import attached, find_backbone, merge, slotted
from accessory.schema import Picture, Turn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of a logit, relative to the largest logit, that rounding in a type of number explains."""
QUANTISED = {"int8": 0.15, "int4": 0.8, "nf4": 0.8}
"""The same, between full weights and those that are kept in fewer bits; a 135M-parameter model moved by 0.06, 0.40 and
0.52, tiny random ones by 0.02, 0.09 and 0.16."""
PROMPTS = (
    "Hi",
    "The lighthouse keeper counted nine ships before the fog arrived.",
    "Question: what is 12 + 30?\nAnswer:",
    "Prices rose by 3.5 percent in 2019 - na\u00efve caf\u00e9 \u65e5\u672c",
)
ABOUT_PICTURES = ("What is in the picture?", "Where is the red square?")
LENGTHS = (1, 7, 24)  # of the prompts of a model without a tokenizer
Net = Llama | MLLM | Model
_T = TypeVar("_T")


class GateError(ValueError):
    """Logits moved by more than the tolerance: what was converted is not the same model."""


@dataclass(frozen=True)
class Measure:
    """Logits (T_i, V) in fp32 of the fixed prompts, on the CPU, and the type of number that they were computed in."""

    logits: tuple[Tensor, ...]
    dtype: torch.dtype


def drawings() -> list[Image.Image]:
    """Two pictures, wide and tall, always the same."""
    out = []
    for size in ((96, 60), (50, 120)):
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        draw = ImageDraw.Draw(image)
        draw.rectangle((8, 8, 30, 30), fill=(220, 30, 30))
        draw.ellipse((20, 30, 46, 56), fill=(30, 60, 220))
        out.append(image)
    return out


@torch.inference_mode()
def measure(model: Net) -> Measure:
    """Logits of the fixed prompts: texts, and pictures where the model sees; ids where it has no tokenizer."""
    net = model.net if isinstance(model, Model) else model
    training = net.training
    net.eval()
    backbone = net if isinstance(net, Llama) else net.backbone
    device, dtype = backbone.like.device, backbone.like.dtype
    out = []
    for ids, tiles in _rows(model, backbone.config.vocab_size):
        ids = ids.to(device)[None]
        if isinstance(net, Llama):
            h = net(net.embed(ids))
        else:
            h = net(ids, tiles.to(device) if tiles is not None and len(tiles) else None)
        out.append(net.logits(h)[0].float().cpu())
    net.train(training)
    return Measure(tuple(out), dtype if dtype in TOLERANCE else torch.float32)


def _rows(model: Net, vocab: int) -> list[tuple[Tensor, Tensor | None]]:
    if not isinstance(model, Model):
        # Spread over the vocabulary, alike for every model of its size.
        return [((torch.arange(n) * 7919 + 13 * n) % vocab, None) for n in LENGTHS]
    turns = [(Turn("user", (text,)),) for text in PROMPTS]
    if model.net.tower is not None:
        asked = zip(drawings(), ABOUT_PICTURES, strict=True)
        turns += [(Turn("user", (Picture(image), text)),) for image, text in asked]
    rows = [model.encoder.row(t, generate=True) for t in turns]
    return [(row.ids, row.tiles) for row in rows]


def difference(before: Measure, after: Measure) -> float:
    """The largest difference of a logit, relative to the largest logit before; infinite where shapes differ or a logit
    is no finite number."""
    if [t.shape for t in before.logits] != [t.shape for t in after.logits]:
        return float("inf")
    worst = 0.0
    for a, b in zip(before.logits, after.logits, strict=True):
        moved = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        worst = max(worst, moved if moved == moved else float("inf"))
    return worst


def tolerance_of(*measures: Measure) -> float:
    """What rounding explains between models of these types of number."""
    return max(TOLERANCE[m.dtype] for m in measures)


def check(before: Measure, after: Measure, what: str, tolerance: float | None = None) -> float:
    """The difference of two measures, when it is no more than ``tolerance`` (default: :func:`tolerance_of` both).

    Raises:
        GateError: when it is more; ``what`` was done is named.
    """
    limit = tolerance_of(before, after) if tolerance is None else tolerance
    moved = difference(before, after)
    if not moved <= limit:
        raise GateError(
            f"{what}: logits of the fixed prompts moved by {moved:.2g} of their largest, the limit is {limit:g}"
        )
    return moved


def open_model(folder: Path) -> Net:
    """The model of a folder: a model folder with its tower and tokenizer, or a backbone in any layout."""
    folder = Path(folder)
    return build.load(folder) if (folder / build.CONFIG_FILE).is_file() else load_backbone(folder)


def hold(
    before: Measure,
    made: Path,
    what: str,
    *,
    tolerance: float | None = None,
    opened: Callable[[Path], Net] = open_model,
) -> float:
    """Open what was made, compare it with ``before``, and **remove it** when it is not the same model.

    Returns the difference. ``opened`` reads the new folder.

    Raises:
        GateError: when the logits moved too far, or what was made cannot even be opened.
    """
    try:
        return check(before, measure(opened(made)), f"{what} {made}", tolerance)
    except GateError as error:
        remove(made)
        raise GateError(f"{error}; {made} was removed") from None
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        remove(made)
        raise GateError(f"{what} {made} cannot be opened ({error}); it was removed") from error


def remove(made: Path) -> None:
    """Remove what did not pass: a file, or a folder with all that is in it."""
    if made.is_dir() and not made.is_symlink():
        shutil.rmtree(made)
    else:
        made.unlink(missing_ok=True)


def guarded(model: Net, change: Callable[[], _T], what: str, tolerance: float | None = None) -> tuple[_T, float]:
    """Change a model in place between two measures. Returns what ``change`` gave, and the difference.

    Raises:
        GateError: when the logits moved too far; the model is then as it was left and must not be used.
    """
    before = measure(model)
    result = change()
    return result, check(before, measure(model), what, tolerance)


def merge_checked(model: Net, tolerance: float | None = None) -> float:
    """Fold LoRA and scales into the weights (:func:`accessory.peft.attach.merge`) behind the gate.

    Returns the difference of the logits.

    Raises:
        GateError: when the logits moved too far. The model is then as it was before.
    """
    net: nn.Module = model.net if isinstance(model, Model) else model
    backbone = find_backbone(net)
    kept = [(m, _slots(m)) for _, m in slotted(backbone)]
    specs = attached(net)
    try:
        return guarded(model, lambda: merge(net), "merging", tolerance)[1]
    except ValueError:
        for linear, slots in kept:
            for name, value in slots.items():
                setattr(linear, name, value)
        backbone.attached = specs  # type: ignore[assignment]
        raise


def _slots(linear: Linear) -> dict[str, object]:
    return {name: getattr(linear, name) for name in ("weight", "bias", "delta", "scale")}
