"""The reference's wrapper with pictures: scores, likelihoods, losses, and generated answers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.generate import Sampling, StopMatcher, stream
from accessory.data.encode import tile_ids
from accessory.data.tokenizer import Tokenizer, load
from accessory.models.mllm import MLLM
from accessory.models.published import find_type
from accessory.models.reference import assemble, read_published
from accessory.schema import Batch
from accessory.tokens import IGNORE
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from tools.conform.comparison import Comparison, UnsupportedError
from tools.conform.standins import IO, make_tower, to_pixels

LENGTH = "no answer is longer than asked for (in the reference's batches shorter prompts get more)"
LONG = "a prompt that is too long loses its left end (the reference loses the answer, and shows ids 0)"
HELD = "a blank before a stop string goes with it, in a stream as in an answer"


class Talk:
    """A model, the words it knows and the pictures it is shown."""

    def __init__(self, net: MLLM, words: Tokenizer, tiles: Tensor, room: int) -> None:
        assert net.projector is not None
        assert net.tower is not None
        self.net, self.words, self.tiles, self.room = net, words, tiles, room
        self.picture = torch.tensor(tile_ids(net.projector.runs(net.tower.runs), False))

    def ids(self, text: list[int], seen: bool) -> Tensor:
        """One row, the picture before everything."""
        row = torch.tensor(text)
        return (torch.cat([self.picture, row]) if seen else row)[None]

    @torch.no_grad()
    def scores(self, text: list[int], tile: Tensor | None) -> Tensor:
        """Logits (T, V) at the positions of the text."""
        ids = self.ids(text, tile is not None)
        return self.net.logits(self.net(ids, tile))[0, -len(text) :]

    def answer(
        self, prompt: str, length: int, stop: tuple[str, ...], tile: Tensor | None
    ) -> tuple[list[int], list[str]]:
        """Greedy ids up to the end, and the text after each of them; a stop string cuts the text."""
        room = self.room - (0 if tile is None else len(self.picture))
        text = self.words.encode(prompt, bos=True)
        text = text[-(room - length) :]
        ids = self.ids(text, tile is not None)
        eos = () if self.words.eos_id is None else (self.words.eos_id,)
        sampling = Sampling(min(length, room - len(text)), stop_ids=eos)
        matcher, decoder = StopMatcher(tuple(f for s in stop for f in (f" {s}", s))), self.words.stream()
        made, shown = list[int](), [""]
        with torch.no_grad():
            x = self.net.embed(ids, tile)
        for (token,) in stream(self.net.backbone, x, ids=ids, sampling=sampling):
            if token is None or token in eos:
                break
            made.append(token)
            piece, stopped = matcher.push(decoder.push(token))
            shown.append(shown[-1] + piece)
            if stopped:
                return made, shown[1:]
        return made, [*shown[1:], shown[-1] + matcher.flush()]


def meta_visual(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """All calls of a model with pictures."""
    kind = config["llama_type"]
    row = find_type(kind)
    io, said = load_file(folder / "io.safetensors"), json.loads((folder / "behaviour.json").read_text())
    tower = make_tower(config, row, io)
    published = read_published(load_file(folder / "weights.safetensors"), config["args"], kind)
    net, tiles = assemble(published, tower), to_pixels(io.pop("in.images"))
    talk = Talk(net, load(folder / "tokenizer.model"), tiles, config["max_seq_len"])
    c.equal("positions of a picture", len(talk.picture), said["info"]["image_words"])
    loss(talk, io, c)
    first = said["generate"][0]
    for i, text in enumerate(first["prompt_tokens"]):
        likelihood(talk, i, text, io, said["evaluate_examples"], c)
    streamed = {s["prompt"]: s for s in said["stream_generate"] if s["with_image"] and not stops(s)}
    for case in said["generate"]:
        answers(talk, case, streamed, c)
    for case in said["stream_generate"]:
        streams(talk, case, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def loss(talk: Talk, io: IO, c: Comparison) -> None:
    """The training loss, through the objective that trains. The reference never learns the first token."""
    examples, labels = io.pop("in.loss.examples"), io.pop("in.loss.labels")
    labels = labels.masked_fill(labels == 0, IGNORE)
    labels[:, 0] = IGNORE
    picture = talk.picture.expand(len(examples), -1)
    ids = torch.cat([picture, examples], 1)
    labels = torch.cat([torch.full_like(picture, IGNORE), labels], 1)
    batch = Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), talk.tiles)
    total, count, _ = DialogueObjective(ObjectiveConfig(), talk.words)(talk.net, batch)
    c.tensor("c_loss", (total / count)[None], io.pop("out.loss.c_loss"))


def likelihood(talk: Talk, i: int, text: list[int], io: IO, said: dict[str, Any], c: Comparison) -> None:
    """Scores of every position, and how likely the text is after its first token."""
    logits = talk.scores(text, talk.tiles[i : i + 1])
    c.tensor("compute_logits", logits, io.pop(f"out.compute_logits.{i}"))
    c.tensor("non_context_logits", logits[:-1], io.pop(f"out.evaluate.non_context_logits{i}"))
    target = torch.tensor(text[1:])
    each = logits[:-1].log_softmax(-1).gather(1, target[:, None])
    c.tensor("log_likelihood", each.sum(), torch.tensor(said["log_likelihood"][i]))
    c.tensor("nll", -each.mean(), torch.tensor(said["ppl"][i]))
    c.equal("max_equal", bool((logits[:-1].argmax(-1) == target).all()), said["max_equal"][i])


def stops(case: dict[str, Any]) -> tuple[str, ...]:
    """The stop strings of a call."""
    return tuple(case["kwargs"].get("additional_stop_symbols", ()))


def answers(talk: Talk, case: dict[str, Any], streamed: dict[str, Any], c: Comparison) -> None:
    """Greedy answers; one prompt at a time, which in fp32 is what a batch says."""
    length = case["kwargs"]["max_gen_len"]
    if set(case["kwargs"]) - {"max_gen_len", "additional_stop_symbols"}:
        raise UnsupportedError(f"generate() with {sorted(case['kwargs'])}")
    for i, prompt in enumerate(case["prompts"]):
        expected, tokens = case["response_token_ids"][i], case["prompt_tokens"][i]
        c.equal("prompt tokens", talk.words.encode(prompt, bos=True), tokens)
        ids, shown = talk.answer(prompt, length, stops(case), talk.tiles[i : i + 1] if case["with_image"] else None)
        lost = not any(expected)
        if lost and prompt in streamed:  # the reference's own stream gives the answer that its batch lost
            c.deviates("answer to a long prompt", shown[-1], streamed[prompt]["yields"][-1]["text"], LONG)
        elif len(expected) > length:
            c.deviates("answer of a short prompt", ids, expected[:length], LENGTH)
        elif stops(case):
            c.equal("answer before a stop", shown[-1], case["responses"][i])
        else:
            c.equal("answer", (ids, shown[-1]), (expected, case["responses"][i]))


def streams(talk: Talk, case: dict[str, Any], c: Comparison) -> None:
    """The answer so far, token by token."""
    tile = talk.tiles[:1] if case["with_image"] else None
    _, shown = talk.answer(case["prompt"], case["kwargs"]["max_gen_len"], stops(case), tile)
    theirs = [y["text"] for y in case["yields"]]
    if stops(case):
        c.deviates("stream with a stop", shown[-1], theirs[-1].rstrip(" "), HELD)
    else:
        c.equal("stream", shown, theirs)
