"""The chat page that draws, in a real browser: a request, and a follow-up that refers back to the picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.browser.helpers import browser, served
from tests.browser.test_chat_page import DONE, PATIENCE, opened
from tests.tiny_generator import tiny_generator_dir

pytestmark = pytest.mark.browser

DRAWN = """n => [...document.querySelectorAll('[data-testid="bot"] img')]
  .filter(i => i.complete && i.naturalWidth > 0).length >= n"""


def ask(page: Any, text: str) -> None:
    """Ask and wait for the whole answer, which may be several bubbles."""
    before = page.locator('[data-testid="bot"]').count()
    page.fill("textarea", text)
    page.press("textarea", "Enter")
    page.wait_for_function(DONE, arg=before + 1, timeout=PATIENCE)


def test_a_picture_and_one_that_refers_back(tmp_path: Path) -> None:
    generator = tiny_generator_dir(tmp_path, "dream", size=64)
    arguments = ("--model", str(tmp_path / "tiny"), "--generator", str(generator), "--max-new-tokens", "12")
    with browser() as chromium, served("demos/chat.py", *arguments, log=tmp_path / "page.log") as url:
        page, _ = opened(chromium, url)
        ask(page, "Draw a red cat.")
        assert page.locator('[data-testid="bot"] img').count() == 0, "auto: this model never says its trigger"

        page.get_by_text("Settings").click()
        page.get_by_label("always").check()
        ask(page, "Draw a red cat.")
        page.wait_for_function(DRAWN, arg=1, timeout=PATIENCE)
        ask(page, "Now give it a hat.")
        page.wait_for_function(DRAWN, arg=2, timeout=PATIENCE)
        sources = page.evaluate("""() => [...document.querySelectorAll('[data-testid="bot"] img')].map(i => i.src)""")
        assert len(set(sources)) == 2
        page.screenshot(path=os.environ.get("ACCESSORY_SCREENSHOT", str(tmp_path / "drawn.png")))

        page.get_by_label("never").check()
        ask(page, "And now?")
        assert page.locator('[data-testid="bot"] img').count() == 2
        assert "idle for too long" not in page.content(), "the page and the chat agree on the history"
    assert "Traceback" not in (tmp_path / "page.log").read_text()
