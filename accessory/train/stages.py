"""A training step as a row of parts (tower, projector, table, blocks, output), each counted by :mod:`.trace`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.models.mllm import MLLM
from accessory.nn.moe import MoEFeedForward
from accessory.nn.rope import table
from accessory.peft.quantize import Quantization, targets
from accessory.tokens import IMAGE
from accessory.train.stand_ins import Gather, Meet, balanced, coded, cut, shrink
from accessory.train.trace import Op, Part, Setting, Traffic, trace


@dataclass(frozen=True)
class Rows:
    """What a data rank reads at once: ``batch`` rows of ``length`` positions with ``pictures`` tiles in each;
    ``learned``: share of the positions that are no picture's and have a label."""

    batch: int
    length: int
    pictures: int = 0
    learned: float = 1.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 2 or self.pictures < 0:
            raise ValueError(f"--length {self.length} must be at least 2, --pictures {self.pictures} not negative")
        if not 0 < self.learned <= 1:
            raise ValueError(f"--learned {self.learned:g} is a share: above 0, at most 1")


@dataclass(frozen=True)
class Stages:
    """The parts of a step in their order, with how often each stands there in a row."""

    parts: tuple[tuple[Part, int], ...]

    @property
    def flops(self) -> int:
        """Of one pass, forward and backward, with nothing computed twice."""
        return sum(part.flops * count for part, count in self.parts)


class Net:
    """A network on ``meta`` as one rank of ``tensor`` has it; equal parts are counted once.

    Args:
        net: the skeleton, with what trains chosen. It is not changed.
        spec: how its backbone's linears are quantised.
        chunk: most positions whose scores are in memory at once; they are computed again for the backward pass.
    """

    def __init__(self, net: MLLM, spec: Quantization | None, chunk: int | None = None) -> None:
        self.net, self.spec, self.chunk = net, spec, chunk
        self.dtype = net.backbone.tok_embeddings.weight.dtype
        self._traced: dict[tuple[Any, ...], Part] = {}

    def stages(self, rows: Rows, setting: Setting, tensor: int = 1) -> Stages:
        """The parts of a step over ``rows`` on one of ``tensor`` ranks."""
        made: list[tuple[Part, int]] = []
        net, tiles = self.net, rows.batch * rows.pictures
        flows, x = False, torch.empty(0, device="meta")
        context: Tensor | None = None
        if net.tower is not None and tiles:
            tower, x, flows = self._tower(tiles, setting, tensor)
            made.append((tower, 1))
            if net.resampler is not None:
                context = self._resampled(made, rows, setting)
        if net.projector is not None:
            x, flows = self._projected(made, x, flows, tiles, setting)
        x, flows = self._embedded(made, x, flows, rows, setting)
        if tensor > 1:  # ranks have parts of the table's width
            made[-1] = (replace(made[-1][0], ahead_traffic=Traffic(gathered=x.nbytes)), 1)
        for block, count in self._runs():
            for now in [1, count - 1] if not flows and count > 1 else [count]:
                part = self._block(block, x, flows, rows, setting, tensor, context)
                made.append((part, now))
                flows = flows or part.back > 0
        made.append((self._head(x, flows, rows, setting, tensor), 1))
        return Stages(tuple(made))

    # --- what comes before the blocks ------------------------------------------------------------------------------

    def _tower(self, tiles: int, setting: Setting, tensor: int) -> tuple[Part, Tensor, bool]:
        tower = self.net.tower
        assert tower is not None
        pixels = torch.empty(tiles, 3, tower.size, tower.size, device="meta")
        trains = any(p.requires_grad for p in tower.parameters())
        widths = [(g.num_tokens, g.width) for g in tower.groups]
        wide = torch.empty(tiles, sum(n * w for n, w in widths), device="meta")

        def run(x: Tensor) -> Tensor:
            found = [t.flatten(1) for t in tower.tokens(x)]
            return torch.cat(found, 1) if len(found) > 1 else found[0]

        if trains:
            return trace("tower", run, [tower], pixels, setting), wide, True
        key: tuple[Any, ...] = ("tower", setting)
        if key not in self._traced:
            self._traced[key] = trace("tower", run, [tower], pixels[:1], setting)
        one = self._traced[key]
        own, kept = -(-tiles // tensor), wide.nbytes  # a tensor group shares them out
        ops = tuple(
            op._replace(flops=op.flops * own, moved=op.moved * own, itemsize=2 if setting.autocast else op.itemsize)
            for op in one.forward
        )
        sent = Traffic(gathered=kept if tensor > 1 else 0)
        peak = own * one.alone + kept
        return Part("tower", ops, (), kept, peak, peak, 0, kept, 0, (), sent), wide, False

    def _projected(
        self, made: list[tuple[Part, int]], wide: Tensor, flows: bool, tiles: int, setting: Setting
    ) -> tuple[Tensor, bool]:
        projector = self.net.projector
        assert projector is not None
        if not tiles:
            return torch.empty(0, projector.dim, device="meta"), False
        sizes = [(g.num_tokens, g.width) for g in projector.groups]

        def run(x: Tensor) -> Tensor:
            parts = x.split([n * w for n, w in sizes], 1)
            return cast(Tensor, projector([p.unflatten(1, s) for p, s in zip(parts, sizes, strict=True)]))

        part = trace("projector", run, [projector], wide.requires_grad_(flows), setting)
        made.append((part, 1))
        dtype = torch.bfloat16 if setting.autocast else torch.float32
        features = torch.empty(tiles * projector.num_tokens, projector.dim, dtype=dtype, device="meta")
        return features, part.back > 0

    def _resampled(self, made: list[tuple[Part, int]], rows: Rows, setting: Setting) -> Tensor:
        """The visual prefix of every row, from what its tower has found."""
        net = self.net
        assert net.tower is not None
        assert net.resampler is not None
        resampler = net.resampler
        group = net.tower.groups[0]
        found = torch.empty(rows.batch * rows.pictures, group.num_tokens, group.width, device="meta")
        part = trace("resampler", resampler, [resampler], found, setting)
        made.append((part, 1))
        with torch.no_grad():
            like = resampler(found[:1])
        context: Tensor = like.new_empty(rows.batch, *like.shape[1:])
        return context.requires_grad_(part.back > 0)

    def _embedded(
        self, made: list[tuple[Part, int]], features: Tensor, flows: bool, rows: Rows, setting: Setting
    ) -> tuple[Tensor, bool]:
        backbone, projector = self.net.backbone, self.net.projector
        ids = torch.empty(rows.batch, rows.length, dtype=torch.long, device="meta")

        def run(found: Tensor) -> Tensor:
            x = backbone.embed(ids)
            if projector is None:
                return x
            x = x.masked_scatter((ids == IMAGE)[..., None], found.to(x.dtype)) if len(found) else x
            for vector in (projector.skip, *(getattr(projector, n, None) for n in ("start_img", "end_img"))):
                if vector is not None:
                    x = x + (vector.reshape(1, -1)[:0].sum().to(x.dtype) * 0)
            return x

        modules: list[nn.Module] = [backbone.tok_embeddings]
        learned = projector is not None and any(p.requires_grad for p in projector.parameters(recurse=False))
        if projector is not None:
            modules.append(projector)
        part = trace("table", run, modules, features.requires_grad_(flows), setting, [ids])
        made.append((part, 1))
        x = torch.empty(rows.batch, rows.length, backbone.config.dim, dtype=self.dtype, device="meta")
        return x, part.back > 0 or learned

    # --- blocks and output -----------------------------------------------------------------------------------------

    def _runs(self) -> Iterator[tuple[nn.Module, int]]:
        """Blocks, equal neighbours together."""
        last: tuple[Any, ...] | None = None
        block, count = cast(nn.Module, None), 0
        for one in self.net.backbone.layers:
            now = signature(one)
            if now != last and count:
                yield block, count
            block, count, last = one, count + 1 if now == last else 1, now
        yield block, count

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        flows: bool,
        rows: Rows,
        setting: Setting,
        tensor: int,
        context: Tensor | None,
    ) -> Part:
        key = (signature(block), flows, rows.batch, rows.length, setting, tensor, context is not None)
        if key not in self._traced:
            config = self.net.backbone.config
            at = torch.empty(rows.batch, rows.length, dtype=torch.long, device="meta")
            rope = table(at, config.head_width, config.rope_theta, config.rope_scaling)
            traffic = Traffic()
            own = self._own(block, tensor, traffic)

            def run(x: Tensor) -> Tensor:
                return cast(Tensor, own(x, rope, None, context=context))

            known = [rope] if context is None else [rope, context]
            start = x.detach().requires_grad_(flows)
            self._traced[key] = trace("block", run, [own], start, setting, known, traffic)
        return self._traced[key]

    def _own(self, block: nn.Module, tensor: int, traffic: Traffic) -> nn.Module:
        """``block`` as a rank has it, with kernels for what is quantised."""
        own = copy.deepcopy(block)
        for module in own.modules():
            if isinstance(module, MoEFeedForward):
                cast(Any, module).forward = partial(balanced, module)
        if tensor > 1:
            cut(own, tensor, traffic)
        self._quantise(own)
        return own.train()

    def _quantise(self, module: nn.Module) -> None:
        """Codes in the place of the weights."""
        for _, linear in [*targets(module)] if self.spec is not None else []:
            assert self.spec is not None
            coded(linear, self.spec, self.dtype)

    def _head(self, x: Tensor, flows: bool, rows: Rows, setting: Setting, tensor: int) -> Part:
        """Norm, scores of the learned positions and their loss, in fp32."""
        net, text = self.net, rows.length
        if net.projector is not None:
            text -= rows.pictures * net.positions_per_tile
        count = max(1, round(rows.batch * min(text, rows.length - 1) * rows.learned))
        at_once = min(count, self.chunk or count)
        pick = torch.empty(at_once, dtype=torch.long, device="meta")
        traffic, backbone = Traffic(), net.backbone
        output: nn.Module = backbone.tok_embeddings if backbone.output is None else copy.deepcopy(backbone.output)
        axis = 1 if backbone.output is None else 0
        if tensor > 1:
            output = copy.deepcopy(output)
            shrink(output, "weight", axis, tensor)
        if backbone.output is not None:
            self._quantise(holder := nn.ModuleDict({"output": output}))
            output = holder["output"]
        meet = partial(Meet.apply, traffic)

        def run(x: Tensor) -> Tensor:
            h = backbone.norm(x)[:, :-1][pick, pick]
            if tensor > 1:
                h = meet(False, True, h)
            if backbone.output is None:
                scores = F.linear(h.chunk(tensor, -1)[0] if tensor > 1 else h, cast(Tensor, output.weight))
                scores = meet(True, False, scores) if tensor > 1 else scores
            else:
                scores = output(h)
                scores = Gather.apply(traffic, tensor, scores) if tensor > 1 else scores
            return F.cross_entropy(scores.float(), pick, reduction="sum")

        own = [backbone.norm, output]
        part = trace("output", run, own, x.detach().requires_grad_(flows), setting, [pick], traffic)
        return part if at_once == count else _in_chunks(part, count / at_once)


def _in_chunks(part: Part, times: float) -> Part:
    """``times`` as many calls, one after another, each forward pass computed again; the peaks are those of one."""

    def many(ops: Sequence[Op]) -> tuple[Op, ...]:
        return tuple(op._replace(flops=round(op.flops * times), moved=round(op.moved * times)) for op in ops)

    forward, ahead, back = many(part.forward), part.ahead_traffic, part.back_traffic
    return replace(
        part, forward=forward, backward=many(part.backward), again=forward, ahead=part.alone, kept=part.made,
        back=max(part.back, part.ahead),
        ahead_traffic=Traffic(round(ahead.reduced * times), round(ahead.gathered * times)),
        back_traffic=Traffic(
            round((ahead.reduced + back.reduced) * times), round((ahead.gathered + back.gathered) * times)
        ),
    )  # fmt: skip


def signature(block: nn.Module) -> tuple[Any, ...]:
    """What makes two blocks cost the same."""
    return tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
