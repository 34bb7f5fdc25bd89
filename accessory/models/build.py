"""The only factory: from a configuration or a model folder to a model that can read, see and be tuned.

A model folder holds ``config.yaml`` and ``trainable.safetensors``: what was trained, and how to rebuild the rest from
assets or folders that are named there. Base weights are never copied into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accessory import config as configuration
from accessory.backbone.gguf import cached_gguf, gguf_at
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.store import atomic_folder, file_entries, narrowed, read_file
from accessory.backbone.weights import load_backbone
from accessory.data import assets, template, tokenizer
from accessory.data.encode import Encoder
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import Tokenizer
from accessory.models.encoder_store import file_digest, read_encoder
from accessory.models.mllm import MLLM
from accessory.models.stacked import stack
from accessory.nn import unread
from accessory.peft.attach import TuningSpec, attach, attached, load_trainable, merge, trainable_state
from accessory.peft.quantize import Quantization, found, quantize
from accessory.peft.tuning import promote
from accessory.vision import presets
from accessory.vision import resampler as resampler_of
from accessory.vision.mixture import Mixture
from accessory.vision.projector import Kind, Projector
from accessory.vision.tower import Tower
from accessory.vision.weights import load_efficientnet_lite, load_encoders, load_tower

ASSET = "asset:"
CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "trainable.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SHIPPED = Path(__file__).resolve().parents[2] / "weights"
"""Where the models lie that come with a checkout."""
# Set while a saved folder is built: the values of its configuration do not know which file they came from.
_BESIDE: ContextVar[Path | None] = ContextVar("beside", default=None)


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Names in the configuration of a saved ``folder`` count as :func:`find` says."""
    before = _BESIDE.set(folder.absolute())
    try:
        yield
    finally:
        _BESIDE.reset(before)


def find(name: str | Path) -> Path:
    """The folder or file of a name, by one rule for configurations and commands.

    A path counts from the working directory, then from each folder above the saved one whose configuration names it,
    nearest first, then from the checkout; a single word is also the name of a shipped model. Of several, the first
    with a ``config.yaml``, or else the first that exists; the name itself where there is none.
    """
    return next((p for p in _places(name) if (p / CONFIG_FILE).is_file()), None) or next(
        (p for p in _places(name) if p.exists()), Path(name).expanduser()
    )


def _places(name: str | Path) -> list[Path]:
    path, saved = Path(name).expanduser(), _BESIDE.get()
    above = [] if saved is None else [up / path for up in saved.parents]
    shipped = [SHIPPED / path] if len(path.parts) == 1 else []
    return list(dict.fromkeys([path, *above, SHIPPED.parent / path, *shipped]))


def base_folder(name: str) -> Path:
    """The folder of a base. ValueError says where it was looked for and, for a run of ``exps/``, what makes it."""
    folder = find(name)
    if folder.is_dir():
        return folder
    tried = ", ".join(dict.fromkeys(str(p.absolute()) for p in _places(name)))
    made, makes = makers(folder), ""
    if made:
        verb = "bash" if made[0].suffix == ".sh" else "python -m accessory train"
        makes = f"; {verb} {made[0].relative_to(SHIPPED.parent)} makes it"
    raise ValueError(f"there is no folder {name}{makes} (looked in {tried})")


def makers(folder: Path) -> list[Path]:
    """What makes the ``final`` folder of a run of ``exps/``: the script of its name, then the experiment."""
    exps, run = SHIPPED.parent / "exps", folder.parent.name
    return [f for kind in ("sh", "yaml") for f in sorted(exps.rglob(f"{run}.{kind}")) if folder.name == "final"]


def is_generator(folder: str | Path) -> bool:
    """Whether a folder is a generator's, and not, say, a chat model's."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    tree = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    return isinstance(tree, dict) and tree.get("kind") == "generator"


@dataclass(frozen=True)
class BackboneConfig:
    """``source``: a folder, a ``.gguf`` file, ``asset:NAME``, or None for random weights of the sizes ``llama``."""

    source: str | None = "asset:smollm2"
    llama: LlamaConfig | None = None
    tokenizer: str | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"


@dataclass(frozen=True)
class TowerSource:
    """A vision preset and its weights: ``asset:NAME``, a safetensors file of our names, a folder of the encoders of a
    mixture as ``PREFIX.safetensors`` under published names, or None for random ones.

    ``activation`` of its CLIP in place of the preset's, see :func:`accessory.vision.presets.find`. ``bgr``: see
    :class:`accessory.vision.tower.Tower`. ``encoders``: the
    SHA-256 of published encoders in the store (:mod:`accessory.models.encoder_store`) by their prefix, in place of
    ``weights``.
    """

    preset: str = "efficientnet-lite0"
    weights: str | None = "asset:efficientnet-lite0"
    activation: presets.Activation | None = None
    bgr: bool = False
    encoders: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProjectorConfig:
    """Features spliced into the sequence; ``start_end`` adds SPHINX's learned vectors around every tile, ``words`` a
    token of so many visual words at its end, read as sharply as ``sharpness`` says
    (:class:`accessory.vision.projector.VisualWords`)."""

    layers: Kind = "mlp"
    start_end: bool = False
    words: int = 0
    sharpness: float = 1.0


@dataclass(frozen=True)
class ResamplerConfig:
    """Features as LLaMA-Adapter's visual prefix: ``length`` tokens, added to the zero-init prefixes. Without a
    projector pictures take no position. A dialogue brings at most ``max_tiles``, whose mean the prefix is; the
    published models take one picture."""

    kind: resampler_of.Kind = "queries"  # or bind: ImageBind-LLM's, of one vector and 1 token
    neighbours: str | None = None  # of kind bind: a file of its cache, one tensor (N, C)
    length: int = 10
    width: int = 256
    depth: int = 2
    heads: int = 8
    max_tiles: int = 1

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ValueError(f"resampler.max_tiles must be at least 1, got {self.max_tiles}")


@dataclass(frozen=True)
class ModelConfig:
    """A model as a value. ``tuning`` names what is added and what trains; all else is frozen.

    ``base`` names a model folder that this one stands on: all but ``stacked.BESIDE`` is that model's, with its trained
    tensors, and is not copied. What the base has learned stays in its slots; only where ``tuning`` wants the same
    slot, LoRA and scales are folded into the weights first. :func:`find` says what a name means. ``base_sha256``,
    filled when the model is built, keeps a model from being loaded on weights that it was not trained on.

    ``quantization``: the backbone's frozen linears in fewer bits, before anything is attached (QLoRA with kind nf4).
    ``template`` and ``max_length`` None: the base's, or without one chatml_plain and 1024; that of a built model says
    which.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    tower: TowerSource | None = field(default_factory=TowerSource)
    projector: ProjectorConfig | None = field(default_factory=ProjectorConfig)
    resampler: ResamplerConfig | None = None
    tuning: tuple[TuningSpec, ...] = ()
    template: str | None = None
    tiling: TilingConfig = field(default_factory=lambda: TilingConfig(size=128))
    max_length: int | None = None
    base: str | None = None
    base_sha256: str | None = None
    quantization: Quantization | None = None

    @property
    def dialogues(self) -> tuple[str, int]:
        """The name of their template and the most positions of one, where no base says otherwise."""
        return self.template or "chatml_plain", 1024 if self.max_length is None else self.max_length

    def settled(self) -> ModelConfig:
        """The same with :attr:`dialogues` stated."""
        name, length = self.dialogues
        return replace(self, template=name, max_length=length)


@dataclass(frozen=True)
class Model:
    """A built network with what is needed to talk to it."""

    net: MLLM
    tokenizer: Tokenizer
    encoder: Encoder
    config: ModelConfig

    @property
    def template(self) -> template.Template:
        """The dialogue template."""
        return self.encoder.template


def build(config: ModelConfig, *, cache: Path | None = None, train: bool = False, later: bool = False) -> Model:
    """Build and load everything that ``config`` names; ``train`` makes what ``tuning`` names trainable, in fp32.

    ``later``: the backbone's weights stay unread where they can, for
    :func:`accessory.parallel.shard.parallelize` to read a rank's part of each.

    Raises:
        ValueError: for sizes that do not fit together; AssetError when an asset has not been fetched.
    """
    if config.base is not None:
        folder = base_folder(config.base)
        return stack(load(folder, cache=cache, later=later), config, file_digest(folder / WEIGHTS_FILE), train)
    backbone, words = _backbone(config.backbone, cache, config.quantization, later)
    tower = None if config.tower is None else build_tower(config.tower, cache)
    net = join(config, backbone, tower)
    net.requires_grad_(False) if not train else promote(net)
    name, length = config.dialogues
    encoder = Encoder(
        words,
        template.get(name),
        config.tiling,
        net.runs,
        length,
        start_end=config.projector is not None and config.projector.start_end,
        max_tiles=None if config.resampler is None else config.resampler.max_tiles,
    )
    return Model(net.train(train), words, encoder, config.settled())


def join(config: ModelConfig, backbone: Llama, tower: Tower | None) -> MLLM:
    """Backbone and tower with all that ``config`` puts between and on them; what it does not tune is frozen.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    projector = resampler = None
    if tower is not None and config.projector is not None:
        p = config.projector
        projector = Projector(tower.groups, backbone.config.dim, p.layers, p.start_end, p.words, p.sharpness)
    if tower is not None and config.resampler is not None:
        r = config.resampler
        sizes = {"length": r.length, "width": r.width, "depth": r.depth, "heads": r.heads}
        known = None if r.neighbours is None else _only(find(r.neighbours))
        resampler = resampler_of.make(r.kind, tower.width, backbone.config.dim, vectors=known, **sizes)
    if tower is not None and config.tiling.size != tower.size:
        raise ValueError(f"tiling.size is {config.tiling.size}, the tower {config.tower} takes {tower.size} pixels")
    net = MLLM(backbone, tower, projector, resampler)
    if config.tuning:
        attach(net, config.tuning, dtype=torch.float32)
    return net


def _only(path: Path) -> Tensor:
    """The tensor of a file that holds one."""
    found = list(read_file(path).values())
    if len(found) != 1:
        raise ValueError(f"resampler.neighbours: {path} holds {len(found)} tensors, it must be one of vectors (N, C)")
    return found[0]


def _asset(reference: str, cache: Path | None) -> Path:
    """The folder of ``asset:NAME``, or the path itself."""
    if reference.startswith(ASSET):
        return assets.asset_dir(reference.removeprefix(ASSET), cache)
    return find(reference)


def _backbone(
    config: BackboneConfig, cache: Path | None, quantization: Quantization | None, later: bool
) -> tuple[Llama, Tokenizer]:
    dtype = DTYPES[config.dtype]
    if config.source is None:
        if config.llama is None or config.tokenizer is None:
            raise ValueError("backbone.source is null: random weights need backbone.llama and backbone.tokenizer")
        words = tokenizer.load(_asset(config.tokenizer, cache))
        made = Llama(config.llama).to(dtype)
        return made if quantization is None else cast(Llama, quantize(made, quantization)), words
    path = _asset(config.source, cache)
    gguf = gguf_at(path)
    words = tokenizer.load(_asset(config.tokenizer, cache) if config.tokenizer else gguf or path)
    if gguf is not None:
        path = cached_gguf(gguf, (cache or assets.default_cache()) / "prepared")
    return load_backbone(path, dtype=dtype, quantization=quantization, later=later), words


def build_tower(config: TowerSource, cache: Path | None = None) -> Tower:
    """An encoder with its weights, frozen or not as it comes from the library."""
    tower = presets.build(config.preset, config.activation, config.bgr)
    if config.encoders:
        if config.weights is not None:
            raise ValueError(f"tower.weights is {config.weights!r} and tower.encoders is given: write one of them")
        load_encoders(tower, {name: read_encoder(sha, name, cache) for name, sha in config.encoders.items()})
        return tower
    if config.weights is None:
        return tower
    if config.weights.startswith(ASSET):
        name = config.weights.removeprefix(ASSET)
        load_tower(tower, load_efficientnet_lite(assets.single_file(name, "**/*.pth", cache)))
    elif (path := find(config.weights)).is_dir() and isinstance(tower, Mixture):
        load_encoders(tower, {name: read_file(path / f"{name}.safetensors") for name in tower.members})
    else:
        load_tower(tower, read_file(path))
    return tower


def shrink(model: Model, quantization: Quantization) -> Model:
    """Quantise a loaded model in place for inference. LoRA and scales are folded into the full weights first, so that
    nothing is computed beside the quantised ones; prefixes, biases and norms stay.

    Raises:
        ValueError: when it is quantised already, or the sizes do not fit.
    """
    shrink_net(model.net, quantization)
    return model


def shrink_net(net: nn.Module, quantization: Quantization) -> None:
    """As :func:`shrink`, the backbone inside of any network."""
    if found(net) is None and any(spec.kind in ("lora", "scale") for spec in attached(net)):
        merge(net)
    quantize(net, quantization)


def exported(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model folder: what trains, less heads that only training needs."""
    return {k: v.detach() for k, v in trainable_state(net).items() if not k.startswith("aligner.")}


def write_config(folder: Path, config: ModelConfig) -> None:
    """Put ``config.yaml`` into a model folder."""
    (folder / CONFIG_FILE).write_text(configuration.dump(config), encoding="utf-8")


def save(model: Model, folder: Path, *, dtype: Literal["fp32", "fp16", "bf16"] = "fp32") -> None:
    """Write a model folder, all or nothing. ``fp16`` halves the file and keeps eleven bits; a tensor that it cannot
    hold stays as it is.

    Raises:
        ValueError: when the folder holds something already, or a tensor is not finite.
    """
    with atomic_folder(folder) as private:
        save_file(narrowed(exported(model.net), DTYPES[dtype]), private / WEIGHTS_FILE)
        write_config(private, model.config)


def load(folder: Path, *, cache: Path | None = None, train: bool = False, later: bool = False) -> Model:
    """The model of a folder written by :func:`save`; ``later`` as in :func:`build`.

    Raises:
        ValueError: when the folder is not a model folder, or its weights do not fit its configuration.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a model folder: {name} is missing")
    path = folder / CONFIG_FILE
    if is_generator(folder):
        raise ValueError(f"{folder} is a generator, which makes pictures; a model that reads and speaks is wanted")
    # Not configuration.load: there ``base`` at the top would be the name of another file.
    tree = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    with beside(folder):
        model = build(configuration.build(tree, ModelConfig, str(path)), cache=cache, train=True, later=later)
    load_trainable(model.net, read_file(folder / WEIGHTS_FILE))
    unread.point(model.net, {name: entry.read for name, entry in file_entries(folder / WEIGHTS_FILE).items()})
    if not train:
        model.net.requires_grad_(False).eval()
    return model
