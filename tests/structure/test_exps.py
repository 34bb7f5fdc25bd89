"""Every experiment file loads and builds at its full size on the meta device: names, patterns and groups fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accessory import config as configuration
from accessory.backbone.llama import Llama
from accessory.backbone.sizes import SIZES
from accessory.data import tokenizer
from accessory.data.sources import FileConfig, read_configs
from accessory.models import build
from accessory.models.build import Model, ModelConfig
from accessory.train.optim import _groups
from accessory.train.run import RunConfig
from accessory.vision import presets
from tests.structure.source import ROOT
from tests.tiny import tiny_tokenizer

EXPERIMENTS = sorted((ROOT / "exps").glob("*.yaml"))
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
    monkeypatch.setattr(build, "_digest", lambda _: "0" * 64)
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


def test_there_are_experiments() -> None:
    assert len(EXPERIMENTS) >= 3
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
