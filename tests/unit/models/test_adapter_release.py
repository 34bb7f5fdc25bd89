"""LLaMA-Adapter's own files: their full published lists on `meta`, and what small ones say once they are converted."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.__main__ import main
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.meta import save_shards
from accessory.backbone.sizes import SIZES
from accessory.backbone.weights import save_accessory
from accessory.models import build, published_keys
from accessory.models.adapter_release import (
    Found,
    lay_over,
    read_files,
    read_release,
    released,
    spelled,
    write_release,
)
from accessory.models.published import RELEASES
from accessory.models.published_keys import Tuned, on_meta, release
from accessory.models.reference import assemble
from accessory.models.reference_folder import convert_pictured
from accessory.nn.attention import Attention
from accessory.parallel.axes import split_shards
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, TrainSpec, merge
from accessory.vision import presets
from tests.tiny import tiny_tokenizer
from tests.unit.models.adapters import SMALL, Plain, clip, filled, laid, parts, scores, shrink
from tools.presets import RELEASED
from tools.presets import main as print_presets


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


# --- the published lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RELEASES))
@pytest.mark.parametrize("name", ["plain", "tuned"])
def test_the_full_list_is_read_at_full_size(kind: str, name: str) -> None:
    """Every tensor of the published list finds its place in the model of the published size, and nothing is left."""
    row = RELEASES[kind]
    assert row.adapter is not None
    config = SIZES[row.size]
    tuned = Tuned()
    if name == "tuned":
        tuned = Tuned(True, True, 16, new_gate=row.adapter.new_gate) if row.adapter.tuned else tuned
    shapes = release(kind, config, tuned)
    base = on_meta({k: tuple(v.shape) for k, v in build_meta(config).items()}, torch.float16)
    state = on_meta(shapes, torch.float32)
    found = Found({spelled(k): v for k, v in state.items()})
    if row.tower is not None:
        with torch.device("meta"):
            sees = presets.build(row.tower)
        found = replace(found, clip={f"visual.{k}": v for k, v in sees.get_submodule("model").state_dict().items()})
    published = lay_over(config, base, found, kind)
    with torch.device("meta"):
        net = assemble(published, presets.build(row.tower) if row.tower else None)
    added = sum(p.numel() for k, p in net.named_parameters() if not k.startswith("tower."))
    added -= sum(v.numel() for v in base.values())
    # what the file has and the model does not: gates of blocks without a prefix; norms, which replace LLaMA's
    lost = (config.n_layers - row.adapter.layers) * (config.n_heads + tuned.new_gate) if row.adapter.layers else 0
    lost += sum(torch.Size(s).numel() for k, s in shapes.items() if re.search(r"(n_|\.|^)norm\.weight$", k))
    lost += sum(torch.Size(s).numel() for k, s in shapes.items() if k.endswith("_scale"))
    assert added == published_keys.count(shapes) - lost


def build_meta(config: LlamaConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(Llama(config).state_dict())


def test_the_counts_are_the_published_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert print_presets(["adapter_v1", "adapter_v2", "imagebind_llm"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"adapter_v1 .*llama-7b .* 33 +1,229,824", said)
    assert re.search(r"adapter_v2 .*BIAS-7B.* 363 +63,095,552", said)
    # and it can fail
    monkeypatch.setitem(RELEASED["adapter_v1"][0].parts, "adapter_query", 1)
    assert print_presets(["adapter_v1"]) == 1
    assert "adapter_query" in capsys.readouterr().out


# --- strictness ------------------------------------------------------------------------------------------------------


def spoilt(kind: str) -> list[tuple[Callable[[dict[str, Tensor]], object], str]]:
    """A tensor less, one more, one of another shape, of every kind of tensor that the file has."""
    _, state = parts(kind)
    kinds = {re.sub(r"\d+", "N", k): k for k in state}
    out: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda s: s.update({"llama.layers.0.attention.odd": torch.ones(1)}), "attention.odd")
    ]
    for key in kinds.values():
        out.append((lambda s, key=key: s.pop(key), key))  # type: ignore[misc]
        out.append((lambda s, key=key: s.update({key: s[key][..., :-1].clone()}), key))  # type: ignore[misc]
    return out


@pytest.mark.parametrize("kind", list(RELEASES))
def test_a_missing_an_odd_and_a_mis_shaped_key_are_named(kind: str, small: None) -> None:
    for change, key in spoilt(kind):
        with pytest.raises(ValueError, match=re.escape(key)):
            laid(kind, change)


def test_what_is_no_release_is_said(small: None, tmp_path: Path) -> None:
    base, state = parts("adapter_v2")
    with pytest.raises(ValueError, match=r"has such names: a\.b"):
        lay_over(SMALL, base, Found({"a.b": torch.ones(1)}))
    with pytest.raises(ValueError, match="llama is no release"):
        lay_over(SMALL, base, Found(state), "llama")
    with pytest.raises(ValueError, match=r"sees with clip-l-projected, whose weights .* does not bring"):
        lay_over(SMALL, base, Found(state))
    with pytest.raises(ValueError, match="config has entries that are not understood: phase"):
        lay_over(SMALL, base, Found(state, {"phase": 1}), "adapter_v2")
    with pytest.raises(ValueError, match=r"45 missing: llama\.layers\.0\.attention\.new_gate"):
        lay_over(SMALL, base, Found(filled(release("adapter_v2", SMALL)), {"w_lora": True, "lora_rank": 2}))
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_files([tmp_path / "none.pth"])


def test_code_in_a_pickle_is_refused(small: None, tmp_path: Path) -> None:
    _, state = parts("adapter_v1")
    torch.save(state, tmp_path / "good.pth")
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="is a pickle; convert it first"):
        read_files([tmp_path / "good.pth"])
    assert len(read_files([tmp_path / "good.pth"], pickles=True).state) == len(state)
    with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
        read_files([tmp_path / "bad.pth"], pickles=True)


# --- what the numbers do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RELEASES))
@torch.no_grad()
def test_logits_are_those_of_the_formulas(kind: str, small: None) -> None:
    base, state = parts(kind)
    net = laid(kind)
    seen: Tensor | float = 0.0
    if net.resampler is not None:
        assert net.tower is not None
        tiles = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
        seen = net.resampler(net.tower(tiles).sequence())
        assert seen.abs().max() > 0.1
    form = RELEASES[kind].adapter
    assert form is not None
    expected = Plain(base, state, kind, form.raw)(seen)
    torch.testing.assert_close(scores(net), expected, rtol=1e-4, atol=2e-5)
    if form.layers:  # and the gate's function matters, and can be chosen
        other = laid(kind, gate="tanh" if form.raw else "raw")
        assert (scores(other) - expected).abs().max() > 1e-3
        torch.testing.assert_close(scores(other), Plain(base, state, kind, not form.raw)(seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(RELEASES))
def test_every_kind_of_tensor_matters(kind: str, small: None) -> None:
    """One tensor spoilt, other logits; but for gates of blocks without a prefix, which go."""
    before = scores(laid(kind))
    _, state = parts(kind)
    form = RELEASES[kind].adapter
    assert form is not None
    for key in {re.sub(r"\d+", "N", k): k for k in state}.values():  # the last of a kind
        other = filled({key: tuple(state[key].shape)}, seed=9)
        assert (scores(laid(kind, lambda s, other=other: s.update(other))) - before).abs().max() > 1e-6, key  # type: ignore[misc]
    idle = [k for k in state if re.search(r"layers\.0\.attention\.(cap_|new_)?gate", k) and form.layers < 3]
    for key in idle:
        assert torch.equal(scores(laid(kind, lambda s, key=key: s.update({key: s[key] + 1}))), before)  # type: ignore[misc]


def test_one_gate_for_all_heads_is_read(small: None) -> None:
    """The first files of V1 have one number a block."""
    base, state = parts("adapter_v1")
    alone = {k: v[:, :1, 0, 0].flatten() if k.endswith("gate") else v for k, v in state.items()}
    spread = {k: v[:, :1].expand_as(v) if k.endswith("gate") else v for k, v in state.items()}
    ours, theirs = (assemble(lay_over(SMALL, base, Found(s)), None) for s in (alone, spread))
    torch.testing.assert_close(scores(ours), scores(theirs))
    assert (scores(ours) - scores(laid("adapter_v1"))).abs().max() > 1e-3


def test_lora_under_a_plain_prefix_is_kept_beside(small: None) -> None:
    """Folding it into wk and wv would move the prefix: they stay as they are, all else is folded."""
    net = laid("adapter_v2")
    before = scores(net)
    merge(net)
    torch.testing.assert_close(scores(net), before, rtol=1e-4, atol=1e-4)
    attention = net.backbone.get_submodule("layers.2.attention")
    assert isinstance(attention, Attention)
    assert attention.wk.delta is not None
    assert attention.wq.delta is None
    assert attention.prefix is not None
    attention.prefix.plain = False  # and it matters which way the tokens go
    assert (scores(net) - before).abs().max() > 1e-3


# --- files and folders -----------------------------------------------------------------------------------------------


def base_folder(path: Path, ranks: int = 0) -> Path:
    base, _ = parts("adapter_v1")
    if ranks:
        save_shards(SMALL, base, path, ranks)
    else:
        save_accessory(SMALL, base, path)
    tiny_tokenizer(path)
    return path


@pytest.mark.parametrize("kind", ["adapter_v1", "adapter_v1_caption", "adapter_v2", "imagebind_llm"])
def test_a_file_goes_in_and_comes_out(
    kind: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verb makes a model folder that says what the file says, and the same file again of it."""
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "cache"))
    form = RELEASES[kind].adapter
    assert form is not None
    _, state = parts(kind)
    said = {"w_bias": True, "w_lora": True, "lora_rank": 2}
    torch.save({"model": state, "config": said} if form.tuned else state, tmp_path / "release.pth")
    torch.save(clip(), tmp_path / "clip.pt")
    over = [str(tmp_path / n) for n in ("release.pth", "clip.pt")[: 2 if RELEASES[kind].tower else 1]]
    source = base_folder(tmp_path / "llama")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "model", "--overlay", *over]) == 0
    made = build.load(tmp_path / "out")
    torch.testing.assert_close(scores(made.net), scores(laid(kind)), rtol=1e-5, atol=1e-5)
    assert (made.config.tower is None) == (RELEASES[kind].tower is None)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "reference"]) == 0
    assert f"{kind}.pth" in capsys.readouterr().out
    again = read_files([tmp_path / "back" / f"{kind}.pth"], pickles=True)
    assert again.said == (said if form.tuned else {})
    assert set(again.state) == set(state)
    for key, value in state.items():
        if re.search(r"layers\.0\.attention\.(cap_|new_)?gate", key) and form.layers < 3:
            assert not again.state[key].any()
        else:
            assert torch.equal(again.state[key], value), key


def v2_folder(top: Path) -> build.ModelConfig:
    """The model folder ``top/out`` of a small V2."""
    _, state = parts("adapter_v2")
    torch.save({"model": state}, top / "v2.pth")
    torch.save(clip(), top / "clip.pt")
    folders = [base_folder(top / "llama"), top / "v2.pth", top / "clip.pt"]
    return convert_pictured(folders, top / "out", cache=top, pickles=True)


def test_other_forms_are_not_written(small: None, tmp_path: Path) -> None:
    """What LLaMA-Adapter's code would compute otherwise is refused."""
    config = v2_folder(tmp_path)
    for changed, message in (
        ({"length": 5}, "no release of LLaMA-Adapter has the form"),
        ({"gate": "raw"}, "no release of LLaMA-Adapter has the form"),
        ({"plain": False}, "LLaMA-Adapter's LoRA has no alpha, all linears and plain prefixes"),
    ):
        specs = [replace(s, **changed) if s.kind == "prefix" else s for s in config.tuning]  # type: ignore[arg-type]
        build.write_config(tmp_path / "out", replace(config, tuning=tuple(specs)))
        with pytest.raises(ValueError, match=message):
            write_release(tmp_path / "out", tmp_path / "back")
    assert config.resampler is not None and config.tower is not None  # noqa: PT018
    other: tuple[tuple[dict[str, Any], str], ...] = (
        ({"resampler": replace(config.resampler, heads=8)}, "nearest, adapter_v2, differs in: resampler.heads 8, and"),
        ({"tower": replace(config.tower, preset="clip-h-projected")}, "tower clip-h-projected, and not clip-l-proj"),
        ({"tower": None}, "tower None, and not clip-l-projected"),
        (
            {"resampler": replace(config.resampler, kind="bind")},
            r"resampler \('bind', 32, 4\), and not \('queries', 32",
        ),
    )
    for parts_of, message in other:
        build.write_config(tmp_path / "out", replace(config, **parts_of))
        with pytest.raises(ValueError, match=message):
            write_release(tmp_path / "out", tmp_path / "back")
    build.write_config(tmp_path / "out", config)
    assert write_release(tmp_path / "out", tmp_path / "back") == "adapter_v2"  # and as it is, it is
    build.write_config(tmp_path / "out", replace(config, tuning=()))
    with pytest.raises(ValueError, match="is of prefixes alone"):
        write_release(tmp_path / "out", tmp_path / "back")
    with pytest.raises(ValueError, match=r"aligner\.weight has no place"):
        released("adapter_v2", {"aligner.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="adapter_v2_chat65b is not written"):
        released("adapter_v2_chat65b", {})


def test_the_first_form_is_raw_prefixes_alone(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, state = parts("adapter_v1")
    torch.save(state, tmp_path / "v1.pth")
    folders = [base_folder(tmp_path / "llama"), tmp_path / "v1.pth"]
    convert_pictured(folders, tmp_path / "out", pickles=True)
    assert write_release(tmp_path / "out", tmp_path / "back") == "adapter_v1"
    convert_pictured(folders, tmp_path / "tanh", pickles=True, gate="tanh")
    with pytest.raises(ValueError, match=r"nearest, adapter_v1, differs in: prefix gate tanh, and not raw"):
        write_release(tmp_path / "tanh", tmp_path / "x")
    for spec, name in (
        (NormSpec(), "layers.0.attention_norm.weight"),
        (BiasSpec(("wq",)), "layers.0.attention.wq.bias"),
        (LoraSpec(2), "layers.0.attention.wk.delta.a.weight"),
    ):
        top = build.build(build.ModelConfig(base=str(tmp_path / "out"), tuning=(spec,)), train=True)
        build.save(top, tmp_path / spec.kind)
        with pytest.raises(ValueError, match=rf"adapter_v1, differs in: trained beside the prefixes: backbone\.{name}"):
            write_release(tmp_path / spec.kind, tmp_path / "x")
    convert = ["convert", str(folders[0]), str(tmp_path / "bgr"), "--to", "model", "--overlay", str(folders[1])]
    assert main([*convert, "--bgr"]) == 2
    assert "bgr is for what a model sees with, and this adapter_v1 has no encoder" in capsys.readouterr().err
    assert not (tmp_path / "bgr").exists()


def test_what_the_base_has_learned_is_in_the_file(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stage on a folder with prefixes, a resampler and LoRA: the file holds all of it, its own on top."""
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path))
    v2_folder(tmp_path)
    stage = build.ModelConfig(base=str(tmp_path / "out"), tuning=(TrainSpec(("backbone.*.prefix.tokens",)),))
    top = build.build(stage, train=True)
    for p in (p for p in top.net.parameters() if p.requires_grad):
        p.data.mul_(-1)
    build.save(top, tmp_path / "top")
    assert write_release(tmp_path / "top", tmp_path / "back") == "adapter_v2"
    again = read_files([tmp_path / "back" / "adapter_v2.pth"], pickles=True).state
    _, state = parts("adapter_v2")
    assert set(again) == set(state)
    assert torch.equal(again["adapter_query.weight"], -state["adapter_query.weight"])
    others = [k for k in state if "gate" not in k and k != "adapter_query.weight"]
    assert all(torch.equal(again[k], state[k]) for k in others)
    # and the file is the model that was trained, which its base is not
    back = [tmp_path / "llama", tmp_path / "back" / "adapter_v2.pth", tmp_path / "clip.pt"]
    convert_pictured(back, tmp_path / "again", cache=tmp_path, pickles=True)
    said = [scores(build.load(tmp_path / n).net) for n in ("again", "top", "out")]
    torch.testing.assert_close(said[0], said[1], rtol=1e-5, atol=1e-5)
    assert (said[1] - said[2]).abs().max() > 1e-3
    # another base than that, and LoRA over its LoRA
    build.write_config(tmp_path / "top", replace(top.config, base_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"out is not what .*top was trained on: SHA-256"):
        write_release(tmp_path / "top", tmp_path / "x")
    build.write_config(tmp_path / "top", replace(top.config, tuning=(LoraSpec(2),)))
    with pytest.raises(ValueError, match=r"top has LoRA over that of its base .*out"):
        write_release(tmp_path / "top", tmp_path / "x")


def test_red_and_blue_may_be_exchanged(small: None, tmp_path: Path) -> None:
    v2_folder(tmp_path)
    folders = [tmp_path / "llama", tmp_path / "v2.pth", tmp_path / "clip.pt"]
    convert_pictured(folders, tmp_path / "bgr", cache=tmp_path, pickles=True, bgr=True)
    plain, turned = (build.load(tmp_path / n, cache=tmp_path).net.tower for n in ("out", "bgr"))
    assert plain is not None
    assert turned is not None
    tiles = torch.rand(1, 3, 32, 32)
    assert torch.equal(turned(tiles).patches, plain(tiles.flip(1)).patches)
    assert not torch.equal(turned(tiles).patches, plain(tiles).patches)


def test_chat65b_is_joined_from_its_ranks(small: None, tmp_path: Path) -> None:
    """Shards of the chat model over shards of LLaMA: biases and scales are cut where their linear is."""
    base, state = parts("adapter_v2_chat65b")
    source = base_folder(tmp_path / "llama", ranks=2)
    folder = tmp_path / "chat"
    folder.mkdir()
    for rank, shard in enumerate(split_shards({spelled(k): v for k, v in state.items()}, 2)):
        own = {re.sub(r"\.input_scale$", "_scale", re.sub(r"\.bias$", "_bias", k)): v for k, v in shard.items()}
        assert own["layers.0.attention.wq_scale"].shape == (32,)
        assert own["layers.0.attention.wo_scale"].shape == (16,)
        torch.save({k: v.clone() for k, v in own.items()}, folder / f"rank{rank}.pth")
    config = convert_pictured([source, folder], tmp_path / "out", pickles=True)
    assert config.tower is None
    made = build.load(tmp_path / "out")
    with torch.no_grad():
        expected = Plain(base, state, "adapter_v2_chat65b")(0.0)
    torch.testing.assert_close(scores(made.net), expected, rtol=1e-4, atol=1e-4)
    torch.save({**torch.load(folder / "rank1.pth"), "norm.weight": torch.zeros(32)}, folder / "rank1.pth")
    with pytest.raises(ValueError, match=r"norm\.weight \(differs between shards"):
        read_release(source, [folder], pickles=True)


def test_a_checkpoint_that_was_not_cut_down_is_read(small: None) -> None:
    """LLaMA's own tensors beside the adapter's take the place of the base's."""
    base, state = parts("adapter_v1")
    moved = {k: v + 0.1 for k, v in base.items()}
    whole = assemble(lay_over(SMALL, base, Found({**moved, **state})), None)
    apart = assemble(lay_over(SMALL, moved, Found(state)), None)
    assert torch.equal(scores(whole), scores(apart))
    assert (scores(whole) - scores(laid("adapter_v1"))).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"1 mis-shaped: layers\.1\.attention\.wo\.weight"):
        lay_over(SMALL, base, Found({**moved, **state, "layers.1.attention.wo.weight": torch.ones(3)}))
