"""Quantised backbones on disk, and quantising while reading: a tensor at a time, never all full weights at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accessory.backbone import hf, meta, store
from accessory.backbone.keys import build_meta, check_keys, config_from_dict, expected_shapes, write_config
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.reference_folders import llama_type
from accessory.backbone.sizes import from_hf_config
from accessory.nn.quantized import Int8, Quantized, QuantizedTable
from accessory.nn.unread import Cut, Later, Reader, note, read_as
from accessory.peft.quantize import Quantization, fill, found, quantized, restored, stamp, targets

TABLE = "tok_embeddings"


@dataclass(frozen=True)
class Source:
    """Tensors to be read one by one, and what they are: ``stored`` is how they are quantised already."""

    config: LlamaConfig
    readers: Mapping[str, Reader]
    stored: Quantization | None = None


def stored_quantization(folder: Path) -> Quantization | None:
    """How the weights of a folder of our layout are quantised; None for full weights and any other layout.

    Raises:
        ValueError: for an entry that names no quantisation.
    """
    path = Path(folder) / "config.json"
    stated = store.read_json(path).get("quantization") if path.is_file() else None
    if stated is None or store.read_json(path).get("format") != "accessory":
        return None  # Hugging Face's entry of a similar name is refused where its config is read
    try:
        return Quantization(**stated)
    except TypeError as error:
        raise ValueError(f"{path}: quantization {stated!r} is wrong: {error}") from None


def shapes(config: LlamaConfig, spec: Quantization) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that a quantised checkpoint of ``config`` must hold."""
    return {name: shape for name, (shape, _) in layout(config, spec).items()}


def layout(config: LlamaConfig, spec: Quantization | None) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Name, shape and dtype (None: the model's) of everything that a checkpoint of ``config`` holds."""
    kept = {name: set(fields) for name, fields in _kernels(build_meta(config), spec).items()} if spec else {}
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, shape in expected_shapes(config).items():
        stem = name.removesuffix(".weight")
        if spec is None or stem not in kept or stem == name:
            found[name] = (shape, None)
        else:
            fields = Int8.fields(*shape) if stem == TABLE else spec.layout(*shape)
            found |= {f"{stem}.kernel.{field}": value for field, value in fields.items()}
    return found


def _kernels(model: Llama, spec: Quantization) -> dict[str, tuple[str, ...]]:
    """Names of the layers that ``spec`` quantises, and of the buffers of each."""
    names = {name: tuple(spec.layout(2, spec.group)) for name, _ in targets(model)}
    return names | {TABLE: tuple(Int8.fields(1, 1))} if spec.embeddings else names


def open_folder(folder: Path, layout: str) -> Source | None:
    """A folder of safetensors in our layout, Hugging Face's or plain LLaMA's shards; None where its tensors cannot be
    read one by one.

    Raises:
        ValueError: for torn files, and missing, unexpected or mis-shaped keys.
    """
    if any(folder.glob("consolidated.*")):
        shards = meta.open_shards(folder) if llama_type(folder) in (None, "llama") else None
        return None if shards is None else Source(*shards)
    if layout not in ("accessory", "hf") or not any(folder.glob("model*.safetensors")):
        return None
    stated = store.read_json(folder / "config.json")
    there = store.entries(folder)
    empty = {k: torch.empty(e.shape, device="meta") for k, e in there.items()}
    if layout == "accessory":
        stored = stored_quantization(folder)
        config = config_from_dict(stated["backbone"])
        check_keys(expected_shapes(config) if stored is None else shapes(config, stored), empty, str(folder))
        return Source(config, {k: e.read for k, e in there.items()}, stored)
    config = from_hf_config(stated)
    if config.tie_embeddings and "lm_head.weight" in there:
        return None  # the whole reader compares the two tables
    if not {hf.hf_name(k) for k in expected_shapes(config)} <= set(there):
        return None  # other names or fused rows (Falcon, InternLM2), or a key is missing: the whole reader tells which
    ours = hf.from_hf(config, empty, str(folder))
    return Source(config, {k: _hf_reader(config, k, there[hf.hf_name(k)]) for k in ours})


def _hf_reader(config: LlamaConfig, name: str, entry: store.Entry) -> Reader:
    def read(cut: Cut | None = None) -> Tensor:
        return hf.reordered(config, name, entry.read(cut))  # it moves rows within heads, and no cut parts a head

    return read


def load(source: Source, spec: Quantization, dtype: torch.dtype | None, device: torch.device | str) -> Llama:
    """A quantised model in eval mode; at no time are more than one layer's full weights in memory.

    Raises:
        ValueError: when the folder is quantised in another way, or ``spec`` does not fit the sizes.
    """
    dtype, model = _dtype(source, spec, dtype), build_meta(source.config)
    linears = dict(targets(model))
    for name in _kernels(model, spec):
        module: Any = model.tok_embeddings if name == TABLE else linears[name]
        _place(model, name, module, _kernel(source, spec, name, tuple(module.weight.shape), dtype, device))
    for name, parameter in list(model.named_parameters()):
        assert parameter.is_meta, name
        owner, _, leaf = name.rpartition(".")
        value = _read(source, name, dtype, device)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    stamp(model, spec)
    return model.eval()


def unread(source: Source, spec: Quantization | None, dtype: torch.dtype | None) -> Llama:
    """As :func:`load`, or plain without ``spec``, but nothing is read: see :mod:`accessory.nn.unread`.

    A quantised table is the exception, as no layout cuts it.

    Raises:
        ValueError: as :func:`load`; what does not fit sizes is found when a layer is read.
    """
    dtype, model = _dtype(source, spec, dtype), build_meta(source.config).to(dtype)
    linears = dict(targets(model))
    for name in () if spec is None else _kernels(model, spec):
        assert spec is not None
        module: Any = model.tok_embeddings if name == TABLE else linears[name]
        shape = (module.weight.shape[0], module.weight.shape[1])
        make = partial(_kernel, source, spec, name, shape, dtype, "cpu")
        group = 1 if spec.kind == "int8" else spec.group
        _place(model, name, module, make() if name == TABLE else Later(make, shape, dtype, group))
    note(model, {name: read_as(source.readers[name], dtype) for name, _ in model.named_parameters()})
    stamp(model, spec)
    return model.eval()


def _dtype(source: Source, spec: Quantization | None, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype``, or that of the table; ValueError when the weights are quantised in another way than ``spec``."""
    if source.stored not in (None, spec):
        raise ValueError(f"the weights are quantised as {source.stored}, not as {spec}")
    if dtype is not None:
        return dtype
    return source.readers["norm.weight" if f"{TABLE}.weight" not in source.readers else f"{TABLE}.weight"]().dtype


def _kernel(
    source: Source,
    spec: Quantization,
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Quantized:
    """The kernel of one layer, read or made of its full weight."""
    if source.stored is not None:
        own = spec if name != TABLE else Quantization("int8")
        state = {field: _read(source, f"{name}.kernel.{field}", None, device) for field in own.layout(*shape)}
        return restored(own, state, shape, dtype)
    weight = _read(source, f"{name}.weight", dtype, device)
    return Int8.of(weight) if name == TABLE else _quantized(name, spec, weight)


def _quantized(name: str, spec: Quantization, weight: Tensor) -> Quantized:
    try:
        return quantized(spec, weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _place(model: Llama, name: str, module: nn.Module, kernel: Quantized) -> None:
    if name == TABLE:
        assert isinstance(kernel, Int8)
        model.tok_embeddings = QuantizedTable(kernel)
    else:
        fill(module, kernel)  # type: ignore[arg-type]


def _read(source: Source, name: str, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """A tensor in memory of its own: what is mapped would keep its file's pages."""
    tensor = source.readers[name]()
    moved = tensor.to(device=device, dtype=dtype)
    return moved.clone() if moved is tensor else moved


def save_quantized(model: Llama, folder: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a quantised backbone in our layout, atomically; :func:`accessory.backbone.weights.load_backbone` reads it.

    Raises:
        ValueError: when the model is not quantised, carries what was attached, or the folder is not empty.
    """
    spec = found(model)
    if spec is None:
        raise ValueError("the model is not quantised: save_accessory writes full weights")
    state = model.state_dict()
    check_keys(shapes(model.config, spec), state, "the model to save")
    with store.atomic_folder(folder) as private:
        store.write_tensors(private, state, max_shard_bytes)
        write_config(private, model.config, quantization=spec.as_dict())
