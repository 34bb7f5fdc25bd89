"""Parameter names are an interface: checkpoints hold them. A change of this list needs a converter of old files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.__main__ import VERBS, main
from accessory.backbone.llama import Llama
from accessory.backbone.sizes import SIZES
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, PrefixSpec, ScaleSpec, attach
from tests.structure.source import ROOT
from tests.tiny import tiny_model

GOLDEN = Path(__file__).parent / "keys_tiny.txt"


def listing(folder: Path) -> str:
    """Name and shape of everything in a tiny model with every slot filled."""
    model = tiny_model(folder)
    attach(model.net, (LoraSpec(rank=2), PrefixSpec(length=3, new_gate=True), BiasSpec(), ScaleSpec(), NormSpec()))
    return "".join(f"{k} {'x'.join(map(str, v.shape)) or '-'}\n" for k, v in model.net.state_dict().items())


def test_names_of_the_tiny_model(tmp_path: Path) -> None:
    found, wanted = listing(tmp_path).splitlines(), GOLDEN.read_text(encoding="utf-8").splitlines()
    assert len(wanted) > 60
    assert sorted(set(wanted) - set(found)) == [], "names or shapes that old checkpoints hold are gone"
    assert sorted(set(found) - set(wanted)) == [], "new names: add them to keys_tiny.txt"


def test_every_size_has_meta_llamas_names() -> None:
    assert len(SIZES) >= 10
    per_layer = {
        "attention.wq.weight", "attention.wk.weight", "attention.wv.weight", "attention.wo.weight",
        "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight",
        "attention_norm.weight", "ffn_norm.weight",
    }  # fmt: skip
    for name, config in SIZES.items():
        with torch.device("meta"):
            keys = set(Llama(config).state_dict())
        last = {k.removeprefix(f"layers.{config.n_layers - 1}.") for k in keys if f"layers.{config.n_layers - 1}." in k}
        wanted = set(per_layer)
        if config.moe is not None:  # as in Mixtral's own files: a router, and the three matrices of every expert
            one = {k.removeprefix("feed_forward.") for k in per_layer if k.startswith("feed_forward.")}
            wanted = {k for k in per_layer if not k.startswith("feed_forward.")} | {"feed_forward.gate.weight"}
            wanted |= {f"feed_forward.experts.{e}.{k}" for e in range(config.moe.experts) for k in one}
        if not config.gated:
            wanted.remove("feed_forward.w3.weight")
        if config.order == "parallel_one_norm":
            wanted.remove("ffn_norm.weight")
        assert wanted <= last, name
        assert all(k.endswith(".bias") for k in last - wanted), name
        assert {"tok_embeddings.weight", "norm.weight"} <= keys, name


@pytest.mark.parametrize("verb", [name for name, _ in VERBS])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m accessory {verb}" in shown
    assert f"for example: python -m accessory {verb} " in " ".join(shown.split())


def test_every_file_of_cli_is_a_verb() -> None:
    files = {p.stem for p in (ROOT / "accessory" / "cli").glob("*.py")} - {"__init__"}
    assert files == {name for name, _ in VERBS}
