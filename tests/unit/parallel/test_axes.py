"""Shards of every degree: cut and joined by one table, under our names and under the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.reference import dense_to_sparse
from accessory.nn.moe import MoEConfig
from accessory.parallel.axes import merge_shards, shard_rule, split_shards
from accessory.peft.attach import BiasSpec, LoraSpec, PrefixSpec, ScaleSpec, attach
from tests.tiny_backbone import equal

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 128, "vocab_size": 40}


def tuned(moe: MoEConfig | None = None) -> dict[str, Tensor]:
    """Weights of a model that carries everything that can be hung on it."""
    model = Llama(LlamaConfig(**SIZES, moe=moe))
    attach(model, (LoraSpec(rank=3), BiasSpec(), ScaleSpec(), PrefixSpec(length=2, new_gate=True)))
    return {k: torch.randn(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("moe", [None, MoEConfig(8, 2)])
def test_cutting_and_joining_is_the_identity(count: int, moe: MoEConfig | None) -> None:
    state = tuned(moe)
    shards = split_shards(state, count)
    assert len(shards) == count
    assert equal(merge_shards(shards), state)
    if count > 1:
        assert all(a["output.weight"].shape[0] == 40 // count for a in shards)
        assert not torch.equal(shards[0]["output.weight"], shards[1]["output.weight"])


@pytest.mark.parametrize("count", [2, 4])
def test_what_hangs_on_a_layer_is_cut_with_it(count: int) -> None:
    """A rank's LoRA, bias and scale are those of its own rows or columns: the parts of the product add up."""
    state, x = tuned(), torch.randn(3, 64)
    shards = split_shards(state, count)

    def low(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.delta.a.weight"].T @ s[f"{name}.delta.b.weight"].T

    def column(s: dict[str, Tensor]) -> Tensor:
        name = "layers.0.attention.wq"
        return (x @ s[f"{name}.weight"].T + s[f"{name}.bias"] + low(s, name, x)) * s[f"{name}.scale"]

    torch.testing.assert_close(torch.cat([column(s) for s in shards], 1), column(state))

    def row(s: dict[str, Tensor], part: Tensor) -> Tensor:
        return part @ s["layers.0.attention.wo.weight"].T + low(s, "layers.0.attention.wo", part)

    summed = sum((row(s, part) for s, part in zip(shards, x.chunk(count, 1))), torch.zeros(()))
    torch.testing.assert_close(summed, row(state, x), rtol=1e-4, atol=1e-4)
    gates = [s["layers.1.attention.prefix.gate"] for s in shards]
    assert torch.equal(torch.cat(gates), state["layers.1.attention.prefix.gate"])


def test_experts_live_on_one_rank_or_share_their_rows() -> None:
    state = {k: v for k, v in tuned(MoEConfig(4, 2)).items() if "delta" not in k and k.endswith("weight")}
    first = split_shards(state, 2)[0]
    own = {k.split(".")[4] for k in first if ".experts." in k}
    assert own == {"0", "1"}
    assert torch.equal(first["layers.0.feed_forward.gate.weight"], state["layers.0.feed_forward.gate.weight"])
    sparse = dense_to_sparse(state)
    parts = split_shards(sparse, 4)
    name = "layers.0.feed_forward.w3"
    assert equal(merge_shards(parts), sparse)
    # the second rank's second expert: the second quarter of that expert's rows
    expert = state["layers.0.feed_forward.experts.1.w3.weight"]
    assert torch.equal(parts[1][name].unflatten(0, (4, -1))[1], expert.chunk(4)[1])
    assert not torch.equal(torch.cat([p[name] for p in parts]), sparse[name])


def test_rules_by_the_references_names() -> None:
    rules = {
        "llma.tok_embeddings.weight": 1,
        "llma.layers.0.attention.wq.lora_a.weight": None,
        "llma.layers.0.attention.wq.lora_b.weight": 0,
        "llma.layers.0.attention.wo.lora_a.weight": 1,
        "llma.layers.0.attention.wo.bias": None,
        "llma.prefix": None,
        "llma.prefix_gate": 1,
        "llma.layers.0.feed_forward.w1": "interleaved",
        "llma.layers.0.feed_forward.experts.3.w2.bias": "expert",
        "llma.layers.0.self_attention.dense.weight": 1,
        "llma.layers.0.mlp.dense_h_to_4h.bias": 0,
        "llma.layers.0.mixer.Wqkv.bias": 0,
        "llma.word_embeddings.weight": 1,
        "llma.dinov2_vitg14.blocks.0.mlp.w3.weight": None,
        "llma.qformer.vision_model.encoder.layers.0.mlp.fc1.weight": None,
        "llma.visual_proj.0.weight": None,
    }
    assert {name: shard_rule(name) for name in rules} == rules
    key = "llma.layers.0.self_attention.wk.weight"
    assert (shard_rule(key), shard_rule(key, ("wk", "wv"))) == (0, None)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"3 does not divide the experts of .*experts\.0\.w1\.weight"):
        split_shards({f"layers.0.feed_forward.experts.{i}.w1.weight": torch.zeros(2, 2) for i in range(4)}, 3)
    with pytest.raises(ValueError, match="0 is no number of ranks"):
        split_shards({}, 0)
    with pytest.raises(ValueError, match=r"feed_forward.w1 .*its router has None"):
        split_shards({"layers.0.feed_forward.w1": torch.zeros(4, 2)}, 2)
    with pytest.raises(ValueError, match=r"attention\.wq\.weight .in 1 of 2 shards"):
        merge_shards([{"layers.0.attention.wq.weight": torch.zeros(2, 2)}, {}])
    expert = {"layers.0.feed_forward.experts.0.w1.weight": torch.zeros(2, 2)}
    assert equal(merge_shards([expert, {}]), expert)
    with pytest.raises(ValueError, match="differs between shards"):
        merge_shards([expert, {k: v + 1 for k, v in expert.items()}])
