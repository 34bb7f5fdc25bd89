"""Weights in and out: tensor-parallel shards, our own layout, the convert command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accessory.__main__ import main
from accessory.backbone import hf, keys, meta, store, weights
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.sizes import SIZES
from accessory.nn.linear import Linear
from accessory.nn.rope import RopeScaling
from accessory.parallel.axes import merge_shards, shard_rule, split_shards
from tests.tiny import tiny_tokenizer
from tests.tiny_backbone import TINY, equal, model, write_gguf


def run(*args: object) -> int:
    return main(["convert", *map(str, args)])


@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_our_layout_round_trips(tmp_path: Path, limit: int) -> None:
    config = dataclasses.replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, attention_factor=1.1), window=6)
    m = model(config)
    weights.save_accessory(config, m.state_dict(), tmp_path / "out", max_shard_bytes=limit)
    again = weights.load_backbone(tmp_path / "out")
    assert again.config == config
    assert not again.training
    assert equal(again.state_dict(), m.state_dict())
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (limit == 20_000)
    assert all(p.requires_grad for p in again.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # no temporary folder stays


def test_loaded_weights_are_mapped_and_private(tmp_path: Path) -> None:
    m = model()
    weights.save_accessory(TINY, m.state_dict(), tmp_path / "out")
    first, second = weights.load_backbone(tmp_path / "out"), weights.load_backbone(tmp_path / "out")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "model.safetensors" in maps.read_text()
    with torch.no_grad():  # writing (training) touches our copy of the page, not the file
        first.norm.weight.zero_()
    assert torch.equal(second.norm.weight, m.norm.weight)
    assert torch.equal(weights.load_backbone(tmp_path / "out").norm.weight, m.norm.weight)


def test_dtype_is_applied_or_unified(tmp_path: Path) -> None:
    state = {k: v if "norm" in k else v.bfloat16() for k, v in model().state_dict().items()}
    weights.save_accessory(TINY, state, tmp_path / "out")
    assert {p.dtype for p in weights.load_backbone(tmp_path / "out").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in weights.load_backbone(tmp_path / "out", dtype=torch.float32).parameters()} == {
        torch.float32
    }


def fill_delta(m: Llama) -> None:
    m.layers[0].attention.wq.delta = Linear(64, 64)


def fill_delta_without_parameters(m: Llama) -> None:
    m.layers[0].attention.wq.delta = torch.nn.Identity()


def fill_scale(m: Llama) -> None:
    m.layers[1].feed_forward.w1.scale = torch.nn.Parameter(torch.ones(96))


def fill_bias(m: Llama) -> None:
    m.layers[1].attention.wo.bias = torch.nn.Parameter(torch.zeros(64))


def fill_prefix(m: Llama) -> None:
    m.layers[1].attention.prefix = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (fill_delta, "layers.0.attention.wq.delta"),
        (fill_delta_without_parameters, "layers.0.attention.wq.delta"),
        (fill_scale, "layers.1.feed_forward.w1.scale"),
        (fill_bias, "layers.1.attention.wo.bias"),
        (fill_prefix, "layers.1.attention.prefix"),
    ],
)
def test_filled_slots_are_never_dropped_silently(tmp_path: Path, fill: object, named: str) -> None:
    m = model()
    hf.save_hf(m, tmp_path / "plain")
    fill(m)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"{named}.*merge"):
        hf.save_hf(m, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_copies_the_tokenizer_and_its_ids(tmp_path: Path) -> None:
    source = tmp_path / "tok"
    source.mkdir()
    vocab = {"model": {"vocab": {"<s>": 3}}, "added_tokens": [{"content": "<|end|>", "id": 9}]}
    (source / "tokenizer.json").write_text(json.dumps(vocab))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "<|end|>"}}))
    hf.save_hf(model(), tmp_path / "out", tokenizer_dir=source)
    for name in ("config.json", "generation_config.json"):
        written = store.read_json(tmp_path / "out" / name)
        assert [written[k] for k in hf.SPECIAL] == [3, 9, None]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == json.dumps(vocab)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        hf.save_hf(model(), tmp_path / "out2", tokenizer_dir=tmp_path / "out2")


def test_a_killed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.store, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store.os, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        hf.save_hf(model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_conversions_stays(tmp_path: Path) -> None:
    final = tmp_path / "cache"
    with store.atomic_folder(final, keep_existing=True) as slow:
        with store.atomic_folder(final, keep_existing=True) as fast:
            (fast / store.MARKER).write_text("fast")
        (slow / store.MARKER).write_text("slow")
    assert (final / store.MARKER).read_text() == "fast"
    assert list(tmp_path.iterdir()) == [final]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    hf.save_hf(model(), tmp_path / "out")  # empty is fine
    with pytest.raises(ValueError, match="not an empty folder"):
        hf.save_hf(model(), tmp_path / "out")


def save_pickles(folder: Path, m: Llama, count: int, style: str, **params: object) -> None:
    folder.mkdir()
    for rank, shard in enumerate(split_shards(m.state_dict(), count)):
        shard = {k: v.clone() for k, v in shard.items()}
        if style == "meta":
            torch.save(shard | {"rope.freqs": torch.zeros(8)}, folder / f"consolidated.{rank:02d}.pth")
        else:
            value = {"model": {f"llma.{k}": v for k, v in shard.items()}}
            torch.save(value, folder / f"consolidated.{rank:02d}-of-{count:02d}.model.pth")
    c = m.config
    stated = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": c.multiple_of, "vocab_size": -1}
    name = "params.json" if style == "meta" else "config.json"
    (folder / name).write_text(json.dumps(stated | params))


RULE = dataclasses.replace(TINY, ffn_dim=None, multiple_of=32)  # Meta's files state the rule, not the width


@pytest.mark.parametrize("style", ["meta", "accessory"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_of_every_degree_merge(tmp_path: Path, style: str, count: int) -> None:
    m = model(RULE)
    save_pickles(tmp_path / "in", m, count, style)
    config, tensors = weights.read_folder(tmp_path / "in", pickles=True)
    assert config == RULE
    assert equal(tensors, dict(m.state_dict()))
    with pytest.raises(ValueError, match="accessory convert"):  # pickles only where they are asked for
        weights.load_backbone(tmp_path / "in")


def test_shard_axes_are_the_published_ones() -> None:
    axes = {k.removeprefix("layers.0."): shard_rule(k) for k in keys.expected_shapes(RULE) if "layers.1" not in k}
    assert axes == {
        "tok_embeddings.weight": 1,
        "attention.wq.weight": 0,
        "attention.wk.weight": 0,
        "attention.wv.weight": 0,
        "attention.wo.weight": 1,
        "feed_forward.w1.weight": 0,
        "feed_forward.w2.weight": 1,
        "feed_forward.w3.weight": 0,
        "attention_norm.weight": None,
        "ffn_norm.weight": None,
        "norm.weight": None,
        "output.weight": 0,
    }
    assert shard_rule("layers.0.attention.wq.bias") == 0
    assert shard_rule("layers.0.attention.wo.bias") is None


def test_arguments_of_meta_and_accessory(tmp_path: Path) -> None:
    stated = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": None, "max_seq_len": 99, "rope_theta": 1e6}
    config = meta.from_meta_params(stated | {"rope_scaling": 0.25, "lora_rank": -1}, 40)
    assert (config.kv_heads, config.max_length, config.rope_theta) == (4, 99, 1e6)
    assert config.rope_scaling == RopeScaling("linear", 4.0)
    with pytest.raises(ValueError, match="moe"):
        meta.from_meta_params(stated | {"moe": {"num_experts": 8}}, 40)
    with pytest.raises(ValueError, match="the arguments miss dim"):
        meta.from_meta_params({"n_layers": 2, "n_heads": 4}, 40)
    with pytest.raises(ValueError, match="use_scaled_rope"):
        meta.from_meta_params(stated | {"use_scaled_rope": True}, 40)
    published = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5}
    small = meta.from_meta_params(published | {"use_scaled_rope": True, "rope_theta": 5e5}, 128256, tied=True)
    assert small.rope_scaling == SIZES["llama3.2-1b"].rope_scaling
    assert small.hidden_width == 8192


def test_split_needs_divisible_dimensions(tmp_path: Path) -> None:
    state = model().state_dict()
    assert equal(merge_shards(split_shards(state, 2)), dict(state))
    with pytest.raises(ValueError, match=r"tensor-parallel 3 does not divide .*wq.weight \(64, 64\)"):
        split_shards(state, 3)
    with pytest.raises(ValueError, match="must divide the heads of the model: 4 and 2"):
        meta.save_shards(TINY, state, tmp_path / "x", 4)


def test_convert_chain_keeps_every_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = model(RULE)
    save_pickles(tmp_path / "a", m, 2, "meta")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"spm")
    assert run(tmp_path / "a", tmp_path / "b", "--to", "hf") == 0
    assert run(tmp_path / "b", tmp_path / "c", "--tensor-parallel", 2) == 0
    assert run(tmp_path / "c", tmp_path / "d", "--max-shard-gb", 0.00002) == 0
    for name in "bcd":
        again = weights.load_backbone(tmp_path / name)
        assert equal(again.state_dict(), m.state_dict()), name
        assert (tmp_path / name / "tokenizer.model").read_bytes() == b"spm"
    assert len(list((tmp_path / "c").glob("consolidated.0?-of-02.model.safetensors"))) == 2
    assert "parameters (read as meta)" in capsys.readouterr().out


def test_convert_casts_gguf_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "x.gguf", model())
    assert run(path, tmp_path / "a", "--from", "gguf", "--dtype", "float16") == 0
    assert {p.dtype for p in weights.load_backbone(tmp_path / "a").parameters()} == {torch.float16}
    capsys.readouterr()
    assert run(path, tmp_path / "b", "--to", "hf", "--tensor-parallel", 2) == 2
    assert "needs --to accessory" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "b", "--debug") == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "Traceback" in error
    assert run(path, tmp_path / "b", "--tokenizer", tmp_path / "nowhere") == 2
    assert not (tmp_path / "b").exists()


def test_the_tool_is_the_command(tmp_path: Path) -> None:
    tool = Path(__file__).parents[3] / "tools" / "convert.py"
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True, check=True)
    assert "--tensor-parallel" in done.stdout
    wrong = subprocess.run([sys.executable, str(tool), "/nowhere", str(tmp_path / "b")], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")


TAKEN = {
    "accessory": "dtype quantize tensor-parallel tokenizer max-shard-gb tolerance skip-gate from overlay",
    "hf": "dtype tokenizer max-shard-gb tolerance skip-gate from overlay",
    "reference": "dtype tensor-parallel tokenizer tolerance skip-gate from overlay sparse",
    "model": "tokenizer tolerance skip-gate from overlay llama-type prefix-gate clip-activation bgr",
    "trained accessory": "dtype quantize base tolerance skip-gate",
    "trained reference": "",
}
GIVEN = {
    "from": ["meta"], "overlay": ["x"], "sparse": [], "dtype": ["float16"], "quantize": ["int8"], "base": ["x"],
    "tensor-parallel": ["2"], "tokenizer": ["x"], "max-shard-gb": ["1"], "tolerance": ["0"], "skip-gate": [],
    "llama-type": ["adapter_v1"], "prefix-gate": ["raw"], "clip-activation": ["gelu"], "bgr": [],
}  # fmt: skip


@pytest.mark.parametrize("way", TAKEN)
@pytest.mark.parametrize("option", GIVEN)
def test_an_option_that_a_way_does_not_heed_is_refused(
    way: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    if way.startswith("trained"):
        (source / "config.yaml").write_text("")
    assert run(source, tmp_path / "out", "--to", way.split()[-1], f"--{option}", *GIVEN[option]) == 2
    refused = f"--{option} needs" in capsys.readouterr().err
    assert refused == (option not in TAKEN[way].split())  # otherwise it is the empty folder that is wrong


def test_a_tokenizer_with_more_ids_than_rows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, code in ((100, 2), (360, 0)):
        config = LlamaConfig(dim=32, n_layers=1, n_heads=4, vocab_size=size, multiple_of=16)
        source = tmp_path / str(size)
        weights.save_accessory(config, dict(Llama(config).state_dict()), source)
        tiny_tokenizer(source)
        assert run(source, tmp_path / f"out{size}") == code
    assert "has 360 ids and the model 100 rows" in capsys.readouterr().err
    assert not (tmp_path / "out100").exists()
