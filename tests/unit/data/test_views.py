"""Rows of models that see a picture several times, and of those whose pictures precede the first token."""

import pytest
import torch
from PIL import Image

from accessory.data.encode import Encoder, RowRejected, tile_ids
from accessory.data.template import get
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import Tokenizer
from accessory.schema import Picture, Sample, Turn
from accessory.tokens import IMAGE, IMAGE_END, IMAGE_START

SAMPLE = Sample((Turn("user", (Picture(Image.new("RGB", (8, 8))), "What?")), Turn("assistant", ("A cat.",))))


def test_every_view_has_its_run(tokenizer: Tokenizer) -> None:
    made = Encoder(tokenizer, get("sphinx"), TilingConfig(8), (3, 2, 2), 400, start_end=True)
    assert (made.tokens_per_tile, made.positions_per_tile) == (7, 13)
    row = made.encode(SAMPLE)
    a, b = [IMAGE_START, *[IMAGE] * 3, IMAGE_END], [IMAGE_START, *[IMAGE] * 2, IMAGE_END]
    assert row.ids[1:14].tolist() == [*a, *b, *b] == tile_ids((3, 2, 2), True)
    assert row.ids[0] == tokenizer.special("bos")
    assert len(row.tiles) == 1
    plain = Encoder(tokenizer, get("sphinx"), TilingConfig(8), 7, 400)
    assert plain.encode(SAMPLE).ids[1:8].tolist() == [IMAGE] * 7 == tile_ids((3, 2, 2), False)
    assert plain.positions_per_tile == 7


@pytest.mark.parametrize("runs", [(), 0, (3, 0)])
def test_empty_runs_are_errors(tokenizer: Tokenizer, runs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Encoder(tokenizer, get("sphinx"), TilingConfig(8), runs, 400)


def test_pictures_may_take_no_position(tokenizer: Tokenizer) -> None:
    wide = Sample((Turn("user", (Picture(Image.new("RGB", (20, 8))), "What is this?")), Turn("assistant", ("a",))))
    tiling = TilingConfig(8, grid="aspect")
    without, row = (Encoder(tokenizer, get("sphinx"), tiling, n, 400) for n in (None, 3))
    assert (without.encode(wide).ids >= 0).all()
    seen = row.encode(wide)
    assert without.encode(wide).ids.tolist() == seen.ids[seen.ids >= 0].tolist()
    assert torch.equal(without.encode(wide).tiles, seen.tiles)
    assert len(seen.tiles) > 1
    few = Encoder(tokenizer, get("sphinx"), tiling, None, 400, max_tiles=1)
    with pytest.raises(RowRejected, match=rf"1 pictures \({len(seen.tiles)} tiles\) in one dialogue.* takes 1 "):
        few.encode(wide)
    assert few.under(get("plain")).template.name == "plain"
    assert few.template.name == "sphinx"


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_pictures_before_the_first_token(tokenizer: Tokenizer, name: str) -> None:
    rows = [
        Encoder(tokenizer, get(n), TilingConfig(8), 3, 400).encode(SAMPLE).ids.tolist() for n in (name, f"{name}_clip")
    ]
    assert rows[0][:4] == [tokenizer.special("bos"), *[IMAGE] * 3]
    assert rows[1][:4] == [*[IMAGE] * 3, tokenizer.special("bos")]
    assert rows[0][4:] == rows[1][4:]
