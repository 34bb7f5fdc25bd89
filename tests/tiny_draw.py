"""A generator in milliseconds, and a file of squares for it to draw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from accessory.data.loader import Loader
from accessory.data.mixture import Mixture
from accessory.data.sources import FileConfig, open_source
from accessory.data.targets import TargetEncoder
from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.models.conditioner import DreamSource, TextSource
from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream import DreamConfig, Residual, TapConfig
from accessory.models.generator import Generator, GeneratorConfig, build_generator
from accessory.models.generator_config import FlagDiTSource, PixelSource
from accessory.models.text_profiles import TextProfile
from tests.tiny import tiny_config, tiny_tokenizer

SIZE = 16
PROFILE = TextProfile(name="tiny", dtype="fp32", max_length=32, eos=True, bos=False)
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
DIT = FlagDiTConfig(
    dim=48, n_layers=3, n_heads=2, multiple_of=16, latent_channels=12, text_dim=32, patch=(1, 2, 2),
    learn_sigma=False, norms="sandwich", rope_axes=2, eol_token=False, adaln_dim=48,
)  # fmt: skip
BRIDGE = DreamConfig(
    num_queries=3,
    tap=TapConfig(layers=(-1, -2), mix="softmax", norm=True, positions="both"),
    connector=ConnectorConfig(kind="encoder", width=16, depth=1, heads=2),
    heads=HeadsConfig(sequence="linear", zero_init=True),
    residual=Residual(tap=None),
)


def draw_config(folder: Path, *, dream: bool = False, **options: object) -> GeneratorConfig:
    """Pixels in patches of two, a transformer of three blocks, a language model of two that reads the prompt."""
    model = tiny_config(tiny_tokenizer(folder / "words"))
    text = TextSource(profile=PROFILE, source=model)
    config = GeneratorConfig(
        denoiser=FlagDiTSource(config=DIT),
        codec=PixelSource(patch=2),
        conditioner=DreamSource(model=model, dream=BRIDGE, profile=PROFILE) if dream else text,
        size=SIZE,
        tuning=("conditioner.dream.queries", "conditioner.dream.heads.*") if dream else ("denoiser.*",),
    )
    return replace(config, **options)  # type: ignore[arg-type]


def draw_model(folder: Path, *, seed: int = 0, dream: bool = False, **options: object) -> Generator:
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
    """Batches of prompts and pictures."""
    columns = {"image": "file", "caption": "text"}
    source = open_source(FileConfig("captions", path=str(write_captions(folder, n)), columns=columns))
    return Loader(Mixture([source], seed=3), TargetEncoder(SIZE), batch_size, rank=rank, world=world)
