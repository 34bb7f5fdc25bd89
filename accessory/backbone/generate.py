"""Sampling from the backbone: vectors in, token ids out, one step at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.backbone.llama import Llama
from accessory.nn.cache import KVCache

_NO_TOKEN = -1  # negative, so no vocabulary entry


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when a row ends.

    ``temperature`` 0 takes the most likely token. Otherwise one is drawn after, in this order, the repetition penalty
    (Keskar et al. 2019), division by ``temperature``, and the ``top_k`` and ``top_p`` cuts (Holtzman et al. 2020).
    ``stop_ids`` end a row and are its last token. ``stop`` are strings; text is not known here, so whoever turns ids
    into text applies them with :class:`StopMatcher`. ``seed`` None draws a fresh one for every row.

    Raises:
        ValueError: for a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or absent, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or absent, got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive (1 is off), got {self.repetition_penalty}")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every answer at once")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were ``seen`` (V, bool) less likely: scores (V) are divided or, below zero, multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Scores (V) with everything below the k-th largest at minus infinity (ties of the k-th stay)."""
    kth = logits.topk(min(k, logits.shape[-1])).values[-1]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Scores (V) with only the fewest most likely tokens left whose probabilities reach ``p``; at least one stays."""
    ordered, index = logits.sort()
    # From the least likely up, whatever fits into the 1 - p that may be lost is lost.
    lost = ordered.softmax(-1).cumsum(-1) <= 1 - p
    lost[-1] = False
    return logits.masked_fill(torch.zeros_like(lost).scatter(0, index, lost), float("-inf"))


class Row:
    """The sampling state of one sequence; nothing in it depends on the other rows of the batch.

    ``vocab_size``: the scores that :meth:`choose` gets. ``ids``: as :func:`stream` takes them, of one row.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, ids: Tensor | None, device: torch.device) -> None:
        self.sampling = sampling
        self.count = 0
        self.done = False
        # On the CPU wherever the model is, and one number a token: the same seed means the same choices everywhere.
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            if ids is not None:
                self.seen[ids[ids >= 0].to(device)] = True

    def choose(self, logits: Tensor) -> int:
        """The next token from scores (V) in fp32."""
        s = self.sampling
        if self.seen is not None:
            logits = penalize(logits, self.seen, s.repetition_penalty)
        token = int(logits.argmax()) if s.temperature == 0 else self._draw(logits / s.temperature)
        if self.seen is not None:
            self.seen[token] = True
        self.count += 1
        self.done = token in s.stop_ids or self.count >= s.max_new_tokens
        return token

    def _draw(self, logits: Tensor) -> int:
        s = self.sampling
        if s.top_k is not None:
            logits = keep_top_k(logits, s.top_k)
        if s.top_p is not None and s.top_p < 1:
            logits = keep_top_p(logits, s.top_p)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        u = float(torch.rand((), generator=self.generator))
        # The first token whose cumulative probability exceeds u; a token of probability 0 never is.
        token = int(torch.searchsorted(cumulative, u * cumulative[-1:], right=True))
        if token >= len(logits):
            raise ValueError(f"cannot sample: the scores are not finite (temperature {s.temperature})")
        return token


def stream(
    model: Llama,
    x: Tensor,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    cache: KVCache | None = None,
    sampling: Sampling | Sequence[Sampling],
    context: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """Continue embedded prompts ``x`` (B, T, D), one list of B tokens a step; None where a row has already ended.

    ``ids`` (B, any): tokens that the repetition penalty counts besides the generated ones; negative ids (placeholders,
    padding) do not count. ``mask`` (B, past + T): False on padding, which stands left of a row. ``cache``: its
    positions precede ``x``; it must have room for T + max_new_tokens - 1 more. ``sampling``: one for all rows or one
    a row. Each row has its own generator, seeded with its own ``seed``. ``context`` (B, M, D): what the prefixes see
    besides; None goes on with that of the cache.

    The cache at every yield, and so whenever the caller stops, holds the earlier positions, ``x`` and all tokens
    yielded before the current list: **the newest token is never in the cache**. A chat's next turn therefore starts
    with that token. In a batch, rows that ended hold filler positions behind their end.

    Raises:
        ValueError: when rows and samplings differ in number, or the prompt and its continuation do not fit the cache.
    """
    batch, t = x.shape[:2]
    samplings = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != batch:
        raise ValueError(f"{len(samplings)} samplings for {batch} rows")
    if t == 0 or batch == 0:
        raise ValueError(f"cannot continue an empty prompt, got x of shape {tuple(x.shape)}")
    needed = t + max(s.max_new_tokens for s in samplings) - 1
    if cache is None:
        # A compiled step leaves one position free.
        cache = model.cache(batch, needed if model.step is None else needed + 1)
    elif cache.length + needed > cache.max_length:
        raise ValueError(
            f"{cache.length} cached positions, {t} new ones and max_new_tokens {needed - t + 1} need "
            f"{cache.length + needed} positions, the cache holds {cache.max_length}"
        )
    if mask is not None and bool(mask.all()):
        mask = None  # plain causal attention is faster than a mask that allows everything
    rows = [Row(s, model.config.vocab_size, None if ids is None else ids[i], x.device) for i, s in enumerate(samplings)]
    return _steps(model, x, mask, cache, rows, context)


@torch.inference_mode()
def _steps(
    model: Llama, x: Tensor, mask: Tensor | None, cache: KVCache, rows: list[Row], context: Tensor | None
) -> Iterator[list[int | None]]:
    # Only the last position is scored: a vocabulary row for each prompt token would cost more than the prompt.
    scores = model.logits(model(x, mask=mask, cache=cache, context=context)[:, -1:])
    key = None if model.step is None or mask is not None else model.step.key(model)
    while True:
        last = scores[:, 0].float()
        tokens = [None if row.done else row.choose(last[i]) for i, row in enumerate(rows)]
        yield tokens
        if all(row.done for row in rows):
            return
        fed = torch.tensor([[0 if token is None else token] for token in tokens], device=x.device)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        scores = _next(model, fed, mask, cache, key)


def _next(model: Llama, ids: Tensor, mask: Tensor | None, cache: KVCache, key: str | None) -> Tensor:
    """Scores (B, 1, V) after ``ids`` (B, 1), compiled where a ``key`` says that the model has such a step."""
    step = model.step
    if key is not None and step is not None and step.covers(model, ids, cache):
        scores = step(key, model, ids, cache)
        if scores is not None:
            return scores
    return model.logits(model(model.embed(ids), mask=mask, cache=cache))


def generate(
    model: Llama,
    prompts: Sequence[Tensor],
    *,
    ids: Sequence[Tensor] | None = None,
    sampling: Sampling | Sequence[Sampling],
    context: Tensor | None = None,
) -> list[list[int]]:
    """Continue embedded prompts (T_i, D) of unequal lengths together; a stop id that ended a row is its last token.

    ``ids``: (T_i) each, for the repetition penalty. ``context``: as :func:`stream` takes it. In fp32 the answer is that
    of one prompt at a time.
    """
    if not prompts:
        return []
    if ids is not None and len(ids) != len(prompts):
        raise ValueError(f"{len(ids)} rows of ids for {len(prompts)} prompts")
    x = _pad_left(prompts, 0)
    ones = [torch.ones(len(p), dtype=torch.bool, device=x.device) for p in prompts]
    padded = None if ids is None else _pad_left(ids, _NO_TOKEN)
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, x, ids=padded, mask=_pad_left(ones, 0), sampling=sampling, context=context):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def _pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """(T_i, ...) each -> (B, max T, ...), filled with ``value`` on the left."""
    out = rows[0].new_full((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), value)
    for i, row in enumerate(rows):
        out[i, out.shape[1] - len(row) :] = row
    return out


class StopMatcher:
    """Ends streamed text before the first stop string and never lets a part of one through.

    What could still become a stop string is held back until the following text decides.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        if "" in stop:
            raise ValueError("stop holds an empty string, which would end every answer at once")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Take new text; return the text that may be shown now, and whether a stop string has ended the stream."""
        if self.stopped:
            return "", True
        text = self._held + piece
        starts = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)], True
        held = max((self._overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text still held back: to be shown when the stream ends without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
