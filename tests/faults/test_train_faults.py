"""What goes wrong while training: kill, signals, a full disk."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accessory.train import checkpoint
from accessory.train.checkpoint import CheckpointError
from accessory.train.config import TrainConfig
from accessory.train.loop import Hooks, train
from tests.toy import ToySource, toy_model, toy_objective, weights

TESTS = Path(__file__).parents[1]

SLOW = """
import sys, time
from tests.toy import ToySource, toy_model, toy_objective
from accessory import log
from accessory.train.config import TrainConfig
from accessory.train.loop import train
def slow(model, batch):
    time.sleep(0.02)
    return toy_objective(model, batch)
log.setup()
c = TrainConfig(output_dir=sys.argv[1], max_steps=int(sys.argv[2]), lr=0.05, checkpoint_every=3, log_every=5,
                precision="fp32", tensorboard=False)
r = train(toy_model(dropout=0.3), ToySource(), slow if c.max_steps > 100 else toy_objective, c, resume="auto")
print(r.reason, r.step)
"""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, lr=0.05, checkpoint_every=2, log_every=2, precision="fp32",
        tensorboard=False,
    )  # fmt: skip


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    command = [sys.executable, "-c", SLOW, str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(folder: Path, step: int) -> None:
    limit = time.monotonic() + 90
    while not (found := checkpoint.latest(folder)) or int(found.name[5:]) < step:
        assert time.monotonic() < limit, "the run does not get on"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_saves_and_ends(tmp_path: Path, number: int, name: str) -> None:
    run = start(tmp_path, 100_000)
    wait_for(tmp_path, 3)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0
    reason, step = out.split()
    assert reason == name
    assert checkpoint.latest(tmp_path) == checkpoint.folder(tmp_path, int(step))
    assert f"stopped by {name}, continue with --resume auto: step {step}" in err
    assert not (tmp_path / "final").exists()


def test_kill_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    run = start(tmp_path, 100_000)
    wait_for(tmp_path, 3)
    run.kill()
    run.communicate()
    (tmp_path / ".step-000099.partial").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    killed = checkpoint.load(found)
    step = killed.state["step"]
    again = start(tmp_path, step + 3)
    out, _ = again.communicate(timeout=60)
    assert out.split() == ["steps", str(step + 3)]
    direct = start(tmp_path / "direct", step + 3)
    direct.communicate(timeout=60)
    # Both runs' schedules differ (100,000 steps and few), so only what does not depend on it is compared.
    a, b = (checkpoint.load(checkpoint.folder(d, step + 3)).state["ranks"] for d in (tmp_path, tmp_path / "direct"))
    assert a == b


def test_no_space_is_said_before_writing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    real, calls = shutil.disk_usage, []

    def almost_full(path: Any) -> Any:
        calls.append(path)
        return real(path) if len(calls) == 1 else usage(10**9, 10**9 - 1000, 1000)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", almost_full)
    with pytest.raises(CheckpointError, match=r"step-000006: it needs 1\.1 MB and the disk has 0\.0 MB free"):
        train(toy_model(), ToySource(), toy_objective, config)
    said = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert [s[: len("no checkpoint of step 4")] for s in said] == [f"no checkpoint of step {n}" for n in (4, 6)]
    assert checkpoint.latest(config.output_dir) == checkpoint.folder(config.output_dir, 2)
    checkpoint.load(checkpoint.folder(config.output_dir, 2))


@pytest.mark.parametrize("beside", [True, False])
def test_disk_fills_while_writing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    config = replace(config, save_beside=beside)
    steps = {4, 6}
    full_at(monkeypatch, lambda path: path.suffix == ".safetensors" and any(f"{n:06d}" in str(path) for n in steps))
    with pytest.raises(CheckpointError, match=r"step-000006: the disk is full\. Earlier checkpoints are untouched"):
        train(toy_model(), ToySource(), toy_objective, config)
    assert [p.name for p in sorted(Path(config.output_dir).iterdir())] == ["metrics.jsonl", "step-000002"]
    steps.remove(6)  # somebody makes room before the run ends: it goes on and saves what comes next
    model, whole = toy_model(seed=9), toy_model()
    model.frozen.load_state_dict(whole.frozen.state_dict())
    assert train(model, ToySource(), toy_objective, config, resume="auto").checkpoint.name == "step-000006"
    assert [p.name for p in checkpoint.complete(config.output_dir)] == ["step-000002", "step-000006"]
    monkeypatch.undo()
    train(whole, ToySource(), toy_objective, replace(config, output_dir=config.output_dir + "2"))
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(model)[key])


def full_at(monkeypatch: pytest.MonkeyPatch, where: Callable[[Path], bool]) -> None:
    """Files of such paths take half of what is written to them, then the disk is full."""
    real = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full(self, "w") if "w" in mode and where(self) else real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("what", ["marker", "prune"])
def test_late_failures_of_the_disk_are_told_like_early_ones(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def prune(*_: Any) -> None:
        raise PermissionError("not yours")

    if what == "marker":
        full_at(monkeypatch, lambda path: path.name == "COMPLETE" and "step-000002" not in str(path))
    else:
        monkeypatch.setattr(checkpoint, "prune", prune)
    with pytest.raises(CheckpointError, match="step-000006: the disk is full" if what == "marker" else "not yours"):
        train(toy_model(), ToySource(), toy_objective, config)
    last = 2 if what == "marker" else 6
    assert checkpoint.latest(config.output_dir) == checkpoint.folder(config.output_dir, last)


def test_a_final_folder_is_whole_or_absent(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    full_at(monkeypatch, lambda path: path.parent.name == ".final.partial" and path.name == "run.yaml")
    hooks = Hooks(texts={"config.yaml": "a: 1\n", "run.yaml": "b: 2\n"})
    with pytest.raises(CheckpointError, match="final: the disk is full"):
        train(toy_model(), ToySource(), toy_objective, config, hooks=hooks)
    assert {p.name for p in Path(config.output_dir).iterdir()} == {"step-000004", "step-000006", "metrics.jsonl"}
    monkeypatch.undo()
    final = train(toy_model(), ToySource(), toy_objective, config, resume="auto", hooks=hooks).final
    assert final is not None
    assert {p.name for p in final.iterdir()} == {"config.yaml", "run.yaml", "trainable.safetensors", "versions.json"}


@pytest.mark.parametrize("moment", ["rename", "marker"])
def test_death_at_the_worst_moment(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    class Died(BaseException):
        pass

    config = replace(config, save_beside=False)  # a thread would die alone
    real_rename, real_write = Path.rename, checkpoint._write

    def rename(self: Path, target: Any) -> Any:
        if moment == "rename" and "step-000004" in str(target):
            raise Died
        return real_rename(self, target)

    def write(path: Path, data: bytes) -> None:
        if moment == "marker" and path.name == "COMPLETE" and "step-000004" in str(path):
            raise Died
        real_write(path, data)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(Died):
        train(toy_model(), ToySource(), toy_objective, config)
    assert checkpoint.latest(config.output_dir) == checkpoint.folder(config.output_dir, 2)
    assert (Path(config.output_dir) / ".step-000004.partial").is_dir()
    monkeypatch.undo()
    assert train(toy_model(), ToySource(), toy_objective, config, resume="auto").step == 6
    names = {p.name for p in Path(config.output_dir).iterdir()}
    assert names == {"step-000004", "step-000006", "final", "metrics.jsonl"}
