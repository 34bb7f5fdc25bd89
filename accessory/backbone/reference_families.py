"""LLaMA2-Accessory's InternLM and Falcon in this project's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from accessory.backbone.hf import interleave
from accessory.backbone.llama import LlamaConfig
from accessory.nn.rope import RopeScaling

TYPES = ("internlm", "falcon")

# The reference's parameter names, inside of a block and outside, and ours. InternLM's w2 is the up and w3 the down
# projection.
_TOP = {
    "internlm": {"embedding": "tok_embeddings", "norm": "norm", "head": "output"},
    "falcon": {"word_embeddings": "tok_embeddings", "ln_f": "norm", "output": "output"},
}
_INNER = {
    "internlm": {
        "mixer.out_proj": "attention.wo",
        "mlp.w1": "feed_forward.w1",
        "mlp.w2": "feed_forward.w3",
        "mlp.w3": "feed_forward.w2",
        "norm1": "attention_norm",
        "norm2": "ffn_norm",
    },
    "falcon": {
        "self_attention.wq": "attention.wq",
        "self_attention.wk": "attention.wk",
        "self_attention.wv": "attention.wv",
        "self_attention.dense": "attention.wo",
        "mlp.dense_h_to_4h": "feed_forward.w1",
        "mlp.dense_4h_to_h": "feed_forward.w2",
        "ln_attn": "attention_norm",
        "ln_mlp": "ffn_norm",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
}
_PACKED = "mixer.Wqkv"
# Arguments read below, and those that say nothing about the function of an evaluated model.
_READ = {
    "internlm": {"mlp_ratio", "multiple_of", "norm_type", "layer_norm_epsilon"},
    "falcon": {"bias", "multi_query", "new_decoder_architecture", "parallel_attn", "layer_norm_epsilon"},
}
_COMMON = {
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "max_seq_len",
    "rope_theta",
    "rope_scaling",
}
_NEUTRAL = {
    "internlm": {"max_batch_size", "norm_eps", "drop_rate", "use_scaled_init", "use_swiglu"},
    "falcon": {"max_batch_size", "num_kv_heads", "attention_dropout", "hidden_dropout", "initializer_range"},
}
_DEFAULTS = {
    "internlm": {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
    "falcon": {"num_layers": 80, "hidden_size": 14848, "num_attention_heads": 232},
}


def read(
    state: Mapping[str, Tensor], args: Mapping[str, Any], kind: str
) -> tuple[LlamaConfig, tuple[()], dict[str, Tensor]]:
    """As :func:`accessory.backbone.reference.from_reference`; these types have no tuning."""
    own = {k.removeprefix("llma."): v for k, v in state.items()}
    config = _internlm(own, args) if kind == "internlm" else _falcon(own, args)
    return config, (), _rename(own, kind, config)


def held_whole(kind: str, args: Mapping[str, Any]) -> tuple[str, ...]:
    """Layers that the reference does not cut in tensor parallelism, though their names say otherwise."""
    return ("wk", "wv") if kind == "falcon" and args.get("multi_query", True) else ()


def _common(state: Mapping[str, Tensor], args: Mapping[str, Any], kind: str, table: str) -> dict[str, Any]:
    unknown = sorted(set(args) - _COMMON - _READ[kind] - _NEUTRAL[kind])
    if unknown:
        raise ValueError(f"{kind} config has arguments that are not understood: {', '.join(unknown)}")
    args = _DEFAULTS[kind] | dict(args)
    vocab = args.get("vocab_size", -1)
    if vocab < 0:
        if table not in state:
            raise ValueError(f"the config states no vocab_size and the weights have no {table}")
        vocab = state[table].shape[0]
    scaling = args.get("rope_scaling")
    return {
        "dim": args["hidden_size"],
        "n_layers": args["num_layers"],
        "n_heads": args["num_attention_heads"],
        "vocab_size": vocab,
        "max_length": args.get("max_seq_len", 2048),
        "rope_theta": float(args.get("rope_theta", 1e4)),
        # The reference multiplies the position, we divide the frequency.
        "rope_scaling": None if scaling is None else RopeScaling("linear", 1.0 / scaling),
        "norm_eps": args.get("layer_norm_epsilon", 1e-5),
    }


def _internlm(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> LlamaConfig:
    if not args.get("use_swiglu", True):
        raise ValueError("internlm config: use_swiglu=False is a layer that the reference never had")
    fields = _common(state, args, "internlm", "embedding.weight")
    multiple = args.get("multiple_of", 256)
    hidden = int(fields["dim"] * args.get("mlp_ratio", 8 / 3))
    return LlamaConfig(
        **fields,
        ffn_dim=multiple * -(-hidden // multiple),
        qkv_bias=True,
        out_bias=True,
        norm="rms" if args.get("norm_type", "rmsnorm") == "rmsnorm" else "layer",
    )


def _falcon(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> LlamaConfig:
    """The key/value heads are those of the weights: the reference makes one (or as many as query heads) and never
    reads ``num_kv_heads``, which is why it cannot load the 40B and 180B weights that its own converter wrote."""
    fields = _common(state, args, "falcon", "word_embeddings.weight")
    width = fields["dim"] // fields["n_heads"]
    stated = 1 if args.get("multi_query", True) else fields["n_heads"]
    keys = state.get("layers.0.self_attention.wk.weight")
    two_norms = args.get("new_decoder_architecture", True)
    parallel = two_norms or args.get("parallel_attn", True)
    bias = bool(args.get("bias", False))
    return LlamaConfig(
        **fields,
        n_kv_heads=stated if keys is None else keys.shape[0] // width,
        ffn_dim=4 * fields["dim"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm="layer",
        gated=False,
        activation="gelu",
        order="parallel" if two_norms else "parallel_one_norm" if parallel else "sequential",
    )


def _rename(state: Mapping[str, Tensor], kind: str, config: LlamaConfig) -> dict[str, Tensor]:
    """Our names, and neighbouring rotary pairs instead of halves.

    Raises:
        ValueError: listing every key that has no place.
    """
    out: dict[str, Tensor] = {}
    unmapped = []
    for key, tensor in state.items():
        stem, _, suffix = key.rpartition(".")
        block = re.fullmatch(r"(layers\.\d+)\.(.+)", stem)
        if suffix not in ("weight", "bias"):
            unmapped.append(key)
        elif block is None and stem in _TOP[kind]:
            out[f"{_TOP[kind][stem]}.{suffix}"] = tensor
        elif block is not None and block[2] in _INNER[kind]:
            out[f"{block[1]}.{_INNER[kind][block[2]]}.{suffix}"] = tensor
        elif block is not None and kind == "internlm" and block[2] == _PACKED:
            for name, part in zip(("wq", "wk", "wv"), tensor.chunk(3), strict=True):
                out[f"{block[1]}.attention.{name}.{suffix}"] = part
        else:
            unmapped.append(key)
    if unmapped:
        raise ValueError(f"{len(unmapped)} keys have no place in a {kind} model: {', '.join(sorted(unmapped))}")
    return {k: interleave(v, config.head_width) if ".wq." in k or ".wk." in k else v for k, v in out.items()}
