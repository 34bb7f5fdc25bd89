"""The equality gate lets the same model through, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from accessory.__main__ import main
from accessory.backbone import hf, meta
from accessory.backbone.weights import load_backbone, save_accessory
from accessory.models.gate import GateError, check, difference, drawings, guarded, hold, measure, merge_checked
from accessory.nn.linear import Linear
from accessory.peft import lora
from accessory.peft.attach import LoraSpec, attach, attached
from tests.tiny import tiny_model
from tests.tiny_backbone import TINY, model


def test_the_same_model_passes_and_a_changed_weight_does_not(tmp_path: Path) -> None:
    net = model()
    before = measure(net)
    assert difference(before, measure(net)) == 0
    with torch.no_grad():
        net.layers[1].feed_forward.w2.weight[3, 5] += 0.5
    with pytest.raises(GateError, match="moved by"):
        check(before, measure(net), "touching")
    assert check(before, measure(net), "touching", tolerance=10.0) > 0


def test_what_is_no_number_never_passes() -> None:
    net = model()
    before = measure(net)
    with torch.no_grad():
        net.norm.weight[0] = float("nan")
    assert difference(before, measure(net)) == float("inf")
    with pytest.raises(GateError):
        check(before, measure(net), "spoiling", tolerance=1e9)


def test_a_model_that_sees_is_asked_with_pictures(tmp_path: Path) -> None:
    seeing = tiny_model(tmp_path)
    before = measure(seeing)
    assert len(before.logits) == 6
    assert [d.size for d in drawings()] == [(96, 60), (50, 120)]
    assert seeing.net.projector is not None
    with torch.no_grad():
        for p in seeing.net.projector.parameters():
            p.mul_(1.5)
    after = measure(seeing)
    # The texts alone would not have noticed.
    assert all(torch.equal(a, b) for a, b in zip(before.logits[:4], after.logits[:4], strict=True))
    with pytest.raises(GateError):
        check(before, after, "changing the projector")


def test_measuring_leaves_the_mode_alone() -> None:
    net = model().train()
    measure(net)
    assert net.training


def test_what_fails_is_removed(tmp_path: Path) -> None:
    net, out = model(), tmp_path / "out"
    save_accessory(TINY, net.state_dict(), out)
    assert hold(measure(net), out, "saving") < 1e-5
    other = model()
    with pytest.raises(GateError, match="was removed"):
        hold(measure(other), out, "saving")
    assert not out.exists()


def test_what_cannot_be_opened_is_removed(tmp_path: Path) -> None:
    net, out = model(), tmp_path / "out"
    save_accessory(TINY, net.state_dict(), out)
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(GateError, match="cannot be opened"):
        hold(measure(net), out, "saving")
    assert not out.exists()


def tuned() -> torch.nn.Module:
    net = model()
    attach(net, [LoraSpec(rank=2)])
    for name, p in net.named_parameters():
        if "delta" in name:
            torch.nn.init.normal_(p, std=0.2)
    return net


def test_merging_goes_through_the_gate() -> None:
    net = tuned()
    assert merge_checked(net) < 1e-5  # type: ignore[arg-type]
    assert attached(net) == ()


def test_a_broken_merge_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tuned()
    before, state = measure(net), {k: v.clone() for k, v in net.state_dict().items()}  # type: ignore[arg-type]
    monkeypatch.setattr(lora.LowRank, "matrix", lambda self: -(self.b.weight @ self.a.weight))
    monkeypatch.setattr(lora, "folding_error", lambda linear: 0.0)  # the check of a single layer sees nothing
    with pytest.raises(GateError, match="merging"):
        merge_checked(net)  # type: ignore[arg-type]
    assert difference(before, measure(net)) == 0  # type: ignore[arg-type]
    assert net.state_dict().keys() == state.keys()
    assert [spec.kind for spec in attached(net)] == ["lora"]


def test_changes_in_place_are_measured() -> None:
    net = model()

    def halve() -> str:
        for m in net.modules():
            if isinstance(m, Linear):
                m.weight.data.mul_(0.5)
        return "done"

    with pytest.raises(GateError, match="halving"):
        guarded(net, halve, "halving")
    assert guarded(net, lambda: "nothing", "nothing") == ("nothing", 0.0)


@pytest.mark.parametrize("options", [["--to", "hf"], ["--tensor-parallel", "2"], ["--dtype", "bfloat16"]])
def test_conversions_state_what_moved(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_accessory(TINY, model().state_dict(), tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    assert "logits of the fixed prompts: moved by" in capsys.readouterr().out
    assert load_backbone(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "module", "name", "broken"),
    [
        (["--to", "hf"], hf, "halve", lambda x, width: x),
        (
            ["--tensor-parallel", "2"],
            meta,
            "split_shards",
            lambda tensors, n: [dict(s) for s in reversed(_SPLIT(tensors, n))],
        ),
    ],
)
def test_a_broken_conversion_is_caught(
    options: list[str],
    module: object,
    name: str,
    broken: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_accessory(TINY, model().state_dict(), tmp_path / "in")
    monkeypatch.setattr(module, name, broken)
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), *options]
    assert main(arguments) != 0
    assert "moved by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--skip-gate"]) == 0  # the gate it was that refused
    assert (tmp_path / "out").exists()


_SPLIT = meta.split_shards
