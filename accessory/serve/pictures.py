"""One picture of an illustrated answer: its seed, its rendering beside the text, and the record to draw it again."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accessory import config as configuration
from accessory.diffusion.batch import OnStep, StepEvent
from accessory.diffusion.condition import Condition
from accessory.diffusion.sampler import SamplerSettings
from accessory.models.generator_net import Generator, Size

LOG_FILE = "pictures.jsonl"


def picture_seed(document: int, index: int) -> int:
    """The seed of picture ``index`` of a document: the same on every machine, whatever text stands between."""
    digest = hashlib.blake2b(f"{document}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # a generator takes 63 bits


@dataclass(frozen=True)
class PictureRecord:
    """All that a picture was made from: with it and the generator the same pixels come out again.

    Attributes:
        index: number of the picture in its dialogue, from 0.
        context: digest of the positions and tiles that it was dreamt from.
        condition: of this one picture, on the CPU, as the denoiser saw it.
        prompt: what the user said last before it; whether more was read, ``context`` knows.
    """

    index: int
    seed: int
    size: Size
    negative: str | None
    settings: SamplerSettings
    context: str
    condition: Condition
    prompt: str = ""


@torch.no_grad()
def draw(generator: Generator, record: PictureRecord, on_step: OnStep | None = None) -> Image.Image:
    """The picture of a record.

    Raises:
        ValueError: for a size that the generator cannot make, or settings that do not fit its denoiser.
    """
    device = next(generator.denoiser.parameters()).device
    null, negative = None, record.negative
    if record.settings.scale != 1:
        null = generator.null(1, None if negative is None else [negative])
    return generator.render(
        record.condition.to(device),
        null,
        sizes=[record.size],
        seeds=[record.seed],
        settings=record.settings,
        on_step=on_step,
    )[0]


@dataclass(frozen=True)
class Progress:
    """After ``step`` of ``steps``: the state as a picture."""

    step: int
    steps: int | None
    picture: Image.Image


class _ClosedError(Exception):
    """Nobody waits for the picture any more."""


class Rendering:
    """A picture in the making on a thread of its own, so that whoever listens can see it come, and stop it.

    ``previews``: every so many steps the state is shown; 0 shows none. What fails is raised by :meth:`next`.
    """

    def __init__(self, generator: Generator, record: PictureRecord, previews: int = 0) -> None:
        self._generator, self._record, self._previews = generator, record, previews
        self._made: queue.SimpleQueue[Progress | Image.Image | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rendering", daemon=True)
        self._thread.start()

    def next(self) -> Progress | Image.Image:
        """Wait for a preview or, at last, the picture."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Stop at the next step; returns when nothing runs any more."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._made.put(draw(self._generator, self._record, self._step))
        except BaseException as error:  # handed to whoever waits
            self._made.put(error)

    def _step(self, event: StepEvent) -> None:
        if self._closed.is_set():
            raise _ClosedError
        if self._previews and event.step % self._previews == 0 and event.step != event.steps:
            self._made.put(Progress(event.step, event.steps, self._generator.pictures(event.latents)[0]))


def save_records(records: Sequence[PictureRecord], folder: Path) -> None:
    """Write a log: one line of JSON a picture, its condition in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in records:
        name = f"picture_{record.index:03}.condition.safetensors"
        save_file({k: v.contiguous() for k, v in record.condition.parts().items()}, folder / name)
        facts = {
            "index": record.index,
            "prompt": record.prompt,
            "seed": record.seed,
            "size": list(record.size),
            "steps": record.settings.steps,
            "guidance": record.settings.scale,
            "negative": record.negative,
            "settings": configuration.plain(record.settings),
            "context": record.context,
            "condition": name,
        }
        lines.append(json.dumps(facts, ensure_ascii=False) + "\n")
    (folder / LOG_FILE).write_text("".join(lines), encoding="utf-8")


def load_records(folder: Path) -> list[PictureRecord]:
    """The log that :func:`save_records` wrote.

    Raises:
        ValueError: when there is none, or a line of it cannot be read: the line is named.
    """
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no log of pictures: {LOG_FILE} is missing")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            facts = json.loads(line)
            record = PictureRecord(
                facts["index"],
                facts["seed"],
                (facts["size"][0], facts["size"][1]),
                facts["negative"],
                configuration.build(facts["settings"], SamplerSettings, f"{path}:{number}"),
                facts["context"],
                Condition(**load_file(path.parent / facts["condition"])),
                facts.get("prompt", ""),
            )
        except (KeyError, IndexError, TypeError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}:{number} is no record of a picture ({error!r})") from error
        records.append(record)
    return records


def digest_of(keys: Sequence[int | bytes]) -> str:
    """Sixteen hexadecimal digits of what a picture was dreamt from: ids, and the content of tiles in their place."""
    seen = hashlib.blake2b(digest_size=8)
    for key in keys:
        seen.update(key if isinstance(key, bytes) else b"%d," % key)
    return seen.hexdigest()
