"""The chat verb as a user runs it: a process, its stdin, its exit code; and as a person does, on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from accessory.__main__ import main
from accessory.backbone.generate import Sampling
from accessory.serve.chat import load
from accessory.serve.media import Limits, turns_of
from tests.tiny import tiny_model_dir

QUESTIONS = ("What is this?", "How many birds are there?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("chat"), seed=1)


@pytest.fixture(scope="module")
def cat(folder: Path) -> Path:
    path = folder.parent / "a cat.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.fixture(scope="module")
def answers(folder: Path, cat: Path) -> list[str]:
    """What the library says to the same questions."""
    chat = load(folder, sampling=Sampling(max_new_tokens=8)).new_chat()
    said = [chat.say(QUESTIONS[0], [cat]), chat.say(QUESTIONS[1])]
    assert said[0] != said[1], "choose another seed"
    return said


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "accessory", "chat", "--model", str(folder), "--max-new-tokens", "8", *more]


def run(folder: Path, *more: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *more), input=stdin, capture_output=True, text=True, timeout=200)


def test_ask_prints_the_answers_and_ends(folder: Path, cat: Path, answers: list[str]) -> None:
    done = run(
        folder, "--device", "cpu", "--image", str(cat), "--ask", QUESTIONS[0], "--ask", QUESTIONS[1], stdin="not read"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(a + "\n" for a in answers)


def test_piped_questions_and_commands(folder: Path, cat: Path, answers: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "dialogue.json"
    lines = [
        "/image /nowhere/cat.png",
        f"/image {cat}",
        "/image '/nowhere/at all.png'",
        "/wrong",
        QUESTIONS[0],
        "something else",
        "/undo",
        QUESTIONS[1],
        f"/save {saved}",
        "/save /nowhere/x.json",
        "/reset",
        "/undo",
        f"/image '{cat}'",
        QUESTIONS[0],
        "/help",
        "/quit",
        "never asked",
    ]
    done = run(folder, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.startswith(answers[0] + "\n")
    # The bad path lost nothing: the good picture was still there, and again after the reset.
    assert said.count(answers[0] + "\n") == 2
    assert answers[1] + "\n" in said
    assert "/save FILE" in said
    for remark in (
        "no picture at /nowhere/cat.png",
        "no picture at /nowhere/at all.png",
        "(1 for the next question)",
        "unknown command /wrong",
        "(forgotten: something else)",
        "cannot write /nowhere/x.json",
        "nothing to forget",
    ):
        assert remark in done.stderr, remark
    turns = turns_of(json.loads(saved.read_text()), Limits())
    assert [t.text for t in turns] == [QUESTIONS[0], answers[0], QUESTIONS[1], answers[1]]
    assert turns[0].pictures[0].source.size == (40, 30)


def test_end_of_input_ends_well_without_a_last_newline(folder: Path) -> None:
    done = run(folder, stdin="What is this?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 1


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--model", "/nowhere"], "neither a model folder"),
        (["--image", "/nowhere/cat.png", "--ask", "x"], "no picture at /nowhere/cat.png"),
        (["--temperature", "-1", "--ask", "x"], "temperature"),
        (["--device", "tpu", "--ask", "x"], "device 'tpu' is unknown"),
        (["--device", "cuda", "--ask", "x"], "device cuda:0 is not available"),
        (["--ask", " "], "empty question"),
        (["--ask", "small red cat " * 300], "this turn alone takes"),
    ],
)
def test_mistakes_are_one_clear_line(
    folder: Path, more: list[str], match: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["chat", "--model", str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_missing_assets_say_what_to_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("backbone: {source: asset:smollm2}\n")
    (tmp_path / "trainable.safetensors").write_bytes((folder / "trainable.safetensors").read_bytes())
    arguments = ["chat", "--model", str(tmp_path), "--cache", str(tmp_path / "cache"), "--ask", "x"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "fetch" in error
    assert "Traceback" not in error
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_control_c_stops_the_answer_and_not_the_program(folder: Path) -> None:
    """On a pseudo terminal: the first interrupt comes amid an endless answer, the second at the prompt."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command(folder)[:-2], "--max-new-tokens", "100000"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        # A suite that runs in the background was told to ignore interrupts, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(slave)
    try:
        seen = _until(master, "> ")
        assert "/help" in seen
        os.write(master, b"What is this?\n")
        _until(master, "?\r\n", more=20)
        assert "(stopped)" in _until(master, "> ", nudge=process)
        _until(master, "leaves)\r\n> ", nudge=process)
        os.write(master, b"/undo\n")
        assert "(forgotten: What is this?)" in _until(master, "> ")
        os.write(master, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _until(master: int, end: str, more: int = 0, nudge: subprocess.Popen[bytes] | None = None) -> str:
    """Read until ``end`` has come and ``more`` bytes after it. ``nudge`` is interrupted first, and again every five
    seconds: an interrupt between two system calls of the line editor waits there for the next key."""
    text, deadline, last = b"", time.monotonic() + 200, 0.0
    while time.monotonic() < deadline:
        if nudge is not None and time.monotonic() - last > 5:
            nudge.send_signal(signal.SIGINT)
            last = time.monotonic()
        if not select.select([master], [], [], 0.5)[0]:
            continue
        text += os.read(master, 1024)
        shown = text.decode(errors="replace")
        if end in shown and len(shown) - shown.rindex(end) - len(end) >= more and (more or shown.endswith(end)):
            return shown
    raise AssertionError(f"{end!r} did not come; the terminal shows {text[-500:]!r}")
