"""What scripts written for LLaMA2-Accessory call: ``MetaModel`` and ``SPHINXModel``, with its names and arguments.

Where the published code is wrong this is not: a prompt that is too long keeps its beginning-of-text mark, no answer is
longer than asked for, id 0 counts in likelihoods, ``ppl`` is a perplexity, seeds are local to a call, no part of a stop
string is ever shown, and pictures may be given as pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from accessory.backbone.generate import Sampling, StopMatcher, generate
from accessory.data.image import open_picture
from accessory.data.template import BOS, Template
from accessory.data.tokenizer import Tokenizer
from accessory.models.build import Model
from accessory.models.likelihood import hidden, scored
from accessory.schema import Encoded, Picture, Turn
from accessory.serve import chat
from accessory.serve.answer import Answer, Prompt
from accessory.serve.media import Limits, user_turn
from accessory.tokens import IGNORE

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Example = str | Sequence[int]
Images = Sequence[str | Path | Image.Image | None] | Tensor | None
"""A picture (or None) for every example, or the reference's tensor (B, 3, S, S), normalised with CLIP's constants."""


class MetaModel:
    """A model that continues and scores raw texts: no dialogue template stands around them.

    A picture stands behind the beginning-of-text mark and before the text, as in the published models.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        begin = () if model.tokenizer.bos_id is None else (BOS,)
        raw = Template(name="raw", begin=begin, pictures_first=True, strip=False)
        self._raw = replace(model, encoder=model.encoder.under(raw))

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path, **options: Any) -> MetaModel:
        """The model of a folder; ``options`` as of :func:`accessory.serve.chat.load` (``cache``, ``device``)."""
        return cls(chat.load(pretrained_path, **options).model)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids: ``tokenizer.encode(text, bos=True, eos=False)``."""
        return self.model.tokenizer

    # --- scores -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def compute_logits(
        self, examples: Sequence[Example], images: Images = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """Scores (T, V) in fp32 of every example (a text, or ids that are taken as they are) of T tokens.

        Row t scores what follows token t. Beside a picture row 0 scores what follows the picture.
        """
        return self._logits(self._rows(examples, images, bos, eos))

    def _logits(self, rows: Sequence[Encoded]) -> list[Tensor]:
        if not rows:
            return []
        states = hidden(self._raw, rows)
        found = []
        for row, state in zip(rows, states, strict=True):
            texts = (row.ids >= 0).nonzero().flatten()
            seen = (row.ids < 0).nonzero().flatten()
            if len(seen) and len(texts) and int(texts[0]) < int(seen[0]):
                texts[0] = seen[-1]  # the text's first token is predicted from the end of the picture
            found.append(self.model.net.logits(state[texts.to(state.device)]).float())
        return found

    @torch.inference_mode()
    def evaluate_examples(
        self,
        examples: Sequence[Example],
        contexts: Sequence[Example] | None = None,
        images: Images = None,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, list[Any]]:
        """How likely each example is behind its context, which must be its beginning token by token.

        Lists over the examples: ``log_likelihood`` (summed, nats), ``nll`` (mean a token), ``ppl`` (its exponential;
        the reference gives ``nll`` under that name), ``max_equal`` (whether greedy decoding says the same),
        ``non_context_logits`` (n, V): the scores that predict the n tokens behind the context.

        Raises:
            ValueError: for a context that is not the beginning of its example, or is all of it. Without contexts the
                first token is.
        """
        if contexts is not None and len(contexts) != len(examples):
            raise ValueError(f"{len(contexts)} contexts for {len(examples)} examples")
        rows = self._rows(examples, images, bos, eos)
        texts = [row.ids[row.ids >= 0] for row in rows]
        heads = [t[:1].tolist() for t in texts] if contexts is None else [self._ids(c, bos, False) for c in contexts]
        starts = [self._prefix(ids, head, i) for i, (ids, head) in enumerate(zip(texts, heads, strict=True))]
        logits = [v[start - 1 : -1] for v, start in zip(self._logits(rows), starts, strict=True)]
        found = [scored(v, ids[start:].to(v.device)) for v, ids, start in zip(logits, texts, starts, strict=True)]
        return {
            "log_likelihood": [s.total for s in found],
            "nll": [s.nll for s in found],
            "ppl": [s.perplexity for s in found],
            "max_equal": [s.greedy for s in found],
            "non_context_logits": logits,
        }

    @staticmethod
    def _prefix(ids: Tensor, head: list[int], i: int) -> int:
        if not head or len(head) >= len(ids) or ids[: len(head)].tolist() != head:
            raise ValueError(
                f"contexts[{i}] has {len(head)} tokens that are not the beginning of the {len(ids)} of its example, or "
                "all of them; a text may be cut into other tokens where it goes on, so give ids where that happens"
            )
        return len(head)

    # --- words --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Example],
        images: Images = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """What follows every prompt, until the end of text, a stop symbol or ``max_gen_len`` tokens.

        A blank before a stop symbol goes with it. A prompt that is too long loses its beginning, but for the mark;
        where ``max_gen_len`` leaves it no room at all it stays whole, and the answer is shorter.

        Raises:
            ValueError: for a prompt that leaves no room for an answer.
        """
        pictures = self._pictures(images, len(prompts))
        fitted = [self._fit(p, i, max_gen_len) for p, i in zip(prompts, pictures, strict=True)]
        samplings = [self._sampling(most, temperature, top_p, additional_stop_symbols, seed) for _, most in fitted]
        x, context = self.model.net.prompts([row for row, _ in fitted])
        found = generate(self.model.net.backbone, x, sampling=samplings, context=context)
        texts = []
        for ids, sampling in zip(found, samplings, strict=True):
            text = self.tokenizer.decode(t for t in ids if t not in sampling.stop_ids)
            matcher = StopMatcher(sampling.stop)
            texts.append(matcher.push(text)[0] + matcher.flush())
        return texts

    def stream_generate(
        self,
        prompt: Example,
        images: Images = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """``{"text": all that was said so far, "end_of_content": whether it is all}``, a token at a time; at last what
        :meth:`generate` says."""
        row, most = self._fit(prompt, self._pictures(images, 1)[0], max_gen_len)
        sampling = self._sampling(most, temperature, top_p, additional_stop_symbols, seed)
        cache = self.model.net.backbone.cache(1, len(row.ids) + most + 1)
        answer = Answer(self._raw, cache, Prompt.of_row(self.model, row), sampling, 0)
        while not answer.finished:
            answer.step()
            yield {"text": answer.text, "end_of_content": answer.finished}

    def _sampling(
        self, max_gen_len: int, temperature: float, top_p: float, stops: Sequence[str], seed: int
    ) -> Sampling:
        end = self.tokenizer.eos_id
        return Sampling(
            max_new_tokens=max_gen_len,
            temperature=temperature,
            top_p=top_p if temperature > 0 else None,
            stop_ids=() if end is None else (end,),
            stop=tuple(form for s in stops for form in (f" {s}", s)),
            seed=seed,
        )

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, examples: Sequence[Example], images: Images, bos: bool, eos: bool) -> list[Encoded]:
        pictures = self._pictures(images, len(examples))
        return [self._row(e, p, bos, eos) for e, p in zip(examples, pictures, strict=True)]

    def _ids(self, example: Example, bos: bool, eos: bool) -> list[int]:
        if not isinstance(example, str):
            return [int(i) for i in example]
        words = self.tokenizer
        return words.encode(example, bos=bos and words.bos_id is not None, eos=eos)

    def _row(self, example: Example, picture: Picture | Tensor | None, bos: bool, eos: bool) -> Encoded:
        """The example behind its picture, nothing labelled; ValueError when it is empty or too long."""
        ids = torch.tensor(self._ids(example, bos, eos), dtype=torch.long)
        if len(ids) == 0:
            raise ValueError("an empty example: there is nothing to score or to continue")
        seen = self._seen(picture)
        begun = int(ids[0] == self.tokenizer.bos_id)  # a picture stands behind the mark of the beginning
        ids = torch.cat((ids[:begun], seen.ids, ids[begun:]))
        if len(ids) > self.model.encoder.max_length:
            raise ValueError(f"an example takes {len(ids)} positions, the limit is {self.model.encoder.max_length}")
        return Encoded(ids, torch.full_like(ids, IGNORE), seen.tiles)

    def _fit(self, prompt: Example, picture: Picture | Tensor | None, new: int) -> tuple[Encoded, int]:
        """The row of a prompt, cut as :meth:`generate` says, and how many of the ``new`` tokens have room behind it."""
        ids, seen = self._ids(prompt, True, False), len(self._seen(picture).ids)
        room = self.model.encoder.max_length - seen
        begun = int(bool(ids) and ids[0] == self.tokenizer.bos_id)
        if begun < room - new < len(ids):
            ids = ids[:begun] + ids[len(ids) - (room - new) + begun :]
        if len(ids) >= room:
            raise ValueError(
                f"a prompt of {len(ids)} tokens, max_gen_len {new} and {seen} positions of pictures leave no room for "
                f"an answer: this model reads {self.model.encoder.max_length}"
            )
        return self._row(ids, picture, True, False), min(new, room - len(ids))

    def _seen(self, picture: Picture | Tensor | None) -> Encoded:
        """Placeholders and tiles of a picture alone."""
        encoder = self._raw.encoder
        if isinstance(picture, Tensor):
            blank = Image.new("RGB", (picture.shape[2], picture.shape[1]))
            row = encoder.row((Turn("user", (Picture(blank),)),))
            if len(row.tiles) != 1 or row.tiles.shape[1:] != picture.shape:
                raise ValueError(
                    f"a tensor of shape {tuple(picture.shape)} is no tile of this model, whose pictures become "
                    f"{len(row.tiles)} tiles of {encoder.tile_size} pixels: give the picture itself"
                )
            return Encoded(row.ids[row.ids < 0], row.labels[row.ids < 0], picture[None])
        row = encoder.row((Turn("user", () if picture is None else (picture,)),))
        return Encoded(row.ids[row.ids < 0], row.labels[row.ids < 0], row.tiles)

    def _pictures(self, images: Images, count: int) -> list[Picture | Tensor | None]:
        if images is None:
            return [None] * count
        if len(images) != count:
            raise ValueError(f"{len(images)} images for {count} texts; None stands for no picture")
        if isinstance(images, Tensor):
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
            return [(image.float().cpu() * std + mean).clamp(0, 1) for image in images]
        return [None if i is None else Picture(open_picture(i)) for i in images]


class SPHINXModel(MetaModel):
    """Adds the dialogue: ``generate_response`` writes it with the model's own template."""

    def generate_response(
        self,
        qas: Sequence[Sequence[str | None]],
        image: str | Path | Image.Image | None = None,
        max_gen_len: int = 512,
        temperature: float = 0.1,
        top_p: float = 0.5,
        seed: int = 0,
    ) -> str:
        """The answer to the last question of ``qas`` = [[question, answer], ..., [question, None]] about ``image``.

        Raises:
            ValueError: for a dialogue whose last question has an answer or whose others have none.
        """
        if not qas or any(len(qa) != 2 or not isinstance(qa[0], str) for qa in qas) or qas[-1][1] is not None:
            raise ValueError("qas must be [[question, answer], ..., [question, None]]")
        limits, turns = Limits(), list[Turn]()
        for k, (question, answer) in enumerate(qas):
            turns.append(user_turn(str(question), [image] if image is not None and k == 0 else [], limits))
            if k < len(qas) - 1:
                if answer is None:
                    raise ValueError(f"qas[{k}] has no answer, only the last question may have none")
                turns.append(Turn("assistant", (answer,)))
        sampling = Sampling(
            max_new_tokens=max_gen_len,
            temperature=temperature,
            top_p=top_p if temperature > 0 else None,
            seed=seed,
        )
        talk = chat.ChatModel(self.model, sampling=sampling).new_chat(turns[:-1])
        return "".join(e for e in talk.events(turns[-1]) if isinstance(e, str))
