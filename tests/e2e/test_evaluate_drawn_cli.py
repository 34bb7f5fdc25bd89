"""The verb ``evaluate`` on generators: tables while it draws, lines to go on from, a sheet, a table for the card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from accessory.__main__ import main
from accessory.evaluate import tally, trigger
from accessory.models.generator_net import Generator
from tests.tiny import tiny_model_dir
from tests.tiny_generator import tiny_generator_dir
from tests.unit.evaluate.drawings import Colours, world
from tools import model_card


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Generators that read text and dialogues, and a chat model."""
    root = tmp_path_factory.mktemp("evaluate")
    made = {kind: tiny_generator_dir(root, kind) for kind in ("text", "dream")}  # type: ignore[arg-type]
    return {**made, "chat": tiny_model_dir(tmp_path_factory.mktemp("chat"))}


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch) -> None:
    world(monkeypatch)
    monkeypatch.setattr("accessory.evaluate.gallery.encoder", lambda device, cache: Colours())


def run(folder: Path, *more: object) -> int:
    return main(["evaluate", "--model", str(folder), "--device", "cpu", "--threads", "1", *map(str, more)])


def test_a_bridge_is_asked_in_four_ways(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "deep" / "items.jsonl", tmp_path / "sheets" / "page.png"
    assert run(folders["dream"], "--limit", 4, "--steps", 2, "--out", out, "--sheet", page) == 0
    said = capsys.readouterr().out.splitlines()
    entries = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert Counter(e["kind"] for e in entries) == {"caption": 4, "request": 4, "indirect": 4, "riddle": 4}
    assert any("indirect: " in line and "left out" in line for line in said)
    assert f"{folders['dream']}: 2 steps of euler, guidance 3" in said
    assert "cosine: plain compares an encoder's features as they are, centred" in "\n".join(said)
    table = tally.tables(entries).splitlines()
    rows = [line for line in said if line.startswith("|")]
    asked = rows.index(trigger.HEAD.splitlines()[0])
    assert rows[:asked] == [line for line in table if line]
    assert [row.split("|")[1].strip() for row in rows[asked + 2 :]] == list(trigger.SETS)
    assert all(e["run"]["settings"]["grid"]["points"] == 3 and e["run"]["seed"] == 0 for e in entries)
    assert isinstance(entries[0]["prompt"], str)
    assert [role for role, _ in entries[4]["prompt"]] == ["user"]
    with Image.open(page) as opened:
        assert opened.height > 16 * 96
    assert model_card.score_table(model_card.rows(out)) == tally.tables(entries)


def test_a_folder_that_is_none_lists_all_that_could_be_scored(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accessory.models.build.SHIPPED", folders["text"].parent)
    assert run(Path("generator-txt")) == 2
    said = capsys.readouterr().err
    assert "shipped models are: tiny; shipped generators are: generator-dream, generator-text" in said
    assert "did you mean generator-text?" in said
    assert main(["chat", "--model", "nobody"]) == 2
    assert "generator" not in capsys.readouterr().err  # which do not speak


def test_an_interrupted_run_goes_on(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ("--limit", 6, "--batch-size", 1)
    assert run(folders["text"], *options, "--out", whole) == 0
    table = capsys.readouterr().out
    generate, made = Generator.generate, [0]

    def stopping(self: Generator, *rest: object, **options: object) -> object:
        made[0] += 1
        if made[0] == 4:
            raise KeyboardInterrupt
        return generate(self, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "generate", stopping)
    assert run(folders["text"], *options, "--out", out) == 130
    assert capsys.readouterr().out in table  # what was printed stays true
    assert out.read_text() == "".join(whole.read_text().splitlines(keepends=True)[:3])
    out.write_text(out.read_text() + '{"kind": "capt')  # torn by a kill
    assert run(folders["text"], *options, "--out", out) == 0
    assert out.read_text() == whole.read_text()
    assert capsys.readouterr().out == table
    assert made[0] == 4 + 3
    assert run(folders["text"], *options, "--out", out) == 0
    assert made[0] == 4 + 3  # all were there


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("text", ["--controls", "none"], "--controls is an option of chat models"),
        ("text", ["--retrieval"], "--retrieval is an option of chat models"),
        ("chat", ["--sheet", "x.png"], "--sheet is an option of generators"),
        ("chat", ["--steps", "4"], "--steps is an option of generators"),
        ("text", ["--tasks", "emoji-names"], "there are: caption, request, indirect, riddle"),
        ("text", ["--tasks", "indirect"], "a dialogue or a picture needs a dream bridge"),
        ("text", ["--limit", "1"], "limit is 1"),
        ("text", ["--steps", "0"], "--steps 0 must be at least 1"),
        ("text", ["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(
    folders: dict[str, Path], model: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders[model], *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error


def test_a_file_of_another_run_is_left_alone(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "items.jsonl"
    assert run(folders["text"], "--limit", 2, "--out", out) == 0
    before = out.read_bytes()
    for folder, more, said in (
        ("text", ["--seed", 5], "another seed"),
        ("text", ["--steps", 5], "another settings"),
        ("dream", ["--tasks", "caption"], "another model"),
    ):
        assert run(folders[folder], "--limit", 2, "--out", out, *more) == 2
        assert said in capsys.readouterr().err
    text = out.read_text()
    out.write_text(text.replace("emoji of thing", "drawing of thing"))
    assert run(folders["text"], "--limit", 2, "--out", out) == 2
    assert "asked for something else" in capsys.readouterr().err
    out.write_text('{"task": "emoji-names", "control": "none", "right": true}\n')
    assert run(folders["text"], "--limit", 2, "--out", out) == 2
    assert "items.jsonl:1 is no picture's line" in capsys.readouterr().err
    out.write_bytes(before)


def test_a_card_has_one_table_a_run(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for seed, path in enumerate((one, two)):
        assert run(folders["text"], "--limit", 2, "--seed", seed, "--out", path) == 0
    answers = [{"task": "words-ocr", "control": "none", "right": True}]
    both = model_card.score_table([*answers, *model_card.rows(one)])
    assert both.startswith("| task | questions | own picture |")
    assert both.endswith(tally.tables(model_card.rows(one)))
    with pytest.raises(ValueError, match="2 runs that differ in their seed"):
        model_card.score_table([*model_card.rows(one), *model_card.rows(two)])
