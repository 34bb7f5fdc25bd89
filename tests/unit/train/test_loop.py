"""The loop: token-weighted windows, exact resume, budgets, export, metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accessory.train import checkpoint, loop
from accessory.train.blocks import checkpoint_blocks
from accessory.train.checkpoint import CheckpointError
from accessory.train.config import TrainConfig
from accessory.train.loop import Hooks, Trainer, TrainingDiverged, train
from tests.toy import ToyModel, ToySource, toy_batch, toy_model, toy_objective, weights


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, lr=0.05, warmup_steps=2, weight_decay=0.1, checkpoint_every=2,
        log_every=2, precision="fp32", tensorboard=False, seed=3,
    )  # fmt: skip


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def window_gradient(config: TrainConfig, source: ToySource, accumulation: int) -> dict[str, torch.Tensor]:
    trainer = Trainer(toy_model(), source, toy_objective, replace(config, accumulation=accumulation), Hooks())
    sums, *_ = trainer._accumulate()
    return {n: p.grad / sums["count"] for n, p in trainer.optimizer.masters.items() if p.grad is not None}


def test_accumulation_weighs_every_token_alike(config: TrainConfig) -> None:
    one = window_gradient(config, ToySource(8, pictures=False), 1)
    four = window_gradient(config, ToySource(2, pictures=False), 4)
    assert len(one) == 5  # the projector saw no picture
    for name in one:
        assert torch.allclose(one[name], four[name], atol=1e-7), name
    # And it matters: the mean of the four micro-batches' means is another gradient.
    model, parts = toy_model(), [toy_batch(range(i, i + 2), False) for i in (0, 2, 4, 6)]
    for batch in parts:
        loss, count, _ = toy_objective(model, batch)
        (loss / count / 4).backward()
    naive = model.output.weight.grad
    assert naive is not None
    assert (naive - one["output.weight"]).norm() > 0.01 * naive.norm()


def run(config: TrainConfig, resume: str | None = None, dropout: float = 0.3, **options: Any) -> ToyModel:
    model = toy_model(dropout=dropout, **options)
    train(model, ToySource(), toy_objective, config, resume=resume)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(config: TrainConfig, tmp_path: Path, dtype: torch.dtype) -> None:
    config = replace(config, log_every=3)  # rows that span a checkpoint
    whole = run(config, dtype=dtype)
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    for stop in (2, 4, 6):
        first = stop == 2  # what a resumed run starts from must not matter
        model = toy_model(dropout=0.3, dtype=dtype, seed=0 if first else stop)
        trainer = Trainer(model, ToySource(), toy_objective, parts, Hooks(), None if first else "auto")
        model.frozen.load_state_dict(whole.frozen.state_dict())
        stop_after(trainer, stop)
        trainer.run()
    assert equal(weights(model), weights(whole))
    a, b = (
        checkpoint.load(checkpoint.folder(config.output_dir, 6)),
        checkpoint.load(checkpoint.folder(parts.output_dir, 6)),
    )
    assert equal(a.trainable, b.trainable)
    assert equal(a.optimizer, b.optimizer)
    assert a.state["ranks"] == b.state["ranks"]
    timed = ("seconds", "tokens_per_s", "learned_tokens_per_s", "images_per_s", "data_wait", "data_wait_share")
    clean = [[{k: v for k, v in row.items() if k not in timed} for row in rows(c)] for c in (config, parts)]
    assert clean[0] == clean[1]
    assert [row["step"] for row in clean[0]] == [1, 3, 6]  # the first and the last in any case


def stop_after(trainer: Trainer, step: int) -> None:
    """End the run as a signal would."""
    agree = trainer._agree
    trainer._agree = lambda number: (agree(number)[0], 15 if trainer.step >= step < 6 else 0)  # type: ignore[method-assign]


def test_resume_matters(config: TrainConfig, tmp_path: Path) -> None:
    """Without the generators' states or the data cursor the end would be another."""
    whole = run(config)
    for lost in ("rng", "data"):
        other = replace(config, output_dir=str(tmp_path / lost))
        trainer = Trainer(toy_model(dropout=0.3), ToySource(), toy_objective, other, Hooks())
        stop_after(trainer, 2)
        trainer.run()
        path = checkpoint.folder(other.output_dir, 2) / "state.json"
        state = json.loads(path.read_text())
        fresh = checkpoint.load(checkpoint.folder(config.output_dir, 6)).state["ranks"][0]
        state["ranks"][0][lost] = fresh[lost]
        path.write_text(json.dumps(state))
        (path.parent / checkpoint.MARKER).write_text("2\n")  # without digests, as it once was
        assert not equal(weights(run(other, "auto")), weights(whole)), lost


def test_a_checkpoint_of_another_configuration_is_refused(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def start(text: str, steps: int, resume: str | None) -> int:
        own = replace(config, max_steps=steps)
        return train(toy_model(), ToySource(), toy_objective, own, resume=resume, hooks=Hooks(resolved=text)).step

    text = "model: {grid: [{size: 1}]}\ndata: {window: 1, workers: 0}\ntrain: {seed: 3, lr: 1, gone: 7}\n"
    start(text, 2, None)
    for old, new, said in (
        ("size: 1", "size: 2", r"step-000002 belongs .*model\.grid\.0\.size: 1 then, 2 now"),
        ("window: 1", "window: 4", "data.window: 1 then, 4 now"),
        ("seed: 3", "seed: 4", "train.seed: 3 then, 4 now"),
        ("[{size: 1}]", "[]", "model.grid: "),
    ):
        with pytest.raises(ValueError, match=said):
            start(text.replace(old, new), 4, "auto")
    with caplog.at_level("INFO", logger="accessory"):
        free = text.replace("lr: 1", "lr: 2").replace("workers: 0", "workers: 2").replace("gone: 7", "come: 8")
        assert start(free, 4, "auto") == 4
    assert "train.lr: 1 then, 2 now" in caplog.text
    assert "data.workers: 0 then, 2 now" in caplog.text
    assert "gone" not in caplog.text
    assert "come" not in caplog.text


def test_lines_after_the_resumed_checkpoint_are_cut(config: TrainConfig) -> None:
    run(config)
    before = rows(config)
    for path in checkpoint.complete(config.output_dir)[1:]:
        (path / checkpoint.MARKER).unlink()  # as if it had died before the save of step 6
    assert checkpoint.latest(config.output_dir) == checkpoint.folder(config.output_dir, 4)
    run(config, "auto")
    assert [r["step"] for r in rows(config)] == [r["step"] for r in before] == [1, 2, 4, 6]
    assert rows(config)[-1]["loss"] == before[-1]["loss"]


def test_metrics_row(config: TrainConfig) -> None:
    result = train(toy_model(), ToySource(), toy_objective, replace(config, accumulation=2))
    found = rows(config)
    assert found[-1] == pytest.approx(dict(result.row))
    names = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "learned_tokens_per_s", "images_per_s", "seconds"}
    assert names | {"data_wait", "data_wait_share", "accuracy"} == found[0].keys()
    first = found[0]
    assert first["images_per_s"] / first["tokens_per_s"] == pytest.approx(2 / 12)  # 2 tiles, 2 x 6 positions a batch
    assert 1.5 < first["loss"] < 4
    assert 0 <= first["accuracy"] <= 1


def test_checkpoint_contents_pruning_and_export(config: TrainConfig) -> None:
    hooks = Hooks(resolved="train: {}\n", texts={"config.yaml": "model: {}\n", "run.yaml": "train: {}\n"})
    result = train(toy_model(), ToySource(), toy_objective, config, hooks=hooks)
    root = Path(config.output_dir)
    assert [p.name for p in checkpoint.complete(root)] == ["step-000004", "step-000006"]
    assert {p.name for p in root.iterdir()} == {"step-000004", "step-000006", "final", "metrics.jsonl"}
    texts = {"config.yaml", "versions.json", "final-config.yaml", "final-run.yaml"}
    names = {"state.json", *texts, "COMPLETE", "shard-00001-model-00001-of-00001.safetensors"}
    assert {p.name for p in result.checkpoint.iterdir()} == names
    assert (result.checkpoint / "config.yaml").read_text() == "train: {}\n"
    assert json.loads((result.checkpoint / "versions.json").read_text())["torch"]
    assert result.final == root / "final"
    own = {p.name: p.read_text() for p in result.final.iterdir() if p.suffix == ".yaml"}
    assert own == {"config.yaml": "model: {}\n", "run.yaml": "train: {}\n"}
    assert (result.final / "versions.json").is_file()
    exported = load_file(result.final / "trainable.safetensors")
    assert equal(exported, dict(checkpoint.load(result.checkpoint).trainable))
    assert "frozen.weight" not in exported


def test_a_new_run_never_overwrites_an_old_one(config: TrainConfig, tmp_path: Path) -> None:
    run(config)
    with pytest.raises(CheckpointError, match="--resume auto, or choose another output_dir"):
        run(config)
    with pytest.raises(CheckpointError, match="step-000006 would be overwritten"):
        run(config, str(checkpoint.folder(config.output_dir, 4)))
    other = replace(config, output_dir=str(tmp_path / "other"))
    assert equal(weights(run(other, str(checkpoint.folder(config.output_dir, 4)))), weights(run(config, "auto")))
    with pytest.raises(CheckpointError, match="neither a complete checkpoint"):
        run(replace(config, output_dir=str(tmp_path / "new")), str(tmp_path / "nowhere"))


def test_resume_refuses_another_model(config: TrainConfig, tmp_path: Path) -> None:
    run(config)
    model = toy_model()
    model.frozen.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"1 names missing \['frozen.bias'\]"):
        train(model, ToySource(), toy_objective, config, resume="auto")
    with pytest.raises(ValueError, match=r"embed.weight has shape \[11, 8\], not \[11, 16\]"):
        train(toy_model(width=16), ToySource(), toy_objective, config, resume="auto")


def test_time_budget(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(loop.time, "monotonic", clock)
    timed = replace(config, max_steps=10_000, max_seconds=30.0, schedule_by="time", warmup_steps=0, log_every=1)
    result = train(toy_model(), ToySource(), toy_objective, timed)
    assert result.reason == "time"
    assert 10 < result.step < 300
    rates = [row["lr"] for row in rows(timed)]
    assert rates[0] > 0.95 * timed.lr
    assert rates[-1] < 0.01 * timed.lr
    assert rates == sorted(rates, reverse=True)
    assert result.final is not None


def test_epochs_go_round_and_an_empty_source_is_a_mistake(config: TrainConfig) -> None:
    source = ToySource(epoch=4)
    assert train(toy_model(), source, toy_objective, config).step == 6
    assert source.given == 6

    class Empty(ToySource):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(ValueError, match="yields no batch"):
        train(toy_model(), Empty(), toy_objective, replace(config, output_dir=config.output_dir + "2"))


def test_batch_norm_statistics_are_kept(config: TrainConfig) -> None:
    class Normed(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(8)
            self.fixed = nn.BatchNorm1d(8).requires_grad_(False)
            self.norm = nn.Sequential()  # type: ignore[assignment]

        def forward(self, ids: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
            return self.output(self.bn(self.embed(ids).transpose(1, 2)).transpose(1, 2))

    model = Normed()
    result = train(model, ToySource(), toy_objective, config)
    found = checkpoint.load(result.checkpoint).trainable
    assert torch.equal(found["bn.running_mean"], model.bn.running_mean)
    assert "fixed.running_mean" not in found
    fresh = Normed()
    Trainer(fresh, ToySource(), toy_objective, config, Hooks(), "auto")
    assert torch.equal(fresh.bn.running_var, model.bn.running_var)


def test_block_checkpointing_changes_memory_not_numbers(config: TrainConfig) -> None:
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(x).relu()

    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(Counted(4, 4), Counted(4, 4), nn.Linear(4, 1))
        keys = list(net.state_dict())
        if recompute:
            checkpoint_blocks(list(net)[:2])
        assert list(net.state_dict()) == keys
        calls.clear()
        net(torch.ones(3, 4)).sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    plain = gradients(False)
    assert len(calls) == 2
    again = gradients(True)
    assert len(calls) == 4  # each block ran a second time in the backward pass
    assert len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_nothing_to_learn_names_the_files(config: TrainConfig) -> None:
    def nothing(model: nn.Module, batch: Any) -> Any:
        loss, count, _ = toy_objective(model, batch)
        return loss * 0, count * 0, {}

    with pytest.raises(ValueError, match=r"step 1: no token to learn in the batches of toy\.json:0, toy\.json:1"):
        train(toy_model(), ToySource(), nothing, config)


def test_divergence_stops_and_names(config: TrainConfig) -> None:
    for what in ("loss", "gradient"):
        calls = []

        def bad(model: nn.Module, batch: Any, what: str = what, calls: list[int] = calls) -> Any:
            calls.append(1)
            loss, count, others = toy_objective(model, batch)
            if len(calls) == 6:
                extra = model.output.bias.sum() * 0
                loss = loss + (float("nan") if what == "loss" else extra.sqrt())
            return loss, count, others

        own = replace(config, output_dir=f"{config.output_dir}-{what}", accumulation=2, checkpoint_every=1)
        model = toy_model()
        with pytest.raises(TrainingDiverged) as caught:
            train(model, ToySource(), bad, own)
        message = str(caught.value)
        assert f"the {what}" in message
        assert "at step 3" in message
        assert "step-000002" in message
        assert "toy.json:10, toy.json:11" in message
        assert ("toy.json:8" in message) == (what == "gradient")  # the loss tells which micro-batch it was
        good = checkpoint.latest(own.output_dir)
        assert good == checkpoint.folder(own.output_dir, 2)
        assert all(v.isfinite().all() for v in checkpoint.load(good).trainable.values())
        assert not (Path(own.output_dir) / "final").exists()


def test_a_finished_run_says_so_and_blames_no_parameter(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "accessory")
    run(config)
    assert "already finished" not in caplog.text
    caplog.clear()
    run(config, "auto")
    assert "already finished (max_steps 6, max_seconds None); raise train.max_steps" in caplog.text
    assert "never received a gradient" not in caplog.text


def test_first_and_last_step_are_logged(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "accessory")
    now = [0.0]

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(loop.time, "monotonic", clock)
    timed = replace(config, max_steps=10_000, max_seconds=10.0, schedule_by="time", log_every=1000)
    result = train(toy_model(), ToySource(), toy_objective, timed)
    assert 1 < result.step < 1000
    assert [row["step"] for row in rows(timed)] == [1, result.step]
    assert "/10000" not in caplog.text  # the clock ends this run, not the steps
    run(timed, "auto")
    assert [row["step"] for row in rows(timed)] == [1, result.step]
