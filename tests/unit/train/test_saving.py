"""Checkpoints are written beside training, and become what a run would have exported."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accessory.peft.attach import trainable_state
from accessory.train import checkpoint
from accessory.train.config import EmaConfig, TrainConfig
from accessory.train.consolidate import model_folder
from accessory.train.loop import Hooks, Trainer, train
from accessory.train.optim import Optimizer
from tests.toy import ToyModel, ToySource, toy_model, toy_objective


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, lr=0.05, checkpoint_every=2, log_every=2, precision="fp32",
        tensorboard=False, keep_last=9,
    )  # fmt: skip


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("beside", [True, False])
def test_training_goes_on_while_a_checkpoint_is_written(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    trainer = Trainer(toy_model(), ToySource(), toy_objective, replace(config, save_beside=beside), Hooks())
    real, seen = checkpoint.storage.write, []

    def slow(*args: Any) -> Any:
        limit = time.monotonic() + (20 if beside else 0.1)
        while not seen and trainer.step < 4 and time.monotonic() < limit:
            time.sleep(0.001)
        seen.append(trainer.step)
        return real(*args)

    monkeypatch.setattr(checkpoint.storage, "write", slow)
    trainer.run()
    assert seen[0] == (4 if beside else 2)  # it waits for the first save when it comes to the second
    assert len(checkpoint.complete(config.output_dir)) == 3
    monkeypatch.undo()
    peace = replace(config, output_dir=config.output_dir + "2")
    train(toy_model(), ToySource(), toy_objective, peace)
    for step in (2, 4):
        one, other = (checkpoint.load(checkpoint.folder(c.output_dir, step)).tensors() for c in (config, peace))
        assert equal(one, other)
        assert not equal(one, checkpoint.load(checkpoint.folder(config.output_dir, step + 2)).tensors())


class Blocks(ToyModel):
    """A matrix in a block, which Muon takes."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, ids: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, tiles) + self.output(self.blocks[0](self.embed(ids)).relu())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("beside", [True, False])
def test_every_optimizer_and_its_average_go_on_exactly(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, optimizer: Any, beside: bool
) -> None:
    config = replace(config, optimizer=optimizer, save_beside=beside, min_lr=config.lr, ema=EmaConfig(0.8))

    def run(folder: str, *stops: int, forgetful: bool = False) -> dict[str, Any]:
        for stop in stops:
            own = replace(config, output_dir=f"{config.output_dir}-{folder}", max_steps=stop)
            torch.manual_seed(0)
            model = Blocks()
            with monkeypatch.context() as patch:
                if forgetful:
                    patch.setattr(Optimizer, "load_state", lambda self, state: None)
                path = train(model, ToySource(), toy_objective, own, resume="auto").checkpoint
        return checkpoint.load(path).tensors()

    whole = run("whole", 6)
    assert any("momentum_buffer/blocks" in name for name in whole) is (optimizer == "muon")
    assert any("exp_avg/" in name for name in whole)
    assert equal(run("parts", 3, 4, 6), whole)
    assert not equal(run("forgetful", 3, 6, forgetful=True), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_becomes_the_folder_that_would_have_been_exported(
    config: TrainConfig, tmp_path: Path, dtype: torch.dtype
) -> None:
    hooks = Hooks(texts={"config.yaml": "model: {}\n"}, export=trainable_state)
    for ema in (None, EmaConfig(0.5), EmaConfig(0.5, export=False)):
        own = replace(config, ema=ema, output_dir=str(tmp_path / f"run{ema}"))
        result = train(toy_model(dtype=dtype), ToySource(), toy_objective, own, hooks=hooks)
        made = tmp_path / f"made{ema}"
        model_folder(result.checkpoint, made)
        assert result.final is not None
        assert {p.name: p.read_bytes() for p in made.iterdir()} == {
            p.name: p.read_bytes() for p in result.final.iterdir()
        }
        state = load_file(made / "trainable.safetensors")
        assert {t.dtype for t in state.values()} == {dtype}
        trained = {n: t.to(dtype) for n, t in checkpoint.load(result.checkpoint).trainable.items()}
        assert equal(state, trained) is (ema is None or not ema.export)
    more = Hooks(texts=hooks.texts, export=lambda model: dict(model.named_parameters()))
    result = train(toy_model(), ToySource(), toy_objective, replace(config, max_steps=1, warmup_steps=0), hooks=more)
    with pytest.raises(ValueError, match=r"2 tensors of what its run exports do not train.*frozen\.bias"):
        model_folder(result.checkpoint, tmp_path / "other")
