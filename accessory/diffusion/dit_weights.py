"""Weights of the Lumina diffusion transformers: published layouts, diffusers' layout and our own folders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.config import build, plain
from accessory.diffusion.dit_config import Experts, FlagDiTConfig, Norms
from accessory.diffusion.flag_dit import FlagDiT

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
LABEL_HEADS = 32  # heads of label-conditional models cannot be seen in their shapes; every published one has these

# Ours, and diffusers' names for it (LuminaNextDiT2DModel). Two names are twins that must be equal.
_TOP = {
    "pad_token": ("pad_token",),
    "x_embedder": ("patch_embedder.proj",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "cap_embedder.0": ("time_caption_embed.caption_embedder.0",),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
_LAYER = {
    "attention.gate": ("gate",),
    "attention.wq": ("attn1.to_q", "attn2.to_q"),
    "attention.wk": ("attn1.to_k",),
    "attention.wv": ("attn1.to_v",),
    "attention.wk_y": ("attn2.to_k",),
    "attention.wv_y": ("attn2.to_v",),
    "attention.wo": ("attn2.to_out.0",),
    "attention.q_norm": ("attn1.norm_q", "attn2.norm_q"),
    "attention.k_norm": ("attn1.norm_k",),
    "attention.ky_norm": ("attn2.norm_k",),
    "attention_norm1": ("norm1.norm",),
    "adaLN_modulation.1": ("norm1.linear",),
    "attention_norm2": ("norm2",),
    "ffn_norm1": ("ffn_norm1",),
    "ffn_norm2": ("ffn_norm2",),
    "attention_y_norm": ("norm1_context",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
}
# Lumina's audio and music models call the same things otherwise.
_AUDIO = (("proj_in.", "x_embedder."), ("blocks.", "layers."))


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for tensors in any known layout: Lumina's own, its audio models', or diffusers'.

    Raises:
        ValueError: for diffusers weights whose twin query projections differ.
    """
    if any(name.startswith("patch_embedder.") for name in tensors):
        return from_diffusers(tensors)
    out = {}
    for name, tensor in tensors.items():
        for old, new in _AUDIO:
            name = new + name.removeprefix(old) if name.startswith(old) else name
        out[name] = tensor
    return out


def infer_config(tensors: Mapping[str, Tensor], **known: Any) -> FlagDiTConfig:
    """The configuration that tensors under our names have the shapes of.

    ``known``: fields of :class:`FlagDiTConfig` that shapes do not show, above all ``prediction``, ``keep_sigma`` and
    ``fixed_length`` (Large-DiT has Flag-DiT's shapes), ``n_heads`` of label-conditional models (32 unless said), and
    ``patch`` (one frame, 2 x 2, unless the width of a token is no multiple of 4 then: single values).

    Raises:
        ValueError: when the tensors are not those of such a model.
    """
    wanted = (
        "x_embedder.weight",
        "t_embedder.mlp.0.weight",
        "final_layer.linear.weight",
        "layers.0.attention.wq.weight",
    )
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"these are not weights of a Lumina diffusion transformer: no {', '.join(missing)}")
    rows = {name: tensor.shape[0] for name, tensor in tensors.items()}
    dim, values = tensors["x_embedder.weight"].shape
    first = {name.removeprefix("layers.0.") for name in tensors if name.startswith("layers.0.")}
    heads = rows.get("layers.0.attention.gate", LABEL_HEADS)
    heads = known.get("n_heads", heads)
    patch = known.get("patch", (1, 1, 1) if values % 4 else (1, 2, 2))
    parts = rows["layers.0.adaLN_modulation.1.weight"] // dim
    sandwich = "attention_norm1.weight" in first
    width = rows["t_embedder.mlp.0.weight"]
    experts = known["experts"] if "experts" in known else _experts(tensors, first, dim, width)
    post = not sandwich and (parts == 4 or (experts is not None and experts.time > 0 and experts.space > 0))
    # Next-DiT ImageNet has Flag-DiT's names: the height of the modulation alone tells them apart.
    norms: Norms = "sandwich" if sandwich else "post" if post else "pre"
    hidden = next(rows[f"layers.0.{name}"] for name in sorted(first) if name.endswith("w1.weight"))
    has_text, has_labels = "cap_embedder.1.weight" in tensors, "y_embedder.embedding_table.weight" in tensors
    found = FlagDiTConfig(
        dim=dim,
        n_layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers.")),
        n_heads=heads,
        n_kv_heads=rows["layers.0.attention.wk.weight"] * heads // dim,
        ffn_dim=hidden,
        qk_norm="attention.q_norm.weight" in first,
        latent_channels=values // (patch[0] * patch[1] * patch[2]),
        patch=patch,
        learn_sigma=rows["final_layer.linear.weight"] == 2 * values,
        text_dim=tensors["cap_embedder.1.weight"].shape[1] if has_text else None,
        num_classes=rows["y_embedder.embedding_table.weight"] - 1 if has_labels else None,
        adaln_dim=width,
        norms=norms,
        final_shift=rows["final_layer.adaLN_modulation.1.weight"] == 2 * dim,
        eol_token="eol_token" in tensors,
        eof_token="eof_token" in tensors,
        pad_token="pad_token" in tensors,
        rope_axes=1 if norms == "pre" else 2,
        experts=experts,
    )
    return replace(found, **known)


def _experts(tensors: Mapping[str, Tensor], first: set[str], dim: int, width: int) -> Experts | None:
    """The experts of a block. Gates are as wide as what they look at: the time (``width``) or a token (``dim``)."""

    def count(name: str) -> int:
        return len([key for key in first if re.fullmatch(rf"{name}\.experts\.\d+\.w1\.weight", key)])

    one = count("feed_forward")
    if not one:
        time, space = count("feed_forward_time"), count("feed_forward_space")
        return Experts(time=time, space=space) if time or space else None
    if dim == width:
        raise ValueError(f"gates of width {dim} may look at the time or at tokens: say which with `experts`")
    by_time = tensors["layers.0.feed_forward.gate.weight"].shape[1] == width
    return Experts(time=one) if by_time else Experts(space=one)


def check(model: FlagDiT, tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of ``tensors`` with those of a model (which may be on ``meta``).

    Raises:
        ValueError: listing everything that is missing, left over or of another shape.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in wanted]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name in wanted and shape != wanted[name]:
            problems.append(f"{name} is of shape {shape}, not {wanted[name]}")
    if problems:
        raise ValueError(f"the weights do not fit the model ({len(problems)} keys):\n  " + "\n  ".join(problems))


def from_tensors(
    tensors: Mapping[str, Tensor], config: FlagDiTConfig | None = None, dtype: torch.dtype | None = None, **known: Any
) -> FlagDiT:
    """A model that holds these tensors (any layout), built without initialising; ``config`` None infers it.

    Raises:
        ValueError: for everything that does not fit.
    """
    state = published(tensors)
    with torch.device("meta"):
        model = FlagDiT(infer_config(state, **known) if config is None else config)
    check(model, state)
    model.load_state_dict({name: t if dtype is None else t.to(dtype) for name, t in state.items()}, assign=True)
    return model.requires_grad_(True)


def load(
    path: str | Path, dtype: torch.dtype | None = None, config: FlagDiTConfig | None = None, **known: Any
) -> FlagDiT:
    """A model of a ``.safetensors`` file, or of a folder with one (ours, Lumina's or diffusers').

    ``config`` None takes that of the folder, or what the shapes say.

    Raises:
        ValueError: for several files or none, a tensor-parallel shard, pickles, or weights that do not fit.
    """
    from safetensors.torch import load_file

    file = _single(Path(path))
    stated = file.parent / CONFIG
    if config is None and file.name == WEIGHTS and stated.is_file():
        tree = json.loads(stated.read_text(encoding="utf-8")).get("denoiser")
        config = None if tree is None else build(tree | known, FlagDiTConfig, str(stated))
    return from_tensors(load_file(file), config, dtype, **({} if config else known))


def save(model: FlagDiT, folder: str | Path) -> None:
    """Write our own folder: ``model.safetensors`` and ``config.json``."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS)
    text = json.dumps({"format": "accessory", "denoiser": plain(model.config)}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def convert_pickle(source: str | Path, target: str | Path) -> None:
    """Rewrite a published ``.pth`` file as ``.safetensors``. Nothing but tensors is read from it.

    Raises:
        ValueError: for a file that holds anything else, or a tensor-parallel shard.
    """
    from pickle import UnpicklingError

    from safetensors.torch import save_file

    source = Path(source)
    _refuse_shard(source)
    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{source} holds more than tensors, it is not read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{source} is not a table of tensors")
    # Clones, because tensors of a pickle may share memory, which the format forbids.
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, target)


def _single(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no .safetensors file; rewrite pickles with convert_pickle first")
        _refuse_shard(path)
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{path} must hold one .safetensors file; it holds {names}. Name the file itself")
    _refuse_shard(found[0])
    return found[0]


def _refuse_shard(path: Path) -> None:
    shard = re.search(r"\.\d+-of-0*(\d+)\.", path.name)
    if shard and shard[1] != "1":
        raise ValueError(
            f"{path.name} is one of {shard[1]} tensor-parallel shards: their query norms are of each shard alone, "
            "so they cannot be merged into one model"
        )


# --- diffusers --------------------------------------------------------------------------------------------------------


def _names(name: str) -> tuple[str, ...]:
    """diffusers' names of one of our keys; none when it has no place there."""
    if name in _TOP:
        return _TOP[name]
    layer = re.fullmatch(r"(layers\.\d+\.)(.+?)(\.weight|\.bias)?", name)
    if layer:
        start, inner, leaf = layer[1], layer[2], layer[3] or ""
        return tuple(f"{start}{other}{leaf}" for other in _LAYER.get(inner, ()))
    inner, _, leaf = name.rpartition(".")
    return tuple(f"{other}.{leaf}" for other in _TOP.get(inner, ()))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of diffusers' ``LuminaNextDiT2DModel`` from ours.

    Raises:
        ValueError: for keys that it has no place for; only Next-DiT T2I fits.
    """
    homeless = [name for name in state if not _names(name)]
    if homeless:
        raise ValueError(
            f"diffusers has no place for {len(homeless)} keys; only Next-DiT T2I fits: {', '.join(homeless)}"
        )
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        # Twins are copies, because a file cannot hold one tensor under two names.
        out |= {other: tensor.clone() if i else tensor for i, other in enumerate(_names(name))}
    return out


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of diffusers' ``LuminaNextDiT2DModel``.

    Raises:
        ValueError: for unknown or missing keys, or when the query projections that diffusers stores twice differ.
    """
    layers = 1 + max((int(n.split(".")[1]) for n in tensors if re.match(r"layers\.\d+\.", n)), default=-1)
    leaves = ("", ".weight", ".bias")
    ours = [f"{name}{leaf}" for name in _TOP for leaf in leaves]
    ours += [f"layers.{i}.{name}{leaf}" for i in range(layers) for name in _LAYER for leaf in leaves]
    state, used, problems = {}, set(), []
    for name in ours:
        present = [other for other in _names(name) if other in tensors]
        if not present:
            continue
        used.update(present)
        state[name] = tensors[present[0]]
        if len(present) != len(_names(name)):
            problems.append(f"only one of {' and '.join(_names(name))} is there")
        elif any(not torch.equal(tensors[other], state[name]) for other in present[1:]):
            problems.append(f"{' and '.join(present)} differ; this model has one projection for both")
    problems += [f"unknown key {name}" for name in tensors if name not in used]
    if problems:
        raise ValueError("diffusers weights do not fit:\n  " + "\n  ".join(problems))
    return state


def diffusers_arguments(config: FlagDiTConfig) -> dict[str, Any]:
    """Arguments that build diffusers' ``LuminaNextDiT2DModel`` for the same weights.

    Raises:
        ValueError: when no such model computes the same.
    """
    wanted = {
        "norms": "sandwich", "rope_axes": 2, "final_shift": False, "qk_norm": True, "eol_token": False,
        "eof_token": False, "pad_token": True, "num_classes": None, "experts": None, "fixed_length": None,
        "rope_linear": 1.0, "rope_ntk": 1.0, "time_steps": None,
    }  # fmt: skip
    other = [f"{name} {getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if config.patch[0] != 1 or config.patch[1] != config.patch[2]:
        other.append(f"patch {config.patch}")
    if config.adaln_width != min(config.dim, 1024):
        other.append(f"adaln_dim {config.adaln_dim}")
    if config.text_dim is None:
        other.append("text_dim None")
    if other:
        raise ValueError(f"diffusers' LuminaNextDiT2DModel has no {', '.join(other)}")
    return {
        "patch_size": config.patch[1],
        "in_channels": config.latent_channels,
        "hidden_size": config.dim,
        "num_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_kv_heads": config.kv_heads,
        "multiple_of": config.multiple_of,
        "ffn_dim_multiplier": config.ffn_dim_multiplier,
        "norm_eps": config.norm_eps,
        "learn_sigma": config.learn_sigma,
        "qk_norm": config.qk_norm,
        "cross_attention_dim": config.text_dim,
    }
