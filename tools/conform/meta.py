"""The reference's wrapper on text: scores, likelihoods, losses and generated answers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.generate import Sampling, keep_top_p
from accessory.backbone.llama import Llama
from accessory.backbone.reference import rename
from accessory.data.tokenizer import Tokenizer, load
from accessory.evaluate.likelihood import compute_logits, evaluate_examples
from accessory.models.mllm import MLLM
from accessory.schema import Batch
from accessory.serve.completion import complete, continued
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
LONG = "a prompt that is too long loses its left end (the reference loses the answer, and shows ids 0)"
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
    model = net.backbone
    for case in said["compute_logits"]:
        scores(model, tokenizer, case, io, c)
    for case in said["evaluate_examples"]:
        likelihoods(model, tokenizer, case, io, c)
    room = config["max_seq_len"]
    known = {}
    for case in said["generate"]:
        answers(model, tokenizer, case, room, known, c)
    for case in said["stream_generate"]:
        streams(model, tokenizer, case, room, known, c)
    nucleus(io, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


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


def scores(model: Llama, tokenizer: Tokenizer, case: dict[str, Any], io: dict[str, Tensor], c: Comparison) -> None:
    """Scores of every position."""
    ends = {k: case[k] for k in ("bos", "eos") if k in case}
    for i, text in enumerate(case["examples"]):
        if "tokens" in case:
            c.equal("tokens", tokenizer.encode(text, **ends), case["tokens"][i])
    stem = case["outputs"].removesuffix("<i>")
    for i, ours in enumerate(compute_logits(model, tokenizer, case["examples"], **ends)):
        c.tensor("compute_logits", ours, io.pop(f"{stem}{i}"))


def likelihoods(model: Llama, tokenizer: Tokenizer, case: dict[str, Any], io: dict[str, Tensor], c: Comparison) -> None:
    """Likelihoods after a context."""
    if "error" in case:
        try:
            evaluate_examples(model, tokenizer, **case["kwargs"])
            told = "nothing"
        except ValueError:
            told = "ValueError"
        c.deviates("wrong context", told, "ValueError", PREFIX)
        return
    found = evaluate_examples(model, tokenizer, **case["kwargs"])
    theirs = case["result"]
    for i, ours in enumerate(found):
        expected = io.pop(f"out.evaluate.{case['tag']}.non_context_logits{i}")
        c.tensor("non_context_logits", ours.logits, expected)
        example = case["kwargs"]["examples"][i]
        zero = not isinstance(example, str) and 0 in example[-len(expected) :]
        total = theirs["log_likelihood"][i]
        if zero:  # recomputed from the reference's own scores
            target = torch.tensor(example[-len(expected) :])
            total = float(expected.log_softmax(-1).gather(1, target[:, None]).sum())
        c.tensor("log_likelihood", torch.tensor(ours.log_likelihood), torch.tensor(total))
        mean = -total / len(expected) if zero else theirs["ppl"][i]
        c.tensor("nll", torch.tensor(ours.nll), torch.tensor(mean))
        c.deviates("perplexity", abs(ours.perplexity / exponential(ours.nll) - 1) < 1e-12, True, NAMED)
        if zero:
            c.deviates("token 0", abs(ours.log_likelihood - theirs["log_likelihood"][i]) > 1e-3, True, ZERO)
        else:
            c.equal("max_equal", ours.greedy, theirs["max_equal"][i])


def exponential(x: float) -> float:
    """The exponential, by torch."""
    return float(torch.tensor(x, dtype=torch.float64).exp())


def answers(
    model: Llama, tokenizer: Tokenizer, case: dict[str, Any], room: int, known: dict[str, str], c: Comparison
) -> None:
    """Greedy answers to a batch of prompts."""
    length, stop = case["kwargs"]["max_gen_len"], tuple(case["kwargs"].get("additional_stop_symbols", ()))
    if set(case["kwargs"]) - CALL:
        raise UnsupportedError(f"generate() with {sorted(set(case['kwargs']) - CALL)}")
    ours = complete(model, tokenizer, case["prompts"], Sampling(length, stop=stop), room=room)
    for i, prompt in enumerate(case["prompts"]):
        c.equal("prompt tokens", tokenizer.encode(prompt, bos=True), case["prompt_tokens"][i])
        ids, theirs = case["response_token_ids"][i], case["responses"][i]
        n = len(case["prompt_tokens"][i])
        if n + length > room:
            told = fitted(model, tokenizer, prompt, length, room)
            c.deviates("answer to a long prompt", ours[i], told, LONG)
        elif len(ids) > length:
            c.deviates("answer of a short prompt", ours[i], tokenizer.decode(ids[:length]), LENGTH)
        else:
            c.equal("answer", ours[i], theirs)
            known[f"{prompt} {length} {stop}"] = theirs


@torch.no_grad()
def fitted(model: Llama, tokenizer: Tokenizer, prompt: str, length: int, room: int) -> str:
    """The greedy answer to what is left of a prompt, one full forward a token: no cache, no sampler."""
    ids = tokenizer.encode(prompt, bos=True)
    ids = ids[-(room - length) :] if room > length else ids
    start = len(ids)
    while len(ids) < min(room, start + length):
        x = torch.tensor([ids])
        token = int(model.logits(model(model.embed(x)))[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def streams(
    model: Llama, tokenizer: Tokenizer, case: dict[str, Any], room: int, known: dict[str, str], c: Comparison
) -> None:
    """The answer so far, token by token."""
    length, stop = case["kwargs"]["max_gen_len"], tuple(case["kwargs"].get("additional_stop_symbols", ()))
    made = list(continued(model, tokenizer, case["prompt"], Sampling(length, stop=stop), room=room))
    theirs = [(y["text"], y["end_of_content"]) for y in case["yields"]]
    if not stop:
        c.equal("stream", made, theirs)
        return
    final = known.get(f"{case['prompt']} {length} {stop}", theirs[-1][0])
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
