"""Generators: what is saved comes back bit for bit, a picture is its own, and mistakes are said."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accessory import config as configuration
from accessory.diffusion.autoencoder import AutoencoderConfig
from accessory.diffusion.flag_dit import FlagDiTConfig
from accessory.diffusion.sampler import SamplerSettings
from accessory.models.conditioner import DreamConditioner, TextConditioner
from accessory.models.generator import (
    Generator,
    GeneratorConfig,
    build_generator,
    digest,
    for_inference,
    is_generator,
    load_generator,
    read_generator_config,
    save_generator,
    saved_state,
)
from accessory.models.generator_config import (
    AutoencoderSource,
    DreamSource,
    FlagDiTSource,
    LabelSource,
    PixelSource,
    TextSource,
)
from accessory.schema import Picture, Turn
from tests.tiny_generator import DREAM, PROFILE, SETTINGS, shake, tiny_generator, tiny_generator_config

Kind = Literal["text", "dream"]
TEXT = "a small red cat"


def array(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def far(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, in levels of 256."""
    return int(np.abs(array(a) - array(b)).max())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generators")


@pytest.fixture(scope="module")
def text(home: Path) -> Generator:
    return tiny_generator(home, "text")


@pytest.fixture(scope="module")
def dream(home: Path) -> Generator:
    made = tiny_generator(home, "dream")
    assert isinstance(made.conditioner, DreamConditioner)
    for name, part in made.conditioner.dream.named_children():
        if name != "net":
            shake(part)
    return made


@pytest.fixture(params=["text", "dream"])
def either(request: pytest.FixtureRequest) -> Generator:
    made: Generator = request.getfixturevalue(request.param)
    return made


def test_saved_pictures_come_back_bit_for_bit(either: Generator, tmp_path: Path) -> None:
    save_generator(either, tmp_path / "g")
    torch.manual_seed(99)  # whatever is drawn at random while building must not matter
    again = load_generator(tmp_path / "g")
    assert again.config == either.config
    assert not any(p.requires_grad for p in again.parameters())
    before, after = (g.generate([TEXT, "moon"], seeds=[3, 4]) for g in (either, again))
    assert [far(a, b) for a, b in zip(before, after, strict=True)] == [0, 0]
    assert far(before[0], before[1]) > 20
    assert is_generator(tmp_path / "g")
    assert (tmp_path / "g" / "config.yaml").read_text().startswith("kind: generator\n")
    names = set(load_file(tmp_path / "g" / "trainable.safetensors"))
    assert not any(".backbone." in name or ".net." in name for name in names)
    assert {name.split(".")[0] for name in names} == (
        {"denoiser"} if isinstance(either.conditioner, TextConditioner) else {"denoiser", "conditioner"}
    )


def test_weights_matter_for_what_is_loaded(text: Generator, tmp_path: Path) -> None:
    save_generator(text, tmp_path / "g")
    path = tmp_path / "g" / "trainable.safetensors"
    state = load_file(path)
    save_file({k: v * 1.5 if k == "denoiser.final_layer.linear.weight" else v for k, v in state.items()}, path)
    other = load_generator(tmp_path / "g").generate([TEXT], seeds=[3])
    assert far(other[0], text.generate([TEXT], seeds=[3])[0]) > 10


def test_half_precision_is_near(text: Generator, tmp_path: Path) -> None:
    save_generator(text, tmp_path / "g", dtype="fp16")
    assert load_file(tmp_path / "g" / "trainable.safetensors")["denoiser.x_embedder.weight"].dtype == torch.float16
    made = load_generator(tmp_path / "g").generate([TEXT], seeds=[3])
    assert far(made[0], text.generate([TEXT], seeds=[3])[0]) <= 3


def test_a_picture_does_not_depend_on_its_batch(either: Generator) -> None:
    prompts = [TEXT, "moon", "three birds and a boat"]
    sizes = [(16, 16), (24, 16), (8, 24)]
    together = either.generate(prompts, seeds=[5, 6, 7], sizes=sizes)
    alone = [either.generate([p], seeds=[s], sizes=[z])[0] for p, s, z in zip(prompts, (5, 6, 7), sizes, strict=True)]
    assert [image.size for image in together] == sizes
    assert max(far(a, b) for a, b in zip(together, alone, strict=True)) <= 1
    # and it matters: another seed or another prompt is another picture
    assert far(either.generate([TEXT], seeds=[6])[0], alone[0]) > 20
    assert far(either.generate(["moon"], seeds=[5])[0], alone[0]) > 0


def test_negative_prompts(either: Generator) -> None:
    plain, empty, other = (
        either.generate([TEXT], seeds=[1], negative=n)[0] for n in (None, [""], ["a green hat and two blue stars"])
    )
    assert far(plain, empty) == 0
    assert far(plain, other) > 0
    both = either.generate([TEXT, TEXT], seeds=[1, 1], negative=["", "a green hat and two blue stars"])
    assert far(both[0], plain) <= 1
    assert far(both[1], other) <= 1
    with pytest.raises(ValueError, match="one or of 2 prompts"):
        either.null(2, ["a", "b", "c"])
    off = replace(SETTINGS, guidance=None)
    with pytest.raises(ValueError, match="guidance"):
        either.generate([TEXT], seeds=[1], negative=["x"], settings=off)


def test_the_null_has_the_layout_of_a_condition(either: Generator) -> None:
    condition, null = either.condition([TEXT, "moon"]), either.null(2)
    assert condition.parts().keys() == null.parts().keys()
    assert len(null) == 2
    made = condition.where(torch.tensor([True, False]), null)
    assert made.seq is not None
    assert condition.seq is not None
    assert torch.equal(made.seq[1], condition.padded(made.seq.shape[1]).seq[1])  # type: ignore[index]
    assert not torch.equal(made.seq[0], condition.padded(made.seq.shape[1]).seq[0])  # type: ignore[index]


def test_a_fresh_bridge_makes_what_the_text_encoder_makes(home: Path, text: Generator) -> None:
    fresh = tiny_generator(home, "dream")
    pictures = [g.generate([TEXT], seeds=[2])[0] for g in (text, fresh)]
    assert far(*pictures) == 0
    assert isinstance(fresh.conditioner, DreamConditioner)
    shake(fresh.conditioner.dream.heads, std=1.0)
    assert far(fresh.generate([TEXT], seeds=[2])[0], pictures[0]) > 0


def test_dialogues_with_pictures(dream: Generator, text: Generator) -> None:
    def asked(colour: str) -> list[Turn]:
        picture = Picture(Image.new("RGB", (32, 32), colour))
        return [
            Turn("user", (picture, "What is this?")),
            Turn("assistant", ("a boat",)),
            Turn("user", ("draw it again",)),
        ]

    red, blue = dream.generate([asked("red"), asked("blue")], seeds=[1, 1])
    assert far(red, blue) > 0
    assert far(dream.generate([asked("red")], seeds=[1])[0], red) <= 1
    with pytest.raises(ValueError, match="dream bridge"):
        text.generate([asked("red")], seeds=[1])


def test_long_prompts_are_counted(either: Generator) -> None:
    long = TEXT * 20
    lost = either.lost([TEXT, long])
    assert lost[0] == 0
    assert lost[1] > 0
    assert far(either.generate([long], seeds=[1])[0], either.generate([long + " more"], seeds=[1])[0]) == 0


def test_conditions_that_are_made_already(text: Generator) -> None:
    condition, null = text.condition([TEXT, "moon"]), text.null(1)
    made = text.render(condition, null, seeds=[3, 4])
    assert [far(a, b) for a, b in zip(made, text.generate([TEXT, "moon"], seeds=[3, 4]), strict=True)] == [0, 0]
    with pytest.raises(ValueError, match="needs a null condition"):
        text.render(condition, seeds=[3, 4])


def test_sizes(text: Generator) -> None:
    assert text.grain == (4, 4)
    with pytest.raises(ValueError, match=r"18x16.*nearest are 16x16 or 20x16"):
        text.generate([TEXT], seeds=[1], sizes=[(18, 16)])
    with pytest.raises(ValueError, match="nearest are 4x16"):
        text.check_size((1, 16))
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        text.generate([TEXT, TEXT], seeds=[1])


def test_what_tuning_names_trains_and_is_saved(home: Path) -> None:
    bridge = tiny_generator(home, "dream", train=True, tuning=("conditioner.dream.heads.*",))
    assert {n.rsplit(".", 2)[0] for n, p in bridge.named_parameters() if p.requires_grad} == {
        "conditioner.dream.heads.sequence"
    }
    assert bridge.conditioner.training
    assert not bridge.denoiser.training
    bridge.generate([TEXT], seeds=[0])
    assert bridge.conditioner.training
    condition = bridge.condition([TEXT])
    assert condition.seq is not None
    condition.seq.sum().backward()
    assert all(p.grad is not None for p in bridge.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"'denoiser\.nothing' matches no parameter"):
        build_generator(tiny_generator_config(home / "tiny", tuning=("denoiser.nothing",)))


@pytest.fixture(scope="module")
def based(home: Path, text: Generator) -> Path:
    save_generator(text, home / "base")
    return home / "base"


def test_a_bridge_stands_on_a_trained_denoiser(home: Path, text: Generator, based: Path, tmp_path: Path) -> None:
    conditioner = DreamSource(str(home / "tiny"), DREAM, PROFILE)
    config = GeneratorConfig(base=str(based), conditioner=conditioner, tuning=("conditioner.dream.heads.*",))
    made = build_generator(config, train=True)
    assert made.config.base_sha256 == hashlib.sha256((based / "trainable.safetensors").read_bytes()).hexdigest()
    assert made.config.size == 16
    assert far(made.generate([TEXT], seeds=[2])[0], text.generate([TEXT], seeds=[2])[0]) == 0
    assert isinstance(made.conditioner, DreamConditioner)
    shake(made.conditioner.dream.heads, std=1.0)
    save_generator(made, tmp_path / "g")
    assert all(name.startswith("conditioner.dream.") for name in load_file(tmp_path / "g" / "trainable.safetensors"))
    again = load_generator(tmp_path / "g")
    assert far(again.generate([TEXT], seeds=[2])[0], made.generate([TEXT], seeds=[2])[0]) == 0


def test_a_base_keeps_its_own_conditioner(based: Path, text: Generator) -> None:
    made = build_generator(GeneratorConfig(base=str(based), size=8))
    assert isinstance(made.conditioner, TextConditioner)
    assert made.generate([TEXT], seeds=[2])[0].size == (8, 8)
    assert saved_state(made) == {}
    with pytest.raises(ValueError, match="brings its own codec"):
        build_generator(GeneratorConfig(base=str(based), codec=PixelSource(4)))


def test_another_base_is_refused(based: Path) -> None:
    with pytest.raises(ValueError, match="is not the generator that this one was trained on"):
        build_generator(GeneratorConfig(base=str(based), base_sha256="0" * 64))


def test_another_language_model_below_the_bridge_is_refused(tmp_path: Path) -> None:
    save_generator(tiny_generator(tmp_path, "dream"), tmp_path / "g")
    load_generator(tmp_path / "g")
    path = tmp_path / "tiny" / "trainable.safetensors"
    save_file({name: 2 * t for name, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"tiny is not the one that this model was trained on"):
        load_generator(tmp_path / "g")


def test_folders_that_do_not_fit_are_refused(text: Generator, home: Path, tmp_path: Path) -> None:
    save_generator(text, tmp_path / "g")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        save_generator(text, tmp_path / "g")
    path = tmp_path / "g" / "trainable.safetensors"
    state, before = load_file(path), digest(tmp_path / "g")
    save_file({**state, "denoiser.more": torch.zeros(1)}, path)
    assert digest(tmp_path / "g") != before
    with pytest.raises(ValueError, match=r"1 unexpected: denoiser\.more"):
        load_generator(tmp_path / "g")
    gone = dict(list(state.items())[1:])
    save_file(gone, path)
    with pytest.raises(ValueError, match="1 missing"):
        load_generator(tmp_path / "g")
    config = tmp_path / "g" / "config.yaml"
    config.write_text(config.read_text() + "colour: red\n")
    with pytest.raises(configuration.ConfigError, match="colour"):
        load_generator(tmp_path / "g")
    assert not is_generator(home / "tiny")
    with pytest.raises(ValueError, match="has no kind: generator"):
        load_generator(home / "tiny")
    with pytest.raises(ValueError, match=r"config\.yaml is missing"):
        read_generator_config(tmp_path)


def test_a_random_codec_is_saved_whole(home: Path, tmp_path: Path) -> None:
    made = tiny_generator(
        home,
        codec=AutoencoderSource(config=AutoencoderConfig(channels=12, factor=2, width=8, depth=1)),
        tuning=(),
    )
    made.codec.scale.mul_(2)
    save_generator(made, tmp_path / "g")
    names = set(load_file(tmp_path / "g" / "trainable.safetensors"))
    assert {"codec.scale", "codec.shift", "denoiser.x_embedder.weight"} <= names
    again = load_generator(tmp_path / "g")
    assert far(again.generate([TEXT], seeds=[2])[0], made.generate([TEXT], seeds=[2])[0]) == 0


def test_classes_by_number() -> None:
    dit = FlagDiTConfig(dim=32, n_layers=1, n_heads=4, multiple_of=8, latent_channels=3, text_dim=None, num_classes=5)
    config = GeneratorConfig(
        denoiser=FlagDiTSource(dit), codec=PixelSource(1), conditioner=LabelSource(5), sampler=SETTINGS, size=8
    )
    torch.manual_seed(0)
    made = build_generator(config)
    shake(made.denoiser)
    one, two = made.generate(["1", "4"], seeds=[1, 1])
    assert far(one, two) > 0
    with pytest.raises(ValueError, match="classes 0 to 4"):
        made.generate(["5"], seeds=[1])


def test_parts_that_do_not_fit_are_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="12 channels, the codec makes 3"):
        tiny_generator(home, codec=PixelSource(1))
    with pytest.raises(ValueError, match="needs codec, conditioner, size"):
        GeneratorConfig(denoiser=FlagDiTSource(source="x"))
    with pytest.raises(ValueError, match="patch of 2 makes 12 channels, not 3"):
        PixelSource(2, 3)
    with pytest.raises(ValueError, match=r"name conditioner\.source"):
        build_generator(tiny_generator_config(home / "tiny", conditioner=TextSource(PROFILE)))


def test_a_configuration_file(home: Path, tmp_path: Path) -> None:
    config = tiny_generator_config(home / "tiny", "dream")
    path = tmp_path / "g.yaml"
    path.write_text(configuration.dump(config))
    tree = configuration.parse(path.read_text(), str(path))
    assert configuration.build(tree, GeneratorConfig) == config
    tree["sampler"]["solver"] = {"kind": "sde"}
    sampler = configuration.build(tree, GeneratorConfig).sampler
    assert isinstance(sampler, SamplerSettings)
    assert sampler.solver is not None
    assert sampler.solver.kind == "sde"


def test_packed_for_inference_it_draws_the_same(tmp_path: Path) -> None:
    plain = tiny_generator(tmp_path)
    shake(plain.denoiser)
    [before] = plain.generate([TEXT], seeds=[3])
    kinds = {type(m) for m in plain.denoiser.modules()}
    slots = [m for m in for_inference(plain).denoiser.modules() if getattr(m, "kernel", None) is not None]
    assert slots, f"nothing was packed among {kinds}"
    assert not plain.training
    assert far(plain.generate([TEXT], seeds=[3])[0], before) <= 1
