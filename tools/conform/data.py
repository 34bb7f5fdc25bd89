"""Rows of the fine-tuning data sets, their prompt templates, and what is done to pictures."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from accessory.data import template
from accessory.data.encode import Encoder
from accessory.data.image import pad_to_square
from accessory.data.layouts import Layout
from accessory.data.loader import Loader
from accessory.data.mixture import Mixture
from accessory.data.packing import pack
from accessory.data.rows import RowRejected
from accessory.data.template import EOS, Control, Template, render
from accessory.data.tiling import TilingConfig, cut
from accessory.data.tokenizer import load
from accessory.schema import Encoded, Picture, Sample, Turn
from accessory.tokens import IGNORE
from accessory.vision.tower import CLIP_MEAN, CLIP_STD, Tower, VisionTokens
from tools.conform.comparison import Comparison, Handler

PROMPTS = {"alpaca": "alpaca", "shortqa": "alpaca_short", "qg": "question", "caption": "plain", "None": "plain"}
DIALOGUES = dict.fromkeys(("default", "simple", "v1"), "sphinx")
LONG = "a row that is too long is refused by name (the reference cuts its end off, answer and end of sequence with it)"
EMPTY = "a row without an answer is refused by name (the reference teaches to say nothing, or takes a neighbour)"
NEIGHBOUR = "a bad row is refused by name (the reference serves a neighbour twice in its place)"
SYSTEM = "a system turn is read as one (the reference takes the row for broken)"
INPUT = "a row's input is never dropped (the reference's templates shortqa, qg and None leave it out)"
UNKNOWN = "an unknown template is an error (the reference goes on with None as the prompt)"
ORDER = (
    "every row comes once an epoch, in a new order each time (the reference keeps the composition of every batch and "
    "never shows the longest rows of a type)"
)
ENDED = "an answer that is empty is still ended in a rendered dialogue (the reference writes nothing)"
SEARCH = "answers are labelled as they are written (the reference searches their tokens in the whole dialogue)"


class Clip(Tower):
    """CLIP's normalisation, without a network behind it."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 1, (1, 1), CLIP_MEAN, CLIP_STD)

    def encode(self, pixels: Tensor) -> VisionTokens:
        """There is none."""
        raise ValueError("this tower only normalises pictures")


def encoder(folder: Path, config: dict[str, Any], name: str) -> Encoder:
    """The production encoder for rows of a case."""
    tiling = TilingConfig(size=config["transform_size"])
    words = config["image_words"]
    return Encoder(load(folder / "tokenizer.model"), template.get(name), tiling, words, config["max_words"])


def text_part(row: Encoded) -> tuple[list[int], list[int]]:
    """Ids and labels of the text: the reference's rows hold no placeholders, and 0 where nothing is learned."""
    keep = row.ids >= 0
    return row.ids[keep].tolist(), row.labels[keep].masked_fill(row.labels[keep] == IGNORE, 0).tolist()


def expected_part(item: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels of a recorded row, without its padding."""
    n = round(sum(item["mask"]))
    return item["input"][:n], item["labels"][:n]


def refused(encode: Encoder, turns: tuple[Turn, ...]) -> str:
    """Why a row is refused; empty when it is not."""
    try:
        encode.encode(Sample(turns))
    except RowRejected as error:
        return error.reason
    return ""


def whole_row(name: str, encode: Encoder, turns: tuple[Turn, ...], item: dict[str, Any], c: Comparison) -> None:
    """One row that both sides take, or that only the reference takes because it cuts it."""
    row = encode.row(turns)
    ours, theirs = text_part(row), expected_part(item)
    if len(row.ids) <= encode.max_length:
        c.equal(f"{name} input", ours[0], theirs[0])
        if any(theirs[1]) and not any(ours[1]):
            c.deviates(f"{name} refused", "nothing to learn" in refused(encode, turns), True, EMPTY)
        else:
            c.equal(f"{name} labels", ours[1], theirs[1])
        return
    n = len(theirs[0])
    c.equal(f"{name} input", ours[0][:n], theirs[0])
    c.equal(f"{name} labels", ours[1][:n], theirs[1])
    c.deviates(f"{name} refused", "the limit is" in refused(encode, turns), True, LONG)


def pictures(encode: Encoder, turns: tuple[Turn, ...], expected: Tensor, c: Comparison) -> None:
    """The only tile of a row, normalised."""
    tiles = encode.row(turns).tiles
    c.tensor("image", Clip(encode.tile_size).normalise(tiles)[0], expected)


def single_turns(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Rows of instructions: prompts, ids, labels, pictures, and in which order they come."""
    io, items = load_file(folder / "io.safetensors"), json.loads((folder / "items.json").read_text())
    samples = []
    for i, item in enumerate(items):
        row, kind = item["ann"], "describe" if "instruction" not in item["ann"] else "alpaca"
        row = {**row, "caption": row["output"]} if kind == "describe" else row
        turns = Layout(kind, {}, folder.resolve()).turns(row)
        encode = encoder(folder, config, PROMPTS[row["sys_prompt"]])
        shown = "".join(
            s.content for s in render(encode.template, turns[:-1], generate=True) if isinstance(s.content, str)
        )
        c.equal("prompt", shown, item["prompt"])
        whole_row("row", encode, turns, item, c)
        if item["has_image"]:
            pictures(encode, turns, io.pop(f"out.image.{i}"), c)
        samples.append(Sample(turns, index=i))
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")
    formats(json.loads((folder / "format_prompt.json").read_text()), c)
    recipes(json.loads((folder / "preprocess.json").read_text()), c)
    order(samples, json.loads((folder / "sampler.json").read_text()), c)


class Rows:
    """Samples as a source."""

    name, weight, unbounded = "rows", 1.0, False

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def order(samples: list[Sample], recorded: list[dict[str, Any]], c: Comparison) -> None:
    """Two epochs of the recorded rows: complete, and not alike."""
    n = len(samples)
    mixture = Mixture([Rows(samples)], seed=0)
    drawn = [mixture.draw(k).row for k in range(2 * n)]
    complete = sorted(drawn[:n]) == sorted(drawn[n:]) == list(range(n))
    theirs = [r for r in recorded if r["kwargs"]["shuffle"] and not r["start_iter"]]
    short = any(len(r["indices"]) * r["kwargs"]["num_replicas"] < n for r in theirs)
    c.deviates("sampler", (complete, drawn[:n] != drawn[n:], short), (True, True, True), ORDER)


def formats(rows: list[dict[str, Any]], c: Comparison) -> None:
    """Prompt templates on small rows."""
    for case in rows:
        name, row = case["sys_name"], case["row"]
        if name not in PROMPTS:
            try:
                template.get(name)
                told = ""
            except ValueError as error:
                told = str(error)
            c.deviates("unknown template", name in told, True, UNKNOWN)
            continue
        asked = Layout("alpaca", {}, Path()).turns({**row, "output": "x"})[:1]
        turns = (Turn("user", ()),) if name == "caption" else asked
        made = render(template.get(PROMPTS[name]), turns, generate=True)
        ours = "".join(s.content for s in made if isinstance(s.content, str))
        given = (row.get("input") or "").strip()
        if given and name not in ("alpaca", "caption"):
            whole = case["prompt"].replace(row["instruction"], f"{row['instruction']}\n{given}")
            c.deviates("format_prompt", ours, whole, INPUT)
        else:
            c.equal("format_prompt", ours, case["prompt"])


def recipes(recorded: dict[str, Any], c: Comparison) -> None:
    """Rows of other layouts read as instructions."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        kinds = {"single_turn_llava": ("llava", {}), "caption": ("describe", {"image": "url"})}
        for recipe, case in recorded.items():
            kind, columns = kinds[recipe]
            for row, expected in zip(case["rows"], case["result"], strict=True):
                Image.new("RGB", (2, 2)).save(root / expected["image"])
                turns = Layout(kind, columns, root, image_first=True).turns(row)
                path = turns[0].pictures[0].source
                ours = {"image": Path(str(path)).name, "instruction": turns[0].text, "output": turns[1].text}
                c.equal(f"preprocess {recipe}", ours, {"instruction": "", **expected})


def dialogues(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Rows of conversations, and every dialogue template."""
    io, items = load_file(folder / "io.safetensors"), json.loads((folder / "items.json").read_text())
    rows = json.loads((folder / "order.json").read_text())
    encode = encoder(folder, config, "sphinx")
    layout = Layout("llava", {}, folder.resolve())
    for i, (row, item) in enumerate(zip(rows, items, strict=True)):
        if item["actually_served_index"] != i:
            bad_row(encode, layout, row, c)
            continue
        turns = layout.turns(row)
        whole_row("row", encode, turns, item, c)
        if item["has_image"]:
            pictures(encode, turns, io.pop(f"out.image.{i}"), c)
        learned = encode.row(turns).labels != IGNORE
        runs = int((learned[1:] & ~learned[:-1]).sum())
        c.deviates("answers found", runs, sum(t.role == "assistant" for t in turns), SEARCH)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")
    for name, case in json.loads((folder / "templates.json").read_text()).items():
        one_template(template.get(DIALOGUES.get(name, name)), case, c)


def bad_row(encode: Encoder, layout: Layout, row: dict[str, Any], c: Comparison) -> None:
    """A row that the reference replaces by a neighbour."""
    if row["conversations"][0]["from"] == "system":
        turns = layout.turns(row)
        c.deviates(
            "system turn",
            [t.role for t in turns],
            [m["from"].replace("gpt", "assistant") for m in row["conversations"]],
            SYSTEM,
        )
        return
    try:
        told = refused(encode, layout.turns(row))
    except ValueError as error:
        told = str(error)
    c.deviates("bad row", bool(told), True, NEIGHBOUR)


def turns_of(qas: list[list[str | None]]) -> list[Turn]:
    """Questions and answers as turns; the answer that is None is to be given."""
    turns = []
    for question, answer in qas:
        turns.append(Turn("user", (question or "",)))
        if answer is not None:
            turns.append(Turn("assistant", (answer,)))
    return turns


def written(t: Template, turns: list[Turn], generate: bool) -> tuple[str, list[str]]:
    """A dialogue as the reference writes it, and its learned stretches."""
    t = replace(t, begin=(), close=())
    whole, learned, on = "", list[str](), False
    for s in render(t, turns, generate=generate):
        assert not isinstance(s.content, Picture)
        text = s.content if isinstance(s.content, str) else "</s>" if s.content == EOS else ""
        assert not isinstance(s.content, Control) or text
        whole += text
        if s.learn:
            learned = [*learned[:-1], learned[-1] + text] if on else [*learned, text]
        on = s.learn
    return whole, [text.removeprefix(" ") for text in learned]


def one_template(t: Template, case: dict[str, Any], c: Comparison) -> None:
    """One dialogue template: prompt, whole dialogues and what is learned of them."""
    open_, full = turns_of(case["qas"]), turns_of(case["process_full_qas"])
    c.equal(f"{t.name} prompt", written(t, open_, True), (case["prompt"], case["process"]["to_predict"]))
    c.equal(f"{t.name} open", written(t, open_, True)[0], case["process"]["conv"])
    expected = case["process_full"]
    c.equal(f"{t.name} whole", written(t, full, False), (expected["conv"], expected["to_predict"]))
    empty, ours = case["last_answer_empty_or_none"], written(t, turns_of([["Q", ""]]), False)
    if case["sep_style"] == "TWO":
        c.deviates(f"{t.name} empty", ours[0], empty["conv"] + " </s>", ENDED)
    else:
        c.equal(f"{t.name} empty", ours, (empty["conv"], empty["to_predict"]))
    c.equal(
        f"{t.name} stop", case["response_end_signal"] in (*t.stop_texts, *("</s>" for s in t.stop if s == EOS)), True
    )


def transforms(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Squaring, resizing, cutting and normalising pictures."""
    io = load_file(folder / "io.safetensors")
    images = {
        k.removeprefix("in.image"): Image.fromarray(io.pop(k).numpy()) for k in list(io) if k.startswith("in.image")
    }
    fits = {"padded_resize": "pad", "resized_center_crop": "crop"}
    for name, expected in io.items():
        parts = name.split(".")
        if parts[1].startswith("pad") and parts[1] not in fits:
            square = pad_to_square(images[parts[1].removeprefix("pad")])
            c.tensor("pad", torch.tensor(list(square.tobytes())).view(square.height, square.width, 3), expected)
            continue
        _, kind, size, image = parts
        picture = images[image.removeprefix("image")]
        fit: Any = fits[kind]
        tiling = TilingConfig(size=int(size.removeprefix("size")), fit=fit)
        tiles = cut(picture, tiling.plan(*picture.size))
        c.tensor(kind, Clip(tiling.size).normalise(tiles)[0], expected)


CUT = "a document that is too long is packed or refused by name (the reference loses what is behind max_words)"
DEALT = (
    "every rank draws from every file, the remainder too (the reference drops files that do not divide by its ranks)"
)
RESUME = (
    "a resumed run gets the very batches that followed, with any number of workers (the reference: the same number)"
)
NOTHING = "an empty document is refused by name (the reference learns that nothing follows nothing)"


def pretraining(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Documents as rows, and packed into rows of one length."""
    found = json.loads((folder / "pretrain.json").read_text())
    encode = Encoder(load(folder / "tokenizer.model"), template.get("plain"), TilingConfig(1), 1, config["max_words"])
    texts = [text for name in found["meta"] for text in found["files"][name]]
    alone = next(u for u in found["unpacked"] if u["num_processes"] == 1)
    theirs = [item["input"] for item in alone["items"]] + found["val"]
    samples = []
    for text, expected in zip(texts, theirs, strict=True):
        turns = (Turn("assistant", (text,)),)
        row = encode.row(turns)
        samples.append(Sample(turns))
        n = min(len(row.ids), config["max_words"])
        c.equal("document", row.ids[:n].tolist() + [0] * (config["max_words"] - n), expected)
        if not text:
            c.deviates("empty document", "nothing to learn" in refused(encode, turns), True, NOTHING)
            continue
        c.equal("document labels", row.labels[1:].tolist(), row.ids[1:].tolist())
        if len(row.ids) > n:
            c.deviates("long document", "the limit is" in refused(encode, turns), True, CUT)
    dealt(samples, found, encode, c)
    rows = []
    for name, expected in found["packed"]["files"].items():
        documents = (encode.tokenizer.encode(t, eos=True) for t in found["files"][name.replace(".pkl", ".parquet")])
        length = found["packed"]["max_len"]
        ours = list(pack(documents, length))
        c.equal("packed", [row + [0] * (length - len(row)) for row in ours], expected)
        rows += ours if name.replace(".pkl", ".parquet") != found["meta"][-1] else []
    for row, item in zip(rows, found["packed"]["dataset_rank0_of_1"], strict=True):
        made = encode.packed(row)
        c.equal("packed row", (made.ids.tolist(), made.labels.tolist()), (item["input"][: len(row)],) * 2)


def dealt(samples: list[Sample], found: dict[str, Any], encode: Encoder, c: Comparison) -> None:
    """Which documents a rank gets, and what a resumed run goes on with."""
    fitting = [s for s in samples if not refused(encode, s.turns)]
    ranks = [u for u in found["unpacked"] if u["num_processes"] == 2]
    lost = sum(len(u["items"]) for u in ranks) < len(samples) - len(found["val"])
    mixture = Mixture([Rows(fitting)], seed=0)
    drawn = {mixture.draw(k).row for k in range(len(fitting))}
    c.deviates("dealing", (drawn == set(range(len(fitting))), lost), (True, True), DEALT)
    first = Loader(mixture, encode, 1)
    batches = iter(first)
    _ = [next(batches) for _ in range(3)]
    second = Loader(mixture, encode, 1)
    second.load_state_dict(first.state_dict())
    again = iter(second)
    same = all(next(batches).ids.tolist() == next(again).ids.tolist() for _ in range(5))
    c.deviates("resume", same, True, RESUME)


HANDLERS: dict[str, Handler] = {
    "accessory.data.falcon.Falcon / FalconVal, accessory.data.falcon_packed.Falcon, "
    "accessory.tools.generate_packed_data.pack_tokens": pretraining,
    "accessory.data.alpaca.FinetuneDataset (and FinetuneDistSampler, format_prompt, MetaPreprocessor)": single_turns,
    "accessory.data.conversation.FinetuneDialogDataset": dialogues,
    "accessory.data.transform.get_transform": transforms,
}
"""By the reference class that the case was computed with."""
