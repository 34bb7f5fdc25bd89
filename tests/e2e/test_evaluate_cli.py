"""The verb ``evaluate``: a Markdown table for people, JSON lines for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.__main__ import main
from tests.tiny import tiny_model_dir
from tests.unit.evaluate.asked import stand_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("evaluate"))


def test_table_and_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, 6)
    out = tmp_path / "deep" / "items.jsonl"
    arguments = [
        "--model",
        str(folder),
        "--tasks",
        "emoji-names",
        "words-ocr",
        "--limit",
        "3",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", *arguments, "--controls", "none", "shuffled", "blind", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | pictures | right | of | accuracy | seconds |"
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    assert [c[:2] for c in cells] == [
        [task, shown] for task in ("emoji-names", "words-ocr") for shown in ("own", "shuffled", "blind")
    ]
    assert [c[2:5] for c in cells] == [["0", "3", "0.0 %"]] * 6
    entries = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(entries) == 18
    assert set(entries[0]) == {"task", "control", "index", "question", "truth", "answer", "right"}
    assert [e["index"] for e in entries[:3]] == [0, 2, 4]
    assert {(e["task"], e["control"]) for e in entries} == {
        (t, c) for t in ("emoji-names", "words-ocr") for c in ("none", "shuffled", "blind")
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "/nowhere"], "neither a model folder"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--device", "cuda"], "device cuda:0 is not available"),
        (["--tasks", "emoji-nmaes"], "emoji-nmaes"),
        (["--tasks", "emoji-names", "--limit", "1"], "limit is 1"),
    ],
)
def test_mistakes_are_one_clear_line(
    folder: Path, more: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if "--limit" in more:
        stand_in(monkeypatch, 6)
    assert main(["evaluate", "--model", str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error


def test_a_shipped_model_is_known_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, 3)
    monkeypatch.setattr("accessory.models.build.SHIPPED", folder.parent)
    assert main(["evaluate", "--model", folder.name, "--tasks", "words-ocr", "--controls", "none"]) == 0
    assert "| words-ocr | own | 0 | 3 |" in capsys.readouterr().out
