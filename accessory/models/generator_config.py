"""A generator as a value: what denoises, what makes pictures of latents, what conditions, and what trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accessory.diffusion.autoencoder import AutoencoderConfig
from accessory.diffusion.denoiser import Prediction
from accessory.diffusion.flag_dit import FlagDiTConfig
from accessory.diffusion.sampler import SamplerSettings
from accessory.models import text_profiles
from accessory.models.build import ModelConfig
from accessory.models.dream_config import DreamConfig
from accessory.models.text_profiles import TextProfile

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class FlagDiTSource:
    """A diffusion transformer of ours: weights from ``source`` (a folder or a file of any layout that we read), whose
    sizes ``config`` may state; without a source random weights of ``config``."""

    config: FlagDiTConfig | None = None
    source: str | None = None
    dtype: Dtype = "fp32"
    kind: Literal["flag_dit"] = "flag_dit"

    def __post_init__(self) -> None:
        if self.config is None and self.source is None:
            raise ValueError("flag_dit needs a config (random weights), a source (published ones), or both")


@dataclass(frozen=True)
class DiffusersSource:
    """A network of diffusers from a local folder; ``prediction`` null asks the scheduler beside it."""

    source: str
    prediction: Prediction | None = None
    dtype: Dtype = "fp32"
    kind: Literal["diffusers"] = "diffusers"


DenoiserConfig = FlagDiTSource | DiffusersSource


@dataclass(frozen=True)
class PixelSource:
    """Pixels themselves, ``patch`` x ``patch`` of them folded into 3 patch^2 ``channels``."""

    patch: int = 1
    channels: int | None = None
    kind: Literal["pixel"] = "pixel"

    def __post_init__(self) -> None:
        if self.channels not in (None, 3 * self.patch**2):
            raise ValueError(f"pixel: a patch of {self.patch} makes {3 * self.patch**2} channels, not {self.channels}")


@dataclass(frozen=True)
class AutoencoderSource:
    """Our small autoencoder: its file ``source``, or random weights of the sizes ``config``."""

    source: str | None = None
    config: AutoencoderConfig | None = None
    kind: Literal["autoencoder"] = "autoencoder"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.config is None):
            raise ValueError("autoencoder needs a source (its file says its sizes) or a config (random weights)")


@dataclass(frozen=True)
class VaeSource:
    """A VAE of diffusers from a local folder; ``family`` checks its constants against published ones."""

    source: str
    family: str | None = None
    kind: Literal["diffusers"] = "diffusers"


CodecConfig = PixelSource | AutoencoderSource | VaeSource


@dataclass(frozen=True)
class TextSource:
    """The prompt's states in a language model (:mod:`accessory.models.text_encoder`).

    ``source``: weights, ``asset:NAME``, one of our model folders, or a whole model; null takes the profile's own.
    ``pooled``: also the mean over the prompt, for denoisers that want it as a part of its own.
    """

    profile: str | TextProfile = text_profiles.DEFAULT
    source: str | ModelConfig | None = None
    pooled: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class DreamSource:
    """The dream bridge on a multimodal model.

    ``model`` as ``source`` of :class:`TextSource`. ``dream``: a preset's name or a bridge; where it has no
    ``null_ids``, those of the empty prompt are filled in. ``profile`` says how a prompt that is a text becomes
    ids (BOS, EOS, template, longest): that of the encoder that the denoiser was trained with. ``reply``: to a dialogue
    the model may say so many tokens before it draws, and the picture is dreamt from them too (0: it draws at once).
    """

    model: str | ModelConfig = "asset:smollm2"
    dream: str | DreamConfig = "default"
    profile: str | TextProfile = text_profiles.DEFAULT
    reply: int = 0
    kind: Literal["dream"] = "dream"

    def __post_init__(self) -> None:
        if self.reply < 0:
            raise ValueError(f"conditioner.reply is {self.reply}, it counts tokens from 0")


@dataclass(frozen=True)
class LabelSource:
    """Classes by number; number ``num_classes`` is the null class."""

    num_classes: int
    kind: Literal["label"] = "label"


ConditionerConfig = TextSource | DreamSource | LabelSource


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """See the module.

    ``base`` names a generator folder that this one stands on: its denoiser and codec, with their weights, are that
    one's and are not named again; a ``conditioner`` that is left out is that one's too, and one that is named takes
    its place, as when a bridge is put where a text encoder was. ``sampler`` and ``size`` may be named anew. The base
    is not copied; ``base_sha256``, filled when it is built, keeps a generator from being loaded on another one.

    Attributes:
        sampler: how pictures are made where nothing else is asked for.
        size: side of the square default, in pixels.
        tuning: shell-style patterns of the parameters that train, which begin with ``denoiser``, ``codec`` or
            ``conditioner``; all others are frozen.
    """

    kind: Literal["generator"] = "generator"
    denoiser: DenoiserConfig | None = None
    codec: CodecConfig | None = None
    conditioner: ConditionerConfig | None = None
    sampler: SamplerSettings | None = None
    size: int | None = None
    tuning: tuple[str, ...] = ()
    base: str | None = None
    base_sha256: str | None = None

    def __post_init__(self) -> None:
        parts = {"denoiser": self.denoiser, "codec": self.codec, "conditioner": self.conditioner, "size": self.size}
        missing = [name for name, part in parts.items() if part is None]
        if self.base is None and missing:
            raise ValueError(f"a generator without a base needs {', '.join(missing)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size} pixels")
