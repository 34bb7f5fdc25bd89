"""Generators, prompts to pictures: built from a configuration, saved as a folder and loaded from one.

A generator folder holds ``config.yaml`` (with ``kind: generator``) and ``trainable.safetensors``: what was trained and
what was drawn at random. Weights that are named by a source or a base are never copied into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory import config as configuration
from accessory import log
from accessory.backbone.keys import check_keys
from accessory.backbone.store import atomic_folder, narrowed, read_file, write_file
from accessory.diffusion import autoencoder, dit_weights, unet
from accessory.diffusion.dit_fast import accelerate
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.latents import Codec, PixelCodec, load_vae
from accessory.diffusion.sampler import SamplerSettings
from accessory.diffusion.unet import DiffusersDenoiser
from accessory.models import build
from accessory.models.build import CONFIG_FILE, DTYPES, WEIGHTS_FILE, base_folder, find
from accessory.models.build import is_generator as is_generator
from accessory.models.conditioner import DreamConditioner, TextConditioner, build_conditioner
from accessory.models.generator_config import (
    AutoencoderSource,
    CodecConfig,
    DenoiserConfig,
    Dtype,
    FlagDiTSource,
    PixelSource,
)
from accessory.models.generator_config import GeneratorConfig as GeneratorConfig
from accessory.models.generator_net import Generator as Generator
from accessory.peft.quantize import Quantization

_log = log.get(__name__)


def build_generator(config: GeneratorConfig, *, cache: Path | None = None, train: bool = False) -> Generator:
    """Everything that ``config`` names; ``train`` makes what ``tuning`` names trainable.

    Raises:
        ValueError: for parts that do not fit, a base that is not the one that was trained on, or a pattern that names
            nothing; AssetError when an asset has not been fetched.
    """
    made = _assemble(config, cache)
    names = _matching(made, made.config.tuning)
    for name, p in made.named_parameters():
        p.requires_grad_(train and name in names)
        if name in names and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()  # a small step is lost in eight bits
    if isinstance(made.conditioner, TextConditioner):
        made.conditioner.encoder.frozen = not any(p.requires_grad for p in made.conditioner.parameters())
    if isinstance(made.denoiser, DiffusersDenoiser):
        made.denoiser.frozen = not any(p.requires_grad for p in made.denoiser.parameters())
    return made.train(train)


def _assemble(config: GeneratorConfig, cache: Path | None) -> Generator:
    if config.base is not None:
        return _on_base(config, cache)
    assert config.denoiser is not None
    assert config.codec is not None
    assert config.conditioner is not None
    # In this order: random weights of a denoiser are the same whatever conditions it.
    denoiser, codec = _denoiser(config.denoiser), _codec(config.codec)
    conditioner, resolved, own = build_conditioner(config.conditioner, cache)
    kept = {f"conditioner.{name}" for name in own}
    if isinstance(config.denoiser, FlagDiTSource) and config.denoiser.source is None:
        kept |= {f"denoiser.{name}" for name in denoiser.state_dict()}
    if isinstance(config.codec, AutoencoderSource) and config.codec.source is None:
        kept |= {f"codec.{name}" for name in codec.state_dict()}
    full = replace(config, conditioner=resolved, sampler=config.sampler or SamplerSettings())
    return Generator(full, denoiser, codec, conditioner, frozenset(kept))


def _on_base(config: GeneratorConfig, cache: Path | None) -> Generator:
    """A loaded base with other tuning, and perhaps another conditioner."""
    assert config.base is not None
    folder = base_folder(config.base)
    digest = hashlib.sha256(_bytes(folder)).hexdigest()
    if config.base_sha256 not in (None, digest):
        raise ValueError(
            f"base {config.base} is not the generator that this one was trained on: {folder / WEIGHTS_FILE} has "
            f"SHA-256 {digest}, base_sha256 is {config.base_sha256}"
        )
    base = load_generator(folder, cache=cache)
    said = [
        name
        for name in ("denoiser", "codec")
        if getattr(config, name) not in (None, getattr(base.config, name))
    ]  # fmt: skip
    if said:
        raise ValueError(f"base {config.base} brings its own {' and '.join(said)}; leave that out")
    conditioner, resolved, kept = base.conditioner, base.config.conditioner, frozenset[str]()
    if config.conditioner not in (None, resolved):
        _log.info("base %s: a new conditioner takes the place of its own", config.base)
        conditioner, resolved, kept = build_conditioner(config.conditioner, cache)
    full = replace(
        base.config, conditioner=resolved, sampler=config.sampler or base.config.sampler,
        size=config.size or base.config.size, tuning=config.tuning, base=config.base, base_sha256=digest,
    )  # fmt: skip
    names = frozenset(f"conditioner.{name}" for name in kept)
    return Generator(full, base.denoiser, base.codec, conditioner, names)


def _denoiser(config: DenoiserConfig) -> FlagDiT | DiffusersDenoiser:
    dtype = DTYPES[config.dtype]
    if not isinstance(config, FlagDiTSource):
        return unet.load(find(config.source), prediction=config.prediction, dtype=dtype)
    if config.source is None:
        assert config.config is not None
        return FlagDiT(config.config).to(dtype)
    return dit_weights.load(find(config.source), dtype, config.config)


def _codec(config: CodecConfig) -> Codec:
    if isinstance(config, PixelSource):
        return PixelCodec(config.patch)
    if isinstance(config, AutoencoderSource):
        if config.source is None:
            return autoencoder.TinyAutoencoder(config.config)
        return autoencoder.load(find(config.source))
    return load_vae(find(config.source), config.family)


def _matching(generator: Generator, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in generator.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"tuning: {pattern!r} matches no parameter; names begin with {', '.join(parts)}")
        found |= hits
    return found


# --- folders ----------------------------------------------------------------------------------------------------------


def find_generator(name: str | Path) -> Path:
    """A generator folder by its path, or a shipped one by its name; ValueError lists these."""
    folder = find(name)
    if is_generator(folder):
        return folder
    shipped = sorted(p.name for p in build.SHIPPED.glob("*") if is_generator(p))
    there = f"shipped ones are: {', '.join(shipped)}" if shipped else "this checkout ships none"
    there += f"; did you mean {folder / 'final'}?" if is_generator(folder / "final") else ""
    kind = "a chat model" if (folder / CONFIG_FILE).is_file() else "no model folder"
    raise ValueError(f"{name} is {kind}; a generator is wanted (config.yaml with kind: generator); {there}")


def saved_state(generator: Generator) -> dict[str, Tensor]:
    """The tensors of a generator's folder: what ``tuning`` names, and what no source could bring back."""
    return dict(_saved(generator))


def _saved(generator: Generator) -> Iterator[tuple[str, Tensor]]:
    names = _matching(generator, generator.config.tuning) | generator.kept
    for name, tensor in generator.state_dict().items():
        if name in names:
            yield name, tensor.detach()


def save_generator(generator: Generator, folder: str | Path, dtype: Dtype = "fp32") -> None:
    """Write a generator folder, all or nothing; ``fp16`` halves it and keeps eleven bits (a tensor that it cannot hold
    stays as it is).

    Raises:
        ValueError: when the folder holds something already, or a tensor is not finite.
    """
    with atomic_folder(Path(folder)) as private:
        write_file(narrowed(saved_state(generator), DTYPES[dtype]), private / WEIGHTS_FILE)
        (private / CONFIG_FILE).write_text(configuration.dump(generator.config), encoding="utf-8")


def read_generator_config(folder: str | Path) -> GeneratorConfig:
    """The resolved configuration of a generator folder; ValueError when it is none."""
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a generator folder: {name} is missing")
    if not is_generator(folder):
        raise ValueError(f"{folder} is not a generator folder: its {CONFIG_FILE} has no kind: generator")
    path = folder / CONFIG_FILE
    tree: Any = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    return configuration.build(tree, GeneratorConfig, str(path))


def load_generator(folder: str | Path, *, cache: Path | None = None, train: bool = False) -> Generator:
    """The generator of a folder written by :func:`save_generator`.

    Raises:
        ValueError: when the folder is not a generator's, or its weights do not fit its configuration.
    """
    with build.beside(Path(folder)):
        made = build_generator(read_generator_config(folder), cache=cache, train=train)
    path = Path(folder) / WEIGHTS_FILE
    own, state = saved_state(made), read_file(path)
    check_keys({name: tuple(t.shape) for name, t in own.items()}, state, str(path))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return made


def for_inference(generator: Generator, device: torch.device | str = "cpu") -> Generator:
    """The generator on its device in evaluation mode; on a CPU the denoiser's products are packed (``dit_fast``)."""
    generator = generator.to(device).eval()
    if torch.device(device).type == "cpu" and isinstance(generator.denoiser, FlagDiT):
        accelerate(generator.denoiser)
    return generator


def shrink(generator: Generator, quantization: Quantization) -> Generator:
    """Quantise the language model that reads the prompts, in place, for inference: its LoRA is folded in first. What
    stands on it stays as it is: the bridge with its queries and heads, the denoiser and the codec.

    Raises:
        ValueError: when no language model reads the prompts, when it is quantised already, or the sizes do not fit.
    """
    conditioner = generator.conditioner
    if isinstance(conditioner, DreamConditioner):
        build.shrink_net(conditioner.dream.net, quantization)
    elif isinstance(conditioner, TextConditioner):
        build.shrink_net(conditioner.encoder, quantization)
    else:
        raise ValueError(f"--quantize {quantization.kind}: this generator reads class numbers with no language model")
    return generator


def digest(folder: str | Path) -> str:
    """Sixteen hexadecimal digits that name a generator folder: its configuration (with its bases') and weights."""
    folder = Path(folder)
    config = (folder / CONFIG_FILE).read_bytes()
    return hashlib.sha256(config + _bytes(folder)).hexdigest()[:16]


def _bytes(folder: Path) -> bytes:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a generator folder: {WEIGHTS_FILE} is missing")
    return path.read_bytes()
