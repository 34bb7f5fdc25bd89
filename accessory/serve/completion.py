"""Plain text continued: no dialogue, no template. For prompts that were written out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from accessory.backbone.generate import Sampling, StopMatcher, stream
from accessory.backbone.llama import Llama
from accessory.data.tokenizer import Tokenizer


def fit(ids: list[int], max_new_tokens: int, room: int) -> tuple[list[int], int]:
    """A prompt cut at its left end until it leaves place, and the number of tokens that may follow.

    A prompt that fits beside ``max_new_tokens`` in ``room`` positions stays whole. Otherwise its last
    ``room - max_new_tokens`` tokens stay, or all of it where that is none: then fewer tokens follow.

    Raises:
        ValueError: for a prompt that alone fills the room.
    """
    keep = room - max_new_tokens
    kept = ids[-keep:] if keep > 0 else ids
    if not kept or len(kept) >= room:
        raise ValueError(f"a prompt of {len(ids)} tokens leaves no place for an answer in {room} positions")
    return kept, min(max_new_tokens, room - len(kept))


def complete(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, *, room: int | None = None
) -> list[str]:
    """What follows each prompt, one answer a prompt, none longer than ``sampling.max_new_tokens``.

    An answer ends before a stop string, alone or after a blank, which goes with it. ``room``: positions of prompt and
    answer together (default: ``model.config.max_length``). Raises as :func:`fit`.
    """
    return [[text for text, _ in continued(model, tokenizer, p, sampling, room=room)][-1] for p in prompts]


def continued(
    model: Llama, tokenizer: Tokenizer, prompt: str, sampling: Sampling, *, room: int | None = None
) -> Iterator[tuple[str, bool]]:
    """The answer so far after every token, and whether it is complete; as :func:`complete`.

    Neither half characters nor what may become a stop string are shown.
    """
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    room = model.config.max_length if room is None else room
    ids, count = fit(tokenizer.encode(prompt, bos=tokenizer.bos_id is not None), sampling.max_new_tokens, room)
    stops = tuple(form for s in sampling.stop for form in (f" {s}", s))
    sampling = replace(sampling, max_new_tokens=count, stop_ids=(*sampling.stop_ids, *eos))
    device = model.like.device
    whole = torch.tensor([ids], device=device)
    matcher, decoder, shown = StopMatcher(stops), tokenizer.stream(), ""
    for step in stream(model, model.embed(whole), ids=whole, sampling=sampling):
        token = step[0]
        if token is None or token in sampling.stop_ids:
            break
        piece, stopped = matcher.push(decoder.push(token))
        shown += piece
        if stopped:
            break
        yield shown, False
    if not matcher.stopped:
        shown += matcher.push(decoder.finish())[0] + matcher.flush()
    yield shown, True
