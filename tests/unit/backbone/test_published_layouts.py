"""Importers on the full published key lists at full shape, without memory: every tensor finds its place."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory.backbone.hf import from_hf, to_hf
from accessory.backbone.keys import build_meta, expected_shapes
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.reference import dense_to_sparse, from_reference
from accessory.backbone.sizes import SIZES
from accessory.parallel.axes import split_shards


def state(config: LlamaConfig) -> dict[str, Tensor]:
    return dict(build_meta(config).state_dict())


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes in bf16."""
    return 2 * sum(t.numel() for t in tensors.values())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("name", "count", "total"),
    [
        # Number of tensors (without the rotary tables of old files), and bytes in bf16.
        ("llama2-7b", 291, 13_476_831_232),
        ("llama2-13b", 363, 26_031_728_640),
        ("tinyllama-1.1b", 201, 2_200_096_768),
        ("mixtral-8x7b", 995, 93_405_585_408),
        ("mixtral-8x22b", 1739, 281_241_268_224),
        ("internlm-7b", 419, 14_643_896_320),
    ],
)
def test_hugging_faces_files(name: str, count: int, total: int) -> None:
    config = SIZES[name]
    theirs = to_hf(config, state(config))
    assert (len(theirs), size(theirs)) == (count, total)
    assert shapes(from_hf(config, theirs, name)) == expected_shapes(config)
    lost = dict(list(theirs.items())[:-1])
    with pytest.raises(ValueError, match="1 missing"):
        from_hf(config, lost, name)


def test_fused_files_of_internlm2_and_falcon() -> None:
    config = SIZES["internlm2-7b"]
    fused: dict[str, Tensor] = {}
    for key, tensor in to_hf(config, state(config)).items():
        if "self_attn" not in key or "o_proj" in key:
            fused[key] = tensor
        elif "q_proj" in key:
            rows = (config.n_heads + 2 * config.kv_heads) * config.head_width
            fused[key.replace("self_attn.q_proj", "attention.wqkv")] = torch.empty(rows, config.dim, device="meta")
    fused["model.tok_embeddings.weight"] = fused.pop("model.embed_tokens.weight")
    assert (len(fused), size(fused)) == (227, 15_475_417_088)
    assert shapes(from_hf(config, fused, "internlm2")) == expected_shapes(config)
    for name, norms in (("falcon-7b", 2), ("falcon-40b", 4), ("falcon-180b", 4)):
        config = SIZES[name]
        theirs = to_hf(config, state(config))
        assert len(theirs) == config.n_layers * (4 + norms) + 3
        rows = (config.n_heads + 2 * config.kv_heads) * config.head_width
        assert theirs["transformer.h.1.self_attention.query_key_value.weight"].shape == (rows, config.dim)
        assert shapes(from_hf(config, theirs, name)) == expected_shapes(config)


def renamed(tensors: dict[str, Tensor], rules: dict[str, str]) -> dict[str, Tensor]:
    """Our names back to the reference's, by the first rule that fits."""
    out = {}
    for key, tensor in tensors.items():
        new = next((re.sub(a, b, key) for a, b in rules.items() if re.search(a, key)), key)
        out[f"llma.{new}"] = tensor
    return out


FALCON = {
    "tok_embeddings": "word_embeddings",
    r"attention\.wo": "self_attention.dense",
    r"attention\.(w[qkv])": r"self_attention.\1",
    r"feed_forward\.w1": "mlp.dense_h_to_4h",
    r"feed_forward\.w2": "mlp.dense_4h_to_h",
    "attention_norm": "ln_attn",
    "ffn_norm": "ln_mlp",
    r"^norm\.": "ln_f.",
}
INTERNLM = {
    "tok_embeddings": "embedding",
    r"^output": "head",
    r"attention\.wo": "mixer.out_proj",
    r"feed_forward\.w1": "mlp.w1",
    r"feed_forward\.w3": "mlp.w2",
    r"feed_forward\.w2": "mlp.w3",
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
}
MIXTRAL_ARGS = {
    "dim": 4096, "hidden_dim": 14336, "head_dim": 128, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2}, "rope_theta": 1e6, "max_seq_len": 32768,
}  # fmt: skip


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """InternLM's queries, keys and values as one tensor."""
    out = {k: v for k, v in tensors.items() if not re.search(r"attention\.w[qkv]", k)}
    for key, tensor in tensors.items():
        if "attention.wq" in key:
            out[key.replace("attention.wq", "mixer.Wqkv")] = torch.cat([tensor] * 3)
    return out


@pytest.mark.parametrize(
    ("name", "kind", "args", "make", "count"),
    [
        ("mixtral-8x7b", "mixtral", MIXTRAL_ARGS, lambda s: renamed(s, {}), 995),
        ("mixtral-8x7b", "mixtral_sparse", MIXTRAL_ARGS, lambda s: renamed(dense_to_sparse(s), {}), 323),
        # The published sizes of the reference's converters; 8 key heads, which the reference itself cannot load.
        ("falcon-180b", "falcon", {"num_kv_heads": 8}, lambda s: renamed(s, FALCON), 80 * 10 + 4),
        ("internlm-7b", "internlm", {}, lambda s: renamed(packed(s), INTERNLM), 32 * 9 + 3),
    ],
)
def test_the_references_files(
    name: str,
    kind: str,
    args: dict[str, object],
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    count: int,
) -> None:
    published = SIZES[name]
    theirs = make(state(published) | {"output.weight": torch.empty(published.vocab_size, published.dim, device="meta")})
    assert len(theirs) == count
    config, specs, ours = from_reference(theirs, args, kind)
    assert specs == ()
    assert shapes(ours) == expected_shapes(config)
    assert (config.dim, config.n_layers, config.kv_heads, config.hidden_width, config.order) == (
        published.dim, published.n_layers, published.kv_heads, published.hidden_width, published.order
    )  # fmt: skip
    # and as the eight shards that such a model is trained in, whose bytes are those of the whole and its copies
    if kind.startswith("mixtral"):
        shards = split_shards(theirs, 8)
        copies = sum(v.numel() for k, v in theirs.items() if "norm" in k or "gate" in k)
        assert sum(map(size, shards)) == size(theirs) + 2 * 7 * copies
        assert shards[7]["llma.tok_embeddings.weight"].shape == (published.vocab_size, published.dim // 8)
