"""Folders of LLaMA2-Accessory: overlays, differences, what was tuned folded in, and folders written for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.__main__ import main
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.reference import dense_to_sparse, from_reference, sparse_to_dense
from accessory.backbone.reference_folders import (
    build_language,
    fold,
    overlay,
    read_reference,
    write_reference,
)
from accessory.backbone.weights import load_backbone, read_folder
from accessory.nn.moe import MoEConfig
from accessory.nn.rope import RopeScaling
from accessory.parallel.axes import split_shards
from tests.tiny_backbone import equal, logits, model

LLAMA = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, vocab_size=40)
MIXTRAL = replace(LLAMA, multiple_of=256, ffn_dim=128, rope_theta=1e6, moe=MoEConfig(4, 2, balance=0.25))
ARGS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 40}


def save(folder: Path, kind: str, args: dict[str, object], state: dict[str, Tensor], count: int = 1) -> Path:
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"llama_type": kind}))
    (folder / "config.json").write_text(json.dumps(args))
    for rank, shard in enumerate(split_shards(state, count)):
        own = {f"llma.{k}": v.clone() for k, v in shard.items()}
        torch.save({"model": own}, folder / f"consolidated.{rank:02d}-of-{count:02d}.model.pth")
    return folder


def tuned(kind: str, args: dict[str, object]) -> dict[str, Tensor]:
    """Random values under the reference's names for all that ``kind`` adds to a plain model."""
    state = {k: torch.randn(v.shape) * 0.2 for k, v in model(LLAMA).state_dict().items()}
    for name in [n for n in state if n.split(".")[-2].startswith("w")]:
        rows, columns = state[name].shape
        stem = name.removesuffix(".weight")
        rank = int(str(args["lora_rank"]))
        state |= {f"{stem}.lora_a.weight": torch.randn(rank, columns), f"{stem}.lora_b.weight": torch.randn(rows, rank)}
        if kind == "llama_peft" or stem[-2:] not in ("wk", "wv"):
            state[f"{stem}.bias"] = torch.randn(rows)
    return state


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("config", "sparse"), [(LLAMA, False), (MIXTRAL, False), (MIXTRAL, True)])
def test_what_is_written_is_read_again(config: LlamaConfig, sparse: bool, count: int, tmp_path: Path) -> None:
    m = model(config)
    kind = write_reference(config, m.state_dict(), tmp_path / "out", count, sparse)
    assert kind == ("llama" if config.moe is None else "mixtral_sparse" if sparse else "mixtral")
    assert len(list((tmp_path / "out").glob(f"consolidated.*-of-{count:02d}.model.pth"))) == count
    again, tensors = read_folder(tmp_path / "out", pickles=True)
    assert again == config
    assert equal(tensors, dict(m.state_dict()))
    stored = torch.load(tmp_path / "out" / f"consolidated.00-of-{count:02d}.model.pth", weights_only=True)["model"]
    assert ("llma.layers.0.feed_forward.w2" in stored) == sparse


def test_a_width_is_said_by_the_references_rule(tmp_path: Path) -> None:
    for i, ffn in enumerate((80, 96, 100, 224)):  # below, on and above two thirds of four times the width
        config = replace(LLAMA, multiple_of=256, ffn_dim=ffn, rope_scaling=RopeScaling("linear", 4.0))
        write_reference(config, model(config).state_dict(), tmp_path / str(i))
        again, _ = read_folder(tmp_path / str(i), pickles=True)
        assert again.hidden_width == ffn
        assert again.rope_scaling is not None
        assert again.rope_scaling.factor == 4.0
        assert json.loads((tmp_path / str(i) / "config.json").read_text())["rope_scaling"] == 0.25


def test_what_the_reference_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    for change in ({"qkv_bias": True}, {"window": 4}, {"norm": "layer"}, {"rope_scaling": RopeScaling("llama3", 8.0)}):
        config = replace(LLAMA, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no place for an option"):
            write_reference(config, model(config).state_dict(), tmp_path / "out")
    with pytest.raises(ValueError, match="steps of 128"):
        write_reference(replace(MIXTRAL, ffn_dim=96), {}, tmp_path / "out", sparse=True)
    with pytest.raises(ValueError, match="must divide the heads: 4 and 2"):
        write_reference(LLAMA, {}, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama_peft", "llama_adapter"])
def test_trained_parts_lie_over_their_base_and_fold_in(kind: str, tmp_path: Path) -> None:
    args = ARGS | {"lora_rank": 3}
    if kind == "llama_adapter":
        args |= {"n_kv_heads": 4, "prefix_len": 3, "prefix_layers": 1}
    whole = tuned("llama_peft", args)
    if kind == "llama_adapter":  # a base with all heads, biases but on keys and values, and a prefix
        state = {k: torch.randn(v.shape) * 0.2 for k, v in model(replace(LLAMA, n_kv_heads=4)).state_dict().items()}
        whole = state | {k: v for k, v in whole.items() if "lora" in k or "bias" in k}
        for name in [n for n in whole if ".wk." in n or ".wv." in n]:
            if name.endswith("bias"):
                del whole[name]
            elif name.endswith("lora_b.weight"):
                whole[name] = torch.randn(32, 3)
        whole |= {"prefix": torch.randn(1, 1, 3, 32), "prefix_gate": torch.randn(1, 4)}
    trained = {k: v for k, v in whole.items() if any(word in k for word in ("lora", "bias", "norm", "prefix"))}
    plain = {k: v for k, v in whole.items() if k not in trained or "norm" in k}
    base = save(tmp_path / "base", "llama", ARGS, {k: v + 1 if "norm" in k else v for k, v in plain.items()}, 2)
    top = save(tmp_path / "top", kind, args, trained)
    language = read_reference([base, top], pickles=True)
    expected = build_language(from_reference(whole, args, kind))
    assert equal(build_language(language).state_dict(), expected.state_dict())
    assert {n for n, p in build_language(language).named_parameters() if p.requires_grad} == {
        n for n, p in expected.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match=r"does not fit the model\. .* missing: tok_embeddings\.weight"):
        read_reference([top], pickles=True)
    if kind == "llama_adapter":
        with pytest.raises(ValueError, match="prefix"):
            fold(language)
        return
    config, tensors = read_folder(base, pickles=True, overlays=[top])
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, True, True)
    folded = Llama(config).eval()
    folded.load_state_dict(tensors)
    torch.testing.assert_close(logits(folded), logits(expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(expected), logits(build_language(language)))
    assert not torch.allclose(logits(folded), logits(load(base)), atol=0.1)


def load(folder: Path) -> Llama:
    config, tensors = read_folder(folder, pickles=True)
    m = Llama(config).eval()
    m.load_state_dict(tensors)
    return m


def test_differences_add(tmp_path: Path) -> None:
    state = dict(model(LLAMA).state_dict())
    base = save(tmp_path / "base", "llama", ARGS, {k: v.bfloat16() for k, v in state.items()}, 2)
    delta = {"norm.weight": torch.full((32,), 0.5), "output.weight": torch.ones(40, 32)}
    top = save(tmp_path / "top", "llama", ARGS, delta)
    with pytest.raises(ValueError, match=r"holds no tok_embeddings\.weight"):
        read_folder(top, pickles=True)
    path = next(top.glob("*.pth"))
    path.rename(path.with_name("consolidated.00-of-01.model-diff.pth"))
    _, tensors = read_folder(base, pickles=True, overlays=[top])
    assert torch.equal(tensors["norm.weight"], (state["norm.weight"].bfloat16().float() + 0.5).bfloat16())
    assert torch.equal(tensors["tok_embeddings.weight"], state["tok_embeddings.weight"].bfloat16())
    assert tensors["output.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="top holds a difference"):
        read_folder(top, pickles=True)
    with pytest.raises(ValueError, match="the folder that it is added to comes first"):
        read_reference([top, base], pickles=True)
    with pytest.raises(ValueError, match=r"norm.weight is \(3,\), its difference \(2,\)"):
        overlay({"norm.weight": torch.ones(3)}, {"norm.weight": torch.ones(2)}, difference=True)


def test_only_language_models_of_the_reference_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "llama_ens5", ARGS, dict(model(LLAMA).state_dict()))
    with pytest.raises(ValueError, match=r"llama_ens5.* is no language model alone"):
        read_folder(folder, pickles=True)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="names no llama_type"):
        read_folder(folder, pickles=True)
    (folder / "meta.json").unlink()
    assert read_folder(folder, pickles=True)[0].hidden_width == LLAMA.hidden_width
    with pytest.raises(ValueError, match=r"has both meta\.json and config\.json"):
        read_reference([folder], pickles=True)


def test_layouts_of_experts_turn_into_each_other() -> None:
    state = dict(model(MIXTRAL).state_dict())
    sparse = dense_to_sparse(state)
    assert sparse["layers.1.feed_forward.w1"].shape == sparse["layers.1.feed_forward.w2"].shape == (4 * 128, 32)
    w2 = state["layers.1.feed_forward.experts.2.w2.weight"]
    assert torch.equal(sparse["layers.1.feed_forward.w2"][256:384], w2.T)
    assert equal(sparse_to_dense(sparse), state)
    with pytest.raises(ValueError, match="leaves gaps"):
        dense_to_sparse({k: v for k, v in state.items() if "experts.1." not in k})
    with pytest.raises(ValueError, match="weights alone"):
        dense_to_sparse({"layers.0.feed_forward.experts.0.w1.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match="does not say how many"):
        sparse_to_dense({"layers.0.feed_forward.w1": torch.zeros(4, 2)})


def test_the_command_converts_experts_to_and_fro(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = model(MIXTRAL)
    write_reference(MIXTRAL, m.state_dict(), tmp_path / "a", 2)

    def run(*arguments: object) -> int:
        return main(["convert", *map(str, arguments)])

    assert run(tmp_path / "a", tmp_path / "b", "--to", "reference", "--sparse", "--tensor-parallel", 2) == 0
    assert run(tmp_path / "b", tmp_path / "c", "--to", "hf") == 0
    assert run(tmp_path / "c", tmp_path / "d", "--tensor-parallel", 2) == 0
    for name in "cd":
        assert equal(load_backbone(tmp_path / name).state_dict(), dict(m.state_dict())), name
    assert json.loads((tmp_path / "b" / "meta.json").read_text()) == {"llama_type": "mixtral_sparse"}
    assert run(tmp_path / "a", tmp_path / "e", "--sparse") == 2
    assert run(tmp_path / "c", tmp_path / "e", "--overlay", tmp_path / "a") == 2
    assert "laid over those of LLaMA2-Accessory" in capsys.readouterr().err
