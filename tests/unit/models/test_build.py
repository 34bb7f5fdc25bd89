"""The factory: what is built, saved, loaded and stood upon is the same model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from accessory import config as configuration
from accessory.backbone.gguf import gguf_at
from accessory.data.tiling import TilingConfig
from accessory.models import build
from accessory.models.build import Model, ModelConfig, ProjectorConfig, ResamplerConfig
from accessory.models.skeleton import resolved, skeleton
from accessory.peft.attach import (
    LINEARS,
    BiasSpec,
    LoraSpec,
    NormSpec,
    PrefixSpec,
    ScaleSpec,
    TrainSpec,
    TuningSpec,
    trainable_state,
)
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.vision import presets
from accessory.vision.mixture import MixtureConfig
from tests.tiny import disturb, tiny_model_dir
from tests.unit.models.pictured import TILING, batch, mixed, model

ALL = TrainSpec(("backbone.*", "projector.*", "tower.*"))
SPECS: dict[str, tuple[TuningSpec, ...]] = {
    "lora": (LoraSpec(rank=2),),
    "prefix": (PrefixSpec(length=3, new_gate=True, init_std=0.1),),
    "bias": (BiasSpec(),),
    "scale": (ScaleSpec(),),
    "norm": (NormSpec(),),
    "train": (ALL,),
    "visual prefix": (PrefixSpec(length=3, init_std=0.1), TrainSpec(("resampler.*",))),
    "all at once": (LoraSpec(rank=2), PrefixSpec(length=3), BiasSpec(), ScaleSpec(), NormSpec(), ALL),
}
RESAMPLER = ResamplerConfig(length=3, width=16, depth=1, heads=2, max_tiles=4)


def tuned(folder: Path, name: str, **options: object) -> Model:
    if name == "visual prefix":
        options["resampler"] = RESAMPLER
    return model(folder, tuning=SPECS[name], train=True, **options)


@torch.inference_mode()
def outputs(made: Model) -> torch.Tensor:
    both = batch(made, mixed())
    return made.net.eval().logits(made.net(both.ids, both.tiles))


@pytest.mark.parametrize("name", list(SPECS))
def test_every_trained_parameter_gets_a_gradient_through_the_whole_model(tmp_path: Path, name: str) -> None:
    made = tuned(tmp_path, name, projector=ProjectorConfig("mlp", start_end=True))
    disturb(made.net)
    trained = trainable_state(made.net)
    loss, _, _ = DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, batch(made, mixed()))
    loss.backward()
    grads = {n: p.grad for n, p in made.net.named_parameters() if p.requires_grad}
    assert len(grads) == len(trained) >= 5
    dead = [n for n, g in grads.items() if g is None or not g.any()]
    assert dead == []
    assert all(p.grad is None for p in made.net.parameters() if not p.requires_grad)


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    made = tuned(tmp_path, "all at once")
    disturb(made.net)
    wanted = outputs(made)
    build.save(made, tmp_path / "model")
    again = build.load(tmp_path / "model")
    assert torch.equal(outputs(again), wanted)
    assert not any(p.requires_grad for p in again.net.parameters())
    assert again.config == made.config
    assert set(trainable_state(build.load(tmp_path / "model", train=True).net)) == set(trainable_state(made.net))


@pytest.mark.parametrize(("dtype", "size"), [("fp16", 2), ("bf16", 2)])
def test_halves_are_close_and_half_the_size(tmp_path: Path, dtype: str, size: int) -> None:
    made = tuned(tmp_path, "all at once")
    wanted = outputs(made)
    build.save(made, tmp_path / "model", dtype=dtype)  # type: ignore[arg-type]
    got = outputs(build.load(tmp_path / "model"))
    assert 0 < (got - wanted).abs().max() < (2e-2 if dtype == "fp16" else 1e-1)
    state = load_file(tmp_path / "model" / build.WEIGHTS_FILE)
    wide = {k for k, v in state.items() if v.element_size() != size}
    # Layer scales start at 1e-6, of which fp16 keeps one digit: these few numbers stay whole.
    assert wide == ({k for k in state if k.endswith(".gamma")} if dtype == "fp16" else set())
    assert next(build.load(tmp_path / "model").net.parameters()).dtype == torch.float32


def test_a_folder_that_does_not_fit_lists_what_is_wrong(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path)
    path = folder / build.WEIGHTS_FILE
    state = load_file(path)
    state["backbone.wrong"] = state.pop("backbone.norm.weight")
    state["projector.skip"] = torch.zeros(7)
    save_file(state, path)
    with pytest.raises(ValueError, match="3 problems") as caught:
        build.load(folder)
    for said in ("missing backbone.norm.weight", "unexpected backbone.wrong", "projector.skip is (7,)", "needs (32,)"):
        assert said in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"not a model folder: trainable.safetensors is missing"):
        build.load(folder)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiling.size is 128.*takes 64 pixels"):
        model(tmp_path, tiling=TilingConfig(size=128))
    with pytest.raises(ValueError, match=r"backbone.llama and backbone.tokenizer"):
        build.build(ModelConfig(backbone=build.BackboneConfig(source=None)))


def test_what_trains_is_kept_in_fp32(tmp_path: Path) -> None:
    made = model(tmp_path)
    config = replace(made.config, backbone=replace(made.config.backbone, dtype="bf16"), tuning=SPECS["norm"])
    built = build.build(config, train=True)
    kinds = {p.requires_grad: set[torch.dtype]() for p in built.net.backbone.parameters()}
    for p in built.net.backbone.parameters():
        kinds[p.requires_grad].add(p.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    still = build.build(config)
    assert {p.dtype for p in still.net.backbone.parameters()} == {torch.bfloat16}
    assert not still.net.training


# --- a model on top of another ------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with moved LoRA, norms, tower and projector, as a trained one."""
    specs = (LoraSpec(rank=2), NormSpec(), ALL)
    made = model(tmp_path, tuning=specs, train=True)
    disturb(made.net)
    build.save(made, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["prefix", "bias", "scale", "norm"])
def test_a_model_starts_as_its_base_and_only_the_new_trains(tmp_path: Path, base: Path, name: str) -> None:
    config = ModelConfig(base=str(base), tuning=SPECS[name])
    made = build.build(config, train=True)
    wanted = outputs(build.load(base))
    assert torch.equal(outputs(made), wanted)
    kind = {"prefix": ".prefix.", "bias": ".bias", "scale": ".scale", "norm": "norm.weight"}[name]
    trained = trainable_state(made.net)
    assert trained
    assert all(kind in n for n in trained)
    disturb(made.net)
    moved = outputs(made)
    assert (moved - wanted).abs().max() > 1e-3
    build.save(made, tmp_path / "top")
    assert set(load_file(tmp_path / "top" / build.WEIGHTS_FILE)) == set(trained)
    again = build.load(tmp_path / "top")
    assert torch.equal(outputs(again), moved)
    assert again.config.tiling == TILING


def test_lora_on_lora_folds_the_base(tmp_path: Path, base: Path) -> None:
    check_lora_on(base, tmp_path / "top")


def check_lora_on(base: Path, top: Path) -> None:
    """A fresh LoRA changes nothing, alone trains, matters, and is saved."""
    wanted = outputs(build.load(base))
    made = build.build(ModelConfig(base=str(base), tuning=SPECS["lora"]), train=True)
    torch.testing.assert_close(outputs(made), wanted, rtol=1e-3, atol=1e-4)
    assert all(".delta." in n for n in trainable_state(made.net))
    disturb(made.net)
    moved = outputs(made)
    assert (moved - wanted).abs().max() > 1e-3
    build.save(made, top)
    assert torch.equal(outputs(build.load(top)), moved)


@pytest.fixture
def prefixed(tmp_path: Path, base: Path) -> Path:
    """A prefix and biases, moved, on the base with its LoRA."""
    made = build.build(ModelConfig(base=str(base), tuning=(*SPECS["prefix"], *SPECS["bias"])), train=True)
    disturb(made.net)
    build.save(made, tmp_path / "prefixed")
    return tmp_path / "prefixed"


def test_lora_goes_on_a_base_with_lora_and_prefix(tmp_path: Path, prefixed: Path) -> None:
    check_lora_on(prefixed, tmp_path / "top")


def test_lora_under_plain_prefixes_leaves_no_room_for_another(tmp_path: Path) -> None:
    """What hangs on their keys and values is not folded: neither the model nor its outline is built."""

    def on(name: str, **options: Any) -> ModelConfig:
        specs = (LoraSpec(rank=2, targets=options.pop("targets", LINEARS)), PrefixSpec(length=2, **options))
        build.save(model(tmp_path, tuning=specs, train=True), tmp_path / name)
        return ModelConfig(base=str(tmp_path / name), tuning=SPECS["lora"])

    def both(config: ModelConfig) -> list[set[str]]:
        nets = (skeleton(config), build.build(config, train=True).net)
        return [{n for n, p in net.named_parameters() if p.requires_grad} for net in nets]

    for make in (skeleton, build.build):
        with pytest.raises(ValueError, match=r"plain prefixes and a lora on wk, wv, .*backbone\.\*\.delta\.\*"):
            make(on(f"plain-{make.__name__}", plain=True))
    for config in (on("others", plain=True, targets=("wq", "w1")), on("turned")):
        seen, made = both(config)
        assert seen == made
        assert seen


def test_only_what_is_wanted_again_is_folded(tmp_path: Path) -> None:
    """The base's scales stay where LoRA is added beside them."""
    build.save(model(tmp_path, tuning=SPECS["scale"], train=True), tmp_path / "scaled")
    config = ModelConfig(base=str(tmp_path / "scaled"), tuning=SPECS["lora"])
    names = [{n for n, _ in net.named_parameters()} for net in (skeleton(config), build.build(config, train=True).net)]
    assert names[0] == names[1]
    assert any(n.endswith(".scale") for n in names[0])


@pytest.mark.parametrize("kind", ["prefix", "bias"])
def test_a_second_prefix_or_bias_names_the_way_to_train_the_first(tmp_path: Path, prefixed: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"already has a {kind}") as caught:
        build.build(ModelConfig(base=str(prefixed), tuning=SPECS[kind]), train=True)
    named = re.search(r"write (\{.*\}) in model.tuning", str(caught.value))
    assert named is not None
    tree = {"base": str(prefixed), "tuning": [yaml.safe_load(named[1])]}
    made = build.build(configuration.build(tree, ModelConfig), train=True)
    trained = trainable_state(made.net)
    assert trained
    assert all(f".{kind}" in n and n.startswith("backbone.") for n in trained)
    disturb(made.net)
    build.save(made, tmp_path / "top")
    assert torch.equal(outputs(build.load(tmp_path / "top")), outputs(made))


def test_a_base_that_changed_is_refused(tmp_path: Path, base: Path) -> None:
    made = build.build(ModelConfig(base=str(base), tuning=SPECS["norm"]), train=True)
    build.save(made, tmp_path / "top")
    assert f"base_sha256: {made.config.base_sha256}" in (tmp_path / "top" / build.CONFIG_FILE).read_text()
    text = (tmp_path / "top" / build.CONFIG_FILE).read_text()
    state = load_file(base / build.WEIGHTS_FILE)
    state["projector.skip"] = state["projector.skip"] + 1
    save_file(state, base / build.WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"is not the one that this model was trained on"):
        build.load(tmp_path / "top")
    older = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("base_sha256"))
    (tmp_path / "top" / build.CONFIG_FILE).write_text(older)
    build.load(tmp_path / "top")  # folders that do not say it still load


def test_a_torn_file_is_named(tmp_path: Path, base: Path) -> None:
    path = base / build.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        build.load(base)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        build.build_tower(build.TowerSource("tiny", str(path)))


def test_a_base_brings_its_own_settings(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"brings its own tiling; beside it only tuning, quantization, template"):
        build.build(ModelConfig(base=str(base), tiling=TilingConfig(size=32)))
    with pytest.raises(ValueError, match="not a model folder"):
        build.build(ModelConfig(base=str(tmp_path)))
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        build.build(ModelConfig(base=str(tmp_path / "nowhere")))


def test_template_and_length_may_differ_from_those_of_the_base(base: Path, tmp_path: Path) -> None:
    plain = build.load(base)
    made = build.build(ModelConfig(base=str(base), tuning=SPECS["norm"], template="alpaca", max_length=99), train=True)
    assert (made.template.name, made.encoder.max_length) == ("alpaca", 99)
    assert (made.config.template, made.config.max_length) == ("alpaca", 99)
    assert plain.template.name != "alpaca"
    assert plain.encoder.max_length != 99
    build.save(made, tmp_path / "top")
    again = build.load(tmp_path / "top")
    assert (again.template.name, again.encoder.max_length) == ("alpaca", 99)
    above = build.build(ModelConfig(base=str(tmp_path / "top"), tuning=SPECS["bias"]))
    assert (above.template.name, above.encoder.max_length) == ("alpaca", 99)
    usual = ModelConfig(base=str(tmp_path / "top"), template="chatml_plain", max_length=1024)  # counts when it is said
    for back in (build.build(usual).config, resolved(usual)):
        assert (back.template, back.max_length) == ("chatml_plain", 1024)


def test_a_saved_model_says_the_template_and_length_that_it_was_not_told(tmp_path: Path) -> None:
    build.save(model(tmp_path, template=None, max_length=None, train=True, tuning=(ALL,)), tmp_path / "unsaid")
    text = (tmp_path / "unsaid" / build.CONFIG_FILE).read_text()
    assert "template: chatml_plain" in text
    assert "max_length: 1024" in text


def test_encoders_of_a_mixture_come_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a file of its own, under its published names; files of other encoders may lie beside them."""
    whole = presets.PRESETS["tiny-sphinx"]
    assert isinstance(whole, MixtureConfig)
    monkeypatch.setitem(presets.PRESETS, "pair", replace(whole, channel=whole.channel[:2], extra=()))
    wanted = presets.build("pair")
    for name, prefix in (("clip", "visual."), ("openclip_convnext_xxl", ""), ("qformer", "")):
        state = {} if name == "qformer" else wanted.get_submodule(f"members.{name}.model").state_dict()
        save_file({prefix + k: v.contiguous() for k, v in state.items()}, tmp_path / f"{name}.safetensors")
    made = build.build_tower(build.TowerSource("pair", str(tmp_path)))
    other = presets.build("pair").state_dict()
    for name, value in made.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name]), name
    assert any(not torch.equal(value, other[name]) for name, value in made.state_dict().items())
    (tmp_path / "clip.safetensors").unlink()
    with pytest.raises(ValueError, match=r"clip\.safetensors is missing"):
        build.build_tower(build.TowerSource("pair", str(tmp_path)))


def test_of_several_gguf_files_none_is_guessed(tmp_path: Path) -> None:
    for name in ("one/a.gguf", "one/b.gguf", "deep/er/a.gguf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"one holds 2 .gguf files, name one: a.gguf, b.gguf"):
        build.build(ModelConfig(backbone=build.BackboneConfig(str(tmp_path / "one"))))
    with pytest.raises(ValueError, match=r"holds .gguf files in 2 folders"):
        build.build(ModelConfig(backbone=build.BackboneConfig(str(tmp_path))))
    assert gguf_at(tmp_path / "deep") == tmp_path / "deep/er/a.gguf"
    assert gguf_at(tmp_path / "one" / "a.gguf") == tmp_path / "one" / "a.gguf"
    (tmp_path / "none").mkdir()
    assert gguf_at(tmp_path / "none") is None
