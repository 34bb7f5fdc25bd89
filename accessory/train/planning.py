"""``plan`` of an experiment: a table of layouts over N devices, the best one that fits, and what to write for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from accessory import config as configuration
from accessory.models.skeleton import resolved, skeleton
from accessory.train.config import TrainConfig
from accessory.train.hardware import THIS, Machine, find_machine, with_rates
from accessory.train.layouts import Budget, Choice, Planner, choices
from accessory.train.run import RunConfig
from accessory.train.stages import Rows


@dataclass(frozen=True)
class Planned:
    """``budgets``: of every layout the fastest that fits, or else the smallest. ``best``: of all, None where none
    fits. ``mfu`` of each in the same order."""

    planner: Planner
    ranks: int
    budgets: tuple[Budget, ...]
    best: Budget | None
    uncounted: tuple[str, ...]

    @property
    def machine(self) -> Machine:
        """What it is planned for."""
        return self.planner.machine


def planned(config: RunConfig, ranks: int, machine: Machine, said: Mapping[str, float]) -> Planned:
    """The plan of an experiment over ``ranks`` devices.

    Args:
        said: fields of :class:`Rows` in place of the experiment's: its longest rows, a picture in each where it sees,
            all positions learned that are no picture's.

    Raises:
        ValueError: for rows that hold no text beside their pictures, a number of devices that is none, or one that no
            update divides by.
    """
    if ranks < 1:
        raise ValueError(f"--gpus must be at least 1, got {ranks}")
    if ranks > machine.per_node and ranks % machine.per_node:
        raise ValueError(f"--gpus {ranks}: beyond one node it is a multiple of its {machine.per_node} devices")
    net, model = skeleton(config.model), resolved(config.model)
    packing = config.data.packing
    length = model.dialogues[1] if packing is None else packing.length
    rows = Rows(**{"batch": 1, "length": length, "pictures": int(net.tower is not None), **said})  # type: ignore[arg-type]
    if rows.pictures and net.tower is None:
        raise ValueError(f"--pictures {rows.pictures}: this model does not see")
    if rows.length < (least := rows.pictures * net.positions_per_tile + 2):
        raise ValueError(f"--length {rows.length} is too short: pictures and two words take {least} positions")
    spec = config.model.quantization or model.quantization
    planner = Planner(net, spec, config.train, rows, machine)
    whole = bool(config.objective.disjoint)
    found = choices(config.train, net.backbone.config, ranks, machine, whole, spec)
    budgets = tuple(_first(planner, group) for group in _alike(found))
    fitting = [b for b in budgets if not b.lack]
    best = max(fitting, key=lambda b: b.tokens_per_second) if fitting else None
    aside = {
        "the alignment of pictures (objective.align)": config.objective.align is not None,
        "routing losses and uneven experts": net.backbone.config.moe is not None,
        "borders between the rows of a pack, and pictures beyond --pictures": packing is not None,
        "train.compile, which joins small calls": config.train.compile,
    }
    return Planned(planner, ranks, budgets, best, tuple(what for what, there in aside.items() if there))


def _alike(found: Sequence[Choice]) -> list[list[Choice]]:
    """Choices that differ in their rows at once alone."""

    def rest(choice: Choice) -> tuple[object, ...]:
        return tuple(v for n, v in vars(choice).items() if n not in ("batch", "accumulation"))

    return [list(group) for _, group in groupby(found, rest)]


def _first(planner: Planner, group: Iterable[Choice]) -> Budget:
    """The fastest of some choices that fits, or else the smallest; more rows at once take more memory."""
    best: Budget | None = None
    for choice in group:
        now = planner.budget(choice)
        if best is None:
            best = now
        if now.lack:
            break
        # A little speed is not worth the memory: a row that is longer than planned must not end a run.
        best = now if now.tokens_per_second > 1.02 * best.tokens_per_second else best
    assert best is not None
    return best


def main_plan(
    path: str, overrides: Sequence[str], ranks: int, kind: str, said: Mapping[str, float], rates: Sequence[float] | None
) -> str:
    """The plan of an experiment file as text.

    Raises:
        ValueError: as :func:`planned`, for the file of a generator, and for an unknown kind.
    """
    if "generator" in configuration.read(path):
        raise ValueError(f"{path} trains a generator; plan is for language models")
    machine = find_machine(kind)
    if rates is not None:
        machine = with_rates(machine, *rates)
    config = configuration.load(path, RunConfig, overrides)
    return "\n".join(report(path, planned(config, ranks, machine, said), rates is not None))


def report(name: str, found: Planned, measured: bool = False) -> list[str]:
    """Lines of Markdown."""
    planner, rows = found.planner, found.planner.rows
    seen = f", {rows.pictures} picture(s) of {planner.net.positions_per_tile} in each" if rows.pictures else ""
    share = "all others" if rows.learned == 1 else f"{rows.learned:.0%} of all others"
    heads = (
        "tensor | data | checkpointing | rows at once | weights | gradients | moments | activations | FSDP | sum GB | "
        "step s | waits s | tokens/s | MFU | "
    )
    lines = [
        f"{name} on {found.ranks} x {found.machine.name}: rows of {rows.length} positions{seen}; {share} learned",
        "",
        f"| {heads}|",
        "|---:|---|---|---:|" + "---:|" * 10 + "---|",
    ]
    lines += [_line(planner, b, b is found.best) for b in found.budgets]
    lines.append("")
    if found.best is None:
        near = min(found.budgets, key=lambda b: b.total)
        lines.append(f"Nothing fits into {near.limit / 1e9:.1f} GB; nearest: {near.lack}. {_advice(planner, near)}")
    else:
        lines += ["Best that fits:", "", "```yaml", *yaml(planner.train, found.best), "```"]
    return [*lines, "", *_basis(found, measured)]


def _line(planner: Planner, b: Budget, best: bool) -> str:
    c = b.choice
    sizes = " | ".join(
        f"{n / 1e9:.1f}" if n >= 1e9 else f"{n / 1e9:.2g}"
        for n in (b.weights, b.gradients, b.moments, b.activations, b.buffers, b.total)
    )
    times = f"{b.seconds:.3g} | {b.waiting:.2g} | {b.tokens_per_second:.3g} | {planner.mfu(b):.0%}"
    again = "on" if c.checkpointing else "off"
    mark = "**best**" if best else b.lack
    return f"| {c.parallel.tensor} | {c.parallel.data} | {again} | {c.batch} | {sizes} | {times} | {mark} |"


def _advice(planner: Planner, near: Budget) -> str:
    state = near.weights + near.gradients + near.moments
    if state > near.limit:
        return "Weights and what trains are too much by themselves: more devices, fewer bits, or train less (LoRA)."
    return f"Shorter rows (now {planner.rows.length}) or train.loss_chunk take less."


def yaml(train: TrainConfig, best: Budget) -> list[str]:
    """What to write into the experiment for a layout."""
    c = best.choice
    lines = ["train:", f"  batch_size: {c.batch}"]
    if train.global_batch is None:
        lines.append(f"  accumulation: {c.accumulation}")
    lines.append(f"  block_checkpointing: {'true' if c.checkpointing else 'false'}")
    return [*lines, f"  parallel: {{tensor: {c.parallel.tensor}, data: {c.parallel.data}}}"]


def _basis(found: Planned, measured: bool) -> list[str]:
    """Where the numbers come from; nothing is left to be taken for measured that is not."""
    m, e = found.machine, found.machine.efficiency
    half = "bf16" if found.planner.setting.autocast else "fp32"
    peak = m.bf16 if half == "bf16" else m.fp32
    lines = [f"{m.name}: {peak / 1e12:.3g} TFLOP/s ({half}), {m.bandwidth / 1e9:.0f} GB/s, {m.memory / 1e9:.1f} GB"]
    if m.name == THIS:
        lines[0] += ", measured now; links between processes are assumed."
    else:
        said = "as you measured" if measured else "assumed"
        lines[0] += " as its maker states them."
        lines.append(
            f"{said.capitalize()}: products reach {e.product:.0%} of it and memory {e.memory:.0%}. Assumed: attention "
            f"{e.attention:.0%}, links {e.link:.0%} of {m.link / 1e9:.0f} GB/s in a node and {m.network / 1e9:.3g} "
            f"between, {e.launch * 1e6:.0f} us a call, {e.reserve / 1e9:.1f} GB beside the allocator, {e.waste:.0%} "
            "lost to fragments. Not measured on a GPU."
        )
    if found.uncounted:
        lines.append(f"Not counted: {', '.join(found.uncounted)}.")
    return lines
