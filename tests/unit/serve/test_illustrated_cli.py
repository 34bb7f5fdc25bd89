"""The terminal and the page of a chat that draws."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from accessory.__main__ import main
from accessory.models.build import ModelConfig
from accessory.models.conditioner import DreamConditioner
from accessory.models.generator import save_generator
from accessory.models.generator_config import DreamSource
from accessory.peft.attach import LoraSpec
from accessory.serve.illustrate import ImageDone, ImagePreview, ImageStart, TextDelta
from accessory.serve.illustrated_chat import load
from accessory.serve.pictures import draw, load_records
from tests.tiny import tiny_model_dir
from tests.tiny_generator import DREAM, PROFILE, tiny_generator, tiny_generator_dir


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("drawing")
    generator = tiny_generator_dir(path, "dream")
    return path / "tiny", generator


def test_answers_hold_pictures_as_files_with_their_log(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generator = folders
    out = tmp_path / "out"
    options = ["--model", str(model), "--generator", str(generator), "--out", str(out), "--max-new-tokens", "4"]
    assert main(["chat", *options, "--pictures", "always", "--ask", "Draw a cat.", "--ask", "And a dog."]) == 0
    printed = capsys.readouterr().out
    names = ["picture_000.png", "picture_001.png"]
    assert all(f"[{out / name}]" in printed for name in names)
    records = load_records(out)
    assert [r.prompt for r in records] == ["Draw a cat.", "And a dog."]
    logged = [json.loads(line) for line in (out / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["prompt"], e["seed"]) for e in logged] == [(r.prompt, r.seed) for r in records]
    assert all((e["steps"], e["guidance"], e["size"]) == (3, 3.0, [16, 16]) for e in logged)
    made = load(model, generator, device="cpu")
    assert made.dream is not None, "the bridge stands on the model that speaks"
    for name, record in zip(names, records, strict=True):
        with Image.open(out / name) as picture:
            assert draw(made.generator, record).tobytes() == picture.tobytes()
    lines = iter(["/pictures never", "Draw a cat.", "/pictures often", "/pictures always", "Draw.", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert main(["chat", *options, "--out", str(tmp_path / "two")]) == 0
    said = capsys.readouterr()
    assert said.out.count(".png]") == 1
    assert "'often' is not one of auto, always, never" in said.err
    assert "/pictures auto|always|never" in said.out


def test_a_model_that_was_taught_to_speak_of_what_it_draws_speaks(tmp_path: Path) -> None:
    """Its own tuning stands on the chat model's folder; beside another folder it is a stranger, as any other is."""
    folder = tiny_model_dir(tmp_path)
    model = ModelConfig(base=str(folder), tuning=(LoraSpec(rank=2),))
    drawing = tiny_generator(tmp_path, "dream", conditioner=DreamSource(model, DREAM, PROFILE))
    assert isinstance(drawing.conditioner, DreamConditioner)
    with torch.no_grad():
        for name, p in drawing.conditioner.dream.net.named_parameters():
            if ".delta." in name:
                p.normal_()
    save_generator(drawing, tmp_path / "draws")
    made = load(folder, tmp_path / "draws", device="cpu")
    assert made.dream is not None
    assert made.model.net is made.dream.net
    deltas = [p for name, p in made.model.net.named_parameters() if ".delta.b" in name]
    assert deltas
    assert all(bool(p.any()) for p in deltas)
    (tmp_path / "other").mkdir()
    stranger = tiny_model_dir(tmp_path / "other", tuning=(LoraSpec(rank=2),))
    assert load(stranger, tmp_path / "draws", device="cpu").dream is None


def test_no_generator_is_one_clear_line(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", str(folders[0]), "--generator", str(folders[0]), "--ask", "Draw."]) == 2
    assert "is a chat model; a generator is wanted" in capsys.readouterr().err
    assert main(["chat", "--model", str(folders[1]), "--ask", "Draw."]) == 2
    assert "is a generator, which makes pictures and does not speak" in capsys.readouterr().err


def test_a_shipped_generator_is_known_by_name_and_old_pictures_stay(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accessory.models.build.SHIPPED", folders[0].parent)
    monkeypatch.chdir(tmp_path)
    options = ["--model", "tiny", "--generator", "generator-dream", "--max-new-tokens", "2", "--pictures", "always"]
    before = []
    for number, name in enumerate(("pictures", "pictures-2", "pictures-3")):
        assert main(["chat", *options, "--ask", "a cat", "--seed", str(number)]) == 0
        assert f"[{name}/picture_000.png]" in capsys.readouterr().out
        before.append((tmp_path / name / "picture_000.png").read_bytes())
    assert len(set(before)) == 3
    for name in ("pictures", "pictures-2"):  # a folder that is named is taken at its word
        assert main(["chat", *options, "--ask", "a cat", "--out", name]) == 2
        assert f"error: {name} holds pictures of an earlier dialogue; --out" in capsys.readouterr().err
    assert [(tmp_path / n / "picture_000.png").read_bytes() for n in ("pictures", "pictures-2")] == before[:2]


def test_what_the_page_shows_while_an_answer_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -r requirements.txt)")
    from demos.chat import Said, asked

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    half, whole = Image.new("RGB", (8, 8), "grey"), Image.new("RGB", (8, 8), "red")
    said = Said()

    def after(event: object) -> Any:
        assert said.take(event)
        return said.message

    assert after(TextDelta("Here ")) == "Here "
    assert after(TextDelta("it is.")) == "Here it is."
    assert "drawing" in after(ImageStart(0, 1, (8, 8)))
    text, draft = after(ImagePreview(0, 1, 2, half))["content"]
    assert text == "Here it is."
    with Image.open(draft["path"]) as seen:
        assert seen.convert("RGB").tobytes() == half.tobytes()
    content = after(ImageDone(0, whole, 1, "c"))["content"]
    assert len(content) == 2
    with Image.open(content[1]["path"]) as seen:
        assert seen.convert("RGB").tobytes() == whole.tobytes()
    assert after(TextDelta("Nice."))["content"][2] == "Nice."
    assert not said.take(object())
    history = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": content}]
    assert asked(history) == ["Draw."]
