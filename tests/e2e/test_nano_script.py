"""The two-stage script goes on to a stage only when the one before left its model."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Notes its arguments; a train verb leaves its final folder unless told to end as after a SIGTERM.
PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >>calls
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >patience
case "$*" in
    *"$STOPPED"*) exit 143 ;;
    *exps/nano_align.yaml*) mkdir -p runs/nano_align/final ;;
    *train.output_dir=other*) mkdir -p other/final ;;
    *exps/nano_sphinx.yaml*) mkdir -p runs/nano_sphinx/final ;;
esac
"""


def call(folder: Path, *arguments: str, stopped: str = "nothing", **env: str) -> tuple[int, str, list[str]]:
    (folder / "exps").mkdir(exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("nano_sphinx.sh", "launch.sh"):
        shutil.copy(ROOT / "exps" / name, folder / "exps")
    (folder / "exps" / "setup.sh").write_text("exit 0\n")
    for name in ("python", "torchrun"):
        (folder / "bin" / name).write_text(PYTHON)
        (folder / "bin" / name).chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(folder / "exps" / "nano_sphinx.sh"), *arguments],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "ACCESSORY_VENV": str(folder), "STOPPED": stopped, **env},
    )  # fmt: skip
    return done.returncode, done.stderr, (folder / "calls").read_text().splitlines()


def test_all_stages(tmp_path: Path) -> None:
    code, said, calls = call(tmp_path, "train.output_dir=other", "train.lr=1")
    assert (code, said) == (0, "")
    assert [c.split()[3] for c in calls] == ["fetch", "train", "train", "evaluate"]
    assert calls[2].endswith("exps/nano_sphinx.yaml --resume auto train.output_dir=other train.lr=1")
    assert "--model other/final" in calls[3]


@pytest.mark.parametrize(("stage", "number"), [("align", 2), ("sphinx", 3)])
def test_a_stage_that_was_stopped_ends_the_script(tmp_path: Path, stage: str, number: int) -> None:
    code, said, calls = call(tmp_path, stopped=f"nano_{stage}.yaml")
    assert (code, said) == (143, "")
    assert len(calls) == number
    code, _, calls = call(tmp_path)
    assert code == 0
    trained = [c.split()[4] for c in calls if c.split()[3] == "train"]
    assert trained == ["exps/nano_align.yaml", "exps/nano_sphinx.yaml"][number - 2 :]  # what is done is not done again
    assert "evaluate --model runs/nano_sphinx/final" in calls[-1]


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    code, _, calls = call(tmp_path, NPROC="2")
    assert code == 0
    assert (tmp_path / "patience").read_text() == "300\n"
    several = "torchrun --standalone --nproc-per-node 2 --max-restarts 0 -m accessory train exps/nano_align.yaml"
    assert calls[1].startswith(several)
