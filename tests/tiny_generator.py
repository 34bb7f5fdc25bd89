"""A whole generator in milliseconds: random weights on the model of :mod:`tests.tiny`, pixels as latents, no assets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from accessory.diffusion.flag_dit import FlagDiTConfig
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.sampler import Ode, SamplerSettings
from accessory.diffusion.time_grid import Grid
from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream import DreamConfig, Residual, TapConfig
from accessory.models.generator import Generator, build_generator, save_generator
from accessory.models.generator_config import DreamSource, FlagDiTSource, GeneratorConfig, PixelSource, TextSource
from accessory.models.text_profiles import Padding, TextProfile
from tests.tiny import tiny_model_dir

WIDTH = 32  # of the tiny model's states
PROFILE = TextProfile("tiny", max_length=24, padding=Padding(multiple=8), dtype="fp32")
DREAM = DreamConfig(
    num_queries=3,
    tap=TapConfig(layers=(None, -2), mix="softmax", norm=True, positions="both"),
    connector=ConnectorConfig("encoder", width=16, depth=1, heads=2),
    heads=HeadsConfig(sequence="linear", zero_init=True),
    residual=Residual(None),
    hide_queries_from_future=True,
)
DIT = FlagDiTConfig(dim=32, n_layers=2, n_heads=4, multiple_of=8, latent_channels=12, text_dim=WIDTH)
SETTINGS = SamplerSettings(Ode(method="euler"), Grid(points=4), Guidance(scale=3.0))


def tiny_generator_config(model_dir: Path, kind: Literal["text", "dream"] = "text", **options: Any) -> GeneratorConfig:
    """Pixels in patches of 2 x 2, of which the denoiser takes 2 x 2 again; squares of 16 pixels by default."""
    source = str(model_dir)
    text, dream = TextSource(PROFILE, source), DreamSource(source, DREAM, PROFILE)
    config = GeneratorConfig(
        denoiser=FlagDiTSource(DIT),
        codec=PixelSource(2),
        conditioner=text if kind == "text" else dream,
        sampler=SETTINGS,
        size=16,
        tuning=("denoiser.*",),
    )
    return replace(config, **options)


def tiny_generator(
    tmp_path: Path, kind: Literal["text", "dream"] = "text", *, train: bool = False, **options: Any
) -> Generator:
    """The built generator, disturbed so that prompts, times and pictures matter. The model lies in ``tiny``."""
    folder = tmp_path / "tiny"
    if not folder.exists():
        tiny_model_dir(tmp_path)
    torch.manual_seed(0)
    made = build_generator(tiny_generator_config(folder, kind, **options), train=train)
    shake(made.denoiser)
    return made


@torch.no_grad()
def shake(module: torch.nn.Module, std: float = 0.15, seed: int = 1) -> None:
    """Move every parameter away from where it started, those at zero above all."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(std * torch.randn(p.shape, generator=g))


def tiny_generator_dir(tmp_path: Path, kind: Literal["text", "dream"] = "text", **options: Any) -> Path:
    """A generator folder with every weight that the model folder beside it does not have."""
    folder = tmp_path / f"generator-{kind}"
    save_generator(tiny_generator(tmp_path, kind, **options), folder)
    return folder
