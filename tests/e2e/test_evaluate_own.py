"""``evaluate --data``: a table for people, items for programs, and a run that survives kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accessory.__main__ import main
from tests.structure.source import ROOT
from tests.tiny import tiny_model_dir

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a test set of sixty pictures."""
    root = tmp_path_factory.mktemp("own")
    tiny_model_dir(root)
    for k in range(ROWS):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / f"{k}.png")
    rows = [{"image": f"{k}.png", "question": f"Is {k} here?", "answer": ["yes", "no"][k % 2]} for k in range(ROWS)]
    (root / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "t.yaml").write_text("tasks: [{name: pope, path: q.jsonl, score: pope}]")
    return root


def command(folder: Path, out: Path) -> list[str]:
    return [
        "evaluate", "--model", str(folder / "tiny"), "--data", str(folder / "t.yaml"), "--out", str(out),
        "--batch-size", "2", "--device", "cpu", "--controls", "none", "blind",
    ]  # fmt: skip


def test_killed_and_started_again_it_says_the_same(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(folder, whole)) == 0
    started = [sys.executable, "-m", "accessory", *command(folder, cut)]
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kills = 0
    for least in (10, 45):  # twice, because what resumes once may not resume again
        process = subprocess.Popen(started, cwd=ROOT, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        file, until = cut / "pope.none.jsonl", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if file.is_file() and len(file.read_bytes().splitlines()) > least:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        kills += process.wait() == -signal.SIGKILL
        assert process.stderr is not None
        process.stderr.close()
    assert kills == 2
    assert not (cut / "scores.json").exists()
    assert main(command(folder, cut)) == 0
    for name in ("pope.none.jsonl", "pope.blind.jsonl", "scores.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert len((cut / "pope.none.jsonl").read_text().splitlines()) == ROWS + 1


def test_the_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | pictures | items | scores | seconds |"
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    assert [c[:3] for c in cells] == [["pope", "own", str(ROWS)], ["pope", "blind", str(ROWS)]]
    assert cells[0][3].startswith("accuracy 0.")
    assert "yes_ratio" in cells[0][3]
    tree = json.loads((tmp_path / "scores.json").read_text())
    assert tree["pope"]["none"]["items"] == ROWS


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "easy-vqa"], "--data names test sets of your own"),
        (["--data", "nothing.yaml"], "no file of tasks at nothing.yaml"),
        (["--model", "/nowhere"], "neither a model folder"),
    ],
)
def test_mistakes_are_one_clear_line(
    more: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(folder, tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error
