"""One rank's share of a block on ``meta``, and what stands there for collectives, codes and routing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from accessory.nn.attention import Attention
from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.moe import MoEFeedForward
from accessory.nn.quantized import Quantized
from accessory.parallel.axes import ROW, shard_rule
from accessory.peft.lora import LowRank
from accessory.peft.quantize import Quantization, fill, restored
from accessory.train.trace import Traffic


class Meet(torch.autograd.Function):
    """Where ranks of a tensor group sum, on the way forward or back: notes the bytes."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, forward: bool, backward: bool, x: Tensor) -> Tensor:
        ctx.traffic, ctx.backward_too = traffic, backward
        traffic.reduced += x.nbytes if forward else 0
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.traffic.reduced += grads[0].nbytes if ctx.backward_too else 0
        return None, None, None, grads[0]


class Gather(torch.autograd.Function):
    """The parts of all ranks side by side; the gradient of one's own."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, parts: int, x: Tensor) -> Tensor:
        ctx.parts = parts
        whole = torch.cat([torch.empty_like(x) for _ in range(parts)], -1)
        traffic.gathered += whole.nbytes
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, grads[0].chunk(ctx.parts, -1)[0].contiguous()


def cut(block: nn.Module, tensor: int, traffic: Traffic) -> None:
    """Leave in ``block`` what one of ``tensor`` ranks holds, and let it note where they meet."""
    meet = partial(Meet.apply, traffic)
    for name, _ in [*block.named_parameters()]:
        axis = shard_rule(f"layers.0.{name}", experts="cut")
        if isinstance(axis, int):
            owner, _, leaf = name.rpartition(".")
            shrink(block.get_submodule(owner), leaf, axis, tensor)
    for name, module in block.named_modules():
        if isinstance(module, Linear) and isinstance(module.delta, LowRank):
            # Where the input is whole, its ranks meet on the way back between the two factors; else on the way forward.
            forward = name.rpartition(".")[2] in ROW
            module.delta.between = partial(meet, forward, not forward)
        if isinstance(module, Attention | FeedForward):
            module.register_forward_pre_hook(lambda _, args: (meet(False, True, args[0]), *args[1:]))
            last = module.wo if isinstance(module, Attention) else module.w2
            last.register_forward_hook(lambda _, __, y: meet(True, False, y))
        if isinstance(module, Attention) and module.prefix is not None:
            cast(Any, module.prefix).between = partial(meet, False, True)


def shrink(owner: nn.Module, leaf: str, axis: int, parts: int) -> None:
    """Leave one of ``parts`` of a parameter."""
    p = owner.get_parameter(leaf)
    own = p.detach().chunk(parts, axis)[0].contiguous()
    own = own.clone() if own.untyped_storage().nbytes() > own.nbytes else own
    setattr(owner, leaf, nn.Parameter(own, requires_grad=p.requires_grad))


class _FourBits(Quantized):
    """NF4 as far as memory and traffic go: half a byte a weight, and a full copy while it is multiplied."""

    kind: ClassVar[str] = "nf4"

    def __init__(self, out: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self._shape, self._dtype = [out], (out, width), dtype
        self.register_buffer("codes", torch.empty(-(-out * width // 2), dtype=torch.uint8, device="meta"))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        return self._dtype

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in)."""
        return self.codes.repeat(2)[: self._shape[0] * self._shape[1]].view(self._shape).to(dtype or self._dtype)

    def cut(self, axis: int, part: int, parts: int) -> Quantized:
        """See :class:`Quantized`."""
        sizes = [n // parts if i == axis else n for i, n in enumerate(self._shape)]
        return _FourBits(sizes[0], sizes[1], self._dtype)


def coded(linear: Linear, spec: Quantization, dtype: torch.dtype) -> None:
    """Codes in the place of the weight of ``linear``."""
    out, width = linear.weight.shape
    if spec.kind == "nf4":
        fill(linear, _FourBits(out, width, dtype))
        return
    fields = {
        name: torch.empty(shape, dtype=kept or dtype, device="meta")
        for name, (shape, kept) in spec.layout(out, width).items()
    }
    fill(linear, restored(spec, fields, (out, width), dtype))


def balanced(layer: MoEFeedForward, x: Tensor, route: Tensor | None = None) -> Tensor:
    """The layer's forward where every expert is given as many tokens as the next."""
    rows = x.flatten(0, 1)
    logits = layer.gate((x if route is None else route).flatten(0, -2))
    best, chosen = logits.topk(layer.top, dim=-1)
    weights = best.softmax(-1, dtype=torch.float32)
    order = chosen.flatten().argsort(stable=True)
    taken = rows[order // layer.top]
    parts: Sequence[Tensor] = taken.chunk(len(layer.experts))
    found = torch.cat([expert(part) for expert, part in zip(layer.experts, parts, strict=False)])
    found = found[order.argsort()].unflatten(0, (-1, layer.top))
    mixed: Tensor = (found * weights.to(found.dtype)[..., None]).sum(1)
    return mixed.to(x.dtype).view_as(x)
