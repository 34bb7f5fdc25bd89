"""The equality gate: a conversion is done when a fixed set of prompts gets the same logits before and after.

``measure`` a model before, do what is to be done, then :func:`hold` what came out. Whatever reshards, exports, merges,
quantises or mixes weights goes through here, and what fails is removed.

Fewer bits give other logits, so there the distributions are compared (:func:`drift`), and as a single damaged scale
hides in that, every weight with what its code stands for (:func:`check_codes`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.backbone.weights import load_backbone
from accessory.data.tokenizer import Tokenizer
from accessory.models import build
from accessory.models.build import Model
from accessory.models.mllm import MLLM
from accessory.nn.linear import Linear
from accessory.peft.attach import attached, find_backbone, merge, slotted
from accessory.peft.quantize import code_error, kernels
from accessory.schema import Picture, Turn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of a logit, relative to the largest logit, that rounding in a type of number explains."""


@dataclass(frozen=True)
class Bound:
    """What fewer bits may cost: ``nats`` a position at most, the likeliest token has to stay at a share ``agreement``
    of them, and no weight may be off by more than ``code`` of the largest that shares its scale."""

    nats: float
    agreement: float
    code: float


QUANTISED = {
    "int8": Bound(0.1, 0.85, 0.02),
    "int4": Bound(0.8, 0.6, 0.4),
    "nf4": Bound(0.8, 0.6, 0.4),
}
"""Between full weights and those that are kept in fewer bits; README has what a 135M-parameter model measures, good and
spoilt. Larger models move less."""
PROMPTS = (
    "Hi",
    "The lighthouse keeper counted nine ships before the fog arrived.",
    "Question: what is 12 + 30?\nAnswer:",
    "Prices rose by 3.5 percent in 2019 - na\u00efve caf\u00e9 \u65e5\u672c",
)
ABOUT_PICTURES = ("What is in the picture?", "Where is the red square?")
LENGTHS = (1, 7, 24)  # of the prompts of a model without a tokenizer
Net = Llama | MLLM | Model
Row = tuple[Tensor, Tensor | None]
"""Ids (T) of a prompt, and the tiles (N, 3, S, S) that its placeholders stand for."""
_T = TypeVar("_T")


class GateError(ValueError):
    """Logits moved by more than the tolerance: what was converted is not the same model."""


@dataclass(frozen=True)
class Measure:
    """Logits (T_i, V) in fp32 of the fixed prompts, on the CPU, the type of number that they were computed in, and
    which positions (T_i) are words and not placeholders (none given: all)."""

    logits: tuple[Tensor, ...]
    dtype: torch.dtype
    words: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Drift:
    """How far distributions moved: mean nats a position (Kullback-Leibler, from before to after), and the share of
    positions whose likeliest token stayed. Over words, not over placeholders of pictures."""

    nats: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.nats:.4f} nats a position, and {self.agreement:.1%} of the likeliest tokens stayed"


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
def measure(model: Net, rows: Sequence[Row] = ()) -> Measure:
    """Logits of the fixed prompts: texts, and pictures where the model sees; ids where it has no tokenizer.

    ``rows`` in their place, for a network that has none of its own (:func:`prompt_rows`, :func:`text_rows`).
    """
    net = model.net if isinstance(model, Model) else model
    training = net.training
    net.eval()
    backbone = net if isinstance(net, Llama) else net.backbone
    device, dtype = backbone.like.device, backbone.like.dtype
    out, asked = [], rows or prompt_rows(model)
    for ids, tiles in asked:
        ids = ids.to(device)[None]
        if isinstance(net, Llama):
            h = net(net.embed(ids))
        else:
            h = net(ids, tiles.to(device) if tiles is not None and len(tiles) else None)
        out.append(net.logits(h)[0].float().cpu())
    net.train(training)
    words = tuple(ids >= 0 for ids, _ in asked)
    return Measure(tuple(out), dtype if dtype in TOLERANCE else torch.float32, words)


def text_rows(tokenizer: Tokenizer) -> list[Row]:
    """The fixed texts, for a language model alone."""
    return [(torch.tensor(tokenizer.encode(text, bos=tokenizer.bos_id is not None)), None) for text in PROMPTS]


def prompt_rows(model: Net) -> list[Row]:
    """The fixed prompts as a model reads them."""
    if not isinstance(model, Model):
        # Spread over the vocabulary, alike for every model of its size.
        vocab = (model if isinstance(model, Llama) else model.backbone).config.vocab_size
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


def drift(before: Measure, after: Measure) -> Drift:
    """How far the distributions of the fixed prompts moved; infinitely where shapes differ or a logit is no finite
    number."""
    if [t.shape for t in before.logits] != [t.shape for t in after.logits]:
        return Drift(float("inf"), 0.0)
    nats, stayed, count = 0.0, 0, 0
    for i, (a, b) in enumerate(zip(before.logits, after.logits, strict=True)):
        if before.words:
            a, b = a[before.words[i]], b[before.words[i]]
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        nats += float((p.exp() * (p - q)).sum(-1).double().sum())
        stayed += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(a)
    return Drift(nats / count if nats == nats else float("inf"), stayed / count)


def check_drift(before: Measure, after: Measure, what: str, bound: Bound) -> Drift:
    """The drift of two measures, when it is within ``bound``.

    Raises:
        GateError: when it is not; ``what`` was done is named.
    """
    moved = drift(before, after)
    if not (moved.nats <= bound.nats and moved.agreement >= bound.agreement):
        raise GateError(
            f"{what}: the fixed prompts moved by {moved}; the limit is {bound.nats:g} nats, and {bound.agreement:.0%} "
            "have to stay. More bits or a smaller group move less (int8; int4,group=32)"
        )
    return moved


def check_codes(model: Net, weight: Callable[[str], Tensor], what: str) -> float:
    """The largest error of a code in a quantised ``model``, when it is within :data:`QUANTISED`: what
    :func:`accessory.peft.quantize.code_error` says of every layer and the full weight that it was made of, which
    ``weight`` gives by the layer's name in the backbone, one at a time.

    Raises:
        GateError: when it is not; the layer is named.
    """
    worst = 0.0
    for name, kernel in kernels(model.net if isinstance(model, Model) else model):
        error = code_error(kernel, weight(name))
        limit = QUANTISED[kernel.kind].code  # of the layer: a table is int8 in any kind of model
        if not error <= limit:
            raise GateError(
                f"{what}: in {name} a weight is off by {error:.2g} of the largest that shares its scale, "
                f"{kernel.kind} explains {limit:g}"
            )
        worst = max(worst, error)
    return worst


def open_model(folder: Path) -> Net:
    """The model of a folder: a model folder with its tower and tokenizer, or a backbone in any layout."""
    folder = Path(folder)
    return build.load(folder) if (folder / build.CONFIG_FILE).is_file() else load_backbone(folder)


def hold(
    before: Measure | Callable[[], Measure],
    made: Path,
    what: str,
    *,
    tolerance: float | None = None,
    opened: Callable[[Path], Any] = open_model,
    measured: Callable[[Any], Measure] = measure,
    inspect: Callable[[Any, Measure], None] | None = None,
) -> float:
    """Open what was made, compare it with ``before``, and **remove it** when it is not the same model.

    Returns the difference. ``opened`` reads the new folder, ``measured`` measures what that gives, ``inspect`` may
    refuse both by a :class:`GateError`. A ``before`` that is still to be measured is, once the new model is let go.

    Raises:
        GateError: when the logits moved too far, or what was made cannot even be opened.
    """
    try:
        model = opened(made)
        after = measured(model)
        if inspect is not None:
            inspect(model, after)
        del model  # or it and what is measured now would both be in memory
        return check(before() if callable(before) else before, after, f"{what} {made}", tolerance)
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
