"""Tensor-parallel checkpoints: Meta's ``consolidated.NN.pth``, LLaMA2-Accessory's ``consolidated.NN-of-MM.model.pth``
(or ``model-diff.pth``, a difference) and the same shards as safetensors, merged key by key."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from accessory.backbone import store
from accessory.backbone.hf import load_pickle
from accessory.backbone.keys import check_keys, config_from_dict, expected_shapes, write_config
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES, find_size
from accessory.nn.rope import RopeScaling
from accessory.nn.unread import Cut, Reader, held
from accessory.parallel.axes import merge_shards, shard_rule, split_shards

PATTERN = re.compile(
    r"consolidated\.(?P<rank>\d+)(?:-of-(?P<of>\d+)\.model(?P<diff>-diff)?)?\.(?P<kind>pth|safetensors)"
)
# of LLaMA2-Accessory's and Meta's arguments: those that say nothing about the function
IDLE = {
    "max_batch_size",
    "vocab_size",
    "max_seq_len",
    "load_pretrained_visual_encoder",
    "trainable_mode",
    "lora_rank",
    "bias_tuning",
    "norm_tuning",
}


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder in rank order.

    Raises:
        ValueError: when there are none, a number is missing, or file names of several checkpoints are mixed.
    """
    folder = Path(folder)
    found = {p: m for p in sorted(folder.iterdir()) if (m := PATTERN.fullmatch(p.name))}
    if not found:
        raise ValueError(f"{folder} holds no consolidated shards")
    styles = {(m["of"], m["kind"], m["diff"]) for m in found.values()}
    if len(styles) > 1:
        names = ", ".join(p.name for p in list(found)[:20])
        raise ValueError(f"{folder} mixes shards of several checkpoints or formats: {names}; keep one")
    of = next(iter(styles))[0]
    by_rank = {int(m["rank"]): p for p, m in found.items()}
    count = int(of) if of is not None else max(by_rank) + 1
    missing = sorted(set(range(count)) - set(by_rank))
    extra = sorted(set(by_rank) - set(range(count)))
    if missing or extra or len(by_rank) != len(found):
        example = next(iter(found)).name
        raise ValueError(
            f"{folder} needs shards 0 to {count - 1} ({example}): "
            f"missing {', '.join(map(str, missing)) or 'none'}, beyond {', '.join(map(str, extra)) or 'none'}"
        )
    return [by_rank[i] for i in range(count)]


def read_shard(path: Path, *, pickles: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, those under ``model`` where it has that, and in that case what stands beside them.

    Raises:
        ValueError: as ``load_pickle``, and for entries among the tensors that are none.
    """
    whole: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        whole |= store.read_file(path)
    else:
        whole |= load_pickle(path, allowed=pickles)
    inner = whole.get("model")
    state = inner if isinstance(inner, dict) else whole
    if odd := [k for k, v in state.items() if not isinstance(v, Tensor)]:
        raise ValueError(f"{path} holds entries that are not tensors: {', '.join(map(str, odd[:20]))}")
    return state, {} if state is whole else {k: v for k, v in whole.items() if k != "model"}


def merge_folder(folder: Path, *, pickles: bool = False, whole: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a folder of shards, whole, without the prefix ``llma.`` and rotary tables.

    ``whole``: layers that every rank holds whole, see :func:`accessory.parallel.axes.shard_rule`.

    Raises:
        ValueError: as :func:`shard_files`, ``merge_shards`` and ``load_pickle``.
    """
    shards = []
    for path in shard_files(folder):
        state, _ = read_shard(path, pickles=pickles)
        shards.append(_own_names(state))
    return merge_shards(shards, str(folder), whole)


def _own_names(shard: Mapping[str, Any]) -> dict[str, Any]:
    names = {k: k.removeprefix("llma.") for k in shard}
    return {n: shard[k] for k, n in names.items() if n != "rope.freqs" and not n.endswith("freqs_cis")}


def open_shards(folder: Path) -> tuple[LlamaConfig, dict[str, Reader]] | None:
    """Config and tensors, to be read one by one, of a folder of safetensors shards of plain LLaMA; None for any other.

    On as many tensor-parallel ranks as there are shards each reads a shard of its own.

    Raises:
        ValueError: as :func:`read_meta`.
    """
    if any(p.suffix != ".safetensors" or p.stem.endswith("-diff") for p in shard_files(folder)):
        return None
    shards = [_own_names(store.file_entries(p)) for p in shard_files(folder)]
    rules = {name: shard_rule(name) for shard in shards for name in shard}
    if any(isinstance(rule, str) for rule in rules.values()) or any(shard.keys() != rules.keys() for shard in shards):
        return None
    with torch.device("meta"):
        sizes = {n: [torch.empty(s[n].shape) for s in shards] for n in rules}
    axes = {n: cast("int | None", rule) for n, rule in rules.items()}
    empty = {n: parts[0] if (axis := axes[n]) is None else torch.cat(parts, axis) for n, parts in sizes.items()}
    stated = store.read_json(folder / ("params.json" if (folder / "params.json").is_file() else "config.json"))
    if stated.get("format") == "accessory":
        config = config_from_dict(stated["backbone"])
    else:
        config = from_meta_params(stated, empty["tok_embeddings.weight"].shape[0], tied="output.weight" not in empty)
    check_keys(expected_shapes(config), empty, str(folder))
    return config, {name: _joined([s[name] for s in shards], axis) for name, axis in axes.items()}


def _joined(parts: Sequence[store.Entry], axis: int | None) -> Reader:
    def read(cut: Cut | None = None) -> Tensor:
        if axis is not None and cut is not None and (cut[0], cut[2]) == (axis, len(parts)):
            return parts[cut[1]].read()
        found = [part.read() for part in parts]
        if axis is not None:
            return held(torch.cat(found, axis))(cut)
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(f"{parts[0].name} differs between the shards of {parts[0].path.parent}")
        return held(found[0])(cut)

    return read


def read_meta(folder: Path, *, pickles: bool = False) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Config and weights of Meta's or LLaMA2-Accessory's folder (``params.json`` or ``config.json`` beside shards).

    Raises:
        ValueError: for missing shards, refused pickles, unknown arguments, and keys that do not fit.
    """
    folder = Path(folder)
    names = [n for n in ("params.json", "config.json") if (folder / n).is_file()]
    if not names:
        raise ValueError(f"{folder} has neither params.json (Meta) nor config.json (LLaMA2-Accessory)")
    params = store.read_json(folder / names[0])
    if shard_files(folder)[0].stem.endswith("-diff"):
        raise ValueError(f"{folder} holds a difference; convert the folder that it belongs to with --overlay {folder}")
    tensors = merge_folder(folder, pickles=pickles)
    table = tensors.get("tok_embeddings.weight")
    if table is None or table.ndim != 2:
        raise ValueError(f"{folder} holds no tok_embeddings.weight")
    config = from_meta_params(params, table.shape[0], tied="output.weight" not in tensors)
    check_keys(expected_shapes(config), tensors, str(folder))
    return config, tensors


def from_meta_params(params: Mapping[str, Any], vocab_size: int, tied: bool = False) -> LlamaConfig:
    """Our config from Meta's or LLaMA2-Accessory's arguments; their vocabulary size is often -1, the table's counts.

    Raises:
        ValueError: for missing or unknown arguments.
    """
    plain = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"}
    known = plain | IDLE | {"rope_scaling", "use_scaled_rope", "rope_scaling_factor"}
    unknown = sorted(k for k, v in params.items() if k not in known and v not in (None, False))
    if unknown:
        raise ValueError("arguments not supported: " + ", ".join(f"{k}={params[k]!r}" for k in unknown))
    missing = sorted({"dim", "n_layers", "n_heads"} - set(params))
    if missing:
        raise ValueError(f"the arguments miss {', '.join(missing)}")
    values = {k: v for k, v in params.items() if k in plain and v is not None}
    length = params.get("max_seq_len") or LlamaConfig.max_length
    config = LlamaConfig(**values, vocab_size=vocab_size, tie_embeddings=tied, max_length=length)
    if params.get("rope_scaling") is not None:
        # theirs multiplies the position
        return replace(config, rope_scaling=RopeScaling("linear", 1 / float(params["rope_scaling"])))
    return replace(config, rope_scaling=_scaled(params, config)) if params.get("use_scaled_rope") else config


def _scaled(params: Mapping[str, Any], config: LlamaConfig) -> RopeScaling:
    """LLaMA 3.1 and later: the file says only *that* the table is scaled, the factor belongs to the published size."""
    if params.get("rope_scaling_factor") is not None:
        return RopeScaling("llama3", float(params["rope_scaling_factor"]))
    scaled = {name: row for name, row in SIZES.items() if row.rope_scaling is not None}
    name = find_size(config, scaled)
    if name is None:
        raise ValueError("use_scaled_rope is set, but not rope_scaling_factor, and no published size has these shapes")
    return cast(RopeScaling, scaled[name].rope_scaling)


def save_shards(config: LlamaConfig, tensors: Mapping[str, Tensor], folder: Path, count: int) -> None:
    """Write our layout as ``count`` tensor-parallel shards ``consolidated.NN-of-MM.model.safetensors``, atomically.

    Raises:
        ValueError: when ``count`` does not divide the heads or a sharded dimension, or ``folder`` is not empty.
    """
    if count < 1 or config.n_heads % count or config.kv_heads % count:
        raise ValueError(
            f"tensor-parallel {count} must divide the heads of the model: {config.n_heads} and {config.kv_heads}"
        )
    check_keys(expected_shapes(config), tensors, "the model to save")
    with store.atomic_folder(folder) as private:
        for rank, shard in enumerate(split_shards(tensors, count)):
            store.write_file(shard, private / f"consolidated.{rank:02d}-of-{count:02d}.model.safetensors")
        write_config(private, config)
