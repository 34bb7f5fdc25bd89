"""Layout of spans, positions, what is dropped."""

from collections import Counter

import pytest
import torch

from accessory.models.dream_spans import DreamSpan, NullPolicy, hide_spans, prompts, without
from accessory.tokens import DREAM, DREAM_END, DREAM_START, IMAGE

SPAN = [DREAM_START, DREAM, DREAM, DREAM_END]


def test_spans_are_found_in_reading_order() -> None:
    ids = torch.tensor([[1, *SPAN, 5, *SPAN], [1, 2, 3, *SPAN, 4, 4, 4]])
    rows, columns = DreamSpan(2).find(ids)
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 1], [1, 6, 3])
    assert DreamSpan(2).ids() == SPAN
    assert len(DreamSpan(2).find(torch.tensor([[1, 2]]))[0]) == 0


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ([1, DREAM_START, DREAM, DREAM], 1),
        ([1, DREAM_START, DREAM, DREAM_END], 1),
        ([1, DREAM, DREAM, DREAM_END], 1),
        ([1, 1, DREAM, 1], 1),
        ([DREAM_START, DREAM, 3, DREAM_END], 1),
    ],
)
def test_a_torn_span_is_an_error(row: list[int], wrong: int) -> None:
    with pytest.raises(ValueError, match=f"row {wrong} holds a torn dream span"):
        DreamSpan(2).find(torch.tensor([SPAN, row]))


def test_hidden_spans_are_not_counted() -> None:
    ids = torch.tensor([[9, 1, *SPAN, 5, 6, *SPAN, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = False
    allowed, positions = hide_spans(ids, mask, 0, None)
    assert positions.tolist() == [[0, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 5]]
    sees = [[j for j in range(13) if allowed[0, 0, i, j]] for i in range(13)]
    assert sees[4] == [1, 2, 3, 4]  # a query: the context, its trigger, the queries before it
    assert sees[6] == [1, 2, 6]  # text behind the span: all but queries and end
    assert sees[10] == [1, 2, 6, 7, 8, 9, 10]  # a query of the next span sees none of the first
    assert sees[0] == [0]
    late, continued = hide_spans(ids[:, 2:6], mask[:, :6], 2, None)
    assert continued.tolist() == [positions[0, 2:6].tolist()]
    assert torch.equal(late, allowed[:, :, 2:6, :6])


def test_a_window_counts_what_is_visible() -> None:
    ids = torch.tensor([[1, 2, *SPAN, 5]])
    allowed, positions = hide_spans(ids, None, 0, 3)
    assert positions[0, -1] == 3
    assert allowed[0, 0, -1].tolist() == [False, True, True, False, False, False, True]


def test_prompts_are_packed() -> None:
    ids = torch.tensor([[9, 1, 2, *SPAN, IMAGE, *SPAN], [1, *SPAN, 3, 3, 3, 3, 3, 3, 3]])
    mask = ids != 9
    index, real = prompts(ids, mask, *DreamSpan(2).find(ids))
    assert [i[r].tolist() for i, r in zip(index, real, strict=True)] == [[1, 2], [1, 2, 7], [0]]
    assert index.shape == (3, 3)


def test_a_context_without_a_part() -> None:
    ids = torch.tensor([1, 5, IMAGE, IMAGE, 6])
    assert without(ids, "text", (1,)).tolist() == [1, IMAGE, IMAGE]
    assert without(ids, "image", (1,)).tolist() == [1, 5, 6]
    assert without(ids, "all", (1, 2)).tolist() == [1, 2]
    assert without(ids, "keep", (1,)).tolist() == ids.tolist()


def test_draws_have_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = Counter(NullPolicy(0.2, 0.3, 0.1).draw(4000, generator))
    for kind, p in (("text", 0.2), ("image", 0.3), ("all", 0.1), ("keep", 0.4)):
        assert abs(seen[kind] / 4000 - p) < 0.03  # type: ignore[index]
    assert set(NullPolicy(0, 0, 0).draw(50)) == {"keep"}
    assert set(NullPolicy(0, 0, 1.0).draw(50)) == {"all"}
    with pytest.raises(ValueError, match="sum at most 1"):
        NullPolicy(0.5, 0.5, 0.1)
