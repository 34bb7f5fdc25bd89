"""Gate truncation: which heads of a Flag-DiT read text at all, what leaving the others out saves, and what it changes.

Text enters every head through a gate, tanh of a learned number (Gao et al. 2024). Many stay near zero.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accessory.diffusion.batch import OnStep, Shape, StepEvent, device_of, moved
from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.guidance import network_dtype
from accessory.diffusion.sampler import SamplerSettings, sample

DEFAULT = SamplerSettings()


@dataclass(frozen=True)
class GateTable:
    """Gates of a model: ``values`` (n_layers, H) in (-1, 1), tanh applied. A head is cut when abs is below a threshold;
    a threshold of 1 cuts all."""

    values: Tensor

    def cut(self, threshold: float) -> Tensor:
        """(n_layers, H) True at heads that a threshold cuts."""
        return self.values.abs() < _effective(threshold)

    def share(self, threshold: float) -> float:
        """Share of heads that are cut."""
        return float(self.cut(threshold).float().mean())

    def silent(self, threshold: float) -> int:
        """Layers that read no text any more."""
        return int(self.cut(threshold).all(1).sum())

    def threshold(self, share: float) -> float:
        """The smallest threshold that cuts at least this share of the heads.

        Raises:
            ValueError: for a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the share of heads to cut lies in [0, 1], got {share}")
        strengths = self.values.abs().float().flatten().sort().values
        count = math.ceil(share * len(strengths) - 1e-9)
        if not count:
            return 0.0
        above = torch.nextafter(strengths[count - 1], strengths.new_tensor(math.inf))
        return max(float(above), torch.finfo(torch.float32).tiny)

    def markdown(self, threshold: float = 0.0) -> str:
        """A table, layer by layer."""
        lines = ["| layer | weakest | median | strongest | cut |", "|---:|---:|---:|---:|---:|"]
        for i, (row, cut) in enumerate(zip(self.values.abs(), self.cut(threshold))):
            low, middle, high = (float(v) for v in (row.min(), row.median(), row.max()))
            lines.append(f"| {i} | {low:.4f} | {middle:.4f} | {high:.4f} | {int(cut.sum())} of {len(row)} |")
        return "\n".join(lines)


def measure_gates(denoiser: FlagDiT) -> GateTable:
    """The gates of a model.

    Raises:
        ValueError: for one that reads no text.
    """
    return GateTable(denoiser.gates().cpu())


def truncate(threshold: float, steering: Steering | None = None) -> Steering:
    """Steering that leaves out the heads below a threshold: 0 none, 1 all of them, which removes the text path.

    Raises:
        ValueError: for a negative threshold.
    """
    if not threshold >= 0:
        raise ValueError(f"a gate threshold is at least 0, got {threshold}")
    return replace(steering or Steering(), gate_threshold=_effective(threshold))


def _effective(threshold: float) -> float:
    # A gate that is wide open is 1 in fp32.
    return math.inf if threshold >= 1 else threshold


@dataclass(frozen=True)
class Truncation:
    """What a threshold does.

    Attributes:
        threshold: 0 is the untouched model.
        share: of heads that are cut.
        silent: layers without text.
        seconds: for one sampling of the batch, the median.
        speedup: seconds of the untouched model over these.
        output_max, output_mean: absolute change of the network's output, half-way through the untouched sampling.
        psnr: of the sampled latents in decibel, the peak being the range of the untouched ones; infinite for no change.
    """

    threshold: float
    share: float
    silent: int
    seconds: float
    speedup: float
    output_max: float
    output_mean: float
    psnr: float


@torch.no_grad()
def compare_truncation(
    denoiser: FlagDiT,
    condition: Condition,
    null: Condition | None = None,
    *,
    thresholds: Sequence[float],
    shape: Shape | Sequence[Shape],
    seeds: Sequence[int],
    settings: SamplerSettings = DEFAULT,
    steering: Steering | None = None,
    repeats: int = 1,
) -> list[Truncation]:
    """Sample the same pictures at several thresholds, taking turns ``repeats`` times, and compare with none cut.

    The first row is threshold 0. The other arguments are those of :func:`accessory.diffusion.sampler.sample`.
    """
    table = measure_gates(denoiser)
    chosen = list(dict.fromkeys([0.0, *thresholds]))
    steered = {threshold: truncate(threshold, steering) for threshold in chosen}
    seen: list[StepEvent] = []  # the state half-way, at the end

    def keep(event: StepEvent) -> None:
        if not seen or event.steps is None or 2 * event.step <= event.steps + 1:
            seen[:] = [event]

    def draw(threshold: float, on_step: OnStep | None = None) -> Latents:
        return sample(
            denoiser, condition, null, shape=shape, seeds=seeds, settings=settings, steering=steered[threshold],
            on_step=on_step,
        )  # fmt: skip

    samples = {0.0: draw(0.0, keep)}
    seconds: dict[float, list[float]] = {threshold: [] for threshold in chosen}
    for _ in range(max(1, repeats)):
        for threshold in chosen:
            began = _clock(condition)
            samples[threshold] = draw(threshold)
            seconds[threshold].append(_clock(condition) - began)
    dtype = network_dtype(denoiser)
    x, told = moved(seen[0].latents, dtype=dtype), condition.to(dtype=dtype)
    t = torch.full((len(x),), seen[0].t, device=device_of(x))
    outputs = {threshold: _flat(denoiser(x, t, told, steering=s)) for threshold, s in steered.items()}
    median = {threshold: statistics.median(s) for threshold, s in seconds.items()}
    rows = []
    for threshold in chosen:
        change = (outputs[threshold] - outputs[0.0]).abs()
        rows.append(
            Truncation(
                threshold=threshold,
                share=table.share(threshold),
                silent=table.silent(threshold),
                seconds=median[threshold],
                speedup=median[0.0] / median[threshold],
                output_max=float(change.max()),
                output_mean=float(change.mean()),
                psnr=psnr(_flat(samples[threshold]), _flat(samples[0.0])),
            )
        )
    return rows


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal to noise in decibel, the peak being the range of ``wanted``; infinite when both are the same."""
    error = float((found - wanted).square().mean())
    peak = float(wanted.max() - wanted.min())
    if not error:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak else -math.inf


def _flat(x: Latents) -> Tensor:
    return torch.cat([part.float().flatten() for part in x])


def _clock(condition: Condition) -> float:
    if next(iter(condition.parts().values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
