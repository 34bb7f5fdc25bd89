"""LoRA folded into a model folder: the same model, and no delta left."""

from pathlib import Path

import pytest
import torch

from accessory.models import build
from accessory.models.folding import fold_folder
from accessory.models.gate import GateError, difference, measure
from accessory.peft import lora
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, PrefixSpec, ScaleSpec, TrainSpec, attached
from accessory.peft.lora import LowRank
from tests.tiny import tiny_model
from tools.merge_lora import main

TUNING = (
    LoraSpec(rank=2),
    ScaleSpec(),
    BiasSpec(),
    NormSpec(),
    PrefixSpec(length=2),
    TrainSpec(
        ("projector.*", "tower.*", "backbone.tok_embeddings.*", "backbone.output.*", "backbone.*.w[qkvo123].weight")
    ),
)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    made = tiny_model(tmp_path, train=True, tuning=TUNING)
    for name, p in made.net.named_parameters():
        if any(part in name for part in ("delta", "scale", "prefix", "bias")):
            torch.nn.init.normal_(p, std=0.2, mean=float("scale" in name))
    build.save(made, tmp_path / "tuned")
    return tmp_path / "tuned"


def test_the_folded_model_computes_the_same(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tuned.parent / "out"
    assert main([str(tuned), str(out)]) == 0
    assert "moved by" in capsys.readouterr().out
    before, after = build.load(tuned), build.load(out)
    assert difference(measure(before), measure(after)) < 1e-4
    assert [s.kind for s in attached(after.net)] == ["bias", "prefix", "train"]
    assert not any(isinstance(m, LowRank) for m in after.net.modules())
    # and the deltas mattered
    for m in before.net.modules():
        if isinstance(m, LowRank):
            torch.nn.init.zeros_(m.b.weight)
    assert difference(measure(before), measure(after)) > 1e-3
    assert main([str(out), str(tuned.parent / "again")]) == 1
    assert "nothing to fold" in capsys.readouterr().err


def test_a_wrong_fold_is_not_kept(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "folded", lambda linear: (linear.weight.detach(), linear.bias))
    monkeypatch.setattr(lora, "folding_error", lambda linear: 0.0)
    with pytest.raises(GateError, match="merging"):
        fold_folder(tuned, tuned.parent / "out")
    assert not (tuned.parent / "out").exists()


@pytest.mark.parametrize("layers", [1, None])
def test_lora_beside_plain_prefixes_is_folded_but_for_keys_and_values(tmp_path: Path, layers: int | None) -> None:
    """Those two keep theirs in every block, whichever blocks have a prefix, and the folder says so."""
    prefix = PrefixSpec(2, layers, plain=True)
    made = tiny_model(tmp_path, train=True, tuning=(LoraSpec(2), prefix, TUNING[-1]))
    for name, p in made.net.named_parameters():
        if "delta" in name or "prefix" in name:
            torch.nn.init.normal_(p, std=0.3)
    build.save(made, tmp_path / "tuned")
    fold_folder(tmp_path / "tuned", tmp_path / "out")
    before, after = build.load(tmp_path / "tuned"), build.load(tmp_path / "out")
    assert difference(measure(before), measure(after)) < 1e-4
    assert attached(after.net)[:2] == (LoraSpec(2, targets=("wk", "wv")), prefix)
    kept = [n for n, m in after.net.named_modules() if isinstance(m, LowRank)]
    assert {n.split(".")[-2] for n in kept} == {"wk", "wv"}
    assert len(kept) == 2 * len(after.net.backbone.layers)
    # and what was kept matters
    for m in after.net.modules():
        if isinstance(m, LowRank):
            torch.nn.init.zeros_(m.b.weight)
    assert difference(measure(before), measure(after)) > 1e-3
    keys = LoraSpec(2, targets=("wk", "wv"))
    build.save(tiny_model(tmp_path / "kv", train=True, tuning=(keys, prefix)), tmp_path / "keys")
    with pytest.raises(ValueError, match="nothing to fold"):
        fold_folder(tmp_path / "keys", tmp_path / "again")
