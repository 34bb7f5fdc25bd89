"""Layouts of a training run over N devices: bytes of every rank and seconds of an update, for each and the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from accessory.backbone.llama import LlamaConfig
from accessory.models.mllm import MLLM
from accessory.nn.linear import Linear
from accessory.parallel.axes import shard_rule
from accessory.parallel.groups import BUCKET
from accessory.parallel.layout import ParallelConfig
from accessory.peft.quantize import Quantization, targets
from accessory.train.config import TrainConfig
from accessory.train.hardware import Machine
from accessory.train.optim import moment_bytes
from accessory.train.stages import Net, Rows, Stages
from accessory.train.trace import Op, Part, Setting

FULL = 4  # bytes of a number in fp32, as which all that trains is kept


@dataclass(frozen=True)
class Choice:
    """A way to spread a run over ``ranks`` devices; ``batch`` rows at once, ``accumulation`` times an update."""

    ranks: int
    parallel: ParallelConfig
    checkpointing: bool
    batch: int
    accumulation: int

    @property
    def copies(self) -> int:
        """Data ranks."""
        return self.ranks // self.parallel.tensor

    @property
    def cut(self) -> int:
        """Into how many parts data ranks cut the blocks."""
        return self.copies if self.parallel.data == "fsdp" else 1


@dataclass(frozen=True)
class Shares:
    """Bytes that a rank keeps from the first step to the last, and what FSDP gathers and trains.

    ``units``: whole bytes of the table, of one block and of the output, as a tensor rank has them. ``whole``: trained
    numbers that every data rank holds, of ``trained`` ones on this rank. ``alike``: those of them that tensor ranks
    hold alike. ``largest``: of the trained ones that are whole.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    units: dict[str, int]
    trained: int
    whole: int
    alike: int
    largest: int


@dataclass(frozen=True)
class Sent:
    """Bytes of the results that a rank communicates in an update, by what for."""

    tensor_reduced: int = 0
    tensor_gathered: int = 0
    tensor_broadcast: int = 0
    data_reduced: int = 0
    data_gathered: int = 0
    data_scattered: int = 0


@dataclass(frozen=True)
class Budget:
    """What a choice takes. Bytes on each rank at the peak: ``activations`` is what a step holds beside the rest,
    gathered parameters of FSDP aside (``buffers``). Seconds of an update: ``compute`` (recomputation included),
    ``waiting`` for others, ``update`` of the weights. ``flops``: of the model, on a rank, nothing computed twice."""

    choice: Choice
    weights: int
    gradients: int
    moments: int
    activations: int
    buffers: int
    reserve: int
    limit: int
    compute: float
    waiting: float
    update: float
    flops: float
    tokens: int
    sent: Sent

    @property
    def total(self) -> int:
        """Bytes of a rank."""
        return self.weights + self.gradients + self.moments + self.activations + self.buffers + self.reserve

    @property
    def seconds(self) -> float:
        """Of an update."""
        return self.compute + self.waiting + self.update

    @property
    def tokens_per_second(self) -> float:
        """Positions that all ranks read."""
        return self.tokens / self.seconds

    @property
    def lack(self) -> str:
        """Which term is the largest where it does not fit, and how much is missing; empty where it fits."""
        if self.total <= self.limit:
            return ""
        terms = {n: getattr(self, n) for n in ("weights", "gradients", "moments", "activations", "buffers")}
        worst = max(terms, key=lambda n: terms[n])
        return f"{(self.total - self.limit) / 1e9:.1f} GB too much; {worst} alone {terms[worst] / 1e9:.1f} GB"


class Planner:
    """Budgets of one experiment on one kind of machine.

    Args:
        net: its skeleton on ``meta``.
        spec: how the backbone is quantised.
        train: its training section; ``rows`` states the rows, whose batch a choice replaces.
    """

    def __init__(self, net: MLLM, spec: Quantization | None, train: TrainConfig, rows: Rows, machine: Machine) -> None:
        self.net, self.spec, self.train, self.rows, self.machine = net, spec, train, rows, machine
        narrow = train.precision == "bf16" and (not machine.cpu or train.cpu_autocast)
        self.setting, self._stages = Setting(narrow, machine.cpu), Net(net, spec, train.loss_chunk)

    def stages(self, choice: Choice) -> Stages:
        """The parts of a micro-batch."""
        rows = Rows(choice.batch, self.rows.length, self.rows.pictures, self.rows.learned)
        return self._stages.stages(rows, self.setting, choice.parallel.tensor)

    def budget(self, choice: Choice) -> Budget:
        """Memory and time of ``choice``."""
        stages, shares, machine = self.stages(choice), self.shares(choice), self.machine
        top, buffers = _peak(stages, shares, choice)
        data = 8 * 3 * choice.batch * self.rows.length + self._pixels(choice)
        sent = _sent(stages, shares, choice)
        compute, hidden = _compute(stages, shares, choice, machine)
        touched = TOUCHED * shares.trained + (3 * shares.average) + 16 * shares.whole * (choice.copies > 1)
        limit = int(machine.memory * (1 - machine.efficiency.waste))
        flops = sum(count * _flops((*p.forward, *p.backward)) for p, count in stages.parts) * choice.accumulation
        return Budget(
            choice,
            shares.weights,
            shares.gradients,
            shares.moments + shares.average,
            max(0, top - shares.gradients) + data,
            buffers,
            machine.efficiency.reserve,
            limit,
            compute,
            _waiting(sent, choice, machine, hidden),
            touched / (machine.bandwidth * machine.efficiency.memory),
            flops,
            choice.batch * choice.accumulation * choice.copies * self.rows.length,
            sent,
        )

    def mfu(self, budget: Budget) -> float:
        """Share of the stated peak that is spent on the model's own FLOPs, causal attention counted by half."""
        peak = self.machine.bf16 if self.train.precision == "bf16" else self.machine.fp32
        return budget.flops / budget.seconds / peak

    def _pixels(self, choice: Choice) -> int:
        tower = self.net.tower
        return 0 if tower is None else choice.batch * self.rows.pictures * 3 * tower.size**2 * FULL

    def shares(self, choice: Choice) -> Shares:
        """What a rank keeps."""
        net, tensor = self.net, choice.parallel.tensor
        ends = () if net.backbone.output is None else ("backbone.tok_embeddings.", "backbone.output.")
        coded = {f"backbone.{n}.weight": m for n, m in targets(net.backbone)} if self.spec is not None else {}
        weights = gradients = moments = average = trained = whole = alike = largest = 0
        units = {"table": 0, "block": 0, "output": 0}
        for name, p in net.named_parameters():
            rule = shard_rule(name, experts="cut") if name.startswith("backbone.") else None
            parts = tensor if isinstance(rule, int) else 1
            if name in coded:
                weights += _coded(coded[name], self.spec) // parts
                continue
            inside = name.startswith(("backbone.layers.", *ends))
            own = _rows(p, parts if rule == 0 else 1, parts, choice.cut if inside else 1)
            weights += own * p.itemsize
            if name.startswith("backbone.layers.0."):
                units["block"] += p.nbytes // parts
            for unit, start in zip(("table", "output"), ends, strict=False):
                units[unit] += p.nbytes // parts if name.startswith(start) else 0
            if not p.requires_grad:
                continue
            gradients += FULL * own
            moments += moment_bytes(self.train, name, p, own)
            moments += FULL * own if p.dtype != torch.float32 else 0  # its master
            average += FULL * own if self.train.ema is not None else 0
            trained += own
            alike += own if parts == 1 else 0
            if not inside or choice.cut == 1:
                whole, largest = whole + own, max(largest, own)
        return Shares(weights, gradients, moments, average, units, trained, whole, alike, largest)


def _rows(p: Tensor, across: int, parts: int, cut: int) -> int:
    """Numbers of a parameter on a rank that holds one of ``parts``, ``across`` its rows; FSDP pads rows to the same."""
    if cut == 1 or not p.ndim:
        return p.numel() // parts
    first = p.shape[0] // across
    return ceil(first / cut) * (p.numel() // parts // max(1, first))


def _coded(linear: Linear, spec: Quantization | None) -> int:
    assert spec is not None
    out, width = linear.weight.shape
    fields = spec.layout(out, width).values()
    return sum(torch.Size(shape).numel() * (d or linear.weight.dtype).itemsize for shape, d in fields)


# --- memory ----------------------------------------------------------------------------------------------------------


def _peak(stages: Stages, shares: Shares, choice: Choice) -> tuple[int, int]:
    """The most that a micro-batch and the sums after it hold beside weights and moments, gradients included; and the
    most that FSDP holds gathered at that time."""
    line = [part for part, count in stages.parts for _ in range(count)]
    again, before = choice.checkpointing, shares.gradients if choice.accumulation > 1 else 0
    units = [shares.units.get(part.name, 0) if choice.cut > 1 else 0 for part in line]
    top, at, held = 0, 0, 0

    def see(now: int, gathered: int) -> None:
        nonlocal top, at
        if now + gathered > top + at:
            top, at = now, gathered

    for i, part in enumerate(line):
        block = again and part.name == "block"
        see(held + before + (part.alone if block else part.ahead), sum(units[i : i + 2]))  # the next one's comes along
        held += part.made if block else part.kept
    summed = before
    for i, part in reversed([*enumerate(line)]):
        block = again and part.name == "block"
        held -= part.made if block else part.kept
        most = max(part.back, part.ahead + part.made) if block and part.back else part.back
        gathered, own = sum(units[max(0, i - 1) : i + 1]), min(part.gradients, units[i])
        see(held + summed + most, gathered)
        see(held + summed + part.gradients, gathered + own)  # whole gradients, and flat to be scattered
        summed = min(shares.gradients, summed + part.gradients - own + own // choice.cut)
    if choice.copies > 1 and shares.whole:
        see(shares.gradients + FULL * max(shares.largest, min(BUCKET, shares.whole)), 0)
    return max(top, shares.gradients), at


# --- time ------------------------------------------------------------------------------------------------------------


TOUCHED = 28 + 20  # bytes a number that trains: AdamW reads four and writes three, scaling, norm and clipping five


def _flops(ops: Sequence[Op]) -> int:
    return sum(op.flops // (2 if op.causal else 1) for op in ops)


def _seconds(ops: Sequence[Op], machine: Machine) -> float:
    return sum(machine.seconds(op.flops // (2 if op.causal else 1), op.moved, op.itemsize, op.attention) for op in ops)


def _pair(part: Part, machine: Machine) -> tuple[float, float]:
    return _seconds(part.forward, machine), _seconds((*part.backward, *part.again), machine)


def _compute(stages: Stages, shares: Shares, choice: Choice, machine: Machine) -> tuple[float, float]:
    """Seconds of an update's passes, and how much of FSDP's messages they hide: those of a unit come beside the
    computation of the unit before."""
    total = hidden = 0.0
    rate = machine.between(choice.ranks)
    share = (choice.cut - 1) / choice.cut
    for part, count in stages.parts:
        forward, backward = _pair(part, machine)
        backward += forward if choice.checkpointing and part.name == "block" and part.back else 0.0
        total += count * (forward + backward)
        unit = shares.units.get(part.name, 0)
        if choice.cut > 1 and unit:
            ahead = unit * share / rate
            back = (unit * bool(part.back) + min(part.gradients, unit)) * share / rate
            hidden += count * (min(forward, ahead) + min(backward, back))
    return total * choice.accumulation, hidden * choice.accumulation


def _sent(stages: Stages, shares: Shares, choice: Choice) -> Sent:
    """What a rank communicates in an update."""
    reduced = gathered = units = scattered = 0
    line = [part for part, count in stages.parts for _ in range(count)]
    for part, after in zip(line, [*line[1:], None], strict=True) if choice.cut > 1 else ():
        # On the way back a unit fetches the one before it, whether that has anything to compute or not.
        wanted = part.back > 0 or (after is not None and after.back > 0)
        units += shares.units.get(part.name, 0) * (1 + wanted)
        scattered += min(part.gradients, shares.units.get(part.name, 0))
    for part, count in stages.parts:
        again = choice.checkpointing and part.name == "block" and part.back > 0
        reduced += count * (part.ahead_traffic.reduced * (1 + again) + part.back_traffic.reduced)
        gathered += count * (part.ahead_traffic.gathered * (1 + again) + part.back_traffic.gathered)
    times, tensor = choice.accumulation, choice.parallel.tensor
    return Sent(
        reduced * times,
        gathered * times,
        FULL * shares.alike if tensor > 1 else 0,
        FULL * shares.whole if choice.copies > 1 else 0,
        units * times,
        scattered * times,
    )


def _waiting(sent: Sent, choice: Choice, machine: Machine, hidden: float) -> float:
    """Seconds of messages (rings: a sum goes round twice) that no computation hides."""
    tensor, copies = choice.parallel.tensor, choice.copies
    near, far = machine.between(tensor), machine.between(choice.ranks)
    inner = (tensor - 1) / tensor * (2 * sent.tensor_reduced + sent.tensor_gathered) + sent.tensor_broadcast
    outer = (copies - 1) / copies * (2 * sent.data_reduced + sent.data_gathered + sent.data_scattered)
    return inner / near + max(0.0, outer / far - hidden)


# --- choices ---------------------------------------------------------------------------------------------------------


def choices(
    train: TrainConfig, backbone: LlamaConfig, ranks: int, machine: Machine, whole: bool, spec: Quantization | None
) -> list[Choice]:
    """Every layout of ``ranks`` devices that divides: tensor x data x checkpointing x rows at once.

    ``whole``: the objective needs whole parameters and blocks that are run once (disjoint groups). ``spec``: how the
    backbone is quantised.

    Raises:
        ValueError: when no number of copies divides the update, naming it.
    """
    found = [
        Choice(ranks, ParallelConfig(tensor, data), again, batch, each // batch)
        for tensor in _tensors(train, backbone, ranks, machine, spec)
        for copies in [ranks // tensor]
        for each in [_each(train, copies)]
        for data in _data(train, copies, whole)
        for again in ((False,) if whole else (False, True))
        for batch in _batches(train, each)
    ]
    if not found:
        raise ValueError(
            f"train.global_batch {train.global_batch} is not a multiple of any number of copies on --gpus {ranks}"
        )
    return found


def _tensors(
    train: TrainConfig, c: LlamaConfig, ranks: int, machine: Machine, spec: Quantization | None
) -> Iterator[int]:
    sizes = [c.n_heads, c.kv_heads, c.hidden_width, c.dim, *([] if c.tie_embeddings else [c.vocab_size])]
    yield 1
    if train.optimizer == "muon" or (spec is not None and spec.embeddings):
        return
    if spec is not None and spec.kind != "int8":  # weights that share a scale stay together
        sizes += [size // spec.group for size in (c.n_heads * c.head_width, c.hidden_width)]
    for tensor in range(2, min(ranks, machine.per_node) + 1):
        if ranks % tensor == 0 and not any(size % tensor for size in sizes):
            yield tensor


def _data(train: TrainConfig, copies: int, whole: bool) -> tuple[Literal["ddp", "fsdp"], ...]:
    never = whole or train.optimizer == "muon" or train.loss_chunk is not None  # as TrainConfig has it
    return ("ddp",) if copies == 1 or never else ("ddp", "fsdp")


def _each(train: TrainConfig, copies: int) -> int:
    """Rows of an update on a data rank; 0 where they do not divide."""
    if train.global_batch is None:
        return train.batch_size * train.accumulation
    return 0 if train.global_batch % copies else train.global_batch // copies


def _batches(train: TrainConfig, each: int) -> list[int]:
    tried = {1, 2, 4, 8, 16, 32, train.batch_size}
    return sorted(b for b in tried if each and each % b == 0)
