"""A checkpoint is there completely or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.train import checkpoint, rng
from accessory.train.checkpoint import Checkpoint, CheckpointError
from accessory.train.signals import Interrupts


def made(step: int = 1) -> Checkpoint:
    shared = torch.arange(6.0).view(2, 3)
    return Checkpoint({"a": shared, "a.t": shared.t()}, {"exp_avg/a": shared + step}, {"step": step}, {"x.yaml": "y"})


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 12, made(12))
    assert path == tmp_path / "step-000012"
    found = checkpoint.load(path)
    for kind in ("trainable", "optimizer"):
        wanted = getattr(made(12), kind)
        assert getattr(found, kind).keys() == wanted.keys()
        assert all(torch.equal(getattr(found, kind)[k], v) for k, v in wanted.items())
    assert found.state == {"step": 12}
    assert (path / "x.yaml").read_text() == "y"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000012"]


def test_latest_ignores_the_incomplete(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for step in (9, 10, 1_000_000):
        checkpoint.save(tmp_path, step, made(step))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"
    (tmp_path / "step-1000000" / "COMPLETE").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000010"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "step-1000000")


def test_prune(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, made())
    (tmp_path / "step-000002" / "COMPLETE").unlink()
    (tmp_path / "step-000009").mkdir()  # another process, between rename and marker
    (tmp_path / "step-by-step").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004", "step-000009", "step-by-step"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, 1, made())
    (path / name).write_bytes((path / name).read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"step-000001 is damaged: .*Resume from an earlier"):
        checkpoint.load(path)


def test_generators_go_back(tmp_path: Path) -> None:
    rng.seed_all(5)
    random.gauss(0, 1)
    np.random.randn()
    saved = rng.state()
    first = [random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()]
    assert [random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()] != first
    rng.restore(saved)
    assert [random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()] == first


def test_handlers_are_put_back() -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.received == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
