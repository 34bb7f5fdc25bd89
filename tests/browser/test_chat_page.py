"""The chat page in a real browser: upload, ask, watch it stream, ask on; a second visitor sees nothing of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from accessory.backbone.generate import Sampling
from accessory.serve.chat import load
from tests.browser.helpers import ROOT, browser, served
from tests.tiny import tiny_model_dir

pytestmark = pytest.mark.browser

PICTURE = ROOT / "samples" / "cat.png"
FIRST, SECOND = "What is this?", "How many birds are there?"
PATIENCE = 120_000  # milliseconds; shared machines can be slow
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const bots = document.querySelectorAll('[data-testid="bot"]');
    const text = bots.length ? bots[bots.length - 1].innerText : '';
    if (window.seen[window.seen.length - 1] !== text) window.seen.push(text);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
DONE = """n => document.querySelectorAll('[data-testid="bot"]').length >= n
  && document.querySelector('[data-testid="submit-button"]') !== null"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("page"), seed=1)


def opened(chromium: Any, url: str) -> tuple[Any, list[str]]:
    """A page of a new visitor, and the addresses that it asks for."""
    page = chromium.new_context(viewport={"width": 1100, "height": 900}).new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url, timeout=PATIENCE)
    page.wait_for_selector("textarea", timeout=PATIENCE)
    page.wait_for_selector(".example", timeout=PATIENCE)
    page.evaluate(WATCH)
    return page, requests


def ask(page: Any, text: str, number: int) -> str:
    """Ask and wait for answer ``number`` (from 1) to be complete."""
    page.fill("textarea", text)
    page.press("textarea", "Enter")
    page.wait_for_function(DONE, arg=number, timeout=PATIENCE)
    return str(page.locator('[data-testid="bot"]').nth(number - 1).inner_text())


def upload(page: Any, path: Path) -> None:
    page.set_input_files("input[type=file]", str(path))
    page.wait_for_selector('[aria-label="Remove file"]', timeout=PATIENCE)


def test_two_visitors_talk_about_a_picture(folder: Path, tmp_path: Path) -> None:
    model = load(folder, sampling=Sampling(max_new_tokens=24))
    known = model.new_chat()
    known.say(FIRST, [PICTURE])
    assert known.say(SECOND) != model.chat(SECOND), "choose another seed: the answers must tell the visitors apart"

    arguments = ("--model", str(folder), "--max-new-tokens", "24")
    with browser() as chromium, served("demos/chat.py", *arguments, log=tmp_path / "page.log") as url:
        page, requests = opened(chromium, url)
        assert page.locator(".example").count() >= 8
        assert all(r.startswith((url, "data:", "blob:")) for r in requests), "the page asks nobody else"
        page.screenshot(path=str(tmp_path / "empty.png"))

        upload(page, PICTURE)
        ask(page, FIRST, 1)
        seen = [text for text in page.evaluate("window.seen") if text.strip()]
        assert len(seen) >= 3, f"the answer came at once, not as a stream: {seen}"
        assert page.locator('[data-testid="user"] img, .message img').count() >= 1
        second = ask(page, SECOND, 2)
        page.wait_for_function("!document.body.innerText.includes('processing |')", timeout=PATIENCE)
        page.screenshot(path=os.environ.get("ACCESSORY_SCREENSHOT", str(tmp_path / "chat.png")))

        other, _ = opened(chromium, url)
        assert other.locator('[data-testid="bot"]').count() == 0
        alone = ask(other, SECOND, 1)
        assert alone != second, "the second visitor got an answer from the first one's conversation"

        third, _ = opened(chromium, url)
        third.locator(".example").first.click()
        third.wait_for_function(DONE, arg=1, timeout=PATIENCE)
        assert third.locator('[data-testid="bot"]').first.inner_text().strip()

        bad = tmp_path / "bad.png"
        bad.write_text("not a picture at all")
        upload(other, bad)
        other.fill("textarea", FIRST)
        other.press("textarea", "Enter")
        other.get_by_text("not a picture in one of").first.wait_for(timeout=PATIENCE)
        assert "Traceback" not in other.content()

        if other.locator('[aria-label="Remove file"]').count():
            other.locator('[aria-label="Remove file"]').first.click()
        ask(other, FIRST, 2)
        assert "idle for too long" not in other.content(), "a refused question is no lost turn"
    assert "Traceback" not in (tmp_path / "page.log").read_text()
