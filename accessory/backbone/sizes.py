"""Published members of the family as values, and the two-way map between our config and Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from accessory.backbone import families
from accessory.backbone.hf_rope import read_rope, write_rope
from accessory.backbone.llama import LlamaConfig
from accessory.nn.block import Order
from accessory.nn.feed_forward import Activation
from accessory.nn.moe import MoEConfig
from accessory.nn.rope import RopeScaling


def _size(
    shape: tuple[int, int, int, int, int], vocab: int, length: int, theta: float = 1e4, eps: float = 1e-5, **rest: Any
) -> LlamaConfig:
    """``shape``: dim, layers, heads, key/value heads, feed-forward width."""
    dim, layers, heads, kv_heads, ffn = shape
    return LlamaConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        ffn_dim=ffn,
        vocab_size=vocab,
        max_length=length,
        rope_theta=theta,
        norm_eps=eps,
        **rest,
    )


def _llama3(shape: tuple[int, int, int, int, int], factor: float | None, tied: bool = False) -> LlamaConfig:
    scaling = None if factor is None else RopeScaling("llama3", factor)
    length = 8192 if factor is None else 131072
    return _size(shape, 128256, length, 5e5, rope_scaling=scaling, tie_embeddings=tied)


def _qwen(shape: tuple[int, int, int, int, int], vocab: int = 152064) -> LlamaConfig:
    return _size(shape, vocab, 32768, 1e6, 1e-6, qkv_bias=True, tie_embeddings=vocab == 151936)


def _gemma(shape: tuple[int, int, int, int, int]) -> LlamaConfig:
    return _size(
        shape,
        256000,
        8192,
        eps=1e-6,
        head_dim=None if 256 * shape[2] == shape[0] else 256,
        tie_embeddings=True,
        norm_offset=1.0,
        embed_scale=math.sqrt(shape[0]),
        activation="gelu_tanh",
    )


def _smol(shape: tuple[int, int, int, int, int], theta: float = 1e5) -> LlamaConfig:
    return _size(shape, 49152, 8192, theta, tie_embeddings=True)


def _internlm(shape: tuple[int, int, int, int, int], bias: bool) -> LlamaConfig:
    return _size(shape, 103168, 2048 if bias else 4096, eps=1e-6, qkv_bias=bias, out_bias=bias)


def _internlm2(shape: tuple[int, int, int, int, int]) -> LlamaConfig:
    return _size(shape, 92544, 32768, 1e6)


def _falcon(shape: tuple[int, int, int, int, int], order: Order = "parallel") -> LlamaConfig:
    return _size(
        shape, 65024, 2048, order=order, norm="layer", gated=False, activation="gelu", tie_embeddings=True
    )  # fmt: skip


# As published: a loss summed over the two experts of a token, with weight 0.02.
_MIXTRAL = MoEConfig(experts=8, top=2, balance=0.04)

SIZES: dict[str, LlamaConfig] = {
    "llama-7b": _size((4096, 32, 32, 32, 11008), 32000, 2048, eps=1e-6),
    "llama-13b": _size((5120, 40, 40, 40, 13824), 32000, 2048, eps=1e-6),
    "llama-30b": _size((6656, 60, 52, 52, 17920), 32000, 2048, eps=1e-6),
    "llama-65b": _size((8192, 80, 64, 64, 22016), 32000, 2048),
    "llama2-7b": _size((4096, 32, 32, 32, 11008), 32000, 4096),
    "llama2-13b": _size((5120, 40, 40, 40, 13824), 32000, 4096),
    "llama2-70b": _size((8192, 80, 64, 8, 28672), 32000, 4096),
    "llama3-8b": _llama3((4096, 32, 32, 8, 14336), None),
    "llama3-70b": _llama3((8192, 80, 64, 8, 28672), None),
    "llama3.1-8b": _llama3((4096, 32, 32, 8, 14336), 8),
    "llama3.1-70b": _llama3((8192, 80, 64, 8, 28672), 8),
    "llama3.1-405b": _llama3((16384, 126, 128, 8, 53248), 8),
    "llama3.2-1b": _llama3((2048, 16, 32, 8, 8192), 32, tied=True),
    "llama3.2-3b": _llama3((3072, 28, 24, 8, 8192), 32, tied=True),
    "codellama-7b": _size((4096, 32, 32, 32, 11008), 32016, 16384, 1e6),
    "codellama-13b": _size((5120, 40, 40, 40, 13824), 32016, 16384, 1e6),
    "codellama-34b": _size((8192, 48, 64, 8, 22016), 32000, 16384, 1e6),
    "tinyllama-1.1b": _size((2048, 22, 32, 4, 5632), 32000, 2048),
    "mistral-7b-v0.1": _size((4096, 32, 32, 8, 14336), 32000, 32768, window=4096),
    "mistral-7b-v0.3": _size((4096, 32, 32, 8, 14336), 32768, 32768, 1e6),
    "qwen2.5-0.5b": _qwen((896, 24, 14, 2, 4864), 151936),
    "qwen2.5-1.5b": _qwen((1536, 28, 12, 2, 8960), 151936),
    "qwen2.5-3b": _qwen((2048, 36, 16, 2, 11008), 151936),
    "qwen2.5-7b": _qwen((3584, 28, 28, 4, 18944)),
    "qwen2.5-14b": _qwen((5120, 48, 40, 8, 13824)),
    "qwen2.5-32b": _qwen((5120, 64, 40, 8, 27648)),
    "qwen2.5-72b": _qwen((8192, 80, 64, 8, 29568)),
    "gemma-2b": _gemma((2048, 18, 8, 1, 16384)),
    "gemma-7b": _gemma((3072, 28, 16, 16, 24576)),
    "smollm2-135m": _smol((576, 30, 9, 3, 1536)),
    "smollm2-360m": _smol((960, 32, 15, 5, 2560)),
    "smollm2-1.7b": _smol((2048, 24, 32, 32, 8192), 1.3e5),
    "mixtral-8x7b": _size((4096, 32, 32, 8, 14336), 32000, 32768, 1e6, moe=_MIXTRAL),
    "mixtral-8x22b": _size((6144, 56, 48, 8, 16384), 32000, 65536, 1e6, moe=_MIXTRAL),
    "internlm-7b": _internlm((4096, 32, 32, 32, 11008), bias=True),
    "internlm-20b": _internlm((5120, 60, 40, 40, 13824), bias=False),
    "internlm2-1.8b": _internlm2((2048, 24, 16, 8, 8192)),
    "internlm2-7b": _internlm2((4096, 32, 32, 8, 14336)),
    "internlm2-20b": _internlm2((6144, 48, 48, 8, 16384)),
    "falcon-7b": _falcon((4544, 32, 71, 1, 18176), "parallel_one_norm"),
    "falcon-40b": _falcon((8192, 60, 128, 8, 32768)),
    "falcon-180b": _falcon((14848, 80, 232, 8, 59392)),
}

MODEL_TYPES = ("llama", "mistral", "qwen2", "gemma", *families.MODEL_TYPES)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
WINDOWS = {"mistral": 4096, "mixtral": None}  # by default, for those that have one in all layers
# Read below, one by one.
READ = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters tie_word_embeddings "
    "hidden_act hidden_activation sliding_window use_sliding_window"
)
NEEDED = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
# Say nothing about the function that an evaluated model computes.
IDLE = (
    "architectures torch_dtype dtype use_cache transformers_version bos_token_id eos_token_id pad_token_id "
    "_name_or_path initializer_range pretraining_tp attention_dropout transformers.js_config is_llama_config "
    "max_window_layers unsloth_version unsloth_fixed id2label label2id problem_type chunk_size_feed_forward "
    "output_attentions output_hidden_states return_dict"
)


def from_hf_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Our config from a Hugging Face ``config.json`` of one of ``MODEL_TYPES``.

    Raises:
        ValueError: for another model_type, a missing size, and every option that we do not know or cannot compute.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    config, options = families.as_llama(config)
    known = {*READ.split(), *IDLE.split()}
    # transformers writes what it derived: no window in any layer, or one in all
    layer_types = config.get("layer_types") or ()
    if any(t != ("sliding_attention" if kind == "mistral" else "full_attention") for t in layer_types):
        raise ValueError(f"layer_types {sorted(set(layer_types))} of model_type {kind} is not supported")
    # None and False are switches that are off
    extra = sorted(k for k, v in config.items() if k not in known and k != "layer_types" and v not in (None, False))
    if extra:
        raise ValueError("config options not supported: " + ", ".join(f"{k}={config[k]!r}" for k in extra))
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window=True is not supported (windows in some layers only)")
    missing = [k for k in NEEDED.split() if not config.get(k)]
    if missing:
        raise ValueError(f"config.json misses {', '.join(missing)}")
    act = str(config.get("hidden_activation") or config.get("hidden_act") or "silu")
    gemma = kind == "gemma"
    if gemma and act in ("gelu", "silu"):  # what the first release wrote, and nothing; both mean the tanh form
        act = "gelu_pytorch_tanh"
    if act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {act!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or (256 if gemma else None)
    theta, scaling = read_rope(config)
    return LlamaConfig(
        dim=dim,
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=None if head_dim is None or head_dim * heads == dim else head_dim,
        vocab_size=config["vocab_size"],
        ffn_dim=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        norm_offset=1.0 if gemma else 0.0,
        max_length=config.get("max_position_embeddings") or 2048,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=config.get("tie_word_embeddings", gemma),
        window=config.get("sliding_window", WINDOWS[kind]) if kind in WINDOWS else None,
        embed_scale=math.sqrt(dim) if gemma else None,
        activation=cast(Activation, ACTIVATIONS[act]),
        **{"qkv_bias": kind == "qwen2", **options},
    )


def model_type(config: LlamaConfig) -> str:
    """Hugging Face's model_type that can express ``config``.

    Raises:
        ValueError: when none can: a mixture of features that no published family has.
    """
    c = config
    biases = (c.qkv_bias, c.out_bias, c.mlp_bias)
    form = (c.norm, c.gated, c.order)
    gemma_scale = c.embed_scale is not None and math.isclose(c.embed_scale, math.sqrt(c.dim), rel_tol=1e-6)
    if c.moe is not None:
        if form == _LLAMA_FORM and _plain(c) and not any(biases) and c.moe.renormalise and not c.moe.z:
            return "mixtral"
    elif form == _LLAMA_FORM and (c.norm_offset, c.activation) == (1.0, "gelu_tanh") and gemma_scale:
        if not any(biases) and c.window is None:
            return "gemma"
    elif form == _LLAMA_FORM and _plain(c):
        if biases == (True, False, False) and c.window is None:
            return "qwen2"
        if c.qkv_bias == c.out_bias and (c.window is None or not any(biases)):
            return "llama" if c.window is None else "mistral"
    elif (c.norm, c.gated, c.activation) == ("layer", False, "gelu") and c.embed_scale is None and c.window is None:
        # In turn and with keys of their own, Falcon has as many key heads as query heads.
        grouped = c.order == "sequential" and c.kv_heads not in (1, c.n_heads)
        if len(set(biases)) == 1 and c.head_dim is None and not grouped:
            return "falcon"
    names = ("norm_offset", "embed_scale", "activation", "qkv_bias", "out_bias", "mlp_bias", "window", "norm", "gated")
    stated = ", ".join(f"{name}={getattr(c, name)}" for name in (*names, "order", "moe"))
    raise ValueError(f"no Hugging Face model_type has this mixture: {stated}")


_LLAMA_FORM = ("rms", True, "sequential")


def _plain(c: LlamaConfig) -> bool:
    return (c.norm_offset, c.embed_scale, c.activation) == (0.0, None, "silu")


CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gemma": "Gemma", "mixtral": "Mixtral"}


def to_hf_config(config: LlamaConfig) -> dict[str, Any]:
    """A Hugging Face ``config.json``, the inverse of :func:`from_hf_config`.

    InternLM is written as the LLaMA with biases that it is, InternLM2 as a plain one.

    Raises:
        ValueError: as :func:`model_type`.
    """
    kind = model_type(config)
    out: dict[str, Any] = {
        "architectures": [f"{CLASSES.get(kind, kind.title())}ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        **write_rope(config.rope_theta, config.rope_scaling, config.head_width),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "gelu_pytorch_tanh" if kind == "gemma" else "silu",
    }
    if kind == "gemma":
        out["hidden_activation"] = "gelu_pytorch_tanh"
    if kind == "mistral":
        out["sliding_window"] = config.window
    return families.from_llama(kind, config, out)


def find_size(config: LlamaConfig, rows: Mapping[str, LlamaConfig] = SIZES) -> str | None:
    """The row with the shapes of ``config`` (options aside), or None."""

    def shape(c: LlamaConfig) -> tuple[int, ...]:
        experts = 0 if c.moe is None else c.moe.experts
        return c.dim, c.n_layers, c.n_heads, c.kv_heads, c.head_width, c.hidden_width, c.vocab_size, experts, c.gated

    return next((name for name, row in rows.items() if shape(row) == shape(config)), None)
