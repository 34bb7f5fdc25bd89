"""GGUF files: read with the ``gguf`` package, dequantised here with whole-tensor operations.

Block layouts are those of ggml: 32 values share a half-precision scale ``d`` (and an offset ``m`` in the ``_1`` types);
4-bit values 0..15 of a block are the low nibbles of its 16 bytes, values 16..31 the high nibbles.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.backbone.keys import check_keys, expected_shapes, write_config
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.store import MARKER, atomic_folder, write_tensors
from accessory.nn.rope import RopeScaling, frequencies

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def _half(blocks: Tensor, start: int) -> Tensor:
    """The half-precision number at byte ``start`` of every block (N, bytes), as fp32 (N, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(N, 16) bytes -> (N, 32) values 0..15, low halves first."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).float() - 8) * _half(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).float() * _half(b, 0) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    # the fifth bits of the 32 values stand in 4 bytes, least significant first
    bits = (b[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).flatten(1)
    return ((_nibbles(b[:, 6:]) | bits << 4).float() - 16) * _half(b, 0)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


BLOCKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q8_0": (34, _q8_0),
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(raw: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of ``raw`` bytes (rows, bytes a row), of ggml type ``kind``, as (rows, columns); arithmetic is in fp32.

    Raises:
        ValueError: for a type that is not supported.
    """
    if kind in PLAIN:
        return raw.view(PLAIN[kind]).to(dtype)
    if kind not in BLOCKS:
        raise ValueError(f"GGUF type {kind} is not supported; supported: {', '.join([*BLOCKS, *PLAIN])}")
    size, decode = BLOCKS[kind]
    out = torch.empty(raw.shape[0], raw.shape[1] // size * 32, dtype=dtype)
    # Slices of rows keep the fp32 intermediates in the processor's cache and the peak memory small.
    step = max(1, (1 << 20) // max(raw.shape[1], 1))
    for start in range(0, raw.shape[0], step):
        part = raw[start : start + step]
        out[start : start + step] = decode(part.reshape(-1, size)).view(part.shape[0], -1).to(dtype)
    return out


def load_gguf(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Config and weights of a GGUF file of the ``llama`` architecture (LLaMA, Mistral, TinyLlama, SmolLM2 ...).

    The file's q/k rows are in interleaved rotary order already, which is ours. Names are ours (Meta's).

    Raises:
        ValueError: for a torn file, another architecture, an unsupported quantisation, and for missing, unexpected or
            mis-shaped tensors.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable GGUF file (truncated?): {error}") from None
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config = _config(reader, shapes, Path(path))
    kinds = sorted({t.tensor_type.name for t in reader.tensors} - {*BLOCKS, *PLAIN})
    if kinds:
        raise ValueError(f"{path} uses {', '.join(kinds)}; supported: {', '.join([*BLOCKS, *PLAIN])}")
    tensors: dict[str, Tensor] = {}
    for t in reader.tensors:
        raw = torch.frombuffer(bytearray(t.data.tobytes()), dtype=torch.uint8)
        if t.name == "rope_freqs.weight":
            factors = dequantize(raw[None], t.tensor_type.name)[0]
            config = dataclasses.replace(config, rope_scaling=_llama3_scaling(factors, config, Path(path)))
            continue
        rows = shapes[t.name][0] if len(shapes[t.name]) > 1 else 1
        tensors[_name(t.name)] = dequantize(raw.view(rows, -1), t.tensor_type.name, dtype).view(shapes[t.name])
    check_keys(expected_shapes(config), tensors, str(path))
    return config, tensors


def _name(name: str) -> str:
    """Our name of a tensor, or its own where we know none (it is then reported as unexpected)."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, inner = stem.split(".", 2)
        return f"layers.{layer}.{NAMES[inner]}.{suffix}" if inner in NAMES else name
    return f"{NAMES[stem]}.{suffix}" if stem in NAMES else name


def _config(reader: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> LlamaConfig:
    def field(key: str, default: Any = None) -> Any:
        entry = reader.get_field(key)
        if entry is None and default is None:
            raise ValueError(f"{path} has no metadata {key!r}")
        return default if entry is None else entry.contents()

    arch = field("general.architecture")
    if arch != "llama":
        raise ValueError(f"{path} holds architecture {arch!r}; supported: 'llama'")
    if field("llama.expert_count", 0):
        raise ValueError(f"{path} holds a mixture of experts (llama.expert_count); only dense models are supported")
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path} has no tensor token_embd.weight")
    dim, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    head_dim = field("llama.attention.key_length", dim // heads)
    rotary = field("llama.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ValueError(f"{path} rotates {rotary} of {head_dim} head dimensions; partial rotary is not supported")
    scaling = None
    kind = field("llama.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        length = field("llama.rope.scaling.original_context_length", 0) or field("llama.context_length")
        scaling = RopeScaling(kind, field("llama.rope.scaling.factor"), original_length=length)
    elif kind != "none":
        raise ValueError(f"{path} has rotary scaling {kind!r}; supported: none, linear, yarn")
    return LlamaConfig(
        dim=dim,
        n_layers=field("llama.block_count"),
        n_heads=heads,
        n_kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=None if head_dim * heads == dim else head_dim,
        vocab_size=shapes["token_embd.weight"][0],
        ffn_dim=field("llama.feed_forward_length"),
        # stored in fp32: 1e-5 reads as 9.999999747e-06
        norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        max_length=field("llama.context_length"),
        rope_theta=float(field("llama.rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        tie_embeddings="output.weight" not in shapes,
        window=field("llama.attention.sliding_window", 0) or None,
    )


def _llama3_scaling(factors: Tensor, config: LlamaConfig, path: Path) -> RopeScaling:
    """The scaling behind a table of frequency divisors (A/2): LLaMA 3.1 files carry only the table."""
    scaling = RopeScaling("llama3", float(factors.max()), original_length=8192)
    plain, _ = frequencies(config.head_width, config.rope_theta, None)
    scaled, _ = frequencies(config.head_width, config.rope_theta, scaling)
    if factors.shape != plain.shape or not torch.allclose(plain / scaled, factors, rtol=1e-3):
        raise ValueError(f"{path}: rope_freqs.weight is not the table of LLaMA 3.1's scaling (1, 4, 8192)")
    return scaling


def cached_gguf(path: Path, cache_dir: Path) -> Path:
    """A folder in our layout (bf16) with the weights of a GGUF file, converted on first use.

    It is ``cache_dir/<stem>-<fingerprint>``; it appears under that name only when complete, so a killed conversion
    leaves nothing that could be taken for weights. ``load_backbone`` reads it.
    """
    path = Path(path)
    final = Path(cache_dir) / f"{path.stem}-{_fingerprint(path)}"
    if (final / MARKER).is_file():
        return final
    config, tensors = load_gguf(path, torch.bfloat16)
    with atomic_folder(final, keep_existing=True) as private:
        write_tensors(private, tensors)
        write_config(private, config)
        (private / MARKER).write_text(f"{path.name}\n", encoding="utf-8")
    return final


def _fingerprint(path: Path) -> str:
    """12 hex digits over size, first and last 4 MiB: the header names everything, and 40 GB need not be read."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size, chunk = path.stat().st_size, 4 << 20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(chunk))
        file.seek(max(0, size - chunk))
        digest.update(file.read())
    return digest.hexdigest()[:12]


def single_file(path: Path) -> Path:
    """``path`` itself, or the one ``.gguf`` file of a folder.

    Raises:
        ValueError: when the folder holds none or several.
    """
    path = Path(path)
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{path} holds {len(files)} .gguf files, name one: {', '.join(f.name for f in files)}")
    return files[0]


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that ``path`` is or holds, None where there is none; ValueError when it holds several."""
    if path.suffix == ".gguf" or not path.is_dir():
        return path if path.suffix == ".gguf" else None
    folders = sorted({file.parent for file in path.glob("**/*.gguf")})
    if len(folders) > 1:
        raise ValueError(
            f"{path} holds .gguf files in {len(folders)} folders, name one: {', '.join(map(str, folders))}"
        )
    return single_file(folders[0]) if folders else None
