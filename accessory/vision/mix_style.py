"""Feature statistics of one picture under the content of another, so that a tower does not lean on drawing style."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accessory.vision.tower import Tower


@dataclass(frozen=True)
class MixStyleConfig:
    """``modules``: names inside the tower whose output maps are mixed; ``alpha`` of the Beta distribution."""

    modules: tuple[str, ...]
    probability: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not self.modules or not 0 < self.probability <= 1 or self.alpha <= 0:
            raise ValueError(
                f"mix_style needs modules, a probability in (0, 1] and a positive alpha, got {self.modules}, "
                f"{self.probability} and {self.alpha}"
            )


def mix_style(x: Tensor, alpha: float) -> Tensor:
    """Each map (C, H, W) of (N, C, H, W) with mean and deviation per channel drawn towards those of another map.

    Zhou et al. 2021, MixStyle. The statistics carry no gradient, as there.
    """
    mean = x.detach().mean((2, 3), keepdim=True)
    std = x.detach().std((2, 3), keepdim=True) + 1e-5
    share = torch.distributions.Beta(alpha, alpha).sample((x.shape[0], 1, 1, 1)).to(x)
    other = torch.randperm(x.shape[0], device=x.device)
    mixed_mean = share * mean + (1 - share) * mean[other]
    mixed_std = share * std + (1 - share) * std[other]
    return (x - mean) / std * mixed_std + mixed_mean


def attach_mix_style(tower: Tower, config: MixStyleConfig) -> None:
    """Mix at the named modules while the tower trains; evaluation is untouched.

    Raises:
        ValueError: for a name that the tower does not have.
    """
    known = dict(tower.named_modules())
    if missing := [name for name in config.modules if name not in known]:
        near = [name for name in known if name.count(".") == 1]
        raise ValueError(f"the tower has no modules {missing}; there are for example {near[:12]}")

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not tower.training or output.shape[0] < 2 or float(torch.rand(())) >= config.probability:
            return None
        return mix_style(output, config.alpha)

    for name in config.modules:
        known[name].register_forward_hook(hook)
