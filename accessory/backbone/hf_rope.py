"""Rotary options of Hugging Face's ``config.json``, in both spellings, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accessory.nn.rope import RopeScaling

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


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
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


def write_rope(theta: float, scaling: RopeScaling | None, head_width: int) -> dict[str, Any]:
    """The inverse of :func:`read_rope`, in both spellings: transformers 4 and 5 read the same numbers.

    Static NTK becomes the raised base that it is.
    """
    if scaling is not None and scaling.kind == "ntk":
        theta, scaling = theta * scaling.factor ** (head_width / (head_width - 2)), None
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        given = {hf: getattr(scaling, ours) for hf, ours in ROPE_OPTIONS[scaling.kind].items()}
        # transformers insists on floats for all but the length
        floats = {k: v if k.startswith("original") else float(v) for k, v in given.items() if v is not None}
        rope = {"rope_type": scaling.kind, **floats}
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
    }
