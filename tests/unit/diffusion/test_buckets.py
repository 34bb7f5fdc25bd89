"""Sizes of about equal cost, the choice among them, and the way to them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from accessory.diffusion.buckets import best_sizes, bucket_sizes, choose_size, crop, plan_crop


@pytest.mark.parametrize(
    ("side", "count", "checksum", "fewest"), [(256, 49, 11828, 224), (512, 97, 96048, 952), (1024, 193, 778290, 3955)]
)
def test_published_lists(side: int, count: int, checksum: int, fewest: int) -> None:
    sizes = bucket_sizes(side)
    tokens = [w * h // 256 for w, h in sizes]
    assert (len(sizes), sum(tokens), min(tokens), max(tokens)) == (count, checksum, fewest, (side // 16) ** 2)
    assert sizes[count // 2] == (side, side)
    assert sizes == tuple((h, w) for w, h in reversed(sizes))
    assert sizes[0] == (2 * side, side // 2)
    # With an end at every row: the longest sequence.
    assert max(w * h // 256 + h // 16 for w, h in sizes) == {256: 288, 512: 1088, 1024: 4224}[side]


def test_other_patches_and_aspects() -> None:
    assert bucket_sizes(8, patch=4) == ((16, 4), (12, 4), (8, 4), (8, 8), (4, 8), (4, 12), (4, 16))
    assert bucket_sizes(8, patch=4, max_aspect=1.0) == ((8, 8),)
    with pytest.raises(ValueError, match="100 pixels is not a whole number of patches of 16"):
        bucket_sizes(100)


def test_the_choice_is_even_among_the_best_four() -> None:
    sizes = bucket_sizes(256)
    best = best_sizes(640, 480, sizes)
    assert [share for share, _ in best] == sorted((share for share, _ in best), reverse=True)
    rng = np.random.default_rng(0)
    drawn = Counter(choose_size(640, 480, sizes, rng) for _ in range(400))
    assert set(drawn) == {size for _, size in best}
    assert min(drawn.values()) > 70
    assert choose_size(640, 480, sizes) == best[0][1]


def test_a_crop_is_of_the_size_and_inside() -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    plan = plan_crop(300, 200, (96, 96))
    assert plan.halved == ((150, 100),)
    assert plan.resized == (144, 96)
    assert plan.room == (48, 0)
    assert plan_crop(192, 192, (96, 96)).halved == ((96, 96),)
    assert plan_crop(191, 400, (96, 96)).halved == ()
    cuts = [np.asarray(crop(image, (96, 96), np.random.default_rng(seed))).astype(int) for seed in range(12)]
    assert {cut.shape for cut in cuts} == {(96, 96, 3)}
    lefts = {int(cut[:, 0, 0].mean()) for cut in cuts}
    assert len(lefts) > 6
    assert max(lefts) - min(lefts) > 40  # of 85 in the red channel
    middle = np.asarray(crop(image, (96, 96))).astype(float)
    assert middle[..., 0].mean() == pytest.approx(127.5, abs=2)
    again = np.asarray(crop(image, (96, 96), np.random.default_rng(3)))
    assert np.array_equal(again, cuts[3])
