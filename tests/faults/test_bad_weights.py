"""Torn, mixed, wrong and malicious weights: an error that says what, and never a half-loaded model."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from accessory.backbone import hf, keys, meta, store, weights
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.parallel.axes import split_shards

TINY = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=30)
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "vocab_size": -1}


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    hf.save_hf(Llama(TINY), folder, max_shard_bytes=9000)
    weights.load_backbone(folder)  # sound before it is broken
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "tp"
    meta.save_shards(TINY, Llama(TINY).state_dict(), folder, 2)
    weights.load_backbone(folder)
    return folder


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weights.load_backbone(folder)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_safetensors(hf_folder: Path, keep: float) -> None:
    path = first_shard(hf_folder)
    os.truncate(path, int(path.stat().st_size * keep))
    refuse(hf_folder, f"{path.name} is not a readable safetensors file")


def test_missing_file_of_the_index(hf_folder: Path) -> None:
    path = first_shard(hf_folder)
    path.unlink()
    refuse(hf_folder, f"misses 1 shard.*{path.name}")


def test_wrong_index(hf_folder: Path) -> None:
    index = hf_folder / store.INDEX
    good = store.read_json(index)
    files = sorted(set(good["weight_map"].values()))
    moved = {k: files[0] if k == "model.norm.weight" else v for k, v in good["weight_map"].items()}
    store.write_json(index, {"weight_map": moved})
    refuse(hf_folder, "disagree on .*model.norm.weight")
    store.write_json(index, {"weight_map": good["weight_map"] | {"ghost": files[0]}})
    refuse(hf_folder, "disagree on 1 tensor.*ghost")
    store.write_json(index, {"weight_map": good["weight_map"] | {"lm_head.weight": "../elsewhere.safetensors"}})
    refuse(hf_folder, "outside its folder")
    index.write_text("{")
    refuse(hf_folder, "is not JSON")
    store.write_json(index, {"metadata": {}})
    refuse(hf_folder, "weight_map")


def test_config_missing_or_torn(hf_folder: Path) -> None:
    (hf_folder / "config.json").write_text('{"model_type": "llama"')
    refuse(hf_folder, "is not JSON")
    (hf_folder / "config.json").unlink()
    refuse(hf_folder, "config.json is missing")


def test_wrong_keys_are_listed_all_at_once(tmp_path: Path) -> None:
    hf.save_hf(Llama(TINY), tmp_path / "hf")
    path = tmp_path / "hf" / store.SINGLE
    tensors = {k: v.clone() for k, v in store.read_file(path).items()}
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 31)
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(30)}
    store.write_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        weights.load_backbone(tmp_path / "hf")
    text = str(caught.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in text
    assert "30 unexpected: extra.0" in text
    assert text.count("extra.") == keys.SHOWN
    assert "1 mis-shaped: model.layers.0.self_attn.q_proj.weight: (32, 31), needs (32, 32)" in text


def test_tied_config_with_another_head(tmp_path: Path) -> None:
    hf.save_hf(Llama(TINY), tmp_path / "hf")
    config = store.read_json(tmp_path / "hf" / "config.json")
    store.write_json(tmp_path / "hf" / "config.json", config | {"tie_word_embeddings": True})
    refuse(tmp_path / "hf", "lm_head.weight differs")


def test_wrong_backbone_options_in_our_config(shards: Path) -> None:
    config = store.read_json(shards / "config.json")
    store.write_json(shards / "config.json", config | {"backbone": config["backbone"] | {"n_layer": 3}})
    refuse(shards, "unknown backbone option.*n_layer")
    store.write_json(shards / "config.json", {"format": "accessory"})
    refuse(shards, "has no object 'backbone'")


def test_two_formats_in_a_folder(hf_folder: Path, shards: Path) -> None:
    shutil.copy(first_shard(shards), hf_folder)
    refuse(hf_folder, "more than one format")
    shutil.copy(shards / "consolidated.00-of-02.model.safetensors", shards / "consolidated.00.safetensors")
    refuse(shards, "mixes shards")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no weights")
    for name in ("config.yaml", "trainable.safetensors"):
        (tmp_path / name).touch()
    refuse(tmp_path, "a folder of trained parts")
    refuse(tmp_path / "nowhere", "neither a folder nor")


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_shard(shards: Path, rank: int) -> None:
    (shards / f"consolidated.{rank:02d}-of-02.model.safetensors").unlink()
    refuse(shards, f"missing {rank}")


def test_missing_last_shard_of_metas_numbering(tmp_path: Path) -> None:
    # names without a total cannot show it; the shapes do
    parts = split_shards(Llama(TINY).state_dict(), 2)
    torch.save({k: v.clone() for k, v in parts[0].items()}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(ValueError, match="mis-shaped"):
        weights.read_folder(tmp_path, pickles=True)


def test_shards_that_do_not_belong_together(shards: Path) -> None:
    path = shards / "consolidated.01-of-02.model.safetensors"
    tensors = {k: v.clone() for k, v in store.read_file(path).items()}
    store.write_file(tensors | {"norm.weight": torch.full((32,), 2.0)}, path)
    refuse(shards, "norm.weight .differs between shards")
    store.write_file({k: v for k, v in tensors.items() if k != "output.weight"}, path)
    refuse(shards, "output.weight .in 1 of 2 shards")
    store.write_file(tensors | {"layers.0.attention.wq.weight": torch.zeros(16, 30)}, path)
    refuse(shards, "wq.weight .shapes .* do not join")


class Evil:
    """Pickles to a call of ``os.mkdir``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    folder, proof = tmp_path / "in", tmp_path / "proof"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    torch.save({"model": Evil(proof)}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
        weights.read_folder(folder, pickles=True)
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Evil(proof), protocol=2))  # without torch's archive
    with pytest.raises(ValueError, match=r"consolidated.00.pth is refused"):
        weights.read_folder(folder, pickles=True)
    assert not proof.exists()
    # and the pickle is live ammunition: plain unpickling does execute it
    pickle.loads((folder / "consolidated.00.pth").read_bytes())
    assert proof.exists()


def test_pickles_that_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    path = tmp_path / "consolidated.00.pth"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold a dictionary"):
        weights.read_folder(tmp_path, pickles=True)
    torch.save({"tok_embeddings.weight": "text"}, path)
    with pytest.raises(ValueError, match=r"not tensors: tok_embeddings.weight"):
        weights.read_folder(tmp_path, pickles=True)
    torch.save(Llama(TINY).state_dict(), path)
    os.truncate(path, 4000)
    with pytest.raises(ValueError, match=r"consolidated.00.pth is"):
        weights.read_folder(tmp_path, pickles=True)


def test_torn_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (b"", b"GGUF", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 64, b"JUNK" * 100):
        path.write_bytes(content)
        refuse(path, "x.gguf is not a readable GGUF file")
