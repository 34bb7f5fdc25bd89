"""Latents as sequences: patch order, separators, padding; and the rotary tables over them."""

from __future__ import annotations

import math

import pytest
import torch

from accessory.diffusion.denoiser import Steering
from accessory.diffusion.dit_rotary import rotary_table, spectrum
from accessory.diffusion.patches import grid_size, patchify, plan, unpatchify
from accessory.nn.rope import rotate
from tests.unit.diffusion.dits import far, noise


@pytest.mark.parametrize("shape", [(3, 6), (4, 6, 8), (4, 3, 6, 8), (2, 5)])
def test_cut_and_joined_again(shape: tuple[int, ...]) -> None:
    patch = (1, 1, 1) if shape[-1] % 2 else (1, 1, 2) if len(shape) == 2 else (1, 2, 2)
    x = noise(2, *shape)
    tokens = patchify(x, patch)
    values = math.prod(patch)
    # In the order (C, ph, pw), out (ph, pw, C): the projection between them would turn one into the other.
    turned = tokens.unflatten(-1, (shape[0], values)).transpose(-1, -2).flatten(-2)
    assert torch.equal(unpatchify(turned, shape[1:], patch), x)
    if values > 1:
        assert not torch.equal(unpatchify(tokens, shape[1:], patch), x)


def test_a_token_holds_channel_row_column() -> None:
    x = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)
    assert patchify(x, (1, 2, 2))[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_separators_stand_behind_rows_and_frames() -> None:
    where = plan([(2, 2, 4)], (1, 1, 2), eol=True, eof=True)
    line, frame = 8, 9
    assert where.index is not None
    assert where.index[0].tolist() == [0, 1, line, 2, 3, line, frame, 4, 5, line, 6, 7, line, frame]
    assert where.places is not None
    assert where.places[0].tolist() == [0, 1, 3, 4, 7, 8, 10, 11]
    assert where.coords[0, :7].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [0, 2, 0]]
    assert where.mask is None
    # H (W + 1) T + T
    assert where.length == 2 * (2 * 3) + 2
    assert plan([(8, 6)], (1, 2, 2), eol=True, eof=False).length == 4 * (3 + 1)
    assert plan([(8, 6)], (1, 2, 2), eol=False, eof=False).index is None


def test_padding_repeats_the_last_place() -> None:
    where = plan([(4, 4), (2, 4)], (1, 2, 2), eol=False, eof=False)
    assert where.mask is not None
    assert where.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert where.index is not None
    assert where.index.tolist() == [[0, 1, 2, 3], [0, 1, 6, 6]]
    assert where.coords[1].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert where.lengths.tolist() == [4, 2]
    fixed = plan([(4, 4)], (1, 2, 2), eol=False, eof=False, fixed_length=6)
    assert fixed.mask is None
    assert fixed.lengths.tolist() == [6]
    with pytest.raises(ValueError, match="4 tokens do not fit into the fixed length of 3"):
        plan([(4, 4)], (1, 2, 2), eol=False, eof=False, fixed_length=3)
    with pytest.raises(ValueError, match="4 axes"):
        grid_size((1, 2, 3, 4), (1, 1, 1))


@pytest.mark.parametrize("eol", [True, False])
def test_boxes_that_tile_share_no_patch(eol: bool) -> None:
    where = plan([(6, 10)], (1, 2, 2), eol=eol, eof=False)
    for rows, columns in ((2, 2), (1, 5), (3, 1), (2, 3), (4, 4)):
        boxes = [
            (j / columns, i / rows, (j + 1) / columns, (i + 1) / rows) for i in range(rows) for j in range(columns)
        ]
        counts = sum(where.inside(box)[0].int() for box in boxes)
        assert isinstance(counts, torch.Tensor)
        patches = torch.ones(15) if where.index is None else (where.index[0] < 15).int()
        assert counts.tolist() == patches.tolist(), (rows, columns)


def test_published_angles_of_two_axes() -> None:
    angle = rotary_table(torch.tensor([[[1, 2]]]), spectrum(72, 2, 10000.0, torch.zeros(1))).angle()[0, 0]
    torch.testing.assert_close(angle[:4], torch.tensor([1, 2, 0.599484, 1.198968]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("axes", "width"), [(1, 24), (2, 24), (3, 24)])
def test_scores_depend_on_differences_alone(axes: int, width: int) -> None:
    torch.manual_seed(0)
    places = torch.randint(0, 9, (1, 12, axes))
    q, k = torch.randn(2, 1, 1, 1, width).expand(2, 1, 12, 1, width)
    waves = spectrum(width, axes, 10000.0, torch.zeros(1))

    def scores(shift: list[int]) -> torch.Tensor:
        table = rotary_table(places + torch.tensor(shift), waves)
        return torch.einsum("bthd,bshd->ts", rotate(q, table), rotate(k, table))

    plain = scores([0] * axes)
    for axis in range(axes):
        shift = [0] * axes
        shift[axis] = 5
        assert far(scores(shift), plain) < 1e-4
    # And on every one of them.
    for axis in range(axes):
        one, other = torch.zeros(2, axes), torch.zeros(2, axes)
        other[1, axis] = 3
        tables = [rotary_table(p[None], waves) for p in (one, other)]
        pair = [torch.einsum("bthd,bshd->ts", rotate(q[:, :2], t), rotate(k[:, :2], t))[0, 1] for t in tables]
        assert abs(pair[0] - pair[1]) > 1e-2


def test_stretching() -> None:
    t = torch.tensor([0.0, 0.3, 1.0])

    def waves(method: str, scale: float = 2.0, length: int = 128) -> torch.Tensor:
        return spectrum(24, 2, 10000.0, t, Steering(rope_scale=scale, rope_method=method), length)  # type: ignore[arg-type]

    plain = spectrum(24, 2, 10000.0, t)
    for method in ("linear", "ntk", "time_switch", "frequency", "time_smooth"):
        assert torch.equal(waves(method, 1.0), plain)
        stretched = waves(method)
        assert (stretched <= plain + 1e-7).all()
        assert far(stretched, plain) > 1e-2
        assert waves(method, 64.0).isfinite().all()
    # Smooth: near noise all frequencies are interpolated; near data slow ones are raised by less.
    smooth = waves("time_smooth")
    torch.testing.assert_close(smooth[0, 1:], waves("linear")[0, 1:])
    assert smooth[0, 0] == 1
    assert (smooth[2] >= smooth[1] - 1e-9).all()
    assert (smooth[2, 1:] > smooth[1, 1:] + 1e-6).any()
    # The boundary belongs to the raised base.
    switch = waves("time_switch")
    assert torch.equal(switch[0], waves("linear")[0])
    assert torch.equal(switch[1], waves("ntk")[0])
    with pytest.raises(ValueError, match="trained length of 7 or more"):
        waves("frequency", length=6)
