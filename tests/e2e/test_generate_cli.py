"""The verb ``generate``: PNG files and a manifest, resumed, with clear mistakes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from accessory.__main__ import main
from accessory.models.generator import Generator
from tests.tiny_generator import tiny_generator_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator_dir(tmp_path_factory.mktemp("generate"))


def run(folder: Path, out: Path, *more: str) -> int:
    return main(["generate", "--model", str(folder), "--out", str(out), "--device", "cpu", *more])


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_and_manifest(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a boat\n\n  two blue stars \n", encoding="utf-8")
    out = tmp_path / "deep" / "out"
    options = ["--prompt", "a red cat", "--prompts", str(lines), "--count", "2", "--seed", "7", "--batch", "4"]
    assert run(folder, out, *options, "--size", "8x24", "--steps", "2", "--guidance", "2", "--time-shift", "3") == 0
    printed = capsys.readouterr().out
    assert "6 pictures in" in printed
    assert f"{folder}: 8x24 pixels, 2 steps of euler, guidance 2\n" in printed
    names = [f"{i:05d}-{seed}.png" for i in range(3) for seed in (7, 8)]
    assert sorted(p.name for p in out.glob("*")) == [*names, "manifest.jsonl"]
    entries = manifest(out)
    assert [e["file"] for e in entries] == names
    assert [e["prompt"] for e in entries] == ["a red cat"] * 2 + ["a boat"] * 2 + ["two blue stars"] * 2
    assert [e["seed"] for e in entries] == [7, 8] * 3
    first = entries[0]
    assert (first["width"], first["height"], first["negative"]) == (8, 24, None)
    assert first["settings"]["grid"]["points"] == 3
    assert first["settings"]["grid"]["shift"] == 3.0
    assert first["settings"]["guidance"]["scale"] == 2.0
    assert (first["steps"], first["guidance"]) == (2, 2.0)
    assert len(first["model"]) == 16
    assert first["seconds"] >= 0
    assert all(Image.open(out / name).size == (8, 24) for name in names)
    assert np.abs(pixels(out / names[0]) - pixels(out / names[1])).max() > 20


def test_what_is_there_is_skipped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path, "--prompt", "a boat", "--count", "2") == 0
    kept, made = tmp_path / "00000-0.png", tmp_path / "00000-1.png"
    before, again = kept.stat().st_mtime_ns, pixels(made)
    made.unlink()
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"file": "torn')  # a kill in the middle of a line
    assert run(folder, tmp_path, "--prompt", "a boat", "--count", "2") == 2
    assert "00000-0.png exists" in capsys.readouterr().err
    assert run(folder, tmp_path, "--prompt", "a boat", "--count", "2", "--skip-existing") == 0
    assert "1 pictures in" in (said := capsys.readouterr().out)
    assert "1 were there" in said
    assert kept.stat().st_mtime_ns == before
    assert np.abs(pixels(made) - again).max() <= 1
    assert len(manifest(tmp_path)) == 3
    assert run(folder, tmp_path, "--prompt", "a moon", "--skip-existing") == 2
    assert "another prompt: 'a boat'" in capsys.readouterr().err
    assert run(folder, tmp_path, "--prompt", "a boat", "--solver", "heun", "--skip-existing") == 2
    assert "another settings" in capsys.readouterr().err


def test_without_a_folder_pictures_go_where_none_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["generate", "--model", str(folder), "--device", "cpu", "--steps", "1", "--prompt", "a boat"]
    for name in ("pictures", "pictures-2"):
        assert main(call) == 0
        assert f"1 pictures in {name}\n" in capsys.readouterr().out
    assert main([*call, "--count", "2", "--skip-existing"]) == 0  # goes on in the last
    assert "1 pictures in pictures-2, 1 were there" in capsys.readouterr().out
    assert main([*call, "--out", "pictures"]) == 2  # one that is named is taken at its word, and nothing is replaced
    assert "00000-0.png exists" in capsys.readouterr().err
    assert sorted(str(p) for p in Path().glob("*/*.png")) == [
        "pictures-2/00000-0.png", "pictures-2/00000-1.png", "pictures/00000-0.png",
    ]  # fmt: skip


def test_what_was_not_asked_for_is_the_generators_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "own", "--prompt", "a boat") == 0
    assert "16x16 pixels, 3 steps of euler, guidance 3\n" in capsys.readouterr().out
    assert run(folder, tmp_path / "off", "--prompt", "a boat", "--guidance", "1", "--solver", "sde") == 0
    assert "3 steps of sde euler, guidance 1 (off)\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "steps of the solver (default: the generator's own, which its config.yaml names and a run prints)" in said


def test_options_change_the_picture(folder: Path, tmp_path: Path) -> None:
    variants: dict[str, list[str]] = {
        "plain": [],
        "negative": ["--negative", "two blue stars on a green hat"],
        "solver": ["--solver", "rk4"],
        "sde": ["--solver", "sde"],
        "off": ["--guidance", "1"],
        "shift": ["--time-shift", "4"],
        "steps": ["--steps", "9"],
    }
    for name, options in variants.items():
        assert run(folder, tmp_path / name, "--prompt", "a boat", *options) == 0, name
    plain = pixels(tmp_path / "plain" / "00000-0.png")
    assert plain.shape == (16, 16, 3)
    same = [n for n in variants if not np.abs(pixels(tmp_path / n / "00000-0.png") - plain).max()]
    assert same == ["plain"]


def test_aspect(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path, "--prompt", "a boat", "--size", "16", "--aspect", "4:1", "--steps", "1") == 0
    assert Image.open(tmp_path / "00000-0.png").size == (32, 8)


def test_a_long_prompt_is_reported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = ["--negative", "a boat " * 5000, "--prompt", "a small red cat " * 2500]
    assert run(folder, tmp_path, *long, "--prompt", "", "--prompt", "a cat", "--steps", "1") == 0
    said = capsys.readouterr().err
    assert [line.split(" out of ")[1][:8] for line in said.splitlines()] == ["'a small", "'a boat "]
    assert all(int(line.split("the last ")[1].split()[0]) > 9000 for line in said.splitlines())
    assert len(manifest(tmp_path)) == 3


def test_a_seed_means_one_picture_whatever_is_made_beside_it(folder: Path, tmp_path: Path) -> None:
    options = ["--prompt", "a boat", "--prompt", "a small red cat on a hat", "--prompt", "", "--count", "2"]
    for batch in ("1", "4"):
        assert run(folder, tmp_path / batch, *options, "--batch", batch) == 0
    names = sorted(p.name for p in (tmp_path / "1").glob("*.png"))
    assert len(names) == 6
    assert max(np.abs(pixels(tmp_path / "1" / n) - pixels(tmp_path / "4" / n)).max() for n in names) <= 1
    assert np.abs(pixels(tmp_path / "1" / names[0]) - pixels(tmp_path / "1" / names[1])).max() > 20


@pytest.mark.parametrize("stop", ["key", "disk"])
def test_what_is_made_before_an_end_is_kept(
    folder: Path, tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, draw, replace = [0], Generator.generate, Path.replace

    def interrupted(self: Generator, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments, **options)

    def full(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    options = ["--prompt", "a boat", "--count", "6", "--batch", "1" if stop == "key" else "2"]
    with monkeypatch.context() as patch:
        if stop == "key":
            patch.setattr(Generator, "generate", interrupted)
        else:
            patch.setattr(Path, "replace", full)
        assert run(folder, tmp_path, *options) == (130 if stop == "key" else 2)
    done = 2 if stop == "key" else 3
    said = capsys.readouterr().err
    assert f"stopped: {done} of 6 pictures in {tmp_path}; --skip-existing goes on" in said
    assert ("No space left" in said) == (stop == "disk")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"00000-{i}.png" for i in range(done)), "manifest.jsonl"]
    assert len(manifest(tmp_path)) == done
    assert run(folder, tmp_path, *options, "--skip-existing") == 0
    assert len(manifest(tmp_path)) == 6


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accessory.models.generator.load_generator", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "file").write_text("")
    assert run(folder, tmp_path / "file", "--prompt", "x") == 2
    assert "file" in capsys.readouterr().err
    monkeypatch.setattr("tempfile.TemporaryFile", readonly)
    assert run(folder, tmp_path / "out", "--prompt", "x") == 2
    assert "error: [Errno 30] Read-only file system" in capsys.readouterr().err


def readonly(**_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_shipped_generator_is_known_by_name_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accessory.models.build.SHIPPED", folder.parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder.name).mkdir()  # a folder of that name that holds no generator
    assert run(Path(folder.name), Path("out"), "--prompt", "x", "--steps", "1") == 0
    assert run(Path(folder.name + "s"), Path("out"), "--prompt", "x") == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "x", "--model", "/nowhere"], "shipped ones are"),
        (["--prompt", "x", "--size", "18"], "nearest are 16x16 or 20x20"),
        (["--prompt", "x", "--size", "big"], "neither N nor WxH"),
        (["--prompt", "x", "--aspect", "wide"], "16:9 for instance"),
        (["--prompt", "x", "--aspect", "2:1", "--size", "8x8"], "both say the shape"),
        (["--prompt", "x", "--count", "0"], "--count 0"),
        (["--prompt", "x", "--negative", "y", "--guidance", "1"], "--negative acts through guidance"),
        (["--prompt", "x", "--solver", "ancestral"], "'ancestral' is not for"),
        (["--prompt", "x", "--device", "tpu"], "device 'tpu' is unknown"),
        (["--prompt", "x", "--device", "cuda:99"], "device cuda:99 is not available"),
        (["--prompt", "x", "--seed", "-1"], "--seed -1 must lie between 0 and 2^63"),
        (["--prompt", "x", "--seed", str(2**63 - 1), "--count", "2"], "with room for --count 2"),
        (["--prompt", "x\udcff"], "is not text in UTF-8"),
        (["--prompts", "LATIN"], "LATIN is not UTF-8"),
        (["--prompt", "x", "--size", "0"], "nearest are 4x4"),
        ([], "nothing to show"),
        (["--prompts", "EMPTY"], "EMPTY holds no prompt: one a line is wanted"),
        (["--prompts", "BLANK"], "BLANK holds no prompt: one a line is wanted"),
        (["--prompts", "NOTHING"], "NOTHING: there is no such file; one prompt a line is wanted"),
        (["--prompts", "FOLDER"], "FOLDER cannot be read: Is a directory"),
    ],
)
def test_mistakes_are_one_clear_line(
    folder: Path,
    tmp_path: Path,
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("accessory.models.build.SHIPPED", folder.parent)
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "BLANK").write_text(" \n\n")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "LATIN").write_bytes("ein Bär".encode("latin-1"))
    more = [str(tmp_path / m) if m in ("EMPTY", "BLANK", "NOTHING", "FOLDER", "LATIN") else m for m in more]
    assert run(folder, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    if "/nowhere" in more:
        assert folder.name in error
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_chat_model_is_named_as_such(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder.parent / "tiny", tmp_path, "--prompt", "x") == 2
    assert "is a chat model" in capsys.readouterr().err
