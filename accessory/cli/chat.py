"""``python -m accessory chat --model DIR [--generator DIR] [--image F] [--ask TEXT]``: talk in the terminal."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.cli.generate import OUT, picture_folder

if TYPE_CHECKING:
    from accessory.backbone.generate import Sampling
    from accessory.peft.quantize import Quantization
    from accessory.schema import Turn
    from accessory.serve.chat import Dialogue
    from accessory.serve.illustrated_chat import IllustratedChat

HELP = """\
Type a question; the answer streams below it. Ctrl-C stops an answer, Ctrl-D or /quit leaves.
  /image PATH   show a picture with the next question (several are fine; quote names with blanks)
  /undo         forget the last question and its answer
  /reset        begin anew
  /save FILE    write the dialogue as JSON
  /help         this text
  /quit         leave"""


QUANTIZE = "keep the language model in fewer bits: int8, int4 or nf4, also as int4,group=32 or int8,embeddings"
DRAWING = """\
  /pictures auto|always|never   when answers hold pictures: as the model wants, all of them, none"""


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("chat", help="talk about pictures in the terminal")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder, or the name of a shipped model")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture for the first question (repeatable)"
    )
    parser.add_argument("--ask", action="append", metavar="TEXT", help="ask this, print the answer, exit (repeatable)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest words")
    parser.add_argument("--top-p", type=float, help="draw only from the likeliest words that reach this probability")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    parser.add_argument("--seed", type=int, help="makes a temperature above 0 repeatable")
    parser.add_argument(
        "--device", metavar="cpu|cuda|cuda:N", help="where to compute (default: cuda where there is one)"
    )
    parser.add_argument("--quantize", metavar="KIND", help=QUANTIZE)
    parser.add_argument(
        "--generator",
        metavar="DIR",
        help="a generator folder, or the name of a shipped one: it draws the pictures that answers then hold",
    )
    parser.add_argument(
        "--pictures", choices=("auto", "always", "never"), default="auto",
        help="with --generator: as the model wants (the default), in every answer, or none",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT)
    parser.add_argument("--cache", type=Path, help="cache folder of the assets")
    parser.set_defaults(main=main)


def quantization(args: argparse.Namespace) -> Quantization | None:
    """What ``--quantize`` says, None where it is not given; ValueError for what it does not know."""
    from accessory.peft.quantize import Quantization

    return None if args.quantize is None else Quantization.parse(args.quantize)


def main(args: argparse.Namespace) -> int:
    """Chat. 0 at the end of input; ValueError or AssetError for what cannot be opened."""
    from accessory.backbone.generate import Sampling

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    terminal = _drawing(args, sampling) if args.generator else _talking(args, sampling)
    for name in args.image:
        terminal.show(name)
    if args.ask:
        for text in args.ask:
            terminal.ask(text)
        return 0
    return terminal.loop()


def _talking(args: argparse.Namespace, sampling: Sampling) -> Terminal:
    from accessory.serve.chat import load

    wanted = quantization(args)
    made = load(args.model, cache=args.cache, device=args.device, sampling=sampling, quantization=wanted)
    chat = made.new_chat()
    return Terminal(chat, chat.events)


def _drawing(args: argparse.Namespace, sampling: Sampling) -> Illustrator:
    from accessory.serve.illustrate import Controls
    from accessory.serve.illustrated_chat import load, of_mode

    if args.quantize is not None:
        raise ValueError(
            f"--quantize {args.quantize} does not go with --generator yet: what it reads was trained in bf16"
        )
    out = picture_folder(args.out)
    if any(out.glob("picture_*")):
        raise ValueError(f"{out} holds pictures of an earlier dialogue; --out takes another folder")
    controls = of_mode(Controls(seed=args.seed or 0), args.pictures)
    made = load(args.model, args.generator, cache=args.cache, device=args.device, sampling=sampling, controls=controls)
    if made.dream is None and args.pictures == "auto":
        print("(this model has no trigger for this generator: pictures come with --pictures always)", file=sys.stderr)
    return Illustrator(made.new_chat(), out)


class Terminal:
    """A chat on stdin and stdout; prompts and remarks appear only for a person, so that output can be piped.

    ``answer`` makes the events of an answer to a turn.
    """

    def __init__(self, chat: Dialogue[Any], answer: Callable[[Turn], Generator[Any, None, None]]) -> None:
        self.chat, self._answer = chat, answer
        self.waiting: list[Path] = []  # pictures for the next question
        self._person = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image, "/undo": self._undo, "/reset": self._reset, "/save": self._save, "/help": self._help,
        }  # fmt: skip

    def show(self, name: str) -> None:
        """Lay a picture beside the next question; ValueError when it cannot be opened."""
        from accessory.serve.media import open_uploads

        path = Path(name).expanduser()
        open_uploads([*self.waiting, path], self.chat.limits)
        self.waiting.append(path)

    def ask(self, text: str) -> None:
        """Print the answer as it comes; a notice goes to stderr."""
        from accessory.serve.chat import Notice
        from accessory.serve.media import user_turn

        events = self._answer(user_turn(text, self.waiting, self.chat.limits))
        self.waiting = []
        try:
            for event in events:
                if isinstance(event, Notice):
                    print(f"({event.text})", file=sys.stderr, flush=True)
                else:
                    self._print(event)
        finally:
            events.close()
            print(flush=True)

    def _print(self, event: Any) -> None:
        print(event, end="", flush=True)

    def loop(self) -> int:
        """Questions and commands until the input ends."""
        if self._person:
            import readline  # noqa: F401  # gives input() line editing and a history

            print("Ask away; /image PATH shows a picture, /help lists the rest.")
        while True:
            try:
                line = input("> " if self._person else "").strip()
            except EOFError:
                if self._person:
                    print()
                return 0
            except KeyboardInterrupt:
                if not self._person:
                    raise
                print("\n(Ctrl-D or /quit leaves)")
                continue
            if line in ("/quit", "/exit"):
                return 0
            if line:
                self._handle(line)

    def _handle(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        # A name with a second slash is a question that begins with a path, not a command.
        command = self._commands.get(name) if "/" not in name[1:] else None
        try:
            if command is not None:
                command(rest.strip())
            elif name.startswith("/") and "/" not in name[1:]:
                self._remark(f"unknown command {name}; there are: {', '.join(self._commands)}, /quit")
            else:
                self.ask(line)
        except ValueError as error:
            self._remark(f"error: {error}")
        except KeyboardInterrupt:
            self._remark("(stopped)")

    def _image(self, rest: str) -> None:
        names = shlex.split(rest) if not Path(rest).expanduser().is_file() else [rest]
        if not names:
            raise ValueError("/image needs the path of a picture")
        for name in names:
            self.show(name)
        self._remark(f"({len(self.waiting)} for the next question)")

    def _undo(self, rest: str) -> None:
        question = self.chat.undo()
        self._remark("nothing to forget" if question is None else f"(forgotten: {question.text})")

    def _reset(self, rest: str) -> None:
        self.chat.reset()
        self.waiting = []
        self._remark("(a new dialogue)")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save needs a file name")
        path = Path(rest).expanduser()
        try:
            path.write_text(json.dumps([_plain(t) for t in self.chat.history], indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error
        self._remark(f"({len(self.chat.history)} turns in {path})")

    def _help(self, rest: str) -> None:
        print(HELP)

    def _remark(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Illustrator(Terminal):
    """A terminal whose answers hold pictures: they are written to ``folder``, and their paths are printed.

    Beside them stands the log from which each can be drawn again.
    """

    chat: IllustratedChat

    def __init__(self, chat: IllustratedChat, folder: Path) -> None:
        super().__init__(chat, chat.events)
        self._folder = folder
        self._commands["/pictures"] = self._pictures

    def ask(self, text: str) -> None:
        """As any terminal does, with the log kept up to date."""
        from accessory.serve.pictures import save_records

        super().ask(text)
        if self.chat.records:
            save_records(self.chat.records, self._folder)

    def _print(self, event: Any) -> None:
        from accessory.serve.illustrate import ImageDone, TextDelta

        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, ImageDone):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"picture_{event.index:03}.png"
            event.picture.save(path)
            print(f"\n[{path}]", flush=True)

    def _pictures(self, rest: str) -> None:
        from accessory.serve.illustrated_chat import of_mode

        self.chat.controls = of_mode(self.chat.controls, rest or "auto")
        self._remark(f"(pictures: {rest or 'auto'})")

    def _help(self, rest: str) -> None:
        print(HELP + "\n" + DRAWING)


def _plain(turn: Turn) -> dict[str, Any]:
    """A turn as a message; pictures as PNG data: URLs, so that the file stands alone."""
    import base64
    import io

    from accessory.data.image import open_picture

    if not turn.pictures:
        return {"role": turn.role, "content": turn.text}
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        png = io.BytesIO()
        open_picture(part.source).save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": turn.role, "content": parts}
