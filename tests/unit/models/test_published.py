"""Published types as values, and their full lists of tensors through the importer, on `meta`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES
from accessory.models import published_keys
from accessory.models.published import LLAMA_TYPES, find_type, trains
from accessory.models.reference import assemble, read_published, text_specs
from accessory.peft.attach import trainable_state
from accessory.vision.presets import PRESETS
from tools import presets

SMALL: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 60, "multiple_of": 16}


def test_every_type_has_its_tower() -> None:
    assert len(LLAMA_TYPES) == 19
    for kind, row in LLAMA_TYPES.items():
        assert row.tower is None or row.tower in PRESETS, kind
        assert (row.tower is None) == (not row.encoders), kind
    with pytest.raises(ValueError, match="llama_type 'lama' is not one of llama, llama_peft"):
        find_type("lama")


def test_full_sizes_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """SPHINX, its light version, the adapter and a single CLIP: every encoder and every kind of joint."""
    assert presets.main(["llama", "llama_adapter", "llama_ens5", "llama_ens_light"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines[1:5]}
    assert cells["llama_ens5"][3:6] == ["5", "1445", "1455"]
    assert cells["llama_ens5"][8:11] == ["13,015,864,320", "16,462,228,609", "2349"]
    assert cells["llama"][6] == "427,616,513"
    assert cells["llama_ens_light"][6] == "1,979,878,784"
    assert lines[-1] == "4 types, every number as published"


def test_the_table_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(presets.POSITIONS, "llama", 256)
    assert presets.main(["llama"]) == 1
    assert "llama: positions are 257, published are 256" in capsys.readouterr().out


def test_a_shard_of_the_released_file_has_its_size() -> None:
    """Half of the cut tensors, all of the others, in bf16: 19,909,007,618 bytes were counted in SPHINX-1k's shards."""
    shapes = published_keys.checkpoint("llama_ens5", SIZES["llama2-13b"])
    cut = re.compile(r"llma\.(layers\.\d+\.(attention|feed_forward)\.w\d?[qkvo]?|tok_embeddings|output)\.weight")
    halves = {n: s for n, s in shapes.items() if cut.fullmatch(n)}
    whole = {n: s for n, s in shapes.items() if n not in halves}
    assert len(halves) == 40 * 7 + 2
    assert published_keys.count(halves) + 2 * published_keys.count(whole) == 19_909_007_618


def test_a_missing_and_an_odd_key_are_listed() -> None:
    args = presets.arguments(SIZES["tinyllama-1.1b"])
    shapes = published_keys.checkpoint("llama_ens_light", SIZES["tinyllama-1.1b"])
    state = published_keys.on_meta(shapes)
    for change, message in (
        (lambda s: s.pop("llma.visual_proj.1.bias"), r"missing visual_proj\.1\.bias"),
        (lambda s: s.pop("llma.layers.3.attention.wo.weight"), r"missing layers\.3\.attention\.wo\.weight"),
        (lambda s: s.pop("llma.dinov2_vitg14.norm.bias"), r"missing members\.dinov2_vitg14\.model\.layernorm\.bias"),
        (lambda s: s.update({"llma.layers.0.extra": torch.empty(1)}), "no place in a text model: layers.0.extra"),
        (lambda s: s.update({"llma.visual_proj.2.bias": torch.empty(1)}), r"unexpected visual_proj\.2\.bias"),
    ):
        spoilt = dict(state)
        change(spoilt)
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            assemble(read_published(spoilt, args, "llama_ens_light"), presets.tower_of("sphinx-light"))


def names(kind: str, **args: Any) -> set[str]:
    """What trains in a small language model of that type, without its vision part."""
    args = {**SMALL, **args}
    specs = text_specs(args, kind)
    config = LlamaConfig(
        dim=32, n_layers=2, n_heads=4, vocab_size=60, multiple_of=16, max_length=2048
    )  # fmt: skip
    shapes = published_keys.language(config, specs)
    state = {n: torch.zeros(s) for n, s in shapes.items()}
    return {n.removeprefix("backbone.") for n in trainable_state(assemble(read_published(state, args, kind), None))}


def test_what_trains() -> None:
    def kinds(found: set[str]) -> set[str]:
        return {re.sub(r"layers\.\d+\.", "", n) for n in found}

    assert "tok_embeddings.weight" in names("llama")
    assert "tok_embeddings.weight" in names("llama_ens5")
    assert kinds(names("llama_ens_peft")) == {"attention_norm.weight", "ffn_norm.weight", "norm.weight"}
    peft = kinds(names("llama_ens_peft", bias_tuning=True, lora_rank=2))
    assert "attention.wq.bias" in peft
    assert "attention.wk.bias" not in peft
    assert "attention.wk.delta.a.weight" in peft
    assert "attention.wk.bias" in kinds(names("llama_qformerv2_peft"))
    assert "attention.prefix.tokens" in kinds(names("llama_adapter"))
    assert "attention.prefix.gate" not in kinds(names("llama_adapter", trainable_mode="mm_stage2"))
    assert "attention.wo.bias" in kinds(names("llama_adapter", trainable_mode="mm_stage2"))
    with pytest.raises(ValueError, match="trainable_mode 'all' is not one of sg, mm_stage1, mm_stage2"):
        trains("llama_adapter", {"trainable_mode": "all"})
    assert trains("llama_ens_light", {"trainable_mode": "mm_stage1"}) == ("projector.*",)
