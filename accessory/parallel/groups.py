"""Process groups: who we are among the ranks, and the few collectives that training needs.

On one process none of this touches ``torch.distributed``: no group exists and every function is the identity. With
tensor parallelism (:func:`arrange`) consecutive ranks are a *tensor group* that shares one copy of the model and reads
the same rows; *data ranks* are those with the same place in their tensor groups. Without it all are data ranks.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 24  # elements of one flat all-reduce: 64 MB of fp32
Over = Literal["data", "tensor", "all"]
"""The ranks of a collective: those with other rows, those with other parts of the model, or every one."""
_GROUPS: dict[str, Any] = {}  # "tensor" and "data" beside the group of all, where they differ from it


@dataclass(frozen=True)
class World:
    """This process among ``size`` ranks, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device


def choose_device(name: str | None = None) -> torch.device:
    """The device of a name: ``cpu``, ``cuda`` (under torchrun the local rank's), ``cuda:N``; None is the best there is.

    Raises:
        ValueError: for another name, or a device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    wanted = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    if wanted is None:
        raise ValueError(f"device {name!r} is unknown; it is cpu, cuda or cuda:N")
    index = int(wanted[1] or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        there = f"the last one is cuda:{count - 1}" if count else "torch finds no CUDA device on this machine"
        raise ValueError(f"device cuda:{index} is not available: {there}")
    return torch.device("cuda", index)


def setup(device: str | None = None) -> World:
    """Join the group that torchrun describes in the environment; without torchrun there is none.

    ``device`` as in :func:`choose_device`. gloo serves the CPU, nccl CUDA.
    """
    where = choose_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return World(rank(), world_size(), where)


def shutdown() -> None:
    """Leave the group, if there is one; together, unless an error is on its way.

    A process whose peers still wait for it in its last collective was seen to abort at exit.
    """
    if dist.is_available() and dist.is_initialized():
        if sys.exc_info()[0] is None:
            dist.barrier()
        _GROUPS.clear()
        dist.destroy_process_group()


def arrange(tensor: Any, data: Any) -> None:
    """From now on these are the groups of tensor and of data ranks (:mod:`accessory.parallel.layers` makes them)."""
    _GROUPS.update(tensor=tensor, data=data)


def group(over: Over) -> Any:
    """The process group of these ranks; None is the one of all."""
    return _GROUPS.get(over)


def rank() -> int:
    """Number of this process, 0 on one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def tensor_size() -> int:
    """Number of ranks that share a copy of the model."""
    return dist.get_world_size(_GROUPS["tensor"]) if _GROUPS else 1


def tensor_rank() -> int:
    """Which part of the model this rank holds."""
    return rank() % tensor_size()


def data_size() -> int:
    """Number of copies of the model, each of which reads rows of its own."""
    return world_size() // tensor_size()


def data_rank() -> int:
    """Which of the copies this rank has a part of."""
    return rank() // tensor_size()


def beside() -> Any:
    """A new group of all ranks on the CPU, for a thread beside the training; None on one process. All ranks call it."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def _size(over: Over) -> int:
    return {"data": data_size, "tensor": tensor_size, "all": world_size}[over]()


def all_reduce(tensor: Tensor, op: Literal["sum", "max"] = "sum", over: Over = "data") -> Tensor:
    """Sum or maximum over the ranks, in place; returns the tensor."""
    if _size(over) > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group(over))
    return tensor


def all_reduce_many(tensors: Sequence[Tensor]) -> None:
    """Sum every tensor over the data ranks, in place, a few large messages instead of many small ones."""
    if data_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group("data"))
        _spread(flat, bucket)


def _spread(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        fits = buckets and size + tensor.numel() <= BUCKET and buckets[-1][0].dtype == tensor.dtype
        if not fits:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets


def broadcast_many(tensors: Sequence[Tensor], over: Over = "data") -> None:
    """Give every rank the values of the first one, in place."""
    if _size(over) == 1:
        return
    first = {"data": tensor_rank(), "tensor": data_rank() * tensor_size(), "all": 0}[over]
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.broadcast(flat, first, group(over))
        _spread(flat, bucket)


def gather(tensor: Tensor, over: Over) -> list[Tensor]:
    """The tensors of these ranks in their order, on each of them; all have one shape."""
    if _size(over) == 1:
        return [tensor]
    out = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(_size(over))]
    dist.all_gather(out, tensor.contiguous(), group(over))
    return out


def gather_objects(value: Any, over: Over = "all", among: Any = None) -> list[Any]:
    """The picklable ``value`` of these ranks, in their order, on every one of them.

    ``among``: a group of :func:`beside` to ask in.
    """
    if _size(over) == 1:
        return [value]
    out: list[Any] = [None] * _size(over)
    dist.all_gather_object(out, value, among or group(over))
    return out
