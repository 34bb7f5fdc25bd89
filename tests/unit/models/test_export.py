"""Folders that stand on others: found from anywhere, moved together, handed on in half precision."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accessory import config as configuration
from accessory.__main__ import main
from accessory.backbone.store import narrowed, write_file
from accessory.models import build
from accessory.models import export as exporting
from accessory.models.build import ModelConfig
from accessory.models.conditioner import DreamConditioner
from accessory.models.export import export
from accessory.models.generator import (
    GeneratorConfig,
    build_generator,
    find_generator,
    load_generator,
    read_generator_config,
    save_generator,
)
from accessory.models.generator_config import DreamSource, TextSource
from accessory.peft.attach import TrainSpec
from tests.tiny import tiny_model_dir
from tests.tiny_generator import DREAM, PROFILE, shake, tiny_generator_config

TEXT = "a small red cat"
BASE, BRIDGE = "runs/nano_dit/final", "runs/nano_dream/final"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a shipped model and two runs, one on the other; every name in it counts from its top."""
    home = tmp_path_factory.mktemp("home")
    top = home / "checkout"
    shutil.copytree(tiny_model_dir(home), top / "weights" / "tiny")
    (top / "exps").mkdir()
    (top / "exps" / "nano_dit.sh").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        config = tiny_generator_config(Path("unused"), conditioner=TextSource(PROFILE, "weights/tiny"))
        torch.manual_seed(0)
        base = build_generator(config)
        shake(base.denoiser)
        save_generator(base, BASE)
        patterns = ("conditioner.dream.heads.*",)
        bridge = build_generator(
            GeneratorConfig(base=BASE, conditioner=DreamSource("weights/tiny", DREAM, PROFILE), tuning=patterns)
        )
        assert isinstance(bridge.conditioner, DreamConditioner)
        shake(bridge.conditioner.dream.heads)
        save_generator(bridge, BRIDGE)
    return top


@pytest.fixture
def top(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the checkout of this program, seen from another folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(made, tmp_path / "checkout")
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "checkout" / "weights")
    return tmp_path / "checkout"


def picture(folder: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int_]]:
    drawn: Image.Image = load_generator(folder).generate([TEXT], seeds=[2])[0]
    return np.asarray(drawn).astype(int)


def far(a: Path, b: Path) -> int:
    return int(np.abs(picture(a) - picture(b)).max())


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / build.WEIGHTS_FILE).read_bytes()).hexdigest()


def test_what_a_folder_stands_on_is_found_from_anywhere(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_generator_config(top / BRIDGE).base == BASE
    before = picture(top / BRIDGE)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "nowhere" / "weights")  # another program's checkout
    assert np.array_equal(picture(top / BRIDGE), before)
    top.rename(tmp_path / "moved")
    assert np.array_equal(picture(tmp_path / "moved" / BRIDGE), before)
    monkeypatch.chdir(tmp_path / "moved" / "runs")
    assert np.array_equal(picture(Path("nano_dream/final")), before)
    # and the folders above matter: without them, or taken out alone, there is no base
    shutil.copytree(tmp_path / "moved" / BRIDGE, tmp_path / "alone")
    with pytest.raises(ValueError, match=rf"there is no folder {BASE} \(looked in "):
        load_generator(tmp_path / "alone")


def test_another_or_a_missing_base_is_clear(top: Path) -> None:
    path = top / BASE / build.WEIGHTS_FILE
    state = load_file(path)
    save_file({k: 2 * v for k, v in state.items()}, path)
    with pytest.raises(ValueError, match=rf"not the generator that this one was trained on: {path} has SHA-256"):
        load_generator(top / BRIDGE)
    shutil.rmtree(top / BASE)
    with pytest.raises(ValueError, match=rf"there is no folder {BASE}; bash exps/nano_dit.sh makes it"):
        load_generator(top / BRIDGE)
    with pytest.raises(ValueError, match="there is no folder weights/tinny"):
        build_generator(tiny_generator_config(Path("weights/tinny")))


def test_kinds_are_not_mistaken(top: Path) -> None:
    with pytest.raises(ValueError, match="is a generator, which makes pictures"):
        build.load(top / BASE)
    with pytest.raises(ValueError, match="is a generator, which makes pictures"):
        build_generator(tiny_generator_config(top / BASE))
    with pytest.raises(ValueError, match=r"no model folder; .* did you mean .*nano_dit/final\?"):
        find_generator(top / "runs/nano_dit")


def test_a_trained_folder_is_handed_on(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit, dream = top / "weights" / "nano-dit", top / "weights" / "nano-dream"
    assert main(["convert", str(top / BASE), str(dit), "--dtype", "float16"]) == 0
    said = capsys.readouterr()
    size = dit.joinpath(build.WEIGHTS_FILE).stat().st_size
    whole = (top / BASE / build.WEIGHTS_FILE).stat().st_size
    assert 0.5 <= size / whole < 0.6
    assert "generator, " in said.out
    assert "has to go with it" not in said.err
    assert main(["convert", str(top / BRIDGE), str(dream), "--dtype", "float16", "--base", "nano-dit"]) == 0
    config = read_generator_config(dream)
    assert (config.base, config.base_sha256) == ("weights/nano-dit", sha256(dit))
    assert isinstance(config.conditioner, DreamSource)
    assert isinstance(config.conditioner.model, ModelConfig)
    assert config.conditioner.model.base == "weights/tiny"
    assert {t.dtype for t in load_file(dream / build.WEIGHTS_FILE).values()} == {torch.float16}
    assert 0 < far(top / BASE, dit) <= 4
    assert far(top / BRIDGE, find_generator("nano-dream")) <= 4
    assert far(dit, dream) > 4  # the bridge is not its base
    capsys.readouterr()
    assert main(["convert", str(top / BRIDGE), str(top / "copy")]) == 0
    assert f"it names {BASE}, which is not among the shipped models" in capsys.readouterr().err
    assert far(top / BRIDGE, top / "copy") == 0


def test_a_base_in_half_precision_takes_the_place_of_the_whole(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(top / BASE), str(top / "weights" / "nano-dit"), "--dtype", "float16"]) == 0
    assert main(["convert", str(top / BRIDGE), str(top / "copy"), "--base", "nano-dit"]) == 0
    assert far(top / BRIDGE, top / "copy") > 0
    capsys.readouterr()


@pytest.mark.parametrize("folder", ["weights/tiny", BASE, BRIDGE])
def test_what_moved_on_the_way_is_not_kept(
    top: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models by their logits, generators by conditions and pictures; a bridge that reads a picture too."""
    convert = ["convert", str(top / folder), str(top / "copy")]
    assert main(convert) == 0
    assert "fixed prompts: moved by 0 of their largest" in capsys.readouterr().out
    shutil.rmtree(top / "copy")
    monkeypatch.setattr(exporting, "write_file", lambda s, p: write_file({k: v * 1.5 for k, v in s.items()}, p))
    assert main(convert) == 2
    assert "was removed" in capsys.readouterr().err
    assert not (top / "copy").exists()
    assert main([*convert, "--skip-gate"]) == 0
    assert "not compared (--skip-gate)" in capsys.readouterr().out


def test_what_cannot_be_handed_on(top: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(top / BASE, other)
    path = other / build.WEIGHTS_FILE
    state = load_file(path)
    save_file({k: v * 1.01 for k, v in state.items()}, path)
    with pytest.raises(ValueError, match=r"not .* in another precision: denoiser\.\S+ has other values"):
        export(top / BRIDGE, tmp_path / "out", base=str(other))
    save_file(state, path)
    text = (other / build.CONFIG_FILE).read_text()
    (other / build.CONFIG_FILE).write_text(text.replace("size: 16", "size: 32"))
    with pytest.raises(ValueError, match=r"in another precision: size differ in config\.yaml"):
        export(top / BRIDGE, tmp_path / "out", base=str(other))
    with pytest.raises(ValueError, match="stands on no base"):
        export(top / BASE, tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(top / BASE), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert "--to hf is for whole models" in capsys.readouterr().err
    assert main(["convert", str(top / "exps"), str(tmp_path / "out"), "--base", "x"]) == 2
    assert "--base needs a model or generator folder --to accessory" in capsys.readouterr().err


def test_a_chat_model_is_handed_on(top: Path, tmp_path: Path) -> None:
    config = ModelConfig(base=str(top / "weights" / "tiny"), tuning=(TrainSpec(("backbone.norm.*",)),))
    model = build.build(config, train=True)
    build.save(model, tmp_path / "m")
    kept = export(tmp_path / "m", tmp_path / "out", torch.float16)
    assert kept.kind == "model"
    tree = configuration.parse((tmp_path / "out" / build.CONFIG_FILE).read_text())
    assert tree["base"] == "weights/tiny"
    again = build.load(tmp_path / "out")
    assert again.config == replace(model.config, base="weights/tiny")


def test_half_precision_that_does_not_hold_is_not_taken() -> None:
    state = {
        "plain": torch.randn(8, 8),
        "large": torch.tensor([1.0, 70000.0]),
        "tiny": torch.tensor([3e-7, -1e-7]),
        "zero": torch.zeros(3),
        "count": torch.tensor(70000),
    }
    made = narrowed(state, torch.float16)
    assert {k: v.dtype for k, v in made.items()} == {
        "plain": torch.float16, "large": torch.float32, "tiny": torch.float32, "zero": torch.float16,
        "count": torch.int64,
    }  # fmt: skip
    assert torch.equal(made["large"], state["large"])
    assert (made["plain"].float() - state["plain"]).abs().max() <= 2**-10 * state["plain"].abs().max()
    assert {v.dtype for v in narrowed(state, torch.bfloat16).values()} == {torch.bfloat16, torch.int64}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gate holds values that are not finite"):
            narrowed({"gate": torch.tensor([1.0, bad])}, torch.float32)
