"""Steering without training: text caches, regions, shared attention, gates, stretched tables, long sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Region, Steering
from tests.unit.diffusion.dits import FLAG, NEXT, far, noise, randomised, told

KINDS = {"flag": FLAG, "next": NEXT}
T = torch.tensor([0.2, 0.7])
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_read_once_for_all_steps(kind: str) -> None:
    model, x, condition = randomised(KINDS[kind]), noise(2, 4, 4, 8), told(KINDS[kind], 2)
    prompts = told(KINDS[kind], 2, seed=4)
    steering = Steering(regions=(Region(LEFT, 1), Region(RIGHT, 0)), region_condition=prompts)
    read = []
    for block in model.layers:
        block.get_submodule("attention.wk_y").register_forward_hook(lambda *_: read.append(1))
    with torch.no_grad():
        for s in (Steering(), steering):
            plain = model(x, T, condition, steering=s)
            cache = model.read(condition, s)
            read.clear()
            assert torch.equal(model(x, T, condition, steering=s, text=cache), plain)
            assert not read
        other = model.read(told(KINDS[kind], 2, seed=8))
        assert far(model(x, T, condition, text=other), model(x, T, condition)) > 1e-3
        with pytest.raises(ValueError, match="text cache is of 2 pictures and 2 rows of text, not 1"):
            model(x[:1], T[:1], condition[[0]], text=other)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_of_one_prompt_are_that_prompt(kind: str) -> None:
    model, x, condition = randomised(KINDS[kind]), noise(2, 4, 4, 8), told(KINDS[kind], 2)
    same = replace(condition[[0, 0]], pooled=noise(2, 20))
    quarters = [Region((i / 2, j / 2, i / 2 + 0.5, j / 2 + 0.5), 0) for i in range(2) for j in range(2)]
    whole = Steering(regions=quarters, region_condition=condition[[0]])
    with torch.no_grad():
        plain = model(x, T, same)
        # What covers everything but separators (which keep the own text, the same here) changes nothing.
        assert far(model(x, T, same, steering=whole), plain) < 2e-5
        half = replace(whole, regions=[Region(LEFT, 0)], region_condition=told(KINDS[kind], 1, seed=5))
        assert far(model(x, T, same, steering=half), plain) > 1e-3
        silent = replace(whole, regions=[replace(r, weight=0.0) for r in quarters])
        assert far(model(x, T, same, steering=silent), plain) > 1e-3


def test_each_prompt_rules_its_box_and_no_other() -> None:
    # One block, so that self-attention does not carry what a region reads into its neighbours.
    config = replace(NEXT, n_layers=1)
    model, x = randomised(config), noise(1, 4, 8, 8)
    condition, prompts = replace(told(config, 1), pooled=noise(1, 20)), told(config, 5, seed=4)
    boxes = [(j / 2, i / 2, j / 2 + 0.5, i / 2 + 0.5) for i in range(2) for j in range(2)]
    regions = [Region(box, row) for row, box in enumerate(boxes)]
    with torch.no_grad():
        plain = model(x, T[:1], condition, steering=Steering(regions=regions, region_condition=prompts))
        for changed, box in enumerate(boxes):
            rows = list(range(5))
            rows[changed] = 4  # another prompt in this cell alone
            y = model(x, T[:1], condition, steering=Steering(regions=regions, region_condition=prompts[rows]))
            moved = (y - plain).abs().amax((0, 1)) > 1e-5
            x1, y1, x2, y2 = (round(8 * side) for side in box)
            inside = torch.zeros(8, 8, dtype=torch.bool)
            inside[y1:y2, x1:x2] = True
            assert torch.equal(moved, inside), f"cell {changed}"


def test_regions_rule_the_conditional_half_alone() -> None:
    model, x, condition = randomised(FLAG), noise(2, 4, 4, 8), told(FLAG, 2)
    prompts = told(FLAG, 1, seed=4)
    one = Steering(regions=(Region(LEFT, 0),), region_condition=prompts)
    with torch.no_grad():
        plain = model(x, T, condition)
        both = model(x, T, condition, steering=one)
        ruled = model(x, T, condition, steering=replace(one, halves=2))
    assert far(ruled[0], both[0]) < 2e-5
    assert far(ruled[1], plain[1]) < 2e-5
    assert far(both[1], plain[1]) > 1e-3


def test_regions_in_a_list_of_unequal_sizes() -> None:
    model, condition = randomised(FLAG), told(FLAG, 2)
    x = [noise(4, 4, 8), noise(4, 6, 4)]
    s = Steering(regions=(Region(LEFT, 0), Region(RIGHT, 1)), region_condition=told(FLAG, 2, seed=4))
    with torch.no_grad():
        together = model(x, T, condition, steering=s)
        for i in range(2):
            alone = model(x[i][None], T[i : i + 1], condition[[i]], steering=s)[0]
            assert far(together[i], alone) < 2e-5
            assert far(alone, model(x[i][None], T[i : i + 1], condition[[i]])[0]) > 1e-3


def test_wrong_regions_are_refused() -> None:
    model, x, condition = randomised(FLAG), noise(2, 4, 4, 8), told(FLAG, 2)
    for words, s in {
        r"asks for row 1 of region_condition, which has 1": Steering(
            regions=(Region(LEFT, 1),), region_condition=condition[[0]]
        ),
        r"which has 0": Steering(regions=(Region(LEFT, 0),)),
        r"x1 < x2": Steering(regions=(Region((0.5, 0, 0.5, 1), 0),), region_condition=condition),
        r"cannot consist of 3 equal parts": Steering(halves=3),
        r"base_tokens": Steering(base_tokens=1),
        r"rope_scale must be positive": Steering(rope_scale=-1.0),
    }.items():
        with pytest.raises(ValueError, match=words):
            model(x, T, condition, steering=s)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_attention_shows_all_the_first_picture(kind: str) -> None:
    model, condition = randomised(KINDS[kind]), told(KINDS[kind], 4)
    x, t = noise(4, 4, 4, 4), torch.full((4,), 0.4)
    shared = Steering(shared_attention=True)
    with torch.no_grad():
        plain, y = model(x, t, condition), model(x, t, condition, steering=shared)
        assert far(y[0], plain[0]) < 1e-5  # the first sees itself twice, which is once
        assert min(far(y[i], plain[i]) for i in (1, 2, 3)) > 1e-3
        other = model(torch.cat([x[:1] + 1, x[1:]]), t, condition, steering=shared)
        assert min(far(other[i], y[i]) for i in (1, 2, 3)) > 1e-3
        third = model(torch.cat([x[:2], x[2:3] + 1, x[3:]]), t, condition, steering=shared)
        assert max(far(third[i], y[i]) for i in (0, 1, 3)) < 1e-5  # only the first is shared
        halves = model(x, t, condition, steering=replace(shared, halves=2))
        for half in (slice(0, 2), slice(2, 4)):
            alone = model(x[half], t[half], condition[half], steering=shared)
            assert far(halves[half], alone) < 2e-5
        assert far(halves, y) > 1e-3


def test_shared_attention_in_a_list() -> None:
    model, condition = randomised(NEXT), told(NEXT, 2)
    x, s = [noise(4, 4, 8), noise(4, 6, 6)], Steering(shared_attention=True)
    with torch.no_grad():
        plain, y = model(x, T, condition), model(x, T, condition, steering=s)
        assert far(y[0], plain[0]) < 2e-5
        assert far(y[1], plain[1]) > 1e-3
        swapped = model(x[::-1], T.flip(0), condition[[1, 0]], steering=s)
    assert far(swapped[0], plain[1]) < 1e-5  # now this one is the first


@pytest.mark.parametrize("kind", KINDS)
def test_gates_below_the_threshold_are_left_out(kind: str) -> None:
    model, x, condition = randomised(KINDS[kind]), noise(2, 4, 4, 4), told(KINDS[kind], 2)
    gates = model.gates()
    assert gates.shape == (2, 4)
    middle = float(gates.abs().flatten().sort().values[3:5].mean())
    by_hand = randomised(KINDS[kind])
    read: list[int] = []
    with torch.no_grad():
        for block in by_hand.layers:
            gate = block.get_parameter("attention.gate")
            gate.mul_(gate.tanh().abs() >= middle)
        plain = model(x, T, condition)
        assert torch.equal(model(x, T, condition, steering=Steering(gate_threshold=0.0)), plain)
        cut = model(x, T, condition, steering=Steering(gate_threshold=middle))
        assert far(cut, by_hand(x, T, condition)) < 2e-5
        assert far(cut, plain) > 1e-3
        for block in model.layers:
            block.get_submodule("attention.wk_y").register_forward_hook(lambda *_: read.append(1))
        model(x, T, condition, steering=Steering(gate_threshold=1.1))
        assert not read  # a layer without open heads reads nothing
        model(x, T, condition)
        assert len(read) == 2


def test_proportional_attention_scales_queries() -> None:
    model, condition = randomised(NEXT), told(NEXT, 2)
    x, big = noise(2, 4, 8, 8), 16
    scales = []
    model.layers[0].register_forward_hook(lambda _m, args, _o: scales.append(args[3].scale))
    with torch.no_grad():
        plain = model(x, T, condition)
        assert far(model(x, T, condition, steering=Steering(base_tokens=big)), plain) < 2e-5
        assert far(model(x, T, condition, steering=Steering(base_tokens=4)), plain) > 1e-3
        model([x[0], noise(4, 4, 4)], T, condition, steering=Steering(base_tokens=4))
    assert scales[0] is None
    assert scales[2].flatten().tolist() == pytest.approx([math.sqrt(2)])
    # In a list each picture has the scale of its own length.
    assert scales[3].flatten().tolist() == pytest.approx([math.sqrt(2), 1])


def test_each_picture_switches_by_its_own_time() -> None:
    model, x, condition = randomised(NEXT), noise(2, 4, 8, 8), told(NEXT, 2)
    switch = Steering(rope_scale=2.0, watershed=0.3)
    with torch.no_grad():
        y = model(x, T, condition, steering=switch)
        linear = model(x, T, condition, steering=replace(switch, rope_method="linear"))
        ntk = model(x, T, condition, steering=replace(switch, rope_method="ntk"))
    assert torch.equal(y[0], linear[0])
    assert torch.equal(y[1], ntk[1])
    assert far(linear, ntk) > 1e-3


def test_a_null_row_joins_its_picture() -> None:
    model, x, condition = randomised(FLAG), noise(2, 4, 4, 4), told(FLAG, 2)
    null = Condition(seq=noise(1, 1, 20), mask=torch.ones(1, 1, dtype=torch.bool))
    both = join([condition, null[[0, 0]]])
    with torch.no_grad():
        y = model(torch.cat([x, x]), torch.cat([T, T]), both)
        assert far(y[:2], model(x, T, condition)) < 2e-5
        assert far(y[2:], model(x, T, null[[0, 0]])) < 2e-5
        assert far(y[:2], y[2:]) > 1e-3
