"""A checkpoint is there completely or not at all."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.train import checkpoint, rng, saving
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


def torn(path: Path, name: str, how: str) -> None:
    """Cut a file that has ``name`` in its own short, or change one bit of it."""
    file = next(f for f in sorted(path.iterdir()) if name in f.name)
    data = bytearray(file.read_bytes())
    if how == "short":
        del data[-7:]
    else:
        data[max(0, len(data) - 3)] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", [".safetensors", "state.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, 1, made())
    torn(path, name, "short")
    with pytest.raises(CheckpointError, match=r"step-000001 is damaged: .*Resume from an earlier"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", [".safetensors", "state.json", "x.yaml", "COMPLETE"])
@pytest.mark.parametrize("how", ["short", "bit", "gone"])
def test_a_torn_one_is_put_aside_for_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    old, new = (checkpoint.save(tmp_path, step, made(step)) for step in (1, 2))
    assert checkpoint.sound("auto", tmp_path) == new
    if how == "gone":
        next(f for f in sorted(new.iterdir()) if name in f.name).unlink()
    else:
        torn(new, name, how)
    if name != "COMPLETE":  # without its marker it is none
        with pytest.raises(CheckpointError, match=r"step-000002 is damaged: .* not as written"):
            checkpoint.sound(str(new), tmp_path / "other")
    assert checkpoint.sound("auto", tmp_path) == old
    assert (tmp_path / "step-000002.damaged").is_dir() is (name != "COMPLETE")
    torn(old, "state.json", "bit")
    with pytest.raises(CheckpointError, match="no checkpoint is before it"):
        checkpoint.sound("auto", tmp_path)  # never from the start without a word
    assert old.is_dir()


def test_checkpoints_of_the_version_before_are_read(tmp_path: Path) -> None:
    old, content = tmp_path / "step-000003", made(3)
    tensors = {f"{kind}.safetensors": getattr(content, kind) for kind in ("trainable", "optimizer")}
    checkpoint.write_folder(old, tensors, {"state.json": json.dumps({"step": 3})})
    assert checkpoint.sound("auto", tmp_path) is None
    (old / "COMPLETE").write_text("3\n")
    assert checkpoint.sound("auto", tmp_path) == old
    found = checkpoint.load(old)
    assert found.state == {"step": 3}
    assert not found.average
    assert torch.equal(found.trainable["a.t"], content.trainable["a.t"])


@pytest.mark.parametrize("moment", ["aside", "new"])
def test_what_a_save_replaces_is_never_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = checkpoint.save(tmp_path, 5, made(1))
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if moment == "new" and self.name.endswith(".partial"):
            raise KeyboardInterrupt  # the power fails
        found = real(self, target)
        if moment == "aside" and target.name.endswith(".old"):
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 5, made(2))
    monkeypatch.undo()
    assert not path.exists()
    assert checkpoint.sound("auto", tmp_path) == path
    assert torch.equal(checkpoint.load(path).optimizer["exp_avg/a"], made(1).optimizer["exp_avg/a"])
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]
    checkpoint.save(tmp_path, 5, made(2))
    assert torch.equal(checkpoint.load(path).optimizer["exp_avg/a"], made(2).optimizer["exp_avg/a"])
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_who_only_looks_takes_nothing_from_a_run_that_is_saving(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, made(1))
    live, own = tmp_path / ".step-000006.partial", tmp_path / ".notes.partial"
    live.mkdir()
    own.write_text("mine")
    assert checkpoint.resolve("auto", tmp_path, repair=False) == path
    with pytest.raises(checkpoint.CheckpointError, match="exists: continue it"):
        checkpoint.resolve(None, tmp_path)
    assert live.is_dir()
    assert checkpoint.resolve("auto", tmp_path) == path
    assert not live.exists()
    assert own.read_text() == "mine"


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 0.3)
    with saving.alone(tmp_path):
        with (
            pytest.raises(checkpoint.CheckpointError, match="another run is writing into"),
            saving.alone(tmp_path),
        ):
            raise AssertionError
        with saving.alone(tmp_path / "another"):
            pass
    with saving.alone(tmp_path):
        pass


def test_what_is_exported_may_be_read_by_others(tmp_path: Path) -> None:
    checkpoint.write_folder(tmp_path / "final", {"x.safetensors": {"a": torch.ones(2)}}, {"run.yaml": "a: 1"})
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "final").iterdir()}
    assert modes["x.safetensors"] == 0o644 == modes["run.yaml"]


def test_a_file_that_cannot_be_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, 5, made(1))
    before = checkpoint.save(tmp_path, 6, made(1))
    real = checkpoint._fact

    def fact(file: Path) -> object:
        if file.parent == before and file.name == "state.json":
            raise OSError("Input/output error")
        return real(file)

    monkeypatch.setattr(checkpoint, "_fact", fact)
    assert checkpoint.sound("auto", tmp_path) == path


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
