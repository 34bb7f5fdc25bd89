"""A model without its weights: every name and shape of any size, in seconds and without memory."""

from __future__ import annotations

from pathlib import Path

import torch

from accessory import config as configuration
from accessory.backbone import store
from accessory.backbone.keys import config_from_dict
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.sizes import SIZES, from_hf_config
from accessory.data import assets
from accessory.models import build, stacked
from accessory.models.build import BackboneConfig, ModelConfig
from accessory.models.encoder_store import encoder_path
from accessory.models.mllm import MLLM
from accessory.models.published import LLAMA_TYPES
from accessory.models.reference import text_specs
from accessory.models.reference_folder import published_config
from accessory.peft.attach import attach, attached, detach
from accessory.peft.tuning import promote
from accessory.vision import presets


def skeleton(config: ModelConfig) -> MLLM:
    """The network of ``config`` on the meta device, with what is tuned in fp32; nothing is read but configurations.

    Quantised weights stand there in full: on the meta device they have no codes.

    Raises:
        ValueError: for sizes that are not known or do not fit together, as :func:`accessory.models.build.build`.
    """
    with torch.device("meta"):
        if config.base is not None:
            return _on_base(config)
        backbone = Llama(sizes(config.backbone)).to(build.DTYPES[config.backbone.dtype])
        tower = (
            None
            if config.tower is None
            else presets.build(config.tower.preset, config.tower.activation, config.tower.bgr)
        )
        net = build.join(config, backbone, tower)
    promote(net)
    return net


def _on_base(config: ModelConfig) -> MLLM:
    net = skeleton(_below(config.base or ""))
    if stacked.folds(config.base, attached(net), config.tuning):  # and the slots are free again
        detach(net, [spec for spec in attached(net) if spec.kind in ("lora", "scale")])
    attach(net, config.tuning, dtype=torch.float32)
    promote(net)
    return net


def resolved(config: ModelConfig) -> ModelConfig:
    """``config`` with all that its base brings and with the defaults of what is None.

    Raises:
        ValueError: when it says what the base brings, or the base is neither a folder nor known by name.
    """
    return config.settled() if config.base is None else stacked.over(config, resolved(_below(config.base)))


def _below(name: str) -> ModelConfig:
    """The configuration of a base: that of the model folder; of a run that has not been made, what its experiment says;
    of a published model that has not been converted, what its type says."""
    folder = build.find(name)
    file = folder / build.CONFIG_FILE
    if file.is_file():
        tree = configuration.parse(file.read_text(encoding="utf-8"), str(file))
        return configuration.build(tree, ModelConfig, str(file))
    if (kind := _released(folder)) is not None:
        length = SIZES[LLAMA_TYPES[kind].size].max_length
        return published_config(kind, str(folder / "backbone"), text_specs({}, kind), length)
    made = [file for file in build.makers(folder) if file.suffix == ".yaml"]
    if not made:
        build.base_folder(name)  # which says what is missing
    return configuration.build(configuration.read(made[0]).get("model", {}), ModelConfig, str(made[0]))


def sizes(config: BackboneConfig) -> LlamaConfig:
    """The sizes of a backbone: as they are stated, those of its folder, or those of the name of one that is not there.

    Raises:
        ValueError: when none of these are known.
    """
    if config.llama is not None:
        return config.llama
    if config.source == "asset:smollm2":  # the default, known also where it has not been fetched
        return SIZES["smollm2-135m"]
    folder = build.find(config.source or "")
    if (folder / "config.json").is_file():
        return stated(folder)
    kind = _released(folder.parent) if folder.name == "backbone" else None
    name = folder.name if kind is None else LLAMA_TYPES[kind].size
    if folder.exists() or name not in SIZES:
        raise ValueError(
            f"backbone.source {config.source} has no config.json, so its sizes are not known (a folder that is not "
            "there yet has those of its name, e.g. weights/llama2-13b)"
        )
    return SIZES[name]


def stated(folder: Path) -> LlamaConfig:
    """The sizes in a folder of whole weights, of our layout or Hugging Face's."""
    found = store.read_json(folder / "config.json")
    return config_from_dict(found["backbone"]) if found.get("format") == "accessory" else from_hf_config(found)


def absent(config: ModelConfig, cache: Path | None = None) -> list[str]:
    """What of the weights that ``config`` and its bases name is not there, each with where it comes from if known."""
    if config.base is not None:
        folder = build.find(config.base)
        if not (folder / build.CONFIG_FILE).is_file():
            return [f"model.base: {_reason(config.base) or f'{folder} holds no {build.CONFIG_FILE}'}"]
        lost = [] if (folder / build.WEIGHTS_FILE).is_file() else [f"model.base: no file {folder / build.WEIGHTS_FILE}"]
        with build.beside(folder):
            return lost + absent(_below(config.base), cache)
    named = {"backbone.source": config.backbone.source, "backbone.tokenizer": config.backbone.tokenizer}
    if config.tower is not None:
        named["tower.weights"] = config.tower.weights
    if config.resampler is not None:
        named["resampler.neighbours"] = config.resampler.neighbours
    lost = [f"model.{name}: {why}" for name, value in named.items() if value and (why := _gone(value, cache))]
    for name, digest in ({} if config.tower is None else config.tower.encoders).items():
        if not (path := encoder_path(digest, cache)).is_file():
            lost.append(f"model.tower.encoders.{name}: no file {path}; convert its checkpoint again")
    return lost


def _reason(base: str) -> str:
    try:
        build.base_folder(base)
    except ValueError as error:
        return str(error)
    return ""


def _gone(name: str, cache: Path | None) -> str:
    """Why an asset or a file is not there; empty where it is."""
    if not name.startswith(build.ASSET):
        return "" if build.find(name).exists() else f"nothing at {name}"
    try:
        assets.asset_dir(name.removeprefix(build.ASSET), cache)
    except assets.AssetError as error:
        return str(error)
    return ""


def _released(folder: Path) -> str | None:
    return next((kind for kind, row in LLAMA_TYPES.items() if folder.name in row.released), None)
