"""What a training run takes of a device's memory: counted where it is certain, traced without computing where not."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from accessory.models.mllm import MLLM
from accessory.parallel.layout import Layout
from accessory.train.config import TrainConfig
from accessory.train.optim import moment_bytes

FULL = 4  # bytes of a number in fp32, in which what trains is updated


@dataclass(frozen=True)
class Footprint:
    """Bytes. ``activations``: what the longest batch keeps for its backward pass; None where that is not known."""

    weights: int
    gradients: int
    optimizer: int  # moments, masters of what is not fp32, and the running average
    activations: int | None = None

    @property
    def certain(self) -> int:
        """What the run takes whatever its batches are."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All at once, as far as it is known."""
        return self.certain + (self.activations or 0)


def standing(net: nn.Module, config: TrainConfig, layout: Layout | None = None, copies: int = 1) -> Footprint:
    """What stands in memory of a net and its optimizer, with the moments that it keeps.

    ``layout``: how parameters will lie on the ranks (:func:`accessory.parallel.shard.planned`), among which are
    ``copies`` data ranks; it is of the rank that holds most.
    """
    layout = layout or Layout()
    named = (*net.named_parameters(), *net.named_buffers())
    weights = sum(t.element_size() * layout.share(name, t, copies) for name, t in named)
    gradients = optimizer = 0
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        number = layout.share(name, p, copies)
        gradients += FULL * number
        others = int(p.dtype != torch.float32) + int(config.ema is not None)
        optimizer += moment_bytes(config, name, p, number) + FULL * number * others
    return Footprint(weights, gradients, optimizer)


@dataclass(frozen=True)
class Shape:
    """The longest batch: ``rows`` of ``positions``, of which ``learned`` in all, with ``tiles``. Packed samples are one
    row."""

    rows: int
    positions: int
    learned: int
    tiles: int


def activations(net: MLLM, shape: Shape, config: TrainConfig, device: torch.device, language: bool = True) -> int:
    """Bytes that one forward pass over a batch keeps for the backward pass.

    The pass goes over shapes alone: nothing is computed or allocated. Where blocks are checkpointed it keeps the input
    of each, and what one of them keeps while it runs again. Not for quantised weights, whose kernels are chosen by
    trying them. ``language``: whether the backbone runs.
    """
    wide = config.precision == "bf16" and (device.type == "cuda" or config.cpu_autocast)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.autocast("cpu", torch.bfloat16, enabled=wide, cache_enabled=False),
    ):
        # A view of a parameter that is taken here belongs to its stand-in.
        standing = [mode.from_tensor(t) for t in (*net.parameters(), *net.buffers())]
        if config.loss_chunk is not None:  # so many have their scores at a time
            shape = replace(shape, learned=min(shape.learned, config.loss_chunk))
        return kept(net, shape, standing, config.block_checkpointing, language)


def kept(
    net: MLLM, shape: Shape, standing: Sequence[Tensor], checkpointing: bool = False, language: bool = True
) -> int:
    """Bytes that a forward pass keeps beside the tensors in ``standing``."""
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers(), *standing)}
    seen, total = None, 0
    if net.tower is not None:
        tiles = torch.zeros(shape.tiles, 3, net.tower.size, net.tower.size)
        seen, total = saved(lambda: _seen(net, tiles), own)
    if not language:
        return total
    x = net.backbone.embed(torch.zeros(shape.rows, shape.positions, dtype=torch.long))
    if seen is not None and seen.requires_grad:  # what enters at some positions has a gradient everywhere
        x = x + seen.sum().to(x.dtype)
    h, layers = saved(lambda: net.backbone(x), own)
    if checkpointing:
        number = len(net.backbone.layers)
        layers = number * x.numel() * x.element_size() + layers // number
    return total + layers + saved(lambda: _scored(net, h, shape.learned), own)[1]


def _seen(net: MLLM, tiles: Tensor) -> Tensor:
    if net.projector is not None:
        return net.encode(tiles)
    return net.prefixes(tiles)


def _scored(net: MLLM, h: Tensor, learned: int) -> Tensor:
    logits = net.logits(h.flatten(0, 1)[:learned]).float()
    return F.cross_entropy(logits, torch.zeros(learned, dtype=torch.long), reduction="sum")


def saved(run: Callable[[], Tensor], own: Collection[int]) -> tuple[Tensor, int]:
    """What ``run`` returns, and the bytes that its graph keeps beside the storages in ``own``."""
    found: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage()._cdata] = (t, t.untyped_storage().nbytes())  # alive, so that none takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out, sum(n for key, (_, n) in found.items() if key not in own)


def memory(device: torch.device) -> int:
    """Bytes that a device has in all; of the CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
