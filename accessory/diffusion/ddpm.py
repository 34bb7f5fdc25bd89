"""The process of Large-DiT and TerDiT: noise prediction with a learned variance, ancestral sampling on fewer steps.

Sources: Ho et al. 2020 (equations 7 and 12), Nichol and Dhariwal 2021 (learned variance, equation 15; respacing).
Steps run the other way than the time of a flow: 0 is almost clean, the last is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from accessory.diffusion.batch import OnStep, each, means, report
from accessory.diffusion.denoiser import Latents


@dataclass(frozen=True)
class Posterior:
    """What an output says of the step before: everything of the shape of the state."""

    data: Tensor
    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Losses:
    """(B,) squared error of the noise, variational bound in bits (None without a learned variance), and their sum."""

    mse: Tensor
    bound: Tensor | None
    total: Tensor


@dataclass(frozen=True)
class Ddpm:
    """Linear betas and, for sampling, a choice of ``respaced`` steps, the first and the last among them.

    Attributes:
        steps: of training.
        beta_start, beta_end: ends of the linear betas.
        respaced: how many of the steps sampling takes; None takes all.

    Raises:
        ValueError: for a respacing that is not possible.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    respaced: int | None = None

    def __post_init__(self) -> None:
        if self.respaced is not None and not 2 <= self.respaced <= self.steps:
            raise ValueError(f"respaced is {self.respaced}, it must be from 2 to the {self.steps} steps of training")

    @cached_property
    def step_map(self) -> list[int]:
        """The training step of every sampling step; the network is always shown training steps."""
        if self.respaced is None:
            return list(range(self.steps))
        stride = (self.steps - 1) / (self.respaced - 1)
        return [round(i * stride) for i in range(self.respaced)]

    @cached_property
    def betas(self) -> Tensor:
        """(S,) float64, of the steps of sampling: what lies between two of them is one step now."""
        every = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        kept = torch.cumprod(1 - every, 0)[self.step_map]
        return 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(S,) float64: the share of variance that is still the data's."""
        return torch.cumprod(1 - self.betas, 0)

    @cached_property
    def _before(self) -> Tensor:
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """(S,) float64 variance of q(x_{t-1} | x_t, x_0); 0 at the first step."""
        return self.betas * (1 - self._before) / (1 - self.alphas_cumprod)

    @cached_property
    def _posterior_log_variance(self) -> Tensor:
        # The first is 0, its logarithm would be infinite: the second stands in.
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    def add_noise(self, data: Latents, noise: Latents, step: Tensor) -> Latents:
        """The state at ``step``, an index (B,) of sampling (of training, where nothing is respaced)."""

        def mix(step: Tensor, data: Tensor, noise: Tensor) -> Tensor:
            kept = self.alphas_cumprod
            return _at(kept.sqrt(), step, data) * data + _at((1 - kept).sqrt(), step, data) * noise

        return each(mix, step, data, noise)

    def posterior(self, output: Tensor, x: Tensor, step: Tensor) -> Posterior:
        """The reading of an output (B, C or 2C, ...) for ``x`` (B, C, ...) at ``step``; nothing is clipped."""
        noise, log_variance = self._split(output, x, step)
        kept = self.alphas_cumprod
        data = _at((1 / kept).sqrt(), step, x) * x - _at((1 / kept - 1).sqrt(), step, x) * noise
        return Posterior(data, self._mean(data, x, step), log_variance)

    def _split(self, output: Tensor, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        low = _at(self._posterior_log_variance, step, x)
        channels = x.shape[1]
        if output.shape[1] == channels:
            return output, low.expand_as(x)
        if output.shape[1] != 2 * channels:
            raise ValueError(f"{output.shape[1]} channels for {channels} latent ones: as many, or twice as many")
        share = (output[:, channels:] + 1) / 2
        return output[:, :channels], share * _at(self.betas.log(), step, x) + (1 - share) * low

    def _mean(self, data: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        rest = 1 - self.alphas_cumprod
        of_data = self.betas * self._before.sqrt() / rest
        of_state = (1 - self._before) * (1 - self.betas).sqrt() / rest
        return _at(of_data, step, x) * data + _at(of_state, step, x) * x

    def losses(self, output: Latents, data: Latents, noise: Latents, step: Tensor) -> Losses:
        """The losses of an output for ``add_noise(data, noise, step)``; the bound trains the variance alone."""
        state = self.add_noise(data, noise, step)
        channels = data[0].shape[0]

        def squared(_: Tensor, output: Tensor, noise: Tensor) -> Tensor:
            return (output[:, :channels].float() - noise) ** 2

        mse = means(each(squared, step, output, noise))
        if output[0].shape[0] == channels:
            return Losses(mse, None, mse)

        def bound(step: Tensor, output: Tensor, data: Tensor, state: Tensor) -> Tensor:
            frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], 1).float()
            ours = self.posterior(frozen, state, step)
            mean, low = self._mean(data, state, step), _at(self._posterior_log_variance, step, state)
            apart = (mean - ours.mean) ** 2 * torch.exp(-ours.log_variance)
            divergence = 0.5 * (ours.log_variance - low - 1 + torch.exp(low - ours.log_variance) + apart)
            likelihood = -_log_likelihood(data, ours.mean, 0.5 * ours.log_variance)
            return torch.where(step == 0, likelihood, divergence) / math.log(2)

        bits = means(each(bound, step, output, data, state))
        return Losses(mse, bits, mse + bits)

    def sample(
        self,
        model: Callable[[int, Latents], Latents],
        x: Latents,
        noise: Callable[[Latents], Latents],
        on_step: OnStep | None = None,
        *,
        skipped: int = 0,
    ) -> Latents:
        """Ancestral sampling from the last step to the first.

        Args:
            model: gives the output for a training step and the state.
            x: noise, or with ``skipped`` a picture with the noise of the first step that is taken.
            noise: gives fresh noise of the layout of its argument.
            skipped: how many steps are left out at the start.

        Raises:
            ValueError: for a state that is not finite, naming the step.
        """
        count = len(self.step_map)
        for number, index in enumerate(reversed(range(count - skipped)), 1):

            def move(step: Tensor, output: Tensor, x: Tensor, drawn: Tensor) -> Tensor:
                p = self.posterior(output, x, step)
                return p.mean + torch.exp(0.5 * p.log_variance) * drawn if int(step) else p.mean

            x = each(move, torch.tensor(index), model(self.step_map[index], x), x, noise(x))
            report(x, number, count - skipped, float(self.step_map[index]), on_step)
        return x


def _at(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """Entries of a table at ``step`` (one number, or of a shape that broadcasts), as fp32 on the right device."""
    return table.to(like.device)[step.to(like.device)].float()


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of a Gaussian's mass in the 1/255 around 8-bit values scaled to [-1, 1]; the outermost are open."""

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = torch.exp(-log_scale)
    upper, lower = below(scale * (x - mean + 1 / 255)), below(scale * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp_min(1e-12).log()
