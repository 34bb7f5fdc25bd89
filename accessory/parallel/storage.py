"""Tensors that ranks hold parts of, in one folder: each rank writes some and reads its own, whoever wrote them.

The files are safetensors with the place of each part in their headers, as ``torch.distributed.checkpoint`` has them.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, TensorWriteData, WriteItem
from torch.distributed.checkpoint.planner import WriteItemType as Kind
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from accessory.parallel.layout import Layout, local

_FILE = 1 << 29  # bytes of a file: it is put together in memory before it is written


def write(folder: Path, tensors: Mapping[str, Tensor], layout: Layout, group: Any = None) -> list[str]:
    """Put the parts of all ranks into ``folder``, forced to the disk. What several ranks hold, one of them writes.

    Every rank calls this with the same names; ``group``: of all ranks, on the CPU, None on one process.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        Exception: on every rank, the first that there was on any.
    """
    total, files = 0, {}
    for name, tensor in tensors.items():
        files[name] = 1 + total // _FILE
        total += local(tensor).numel() * tensor.element_size()
    writer = _Writer(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    alone = group is None
    with _told():
        save(dict(tensors), storage_writer=writer, planner=_Save(layout), process_group=group, no_dist=alone)
    return [*writer.files]


def read(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """This rank's parts of all tensors in ``folder``, in main memory. Ranks need not read together.

    Raises:
        ValueError: for a tensor that cannot be cut as ``layout`` says.
        Exception: for files that cannot be read.
    """
    planner = _Load(layout)
    with _told():
        load({}, storage_reader=HuggingFaceStorageReader(str(folder)), planner=planner, no_dist=True)
    return planner.parts


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise what went wrong itself: the exception that gathers it from all ranks is none that programs expect."""
    # On one process, and where each rank reads for itself, it is said at every call that there is one process.
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    try:
        yield
    except CheckpointException as error:
        found = [failure for failure, _ in error.failures.values()]
        raise found[0] from None


class _Writer(HuggingFaceStorageWriter):
    files: Sequence[str] = ()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        done = super().write_data(plan, planner)
        self.files = sorted({str(result.storage_data.relative_path) for result in done.value()})
        return done


class _Save(DefaultSavePlanner):
    def __init__(self, layout: Layout) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._layout = layout

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items())
        return self.plan

    def _items(self) -> list[WriteItem]:
        items = []
        for name, tensor in self.state_dict.items():
            part = local(tensor)
            whole = self._layout.whole_shape(name, part)
            begin, sizes = self._layout.part(name, whole)
            if math.prod(sizes) or not math.prod(whole):  # of few rows, the last ranks may have none
                chunk = ChunkStorageMetadata(torch.Size(begin), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), torch.Size(whole))
                items.append(WriteItem(MetadataIndex(name, chunk.offsets), Kind.SHARD, tensor_data=data))
        return items

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        # safetensors refuses tensors that share memory or have strides, which a state may legitimately have.
        part = local(self.state_dict[index.fqn].detach())
        return torch.empty(part.shape, dtype=part.dtype).copy_(part)


class _Load(DefaultLoadPlanner):
    def __init__(self, layout: Layout) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._layout = layout
        self._chunks: dict[str, tuple[TensorStorageMetadata, ChunkStorageMetadata]] = {}
        self.parts: dict[str, Tensor] = {}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for name, stored in (metadata.state_dict_metadata if metadata else {}).items():
            assert isinstance(stored, TensorStorageMetadata)  # safetensors hold nothing else
            begin, sizes = self._layout.part(name, stored.size)
            self.parts[name] = torch.empty(sizes, dtype=stored.properties.dtype)
            self._chunks[name] = stored, ChunkStorageMetadata(torch.Size(begin), torch.Size(sizes))

    def create_local_plan(self) -> LoadPlan:
        wanted = [(n, stored, chunk) for n, (stored, chunk) in self._chunks.items() if self.parts[n].numel()]
        return LoadPlan([item for n, stored, c in wanted for item in create_read_items_for_chunk_list(n, stored, [c])])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn]
