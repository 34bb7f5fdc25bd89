"""Published members of the family as values, and the two-way map between our config and Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from accessory.backbone.llama import LlamaConfig
from accessory.nn.feed_forward import Activation
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
}

MODEL_TYPES = ("llama", "mistral", "qwen2", "gemma")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
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
    """Our config from a Hugging Face ``config.json`` of model_type llama, mistral, qwen2 or gemma.

    Raises:
        ValueError: for another model_type, a missing size, and every option that we do not know or cannot compute.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    known = {*READ.split(), *IDLE.split()}
    # transformers writes what it derived: no window in any layer, or one in all
    layer_types = config.get("layer_types") or ()
    if any(t != ("full_attention" if kind == "qwen2" else "sliding_attention") for t in layer_types):
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
    theta, scaling = _from_hf_rope(config)
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
        qkv_bias=kind == "qwen2",
        tie_embeddings=config.get("tie_word_embeddings", gemma),
        window=config.get("sliding_window", 4096) if kind == "mistral" else None,
        embed_scale=math.sqrt(dim) if gemma else None,
        activation=cast(Activation, ACTIVATIONS[act]),
    )


# Hugging Face's option -> ours, for each scaling; anything else in the dictionary is an error.
ROPE_OPTIONS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def _from_hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    options = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(options.pop("rope_theta", None) or config.get("rope_theta") or 1e4)
    older = options.pop("type", None)
    kind = options.pop("rope_type", None) or older or "default"
    if options.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor below 1 is not supported")
    if kind == "dynamic":
        raise ValueError(
            "rope scaling 'dynamic' is not supported: its base changes with the length of each sequence, which no "
            "fixed table and no cache can follow; 'ntk' (a fixed base) is its static form"
        )
    if kind == "default":
        extra, scaling = options, None
    elif kind in ROPE_OPTIONS:
        if options.get("truncate") is True:
            del options["truncate"]  # the default
        extra = {k: v for k, v in options.items() if k not in ROPE_OPTIONS[kind] and v is not None}
        given = {ours: options[hf] for hf, ours in ROPE_OPTIONS[kind].items() if options.get(hf) is not None}
        given.setdefault("original_length", config.get("max_position_embeddings") or 2048)
        if "factor" not in given:
            raise ValueError(f"rope scaling {kind!r} misses its factor")
        scaling = RopeScaling(kind, **given)  # type: ignore[arg-type]
    else:
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: default, {', '.join(ROPE_OPTIONS)}")
    if extra:
        raise ValueError(
            f"rope scaling {kind!r}: options not supported: {', '.join(f'{k}={extra[k]!r}' for k in extra)}"
        )
    return theta, scaling


def model_type(config: LlamaConfig) -> str:
    """Hugging Face's model_type that can express ``config``.

    Raises:
        ValueError: when none can: a mixture of features that no published family has.
    """
    gemma = LlamaConfig(norm_offset=1.0, embed_scale=math.sqrt(config.dim), activation="gelu_tanh")
    plain = LlamaConfig()

    def same(wanted: LlamaConfig) -> bool:
        scale = config.embed_scale == wanted.embed_scale or (
            None not in (config.embed_scale, wanted.embed_scale)
            and math.isclose(cast(float, config.embed_scale), cast(float, wanted.embed_scale), rel_tol=1e-6)
        )
        return scale and (config.norm_offset, config.activation) == (wanted.norm_offset, wanted.activation)

    if same(gemma) and not config.qkv_bias and config.window is None:
        return "gemma"
    if same(plain) and not (config.qkv_bias and config.window is not None):
        return "qwen2" if config.qkv_bias else "llama" if config.window is None else "mistral"
    raise ValueError(
        "no Hugging Face model_type has this mixture: "
        f"norm_offset={config.norm_offset}, embed_scale={config.embed_scale}, activation={config.activation}, "
        f"qkv_bias={config.qkv_bias}, window={config.window}"
    )


def to_hf_config(config: LlamaConfig) -> dict[str, Any]:
    """A Hugging Face ``config.json``, the inverse of :func:`from_hf_config`.

    Both spellings of the rotary options are written, so that transformers 4 and 5 read the same numbers. Static NTK
    becomes the raised base that it is.

    Raises:
        ValueError: as :func:`model_type`.
    """
    kind, theta, scaling = model_type(config), config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.kind == "ntk":
        width = config.head_width
        theta, scaling = theta * scaling.factor ** (width / (width - 2)), None
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        given = {hf: getattr(scaling, ours) for hf, ours in ROPE_OPTIONS[scaling.kind].items()}
        # transformers insists on floats for all but the length
        floats = {k: v if k.startswith("original") else float(v) for k, v in given.items() if v is not None}
        rope = {"rope_type": scaling.kind, **floats}
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gemma": "Gemma"}
    out: dict[str, Any] = {
        "architectures": [f"{classes[kind]}ForCausalLM"],
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
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "gelu_pytorch_tanh" if kind == "gemma" else "silu",
    }
    if kind == "gemma":
        out["hidden_activation"] = "gelu_pytorch_tanh"
    if kind == "mistral":
        out["sliding_window"] = config.window
    return out


def find_size(config: LlamaConfig, rows: Mapping[str, LlamaConfig] = SIZES) -> str | None:
    """The row with the shapes of ``config`` (options aside), or None."""

    def shape(c: LlamaConfig) -> tuple[int, ...]:
        return c.dim, c.n_layers, c.n_heads, c.kv_heads, c.head_width, c.hidden_width, c.vocab_size

    return next((name for name, row in rows.items() if shape(row) == shape(config)), None)
