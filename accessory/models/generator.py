"""Prompts to pictures: a conditioner, a denoiser and a codec as one model, built, saved and loaded as a folder.

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
from PIL import Image
from torch import Tensor, nn

from accessory import config as configuration
from accessory.backbone.keys import check_keys
from accessory.backbone.store import atomic_folder, read_file, write_file
from accessory.diffusion import autoencoder, dit_weights, unet
from accessory.diffusion.batch import OnStep
from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.latents import Codec, PixelCodec, load_vae
from accessory.diffusion.sampler import SamplerSettings, sample
from accessory.diffusion.unet import DiffusersDenoiser
from accessory.models.build import CONFIG_FILE, DTYPES, WEIGHTS_FILE, ModelConfig, base_folder
from accessory.models.conditioner import Conditioner, DreamConditioner, Prompt, TextConditioner, build_conditioner
from accessory.models.generator_config import (
    AutoencoderSource,
    CodecConfig,
    DenoiserConfig,
    Dtype,
    FlagDiTSource,
    PixelSource,
)
from accessory.models.generator_config import GeneratorConfig as GeneratorConfig

Size = tuple[int, int]
"""Width and height in pixels."""


class Generator(nn.Module):
    """A conditioner, a denoiser and a codec.

    Args:
        config: resolved: everything in it is given.
        kept: names of the tensors that are saved though they do not train.

    Raises:
        ValueError: when the denoiser and the codec have other numbers of channels.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        denoiser: FlagDiT | DiffusersDenoiser,
        codec: Codec,
        conditioner: Conditioner,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        if denoiser.latent_channels != codec.channels:
            raise ValueError(
                f"the denoiser takes latents of {denoiser.latent_channels} channels, the codec makes {codec.channels}"
            )
        self.config, self.kept = config, kept
        self.denoiser, self.codec, self.conditioner = denoiser, codec, conditioner

    @property
    def settings(self) -> SamplerSettings:
        """How pictures are made where nothing else is asked for."""
        return self.config.sampler or SamplerSettings()

    @property
    def size(self) -> Size:
        """The default size."""
        assert self.config.size is not None
        return self.config.size, self.config.size

    @property
    def grain(self) -> Size:
        """What width and height must be multiples of: pixels of a latent times latents of a patch."""
        if isinstance(self.denoiser, FlagDiT):
            _, rows, columns = self.denoiser.config.patch
        else:
            rows = columns = int(getattr(self.denoiser.net.config, "patch_size", None) or 1)
        return self.codec.factor * columns, self.codec.factor * rows

    def train(self, mode: bool = True) -> Generator:
        """Parts of which nothing trains stay in evaluation mode."""
        super().train(mode)
        parts: list[nn.Module] = [self.denoiser, self.codec, self.conditioner]
        if isinstance(self.conditioner, DreamConditioner):
            parts.append(self.conditioner.dream.net)
        for part in parts:
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    # --- conditions ---------------------------------------------------------------------------------------------------

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """Conditions of B prompts: texts, or dialogues whose answer is the picture.

        Raises:
            ValueError: for one string, for none, and for what this conditioner cannot read.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("there are no prompts" if not prompts else "prompts is one string; put it into a list")
        return self.conditioner.condition(prompts)

    def null(self, n: int, negative: Sequence[str] | None = None) -> Condition:
        """What guidance leads away from, n rows: the empty prompt, or ``negative`` prompts (n, or one for all).

        Raises:
            ValueError: for another number of negative prompts.
        """
        if negative is None:
            return self.conditioner.null(n)
        if isinstance(negative, str) or len(negative) not in (1, n):
            raise ValueError(f"negative must be a list of one or of {n} prompts, got {negative!r}")
        # Each by itself: an empty one is exactly the null, and a picture does not depend on its neighbours.
        made = {t: self.conditioner.condition([t]) if t else self.conditioner.null(1) for t in set(negative)}
        rows = list(negative) * (n if len(negative) == 1 else 1)
        return join([made[text] for text in rows])

    def lost(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens of each prompt are cut because it is too long."""
        return self.conditioner.lost(prompts)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        negative: Sequence[str] | None = None,
        sizes: Sequence[Size] | None = None,
        seeds: Sequence[int],
        settings: SamplerSettings | None = None,
        steering: Steering | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Pictures of prompts. Each depends on its prompt, seed, size and settings, not on what is made beside it.

        Args:
            negative: one a picture, or one for all.
            sizes: (width, height) of each in pixels; None makes squares of the default size.
            seeds: one a picture.
            settings: None takes the generator's own.

        Raises:
            ValueError: for sizes that are no multiples of :attr:`grain` (the nearest are named), numbers of seeds or
                sizes that are not the number of prompts, and negative prompts without guidance.
        """
        settings = self.settings if settings is None else settings
        guided = settings.guidance is not None and settings.guidance.scale != 1
        if negative is not None and not guided:
            raise ValueError("negative prompts act through guidance, and it is off (scale 1)")
        self._check(len(prompts), sizes, seeds)
        with torch.no_grad(), _resting(self):
            condition = self.condition(prompts)
            null = self.null(len(prompts), negative) if guided else None
            return self.render(condition, null, sizes=sizes, seeds=seeds, settings=settings, steering=steering,
                               on_step=on_step)  # fmt: skip

    @torch.no_grad()
    def render(
        self,
        condition: Condition,
        null: Condition | None = None,
        *,
        sizes: Sequence[Size] | None = None,
        seeds: Sequence[int],
        settings: SamplerSettings | None = None,
        steering: Steering | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """As :meth:`generate`, of B conditions that are made already; ``null`` (one row or B) where guidance acts."""
        self._check(len(condition), sizes, seeds)
        sizes = [self.size] * len(condition) if sizes is None else sizes
        f, channels = self.codec.factor, self.codec.channels
        shapes = [(channels, height // f, width // f) for width, height in sizes]
        if isinstance(self.denoiser, DiffusersDenoiser) and self.denoiser.needs.sizes and condition.sizes is None:
            condition = replace(condition, sizes=_six(sizes, condition))
            null = None if null is None else replace(null, sizes=_six(sizes[: len(null)], null))
        with _resting(self):
            latents = sample(
                self.denoiser, condition, null,
                shape=shapes[0] if len(set(shapes)) == 1 else shapes,
                seeds=seeds, settings=self.settings if settings is None else settings,
                steering=steering, on_step=on_step,
            )  # fmt: skip
            return self.pictures(latents)

    @torch.no_grad()
    def pictures(self, latents: Latents) -> list[Image.Image]:
        """Latents as pictures of eight bits."""
        return [to_image(pixels) for pixels in self.codec.decode(latents)]

    def _check(self, count: int, sizes: Sequence[Size] | None, seeds: Sequence[int]) -> None:
        if len(seeds) != count or (sizes is not None and len(sizes) != count):
            given = f", {len(sizes)} sizes" if sizes is not None else ""
            raise ValueError(f"{count} prompts, {len(seeds)} seeds{given}: there must be one each a picture")
        for size in [self.size] if sizes is None else sizes:
            self.check_size(size)

    def check_size(self, size: Size) -> None:
        """Whether pictures can have this size; ValueError names the nearest that they can have."""
        if all(side > 0 and side % g == 0 for side, g in zip(size, self.grain, strict=True)):
            return
        low, high = ([_near(side, g, up) for side, g in zip(size, self.grain, strict=True)] for up in (False, True))
        near = " or ".join(dict.fromkeys(f"{w}x{h}" for w, h in (low, high)))
        raise ValueError(
            f"size {size[0]}x{size[1]}: width must be a multiple of {self.grain[0]} and height of {self.grain[1]} "
            f"pixels (codec factor times patch); the nearest are {near}"
        )


class _resting:  # noqa: N801  (used as a statement)
    """A module in evaluation mode for a while."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = {m: m.training for m in module.modules()}
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


def to_image(pixels: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1] as eight bits."""
    # (3, H, W) -> (H, W, 3)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _near(side: int, grain: int, up: bool) -> int:
    return max(grain, (-(-side // grain) if up else side // grain) * grain)


def _six(sizes: Sequence[Size], condition: Condition) -> Tensor:
    """SDXL's numbers (B, 6) of whole pictures."""
    rows = [(h, w, 0, 0, h, w) for w, h in sizes]
    return torch.tensor(rows, dtype=torch.float32, device=next(iter(condition.parts().values())).device)


# --- building ---------------------------------------------------------------------------------------------------------


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
    folder = base_folder(ModelConfig(base=config.base))
    digest = hashlib.sha256(_bytes(folder)).hexdigest()
    if config.base_sha256 not in (None, digest):
        raise ValueError(
            f"base {config.base} is not the generator that this one was trained on: it has SHA-256 {digest}, "
            f"base_sha256 is {config.base_sha256}"
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
        return unet.load(_path(config.source), prediction=config.prediction, dtype=dtype)
    if config.source is None:
        assert config.config is not None
        return FlagDiT(config.config).to(dtype)
    return dit_weights.load(_path(config.source), dtype, config.config)


def _codec(config: CodecConfig) -> Codec:
    if isinstance(config, PixelSource):
        return PixelCodec(config.patch)
    if isinstance(config, AutoencoderSource):
        if config.source is None:
            return autoencoder.TinyAutoencoder(config.config)
        return autoencoder.load(_path(config.source))
    return load_vae(_path(config.source), config.family)


def _path(name: str) -> Path:
    """A path that counts from the working directory or else from the checkout."""
    return base_folder(ModelConfig(base=name))


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


def is_generator(folder: str | Path) -> bool:
    """Whether a folder is a generator's, and not, say, a chat model's."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    tree = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    return isinstance(tree, dict) and tree.get("kind") == "generator"


def saved_state(generator: Generator) -> dict[str, Tensor]:
    """The tensors of a generator's folder: what ``tuning`` names, and what no source could bring back."""
    return dict(_saved(generator))


def _saved(generator: Generator) -> Iterator[tuple[str, Tensor]]:
    names = _matching(generator, generator.config.tuning) | generator.kept
    for name, tensor in generator.state_dict().items():
        if name in names:
            yield name, tensor.detach()


def save_generator(generator: Generator, folder: str | Path, dtype: Dtype = "fp32") -> None:
    """Write a generator folder, all or nothing; ``fp16`` halves it and keeps eleven bits.

    Raises:
        ValueError: when the folder holds something already.
    """
    with atomic_folder(Path(folder)) as private:
        to = DTYPES[dtype]
        state = {k: v.cpu().to(to) if v.is_floating_point() else v.cpu() for k, v in _saved(generator)}
        write_file(state, private / WEIGHTS_FILE)
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
    made = build_generator(read_generator_config(folder), cache=cache, train=train)
    path = Path(folder) / WEIGHTS_FILE
    own, state = saved_state(made), read_file(path)
    check_keys({name: tuple(t.shape) for name, t in own.items()}, state, str(path))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return made


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
