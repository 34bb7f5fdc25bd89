"""Which axis of which parameter tensor parallelism cuts, and shards cut and joined by it.

The rules are those of fairscale's layers (column-parallel: output rows, and with them the bias; row-parallel: input
columns; embedding: its width) and of LLaMA2-Accessory's additions to them. They are stated once, for this project's
names and for the names that its reference wrote into files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Rule = int | Literal["expert", "interleaved"] | None
"""An axis; None: every rank holds all of it; ``expert``: whole, on the one rank that owns the expert; ``interleaved``:
rows of all experts in one matrix (E * H, D), where every rank holds its share of the rows of each expert."""

COLUMN = ("wq", "wk", "wv", "w1", "w3", "output", "Wqkv", "head", "dense_h_to_4h")
ROW = ("wo", "w2", "out_proj", "dense", "dense_4h_to_h")
EMBEDDING = ("tok_embeddings", "word_embeddings", "embedding")
# What hangs on a column-parallel and on a row-parallel layer.
SUFFIXES: dict[str, tuple[Rule, Rule]] = {
    "weight": (0, 1),
    "bias": (0, None),
    "scale": (0, None),
    "input_scale": (None, 0),  # of LLaMA-Adapter's chat65b
    "delta.a.weight": (None, 1),
    "delta.b.weight": (0, None),
    "lora_a.weight": (None, 1),
    "lora_b.weight": (0, None),
}
GATES: dict[str, Rule] = {"prefix.gate": 0, "prefix_gate": 1}  # one number per query head

_NAME = re.compile(
    r"(?:llma\.|backbone\.)?(?:layers\.\d+\.(?:attention|feed_forward|self_attention|mixer|mlp)\.)?"
    r"(?P<expert>experts\.(?P<number>\d+)\.)?(?P<rest>.+)"
)


def shard_rule(name: str, whole: Collection[str] = (), experts: Literal["owned", "cut"] = "owned") -> Rule:
    """How tensor parallelism cuts a parameter. ``whole``: layers that are not cut here (Falcon's one key head).

    ``experts``: in files an expert is owned by one rank; ``cut`` like any other layer, as in training, every rank has
    the same work whatever the router chooses.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    rest = match["rest"]
    if match["expert"] and experts == "owned":
        return "expert"
    if rest in GATES:
        return GATES[rest]
    if rest in ("w1", "w2", "w3"):
        return "interleaved"
    layer, _, suffix = rest.partition(".")
    if layer in EMBEDDING:
        return 1
    if layer in whole or suffix not in SUFFIXES or layer not in (*COLUMN, *ROW):
        return None
    return SUFFIXES[suffix][layer in ROW]


def merge_shards(
    shards: Sequence[Mapping[str, Tensor]], where: str = "the shards", whole: Collection[str] = ()
) -> dict[str, Tensor]:
    """Whole tensors from one dictionary a rank; ``whole`` as in :func:`shard_rule`.

    Raises:
        ValueError: listing keys that some ranks lack, that do not join, or whose copies on the ranks differ.
    """
    names = list(dict.fromkeys(k for s in shards for k in s))
    wrong: list[str] = []
    merged: dict[str, Tensor] = {}
    for name in names:
        parts = [s[name] for s in shards if name in s]
        rule = shard_rule(name, whole)
        if len(parts) < len(shards) and (rule != "expert" or len(parts) > 1):
            wrong.append(f"{name} (in {len(parts)} of {len(shards)} shards)")
        elif len(parts) == 1:
            merged[name] = parts[0]
        elif rule is None or rule == "expert":
            if any(not torch.equal(p, parts[0]) for p in parts[1:]):
                wrong.append(f"{name} (differs between shards, but is not sharded)")
            merged[name] = parts[0]
        elif rule == "interleaved":
            experts = [_experts(name, s, p) for s, p in zip(shards, parts, strict=True)]
            if len(set(experts)) > 1 or len({p.shape for p in parts}) > 1:
                wrong.append(f"{name} (shapes {[tuple(p.shape) for p in parts]} do not join)")
            else:
                merged[name] = torch.cat([p.unflatten(0, (experts[0], -1)) for p in parts], 1).flatten(0, 1)
        elif len({(p.ndim, *p.shape[:rule], *p.shape[rule + 1 :]) for p in parts}) > 1 or parts[0].ndim <= rule:
            wrong.append(f"{name} (shapes {[tuple(p.shape) for p in parts]} do not join)")
        else:
            merged[name] = torch.cat(parts, rule)
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} tensor(s) cannot be merged: {', '.join(wrong[:20])}")
    return merged


def split_shards(tensors: Mapping[str, Tensor], count: int, whole: Collection[str] = ()) -> list[dict[str, Tensor]]:
    """The inverse of :func:`merge_shards`: one dictionary a rank; unsharded tensors are repeated.

    Raises:
        ValueError: listing tensors whose sharded dimension (or number of experts) ``count`` does not divide.
    """
    if count < 1:
        raise ValueError(f"tensor-parallel {count} is no number of ranks")
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    owners = _owners(tensors, count)
    wrong: list[str] = []
    for name, tensor in tensors.items():
        rule = shard_rule(name, whole)
        if rule == "expert":
            owner = owners[name]
            if owner is None:
                wrong.append(f"the experts of {name}")
            else:
                shards[owner][name] = tensor
            continue
        experts = _experts(name, tensors, tensor) if rule == "interleaved" else 1
        if rule is not None and tensor.shape[0 if rule == "interleaved" else rule] // experts % count:
            wrong.append(f"{name} {tuple(tensor.shape)}")
            continue
        if rule is None:
            parts: Sequence[Tensor] = [tensor] * count
        elif rule == "interleaved":
            parts = [p.flatten(0, 1) for p in tensor.unflatten(0, (experts, -1)).chunk(count, 1)]
        else:
            parts = tensor.chunk(count, rule)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    if wrong:
        raise ValueError(f"tensor-parallel {count} does not divide {', '.join(wrong[:20])}")
    return shards


def _experts(name: str, state: Mapping[str, Tensor], tensor: Tensor) -> int:
    """Number of experts whose rows are in one matrix: the router beside it has one row for each."""
    gate = state.get(name.rpartition(".")[0] + ".gate.weight")
    if gate is None or not gate.shape[0] or tensor.shape[0] % gate.shape[0]:
        shape = None if gate is None else tuple(gate.shape)
        raise ValueError(f"{name} {tuple(tensor.shape)} holds the rows of all experts, but its router has {shape}")
    return gate.shape[0]


def _owners(tensors: Mapping[str, Tensor], count: int) -> dict[str, int | None]:
    """The rank of every expert's parameters: consecutive experts share a rank. None where that does not work out."""
    numbers: dict[str, int] = {}
    totals: dict[str, int] = {}
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match is not None and match["expert"]:
            numbers[name] = int(match["number"])
            layer = name[: match.start("expert")]
            totals[layer] = max(totals.get(layer, 0), numbers[name] + 1)
    out: dict[str, int | None] = {}
    for name, number in numbers.items():
        total = totals[name.partition("experts.")[0]]
        out[name] = None if total % count else number // (total // count)
    return out
