"""A running average of what trains, which is often better than the last weights (Polyak and Juditsky 1992)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from accessory.train.config import EmaConfig
from accessory.train.optim import check_names


class Average:
    """Averages of ``masters`` (fp32 tensors by name), which it starts from; :meth:`update` follows each optimizer
    step."""

    def __init__(self, config: EmaConfig, masters: Mapping[str, Tensor]) -> None:
        self.config = config
        self.masters = masters
        self.values = {name: m.detach().clone() for name, m in masters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After update ``step`` (from 1)."""
        count, rest = divmod(step, self.config.every)
        if rest:
            return
        # An average of few steps would hold mostly the start, so it forgets faster then.
        decay = min(self.config.decay, (1 + count) / (self.config.warmup + count))
        torch._foreach_lerp_(list(self.values.values()), list(self.masters.values()), 1 - decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over ``values`` of a checkpoint.

        Raises:
            ValueError: when names or shapes are not those of what trains; without any when the run had no average.
        """
        if not values:
            raise ValueError("the checkpoint holds no average: train.ema was off then; it cannot be turned on later")
        check_names(values, self.values, "the average")
        for name, value in values.items():
            if value.shape != self.values[name].shape:
                raise ValueError(f"the average of {name} has shape {list(value.shape)}")
            self.values[name].copy_(value)

    @contextlib.contextmanager
    def applied(self, publish: Callable[[], None]) -> Iterator[None]:
        """The averages in the place of the masters; ``publish`` copies masters to where the model reads them."""
        kept = {name: m.detach().clone() for name, m in self.masters.items()}
        self._fill(self.values, publish)
        try:
            yield
        finally:
            self._fill(kept, publish)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor], publish: Callable[[], None]) -> None:
        for name, master in self.masters.items():
            master.copy_(values[name])
        publish()
