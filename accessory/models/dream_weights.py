"""Bridges on disk: what trains and nothing else, and the checkpoints of DreamLLM and ChatIllusion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from accessory import config as configuration
from accessory.backbone.hf import load_pickle
from accessory.backbone.keys import check_keys
from accessory.backbone.store import atomic_folder, read_file, write_file
from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream import Dream
from accessory.models.dream_config import DreamConfig, TapConfig
from accessory.models.dream_presets import PRESETS
from accessory.models.dream_queries import QueryConfig
from accessory.models.mllm import MLLM
from accessory.nn.projection import Kind

CONFIG_FILE = "dream.yaml"
WEIGHTS_FILE = "dream.safetensors"
NET = "net."

# DreamLLM: the file of each plugin, its older name, its keys in a whole state dict.
PLUGINS = {
    "dream_embedding": ("dream_embedding.bin", "dream_queries.pt", "model.dream_embedding."),
    "clip_vision_embedding": (
        "clip_vision_embedding.bin",
        "clip_vision_model_projector.pt",
        "model.clip_vision_embedding.",
    ),
    "stable_diffusion_head": ("stable_diffusion_head.bin", "unet_projector.pt", "stable_diffusion_head."),
}
# What every DreamLLM checkpoint repeats of frozen models; it is had from them.
_FROZEN = re.compile(r"(clip_vision_model|vae|unet|tokenizer|scheduler|noise_scheduler)\..*")


def own_state(dream: Dream) -> dict[str, Tensor]:
    """The bridge's parameters by name, and under ``net.`` those of the multimodal model that train."""
    named = dream.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad or not name.startswith(NET)}


def save(dream: Dream, folder: Path) -> None:
    """Write ``dream.yaml`` and ``dream.safetensors`` into a new folder; frozen weights are not copied."""
    with atomic_folder(folder) as private:
        write_file(own_state(dream), private / WEIGHTS_FILE)
        (private / CONFIG_FILE).write_text(configuration.dump(dream.config), encoding="utf-8")


def load(net: MLLM, folder: Path) -> Dream:
    """The bridge of a folder written by :func:`save`, on the model that it was trained with.

    Raises:
        ValueError: for files that are not there, and missing, unknown or mis-shaped keys (all of them listed).
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no dream bridge: {CONFIG_FILE} is missing")
    tree = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    dream = Dream(net, configuration.build(tree, DreamConfig, str(path)))
    fill(dream, read_file(Path(folder) / WEIGHTS_FILE), str(folder))
    return dream


@torch.no_grad()
def fill(dream: Dream, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into the bridge, and its ``net.`` entries into the multimodal model.

    Raises:
        ValueError: when a key is missing, unknown or mis-shaped; nothing is copied then.
    """
    own = dict(dream.named_parameters())
    wanted = {k: tuple(p.shape) for k, p in own.items() if not k.startswith(NET) or k in state}
    check_keys(wanted, state, where)
    for name in wanted:
        own[name].copy_(state[name])


@dataclass(frozen=True)
class DreamLLM:
    """A DreamLLM checkpoint in our terms.

    Attributes:
        config: the bridge. bridge: its parameters, for :func:`fill`.
        projector: the visual projector's, named as :class:`accessory.vision.projector.Projector` does.
        llm: the language model's tensors under Hugging Face's names, for ``backbone.hf.from_hf``.
        frozen: keys of frozen encoders and decoders, which were left out.
    """

    config: DreamConfig
    bridge: dict[str, Tensor]
    projector: dict[str, Tensor]
    llm: dict[str, Tensor]
    frozen: tuple[str, ...]


def read_dreamllm(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The plugins' tensors of a checkpoint folder, from ``torch.save`` files under new or old names.

    Raises:
        ValueError: when a file is missing, or holds more than tensors.
    """
    files = {}
    for plugin, (new, old, _) in PLUGINS.items():
        found = [Path(folder) / name for name in (new, old) if (Path(folder) / name).is_file()]
        if not found:
            raise ValueError(f"{folder} holds neither {new} nor {old}")
        files[plugin] = load_pickle(found[0], allowed=True)
    return files


def split_dreamllm(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A whole state dict by plugin, the language model's rest under ``llm``."""
    files: dict[str, dict[str, Tensor]] = {plugin: {} for plugin in (*PLUGINS, "llm")}
    for key, tensor in state.items():
        plugin = next((p for p, (_, _, prefix) in PLUGINS.items() if key.startswith(prefix)), "llm")
        prefix = PLUGINS[plugin][2] if plugin != "llm" else ""
        files[plugin][key.removeprefix(prefix)] = tensor
    return files


def from_dreamllm(files: Mapping[str, Mapping[str, Tensor]], dream_start: int, dream_end: int, bos: int) -> DreamLLM:
    """The plugins of :func:`read_dreamllm` or :func:`split_dreamllm`, with the language model's tensors as ``llm``
    (at least its ``model.embed_tokens.weight``).

    ``dream_start``, ``dream_end``, ``bos``: from the checkpoint's ``special_tokens2ids_dict``. The trigger stays that
    row of the vocabulary.

    Raises:
        ValueError: listing every key that has no place.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    frozen, unknown = [], []
    for plugin in PLUGINS:
        kept[plugin] = {}
        for key, tensor in files[plugin].items():
            if _FROZEN.fullmatch(key):
                frozen.append(f"{plugin}: {key}")
            elif key == "dream_queries" if plugin == "dream_embedding" else _projector_key(plugin, key):
                kept[plugin][key] = tensor
            else:
                unknown.append(f"{plugin}: {key}")
    unknown += [f"llm: {k}" for k in files["llm"] if not re.fullmatch(r"lm_head\.weight|model\.(embed|lay|norm).*", k)]
    if unknown:
        raise ValueError(f"{len(unknown)} keys have no place in a DreamLLM bridge: {', '.join(sorted(unknown))}")
    queries = kept["dream_embedding"]["dream_queries"]
    # The plugin calls its projector module projector too: projector.projector.weight; older files do not.
    head = {"projector." + k.replace("projector.", ""): v for k, v in kept["stable_diffusion_head"].items()}
    kind, depth, layers = from_zoo(head)
    if kind not in ("linear", "mlp"):
        raise ValueError(f"a DreamLLM condition projector of kind {kind!r} is not a connector")
    width, bias = next(reversed(layers.values())).shape[0], "layers.0.bias" in layers
    made = ConnectorConfig(kind="linear" if kind == "linear" else "mlp", width=width, depth=depth, bias=bias)
    config = replace(
        PRESETS["dreamllm"], num_queries=queries.shape[-2], connector=made, trigger=dream_start, null_ids=(bos,)
    )
    bridge = {
        "queries": queries.reshape(queries.shape[-2:]),
        "end": files["llm"]["model.embed_tokens.weight"][dream_end],
    }
    bridge |= {f"connector.body.{k}": v for k, v in layers.items()}
    visual = {}
    for key, tensor in kept["clip_vision_embedding"].items():
        visual[f"visual_proj.{int(key.startswith('post_layernorm'))}.{key.rsplit('.')[-1]}"] = tensor
    return DreamLLM(config, bridge, visual, dict(files["llm"]), tuple(frozen))


def _projector_key(plugin: str, key: str) -> bool:
    if plugin == "clip_vision_embedding":
        return re.fullmatch(r"(projector\.projector|projector|post_layernorm)\.(weight|bias)", key) is not None
    return re.fullmatch(r"(projector\.){1,2}(\d+\.)?(weight|bias)", key) is not None


def to_dreamllm(dream: Dream) -> dict[str, dict[str, Tensor]]:
    """The trained tensors of a bridge as DreamLLM's plugins hold them, without the frozen models.

    Raises:
        ValueError: when the bridge is none that DreamLLM has.
    """
    config = dream.config
    kind = config.connector.kind
    plain = (config.tap, config.heads, config.query) == (TapConfig(), HeadsConfig(), QueryConfig())
    if kind not in ("linear", "mlp") or not plain:
        raise ValueError(
            f"DreamLLM has no bridge of connector.kind {kind!r}, {config.tap}, {config.heads}, {config.query}"
        )
    state = own_state(dream)
    layers = {k.removeprefix("connector.body."): v for k, v in state.items() if k.startswith("connector.body.")}
    head = {f"projector.{k}": v for k, v in to_zoo("linear" if kind == "linear" else "mlp", layers).items()}
    return {"dream_embedding": {"dream_queries": state["queries"][None]}, "stable_diffusion_head": head}


def from_zoo(state: Mapping[str, Tensor]) -> tuple[Kind, int, dict[str, Tensor]]:
    """A projector of DreamLLM's zoo: kind, depth, and its tensors as :class:`accessory.nn.projection.Projection` names
    them. Keys are ``projector.weight`` (linear, conv), ``projector.<n>.weight`` (mlp, sam) and ``mlp.weight`` (sam).

    Raises:
        ValueError: listing every key when they are of no projector.
    """
    indices = sorted({int(m[1]) for k in state if (m := re.fullmatch(r"projector\.(\d+)\.(?:weight|bias)", k))})
    names: dict[str, str] = {}
    kind: Kind
    if "projector.weight" in state:
        kind = "conv" if state["projector.weight"].ndim == 4 else "linear"
        names = {f"projector.{p}": f"layers.0.{p}" for p in ("weight", "bias")}
    else:
        kind = "sam" if "mlp.weight" in state else "mlp"
        names = {f"projector.{j}.{p}": f"layers.{i}.{p}" for i, j in enumerate(indices) for p in ("weight", "bias")}
        names["mlp.weight"] = f"layers.{len(indices)}.weight"
    unknown = sorted(set(state) - set(names))
    if unknown or not (indices or "projector.weight" in state):
        raise ValueError(f"{len(unknown)} keys have no place in a projector: {', '.join(unknown) or 'it is empty'}")
    return kind, max(len(indices), 1), {names[k]: v for k, v in state.items()}


def to_zoo(kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_zoo`."""
    last = max(int(k.split(".")[1]) for k in state)
    out = {}
    for key, tensor in state.items():
        i, part = int(key.split(".")[1]), key.split(".")[2]
        if kind in ("linear", "conv"):
            out[f"projector.{part}"] = tensor
        elif kind == "mlp":
            out[f"projector.{2 * i}.{part}"] = tensor  # a GELU stands between two layers
        else:
            out[f"mlp.{part}" if i == last else f"projector.{i}.{part}"] = tensor
    return out


def from_gen_adapter(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A ChatIllusion generation adapter, for :func:`fill`. ``names`` maps the beginnings of its keys to ours
    (``connector.body.q`` and so on); ``sd_query``, its learned queries, is known.

    No weights of it were ever published, so its own names are for whoever has some to say.

    Raises:
        ValueError: listing every key that no entry of ``names`` covers.
    """
    table = {"sd_query": "connector.body.queries", **names}
    out, unknown = {}, []
    for key, tensor in state.items():
        hit = max((n for n in table if key == n or key.startswith(f"{n}.")), key=len, default=None)
        if hit is None:
            unknown.append(key)
        else:
            value = tensor[0] if hit == "sd_query" and tensor.ndim == 3 else tensor
            out[table[hit] + key.removeprefix(hit)] = value
    if unknown:
        raise ValueError(f"{len(unknown)} keys have no place in a GenAdapter: {', '.join(sorted(unknown))}")
    return out
