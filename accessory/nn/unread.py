"""Weights that have not been read: a model of them stands on the meta device until parts of it are asked for.

Whoever spreads a model over ranks cuts it first and reads afterwards, so that no rank ever holds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from accessory.nn.linear import Linear
from accessory.nn.quantized import Quantized

Cut = tuple[int, int, int]
"""An axis, the number of a part, and how many equal parts there are."""
_NOTE = "unread"


class Reader(Protocol):
    """Reads a tensor, or the part of it that ``cut`` names."""

    def __call__(self, cut: Cut | None = None) -> Tensor: ...


class Later(Quantized):
    """Stands for a quantised weight (out, in) until :meth:`made` reads it, quantises it whole and keeps its part."""

    kind: ClassVar[str] = "later"

    def __init__(self, make: Callable[[], Quantized], shape: tuple[int, int], dtype: torch.dtype, group: int) -> None:
        super().__init__()
        self.rows, self.group = [shape[0]], group
        self._make, self._shape, self._dtype = make, shape, dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """What the layer will compute in."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """None of its codes lie anywhere yet."""
        return torch.device("meta")

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """ValueError: there is nothing to compute with."""
        raise ValueError(f"a weight {self._shape} has not been read yet; spread the model over its ranks first")

    def cut(self, axis: int, part: int, parts: int) -> Later:
        """See :class:`accessory.nn.quantized.Quantized`."""
        rows, width = (size // (parts if axis == i else 1) for i, size in enumerate(self._shape))
        return Later(lambda: self._make().cut(axis, part, parts), (rows, width), self._dtype, self.group)

    def made(self) -> Quantized:
        """The kernel itself."""
        return self._make()


def note(model: nn.Module, readers: Mapping[str, Reader]) -> None:
    """Parameters of ``model`` on the meta device are what ``readers`` give by name."""
    vars(model)[_NOTE] = dict(readers)  # plain Python: in no state dict


def noted(model: nn.Module) -> dict[str, Reader]:
    """Readers of everything inside ``model`` that is unread, by full name."""
    found: dict[str, Reader] = {}
    for path, module in model.named_modules():
        readers = cast("dict[str, Reader]", vars(module).get(_NOTE, {}))
        found |= {f"{path}.{name}" if path else name: reader for name, reader in readers.items()}
    return found


def point(model: nn.Module, readers: Mapping[str, Reader]) -> None:
    """What of ``readers`` names something unread is read in the place of what was noted."""
    for path, module in model.named_modules():
        own = cast("dict[str, Reader]", vars(module).get(_NOTE, {}))
        for name in own:
            full = f"{path}.{name}" if path else name
            own[name] = readers.get(full, own[name])


@torch.no_grad()
def read(
    model: nn.Module,
    names: Collection[str] | None = None,
    axes: Mapping[str, int] | None = None,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Read the unread parameters of ``model``, or those of them in ``names`` alone, into memory of their own.

    Of parameters named in ``axes`` it is part ``part`` of ``parts`` along that axis.

    Raises:
        ValueError: for a tensor that is not of the shape of its parameter.
    """
    readers = noted(model)
    for name in readers if names is None else names:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        parameter = holder.get_parameter(leaf)
        if not parameter.is_meta:
            continue
        value = readers[name](None if axes is None or name not in axes else (axes[name], part, parts))
        if value.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, the model needs {tuple(parameter.shape)}")
        own = torch.empty(value.shape, dtype=parameter.dtype).copy_(value)
        holder.register_parameter(leaf, nn.Parameter(own, requires_grad=parameter.requires_grad))


def make(model: nn.Module) -> None:
    """Read and quantise what :class:`Later` stands for inside ``model``, layer by layer."""
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.kernel, Later):
            module.kernel = module.kernel.made()


def read_as(reader: Reader, dtype: torch.dtype) -> Reader:
    """``reader``, rounded to ``dtype``."""

    def rounded(cut: Cut | None = None) -> Tensor:
        return reader(cut).to(dtype)

    return rounded


def held(tensor: Tensor) -> Reader:
    """A tensor that is in memory (or mapped) already."""

    def part(cut: Cut | None = None) -> Tensor:
        return tensor if cut is None else tensor.chunk(cut[2], cut[0])[cut[1]]

    return part
