"""Folders of LLaMA2-Accessory's language models: read with what lies over them, folded, and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.backbone import store
from accessory.backbone.keys import build_meta, check_keys, expected_shapes
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.meta import merge_folder, shard_files
from accessory.backbone.reference import TYPES, dense_to_sparse, from_reference
from accessory.backbone.reference_families import held_whole
from accessory.nn.feed_forward import ffn_width
from accessory.parallel.axes import split_shards
from accessory.peft.attach import PrefixSpec, TuningSpec, attach, merge

META, CONFIG = "meta.json", "config.json"
Language = tuple[LlamaConfig, tuple[TuningSpec, ...], dict[str, Tensor]]


def llama_type(folder: Path) -> str | None:
    """What ``meta.json`` says, None without that file.

    Raises:
        ValueError: when the file says nothing.
    """
    path = Path(folder) / META
    if not path.is_file():
        return None
    kind = store.read_json(path).get("llama_type")
    if not isinstance(kind, str):
        raise ValueError(f"{path} names no llama_type")
    return kind


def overlay(base: Mapping[str, Tensor], top: Mapping[str, Tensor], difference: bool = False) -> dict[str, Tensor]:
    """``base`` with the values of ``top`` in their place, or (``difference``) added to it in fp32.

    A difference of a parameter that ``base`` lacks counts from zero. Adding keeps the dtype of ``base``.

    Raises:
        ValueError: for a difference of another shape than what it is added to.
    """
    out = dict(base) | {k: v for k, v in top.items() if not difference or k not in base}
    for key in [k for k in top if difference and k in base]:
        if base[key].shape != top[key].shape:
            raise ValueError(f"{key} is {tuple(base[key].shape)}, its difference {tuple(top[key].shape)}")
        out[key] = (base[key].float() + top[key].float()).to(base[key].dtype)
    return out


def laid_over(folders: Sequence[Path], *, pickles: bool = False, whole: Collection[str] = ()) -> dict[str, Tensor]:
    """The merged weights of the first folder with the others over it; see ``meta.merge_folder`` for ``whole``.

    Raises:
        ValueError: for a difference in the first place, and as :func:`overlay`.
    """
    state: dict[str, Tensor] = {}
    for i, folder in enumerate(folders):
        difference = shard_files(folder)[0].stem.endswith("-diff")
        if difference and i == 0:
            raise ValueError(f"{folder} holds a difference; the folder that it is added to comes first")
        state = overlay(state, merge_folder(folder, pickles=pickles, whole=whole), difference)
    return state


def read_reference(folders: Sequence[Path], *, pickles: bool = False) -> Language:
    """Config, tuning and strictly checked weights (our names) of the first of ``folders`` with the others laid over it.

    A later folder may hold some parameters (what ``--only_save_trainable`` wrote), all of them, or a difference.
    ``meta.json`` and ``config.json`` are those of the last folder that has them.

    Raises:
        ValueError: for a type that is no language model, a difference in the first place, and keys that do not fit.
    """
    folders = [Path(f) for f in folders]
    kinds = [k for f in folders if (k := llama_type(f)) is not None]
    configs = [f / CONFIG for f in folders if (f / CONFIG).is_file()]
    if not kinds or not configs:
        raise ValueError(f"none of {', '.join(map(str, folders))} has both {META} and {CONFIG}")
    kind, args = kinds[-1], store.read_json(configs[-1])
    if kind not in TYPES:
        raise ValueError(f"llama_type {kind!r} is no language model alone; those are {', '.join(TYPES)}")
    state = laid_over(folders, pickles=pickles, whole=held_whole(kind, args))
    config, specs, tensors = from_reference(state, args, kind)
    check_keys(_shapes(config, specs), tensors, " + ".join(map(str, folders)))
    return config, specs, tensors


def _with_specs(config: LlamaConfig, specs: Sequence[TuningSpec]) -> Llama:
    model = build_meta(config)
    if specs:
        attach(model, specs)
    return model


def _shapes(config: LlamaConfig, specs: Sequence[TuningSpec]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in _with_specs(config, specs).state_dict().items()}


def build_language(language: Language, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Llama:
    """The model with its tuning attached (what the reference trained is trainable), in eval mode.

    ``dtype`` None takes that of the embedding table for all.
    """
    config, specs, tensors = language
    dtype = tensors["tok_embeddings.weight"].dtype if dtype is None else dtype
    model = _with_specs(config, specs)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, strict=True, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    return model.eval()


def fold(language: Language) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The plain model that computes the same: LoRA goes into the weights, added biases become the model's own.

    Every folded layer is compared before and after (:func:`accessory.peft.attach.merge`).

    Raises:
        ValueError: for a prefix, which no plain model has, and where folding would move an output.
    """
    config, specs, tensors = language
    if any(isinstance(spec, PrefixSpec) for spec in specs):
        raise ValueError("the prefix of a llama_adapter cannot be folded into a plain model; attach it instead")
    if not specs:
        return config, dict(tensors)
    model = build_language(language)
    merge(model)
    state = model.state_dict()
    biased = {key.split(".")[-2] for key in state if key.endswith(".bias") and ".w" in key}
    config = replace(
        config,
        qkv_bias=config.qkv_bias or bool(biased & {"wq", "wk", "wv"}),
        out_bias=config.out_bias or "wo" in biased,
        mlp_bias=config.mlp_bias or bool(biased & {"w1", "w2", "w3"}),
    )
    table = state["tok_embeddings.weight"]
    zero = {k: table.new_zeros(shape) for k, shape in expected_shapes(config).items() if k not in state}
    if odd := [k for k in zero if not k.endswith(".bias")]:
        raise ValueError(f"folding lost {', '.join(odd[:20])}")
    return config, {k: v.detach() for k, v in state.items()} | zero


def arguments(config: LlamaConfig) -> dict[str, Any]:
    """The reference's ``config.json`` for a LLaMA or Mixtral; ValueError for options that it does not have."""
    c = config
    plain = LlamaConfig(
        dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size,
        ffn_dim=c.ffn_dim, multiple_of=c.multiple_of, ffn_dim_multiplier=c.ffn_dim_multiplier, norm_eps=c.norm_eps,
        max_length=c.max_length, rope_theta=c.rope_theta, rope_scaling=c.rope_scaling, moe=c.moe,
    )  # fmt: skip
    linear = c.rope_scaling is None or c.rope_scaling.kind == "linear"
    if c != plain or not linear or (c.moe is not None and (not c.moe.renormalise or c.moe.z)):
        raise ValueError(f"the reference's llama and mixtral have no place for an option of {c}")
    out: dict[str, Any] = {
        "dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "max_seq_len": c.max_length,
        "rope_scaling": None if c.rope_scaling is None else 1.0 / c.rope_scaling.factor,
    }  # fmt: skip
    if c.moe is not None:
        moe = {"num_experts": c.moe.experts, "num_experts_per_tok": c.moe.top}
        return out | {"hidden_dim": c.hidden_width, "moe": moe}
    multiple, multiplier = c.multiple_of, c.ffn_dim_multiplier
    if ffn_width(c.dim, multiple, multiplier) != c.hidden_width:
        # The reference knows no width, only its rule: rounding up to a multiple of the width itself gives the width.
        rule = int(8 * c.dim / 3)
        multiple, multiplier = c.hidden_width, None if rule <= c.hidden_width else (c.hidden_width - 0.5) / rule
    return out | {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}


def write_reference(
    config: LlamaConfig, tensors: Mapping[str, Tensor], folder: Path, count: int = 1, sparse: bool = False
) -> str:
    """Write a folder that LLaMA2-Accessory reads, as ``count`` shards, atomically; returns its ``llama_type``.

    ``sparse``: Mixtral's block-sparse layout instead of one matrix an expert.

    Raises:
        ValueError: for options that the reference does not have, sizes that ``count`` does not divide, or a ``folder``
            that is not empty.
    """
    if sparse and (config.moe is None or config.hidden_width % 128):
        raise ValueError(f"the block-sparse layout needs experts of a width in steps of 128, got {config.hidden_width}")
    if count < 1 or config.n_heads % count or config.kv_heads % count:
        raise ValueError(f"tensor-parallel {count} must divide the heads: {config.n_heads} and {config.kv_heads}")
    kind = "llama" if config.moe is None else "mixtral_sparse" if sparse else "mixtral"
    args = arguments(config)
    if config.moe is not None:
        # The dense files apply the weight of the balancing loss twice.
        args["load_balancing_weight"] = config.moe.balance if sparse else config.moe.balance**0.5
    check_keys(expected_shapes(config), tensors, "the model to save")
    state = {f"llma.{k}": v for k, v in (dense_to_sparse(tensors) if sparse else tensors).items()}
    with store.atomic_folder(folder) as private:
        store.write_json(private / CONFIG, args)
        store.write_json(private / META, {"llama_type": kind})
        for rank, shard in enumerate(split_shards(state, count)):
            own = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in shard.items()}
            torch.save({"model": own}, private / f"consolidated.{rank:02d}-of-{count:02d}.model.pth")
    return kind
