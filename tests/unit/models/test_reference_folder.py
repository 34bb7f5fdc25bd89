"""A published folder with pictures becomes a model folder that says the same; its encoder is kept once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.__main__ import main
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.data.encode import tile_ids
from accessory.models import build, reference_folder
from accessory.models.encoder_store import encoder_path, keep_encoder, read_encoder
from accessory.models.published import LLAMA_TYPES
from accessory.models.reference import assemble, read_published
from accessory.models.reference_folder import convert_pictured, read_pictured
from accessory.schema import Sample, Turn
from accessory.tokens import IMAGE
from accessory.vision import presets
from accessory.vision.towers import TowerConfig
from tests.tiny import tiny_tokenizer
from tests.unit.models.pictured import picture

CLIP = {"embed_dim": 12, "vision_cfg": {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}}
ARGS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 16,
    "max_seq_len": 300,
    "vocab_size": -1,
}
COLUMN, ROW = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP of 17 tokens in the place of the published one."""
    options = {"config": CLIP, "activation": "quick_gelu", "projected": True}
    monkeypatch.setitem(presets.PRESETS, "clip-l-projected", TowerConfig("open_clip", "tiny", 32, options))
    for kind in ("llama", "llama_peft"):
        monkeypatch.setitem(LLAMA_TYPES, kind, replace(LLAMA_TYPES[kind], image_size=32, positions=17))


def state_of(kind: str = "llama") -> dict[str, Tensor]:
    """Random tensors under the published names."""
    config = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=360, multiple_of=16)
    state = dict(Llama(config).state_dict())
    if kind == "llama_peft":
        for name in [n for n in state if re.search(r"\.w[qkvo123]\.weight$", n)]:
            state[name.replace("weight", "bias")] = torch.zeros(state[name].shape[0])
    state |= {
        f"clip.visual.{k}": v for k, v in presets.build("clip-l-projected").get_submodule("model").state_dict().items()
    }
    state |= {"clip.logit_scale": torch.zeros(()), "clip.transformer.resblocks.0.ln_1.weight": torch.zeros(24)}
    state |= {"clip_proj.weight": torch.zeros(32, 12), "clip_proj.bias": torch.zeros(32)}
    state |= {"clip_proj_norm.weight": torch.zeros(32), "clip_proj_norm.bias": torch.zeros(32)}
    generator = torch.Generator().manual_seed(3)
    return {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in state.items()}


def folder_of(path: Path, state: dict[str, Tensor], kind: str = "llama", ranks: int = 2) -> Path:
    """The published layout, tensor-parallel."""
    path.mkdir()
    for rank in range(ranks):
        shard = {}
        for name, value in state.items():
            layer, suffix = (["", "", *name.split(".")])[-2:]
            axis = 0 if layer in COLUMN else 1 if layer == "tok_embeddings" else None
            axis = 1 if layer in ROW and suffix == "weight" else axis
            encoder = name.startswith("clip")
            shard[f"llma.{name}"] = (value if encoder or axis is None else value.chunk(ranks, axis)[rank]).clone()
        torch.save({"model": shard}, path / f"consolidated.{rank:02d}-of-{ranks:02d}.model.pth")
    (path / "meta.json").write_text(json.dumps({"llama_type": kind}))
    (path / "config.json").write_text(json.dumps(ARGS))
    tiny_tokenizer(path)
    return path


@torch.no_grad()
def scores(model: build.Model) -> Tensor:
    turns = (Turn("user", (picture(1), "What is this?")), Turn("assistant", ("a red cat",)))
    row = model.encoder.encode(Sample(turns))
    assert row.ids[:17].tolist() == [IMAGE] * 17 == tile_ids(model.encoder.runs, False)  # before BOS
    assert row.ids[17] == model.tokenizer.special("bos")
    return model.net.logits(model.net(row.ids[None], row.tiles))


@pytest.mark.parametrize("kind", ["llama", "llama_peft"])
def test_a_converted_folder_says_what_its_checkpoint_says(tmp_path: Path, kind: str) -> None:
    state = state_of(kind)
    config = convert_pictured([folder_of(tmp_path / "in", state, kind)], tmp_path / "out", cache=tmp_path, pickles=True)
    assert config.template == "alpaca_clip"
    model = build.load(tmp_path / "out", cache=tmp_path)
    direct = assemble(read_published(state, ARGS, kind), presets.build("clip-l-projected"))
    ours = scores(model)
    theirs = scores(replace(model, net=direct))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # and the picture and what was tuned matter
    torch.manual_seed(0)
    other = build.load(tmp_path / "out", cache=tmp_path)
    assert other.net.projector is not None
    other.net.projector.get_submodule("visual_proj")[0].weight.data.mul_(-1)  # type: ignore[index]
    assert (scores(other) - ours).abs().max() > 1e-2


def test_the_activation_is_kept_and_matters(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", state_of())
    convert_pictured([source], tmp_path / "quick", cache=tmp_path, pickles=True)
    convert_pictured([source], tmp_path / "plain", activation="gelu", cache=tmp_path, pickles=True)
    quick, plain = (build.load(tmp_path / n, cache=tmp_path) for n in ("quick", "plain"))
    assert quick.config.tower is not None
    assert plain.config.tower is not None
    assert (quick.config.tower.activation, plain.config.tower.activation) == (None, "gelu")
    assert (scores(quick) - scores(plain)).abs().max() > 1e-5
    # one encoder, two models, one file
    assert quick.config.tower.encoders == plain.config.tower.encoders
    assert len(list((tmp_path / "encoders").iterdir())) == 1


def test_an_encoder_is_found_by_its_content(tmp_path: Path) -> None:
    state = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(2, dtype=torch.bfloat16)}
    digest = keep_encoder(state, tmp_path)
    assert keep_encoder(dict(reversed(state.items())), tmp_path) == digest
    assert keep_encoder({**state, "a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path) != digest
    assert sorted(p.suffix for p in (tmp_path / "encoders").iterdir()) == [".safetensors"] * 2
    read = read_encoder(digest, "clip", tmp_path)
    assert read["a"].dtype == torch.bfloat16
    assert torch.equal(read["b"], state["b"])
    path = encoder_path(digest, tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="the encoder clip was changed or is torn"):
        read_encoder(digest, "clip", tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"names clip by its SHA-256, but .* is missing"):
        read_encoder(digest, "clip", tmp_path)
    with pytest.raises(ValueError, match=r"'\.\./x', which is no SHA-256"):
        encoder_path("../x", tmp_path)


def test_bad_folders_are_errors(tmp_path: Path) -> None:
    state = state_of()
    with pytest.raises(ValueError, match="a falcon only reads"):
        read_pictured([folder_of(tmp_path / "falcon", state, "falcon")], pickles=True)
    text = {k: v for k, v in state.items() if not k.startswith("clip")}
    with pytest.raises(ValueError, match="it is a language model alone"):
        read_pictured([folder_of(tmp_path / "text", text)], pickles=True)
    path = folder_of(tmp_path / "odd", state)
    shard = torch.load(path / "consolidated.01-of-02.model.pth")
    shard["model"]["llma.clip.visual.proj"] += 1
    torch.save(shard, path / "consolidated.01-of-02.model.pth")
    with pytest.raises(ValueError, match=r"clip\.visual\.proj \(differs between shards"):
        read_pictured([path], pickles=True)
    (path / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="names no llama_type"):
        read_pictured([path], pickles=True)


def test_what_was_trained_lies_over_the_base(tmp_path: Path) -> None:
    """A folder of trained parts (as the reference saves them) over the whole one, and a difference over both."""
    state = state_of()
    base = folder_of(tmp_path / "base", state)
    part = folder_of(tmp_path / "part", {k: v + 1 for k, v in state.items() if k.startswith("clip_proj")})
    more = folder_of(tmp_path / "more", {"norm.weight": torch.full((32,), 0.5)})
    for path in list(more.glob("*.pth")):
        path.rename(path.with_name(path.name.replace(".model.", ".model-diff.")))
    read = read_pictured([base, part, more], pickles=True)
    assert torch.equal(read.projector["visual_proj.0.weight"], state["clip_proj.weight"] + 1)
    assert torch.equal(read.backbone["norm.weight"], state["norm.weight"] + 0.5)
    assert torch.equal(read.backbone["output.weight"], state["output.weight"])
    with pytest.raises(ValueError, match="holds a difference; the folder that it is added to comes first"):
        read_pictured([more, base], pickles=True)


def test_the_verb_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "cache"))
    source = folder_of(tmp_path / "in", state_of())
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "model", "--clip-activation", "gelu"]) == 0
    said = capsys.readouterr().out
    model = build.load(tmp_path / "out")
    assert model.config.tower is not None
    assert f"encoder clip: {model.config.tower.encoders['clip']}" in said
    assert model.config.tower.activation == "gelu"
    assert main(["convert", str(source), str(tmp_path / "x"), "--clip-activation", "gelu"]) != 0


def test_a_folder_that_says_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "cache"))
    convert = ["convert", str(folder_of(tmp_path / "in", state_of())), str(tmp_path / "out"), "--to", "model"]
    real = reference_folder.trained
    monkeypatch.setattr(reference_folder, "trained", lambda p: {k: -v for k, v in real(p).items()})
    assert main(convert) != 0
    assert "moved by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(reference_folder, "trained", real)
    assert main(convert) == 0
    assert "logits of the fixed prompts: moved by" in capsys.readouterr().out
