"""Hugging Face's Mixtral, InternLM, InternLM2 and Falcon in the terms of its LLaMA: options, names, fused rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.backbone.llama import LlamaConfig
from accessory.nn.moe import MoEConfig

MODEL_TYPES = ("mixtral", "internlm", "internlm2", "falcon")
Options = dict[str, Any]

_IDLE = {  # options that say nothing about the function that an evaluated model computes
    "mixtral": ("output_router_logits",),
    "internlm": ("auto_map",),
    "internlm2": ("auto_map", "attn_implementation"),
    "falcon": ("auto_map", "hidden_dropout"),
}


def as_llama(config: Mapping[str, Any]) -> tuple[Options, Options]:
    """A Hugging Face config in the spelling of its LLaMA, and the fields of :class:`LlamaConfig` beside it.

    InternLM's "dynamic" rotary scaling is the plain table up to ``max_position_embeddings``, which is as far as the
    model was trained, and that is how it is read; beyond, its base would change with the length of each sequence.

    Raises:
        ValueError: for options that have no equivalent here.
    """
    kind, out = config.get("model_type"), dict(config)
    for name in _IDLE.get(str(kind), ()):
        out.pop(name, None)
    if kind == "falcon":
        return _falcon(out)
    if kind == "mixtral":
        if out.pop("router_jitter_noise", 0.0):
            raise ValueError("router_jitter_noise above 0 is not supported")
        experts, top = out.pop("num_local_experts", 8), out.pop("num_experts_per_tok", 2)
        # Its loss is summed over the top experts where ours is their mean.
        return out, {"moe": MoEConfig(experts, top, balance=top * out.pop("router_aux_loss_coef", 0.001))}
    if kind in ("internlm", "internlm2"):
        bias = bool(out.pop("bias", True))
        rotary = out.pop("rotary", None) or {}
        if rotary.get("base"):
            out["rope_theta"] = rotary["base"]
        scaling = out.get("rope_scaling") or {}
        if "dynamic" in (scaling.get("type"), scaling.get("rope_type")):
            out["rope_scaling"] = None
        return out, {"qkv_bias": bias, "out_bias": bias}
    if kind == "llama":
        bias = bool(out.pop("attention_bias", False))
        return out, {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(out.pop("mlp_bias", False))}
    return out, {}


def _falcon(options: Options) -> tuple[Options, Options]:
    for name in ("alibi", "apply_residual_connection_post_layernorm"):
        if options.pop(name, False):
            raise ValueError(f"falcon with {name} is not supported")
    new, parallel = options.pop("new_decoder_architecture", False), options.pop("parallel_attn", True)
    multi, heads = options.pop("multi_query", True), options["num_attention_heads"]
    norms = options.pop("num_ln_in_parallel_attn", None) or (2 if new else 1)
    if new and not parallel:
        raise ValueError("falcon with new_decoder_architecture is parallel; parallel_attn is false")
    bias = bool(options.pop("bias", False))
    stated = options.pop("num_kv_heads", None) or heads
    options |= {
        "num_key_value_heads": stated if new else 1 if multi else heads,
        "intermediate_size": options.pop("ffn_hidden_size", None) or 4 * options["hidden_size"],
        "rms_norm_eps": options.pop("layer_norm_epsilon", 1e-5),
        "hidden_act": options.pop("activation", "gelu"),
    }
    options.setdefault("tie_word_embeddings", True)
    order = "sequential" if not parallel else "parallel" if new and norms == 2 else "parallel_one_norm"
    return options, {
        "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias, "norm": "layer", "gated": False, "order": order
    }  # fmt: skip


def from_llama(kind: str, config: LlamaConfig, options: Options) -> Options:
    """The inverse of :func:`as_llama`: options of a LLaMA's config in the spelling of ``kind``."""
    out = dict(options)
    if kind == "llama" and config.qkv_bias:
        out["attention_bias"] = True
    if kind == "llama" and config.mlp_bias:
        out["mlp_bias"] = True
    if kind == "mixtral" and config.moe is not None:
        out |= {
            "num_local_experts": config.moe.experts,
            "num_experts_per_tok": config.moe.top,
            "router_aux_loss_coef": config.moe.balance / config.moe.top,
            "sliding_window": config.window,
        }
    if kind == "falcon":
        heads, keys = config.n_heads, config.kv_heads
        new = config.order == "parallel" or (config.order != "sequential" and keys not in (1, heads))
        for name in ("num_key_value_heads", "rms_norm_eps", "hidden_act", "head_dim"):
            out.pop(name)
        out |= {
            "new_decoder_architecture": new,
            "parallel_attn": config.order != "sequential",
            "multi_query": keys == 1 or new,
            "num_kv_heads": keys,
            "num_ln_in_parallel_attn": 2 if config.order == "parallel" else 1,
            "ffn_hidden_size": out.pop("intermediate_size"),
            "layer_norm_epsilon": config.norm_eps,
            "activation": "gelu",
            "alibi": False,
            "bias": config.qkv_bias,
        }
    return out


_FALCON = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "ln_attn": "input_layernorm",
    "input_layernorm": "input_layernorm",
    "ln_mlp": "post_attention_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
META_INNER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Meta's names inside a block, which InternLM2 has kept and we have, to LLaMA's; its fused rows are not among them."""
_TOPS = {
    "transformer.word_embeddings": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
}
_FUSED = ("self_attention.query_key_value", "attention.wqkv")
_QKV = ("q_proj", "k_proj", "v_proj")


def plain_names(config: LlamaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Falcon's and InternLM2's parameters under the names of LLaMA, queries, keys and values apart; others pass.

    Raises:
        ValueError: for fused rows of another number than the heads of ``config`` need.
    """
    if not {"transformer.word_embeddings.weight", "model.tok_embeddings.weight"} & set(tensors):
        return dict(tensors)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        block = re.fullmatch(r"(?:transformer\.h|model\.layers)\.(\d+)\.(.+)", stem)
        if block is not None and block[2] in _FUSED:
            for part, rows in zip(_QKV, _unfuse(config, name, tensor), strict=True):
                out[f"model.layers.{block[1]}.self_attn.{part}.{suffix}"] = rows
        elif block is not None:
            inner = (_FALCON | META_INNER).get(block[2], block[2])
            out[f"model.layers.{block[1]}.{inner}.{suffix}"] = tensor
        else:
            out[f"{_TOPS.get(stem, stem)}.{suffix}"] = tensor
    return out


def _unfuse(config: LlamaConfig, name: str, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fused rows: for every key/value head its query heads, its key and its value."""
    groups, width = config.kv_heads, config.head_width
    share = config.n_heads // groups
    if tensor.shape[0] != groups * (share + 2) * width:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows, {config.n_heads} query heads and {groups} key and value heads "
            f"of width {width} need {groups * (share + 2) * width}"
        )
    split = tensor.unflatten(0, (groups, share + 2, width))
    q, k, v = split[:, :-2], split[:, -2], split[:, -1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def falcon_names(config: LlamaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`plain_names` for Falcon."""
    one, two = ("ln_attn", "ln_mlp") if config.order == "parallel" else ("input_layernorm", "post_attention_layernorm")
    inner = {v: k for k, v in _FALCON.items()} | {"input_layernorm": one, "post_attention_layernorm": two}
    tops = {v: k for k, v in _TOPS.items() if k.startswith("transformer.")}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if block is None:
            out[f"{tops.get(stem, stem)}.{suffix}"] = tensor
        elif block[2].rpartition(".")[2] not in _QKV:
            out[f"transformer.h.{block[1]}.{inner[block[2]]}.{suffix}"] = tensor
        elif block[2].endswith("q_proj"):
            parts = [tensors[name.replace("q_proj", part)] for part in _QKV]
            heads = [p.unflatten(0, (config.kv_heads, -1, config.head_width)) for p in parts]
            fused = torch.cat(heads, 1).flatten(0, 2)
            out[f"transformer.h.{block[1]}.self_attention.query_key_value.{suffix}"] = fused
    return out
