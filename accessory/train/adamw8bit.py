"""AdamW whose moments take a byte each: codes in blocks that share a scale (Dettmers et al. 2022, 8-bit optimizers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

BLOCK = 256
"""Moments that share a scale, in row order."""
SMALL = 4096
"""Parameters with fewer entries keep their moments in fp32: they are most of the names and little of the memory."""
MOMENTS = {"exp_avg": (2, 127), "exp_avg_sq": (4, 255)}
"""Level ``c`` of ``n`` stands for ``(c / n) ** power`` of a block's largest: fine where there is little."""


@dataclass
class Codes:
    """A moment of one parameter: ``codes`` (N), int8 with a sign or uint8; ``scales`` (ceil(N / BLOCK)) in fp32."""

    codes: Tensor
    scales: Tensor
    power: int
    top: int

    @staticmethod
    def of(value: Tensor, kind: str, noise: torch.Generator | None = None) -> Codes:
        """The codes of a moment, whatever its shape; without ``noise`` the nearest, so that what codes stand for has
        these very codes.

        With ``noise`` one of the two neighbours by chance, which is right on average: a slow average would otherwise
        never leave a level, as no single step is half way to the next.
        """
        power, top = MOMENTS[kind]
        flat = value.detach().reshape(-1).float()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        share = blocks.abs() / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        levels = _levels(power, top, str(value.device))
        code = (share ** (1 / power) * top).floor_().clamp_(0, top - 1).int()
        low, high = levels[code], levels[code + 1]
        part = ((share - low) / (high - low)).view(-1)[: len(flat)]
        limit: float | Tensor = 0.5
        if noise is not None:
            limit = torch.rand(len(flat), generator=noise, device=value.device)
        code = code.view(-1)[: len(flat)] + (part > limit)
        if kind == "exp_avg":
            return Codes((code * flat.sign()).to(torch.int8), scales, power, top)
        # A second moment that is not zero stays so: it is divided by.
        return Codes(torch.where(flat > 0, code.clamp_min(1), 0).to(torch.uint8), scales, power, top)

    def value(self, shape: torch.Size) -> Tensor:
        """The moment in fp32."""
        levels = _levels(self.power, self.top, str(self.codes.device))
        share = levels[self.codes.abs().int()] * self.codes.sign()
        blocks = torch.nn.functional.pad(share, (0, -len(share) % BLOCK)).view(-1, BLOCK) * self.scales[:, None]
        return blocks.view(-1)[: len(share)].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@cache
def _levels(power: int, top: int, device: str) -> Tensor:
    return (torch.arange(top + 1, device=device, dtype=torch.float64) / top).pow(power).float()


class AdamW8bit(torch.optim.Optimizer):
    """As :class:`torch.optim.AdamW`, moments as :class:`Codes`.

    What chance decides depends on the number of the update and on the parameter's place among all, on nothing else: a
    resumed run goes on as if it had not stopped, and ranks that hold copies of a parameter keep them equal.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        every = [p for group in self.param_groups for p in group["params"]]
        self._places = {id(p): i for i, p in enumerate(every)}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; no closure is taken."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state, (one, two) = self.state[parameter], group["betas"]
        step = int(state["step"]) + 1 if state else 1
        moments = self.moments(parameter) if state else {k: torch.zeros_like(parameter) for k in MOMENTS}
        first = moments["exp_avg"].lerp_(grad, 1 - one)
        second = moments["exp_avg_sq"].mul_(two).addcmul_(grad, grad, value=1 - two)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        below = (second.sqrt() / math.sqrt(1 - two**step)).add_(group["eps"])
        parameter.addcdiv_(first, below, value=-group["lr"] / (1 - one**step))
        noise = torch.Generator(parameter.device).manual_seed(step << 24 | self._places[id(parameter)])
        self._keep(parameter, step, {"exp_avg": first, "exp_avg_sq": second}, noise)

    def _keep(
        self, parameter: Tensor, step: int, moments: Mapping[str, Tensor], noise: torch.Generator | None = None
    ) -> None:
        few = parameter.numel() < SMALL
        kept = {k: m if few else Codes.of(m, k, noise) for k, m in moments.items()}
        self.state[parameter] = {"step": torch.tensor(float(step)), **kept}

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """``step`` and both moments of a parameter in fp32, under the names that AdamW has for them."""
        state = self.state[parameter]
        return {k: v.value(parameter.shape) if isinstance(v, Codes) else v for k, v in state.items()}

    def take(self, parameter: Tensor, moments: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`moments`, to the last bit, also of AdamW's own as near as codes come to them."""
        both = {k: v for k, v in moments.items() if k != "step"}
        self._keep(parameter, int(moments["step"]), both)

    def nbytes(self) -> int:
        """Bytes that the moments take."""
        return sum(v.nbytes for state in self.state.values() for k, v in state.items() if k != "step")
