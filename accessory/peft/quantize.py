"""Frozen linears in fewer bits: NF4 (QLoRA, Dettmers et al. 2023), int8 and int4; the only place that quantises.

LoRA, prefixes, biases and scales hang beside the quantised weights as they do beside full ones, and train. Towers,
norms and the output of tied models stay as they are; embedding tables too, unless they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from accessory.nn.linear import Linear
from accessory.nn.packed import Packed
from accessory.nn.quantized import GROUPS, Fields, Int4, Int8, Quantized, QuantizedTable, check_cut
from accessory.peft.attach import attached, find_backbone, slotted

Kind = Literal["int8", "int4", "nf4"]
NESTED = 256  # scales of NF4 that share one of their own
NF4_GROUPS = (64, 128, 256, 512)
ROUTER = "gate"  # a mixture's choice of experts jumps, so its few weights are left alone


@dataclass(frozen=True)
class Quantization:
    """How the linears of a backbone are kept. ``group``: weights that share a scale (int4, nf4; int8 has one a row).

    ``embeddings``: the table too, in int8 with a scale a row, which a tied model also scores its vocabulary with.

    Raises:
        ValueError: for a kind or a group that there is not.
    """

    kind: Kind = "int8"
    group: int = 64
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"quantization.kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        known = {"int4": GROUPS, "nf4": NF4_GROUPS}.get(self.kind)
        if known is not None and self.group not in known:
            raise ValueError(f"quantization.group {self.group} is not one of {known}, which {self.kind} has")

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """``int4``, ``int4,group=32``, ``int8,embeddings``: what a command line says.

        Raises:
            ValueError: for anything else.
        """
        kind, *options = text.split(",")
        values: dict[str, Any] = {"kind": kind}
        for option in options:
            name, equals, value = option.partition("=")
            if name == "embeddings" and not equals:
                values[name] = True
            elif name == "group" and value.isdecimal():
                values[name] = int(value)
            else:
                raise ValueError(f"--quantize {text}: {option!r} is neither group=NUMBER nor embeddings")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def layout(self, out: int, width: int) -> Fields:
        """What a weight (out, ``width``) is kept as."""
        return CLASSES[self.kind].fields(out, width, self.group)


class NF4(Quantized):
    """Four-bit normal floats in blocks that run through the flat weight; the blocks' scales are quantised once more.

    ``codes``: two a byte. ``absmax``: a byte a block; ``nested`` (a scale for every 256 of these) and ``offset`` make
    numbers of it. A part of a larger one has these numbers themselves, as its blocks do not come in runs of 256.
    """

    kind: ClassVar[str] = "nf4"
    absmax: Tensor
    nested: Tensor
    offset: Tensor

    def __init__(self, tensors: dict[str, Tensor], shape: tuple[int, int], group: int, dtype: torch.dtype) -> None:
        super().__init__()
        _bitsandbytes()  # better here than at the first product
        self.rows, self.group = [shape[0]], group
        self._shape, self._dtype = shape, dtype
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @staticmethod
    def fields(out: int, width: int, group: int) -> Fields:
        """What :meth:`of` a weight (out, ``width``) makes."""
        blocks = -(-out * width // group)
        return {
            "codes": ((-(-out * width // 2),), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "nested": ((-(-blocks // NESTED),), torch.float32),
            "offset": ((), torch.float32),
        }

    @classmethod
    def of(cls, weight: Tensor, group: int) -> NF4:
        """The nearest codes of ``weight`` (out, in).

        Raises:
            ValueError: when bitsandbytes is not installed.
        """
        codes, state = _bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=group, quant_type="nf4", compress_statistics=True
        )
        tensors = {"codes": codes.flatten(), "absmax": state.absmax, "nested": state.state2.absmax}
        shape = (weight.shape[0], weight.shape[1])
        return cls(tensors | {"offset": state.offset.reshape(())}, shape, group, weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight that it was made of."""
        return self._dtype

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in)."""
        library = _bitsandbytes()
        levels, _ = _tables(str(self.device))
        state = library.QuantState(
            absmax=self._scales(), shape=self._shape, dtype=self._dtype, blocksize=self.group, code=levels,
            quant_type="nf4",
        )  # fmt: skip
        return library.dequantize_4bit(self.codes.view(-1, 1), state).to(dtype or self._dtype)

    def _scales(self) -> Tensor:
        """The scale of every block, in fp32."""
        if self.absmax.is_floating_point():
            return self.absmax
        numbers = _tables(str(self.device))[1]
        inner = _bitsandbytes().QuantState(absmax=self.nested, blocksize=NESTED, code=numbers, dtype=torch.float32)
        scales: Tensor = _bitsandbytes().dequantize_blockwise(self.absmax, inner)
        return scales + self.offset

    def cut(self, axis: int, part: int, parts: int) -> NF4:
        """See :class:`accessory.nn.quantized.Quantized`."""
        check_cut(self._shape[1], axis, parts, self.group)
        flat = {"codes": self.codes, "absmax": self._scales()}
        cut = {n: t.view(self._shape[0], -1).chunk(parts, axis)[part] for n, t in flat.items()}
        rows, width = (size // (parts if axis == i else 1) for i, size in enumerate(self._shape))
        tensors = {n: t.contiguous().flatten().clone() for n, t in cut.items()}
        return NF4(tensors, (rows, width), self.group, self._dtype)


CLASSES: dict[str, type[Int8] | type[Int4] | type[NF4]] = {"int8": Int8, "int4": Int4, "nf4": NF4}


@lru_cache
def _bitsandbytes() -> Any:
    # On a CPU it complains about an optional package that is not needed here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise ValueError(
            f"quantization.kind nf4 needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes"
        ) from None
    return library


@lru_cache
def _tables(device: str) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4 and the 256 numbers of a scale's byte."""
    library = _bitsandbytes()
    with torch.inference_mode(False):
        return library.get_4bit_type("nf4", device=device), library.create_dynamic_map().to(device)


def quantized(spec: Quantization, weight: Tensor) -> Quantized:
    """The kernel of ``weight`` (out, in), on its device."""
    with torch.no_grad():
        return CLASSES[spec.kind].of(weight.detach(), spec.group)


def restored(spec: Quantization, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Quantized:
    """The kernel of buffers that were saved."""
    if spec.kind == "nf4":
        return NF4(tensors, shape, spec.group, dtype)
    made = Int4 if spec.kind == "int4" else Int8
    return made(tensors["codes"], tensors["scales"].to(dtype))


def targets(backbone: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Name and module of every linear that is quantised."""
    for name, linear in slotted(backbone):
        if type(linear) is Linear and name.rsplit(".", 1)[-1] != ROUTER:
            yield name, linear


def fill(linear: Linear, kernel: Quantized) -> None:
    """Put ``kernel`` in the place of the weight."""
    linear.register_parameter("weight", None)
    linear.kernel = kernel


def stamp(backbone: nn.Module, spec: Quantization | None) -> None:
    """Note how a backbone is quantised: plain Python, in no state dict, but copied with the model."""
    vars(backbone)["quantization"] = spec


def found(model: nn.Module) -> Quantization | None:
    """How the backbone of ``model`` is quantised, None where it is not."""
    return vars(find_backbone(model)).get("quantization")


@torch.no_grad()
def quantize(model: nn.Module, spec: Quantization) -> nn.Module:
    """Quantise the backbone inside ``model`` in place, a layer at a time, and return the model.

    What hangs in the slots stays as it is and counts on top of the quantised weight.

    Raises:
        ValueError: when it is quantised or accelerated already, when one of these weights trains, when a group does
            not divide a layer's inputs, or nf4 is asked for without bitsandbytes.
    """
    backbone: Any = find_backbone(model)
    if (there := found(backbone)) is not None:
        raise ValueError(f"the backbone is quantised as {there.kind} already; dequantise it first")
    chosen = list(targets(backbone))
    for name, linear in chosen:
        _check(name, linear, spec, bool(attached(model)))
    table = getattr(backbone, "tok_embeddings", None)
    if spec.embeddings and isinstance(table, nn.Embedding):
        if getattr(backbone, "output_kernel", None) is not None:
            raise ValueError("the embedding table is packed for this machine; release the model before quantising it")
        backbone.tok_embeddings = QuantizedTable(Int8.of(table.weight.detach()))
    for _, linear in chosen:
        fill(linear, quantized(spec, linear.weight))
    stamp(backbone, spec)
    return model


def _check(name: str, linear: Linear, spec: Quantization, tuned: bool) -> None:
    if isinstance(linear.kernel, Packed):
        raise ValueError(f"{name} is packed for this machine; release the model before quantising it")
    if tuned and linear.weight.requires_grad:
        raise ValueError(f"{name}.weight trains, and quantised weights cannot: quantise first, then attach what trains")
    if spec.kind == "int4" and linear.in_features % spec.group:
        good = [g for g in GROUPS if linear.in_features % g == 0]
        raise ValueError(
            f"{name} has {linear.in_features} inputs, quantization.group {spec.group} does not divide them; "
            f"groups that do: {good or 'none, take int8 or nf4'}"
        )


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Give the backbone inside ``model`` full weights again, those that its codes stand for; return the model."""
    backbone: Any = find_backbone(model)
    for module in backbone.modules():
        if isinstance(getattr(module, "fused", None), Quantized):
            module.fused = None
    for _, linear in targets(backbone):
        if isinstance(kernel := linear.kernel, Quantized):
            linear.kernel = None
            linear.weight = nn.Parameter(kernel.dequantized(), requires_grad=False)
    if isinstance(backbone.tok_embeddings, QuantizedTable):
        backbone.tok_embeddings = nn.Embedding.from_pretrained(backbone.tok_embeddings.weight)
    stamp(backbone, None)
    return model


def kernels(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Name in the backbone and kernel of everything inside ``model`` that is quantised, its table too."""
    backbone: Any = find_backbone(model)
    if isinstance(table := getattr(backbone, "tok_embeddings", None), QuantizedTable):
        yield "tok_embeddings", table.kernel
    for name, linear in slotted(backbone):
        if isinstance(linear.kernel, Quantized):
            yield name, linear.kernel


@torch.no_grad()
def code_error(kernel: Quantized, weight: Tensor) -> float:
    """The largest error of a weight, relative to the largest of those that share its scale; infinite for another shape
    and for what is no number.

    Half a step of int8 is 0.004; int4 cuts off up to a quarter of a group's range where that costs least, and NF4 has
    gaps of 0.3 between its outermost levels. A scale of small weights only is held against the root mean square of
    all: what is lost there cannot matter.
    """
    if tuple(kernel.shape) != tuple(weight.shape):
        return float("inf")
    full = weight.to(kernel.device, torch.float32).flatten()
    off = (kernel.dequantized().float().flatten() - full).abs_()
    group = getattr(kernel, "group", weight.shape[1])
    floor = float(full.square().mean().sqrt().clamp_min(1e-30))
    pad = -len(full) % group
    # (weights) -> (groups, group)
    off, full = (nn.functional.pad(t, (0, pad)).view(-1, group) for t in (off, full))
    worst = float((off.amax(1) / full.abs().amax(1).clamp_min(floor)).max())
    return worst if worst == worst else float("inf")


def num_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers."""
    return sum(t.numel() * t.itemsize for t in model.state_dict().values())
