"""Scores: the same in any batch, and controls that take away what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from PIL import Image

from accessory.evaluate import score as scoring
from accessory.evaluate.retrieval import nearest_accuracy, pooled
from accessory.evaluate.score import ScoreRow, answers, score
from accessory.models.build import Model
from accessory.models.mllm import MLLM
from accessory.schema import Sample
from tests.unit.evaluate.asked import asked, stand_in
from tests.unit.models.pictured import model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model(tmp_path_factory.mktemp("tiny"))


def put(monkeypatch: pytest.MonkeyPatch, control: str, count: int, limit: int | None = None) -> list[Sample]:
    """The questions that reach the model."""
    seen: list[Sample] = []

    def stub(model: object, samples: Sequence[Sample], *rest: object) -> list[str]:
        seen.extend(samples)
        return ["x"] * len(samples)

    with monkeypatch.context() as patch:
        stand_in(patch, count)
        patch.setattr(scoring, "answers", stub)
        score(_Sizes(), "any", control=control, limit=limit, batch_size=3)  # type: ignore[arg-type]
    return seen


class _Sizes:
    class config:  # noqa: N801
        class tiling:  # noqa: N801
            size = 64


def test_answers_do_not_depend_on_the_batch(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 7)
    results = [score(made, "any", batch_size=n) for n in (1, 3, 64)]
    texts = [[i.answer for i in r.items] for r in results]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1  # it does not say the same to all
    first = results[0]
    assert [i.index for i in first.items] == list(range(7))
    assert (first.correct, first.total, first.accuracy) == (0, 7, 0.0)
    assert all(i.question.strip().endswith("?") and i.truth == f"truth {i.index}" for i in first.items)


def test_right_answers_are_counted(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 4)
    monkeypatch.setattr(scoring, "answers", lambda m, samples, *r: [s.turns[-1].text.upper() for s in samples])
    assert score(made, "any", batch_size=3).accuracy == 1
    monkeypatch.setattr(scoring, "answers", lambda m, samples, *r: ["Truth 1."] * len(samples))
    assert score(made, "any", batch_size=3).accuracy == 0.25
    assert [i.right for i in score(made, "any").items] == [False, True, False, False]


@pytest.mark.parametrize(("count", "limit"), [(2, None), (3, None), (9, None), (10, 4), (10, 3), (10, 2)])
def test_shuffled_leaves_no_picture_in_place(monkeypatch: pytest.MonkeyPatch, count: int, limit: int | None) -> None:
    own = put(monkeypatch, "none", count, limit)
    other = put(monkeypatch, "shuffled", count, limit)
    assert len(own) == len(other) == (limit or count)
    pixels = [[s.turns[0].pictures[0].source.tobytes() for s in part] for part in (own, other)]  # type: ignore[union-attr]
    assert all(a != b for a, b in zip(*pixels, strict=True))
    assert sorted(pixels[0]) == sorted(pixels[1])  # the same pictures, elsewhere
    assert [s.turns[0].text for s in own] == [s.turns[0].text for s in other]
    assert [s.turns[1] for s in own] == [s.turns[1] for s in other]


def test_blind_has_no_tiles(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = put(monkeypatch, "blind", 4)
    rows = [made.encoder.encode(s) for s in blind]
    assert [len(r.tiles) for r in rows] == [0] * 4
    assert not any((r.ids < 0).any() for r in rows)
    assert [len(made.encoder.encode(s).tiles) for s in asked(4)] == [3, 1, 1, 3]
    with torch.inference_mode():
        assert all(torch.isfinite(p).all() for p in made.net.prompts(rows)[0])


@torch.inference_mode()
def test_what_the_model_is_fed_follows_the_picture(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [made.encoder.encode(s) for s in put(monkeypatch, "none", 3)]
    other = [made.encoder.encode(s) for s in put(monkeypatch, "shuffled", 3)]
    for a, b in zip(made.net.prompts(own)[0], made.net.prompts(other)[0], strict=True):
        assert a.shape != b.shape or not torch.equal(a, b)
    together = made.net.prompts(own)[0]
    for row, x in zip(own, together, strict=True):
        torch.testing.assert_close(x, made.net.embed(row.ids[None], row.tiles)[0], rtol=1e-4, atol=1e-5)


def test_inputs_go_to_the_device_of_the_model(made: Model) -> None:
    seen: list[torch.device] = []

    class Elsewhere:
        """A network on the meta device, where there is nothing to compute."""

        prompts = MLLM.prompts
        resampler, projector = None, made.net.projector

        def parameters(self) -> Iterator[torch.Tensor]:
            yield torch.empty(1, device="meta")

        def encode(self, tiles: torch.Tensor) -> torch.Tensor:
            seen.append(tiles.device)
            return tiles

        def embed(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            seen.extend((ids.device, features.device))
            return ids[None]

    rows = [made.encoder.encode(s) for s in asked(2)]
    assert len(Elsewhere().prompts(rows)[0]) == 2  # type: ignore[misc]
    assert seen == [torch.device("meta")] * 5


def test_limits_spread_and_are_checked(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [s.turns[-1].text for s in put(monkeypatch, "none", 10, 4)]
    assert texts == ["truth 0", "truth 2", "truth 5", "truth 7"]
    assert len(put(monkeypatch, "none", 3, 50)) == 3
    with pytest.raises(ValueError, match="limit is 1"):
        put(monkeypatch, "none", 3, 1)
    with pytest.raises(ValueError, match="unknown"):
        score(made, "no such set")


def test_the_reference_answer_is_not_shown(made: Model) -> None:
    one = asked(1)[0]
    turns = (*one.turns[:-1], type(one.turns[-1])("assistant", ("something quite different",)))
    said = [answers(made, [s], max_new_tokens=8) for s in (one, Sample(turns))]
    assert said[0] == said[1]


def test_accuracy_of_a_row() -> None:
    assert ScoreRow("t", "none", 3, 4, 1.0).accuracy == 0.75


def test_nearest_neighbour_with_centred_sets_ignores_a_constant_offset() -> None:
    drawn = torch.randn(20, 8)
    near = drawn + 0.05 * torch.randn(20, 8)
    assert nearest_accuracy([drawn], near) == 1
    assert nearest_accuracy([drawn], near.roll(1, 0)) == 0
    offset = near + torch.tensor([20.0, *[0.0] * 7])
    assert nearest_accuracy([torch.randn(20, 8), drawn + 3], offset, centred=True) == 1
    assert nearest_accuracy([drawn], offset) < 0.5


def test_drawings_go_to_the_device_of_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    class Elsewhere:
        size, mean = 8, torch.empty(3, device="meta")

        def tokens(self, tiles: torch.Tensor) -> tuple[torch.Tensor]:
            seen.append(tiles.device)
            return (torch.zeros(len(tiles), 4, 5),)

    drawn = [Image.new("RGBA", (8, 8), "red")] * 3
    monkeypatch.setattr("accessory.data.emoji.pictures", lambda style, cache: drawn)
    assert pooled(Elsewhere(), "any", batch_size=2).shape == (3, 5)  # type: ignore[arg-type]
    assert seen == [torch.device("meta")] * 2


def test_words_are_put_into_the_model_s_mouth(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """ScienceQA's `` The answer is``: behind the prompt, as a continuation of it, and not part of the answer."""
    lengths: list[int] = []
    plain = scoring.generate

    def spy(backbone: object, rows: list[torch.Tensor], **options: object) -> list[list[int]]:
        lengths.extend(len(r) for r in rows)
        return plain(backbone, rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "generate", spy)
    one = asked(1)
    free, led = answers(made, one, 8), answers(made, one, 8, prefill=" The answer is")
    assert lengths[1] - lengths[0] == len(made.tokenizer.encode(" The answer is", glued=True)) > 1
    assert free != led
    assert not led[0].startswith("The answer is")


def test_a_sampling_of_one_s_own(made: Model) -> None:
    one = asked(1)
    free = answers(made, one, 8)
    assert answers(made, one, sampling=scoring.Sampling(max_new_tokens=8)) == free
    cut = free[0][1:3]
    assert answers(made, one, sampling=scoring.Sampling(max_new_tokens=8, stop=(cut,))) == [
        free[0].split(cut)[0].strip()
    ]
    hot = [answers(made, one, sampling=scoring.Sampling(8, temperature=2.0, seed=s)) for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
