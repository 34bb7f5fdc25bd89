"""Which part of every tensor lies on which rank: cutting whole tensors, joining parts, norms of what is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.parallel import groups


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share a model. Each ``tensor`` consecutive ones hold one copy of it, and read the same rows.

    ``data``: among copies, ``ddp`` keeps all of it on each; ``fsdp`` cuts the parameters of every block, their
    gradients and their moments into as many parts as there are copies.
    """

    tensor: int = 1
    data: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        if self.tensor < 1:
            raise ValueError(f"parallel.tensor is {self.tensor}, it must be at least 1")


@dataclass(frozen=True)
class Place:
    """Where parts of a parameter lie. ``axis``: cut over the ranks of a tensor group, None: each holds all of it.
    ``rows``: of the tensor rank's part, cut over the data ranks; None: each holds all of them."""

    axis: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Layout:
    """A plan and the places of parameters by name; one that is not listed lies whole on every rank.

    Tensors named ``moment/parameter`` lie as their parameter does; a scalar is the same everywhere.
    """

    plan: ParallelConfig = field(default_factory=ParallelConfig)
    places: Mapping[str, Place] = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """Of the parameter ``name``, or of the one that ``moment/name`` belongs to."""
        return self.places.get(name.rpartition("/")[2], Place())

    def numel(self, name: str, parameter: Tensor) -> int:
        """Entries of the whole parameter."""
        return parameter.numel() * (1 if self.place(name).axis is None else self.plan.tensor)

    def share(self, name: str, whole: Tensor, copies: int) -> int:
        """Entries of a ``whole`` tensor on the rank that holds most of them, among ``copies`` data ranks."""
        place = self.place(name)
        number = whole.numel() // (1 if place.axis is None else self.plan.tensor)
        return number if place.rows is None else number // place.rows * -(-place.rows // copies)

    def summed(self, name: str) -> bool:
        """Whether the backward pass itself has summed the gradient over the data ranks."""
        return self.place(name).rows is not None

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors of what all ranks hold parts of, on rank 0 and in its main memory; nothing elsewhere.

        One tensor at a time is gathered; every rank must call this with the same names in the same order.
        """
        if not self.places:
            return {name: local(tensor) for name, tensor in tensors.items()}
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part = local(tensor.detach())
            place = self.place(name)
            if part.ndim and place.rows is not None:
                part = _joined_rows(part, place.rows)
            if part.ndim and place.axis is not None:
                part = torch.cat(groups.gather(part, "tensor"), place.axis)
            if groups.rank() == 0:
                out[name] = part.cpu()
        return out

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors: the inverse of :meth:`whole`.

        Raises:
            ValueError: for a tensor that cannot be cut so, naming it.
        """
        return {name: self._own(name, tensor) for name, tensor in tensors.items()}

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        begin, sizes = self.part(name, tensor.shape)
        return tensor[tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))]

    def part(self, name: str, shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """Where this rank's part of a whole tensor lies in it: the first index and the length along every axis.

        Raises:
            ValueError: for a tensor that cannot be cut so, naming it.
        """
        place, begin, sizes = self.place(name), [0] * len(shape), list(shape)
        if sizes and place.axis is not None:
            sizes[place.axis] = even(name, shape, place.axis)
            begin[place.axis] = groups.tensor_rank() * sizes[place.axis]
        if sizes and place.rows is not None:
            if sizes[0] != place.rows:
                raise ValueError(f"{name} has {sizes[0]} rows on a tensor rank, not {place.rows}")
            size = -(-place.rows // groups.data_size())
            start = min(groups.data_rank() * size, place.rows)
            begin[0] += start
            sizes[0] = min(size, place.rows - start)
        return begin, sizes

    def whole_shape(self, name: str, part: Tensor) -> list[int]:
        """Shape of the whole tensor that this is this rank's part of."""
        place, shape = self.place(name), list(part.shape)
        if shape and place.rows is not None:
            shape[0] = place.rows
        if shape and place.axis is not None:
            shape[place.axis] *= self.plan.tensor
        return shape

    def agree(self, gradients: Mapping[str, Tensor]) -> None:
        """Give all ranks of a tensor group the first one's gradients of what each of them holds whole, in place.

        They are equal but for the order in which a device added up; without this, copies would drift apart.
        """
        if self.plan.tensor > 1:
            groups.broadcast_many([g for n, g in gradients.items() if self.place(n).axis is None], "tensor")

    def norms(self, parts: Mapping[str, Mapping[str, Tensor]], order: float = 2.0) -> dict[str, Tensor]:
        """Norms of whole gradients, from labels to the norms of this rank's parts by parameter name."""
        if not self.places:
            return {n: torch.linalg.vector_norm(torch.stack(list(p.values())), order) for n, p in parts.items()}
        rows = []
        for found in parts.values():
            local_norms = torch.stack(list(found.values())).double()
            if order == torch.inf:
                rows.append(local_norms.max())
            else:
                # A part that several ranks hold is counted by each of them for its share.
                shares = torch.tensor([1 / self._copies(n) for n in found], dtype=torch.float64)
                rows.append((local_norms**order * shares.to(local_norms.device)).sum())
        total = groups.all_reduce(torch.stack(rows), "max" if order == torch.inf else "sum", "all")
        total = total if order == torch.inf else total ** (1 / order)
        return dict(zip(parts, total.float().unbind(), strict=True))

    def _copies(self, name: str) -> int:
        place = self.place(name)
        return (self.plan.tensor if place.axis is None else 1) * (groups.data_size() if place.rows is None else 1)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(name: str, tensor: Tensor, axis: int) -> Tensor:
    """This tensor rank's part of a whole tensor, a view of it; ValueError where it cannot be cut evenly."""
    size = even(name, tensor.shape, axis)
    return tensor.narrow(axis, groups.tensor_rank() * size, size)


def even(name: str, shape: Sequence[int], axis: int) -> int:
    """Length along ``axis`` of a tensor rank's part of a tensor of this shape; ValueError where it is no whole one."""
    size = groups.tensor_size()
    if axis >= len(shape) or shape[axis] % size:
        raise ValueError(f"parallel.tensor {size} does not divide axis {axis} of {name} {tuple(shape)}")
    return shape[axis] // size


def _joined_rows(part: Tensor, rows: int) -> Tensor:
    size = -(-rows // groups.data_size())
    padded = part.new_zeros(size, *part.shape[1:])
    padded[: len(part)] = part
    return torch.cat(groups.gather(padded, "data"))[:rows]
