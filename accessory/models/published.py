"""Every ``llama_type`` of LLaMA2-Accessory as a value: what it reads with, what it sees with, and what it trains; and
the releases of LLaMA-Adapter, which came before it and are single files beside LLaMA's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ENCODERS = ("clip", "openclip_convnext_xxl", "dinov2_vitg14", "qformer")
"""Prefixes of encoders in published files; members of our mixtures are named after them."""


@dataclass(frozen=True)
class Adapter:
    """What a release of LLaMA-Adapter holds, and how it differs from LLaMA2-Accessory's ``llama_adapter``.

    ``layers`` blocks, the topmost, have a prefix of ``length`` tokens; all blocks of the file have a gate. ``tokens``
    and ``gate`` are their names there. ``raw``: gates go without tanh. ``wrapped``: names of the language model begin
    with ``llama.``. ``tuned``: biases, norms and LoRA may be among them, LoRA with one more gate a block if
    ``new_gate``. ``scaled``: a chat model without a prefix, where every linear has a bias and a scale of its input.
    ``blocks``: width and number of the visual blocks over
    ``features``; ``bind``: width and number of those of ImageBind-LLM's network over a vector.
    """

    layers: int = 30
    length: int = 10
    tokens: str = "adapter_query"
    gate: str = "gate"
    raw: bool = False
    wrapped: bool = True
    tuned: bool = True
    new_gate: bool = False
    scaled: bool = False
    features: int = 768
    blocks: tuple[int, int] | None = None
    bind: tuple[int, int] | None = None


@dataclass(frozen=True)
class LlamaType:
    """A published model type.

    ``text`` is the language model's own type; ``tower`` a vision preset, None for a type that only reads;
    ``encoders`` the prefixes of its encoders in a file. ``image_size``: the side of a picture in pixels; ``positions``:
    what it takes in the sequence. ``before_bos``: pictures precede BOS, otherwise they follow it. ``start_end``:
    learned vectors stand around every view. ``declared`` is what the published code subtracts from its budget for a
    picture where that is another number. ``size``: the name of the size that silent
    arguments mean; ``defaults``: arguments whose default differs from that of the language model's own type.
    ``adapter``: of a release of LLaMA-Adapter.
    """

    text: str = "llama"
    tower: str | None = None
    encoders: tuple[str, ...] = ()
    image_size: int = 224
    positions: int = 0
    before_bos: bool = False
    start_end: bool = False
    declared: int | None = None
    size: str = "llama2-7b"
    defaults: tuple[tuple[str, Any], ...] = ()
    released: tuple[str, ...] = ()
    adapter: Adapter | None = None


def _clip(text: str, size: str = "llama2-7b") -> LlamaType:
    return LlamaType(text, "clip-l-projected", ("clip",), 224, 257, before_bos=True, size=size)


def _sphinx(
    tower: str, side: int, positions: int, text: str = "llama", size: str = "llama2-13b", **more: Any
) -> LlamaType:
    return LlamaType(text, tower, ENCODERS, side, positions, start_end=True, size=size, **more)


def _light(tower: str, side: int, positions: int, *released: str) -> LlamaType:
    pair = ("openclip_convnext_xxl", "dinov2_vitg14")
    return LlamaType("llama", tower, pair, side, positions, start_end=True, size="tinyllama-1.1b", released=released)


LLAMA_TYPES: dict[str, LlamaType] = {
    "llama": _clip("llama"),
    "llama_peft": _clip("llama_peft"),
    # pictures enter through the prefix of the attention layers and take no position
    "llama_adapter": LlamaType("llama_adapter", "clip-l-projected", ("clip",)),
    # both declare the 32 queries and insert the marks around them too
    "llama_qformerv2": LlamaType(
        "llama", "blip2", ("qformer",), 224, 34, start_end=True, declared=32, released=("alpacaLlava_llamaQformerv2",)
    ),
    "llama_qformerv2_peft": LlamaType(
        "llama_peft", "blip2", ("qformer",), 224, 34, start_end=True, declared=32, size="llama2-13b",
        released=("alpacaLlava_llamaQformerv2Peft_13b",),
    ),
    "llama_ens": _sphinx("sphinx", 224, 291, released=("SPHINX",)),
    "llama_ens_peft": _sphinx(
        "sphinx", 224, 291, "llama_ens_peft", "llama2-7b", declared=289, defaults=(("bias_tuning", False),)
    ),
    "llama_ens5": _sphinx("sphinx-1k", 448, 1455, released=("SPHINX-1k", "SPHINX-v2-1k")),
    "llama_ens5p2": _sphinx("sphinx-1k-pooled", 448, 687),
    "llama_ens10": _sphinx("sphinx-2k", 672, 2910),
    "llama_ens_light": _light("sphinx-light", 512, 259, "SPHINX-Tiny"),
    "llama_ens5_light": _light("sphinx-light-1k", 1024, 1295, "SPHINX-Tiny-1k"),
    "mixtral": _clip("mixtral", "mixtral-8x7b"),
    "mixtral_peft": _clip("mixtral_peft", "mixtral-8x7b"),
    "mixtral_sparse": _clip("mixtral_sparse", "mixtral-8x7b"),
    "mixtral_sparse_ens": _sphinx("sphinx-moe", 512, 291, "mixtral_sparse", "mixtral-8x7b", released=("SPHINX-MoE",)),
    "mixtral_sparse_ens5": _sphinx(
        "sphinx-moe-1k", 1024, 1455, "mixtral_sparse", "mixtral-8x7b", defaults=(("load_balancing_weight", 0.01),),
        released=("SPHINX-MoE-1k",),
    ),
    "falcon": LlamaType("falcon"),
    "internlm": LlamaType("internlm"),
}  # fmt: skip
"""By the name that a checkpoint's ``meta.json`` holds. Every one is the same model with other slots filled."""

_LIGHT_1K = replace(LLAMA_TYPES["llama_ens5_light"], tower="sphinx-plus", image_size=448, released=())
SPHINX_X: dict[str, LlamaType] = {
    "SPHINX-Intern2": replace(_LIGHT_1K, size="internlm2-7b"),
    "SPHINX-Plus": replace(_LIGHT_1K, size="llama2-13b"),
    "SPHINX-Plus-2K": replace(_LIGHT_1K, size="llama2-13b", tower="sphinx-plus-2k", image_size=672, positions=2590),
}
"""Of SPHINX-X (Liu et al. 2024), without published code or weights: sizes as its paper says, and joined to the language
model as the light types are."""


def _release(adapter: Adapter, *files: str, size: str = "llama-7b", tower: str | None = None) -> LlamaType:
    text = "llama_peft" if adapter.scaled else "llama_adapter"
    encoders = () if tower is None else ("clip",)
    return LlamaType(text, tower, encoders, size=size, released=files, adapter=adapter)


_V1 = Adapter(raw=True, wrapped=False, tuned=False)
RELEASES: dict[str, LlamaType] = {
    # Their training code puts the gate through tanh, the code that runs these two files does not: --prefix-gate.
    "adapter_v1": _release(_V1, "llama_adapter_len10_layer30_release"),
    "adapter_v1_caption": _release(
        replace(_V1, tokens="cap_adapter_query", gate="cap_gate", blocks=(512, 2)),
        "llama_adapter_len10_layer30_caption_vit_l", tower="clip-l-projected",
    ),
    "adapter_v2": _release(
        Adapter(31, new_gate=True, blocks=(768, 8)), "BIAS-7B", "LORA-BIAS-7B", "LORA-BIAS-7B-v21", "CAPTION-7B",
        tower="clip-l-projected",
    ),
    "adapter_v2_chat65b": _release(Adapter(0, 0, wrapped=False, tuned=False, scaled=True), "chat65b", size="llama-65b"),
    "imagebind_llm": _release(
        Adapter(32, 1, "prefix_query", features=1024, bind=(16384, 3)), "7B", "7B-pretrained",
        tower="clip-h-projected",
    ),
}  # fmt: skip
"""LLaMA-Adapter's own files, by names of ours."""


def find_type(kind: str) -> LlamaType:
    """The type or release called ``kind``; ValueError lists those that exist."""
    every = LLAMA_TYPES | RELEASES
    if kind not in every:
        raise ValueError(f"llama_type {kind!r} is not one of {', '.join(every)}")
    return every[kind]


_TUNED = ("llama_peft", "llama_adapter", "llama_ens_peft", "mixtral_peft")


def trains(kind: str, args: Mapping[str, Any], seeing: bool = True) -> tuple[str, ...]:
    """Patterns of our names (``attach.TrainSpec``) that a type trains under its arguments; encoders never do.

    ``seeing``: whether the model has its vision part. Two rules of the published code are not followed, both of which
    leave a projection at its random start: its PEFT types train of the projections the biases and norms alone, or
    nothing; ours train them, with the vectors around a view.
    """
    text, args = find_type(kind).text, {**dict(find_type(kind).defaults), **args}
    mode = args.get("trainable_mode") or ("sg" if text == "llama_adapter" else "mm_stage2")
    if text == "llama_adapter":
        return _adapter(args, mode, seeing)
    if mode == "mm_stage1" and seeing:
        return ("projector.*",)
    if text not in _TUNED:
        return ("backbone.*", *(("projector.*",) if seeing else ()))
    return (*_added(args, text), *(("projector.*",) if seeing else ()))


def _added(args: Mapping[str, Any], text: str) -> tuple[str, ...]:
    """What stands beside or in the frozen language model."""
    bias = args.get("bias_tuning", True)
    norm = args.get("norm_tuning", text != "mixtral_peft")
    low_rank = args.get("lora_rank", -1) > 0
    chosen = {"backbone.*.bias": bias, "backbone.*norm.weight": norm, "backbone.*.delta.*": low_rank}
    return tuple(pattern for pattern, wanted in chosen.items() if wanted)


def _adapter(args: Mapping[str, Any], mode: str, seeing: bool) -> tuple[str, ...]:
    added = _added(args, "llama_adapter")
    if mode == "mm_stage2":
        return added
    prefixes = ("backbone.*.prefix.*", *added)
    if mode == "sg":
        return prefixes
    if mode == "mm_stage1":
        return (*prefixes, *(("resampler.*",) if seeing else ()))
    raise ValueError(f"trainable_mode {mode!r} is not one of sg, mm_stage1, mm_stage2")
