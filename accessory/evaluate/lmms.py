"""Our models in lmms-eval, unmodified: found through the entry point group ``lmms_eval.models`` (from 0.7 on).

    lmms-eval --model accessory --model_args pretrained=weights/nano-sphinx --tasks ...

``chat`` models are asked in messages and only generate; tasks of type ``multiple_choice`` and ``loglikelihood`` want
the ``simple`` one (``--force_simple``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from accessory.evaluate.harness import Asked, parts_of, sampling_of, turns_of
from accessory.schema import Turn


class _Both(lmms):
    """What the two forms share."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        cache: str | None = None,
        max_new_tokens: int = 256,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"model argument {next(iter(unknown))!r} is unknown: pretrained, batch_size, device, cache"
            )
        self.asked = Asked(pretrained, device=device, cache=cache)
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)

    def _turns(self, arguments: tuple[Any, ...]) -> tuple[Turn, ...]:
        raise NotImplementedError

    def _generation(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; requests of equal arguments are asked together."""
        out: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(self._generation(request.args).items())), []).append(i)
        for places in groups.values():
            sampling = sampling_of(self._generation(requests[places[0]].args), self.max_new_tokens)
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                texts = self.asked.texts([self._turns(requests[i].args) for i in part], sampling)
                out.update(zip(part, texts, strict=True))
                for i, text in zip(part, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [out[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: the harness drives rounds through the model, which has no task to be asked again."""
        raise NotImplementedError("tasks of several rounds are not supported by this model")

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]


class AccessoryChat(_Both):
    """Asked in messages, as chat models are."""

    is_simple = False

    def _turns(self, arguments: tuple[Any, ...]) -> tuple[Turn, ...]:
        _, messages, _, doc_id, task, split = arguments
        return turns_of(messages(self._doc(task, split, doc_id)))

    def _generation(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return dict(arguments[2])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """Chat tasks of 0.7.3 do not ask for it."""
        raise NotImplementedError("likelihoods are asked of the simple form of this model: --force_simple")


class AccessorySimple(_Both):
    """Asked with a text and pictures, which stand before it."""

    is_simple = True

    def _turns(self, arguments: tuple[Any, ...]) -> tuple[Turn, ...]:
        text, _, visual, doc_id, task, split = arguments
        return self._with_pictures(text, visual(self._doc(task, split, doc_id)))

    def _with_pictures(self, text: str, visuals: Any) -> tuple[Turn, ...]:
        pictures = parts_of([{"type": "image", "url": v} for v in visuals or ()])
        return (Turn("user", (*pictures, text)),)

    def _generation(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return dict(arguments[1])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """(loss, greedy): the negative log-likelihood, summed over the answer and its end, and whether greedy decoding
        says the same.

        The harness calls it a likelihood and takes the *smallest* (``np.argmin`` in its ``process_results``): losses
        are what it wants. 0.7.3 turns a bare pair into a string (``unwrap_generation_output``) and fails on it; what
        comes in a ``GenerationResult`` it leaves as it is.
        """
        asked = []
        for request in requests:
            text, answer, visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            said = answer(doc) if callable(answer) else answer
            asked.append((self._with_pictures(text, visual(doc)), str(said).strip()))
        found = self.asked.likelihoods(asked, self.batch_size)
        return [GenerationResult((-f.total, f.greedy)) for f in found]
