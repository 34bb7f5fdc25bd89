"""A scheduler's SIGTERM reaches every process of a run, those that load data too: it still saves and goes on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from accessory.train import checkpoint
from tests.unit.train.squares import write_squares


def start(experiment: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "accessory",
        "train",
        str(experiment),
        "data.workers=2",
        "train.log_every=1",
        *more,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def test_a_signal_to_the_whole_group_saves_and_exits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(write_squares(tmp_path, steps=100_000))
    try:
        deadline = time.monotonic() + 200
        while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "no step was logged"
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 143, said  # a scheduler may queue it again
    saved = checkpoint.latest(run)
    assert saved is not None, said
    step = json.loads((saved / "state.json").read_text())["step"]
    assert step >= 3
    again = start(tmp_path / "experiment.yaml", f"train.max_steps={step + 2}", "--resume", "auto")
    assert again.communicate(timeout=200) is not None
    assert again.returncode == 0
    newest = checkpoint.latest(run)
    assert newest is not None
    assert newest.name == f"step-{step + 2:06d}"
