"""Every experiment file loads and builds at its full size on the meta device: names, patterns and groups fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accessory import config as configuration
from accessory.backbone.llama import Llama
from accessory.backbone.sizes import SIZES
from accessory.data import tokenizer
from accessory.data.sources import FileConfig, read_configs
from accessory.diffusion.latents import Codec, PixelCodec
from accessory.models import build, conditioner, generator
from accessory.models.build import Model, ModelConfig
from accessory.models.generator import GeneratorConfig
from accessory.models.generator_config import FlagDiTSource
from accessory.peft import lora
from accessory.train.generator_run import GeneratorRunConfig, row_encoder
from accessory.train.optim import _groups
from accessory.train.run import RunConfig
from accessory.vision import presets
from tests.structure.source import ROOT
from tests.tiny import tiny_tokenizer

FILES = sorted((ROOT / "exps").glob("*.yaml"))
DRAWING = [path for path in FILES if "generator" in configuration.read(path)]
EXPERIMENTS = [path for path in FILES if path not in DRAWING]
DATA = sorted((ROOT / "data_configs").glob("*.yaml"))
SHIPPED = ROOT / "exps" / "nano_sphinx.yaml"  # what weights/nano-sphinx is made by


def meta_build(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The production factory with weights left out: every other line of it runs."""
    words = tokenizer.load(tiny_tokenizer(tmp_path / "words"))
    monkeypatch.setattr(build, "_backbone", lambda *_: (Llama(SIZES["smollm2-135m"]).to(torch.bfloat16), words))
    monkeypatch.setattr(build, "build_tower", lambda source, *_: presets.build(source.preset))

    def shipped(*_: Any, **__: Any) -> Model:
        return build.build(configuration.load(SHIPPED, RunConfig).model, train=False)

    monkeypatch.setattr(build, "load", shipped)
    monkeypatch.setattr(build, "file_digest", lambda _: "0" * 64)
    monkeypatch.setattr(lora, "folding_error", lambda _: 0.0)  # a number, which meta tensors do not have
    with torch.device("meta"):
        return build.build(config, train=True)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_build(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = configuration.load(path, RunConfig)
    model = meta_build(found.model, tmp_path, monkeypatch)
    trained = {n: p for n, p in model.net.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert sum(map(len, _groups(trained, found.train).values())) == len(trained)
    assert any((folder / found.data.sources).is_file() for folder in (ROOT, path.parent))
    assert found.train.output_dir.startswith("runs/")


class Network(nn.Module):
    """Stands for a network of diffusers, whose sizes lie beside its weights."""

    prediction, latent_channels = "epsilon", 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))


def draw_build(config: GeneratorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> generator.Generator:
    """As :func:`meta_build`, of generators: weights, a base and what only a foreign folder says are left out."""
    words, sizes = tokenizer.load(tiny_tokenizer(tmp_path / "words")), {"llama2": "llama2-7b", "vicuna": "llama2-7b"}

    def model(source: str | ModelConfig, *_: Any) -> tuple[Model, set[str]]:
        known = ModelConfig(tower=None, projector=None) if isinstance(source, str) else source
        if source == "weights/nano-sphinx":
            known = configuration.load(SHIPPED, RunConfig).model
        name = str(known.backbone.source).removeprefix("weights/").split("-")[0]
        size = SIZES[sizes.get(name, "smollm2-135m")]
        monkeypatch.setattr(build, "_backbone", lambda *_: (Llama(size).to(torch.bfloat16), words))
        monkeypatch.setattr(build, "build_tower", lambda source, *_: presets.build(source.preset))
        made = build.build(known)
        return made, set()

    ours = generator._denoiser
    monkeypatch.setattr(conditioner, "_model", model)
    monkeypatch.setattr(generator, "_denoiser", lambda c: ours(c) if isinstance(c, FlagDiTSource) else Network())
    monkeypatch.setattr(generator, "_codec", lambda c: PixelCodec(c.patch) if c.kind == "pixel" else Codec(4, 8))
    monkeypatch.setattr(generator, "_bytes", lambda _: b"")
    monkeypatch.setattr(generator, "base_folder", Path)
    first = configuration.load(ROOT / "exps" / "nano_dit.yaml", GeneratorRunConfig).generator
    monkeypatch.setattr(generator, "load_generator", lambda *_, **__: generator.build_generator(first))
    with torch.device("meta"):
        return generator.build_generator(config, train=True)


@pytest.mark.parametrize("path", DRAWING, ids=lambda p: p.stem)
def test_experiments_that_draw_build(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = configuration.load(path, GeneratorRunConfig)
    made = draw_build(found.generator, tmp_path, monkeypatch)
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert sum(map(len, _groups(trained, found.train).values())) == len(trained)
    assert any((folder / found.data.sources).is_file() for folder in (ROOT, path.parent))
    assert found.train.output_dir.startswith("runs/")
    assert row_encoder(found, made).tile_size >= 1
    if found.objective.diffusion.scheduler is not None:
        found.objective.diffusion.process(made.denoiser)
    assert found.init in (None, *(configuration.read(p)["train"]["output_dir"] + "/final" for p in FILES))


def test_there_are_experiments() -> None:
    assert len(EXPERIMENTS) >= 3
    assert len(DRAWING) >= 7
    assert len(DATA) >= 4


@pytest.mark.parametrize("path", DATA, ids=lambda p: p.stem)
def test_data_configs_are_well_formed(path: Path) -> None:
    found, mistakes = read_configs(path)
    assert mistakes == []
    assert found
    for _, source in found:
        assert not isinstance(source, FileConfig) or Path(source.path).is_file()


def test_a_wrong_pattern_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = configuration.load(SHIPPED, RunConfig, ['model.tuning=[{kind: train, patterns: ["projetcor.*"]}]'])
    with pytest.raises(ValueError, match="matches no parameter"):
        meta_build(found.model, tmp_path, monkeypatch)


def test_scripts_name_existing_experiments() -> None:
    named = 0
    for script in (ROOT / "exps").glob("*.sh"):
        for word in script.read_text(encoding="utf-8").split():
            if word.startswith("exps/") and word.endswith((".yaml", ".sh")):
                assert (ROOT / word).is_file(), f"{script.name} names {word}"
                named += 1
    assert named >= 3
