"""Rotary position embedding (Su et al. 2021) in Meta's interleaved-pair order, and its context extensions."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How a rotary table is stretched to contexts longer than the trained one.

    ``linear`` divides every frequency by ``factor`` (LLaMA2-Accessory's ``rope_scaling`` s is ``factor = 1 / s``),
    ``ntk`` raises the base by ``factor ** (A / (A - 2))``, ``yarn`` blends by wavelength (Peng et al. 2023),
    ``llama3`` is Meta's smooth cut of LLaMA 3.1.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"rope_scaling.factor must be positive, got {self.factor}")


def frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Angular frequencies (A/2) in fp32 and the factor that multiplies cos and sin (1 except for YaRN)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if scaling is None:
        return base**-steps, 1.0
    if scaling.kind == "linear":
        return base**-steps / scaling.factor, 1.0
    if scaling.kind == "ntk":
        return (base * scaling.factor ** (head_dim / (head_dim - 2))) ** -steps, 1.0
    if scaling.kind == "llama3":
        return _llama3(base**-steps, scaling), 1.0
    return _yarn(base**-steps, head_dim, base, scaling)


def _llama3(freq: Tensor, s: RopeScaling) -> Tensor:
    turns = s.original_length * freq / (2 * math.pi)  # full turns within the trained context
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return freq * ((1 - smooth) / s.factor + smooth)


def _yarn(freq: Tensor, head_dim: int, base: float, s: RopeScaling) -> tuple[Tensor, float]:
    def dimension(turns: float) -> float:
        return head_dim * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(s.beta_fast)), 0)
    high = min(math.ceil(dimension(s.beta_slow)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=freq.device)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    attention = s.attention_factor
    if attention is None:
        attention = 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0
    return freq / s.factor * ramp + freq * (1 - ramp), attention


def table(positions: Tensor, head_dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Complex factors cos + i sin (B, T, A/2), fp32 parts, of integer ``positions`` (B, T).

    Computed at every call instead of being stored: a handful of values, and a model built on ``meta`` has no buffer
    that loading could forget.
    """
    freq, attention = frequencies(head_dim, base, scaling, positions.device)
    angle = positions.float()[..., None] * freq
    cos, sin = angle.cos() * attention, angle.sin() * attention
    # A compiler has no code for complex numbers, so a traced graph carries them as pairs (B, T, A/2, 2).
    return torch.stack((cos, sin), -1) if torch.compiler.is_compiling() else torch.complex(cos, sin)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of (B, T, H, A) by complex factors (B, T, A/2); fp32 inside, cast back.

    One complex product of contiguous pairs: on a CPU five to ten times faster than products of strided halves, and
    bit for bit the same. Pairs (B, T, A/2, 2) instead of complex factors are for compiled graphs.
    """
    if not rope.is_complex():
        (re, im), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope[:, :, None].unbind(-1)
        return torch.stack((re * cos - im * sin, re * sin + im * cos), -1).flatten(-2).to(x.dtype)
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, A/2)
    return torch.view_as_real(z * rope[:, :, None]).flatten(-2).to(x.dtype)
