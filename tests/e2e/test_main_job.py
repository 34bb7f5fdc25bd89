"""The whole job at its smallest: own pictures in LLaVA's layout, the real command line, a model that sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.__main__ import main
from tests.unit.train.squares import COLOURS, QUESTION, write_squares


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accessory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    done = call("train", str(write_squares(folder, steps=80)))
    assert done.returncode == 0, done.stderr
    assert "source " in done.stderr
    return folder


def test_the_loss_goes_to_nothing(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert len(losses) >= 80
    assert losses[0] > 2
    assert max(losses[-5:]) < 0.05


def test_it_names_the_colour_that_it_is_shown(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["chat", "--model", str(trained / "run" / "final"), "--max-new-tokens", "6"]

    def say(*more: str) -> str:
        assert main([*model, *more, "--ask", QUESTION]) == 0
        return capsys.readouterr().out.strip()

    names = list(COLOURS)
    own = [say("--image", str(trained / f"{n}.png")) for n in names]
    assert own == names
    swapped = [say("--image", str(trained / f"{n}.png")) for n in names[1:] + names[:1]]
    assert not any(a == b for a, b in zip(swapped, names, strict=True))  # it tells what it sees, not what it expects
    blind = say()
    assert [blind] * 4 != names


def test_the_same_in_a_process_of_its_own(trained: Path) -> None:
    asked = ["--image", str(trained / "blue.png"), "--ask", QUESTION, "--max-new-tokens", "6"]
    done = call("chat", "--model", str(trained / "run" / "final"), *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "blue\n"
