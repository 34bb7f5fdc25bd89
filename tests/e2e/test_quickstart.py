"""The quickstart from fetched assets to its page, with a tiny model, and without any picture set."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accessory.data import assets
from tests.structure.source import ROOT
from tests.tiny import tiny_model_dir
from tools import quickstart


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of the chat page, which is not opened."""
    seen: list[list[str]] = []

    def record(command: list[str]) -> Any:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(quickstart.log, "setup", lambda: None)
    monkeypatch.setattr(quickstart, "subprocess", type("Stand", (), {"run": staticmethod(record)}))
    monkeypatch.chdir(ROOT)
    return seen


def arguments(folder: Path, *more: str) -> list[str]:
    model = folder / "tiny"
    if not model.is_dir():
        tiny_model_dir(folder)
    return ["--model", str(model), "--out", str(folder / "out"), "--quick", "--seconds", "1", *more]


def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model needs neither language model nor encoder, and nothing is downloaded."""

    def fetch(names: Any, *_: Any, **__: Any) -> None:
        if set(names) - set(quickstart.BASE):
            raise assets.AssetError(f"no network for {sorted(names)}")

    monkeypatch.setattr(quickstart, "fetch", fetch)


def test_from_start_to_page_and_again(
    tmp_path: Path, asset_cache: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    no_base(monkeypatch)
    assert quickstart.main(arguments(tmp_path, "--no-demo")) == 0
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert [row["task"] for row in result["scores"]] == list(quickstart.LIMITS)
    assert all(row["control"] is not None and row["total"] == 8 for row in result["scores"])
    tuning = result["tuning"]
    assert tuning["steps"] >= 2
    assert tuning["parameters"] > 0
    assert len(tuning["history"]) >= 1
    html = (out / "report.html").read_text()
    assert html.count("<figure") == 10 + 3 * len(quickstart.LIMITS) + len(tuning["after"]["items"])
    assert "Fine-tuned on a new task" in html
    assert calls == []
    first = (out / "result.json").stat().st_mtime_ns
    assert quickstart.main(arguments(tmp_path, "--port", "7999")) == 0
    assert "nothing changed since" in capsys.readouterr().out
    assert (out / "result.json").stat().st_mtime_ns == first
    assert [c[1:] for c in calls] == [
        [str(ROOT / "demos" / "chat.py"), "--model", str(tmp_path / "tiny"), "--port", "7999"]
    ]
    assert quickstart.main(arguments(tmp_path, "--no-demo", "--again")) == 0
    assert (out / "result.json").stat().st_mtime_ns != first


def test_a_changed_model_is_measured_again(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)

    def key(missing: tuple[str, ...] = (), seconds: float | None = None) -> str:
        options = quickstart.Options(
            base, tmp_path, ROOT / "exps" / "flags.yaml", None, again=False, seconds=seconds, quick=False
        )
        return quickstart.fingerprint(options, missing)

    first = key()
    assert key() == first
    assert len({first, key(("openmoji",)), key(seconds=5.0)}) == 3
    weights = base / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert key() != first
    weights.unlink()
    with pytest.raises(ValueError, match="is not a model folder or the checkout is torn"):
        key()


def test_without_npm_the_samples_still_work(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_base(monkeypatch)
    which = shutil.which
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: None if name == "npm" else which(name))
    assert quickstart.main(arguments(tmp_path, "--cache", str(tmp_path / "empty"))) == 0
    out = capsys.readouterr().out
    notes = [text for text in out.splitlines() if text.startswith("note: ")]
    assert len(notes) == 1
    assert "npm is not installed" in notes[0]
    assert "the shipped samples are used" in notes[0]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<figure") == 10
    assert "<table" not in html
    assert len(calls) == 1


def test_a_missing_model_is_one_line(tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    no_base(monkeypatch)
    assert quickstart.main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "nowhere is not a model folder" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


def fake_python(folder: Path, version: str) -> Path:
    path = folder / f"python{version}"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version} && exit 0\nexit 1\n')
    path.chmod(0o755)
    return path


def test_an_old_python_is_refused_with_a_message(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHON": str(fake_python(tmp_path, "3.9")), "ACCESSORY_VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", str(ROOT / "exps" / "setup.sh")], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not a Python of version 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()
    wrong = subprocess.run(["bash", str(ROOT / "exps" / "setup.sh"), "all"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2


def set_up(venv: Path, kind: str, python: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": str(python), "ACCESSORY_VENV": str(venv)}
    return subprocess.run(["bash", str(ROOT / "exps" / "setup.sh"), kind], env=env, capture_output=True, text=True)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_folder_that_is_no_environment_is_never_replaced(tmp_path: Path) -> None:
    """The stand-in for Python is new enough and makes no environment: what would be removed is gone all the same."""
    python = script(tmp_path / "python", '[ "$1" = -m ] && exit 1; exit 0')
    precious = tmp_path / "venv" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    done = set_up(precious.parent, "main", python)
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert precious.read_text() == "mine"
    (precious.parent / "pyvenv.cfg").write_text("")
    assert "cannot make a virtual environment" in set_up(precious.parent, "main", python).stderr
    assert not precious.exists(), "a torn environment is made anew"


def test_what_is_set_up_for_tests_serves_for_use_and_not_the_other_way(tmp_path: Path) -> None:
    """pip of the stand-in environment notes that it was asked to install something."""
    asked = tmp_path / "asked"
    python = script(tmp_path / "venv" / "bin" / "python", f'[ "$3" = install ] && echo "$@" >>{asked}; exit 0')
    for kind in ("dev", "main", "dev"):
        assert set_up(tmp_path / "venv", kind, python).returncode == 0
    assert len(asked.read_text().splitlines()) == 1
    (tmp_path / "venv" / ".ready-dev").unlink()
    for kind in ("main", "main", "dev"):
        assert set_up(tmp_path / "venv", kind, python).returncode == 0
    installs = asked.read_text().splitlines()
    assert ["requirements-dev.txt" in line for line in installs] == [True, False, True]


def test_only_an_earlier_fine_tuning_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "flags"
    quickstart.clear(folder)
    (folder / "final").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"flags is there and holds no earlier fine-tuning"):
        quickstart.clear(folder)
    assert folder.is_dir()
    (folder / "metrics.jsonl").write_text("")
    quickstart.clear(folder)
    assert not folder.exists()


def test_help_comes_before_any_installation(tmp_path: Path) -> None:
    env = {**os.environ, "ACCESSORY_VENV": str(tmp_path / "venv")}
    script = str(ROOT / "exps" / "quickstart.sh")
    done = subprocess.run(["bash", script, "--help"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "[--no-demo] [--port N]" in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_two_set_ups_at_once_are_refused(tmp_path: Path) -> None:
    env = {**os.environ, "ACCESSORY_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    with (ROOT / "pyproject.toml").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        script = str(ROOT / "exps" / "setup.sh")
        done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "another set-up is running" in done.stderr
    assert not (tmp_path / "venv").exists()
