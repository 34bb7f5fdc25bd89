"""What a pass through a module costs, counted while its own code runs on the device ``meta``: products, memory traffic,
and what lives when. Nothing is computed and nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from accessory.nn.attention import SHORT, explicit
from accessory.vision.meta import Counter

_PRODUCTS = {
    F.linear, F.conv2d, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, Tensor.matmul,
    Tensor.__matmul__, Tensor.bmm,
}  # fmt: skip
_FREE = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "scalar_tensor"}


@dataclass(frozen=True)
class Setting:
    """How a step computes. ``autocast``: products in bf16, as torch.autocast has them; ``cpu``: torch's kernels for a
    CPU, which compute norms step by step and short bf16 attention by its formula; else those for CUDA."""

    autocast: bool = False
    cpu: bool = False


class Op(NamedTuple):
    """One call: FLOPs of its products, bytes read and written, bytes of a number, whether it is attention (whose FLOPs
    are those of all pairs) and whether that is causal (half of them are not computed)."""

    flops: int
    moved: int
    itemsize: int
    attention: bool = False
    causal: bool = False


@dataclass
class Traffic:
    """Bytes of what a rank reduces over, or gathers from, its tensor group: of the whole result of each collective."""

    reduced: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class Part:
    """A module in a step; bytes count what is neither its input nor its parameters.

    ``made``: its output. ``alone``: the peak of its forward without a graph, ``ahead`` with one, ``back`` that of its
    backward, the gradient of its output included and its output not. ``kept``: what its forward leaves, its output
    included. ``gradients``: those of its parameters. ``again``: calls that its backward repeats, in whatever layout.
    """

    name: str
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    made: int
    alone: int
    ahead: int
    back: int
    kept: int
    gradients: int
    again: tuple[Op, ...] = ()
    ahead_traffic: Traffic = field(default_factory=Traffic)
    back_traffic: Traffic = field(default_factory=Traffic)

    @property
    def flops(self) -> int:
        """Of forward and backward."""
        return sum(op.flops for op in (*self.forward, *self.backward))


def trace(
    name: str,
    run: Callable[[Tensor], Tensor],
    modules: Sequence[nn.Module],
    x: Tensor,
    setting: Setting,
    known: Sequence[Tensor] = (),
    traffic: Traffic | None = None,
) -> Part:
    """The costs of ``run(x)`` and of its backward pass, where anything in it trains.

    Args:
        run: calls ``modules``, which lie on ``meta``. It may be called twice.
        x: the input, on ``meta``; it requires a gradient where one flows on.
        known: other tensors that exist already.
        traffic: what ``run`` notes its collectives in.
    """
    traffic = traffic or Traffic()
    with torch.no_grad():
        watch = _Watch(modules, [x, *known], setting)
        with watch, _Kernels(watch, setting):
            run(x)
    alone = watch.peak
    watch = _Watch(modules, [x, *known], setting)
    kernels = _Kernels(watch, setting)
    traffic.reduced = traffic.gathered = 0
    with watch, kernels, torch.enable_grad():
        y = run(x)
        made, kept, ahead = y.nbytes, watch.now, watch.peak
        sent = Traffic(traffic.reduced, traffic.gathered)
        traffic.reduced = traffic.gathered = 0
        forward, kernels.autocast = tuple(watch.ops), False  # its region ends with the forward pass
        end = _End.apply(y) if y.requires_grad else None
        del y
        watch.peak = watch.now
        watch.ops.clear()
        if end is not None:
            end.backward()
        backward = tuple(watch.ops)
    trained = [p for m in modules for p in m.parameters() if p.grad is not None]
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    x.grad = None
    for p in trained:
        p.grad = None
    back = watch.peak if end is not None else 0
    return Part(name, forward, backward, made, alone, ahead, back, kept, gradients, (), sent, traffic)


class _End(torch.autograd.Function):
    """Stands for all that follows: its backward pass makes the gradient, and then no one else holds it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.like = (y.shape, y.dtype)
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype, device="meta")


class _Watch(Counter):
    """Every call with its cost; scores of attention count where a kernel makes them."""

    def __init__(self, modules: Sequence[nn.Module], known: Sequence[Tensor], setting: Setting) -> None:
        super().__init__(nn.ModuleList(modules))
        self._alive |= {t.untyped_storage()._cdata: 0 for t in known}
        self.ops: list[Op] = []
        self.setting = setting

    def size(self, tensor: Tensor, func: Any) -> int:
        """All bytes."""
        return tensor.untyped_storage().nbytes()

    def seen(self, func: Any, given: Any, flops: int, fresh: bool, made: Sequence[Tensor]) -> None:
        """Note the call, unless it only names memory."""
        if func._schema.name.partition("::")[2] in _FREE or not (fresh or func._schema.is_mutable):
            return
        read = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        sizes = [min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *made)]
        widest = max((t.itemsize for t in read if t.is_floating_point()), default=4)
        self.ops.append(Op(flops, sum(sizes), widest))
        if flops and widest == 2 and self.setting.cpu:  # the kernel's own copy of what it re-orders
            self.peak = max(self.peak, self.now + max(sizes))


class _Kernels(TorchFunctionMode):
    """What ``meta`` has no kernels for, as the device would do it; and autocast, which does not know ``meta``."""

    def __init__(self, watch: _Watch, setting: Setting) -> None:
        super().__init__()
        self.watch, self.setting, self.autocast = watch, setting, setting.autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.rms_norm and not self.setting.cpu:
            return _RmsNorm.apply(args[0])
        if self.autocast and func in _PRODUCTS:
            args = tuple(_narrow(a) for a in args)
            kwargs = {k: _narrow(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False, **_: Any
    ) -> Tensor:
        if self.autocast:
            q, k, v = (_narrow(t) for t in (q, k, v))
        short = q.dtype == torch.bfloat16 and q.shape[2] > 1 and q.shape[2] * k.shape[2] <= SHORT
        if self.setting.cpu and short:
            return explicit(q, k, v, attn_mask, is_causal)
        return _Fused.apply(q, k, v, self.watch, is_causal)


def _narrow(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


class _Fused(torch.autograd.Function):
    """Attention block by block: keeps queries, keys, values, the result and a number a query, and no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, watch: _Watch, causal: bool) -> Tensor:
        y, total = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, total)
        ctx.watch, ctx.causal = watch, causal
        _note(watch, (q, k, v, y), 2, q, k, causal)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, y, _ = ctx.saved_tensors
        made = [torch.empty_like(t) for t in (q, k, v)]
        _note(ctx.watch, (q, k, v, y, *grads, *made), 5, q, k, ctx.causal)
        return *made, None, None


def _note(watch: _Watch, moved: Sequence[Tensor], products: int, q: Tensor, k: Tensor, causal: bool) -> None:
    flops = products * 2 * q.numel() * k.shape[2]
    watch.flops += flops
    watch.ops.append(Op(flops, sum(t.nbytes for t in moved), q.itemsize, True, causal))


class _RmsNorm(torch.autograd.Function):
    """One kernel each way, which keeps the input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.add(ctx.saved_tensors[0], grads[0])  # as many bytes as the kernel moves
