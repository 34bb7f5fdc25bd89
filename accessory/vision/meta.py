"""Towers without weights: built on the device ``meta``, where running one tells what encoding takes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from accessory.vision import presets
from accessory.vision.mixture import Member, MixtureConfig, build_mixture
from accessory.vision.tower import Tower
from accessory.vision.towers import TowerConfig, build_tower

# Encoders are built once and shared, by the text of their configuration: nothing is computed with them.
_built: dict[str, Tower] = {}


@dataclass(frozen=True)
class Encoding:
    """What one tile takes: ``flops`` of its products, ``peak`` bytes of results that live together at most, the
    weights aside."""

    flops: int
    peak: int


def tower_of(preset: str) -> Tower:
    """A preset's tower on ``meta``; encoders that presets have in common are the same modules."""
    config = presets.find(preset)
    if isinstance(config, TowerConfig):
        return _encoder(config)
    with torch.device("meta"):
        return build_mixture(config, _member)


def _member(member: Member) -> Tower:
    return _encoder(member.config)


def _encoder(config: TowerConfig) -> Tower:
    if repr(config) not in _built:
        with torch.device("meta"):
            _built[repr(config)] = build_tower(config)
    return _built[repr(config)]


@functools.cache
def encoding(preset: str) -> Encoding:
    """What a preset's tower takes for one tile, with all of its views, in the precision that it is built in (fp32).

    Encoders are run one by one on ``meta``; what a mixture keeps of one while the next runs is added.
    """
    config = presets.find(preset)
    if not isinstance(config, MixtureConfig):
        return _run(preset, "")
    tower: Any = tower_of(preset)
    flops = peak = held = joined = 0
    for member in (*config.extra, *config.channel):
        one, made = _run(preset, member.name), tower.member(member.name)
        pixels = 3 * 4 * made.size**2  # of a view, made for this encoder
        peak = max(peak, held + tower.views * (one.peak + pixels))
        flops += tower.views * one.flops
        cells = made.grid if member in config.extra else tower.grid  # coarser maps are repeated
        kept = 4 * tower.views * made.width * cells[0] * cells[1]
        held, joined = held + kept, joined + (kept if member in config.channel else 0)
    # The maps side by side, the same with the class token in front, and a third time as token groups.
    return Encoding(flops, max(peak, held + 2 * joined))


@functools.cache
def _run(preset: str, member: str) -> Encoding:
    """One encoder and one picture of its size."""
    config = presets.find(preset)
    if isinstance(config, MixtureConfig):
        config = next(m.config for m in (*config.channel, *config.extra) if m.name == member)
    tower = _encoder(config)
    pixels = torch.empty(1, 3, tower.size, tower.size, device="meta")
    counter = Counter(tower)
    kept = [p for p in tower.parameters() if p.requires_grad]
    for p in kept:  # without gradients, whatever the mode is that this is called in
        p.requires_grad_(False)
    with torch.inference_mode(False), torch.no_grad(), counter:
        found = tower.tokens(pixels)
    for p in kept:
        p.requires_grad_(True)
    del found
    return Encoding(counter.flops, counter.peak)


class Counter(TorchDispatchMode):
    """What runs inside of it: FLOPs of the products, and the bytes of all results that are alive, at most.

    Scores of attention are not counted: kernels compute them block by block, while ``meta`` only knows the formula."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        tensors: Sequence[Tensor] = (*module.parameters(), *module.buffers())
        self._alive = {t.untyped_storage()._cdata: 0 for t in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # libraries ask whether a mask is full, which it is: no tile is padded
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else int(count(*args, **(kwargs or {}), out_val=out))
        self.flops += flops
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fresh = [self._add(tensor, func) for tensor in made]
        self.peak = max(self.peak, self.now)
        self.seen(func, (args, kwargs), flops, any(fresh), made)
        return out

    def seen(self, func: Any, given: Any, flops: int, fresh: bool, made: Sequence[Tensor]) -> None:
        """A call that has run; ``fresh``: what it ``made`` lies in new memory. For subclasses."""

    def size(self, tensor: Tensor, func: Any) -> int:
        """Bytes that count for a result of ``func``."""
        scores = func is torch.ops.aten._safe_softmax.default or (
            func is torch.ops.aten.bmm.default and tensor.shape[-1] == tensor.shape[-2]
        )
        return 0 if scores else tensor.untyped_storage().nbytes()

    def _add(self, tensor: Tensor, func: Any) -> bool:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return False
        self._alive[storage._cdata] = self.size(tensor, func)
        self.now += self._alive[storage._cdata]
        weakref.finalize(storage, self._free, storage._cdata)
        return True

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)
