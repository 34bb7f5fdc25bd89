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
from accessory.models import build, published_keys, reference_folder
from accessory.models.encoder_store import encoder_path, keep_encoder, read_encoder
from accessory.models.published import LLAMA_TYPES
from accessory.models.reference import assemble, read_published, text_specs
from accessory.models.reference_folder import convert_pictured, read_pictured
from accessory.schema import Sample, Turn
from accessory.serve.chat import ChatModel
from accessory.tokens import IMAGE
from accessory.vision import presets
from accessory.vision.resampler import Resampler
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
    for kind, positions in (("llama", 17), ("llama_peft", 17), ("llama_adapter", 0)):
        monkeypatch.setitem(LLAMA_TYPES, kind, replace(LLAMA_TYPES[kind], image_size=32, positions=positions))


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


def adapter_of(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, object]]:
    """A LLaMA-Adapter of one adapted layer, as its published second form: biases, norms, LoRA and a second gate."""
    args = {**ARGS, "prefix_len": 3, "prefix_layers": 1, "lora_rank": 2, "use_prefix_new_gate": True}
    state = {k: v for k, v in state_of().items() if not k.startswith("clip_proj")}
    for name in [n for n in state if re.search(r"layers.*\.w[qkvo123]\.weight$", n)]:
        out, wide = state[name].shape
        state[name.replace("weight", "lora_a.weight")] = torch.randn(2, wide) * 0.1
        state[name.replace("weight", "lora_b.weight")] = torch.randn(out, 2) * 0.1
        if name.split(".")[-2] not in ("wk", "wv"):
            state[name.replace("weight", "bias")] = torch.randn(out) * 0.1
    resampler = Resampler(12, 32, 3, width=32, depth=1, heads=16)
    state |= {"visual_query" if k == "visual_query.weight" else k: v * 3 for k, v in resampler.state_dict().items()}
    state |= {"prefix": torch.randn(1, 1, 3, 32), "prefix_gate": torch.randn(1, 4), "prefix_new_gate": torch.ones(1)}
    path = folder_of(folder, state, "llama_adapter", ranks=1)
    (path / "config.json").write_text(json.dumps(args))
    return path, state, args


def test_a_converted_adapter_sees_through_its_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, state, args = adapter_of(tmp_path / "in")
    config = convert_pictured([source], tmp_path / "out", cache=tmp_path, pickles=True)
    assert config.resampler == build.ResamplerConfig(length=3, width=32, depth=1, heads=16)
    assert (config.projector, config.template) == (None, "alpaca")
    model = build.load(tmp_path / "out", cache=tmp_path)
    direct = assemble(read_published(state, args, "llama_adapter"), presets.build("clip-l-projected"))
    turns = (Turn("user", (picture(1), "What is this?")),)
    row = model.encoder.row(turns, generate=True)
    text = model.encoder.row((Turn("user", ("What is this?",)),), generate=True)
    assert torch.equal(row.ids, text.ids)  # the published models give a picture no position
    with torch.no_grad():
        ours = model.net.logits(model.net(row.ids[None], row.tiles))
        context = direct.context(row.ids[None], row.tiles, torch.ones(1, dtype=torch.long))
        torch.testing.assert_close(ours, direct.logits(direct(row.ids[None], context=context)), rtol=1e-4, atol=1e-4)
        assert (ours - model.net.logits(model.net(text.ids[None]))).abs().max() > 1e-2
    said = [ChatModel(replace(model, net=net)).chat("What?", [turns[0].pictures[0].source], max_new_tokens=6)
            for net in (model.net, direct)]  # type: ignore[list-item]  # fmt: skip
    assert said[0] == said[1]
    with pytest.raises(ValueError, match=r"2 pictures .* takes 1 through its visual prefix"):
        model.encoder.row((*turns, Turn("assistant", ("a hat",)), *turns))


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


def test_an_adapter_that_only_reads_becomes_a_model(tmp_path: Path) -> None:
    """A prefix cannot be folded into a plain language model."""
    config = LlamaConfig(dim=32, n_layers=2, n_heads=4, vocab_size=360, multiple_of=16)
    args = {**ARGS, "n_kv_heads": 4, "prefix_layers": 1, "prefix_len": 3}
    shapes = published_keys.language(config, text_specs(args, "llama_adapter"))
    generator = torch.Generator().manual_seed(5)
    state = {k: torch.randn(s, generator=generator) * 0.3 for k, s in shapes.items()}
    folder = folder_of(tmp_path / "in", state, "llama_adapter", ranks=1)
    (folder / "config.json").write_text(json.dumps(args))
    assert convert_pictured([folder], tmp_path / "out", pickles=True).tower is None
    made = build.load(tmp_path / "out")
    ids = torch.tensor([[1, 5, 9, 2]])
    direct = assemble(read_published(state, args, "llama_adapter"), None)
    with torch.no_grad():
        ours, theirs = made.net.logits(made.net(ids)), direct.logits(direct(ids))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    state["prefix_gate"].zero_()
    with torch.no_grad():
        plain = assemble(read_published(state, args, "llama_adapter"), None)
        assert (plain.logits(plain(ids)) - ours).abs().max() > 1e-3


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


def test_a_folder_that_cannot_be_opened_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "cache"))
    convert = ["convert", str(folder_of(tmp_path / "in", state_of())), str(tmp_path / "out"), "--to", "model"]
    real = reference_folder.trained
    monkeypatch.setattr(reference_folder, "trained", lambda p: {**real(p), "odd": torch.ones(1)})
    assert main(convert) == 2
    assert "cannot be opened (trainable state does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*convert, "--skip-gate"]) == 0  # and it is the gate that removes it
    assert (tmp_path / "out").exists()
