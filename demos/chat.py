"""The chat page: ``python demos/chat.py --model DIR [--host 127.0.0.1] [--port 7860]``.

A view and nothing else: limits, sessions, answers and what is forgotten are decided in ``accessory/serve``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a bare clone, wherever it is called

from accessory.data.assets import AssetError  # noqa: E402
from accessory.serve.chat import Notice, Sessions, load  # noqa: E402
from accessory.serve.media import SUFFIXES, user_turn  # noqa: E402

TITLE = "Accessory"
DESCRIPTION = (
    "A small language model that sees. Drop in one or more pictures, ask about them, and ask on: "
    "the conversation is kept. Try an example, or bring your own."
)
TEMPERATURE, MAX_NEW_TOKENS = 0.0, 128
CSS = """
.gradio-container { max-width: 860px !important; margin: 0 auto !important; }
h1 { letter-spacing: -0.02em; margin-bottom: 0 !important; }
h1 + *, .placeholder, .placeholder * { text-align: center !important; }
.example { border: 1px solid var(--border-color-primary) !important; border-radius: 12px !important; }
.example div:has(> img), .example img { width: 64px !important; height: 64px !important; }
.example img { object-fit: contain !important; }
button[title="Share"], button[aria-label="Share"] { display: none !important; }
"""


def examples(folder: Path, most: int = 9) -> tuple[list[dict[str, Any]], list[str]]:
    """The first questions of the first sample pictures, as messages and as labels; more than nine would scroll."""
    listing = folder / "samples.json"
    samples = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else []
    found = [(folder / s["image"], s["turns"][0][0]) for s in samples if (folder / s["image"]).is_file()][:most]
    return [{"text": text, "files": [str(path)]} for path, text in found], [text for _, text in found]


def asked(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of every question that the page shows with an answer.

    The page also keeps showing questions that were refused or stopped before their first word; no chat knows those.
    """
    questions = []
    waiting: str | None = None
    for message in history:
        if message["role"] == "user":
            content = message["content"]
            parts = [content] if isinstance(content, str) else content
            texts = [p if isinstance(p, str) else p.get("text", "") for p in parts if isinstance(p, str | Mapping)]
            waiting = "".join(t for t in texts if t)
        elif waiting is not None:
            questions.append(waiting)
            waiting = None
    return questions


def conversation() -> gr.Chatbot:
    """What was said so far."""
    return gr.Chatbot(
        show_label=False,
        height="60vh",
        min_height=360,
        layout="bubble",
        buttons=["copy"],
        feedback_options=None,
        placeholder="### Show me a picture and ask what you want to know",
    )


def question() -> gr.MultimodalTextbox:
    """Where questions are typed and pictures dropped."""
    return gr.MultimodalTextbox(
        file_types=list(SUFFIXES),
        file_count="multiple",
        sources=["upload"],
        placeholder="Ask about a picture …",
        show_label=False,
        autofocus=True,
    )


def page(sessions: Sessions, max_new_tokens: int = MAX_NEW_TOKENS, folder: Path = ROOT / "samples") -> gr.ChatInterface:
    """The page over the conversations of all its visitors; ``max_new_tokens`` is where its slider begins."""

    def answer(
        message: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        temperature: float,
        longest: float,
        request: gr.Request,
    ) -> Iterator[str]:
        chat = sessions.get(str(request.session_hash))
        shown = asked(history)
        if chat.follow(shown) < len(shown):
            gr.Warning("This conversation was idle for too long: the model no longer knows its earlier turns.")
        text = ""
        try:
            sampling = replace(chat.sampling, temperature=temperature, max_new_tokens=int(longest))
            turn = user_turn(message.get("text") or "", message.get("files") or (), chat.limits)
            for event in chat.events(turn, sampling):
                if isinstance(event, Notice):
                    gr.Info(event.text)
                else:
                    text += event
                    yield text
        except ValueError as error:
            # Said and not raised: after an exception the widget leaves its text box locked for good.
            gr.Warning(str(error), title="Not asked")
            return
        except Exception:
            logging.getLogger("accessory.demos.chat").exception("an answer failed")
            gr.Warning("The model failed on this question; the log says why.", title="Error")
            return
        if not text:
            yield "*(no answer)*"

    messages, labels = examples(folder)
    return gr.ChatInterface(
        answer,
        multimodal=True,
        title=TITLE,
        description=DESCRIPTION,
        chatbot=conversation(),
        textbox=question(),
        additional_inputs=[
            gr.Slider(
                0.0, 1.5, TEMPERATURE, step=0.05, label="Temperature", info="0 always gives the likeliest answer"
            ),
            gr.Slider(1, 512, max_new_tokens, step=1, label="Longest answer", info="in tokens"),
        ],
        additional_inputs_accordion=gr.Accordion("Settings", open=False),
        examples=[[m] for m in messages] or None,  # cards; with values for the sliders it would be a table
        example_labels=labels or None,
        cache_examples=False,
        flagging_mode="never",
        analytics_enabled=False,
        concurrency_limit=2,
        api_visibility="private",
        delete_cache=(3600, 3600),
        fill_height=True,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A chat page about pictures")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder, or the name of a shipped model")
    parser.add_argument(
        "--device", metavar="cpu|cuda|cuda:N", help="where to compute (default: cuda where there is one)"
    )
    parser.add_argument("--cache", type=Path, help="cache folder of the assets")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    parser.add_argument("--sessions", type=int, default=16, help="conversations kept (default: 16)")
    parser.add_argument("--queue", type=int, default=32, help="questions that may wait (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer at first, in tokens")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; 2 for a model that cannot be opened."""
    args = parse(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        model = load(args.model, cache=args.cache, device=args.device)
        sessions = Sessions(model, args.sessions)
    except (ValueError, AssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = page(sessions, args.max_new_tokens).queue(max_size=args.queue)
    try:
        launch(made, args, model.limits.max_bytes)
    except OSError as error:  # a port that is taken, an address that is not this machine's
        print(f"error: cannot serve on {args.host}, port {args.port}: {error}", file=sys.stderr)
        return 2
    return 0


def launch(made: gr.Blocks, args: argparse.Namespace, max_bytes: int) -> None:
    """Serve ``made`` until interrupted; OSError when it cannot listen. Uploads have at most ``max_bytes``."""
    made.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        max_file_size=max_bytes,
        allowed_paths=[],
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        # system fonts: the default theme would ask a font server
        theme=gr.themes.Soft(
            primary_hue="indigo",
            font=("system-ui", "sans-serif"),  # type: ignore[arg-type]
            font_mono=("ui-monospace", "monospace"),  # type: ignore[arg-type]
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
