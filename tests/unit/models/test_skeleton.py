"""A model without weights has the names, shapes and trained parameters of the real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accessory.models import build
from accessory.models.build import BackboneConfig, Model, ModelConfig, ResamplerConfig
from accessory.models.mllm import MLLM
from accessory.models.skeleton import resolved, sizes, skeleton
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, PrefixSpec, TrainSpec, TuningSpec
from tests.tiny import tiny_model, tiny_model_dir

TUNINGS: tuple[tuple[TuningSpec, ...], ...] = (
    (TrainSpec(("backbone.*", "projector.*")),),
    (LoraSpec(rank=3), BiasSpec(("wq", "w2")), NormSpec()),
    (PrefixSpec(length=2, layers=1), TrainSpec(("resampler.*",))),
)


def facts(net: MLLM) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    return {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in net.named_parameters()}


def options(tuning: tuple[TuningSpec, ...]) -> dict[str, object]:
    prefix = isinstance(tuning[0], PrefixSpec)
    return {"tuning": tuning, "resampler": ResamplerConfig(length=2, width=16, depth=1, heads=2) if prefix else None}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_names_and_shapes_are_those_of_the_model(tmp_path: Path, tuning: tuple[TuningSpec, ...]) -> None:
    made: Model = tiny_model(tmp_path, train=True, **options(tuning))
    net = skeleton(made.config)
    assert facts(net) == facts(made.net)
    assert all(p.is_meta for p in net.parameters())
    other = skeleton(replace(made.config, tuning=(NormSpec(),)))
    assert facts(other) != facts(net)


@pytest.mark.parametrize("tuning", [TUNINGS[1], (PrefixSpec(length=2),), (TrainSpec(("projector.*",)),)])
def test_on_a_base_too(tmp_path: Path, tuning: tuple[TuningSpec, ...]) -> None:
    folder = tiny_model_dir(tmp_path, tuning=(LoraSpec(rank=2), NormSpec(), TrainSpec(("projector.*",))))
    config = ModelConfig(base=str(folder), tuning=tuning, max_length=77)
    made = build.build(config, train=True)
    assert facts(skeleton(config)) == facts(made.net)
    assert resolved(config) == replace(made.config, base_sha256=None)


def test_a_run_that_was_not_made_is_what_its_experiment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "exps" / "some").mkdir(parents=True)
    (tmp_path / "exps" / "some" / "first.yaml").write_text(
        "model:\n  backbone: {source: weights/tinyllama-1.1b}\n  tower: null\n  projector: null\n  max_length: 99\n"
        "  tuning: [{kind: prefix, layers: 3}]\ntrain: {output_dir: runs/first}\n"
    )
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "weights")
    found = resolved(ModelConfig(base="runs/first/final", tuning=(NormSpec(),), template="alpaca"))
    assert (found.max_length, found.template, found.tuning) == (99, "alpaca", (NormSpec(),))
    net = skeleton(ModelConfig(base="runs/first/final", tuning=(NormSpec(),)))
    assert sum(".prefix.gate" in n for n, _ in net.named_parameters()) == 3
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == (2 * 22 + 1) * 2048
    with pytest.raises(ValueError, match=r"no folder runs/first/final; .* train exps/some/first.yaml makes it"):
        build.base_folder("runs/first/final")
    with pytest.raises(ValueError, match="no folder runs/second/final"):
        skeleton(ModelConfig(base="runs/second/final"))


def test_a_released_model_has_the_sizes_of_its_type() -> None:
    found = resolved(ModelConfig(base="weights/SPHINX-1k", tuning=(TrainSpec(("projector.*",)),)))
    assert found.tower is not None
    assert (found.tower.preset, found.tiling.size, found.max_length) == ("sphinx-1k", 448, 4096)
    assert sizes(found.backbone).dim == 5120
    assert found.template == "sphinx"
    with pytest.raises(ValueError, match="brings its own tower"):
        resolved(ModelConfig(base="weights/SPHINX-1k", tower=None))


def test_a_released_model_is_what_its_conversion_writes() -> None:
    """Its template, and what its type tunes in the language model."""
    assert resolved(ModelConfig(base="weights/alpacaLlava_llamaQformerv2")).template == "alpaca"
    top = ModelConfig(base="weights/alpacaLlava_llamaQformerv2Peft_13b", tuning=(LoraSpec(rank=2),))
    assert any(n.endswith("wq.bias") for n, _ in skeleton(top).named_parameters())
    with pytest.raises(ValueError, match="already has a bias"):
        skeleton(replace(top, tuning=(BiasSpec(),)))
    assert not any(n.endswith("wq.bias") for n, _ in skeleton(replace(top, base="weights/SPHINX")).named_parameters())


def test_sizes_come_from_the_folder_before_its_name(tmp_path: Path) -> None:
    assert sizes(BackboneConfig("weights/llama2-70b")).n_kv_heads == 8
    (tmp_path / "llama2-70b").mkdir()
    for source in (str(tmp_path / "llama2-70b"), "weights/llama9", None):
        with pytest.raises(ValueError, match=r"no config.json, so its sizes are not known"):
            sizes(BackboneConfig(source))
