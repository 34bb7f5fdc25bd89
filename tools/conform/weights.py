"""What is done to checkpoints: conversion to Hugging Face's layout, differences taken and added."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.hf import to_hf
from accessory.backbone.meta import from_meta_params
from accessory.backbone.mix import difference
from accessory.backbone.reference_folders import overlay
from accessory.backbone.sizes import to_hf_config
from accessory.backbone.weights import from_tensors
from accessory.parallel.axes import merge_shards, split_shards
from tools.conform.comparison import Comparison, Handler

FACTOR = "rope_scaling is written as Hugging Face reads it (the reference writes its inverse)"
LENGTH = "max_position_embeddings is the model's (the reference always writes 2048)"
TABLE = "rotary tables are computed and never stored (the reference carries rope.freqs along)"


def converted(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Two shards joined and renamed, a difference added, and the logits of the result."""
    whole, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    joined = merge_shards(split_shards(whole, 2))
    llama = from_meta_params(config["args"], whole["tok_embeddings.weight"].shape[0])
    model = from_tensors(llama, joined)
    with torch.no_grad():
        h = model(model.embed(io.pop("in.tokens")))
        c.tensor("reference_logits", model.logits(h), io.pop("out.reference_logits"))
    renamed(to_hf(llama, joined), "out.base.", io, c)
    delta = {n.removeprefix("in.diff."): io.pop(n) for n in list(io) if n.startswith("in.diff.")}
    plain = {n.removeprefix("llma."): v for n, v in delta.items()}
    renamed(to_hf(llama, overlay(joined, plain, difference=True)), "out.base_plus_diff.", io, c, whole=False)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")
    stated = json.loads((folder / "convert.json").read_text())["config_json_with_rope_scaling_0.5"]
    scaled = from_meta_params({**config["args"], "rope_scaling": 0.5}, llama.vocab_size)
    hf_config(to_hf_config(scaled), stated, config["args"]["max_seq_len"], c)


def renamed(ours: dict[str, Tensor], prefix: str, io: dict[str, Tensor], c: Comparison, whole: bool = True) -> None:
    """Tensors under Hugging Face's names; ``whole``: the record has all of them."""
    theirs = {n.removeprefix(prefix): io.pop(n) for n in list(io) if n.startswith(prefix)}
    if whole:
        c.equal("names", sorted(ours), sorted(theirs))
    for name, value in theirs.items():
        c.tensor(prefix.strip(".").removeprefix("out."), ours[name], value)


def hf_config(ours: dict[str, Any], theirs: dict[str, Any], length: int, c: Comparison) -> None:
    """The configuration that goes with the weights."""
    for key in ("architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
                "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
                "vocab_size"):  # fmt: skip
        c.equal(key, ours[key], theirs[key])
    c.tensor("rope_theta", torch.tensor(float(rope(ours, "rope_theta"))), torch.tensor(float(theirs["rope_theta"])))
    c.deviates("rope factor", rope(ours, "factor"), 1 / theirs["rope_scaling"]["factor"], FACTOR)
    c.deviates("length", ours["max_position_embeddings"], length, LENGTH)


def rope(config: dict[str, Any], key: str) -> Any:
    """A rotary setting, wherever a version of the library keeps it."""
    for place in (config, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        if key in place:
            return place[key]
    return None


def operated(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """A difference taken and added again, shard by shard."""
    io = load_file(folder / "io.safetensors")
    for shard in range(config["shards"]):
        parts: dict[str, dict[str, Tensor]] = {}
        for kind in ("in.base", "in.finetuned", "out.delta", "out.applied"):
            start = f"{kind}{shard}."
            parts[kind] = {n.removeprefix(start): io.pop(n) for n in list(io) if n.startswith(start)}
        base = {f"llma.{n}": v for n, v in parts["in.base"].items() if n != "rope.freqs"}
        delta = difference(parts["in.finetuned"], base)
        compare("delta", delta, parts["out.delta"], c)
        kept = parts["out.applied"].pop("llma.rope.freqs", None)
        stored = {n: v.half() for n, v in delta.items()}
        compare("applied", overlay(base, stored, difference=True), parts["out.applied"], c)
        c.deviates("rotary table", kept is None, False, TABLE)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def compare(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], c: Comparison) -> None:
    """Names and values, ours rounded as the reference stores them."""
    c.equal(f"{name} names", sorted(ours), sorted(theirs))
    for key in sorted(ours.keys() & theirs.keys()):
        c.tensor(name, ours[key].to(theirs[key].dtype), theirs[key])


HANDLERS: dict[str, Handler] = {
    "accessory.tools.convert_weights_to_hf": converted,
    "accessory/tools/weight_operate.py run as a script": operated,
}
"""By the reference class that the case was computed with."""
