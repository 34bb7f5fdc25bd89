"""A whole generator in milliseconds: random weights on the model of :mod:`tests.tiny`, pixels as latents, no assets.

``tiny_generator`` makes one that draws at once (noise, but prompts matter); ``draw_model`` one that is ready to train,
and ``caption_loader`` the squares that it learns to draw.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw

from accessory.data.loader import Loader
from accessory.data.mixture import Mixture
from accessory.data.sources import FileConfig, open_source
from accessory.data.targets import Fit, TargetEncoder
from accessory.diffusion.flag_dit import FlagDiTConfig
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.sampler import Ode, SamplerSettings
from accessory.diffusion.time_grid import Grid
from accessory.models.build import ModelConfig
from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream_config import DreamConfig, Residual, TapConfig
from accessory.models.generator import Generator, build_generator, save_generator
from accessory.models.generator_config import DreamSource, FlagDiTSource, GeneratorConfig, PixelSource, TextSource
from accessory.models.text_profiles import Padding, TextProfile
from tests.tiny import tiny_config, tiny_model_dir, tiny_tokenizer

Kind = Literal["text", "dream"]

WIDTH = 32  # of the tiny model's states
SIZE = 16  # side of a picture
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
LEARNER = FlagDiTConfig(
    dim=48, n_layers=3, n_heads=2, multiple_of=16, latent_channels=12, text_dim=WIDTH, learn_sigma=False,
    norms="sandwich", rope_axes=2, eol_token=False, adaln_dim=48,
)  # fmt: skip
"""Of the newer family, and wide enough to learn a few pictures."""
SETTINGS = SamplerSettings(Ode(method="euler"), Grid(points=4), Guidance(scale=3.0))


def tiny_generator_config(model: Path | ModelConfig, kind: Kind = "text", **options: Any) -> GeneratorConfig:
    """Pixels in patches of 2 x 2, of which the denoiser takes 2 x 2 again; squares of 16 pixels by default."""
    source = model if isinstance(model, ModelConfig) else str(model)
    text, dream = TextSource(PROFILE, source), DreamSource(source, DREAM, PROFILE)
    config = GeneratorConfig(
        denoiser=FlagDiTSource(DIT),
        codec=PixelSource(2),
        conditioner=text if kind == "text" else dream,
        sampler=SETTINGS,
        size=SIZE,
        tuning=("denoiser.*",),
    )
    return replace(config, **options)


def tiny_generator(tmp_path: Path, kind: Kind = "text", *, train: bool = False, **options: Any) -> Generator:
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


def tiny_generator_dir(tmp_path: Path, kind: Kind = "text", **options: Any) -> Path:
    """A generator folder with every weight that the model folder beside it does not have."""
    folder = tmp_path / f"generator-{kind}"
    save_generator(tiny_generator(tmp_path, kind, **options), folder)
    return folder


# --- learning to draw -------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
BRIDGE = ("conditioner.dream.queries", "conditioner.dream.heads.*")


def draw_config(folder: Path, *, dream: bool = False, **options: Any) -> GeneratorConfig:
    """A denoiser that can learn, or with ``dream`` a bridge on a frozen one; the language model is drawn anew."""
    model = tiny_config(tiny_tokenizer(folder / "words"))
    given = {"denoiser": FlagDiTSource(LEARNER), "tuning": BRIDGE if dream else ("denoiser.*",), **options}
    return tiny_generator_config(model, "dream" if dream else "text", **given)


def draw_model(folder: Path, *, seed: int = 0, dream: bool = False, **options: Any) -> Generator:
    """The built generator of :func:`draw_config`, ready to train."""
    torch.manual_seed(seed)
    return build_generator(draw_config(folder, dream=dream, **options), train=True)


def write_captions(folder: Path, n: int = 8) -> Path:
    """``captions.jsonl``: squares in n colours."""
    rows = []
    for name in COLOURS[:n]:
        image = Image.new("RGB", (SIZE, SIZE), (200, 200, 200))
        ImageDraw.Draw(image).rectangle((4, 4, 11, 11), fill=name)
        image.save(folder / f"{name}.png")
        rows.append({"file": f"{name}.png", "text": f"a {name} square"})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def caption_loader(folder: Path, batch_size: int, rank: int = 0, world: int = 1, n: int = 8) -> Loader:
    """Batches of prompts and squares."""
    return open_captions(write_captions(folder, n), batch_size, rank=rank, world=world)


def open_captions(path: Path, batch_size: int, fit: Fit | None = None, **options: Any) -> Loader:
    """Batches of the rows of a file like that of :func:`write_captions`."""
    source = open_source(FileConfig("captions", path=str(path), columns={"image": "file", "caption": "text"}))
    return Loader(Mixture([source], seed=3), TargetEncoder(SIZE, fit), batch_size, **options)
