"""Products with weights that are kept in eight or four bits; torch's packed kernels compute them where they serve.

A quantised linear has no ``weight``: its slot ``kernel`` holds one of these modules. Gradients reach the input, never
the codes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Fields = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shape and dtype of every buffer; None stands for the dtype that the layer computes in."""

FEW = 16  # rows up to which the packed kernels beat a product with dequantised weights (measured on one core)
GROUPS = (32, 64, 128, 256)  # inputs of one scale that torch's int4 kernels know
SHRINK = (1.0, 0.92, 0.84, 0.76)  # shares of a group's range that are tried; the least squared error wins
_CHUNK = 1 << 20  # weights that are quantised at once, so that their copies in fp32 stay small


class Quantized(nn.Module):
    """``W x`` of one linear, or of several that read the same input as one product; no bias.

    Its buffers are what is saved, in a layout that is the same on every machine. :meth:`optimize` re-orders them for
    this machine's kernels where there are any, :meth:`release` restores them.
    """

    kind: ClassVar[str]
    rows: list[int]
    codes: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this stands for."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    def fits(self, *weights: Tensor | None) -> bool:
        """Whether the linears that it serves have no weights of their own."""
        return all(w is None for w in weights)

    @abstractmethod
    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), in ``dtype`` or the layer's."""

    @abstractmethod
    def cut(self, axis: int, part: int, parts: int) -> Quantized:
        """The kernel of one of ``parts`` equal parts of the rows (axis 0) or the columns (1), with the same values;
        ValueError when weights that share a scale would be parted."""

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without a graph."""
        return F.linear(x, self.dequantized(x.dtype))

    def joined(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the products of several weights stand side by side, ``rows`` wide each."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self.product(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., in) -> (..., out_i) for every weight."""
        y = self.joined(x)
        return (y,) if len(self.rows) == 1 else y.split(self.rows, dim=-1)

    def optimize(self) -> None:
        """Re-order the codes for the kernels of this machine, if it has any that want it."""

    def release(self) -> None:
        """Undo :meth:`optimize`."""


class _Product(torch.autograd.Function):
    """Keeps the codes for the backward pass, and not a dequantised copy of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Quantized) -> Tensor:
        ctx.kernel = kernel
        return kernel.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.kernel.dequantized(grads[0].dtype), None


class Int8(Quantized):
    """``codes`` (out, in) times ``scales`` (out): symmetric, a scale a row."""

    kind: ClassVar[str] = "int8"
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, rows: Sequence[int] = (), persistent: bool = True) -> None:
        super().__init__()
        self.rows = list(rows) or [codes.shape[0]]
        self.register_buffer("codes", codes, persistent)
        self.register_buffer("scales", scales, persistent)

    @staticmethod
    def fields(out: int, width: int, group: int = 0) -> Fields:
        """What :meth:`of` a weight (out, ``width``) makes."""
        return {"codes": ((out, width), torch.int8), "scales": ((out,), None)}

    @classmethod
    def of(cls, weight: Tensor, group: int = 0) -> Int8:
        """The nearest codes of ``weight`` (out, in)."""
        scales = (weight.abs().amax(1).float() / 127).clamp_min(1e-12).to(weight.dtype)

        def code(w: Tensor, s: Tensor) -> Tensor:
            return (w.float() / s.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)

        return cls(_by_rows(code, weight, scales), scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.scales.dtype

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in)."""
        return (self.codes.to(self.dtype) * self.scales[:, None]).to(dtype or self.dtype)

    def cut(self, axis: int, part: int, parts: int) -> Int8:
        """See :class:`Quantized`."""
        scales = self.scales if axis else self.scales.chunk(parts)[part]
        return Int8(self.codes.chunk(parts, axis)[part].contiguous().clone(), scales.clone())

    def lookup(self, ids: Tensor) -> Tensor:
        """Dequantised rows (..., in) of ids (...)."""
        return self.codes[ids].to(self.dtype) * self.scales[ids][..., None]

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        count = x.numel() // x.shape[-1]
        if count == 1 and x.device.type == "cpu" and torch.compiler.is_compiling():
            # Becomes a loop over the codes; the packed kernel took 1.4 times as long for one row.
            row = x.float().as_strided(x.shape[-1:], (1,))
            y = (self.codes.float() * row).sum(-1) * self.scales.float()
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        if count <= FEW and x.dtype == self.dtype == torch.bfloat16 and _int8_works(x.device.type):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            return torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales).view(*x.shape[:-1], -1)
        return F.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)


class Int4(Quantized):
    """``(code - 8) * scale + middle`` with both numbers for every ``group`` inputs of a row.

    ``codes`` (out, in / 2): two a byte, the even input in the low half. ``scales`` (in / group, out, 2).
    """

    kind: ClassVar[str] = "int4"
    scales: Tensor

    def __init__(
        self, codes: Tensor, scales: Tensor, rows: Sequence[int] = (), persistent: bool = True, packed: bool = False
    ) -> None:
        super().__init__()
        self.rows = list(rows) or [codes.shape[0]]
        self.packed, self._shape = packed, (scales.shape[1], 2 * codes.numel() // scales.shape[1])
        self.group = self._shape[1] // scales.shape[0]
        self.register_buffer("codes", codes, persistent)
        self.register_buffer("scales", scales, persistent)

    @staticmethod
    def fields(out: int, width: int, group: int) -> Fields:
        """What :meth:`of` a weight (out, ``width``) makes."""
        return {"codes": ((out, width // 2), torch.uint8), "scales": ((width // group, out, 2), None)}

    @classmethod
    def of(cls, weight: Tensor, group: int) -> Int4:
        """The nearest codes of ``weight`` (out, in).

        Raises:
            ValueError: when ``group`` does not divide the number of inputs.
        """
        if weight.shape[1] % group:
            good = [g for g in GROUPS if weight.shape[1] % g == 0]
            raise ValueError(f"a weight with {weight.shape[1]} inputs has no groups of {group}; of these: {good}")
        scales = _by_rows(lambda w: _ranges(w, group), weight)

        def code(w: Tensor, s: Tensor) -> Tensor:
            q = _nearest(w.float().unflatten(1, (-1, group)), s.float()).to(torch.uint8).flatten(1)
            return q[:, ::2] | q[:, 1::2] << 4

        return cls(_by_rows(code, weight, scales), scales.transpose(0, 1).contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.scales.dtype

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in)."""
        q = self._split().view(self.shape[0], -1, self.group).to(self.dtype)
        s = self.scales.transpose(0, 1)[..., None]  # (out, in / group, 2, 1)
        return torch.addcmul(s[:, :, 1], q - 8, s[:, :, 0]).flatten(1).to(dtype or self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        count = x.numel() // x.shape[-1]
        if not self.packed or x.dtype != torch.bfloat16 or self.dtype != torch.bfloat16 or count > FEW:
            return F.linear(x, self.dequantized(x.dtype))
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return _int4_product(rows, self.codes, self.group, self.scales.contiguous()).view(*x.shape[:-1], -1)

    def optimize(self) -> None:
        """Pack for torch's int4 kernel, where it takes this shape and multiplies rightly on this device."""
        fine = self.shape[0] % 16 == 0 and self.group in GROUPS and self.dtype == torch.bfloat16
        if self.packed or not fine or not _int4_works(self.device.type):
            return
        packed = _pack(self._split())
        if packed.device.type == "cpu" and not torch.equal(_unpack(packed, *self.shape), self._split()):
            return  # a layout that only the kernel can read: the weights could be neither dequantised nor saved
        self.codes, self.packed = packed, True

    def release(self) -> None:
        """Back to the layout that is saved."""
        if self.packed:
            self.codes, self.packed = self._portable(), False

    def cut(self, axis: int, part: int, parts: int) -> Int4:
        """See :class:`Quantized`."""
        check_cut(self.shape[1], axis, parts, self.group)
        codes, scales = self._portable().chunk(parts, axis)[part], self.scales.chunk(parts, 1 - axis)[part]
        return Int4(codes.contiguous().clone(), scales.contiguous().clone())

    def _split(self) -> Tensor:
        """Codes (out, in), one a byte."""
        if self.packed:
            return _unpack(self.codes, *self.shape)
        return torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)

    def _portable(self) -> Tensor:
        q = self._split()
        return q[:, ::2] | q[:, 1::2] << 4

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed and f"{prefix}codes" in destination:
            destination[f"{prefix}codes"] = self._portable()
            destination[f"{prefix}scales"] = self.scales.contiguous()

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.packed:
            raise ValueError("this model is packed for this machine; release it before loading other weights into it")
        super()._load_from_state_dict(*args)


def check_cut(width: int, axis: int, parts: int, group: int) -> None:
    """ValueError unless the ``width`` inputs of every part are whole groups."""
    if width % (group * (count := parts if axis else 1)):
        raise ValueError(f"{width} inputs are not {count} part(s) of whole groups of {group}")


class QuantizedTable(nn.Module):
    """An embedding table in int8, also the output projection of a tied model."""

    def __init__(self, kernel: Int8) -> None:
        super().__init__()
        self.kernel = kernel

    @property
    def weight(self) -> Tensor:
        """The dequantised table (V, D), made anew at every access."""
        return self.kernel.dequantized()

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (..., D) of ids (...)."""
        return self.kernel.lookup(ids)


def join(kernels: Sequence[Quantized]) -> Quantized | None:
    """One kernel for several that read the same input, which become views of it; None where they cannot be joined."""
    rows = [k.shape[0] for k in kernels]
    if all(type(k) is Int8 for k in kernels):
        made: Int8 | Int4 = Int8(torch.cat([k.codes for k in kernels]), _cat(kernels, 0), rows, persistent=False)
        scales = made.scales.split(rows)
    elif all(isinstance(k, Int4) and k.packed for k in kernels) and not any(n % 64 for n in rows):
        codes = torch.cat([k.codes for k in kernels])
        made = Int4(codes, _cat(kernels, 1), rows, persistent=False, packed=True)
        scales = made.scales.split(rows, dim=1)
    else:
        return None
    for kernel, codes, scale in zip(kernels, made.codes.split(rows), scales, strict=True):
        kernel.codes, kernel.scales = codes, scale
    return made


def _cat(kernels: Sequence[Any], dim: int) -> Tensor:
    return torch.cat([k.scales for k in kernels], dim)


def _by_rows(function: Callable[..., Tensor], weight: Tensor, *rest: Tensor) -> Tensor:
    """``function`` of some rows at a time, put together."""
    step = max(1, _CHUNK // weight.shape[1])
    return torch.cat([function(*(t[i : i + step] for t in (weight, *rest))) for i in range(0, len(weight), step)])


def _nearest(w: Tensor, s: Tensor) -> Tensor:
    """Codes (n, G, g) of weights (n, G, g) for scales and middles (n, G, 2)."""
    return ((w - s[..., 1:]) / s[..., :1]).round_().add_(8).clamp_(0, 15)


def _ranges(weight: Tensor, group: int) -> Tensor:
    """Scale and middle (n, G, 2) for every group of ``weight`` (n, in), rounded to its dtype."""
    w = weight.float().unflatten(1, (-1, group))
    low, high = w.aminmax(dim=-1)
    best, least = torch.empty(0), torch.full_like(low, float("inf"))
    for share in SHRINK:
        scale = ((high - low) * (share / 15)).clamp_min(1e-12)
        # Codes run from -8 to 7 around the middle, so it lies half a step above the centre.
        s = torch.stack((scale, (high + low + scale) / 2), -1).to(weight.dtype).float()
        error = (w - ((_nearest(w, s) - 8) * s[..., :1] + s[..., 1:])).square_().sum(-1)
        best = s if not best.numel() else torch.where((error < least)[..., None], s, best)
        least = torch.minimum(error, least)
    return best.to(weight.dtype)


def _pack(q: Tensor) -> Tensor:
    """Codes (out, in), one a byte, as the kernel of their device wants them."""
    if q.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    return torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)


def _unpack(packed: Tensor, out: int, width: int) -> Tensor:
    """The inverse of :func:`_pack`: (out, in), one code a byte."""
    if packed.device.type != "cpu":
        # Only the kernel knows its layout; with scale 1 and middle 0 the product with an identity is the codes.
        unit = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, device=packed.device).expand(width // 32, out, 2)
        eye = torch.eye(width, dtype=torch.bfloat16, device=packed.device)
        return (_int4_product(eye, packed, 32, unit.contiguous()).t() + 8).to(torch.uint8)
    # Blocks of 64 rows lie input by input: 32 bytes with row i in the low and row i + 32 in the high half. What is left
    # of the rows is one narrower block of neighbouring pairs.
    whole = out // 64 * 64
    flat = packed.flatten()
    blocks = flat[: whole * width // 2].view(-1, width, 32)
    top = torch.cat((blocks & 15, blocks >> 4), -1).transpose(1, 2).reshape(whole, width)
    rest = flat[whole * width // 2 :].view(width, (out - whole) // 2)
    return torch.cat((top, torch.stack((rest & 15, rest >> 4), -1).flatten(1).t()))


def _int4_product(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    op = torch.ops.aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch.ops.aten._weight_int4pack_mm
    return op(x, packed, group, scales)


@lru_cache
def _int8_works(device: str) -> bool:
    """Whether torch multiplies int8 weights on this kind of device."""
    codes = torch.arange(64 * 64, device=device).remainder(255).sub(127).to(torch.int8).view(64, 64)
    x, ones = torch.ones(1, 64, dtype=torch.bfloat16, device=device), torch.ones(64, dtype=torch.bfloat16)
    return _agrees(lambda: torch.ops.aten._weight_int8pack_mm(x, codes, ones.to(device)), codes)


@lru_cache
def _int4_works(device: str) -> bool:
    """Whether torch multiplies int4 weights on this kind of device."""
    codes = torch.arange(64 * 64, device=device).mul(7).remainder(16).to(torch.uint8).view(64, 64)
    x = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    unit = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device=device).expand(2, 64, 2).contiguous()
    return _agrees(lambda: _int4_product(x, _pack(codes), 32, unit), codes)


def _agrees(product: Callable[[], Tensor], codes: Tensor) -> bool:
    """Whether ``product`` is that of ones with ``codes`` (out, in)."""
    wanted = codes.float().sum(1)
    try:
        with torch.inference_mode():
            found = product().float()[0]
    except (RuntimeError, NotImplementedError, AttributeError):  # no such kernel in this torch or on this device
        return False
    return torch.allclose(found, wanted, rtol=0.02, atol=2.0)
