"""The chat page: ``python demos/chat.py --model DIR [--generator DIR] [--host 127.0.0.1] [--port 7860]``.

A view and nothing else: limits, sessions, answers and what is forgotten are decided in ``accessory/serve``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a bare clone, wherever it is called

from accessory.data.assets import AssetError  # noqa: E402
from accessory.schema import Turn  # noqa: E402
from accessory.serve.chat import Chat, Dialogue, Notice, load  # noqa: E402
from accessory.serve.illustrate import Controls, ImageDone, ImagePreview, ImageStart, TextDelta  # noqa: E402
from accessory.serve.illustrated_chat import MODES, IllustratedChat, IllustratedModel, of_mode  # noqa: E402
from accessory.serve.illustrated_chat import load as load_illustrated  # noqa: E402
from accessory.serve.media import SUFFIXES, user_turn  # noqa: E402
from accessory.serve.sessions import Sessions  # noqa: E402

TITLE = "Accessory"
DESCRIPTION = (
    "A small language model that sees. Drop in one or more pictures, ask about them, and ask on: "
    "the conversation is kept. Try an example, or bring your own."
)
TEMPERATURE, MAX_NEW_TOKENS = 0.0, 128
GENERATOR = (
    "a generator folder, or the name of a shipped one: it draws the pictures that answers then hold, where the model "
    "wants one (Settings on the page: in every answer, or none); without it answers are text"
)
PREVIEWS = 10  # steps of the sampler between two looks at a picture in the making
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


Content = str | dict[str, Any]


class Said:
    """What an answer holds so far, as the page shows it."""

    def __init__(self) -> None:
        self.parts: list[str | dict[str, str]] = []
        self._draft: dict[str, str] | str | None = None  # stands at the end while a picture is drawn

    def take(self, event: object) -> bool:
        """Note an event; whether there is something new to show."""
        if isinstance(event, str | TextDelta):
            text = event if isinstance(event, str) else event.text
            if self.parts and isinstance(self.parts[-1], str):
                self.parts[-1] += text
            else:
                self.parts.append(text)
        elif isinstance(event, ImageStart):
            self._draft = "*drawing …*"
        elif isinstance(event, ImagePreview):
            self._draft = stored(event.picture)
        elif isinstance(event, ImageDone):
            self._draft = None
            self.parts.append(stored(event.picture))
        else:
            return False
        return True

    @property
    def message(self) -> Content:
        """For the widget: a text where there is nothing else."""
        parts = [*self.parts, *([self._draft] if self._draft is not None else [])]
        if all(isinstance(p, str) for p in parts):
            return "\n\n".join(str(p) for p in parts)
        return {"role": "assistant", "content": parts}


def stored(picture: Image.Image) -> dict[str, str]:
    """A picture as a file that the page may show."""
    folder = get_upload_folder()
    return {"path": save_pil_to_cache(picture, folder, format="png")}


def stream(
    chat: Dialogue[Any],
    message: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    answer: Callable[[Turn], Iterable[object]],
) -> Iterator[Content]:
    """The answer to what was typed, as it grows."""
    shown = asked(history)
    if chat.follow(shown) < len(shown):
        gr.Warning("This conversation was idle for too long: the model no longer knows its earlier turns.")
    said = Said()
    try:
        for event in answer(user_turn(message.get("text") or "", message.get("files") or (), chat.limits)):
            if isinstance(event, Notice):
                gr.Info(event.text)
            elif said.take(event):
                yield said.message
    except ValueError as error:
        # Said and not raised: after an exception the widget leaves its text box locked for good.
        gr.Warning(str(error), title="Not asked")
        return
    except Exception:
        logging.getLogger("accessory.demos.chat").exception("an answer failed")
        gr.Warning("The model failed on this question; the log says why.", title="Error")
        return
    if not said.parts:
        yield "*(no answer)*"


def settings(max_new_tokens: int, draws: bool) -> list[Any]:
    """What the accordion holds, in the order of the answering functions' last arguments."""
    found: list[Any] = [
        gr.Slider(0.0, 1.5, TEMPERATURE, step=0.05, label="Temperature", info="0 always gives the likeliest answer"),
        gr.Slider(1, 512, max_new_tokens, step=1, label="Longest answer", info="in tokens"),
    ]
    if draws:
        found.append(gr.Radio(list(MODES), value="auto", label="Pictures", info="those that the model draws"))
    return found


def page(
    sessions: Sessions[Chat] | Sessions[IllustratedChat],
    max_new_tokens: int = MAX_NEW_TOKENS,
    folder: Path = ROOT / "samples",
    draws: bool = False,
) -> gr.ChatInterface:
    """The page over the conversations of all its visitors; ``max_new_tokens`` is where its slider begins, and
    ``draws`` says that their answers may hold pictures."""

    def answer(
        message: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        temperature: float,
        longest: float,
        request: gr.Request,
    ) -> Iterator[Content]:
        chat: Any = sessions.get(str(request.session_hash))
        sampling = replace(chat.sampling, temperature=temperature, max_new_tokens=int(longest))
        yield from stream(chat, message, history, lambda turn: chat.events(turn, sampling))

    def illustrated(
        message: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        temperature: float,
        longest: float,
        pictures: str,
        request: gr.Request,
    ) -> Iterator[Content]:
        chat: Any = sessions.get(str(request.session_hash))
        sampling = replace(chat.sampling, temperature=temperature, max_new_tokens=int(longest))
        controls = of_mode(chat.controls, pictures)
        yield from stream(chat, message, history, lambda turn: chat.events(turn, controls, sampling))

    messages, labels = examples(folder)
    return gr.ChatInterface(
        illustrated if draws else answer,
        multimodal=True,
        title=TITLE,
        description=DESCRIPTION,
        chatbot=conversation(),
        textbox=question(),
        additional_inputs=settings(max_new_tokens, draws),
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
    parser.add_argument("--generator", metavar="DIR", help=GENERATOR)
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
    draws = args.generator is not None
    try:
        model: Any = illustrated_model(args) if draws else load(args.model, cache=args.cache, device=args.device)
        sessions = Sessions(model, args.sessions)
    except (ValueError, AssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = page(sessions, args.max_new_tokens, draws=draws).queue(max_size=args.queue)
    try:
        launch(made, args, model.limits.max_bytes)
    except OSError as error:  # a port that is taken, an address that is not this machine's
        print(f"error: cannot serve on {args.host}, port {args.port}: {error}; --port takes another", file=sys.stderr)
        return 2
    return 0


def illustrated_model(args: argparse.Namespace) -> IllustratedModel:
    """The model with its generator."""
    controls = Controls(previews=PREVIEWS)
    return load_illustrated(args.model, args.generator, cache=args.cache, device=args.device, controls=controls)


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
