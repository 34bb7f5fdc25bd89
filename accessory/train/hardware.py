"""Machines as data: what their makers state, what of it a training step is taken to reach, and this machine, measured.

Nothing here has been measured on a GPU: the shares in :data:`ASSUMED` are round numbers, and every plan says so.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.models.plan import KERNELS

GIB = 1 << 30


@dataclass(frozen=True)
class Efficiency:
    """What a step reaches of the stated numbers. ``product``, ``attention``: of the FLOP/s; ``memory``: of the
    bandwidth; ``link``: of both links; ``launch``: seconds that every call costs at least; ``reserve``: bytes that are
    not the allocator's (context, libraries, buffers of collectives); ``waste``: share of the memory that fragments.

    ``measured``: on the machine itself, not assumed.
    """

    product: float = 0.70
    attention: float = 0.45
    memory: float = 0.80
    link: float = 0.70
    launch: float = 6e-6
    reserve: int = 2 * GIB
    waste: float = 0.04
    measured: bool = False


ASSUMED = Efficiency()
MEASURED = Efficiency(1.0, 1.0, 1.0, 1.0, 0.0, KERNELS, 0.0, measured=True)


@dataclass(frozen=True)
class Machine:
    """One device of a kind. ``memory`` in bytes; ``bf16`` and ``fp32``: dense FLOP/s of products; ``bandwidth`` of its
    memory, ``link`` to another device of the node and ``network`` to another node, each in bytes/s and one direction;
    ``per_node``: devices of a node. ``cpu``: torch's kernels for a CPU run."""

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    cpu: bool = False
    efficiency: Efficiency = ASSUMED

    def seconds(self, flops: int, moved: int, itemsize: int, attention: bool) -> float:
        """Of one call: its products and its memory traffic side by side, and no less than a launch."""
        e = self.efficiency
        rate = (self.bf16 if itemsize <= 2 else self.fp32) * (e.attention if attention else e.product)
        return max(flops / rate, moved / (self.bandwidth * e.memory), e.launch)

    def between(self, ranks: int) -> float:
        """Bytes/s from one of ``ranks`` neighbours to the next: a ring is as slow as its slowest link."""
        return (self.link if ranks <= self.per_node else min(self.link, self.network)) * self.efficiency.link


# name: GiB that torch reports, TFLOP/s of dense bf16 products with fp32 sums and of plain fp32, then GB/s: memory,
# links inside of a node, network between nodes; devices of a node. Sources: NVIDIA's data sheets (H100, H200, A100,
# L40S; a peak that is stated with sparsity is halved) and architecture papers (GA102, AD102). NVLink is stated for both
# directions together and halved here; PCIe 4 x16 has 32 GB/s in one direction, PCIe 5 x16 64. The network is no part of
# a card: 400 Gb/s a GPU as in DGX H100, 200 as in DGX A100, 100 (L40S) and 10 (cards of work stations) are assumed.
_ROWS: dict[str, tuple[float, float, float, float, float, float, int]] = {
    "H100": (79.1, 989.4, 66.9, 3350, 450, 50, 8),
    "H100-PCIe": (79.1, 756, 51.2, 2000, 64, 50, 8),
    "H200": (139.7, 989.4, 66.9, 4800, 450, 50, 8),
    "A100-80": (79.1, 312, 19.5, 2039, 300, 25, 8),
    "A100-40": (39.4, 312, 19.5, 1555, 300, 25, 8),
    "L40S": (44.4, 362, 91.6, 864, 32, 12.5, 8),
    "RTX4090": (23.6, 165.2, 82.6, 1008, 32, 1.25, 4),
    "RTX3090": (23.6, 71.2, 35.6, 936, 32, 1.25, 4),
}
KINDS: dict[str, Machine] = {
    name: Machine(name, int(gib * GIB), half * 1e12, full * 1e12, memory * 1e9, link * 1e9, network * 1e9, per_node)
    for name, (gib, half, full, memory, link, network, per_node) in _ROWS.items()
}
THIS = "this"


def find_machine(name: str) -> Machine:
    """The machine of a kind: a name of :data:`KINDS`, spelt in any case, with or without blanks and dashes, or ``this``
    one, measured.

    Raises:
        ValueError: for any other name, with those that come near.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace(" ", "").replace("_", "")

    if plain(name) == THIS:
        return this_machine()
    known = {plain(kind): machine for kind, machine in KINDS.items()}
    known |= {"h100sxm": KINDS["H100"], "a100": KINDS["A100-80"], "4090": KINDS["RTX4090"], "3090": KINDS["RTX3090"]}
    if plain(name) in known:
        return known[plain(name)]
    near = [known[n].name for n in difflib.get_close_matches(plain(name), known, n=3)]
    said = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"kinds are {', '.join(KINDS)} and {THIS}"
    raise ValueError(f"--kind {name} is not known; {said}")


def with_rates(machine: Machine, tflops: float, gbs: float) -> Machine:
    """``machine`` where products and memory were measured: TFLOP/s in bf16 and GB/s, reached in place of assumed."""
    e, rate = machine.efficiency, tflops * 1e12
    reached = replace(e, product=rate / machine.bf16, memory=gbs * 1e9 / machine.bandwidth)
    return replace(machine, efficiency=reached)


def this_machine() -> Machine:
    """This computer's CPU as it is now: products and passes of a block's shapes, one call at least.

    Links are those between processes of one machine through torch's gloo.
    """
    half, full = (_products(dtype) for dtype in (torch.bfloat16, torch.float32))
    small = torch.ones(16)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    reached = replace(MEASURED, attention=_attention() / full, launch=best_of(lambda: small + small))
    return Machine(THIS, memory, half, full, _passes(), GLOO, GLOO, os.cpu_count() or 1, cpu=True, efficiency=reached)


GLOO = 1.0e9  # bytes/s between two processes of one machine


def _products(dtype: torch.dtype) -> float:
    x, w = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    return 2 * 512 * 576 * 1536 / best_of(lambda: F.linear(x, w))


def _passes() -> float:
    """Bytes/s through tensors of a block, more of them than caches hold: so a step finds its own."""
    rows = [torch.ones(512, 1536) for _ in range(24)]
    calls: tuple[tuple[Callable[[Tensor], Tensor], float], ...] = (
        (lambda x: x * x, 3.0), (F.silu, 2.0), (lambda x: x.to(torch.bfloat16), 1.5)
    )  # fmt: skip

    def through(call: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: [call(x) for x in rows]

    size = sum(x.nbytes for x in rows)
    return sum(n * size for _, n in calls) / sum(best_of(through(call)) for call, _ in calls)


def _attention() -> float:
    q = torch.ones(1, 8, 512, 64)
    return 4 * 8 * 512 * 512 * 64 / best_of(lambda: F.scaled_dot_product_attention(q, q, q))


def best_of(call: Callable[[], object], seconds: float = 0.1) -> float:
    """The least time of ``call`` that this process has computed, of as many calls as take so long: what others take
    from the machine does not count."""
    call()
    found, end = float("inf"), time.process_time() + seconds
    with torch.no_grad():
        while time.process_time() < end:
            begin = time.process_time()
            call()
            found = min(found, time.process_time() - begin)
    return found
