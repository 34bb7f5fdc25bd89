"""What the chat page makes of the history that its widget sends."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (pip install -r requirements.txt)")

from demos.chat import asked, main
from tests.tiny import tiny_model_dir


def said(role: str, *parts: str | dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": role, "content": content}


PICTURE = {"type": "file", "file": {"path": "cat.png"}}


def test_questions_count_once_they_are_answered() -> None:
    history = [said("user", PICTURE, "What is this?"), said("assistant", "cat")]
    assert asked(history) == ["What is this?"]
    assert asked([{"role": "user", "content": "And this?"}, {"role": "assistant", "content": "dog"}]) == ["And this?"]


def test_a_refused_question_is_shown_but_was_never_asked() -> None:
    answered = [said("user", "One?"), said("assistant", "1")]
    refused = said("user", PICTURE, "Two?")
    assert asked([*answered, refused]) == ["One?"]
    later = [*answered, refused, said("user", "Three?"), said("assistant", "3")]
    assert asked(later) == ["One?", "Three?"]


def test_help_says_what_a_generator_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "without it answers are text" in " ".join(capsys.readouterr().out.split())


def test_a_device_that_is_not_there_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--model", str(tiny_model_dir(tmp_path)), "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: device cuda:0 is not available")


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--model", str(tiny_model_dir(tmp_path)), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot serve on 127.0.0.1, port {port}: ")
