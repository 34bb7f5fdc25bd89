"""How likely a language model finds given texts: scores of every position, likelihoods after a context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.backbone.llama import Llama
from accessory.data.tokenizer import Tokenizer

Text = str | Sequence[int]
"""A text, or the ids that it is."""


@dataclass(frozen=True)
class Likelihood:
    """What a model gives to a text of n tokens after its context.

    ``log_likelihood``: natural logarithm, their sum; ``nll``: its negative mean, in nats a token; ``greedy``: every
    token is the most likely one; ``logits`` (n, V): the scores, in fp32, that each token was chosen from.
    """

    log_likelihood: float
    nll: float
    greedy: bool
    logits: Tensor

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll)


def ids_of(tokenizer: Tokenizer, text: Text, *, bos: bool = True, eos: bool = False) -> list[int]:
    """Ids of a text; ids are passed on as they are."""
    return tokenizer.encode(text, bos=bos, eos=eos) if isinstance(text, str) else list(text)


@torch.inference_mode()
def compute_logits(
    model: Llama, tokenizer: Tokenizer, examples: Sequence[Text], *, bos: bool = True, eos: bool = False
) -> list[Tensor]:
    """Scores (T_i, V) in fp32 after every position of each example; all of them in one forward pass.

    Raises:
        ValueError: for an example without a token.
    """
    rows = [ids_of(tokenizer, e, bos=bos, eos=eos) for e in examples]
    if not rows:
        return []
    if not all(rows):
        raise ValueError(f"example {[bool(r) for r in rows].index(False)} has no token: there is nothing to score")
    longest = max(map(len, rows))
    device = model.like.device
    # Padded on the right: causal attention never looks there.
    ids = torch.tensor([r + [tokenizer.pad_id] * (longest - len(r)) for r in rows], device=device)
    logits = model.logits(model(model.embed(ids))).float()
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


@torch.inference_mode()
def evaluate_examples(
    model: Llama,
    tokenizer: Tokenizer,
    examples: Sequence[Text],
    contexts: Sequence[Text] | None = None,
    *,
    bos: bool = True,
    eos: bool = False,
) -> list[Likelihood]:
    """The likelihood of every example after its context (default: its first token), which it must begin with.

    Every token counts, id 0 like any other.

    Raises:
        ValueError: when examples and contexts differ in number, an example does not begin with the tokens of its
            context, or nothing follows it.
    """
    if contexts is not None and len(contexts) != len(examples):
        raise ValueError(f"{len(contexts)} contexts for {len(examples)} examples")
    rows = [ids_of(tokenizer, e, bos=bos, eos=eos) for e in examples]
    given = [r[:1] for r in rows] if contexts is None else [ids_of(tokenizer, c, bos=bos) for c in contexts]
    for i, (row, context) in enumerate(zip(rows, given, strict=True)):
        if not context or row[: len(context)] != context:
            raise ValueError(f"example {i} does not begin with the tokens of its context: {row[:8]} and {context[:8]}")
        if len(row) == len(context):
            raise ValueError(f"example {i} is its context: nothing is left to score")
    found = []
    for row, context, logits in zip(rows, given, compute_logits(model, tokenizer, rows), strict=True):
        scores, target = logits[len(context) - 1 : -1], torch.tensor(row[len(context) :], device=logits.device)
        each = scores.log_softmax(-1).gather(1, target[:, None])
        total = float(each.double().sum())
        found.append(Likelihood(total, -total / len(target), bool((scores.argmax(-1) == target).all()), scores))
    return found
