"""Quantisation as a value of a model's configuration, and as an option of the verbs that answer."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from accessory.__main__ import main
from accessory.backbone.weights import save_accessory
from accessory.models import build, generator
from accessory.models.build import BackboneConfig, Model, ModelConfig
from accessory.models.conditioner import DreamConditioner, TextConditioner
from accessory.models.generator_config import FlagDiTSource, LabelSource
from accessory.peft.attach import LoraSpec, PrefixSpec, TrainSpec, attached, merge, trainable_state
from accessory.peft.quantize import Quantization, found, kernels, num_bytes, quantize
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from benchmarks.quantize import swapped
from tests.tiny import disturb, tiny_model, tiny_model_dir, tiny_tokenizer
from tests.tiny_generator import DIT, shake, tiny_generator, tiny_generator_config, tiny_generator_dir
from tests.unit.evaluate.asked import stand_in
from tests.unit.models.pictured import TILING, batch, mixed

NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
SPECS = [Quantization("int8", embeddings=True), pytest.param(Quantization("nf4"), marks=NF4)]
LORA = (LoraSpec(rank=2), TrainSpec(("projector.*", "tower.*")))
LABELLED = FlagDiTSource(replace(DIT, text_dim=None, num_classes=3))


@pytest.fixture
def source(tmp_path: Path) -> BackboneConfig:
    """A folder of whole weights."""
    net = tiny_model(tmp_path).net.backbone
    save_accessory(net.config, net.state_dict(), tmp_path / "base")
    return BackboneConfig(str(tmp_path / "base"), None, str(tiny_tokenizer(tmp_path / "tokenizer")), "fp32")


def tuned(tmp_path: Path, source: BackboneConfig, **options: object) -> Model:
    return tiny_model(tmp_path, train=True, tiling=TILING, **{"backbone": source, "tuning": LORA, **options})


@torch.inference_mode()
def outputs(made: Model) -> torch.Tensor:
    both = batch(made, mixed())
    return made.net.eval().logits(made.net(both.ids, both.tiles))


@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_loaded_quantised(tmp_path: Path, source: BackboneConfig, spec: Quantization) -> None:
    full, made = tuned(tmp_path, source), tuned(tmp_path, source, quantization=spec)
    assert found(made.net) == spec
    assert num_bytes(made.net.backbone) < 0.7 * num_bytes(full.net.backbone)
    assert set(trainable_state(made.net)) == set(trainable_state(full.net))
    tower = {k: v for k, v in made.net.state_dict().items() if k.startswith(("tower.", "projector."))}
    assert {v.dtype for v in tower.values() if v.is_floating_point()} == {torch.float32}
    disturb(made.net)
    wanted = outputs(made)
    assert not torch.allclose(outputs(full), wanted, atol=1e-2)
    build.save(made, tmp_path / "model")
    stated = yaml.safe_load((tmp_path / "model" / build.CONFIG_FILE).read_text())["quantization"]
    assert stated == spec.as_dict()
    again = build.load(tmp_path / "model")
    assert torch.equal(outputs(again), wanted)
    assert again.config.quantization == spec


@NF4
@pytest.mark.parametrize("tuning", [LORA, (PrefixSpec(length=3), *LORA[1:])])
def test_what_hangs_on_nf4_trains_through_the_whole_model(
    tmp_path: Path, source: BackboneConfig, tuning: tuple
) -> None:
    made = tuned(tmp_path, source, tuning=tuning, quantization=Quantization("nf4"))
    disturb(made.net)
    loss, _, _ = DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, batch(made, mixed()))
    loss.backward()
    grads = {n: p.grad for n, p in made.net.named_parameters() if p.requires_grad}
    assert len(grads) > 8
    assert [n for n, g in grads.items() if g is None or not g.any()] == []


def test_a_base_is_folded_first_and_quantised_then(tmp_path: Path, source: BackboneConfig) -> None:
    spec = Quantization("int8")
    base = tuned(tmp_path, source)
    disturb(base.net)
    build.save(base, tmp_path / "first")
    merge(base.net)
    wanted = outputs(Model(quantize(base.net, spec), base.tokenizer, base.encoder, base.config))  # type: ignore[arg-type]
    config = replace(ModelConfig(), base=str(tmp_path / "first"), tuning=LORA[:1], quantization=spec)
    made = build.build(config, train=True)
    assert torch.equal(outputs(made), wanted)
    disturb(made.net)
    build.save(made, tmp_path / "second")
    assert torch.equal(outputs(build.load(tmp_path / "second")), outputs(made))
    again = replace(ModelConfig(), base=str(tmp_path / "second"), tuning=LORA[:1])
    with pytest.raises(ValueError, match=r"cannot fold into a quantised weight: .*wq is kept as int8"):
        build.build(again)
    other = replace(ModelConfig(), base=str(tmp_path / "second"), quantization=Quantization("nf4"))
    with pytest.raises(ValueError, match="quantised as int8 already"):
        build.build(other)


def test_shrinking_for_inference_folds_lora(tmp_path: Path, source: BackboneConfig) -> None:
    made = tuned(tmp_path, source)
    disturb(made.net)
    build.save(made, tmp_path / "model")
    before = outputs(made)
    small = build.shrink(build.load(tmp_path / "model"), Quantization("int8"))
    assert [spec.kind for spec in attached(small.net)] == ["train"]
    merge(made.net)
    quantize(made.net, Quantization("int8"))
    assert torch.equal(outputs(small), outputs(made))
    assert 0 < float((outputs(small) - before).abs().max()) < 0.2 * float(before.abs().max())
    with pytest.raises(ValueError, match="already"):
        build.shrink(small, Quantization("int4"))


def test_the_option_of_chat_and_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_model_dir(tmp_path, seed=1))
    seen = []
    real = build.shrink
    monkeypatch.setattr(build, "shrink", lambda model, spec: seen.append(spec) or real(model, spec))
    ask = ["chat", "--model", folder, "--device", "cpu", "--max-new-tokens", "4", "--ask", "What is this?"]
    assert main([*ask, "--quantize", "int8"]) == 0
    stand_in(monkeypatch, 4)
    score = ["evaluate", "--model", folder, "--device", "cpu", "--tasks", "emoji-names", "--limit", "2"]
    assert main([*score, "--controls", "none", "--quantize", "int8,embeddings"]) == 0
    assert seen == [Quantization("int8"), Quantization("int8", embeddings=True)]
    capsys.readouterr()
    for wrong, said in (("int3", "not one of int8, int4, nf4"), ("int4", "32 inputs"), ("int8,x", "neither group=")):
        assert main([*ask, "--quantize", wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_model_folder_is_handed_on_quantised(
    tmp_path: Path, source: BackboneConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its pictures: texts and questions about pictures are compared, and every code with its weight."""
    made = tuned(tmp_path, source)
    disturb(made.net, std=0.02)
    build.save(made, tmp_path / "model")
    convert = ["convert", str(tmp_path / "model"), str(tmp_path / "small"), "--quantize", "int8"]
    assert main(convert) == 0
    said = capsys.readouterr().out
    assert "nats a position, and" in said
    assert "the backbone is quantised as int8 when read" in said
    small = build.load(tmp_path / "small")
    assert found(small.net) == Quantization("int8")
    assert [spec.kind for spec in attached(small.net)] == ["lora", "train"]
    assert main([*convert[:2], str(tmp_path / "again"), *convert[3:], "--tolerance", "1e-9"]) == 2
    assert "the limit is 1e-09 nats" in capsys.readouterr().err
    real = build.load

    def broken(folder: Path, **options: object) -> Model:
        model = real(folder, **options)  # type: ignore[arg-type]
        if found(model.net) is not None:
            swapped(model.net)
        return model

    monkeypatch.setattr(build, "load", broken)
    assert main([*convert[:2], str(tmp_path / "broken"), *convert[3:], "--tolerance", "99"]) == 2
    assert "was removed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name in ("small", "again", "broken")) == ["small"]


@pytest.mark.parametrize("kind", ["text", "dream"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_reads_prompts_is_quantised_and_nothing_else(tmp_path: Path, spec: Quantization, kind: str) -> None:
    """The bridge with its queries and heads, the denoiser and the codec keep their values."""
    made = tiny_generator(tmp_path, kind)  # type: ignore[arg-type]
    conditioner = made.conditioner
    assert isinstance(conditioner, DreamConditioner | TextConditioner)
    if isinstance(conditioner, DreamConditioner):
        shake(conditioner.dream.heads)
    prompts = ["a red cat", "two blue stars"]
    with torch.no_grad():
        before, state = made.condition(prompts).seq, {k: v.clone() for k, v in made.state_dict().items()}
        drawn = made.generate(prompts, seeds=[1, 2])
        generator.shrink(made, spec)
        after = made.condition(prompts).seq
        again = made.generate(prompts, seeds=[1, 2])
    assert before is not None
    assert after is not None
    moved = float((after - before).norm() / before.norm())
    assert 0 < moved < (0.02 if spec.kind == "int8" else 0.2)
    other = float((before[0] - before[1]).norm() / before.norm())
    assert moved < other / 2  # and it matters: another prompt is further away than fewer bits
    assert drawn[0].tobytes() != again[1].tobytes()
    kept = {k: v for k, v in made.state_dict().items() if ".backbone." not in k}
    assert kept
    assert all(torch.equal(v, state[k]) for k, v in kept.items())
    assert any(".dream.heads." in k for k in kept) == (kind == "dream")
    assert len(dict(kernels(conditioner))) == 14 + spec.embeddings + 1  # untied: its output too
    with pytest.raises(ValueError, match="already"):
        generator.shrink(made, spec)


def test_a_bridge_may_be_trained_on_a_quantised_model(tmp_path: Path) -> None:
    base = ModelConfig(base=str(tiny_model_dir(tmp_path)), quantization=Quantization("int8"))
    config = tiny_generator_config(base, "dream", tuning=("conditioner.dream.heads.*", "denoiser.*"))
    made = generator.build_generator(config, train=True)
    assert found(made.conditioner) == Quantization("int8")
    shake(made.denoiser)
    assert isinstance(made.conditioner, DreamConditioner)
    made.condition(["a red cat"]).seq.square().sum().backward()  # type: ignore[union-attr]
    assert any(p.grad is not None and p.grad.any() for p in made.conditioner.dream.heads.parameters())
    generator.save_generator(made, tmp_path / "saved")
    again = generator.load_generator(tmp_path / "saved")
    assert found(again.conditioner) == Quantization("int8")
    drawn = [g.eval().generate(["a red cat"], seeds=[3])[0].tobytes() for g in (made, again)]
    assert drawn[0] == drawn[1]
    full = tiny_generator_config(ModelConfig(base=base.base), "dream")
    assert found(generator.build_generator(full).conditioner) is None


def test_generate_says_what_it_quantises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_generator_dir(tmp_path, "dream"))
    draw = ["generate", "--model", folder, "--prompt", "a red cat", "--steps", "2", "--device", "cpu", "--out"]
    assert main([*draw, str(tmp_path / "small"), "--quantize", "int8"]) == 0
    assert "int8: the language model; bridge, denoiser and codec stay as they are" in capsys.readouterr().err
    assert '"quantize": "int8"' in (tmp_path / "small" / "manifest.jsonl").read_text()
    assert main([*draw, str(tmp_path / "full")]) == 0
    assert "quantize" not in (tmp_path / "full" / "manifest.jsonl").read_text()
    assert main(["convert", folder, str(tmp_path / "x"), "--quantize", "int8"]) == 2
    assert "generate --quantize keeps the language model" in capsys.readouterr().err
    numbers = tiny_generator(tmp_path, conditioner=LabelSource(3), denoiser=LABELLED)
    with pytest.raises(ValueError, match="class numbers with no language model"):
        generator.shrink(numbers, Quantization("int8"))
