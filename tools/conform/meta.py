"""The reference's wrapper on text: scores, likelihoods, losses and generated answers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.generate import keep_top_p
from accessory.backbone.reference import rename
from accessory.data import template
from accessory.data.encode import Encoder
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import Tokenizer, load
from accessory.models.build import Model, ModelConfig
from accessory.models.mllm import MLLM
from accessory.schema import Batch
from accessory.serve.sphinx import MetaModel
from accessory.tokens import IGNORE
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from tools.conform.comparison import Comparison, Handler, UnsupportedError
from tools.conform.meta_visual import meta_visual
from tools.conform.models import wrapped

ZERO = "token 0 counts in likelihoods (the reference gives it no loss, and still divides by it)"
NAMED = "the mean is called nll and perplexity is its exponential (the reference calls the mean ppl)"
PREFIX = "an example that does not begin with its context is a ValueError (the reference asserts)"
EMPTY = "a batch with nothing to learn has the loss 0 and the count 0 (the reference's is not a number)"
LENGTH = "no answer is longer than asked for (in the reference's batches shorter prompts get more)"
LONG = "a prompt that is too long keeps its first mark (the reference does not, and a batch loses its answer)"
HELD = "a stop string is never shown in part, and cuts a stream where it cuts an answer"
CALL = {"max_gen_len", "additional_stop_symbols"}


def meta_text(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """All calls of a text model, or of one with pictures."""
    if config["with_visual"]:
        meta_visual(folder, config, c)
        return
    io, said = load_file(folder / "io.safetensors"), json.loads((folder / "behaviour.json").read_text())
    net, tokenizer = wrapped(folder, config), load(folder / "tokenizer.model")
    losses(net, tokenizer, io, said, c)
    meta = wrapper(net, tokenizer, config["max_seq_len"])
    for case in said["compute_logits"]:
        scores(meta, case, io, c)
    for case in said["evaluate_examples"]:
        likelihoods(meta, case, io, c)
    known: dict[str, str] = {}
    for case in said["generate"]:
        answers(meta, case, known, c)
    for case in said["stream_generate"]:
        streams(meta, case, known, c)
    nucleus(io, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def wrapper(net: MLLM, words: Tokenizer, room: int) -> MetaModel:
    """What users call, around the model of a case; ``room``: positions that it may take."""
    encoder = Encoder(words, template.get("plain"), TilingConfig(1), 1, room)
    return MetaModel(Model(net, words, encoder, ModelConfig(tower=None, projector=None, max_length=room)))


def losses(net: MLLM, tokenizer: Tokenizer, io: dict[str, Tensor], said: dict[str, Any], c: Comparison) -> None:
    """The training loss and its gradients."""
    objective = DialogueObjective(ObjectiveConfig(), tokenizer)
    ids = io.pop("in.loss.examples")

    def loss(labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels.masked_fill(labels == 0, IGNORE)
        batch = Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), torch.zeros(0, 3, 1, 1))
        total, count, _ = objective(net, batch)
        return total, count

    total, count = loss(io.pop("in.loss.labels"))
    mean = total / count
    c.tensor("c_loss", mean[None], io.pop("out.loss.c_loss"))
    mean.backward()
    grads = {n: p.grad for n, p in net.backbone.named_parameters() if p.grad is not None}
    layers = net.backbone.config.n_layers
    norms = rename({n: torch.tensor(v) for n, v in said["grad_l2_norms"].items()}, layers)
    c.equal("gradients", sorted(grads), sorted(norms))
    for name, norm in norms.items():
        c.tensor("grad_l2_norms", grads[name].norm(), norm)
    names = [n for n in io if n.startswith("out.loss.grad.")]
    for name, value in rename({n.removeprefix("out.loss.grad."): io.pop(n) for n in names}, layers).items():
        c.tensor(f"grad {name}", grads[name], value)
    with torch.no_grad():
        c.tensor("c_loss of no labels", loss(torch.zeros_like(ids))[0][None], io.pop("out.loss.c_loss_all_labels_zero"))
        total, count = loss(io.pop("in.loss.labels_only_first_position"))
    c.equal("not a number", io.pop("out.loss.c_loss_only_first_position").tolist(), [-12345.0])
    c.deviates("c_loss of the first position", (float(total), int(count)), (0.0, 0), EMPTY)


def scores(meta: MetaModel, case: dict[str, Any], io: dict[str, Tensor], c: Comparison) -> None:
    """Scores of every position."""
    ends = {k: case[k] for k in ("bos", "eos") if k in case}
    for i, text in enumerate(case["examples"]):
        if "tokens" in case:
            c.equal("tokens", meta.tokenizer.encode(text, **ends), case["tokens"][i])
    stem = case["outputs"].removesuffix("<i>")
    for i, ours in enumerate(meta.compute_logits(case["examples"], **ends)):
        c.tensor("compute_logits", ours, io.pop(f"{stem}{i}"))


def likelihoods(meta: MetaModel, case: dict[str, Any], io: dict[str, Tensor], c: Comparison) -> None:
    """Likelihoods after a context."""
    if "error" in case:
        try:
            meta.evaluate_examples(**case["kwargs"])
            told = "nothing"
        except ValueError:
            told = "ValueError"
        c.deviates("wrong context", told, "ValueError", PREFIX)
        return
    found = meta.evaluate_examples(**case["kwargs"])
    theirs = case["result"]
    for i, ours in enumerate(found["non_context_logits"]):
        expected = io.pop(f"out.evaluate.{case['tag']}.non_context_logits{i}")
        c.tensor("non_context_logits", ours, expected)
        example = case["kwargs"]["examples"][i]
        zero = not isinstance(example, str) and 0 in example[-len(expected) :]
        total = theirs["log_likelihood"][i]
        if zero:  # recomputed from the reference's own scores
            target = torch.tensor(example[-len(expected) :])
            total = float(expected.log_softmax(-1).gather(1, target[:, None]).sum())
        mine, nll = found["log_likelihood"][i], found["nll"][i]
        c.tensor("log_likelihood", torch.tensor(mine), torch.tensor(total))
        c.tensor("nll", torch.tensor(nll), torch.tensor(-total / len(expected) if zero else theirs["ppl"][i]))
        exponential = float(torch.tensor(nll, dtype=torch.float64).exp())
        c.deviates("perplexity", abs(found["ppl"][i] / exponential - 1) < 1e-12, True, NAMED)
        if zero:
            c.deviates("token 0", abs(mine - theirs["log_likelihood"][i]) > 1e-3, True, ZERO)
        else:
            c.equal("max_equal", found["max_equal"][i], theirs["max_equal"][i])


def answers(meta: MetaModel, case: dict[str, Any], known: dict[str, str], c: Comparison) -> None:
    """Greedy answers to a batch of prompts."""
    words, kwargs, room = meta.tokenizer, case["kwargs"], meta.model.config.max_length
    if set(kwargs) - CALL:
        raise UnsupportedError(f"generate() with {sorted(set(kwargs) - CALL)}")
    length = kwargs["max_gen_len"]
    ours = meta.generate(case["prompts"], **kwargs)
    for i, prompt in enumerate(case["prompts"]):
        c.equal("prompt tokens", words.encode(prompt, bos=True), case["prompt_tokens"][i])
        ids, theirs = case["response_token_ids"][i], case["responses"][i]
        n = len(case["prompt_tokens"][i])
        if n + length > room:
            c.deviates("answer to a long prompt", ours[i], fitted(meta, prompt, length), LONG)
        elif len(ids) > length:
            c.deviates("answer of a short prompt", ours[i], words.decode(ids[:length]), LENGTH)
        else:
            c.equal("answer", ours[i], theirs)
            known[f"{prompt} {kwargs}"] = theirs


@torch.no_grad()
def fitted(meta: MetaModel, prompt: str, length: int) -> str:
    """The greedy answer to what is left of a prompt, one full forward a token: no cache, no sampler."""
    words, net, room = meta.tokenizer, meta.model.net, meta.model.config.max_length
    ids = words.encode(prompt, bos=True)
    if 1 < room - length < len(ids):
        ids = [ids[0], *ids[-(room - length - 1) :]]
    start = len(ids)
    while len(ids) < min(room, start + length):
        token = int(net.logits(net(torch.tensor([ids])))[0, -1].argmax())
        if token == words.eos_id:
            break
        ids.append(token)
    return words.decode(ids[start:])


def streams(meta: MetaModel, case: dict[str, Any], known: dict[str, str], c: Comparison) -> None:
    """The answer so far, token by token."""
    prompt, kwargs, theirs = case["prompt"], case["kwargs"], [tuple(y.values()) for y in case["yields"]]
    tokens, room = meta.tokenizer.encode(prompt, bos=True), meta.model.config.max_length - kwargs["max_gen_len"]
    made = [tuple(e.values()) for e in meta.stream_generate(prompt, **kwargs)]
    if len(tokens) > room:
        c.deviates("stream of a long prompt", made[-1][0], fitted(meta, prompt, kwargs["max_gen_len"]), LONG)
        made = [tuple(e.values()) for e in meta.stream_generate(tokens[-room:], **kwargs)]  # without the first mark
    if "additional_stop_symbols" not in kwargs:
        c.equal("stream", made, theirs)
        return
    final = known.get(f"{prompt} {kwargs}", theirs[-1][0])
    whole = all(final.startswith(text) for text, _ in made)
    c.deviates("stream with a stop", (made[-1], whole), ((final, True), True), HELD)


def nucleus(io: dict[str, Tensor], c: Comparison) -> None:
    """Which tokens the nucleus keeps, and with what probabilities."""
    probs = io.pop("in.top_p.probs")
    for name in [n for n in io if n.startswith("out.top_p.") and n.endswith("sorted_renormalised")]:
        p = float(name.removeprefix("out.top_p.").removesuffix(".sorted_renormalised"))
        kept = [keep_top_p(row.log(), p).softmax(-1).sort(descending=True).values for row in probs]
        c.tensor(f"top_p {p}", torch.stack(kept), io.pop(name))
        drawn = io.pop(f"out.top_p.{p}.token_for_rank0")
        for row, token in zip(probs, drawn, strict=True):
            c.equal("drawn from the nucleus", bool(keep_top_p(row.log(), p)[int(token)] > -torch.inf), True)


HANDLERS: dict[str, Handler] = {"accessory.model.meta.MetaModel": meta_text}
"""By the reference class that the case was computed with."""
