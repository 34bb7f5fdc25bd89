"""fairscale's tensor-parallel layers with the slots of our linear: the only file that knows fairscale.

Adapters beside a cut weight keep their gradients right by where the ranks meet: what every rank holds whole is applied
to what every rank has whole (so its gradient is the same everywhere and needs no sum), and the meeting lies between the
two factors of a low-rank delta, where there is least to send.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
    scatter_to_model_parallel_region,
)
from torch import Tensor, nn

from accessory.nn.linear import Linear, product
from accessory.nn.quantized import Quantized
from accessory.parallel import groups
from accessory.parallel.axes import SUFFIXES
from accessory.parallel.layout import share


def start(width: int) -> None:
    """Make groups of ``width`` consecutive ranks, unless they are there already.

    Raises:
        ValueError: when the number of processes is not a multiple of ``width``.
    """
    if groups.world_size() % width:
        raise ValueError(
            f"parallel.tensor is {width}, but {groups.world_size()} process(es) run; start a multiple of it, e.g. "
            f"torchrun --nproc-per-node {width}"
        )
    if width == groups.tensor_size():
        return
    if initialize.model_parallel_is_initialized():
        initialize.destroy_model_parallel()  # of a group that was left since
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        initialize.initialize_model_parallel(width)
    groups.arrange(initialize.get_model_parallel_group(), initialize.get_data_parallel_group())


def copied(x: Tensor) -> Tensor:
    """``x``, whose gradient is the sum of those of all tensor ranks: the way from what is whole to what is cut."""
    return cast(Tensor, copy_to_model_parallel_region(x))


def summed(x: Tensor) -> Tensor:
    """The sum of the tensor ranks' ``x``: the way from what is cut to what is whole."""
    return cast(Tensor, reduce_from_model_parallel_region(x))


class Entrance:
    """:func:`copied` for ``readers`` layers that read one tensor in turn: their gradients are summed together, once."""

    def __init__(self, readers: int = 1) -> None:
        self._readers, self._left = readers, 0
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` for one of the readers."""
        if self._last is None or self._last[0] is not x:
            self._last, self._left = (x, copied(x)), self._readers
        shared = self._last[1]
        self._left -= 1
        if not self._left:
            self._last = None  # nothing is kept alive that the graph does not need
        return shared


class ColumnLinear(Linear, ColumnParallelLinear):
    """Some output rows of a linear: (..., in) -> (..., out / ranks), or all of them with ``gather``."""

    def __init__(self, plain: Linear, entrance: Entrance, gather: bool = False) -> None:
        _make(self, ColumnParallelLinear, plain, gather_output=gather)
        _adopt(self, plain, row=False, between=copied)
        self.entrance = entrance

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to this rank's part of (..., out_features)."""
        kernel, shared = self.kernel, self.entrance(x)
        if kernel is not None and kernel.fits(self.weight):
            y = self.finish(kernel.joined(shared), x)
        else:
            y = self._adapt(product(shared, self.weight, None if self.bias is None else self.bias.to(x.dtype)), x)
        return cast(Tensor, gather_from_model_parallel_region(y)) if self.gather_output else y


class RowLinear(Linear, RowParallelLinear):
    """Some input columns of a linear: this rank's part of (..., in) -> the whole (..., out)."""

    def __init__(self, plain: Linear) -> None:
        _make(self, RowParallelLinear, plain, input_is_parallel=True)
        _adopt(self, plain, row=True, between=summed)

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's part of (..., in_features) to (..., out_features)."""
        kernel = self.kernel
        if kernel is not None and kernel.fits(self.weight):
            return self.finish(summed(kernel.joined(x)), x)
        return self.finish(summed(product(x, self.weight)), x)


class Embedding(ParallelEmbedding):
    """A table of which every rank holds part of the width; (B, T) -> (B, T, D)."""

    weight: Tensor

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, init_method=_leave)
        self.weight = cut("tok_embeddings.weight", plain.weight, 1)


class TiedOutput(nn.Module):
    """The table as output projection, in the backbone's slot ``output_kernel``: every rank multiplies its part of the
    width, and the scores are summed."""

    def __init__(self, table: Embedding) -> None:
        super().__init__()
        self._table = (table,)  # not a child: its parameter belongs to the embedding

    def fits(self, weight: Tensor) -> bool:
        """Always: it reads the table itself."""
        return True

    def forward(self, h: Tensor) -> tuple[Tensor]:
        """(..., D) -> (..., V), alone in a tuple as the slot wants it."""
        return (summed(F.linear(scatter_to_model_parallel_region(h), self._table[0].weight)),)


def cut(name: str, parameter: Tensor, axis: int) -> nn.Parameter:
    """This rank's part of a parameter, in memory of its own so that the whole can go."""
    part = share(name, parameter.detach(), axis).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _leave(weight: Tensor) -> Tensor:
    """No values: those of the plain layer follow."""
    return weight


def _make(layer: Any, base: type[Any], plain: Linear, **options: Any) -> None:
    base.__init__(layer, plain.in_features, plain.out_features, bias=False, init_method=_leave, **options)
    layer.register_module("delta", None)
    layer.register_parameter("scale", None)
    layer.register_module("kernel", None)


def _adopt(layer: Any, plain: Linear, row: bool, between: Callable[[Tensor], Tensor]) -> None:
    """Move all that hangs on ``plain`` to ``layer``, with what is cut cut."""
    for name, value in vars(plain).items():
        if not name.startswith("_") and name not in vars(layer):
            setattr(layer, name, value)  # marks of whoever attached something
    if plain.delta is not None:
        if not hasattr(plain.delta, "between"):
            raise ValueError(f"parallel.tensor cannot cut a delta of type {type(plain.delta).__name__}, only LowRank")
        delta: Any = plain.delta
        delta.between, delta.cut_input = between, (groups.tensor_rank(), groups.tensor_size()) if row else None
        layer.delta = delta
    if plain.kernel is not None:  # quantised
        layer.register_parameter("weight", None)
        layer.kernel = cast(Quantized, plain.kernel).cut(int(row), groups.tensor_rank(), groups.tensor_size())
    for name, parameter in list(plain.named_parameters()):
        axis = cast("int | None", SUFFIXES[name][row])
        owner, _, leaf = name.rpartition(".")
        holder = layer.get_submodule(owner) if owner else layer
        holder.register_parameter(leaf, parameter if axis is None else cut(name, parameter, axis))
    layer.train(plain.training)
