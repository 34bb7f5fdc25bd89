"""Batches keep every row and pad on the right."""

import pytest
import torch

from accessory.data.collate import collate
from accessory.schema import Encoded
from accessory.tokens import IGNORE


def row(n: int, tiles: int) -> Encoded:
    return Encoded(torch.arange(1, n + 1), torch.arange(1, n + 1), torch.full((tiles, 3, 4, 4), float(n)), f"s{n}", n)


def test_padding_and_tiles_in_reading_order() -> None:
    batch = collate([row(2, 1), row(4, 0), row(3, 2)], pad_id=9)
    assert batch.ids.tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]]
    assert batch.labels[0].tolist() == [1, 2, IGNORE, IGNORE]
    assert batch.mask.sum(1).tolist() == [2, 4, 3]
    assert batch.tiles[:, 0, 0, 0].tolist() == [2.0, 3.0, 3.0]
    assert batch.sources == ("s2", "s4", "s3")
    assert batch.counts is not None
    assert batch.counts.tolist() == batch.to("cpu").counts.tolist() == [1, 0, 2]  # type: ignore[union-attr]


def test_text_alone_has_no_tiles() -> None:
    assert collate([row(2, 0)], pad_id=0).tiles.shape == (0, 3, 4, 4)
    with pytest.raises(ValueError, match="at least one row"):
        collate([], pad_id=0)
