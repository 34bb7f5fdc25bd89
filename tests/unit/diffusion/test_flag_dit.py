"""The diffusion transformer: what must not change its output, and that each of these things could."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Steering
from accessory.diffusion.dit_ends import time_waves
from accessory.diffusion.dit_fast import accelerate, release
from accessory.diffusion.flag_dit import FlagDiT
from accessory.peft.attach import LoraSpec, attach, trainable_state
from accessory.train.blocks import checkpoint_blocks
from tests.unit.diffusion.dits import FLAG, KINDS, LABEL, NEXT, far, noise, randomised, told

TEXT = [name for name, config in KINDS.items() if config.text_dim]


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_zero_at_initialisation(kind: str) -> None:
    config = KINDS[kind]
    model = FlagDiT(config)
    x, t = noise(2, 4, 6, 8), torch.tensor([0.2, 0.9])
    out = model(x, t, told(config, 2))
    assert out.shape == (2, 8 if config.keep_sigma else 4, 6, 8)
    assert out.abs().max() == 0
    assert randomised(config)(x, t, told(config, 2)).abs().max() > 0.1


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "large_t2i"])
def test_a_list_of_unequal_latents_equals_singles(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    x, t, condition = [noise(4, 8, 6), noise(4, 4, 10), noise(4, 2, 2)], torch.tensor([0.1, 0.5, 0.9]), told(config, 3)
    with torch.no_grad():
        together = model(x, t, condition)
        for i, y in enumerate(together):
            alone = model(x[i][None], t[i : i + 1], condition[[i]])[0]
            assert y.shape == x[i].shape
            torch.testing.assert_close(y, alone, atol=2e-5, rtol=1e-5)
        equal = model(list(noise(3, 4, 4, 4)), t, condition)
        assert isinstance(equal, list)
        assert torch.equal(torch.stack(equal), model(noise(3, 4, 4, 4), t, condition))


def test_without_the_mask_a_list_differs_from_singles() -> None:
    x, t, condition = [noise(4, 8, 6), noise(4, 4, 10)], torch.tensor([0.1, 0.5]), told(FLAG, 2)
    masked = randomised(FLAG)
    open_ = FlagDiT(replace(FLAG, fixed_length=16)).eval()
    open_.load_state_dict(masked.state_dict())
    with torch.no_grad():
        pairs = list(zip(masked(x, t, condition), open_(x, t, condition)))
    assert far(*pairs[0]) < 1e-5  # the longest has no padding
    assert far(*pairs[1]) > 1e-3


@pytest.mark.parametrize("kind", TEXT)
def test_what_stands_in_padding_of_text_is_inert(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    x, t, condition = noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(config, 2)
    assert condition.seq is not None
    assert condition.mask is not None
    seq = torch.where(condition.mask[..., None], condition.seq, float("nan"))
    shown = replace(condition, mask=torch.ones_like(condition.mask))
    with torch.no_grad():
        plain = model(x, t, condition)
        assert torch.equal(model(x, t, replace(condition, seq=seq)), plain)
        assert far(model(x, t, condition.padded(12)), plain) < 2e-5
        assert far(model(x, t, shown)[1:], plain[1:]) > 1e-3


@pytest.mark.parametrize("kind", ["flag", "next"])
def test_a_row_without_any_text_is_safe(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    x, t, condition = noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(config, 2)
    assert condition.mask is not None
    mask = condition.mask.clone()
    mask[1] = False
    with torch.no_grad():
        out = model(x, t, replace(condition, mask=mask))
        shut = model.gates().abs().max() + 1
        nothing = Condition(seq=torch.zeros_like(condition.seq), mask=condition.mask)  # type: ignore[arg-type]
        without = model(x, t, nothing, steering=Steering(gate_threshold=float(shut)))
        full = model(x, t, condition)
    assert out.isfinite().all()
    assert far(out[0], full[0]) < 1e-5
    assert far(out[1], without[1]) < 1e-5
    assert far(out[1], full[1]) > 1e-3


@pytest.mark.parametrize("kind", ["flag", "next"])
def test_shut_gates_leave_the_pooled_vector_alone(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    with torch.no_grad():
        for block in model.layers:
            block.get_parameter("attention.gate").zero_()
    x, t, condition = noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(config, 2)
    pooled = noise(2, 20, seed=5)
    other = replace(told(config, 2, seed=9), pooled=pooled)
    opened = randomised(config)
    with torch.no_grad():
        same = model(x, t, replace(condition, pooled=pooled))
        assert torch.equal(model(x, t, other), same)
        assert far(model(x, t, replace(other, pooled=pooled.flip(0))), same) > 1e-3
        assert far(opened(x, t, other), opened(x, t, replace(condition, pooled=pooled))) > 1e-3


def test_pooling_is_the_mean_of_real_text() -> None:
    model, x, t, condition = randomised(FLAG), noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(FLAG, 2)
    assert condition.seq is not None
    assert condition.mask is not None
    mean = torch.stack([row[real].mean(0) for row, real in zip(condition.seq, condition.mask)])
    with torch.no_grad():
        plain = model(x, t, condition)
        assert far(model(x, t, replace(condition, pooled=mean)), plain) < 1e-5
        assert far(model(x, t, replace(condition, pooled=condition.seq.mean(1))), plain) > 1e-3


def test_shared_key_heads_are_repeated_ones() -> None:
    narrow, wide = randomised(NEXT), FlagDiT(replace(NEXT, n_kv_heads=None)).eval()
    state = narrow.state_dict()
    for name, value in list(state.items()):
        if ".wk" in name or ".wv" in name:
            heads = value.unflatten(0, (2, -1))
            state[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    # A norm over all key heads is one over their repetitions; its parameters are repeated with them.
    for name, value in list(state.items()):
        if "k_norm" in name or "ky_norm" in name:
            state[name] = value.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    wide.load_state_dict(state)
    x, t, condition = noise(2, 4, 4, 6), torch.tensor([0.3, 0.6]), told(NEXT, 2)
    with torch.no_grad():
        plain = narrow(x, t, condition)
        assert far(wide(x, t, condition), plain) < 1e-5
        wrong = {n: v.roll(12, 0) if n.endswith("wk.weight") else v for n, v in state.items()}
        wide.load_state_dict(wrong)
        assert far(wide(x, t, condition), plain) > 1e-3


def test_time_waves_are_the_published_ones() -> None:
    waves = time_waves(torch.tensor([0.3]))[0]
    assert waves.shape == (256,)
    wanted = torch.tensor([0.955336, 0.961284, 0.966444, 0.295520])
    torch.testing.assert_close(waves[[0, 1, 2, 128]], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_but_padding(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind]).train()
    x, t, condition = noise(6, 4, 6, 8), torch.linspace(0.05, 0.95, 6), told(config, 6)
    if config.time_steps is None and config.experts is not None:
        t = t * 40  # spread over the experts, which small random gates would not do
    out = model(x if config.pad_token is False else [*x[:5], noise(4, 4, 4)], t, condition)
    (torch.stack([y.square().mean() for y in out]).sum()).backward()
    dead = sorted(n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0)
    unchosen = {n for n in dead if ".experts." in n}
    assert [n for n in dead if n not in unchosen] == (
        ["pad_token"] if config.pad_token and not config.fixed_length else []
    )
    assert len(unchosen) < 0.5 * len([n for n, _ in model.named_parameters() if ".experts." in n]) or not unchosen


def test_the_variance_half_is_dead_in_flow_models_and_can_be_left_out() -> None:
    full, x, t, condition = randomised(FLAG), noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(FLAG, 2)
    both = FlagDiT(replace(FLAG, keep_sigma=True)).eval()
    lean = FlagDiT(replace(FLAG, skip_sigma=True)).eval()
    for model in (both, lean):
        model.load_state_dict(full.state_dict())
    sizes = []
    for model in (full, lean):
        model.final_layer.register_forward_hook(lambda _m, _i, y: sizes.append(y.shape[-1]))
    with torch.no_grad():
        out = full(x, t, condition)
        assert far(lean(x, t, condition), out) < 1e-5
        assert torch.equal(both(x, t, condition)[:, :4], out)
        assert far(both(x, t, condition)[:, 4:], out) > 0.1
    assert sizes == [32, 16]


@pytest.mark.parametrize("kind", ["flag", "next", "moe_both"])
def test_checkpointed_blocks_give_the_same_gradients(kind: str) -> None:
    config, grads = KINDS[kind], []
    for recompute in (False, True):
        model = randomised(config).train()
        calls = []
        model.layers[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            checkpoint_blocks(model.layers)
        x = [noise(4, 4, 4), noise(4, 6, 4)]
        y = model(x, torch.tensor([0.3, 0.6]), told(config, 2))
        (y[0].square().mean() + y[1].square().mean()).backward()
        assert len(calls) == 1 + recompute
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("kind", ["flag", "next", "moe_space"])
def test_packed_products_change_nothing(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    x, t, condition = noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(config, 2)
    with torch.no_grad():
        plain = model(x, t, condition)
        keys = set(model.state_dict())
        accelerate(model)
        assert set(model.state_dict()) == keys
        assert far(model(x, t, condition), plain) < 1e-5
        model.layers[0].attention.wv.weight[:9].mul_(5)  # the packed copy is old now
        assert far(model(x, t, condition), release(model)(x, t, condition)) < 1e-5
        assert far(model(x, t, condition), plain) > 1e-4


def test_half_precision_stays_near_fp32() -> None:
    for config in (FLAG, NEXT):
        model, x, t = randomised(config), noise(2, 4, 8, 8), torch.tensor([0.3, 0.6])
        with torch.no_grad():
            full = model(x, t, told(config, 2))
            half = model.bfloat16()(x, t, told(config, 2))
        assert half.dtype == torch.float32
        assert far(half, full) < 0.06 * full.abs().max()


def test_tuning_hangs_on_the_same_slots() -> None:
    model, x, t, condition = randomised(NEXT), noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(NEXT, 2)
    with torch.no_grad():
        plain = model(x, t, condition)
        attach(model, (LoraSpec(rank=2, targets=("wq", "wk_y", "wv_y", "w2")),))
        assert torch.equal(model(x, t, condition), plain)
        added = trainable_state(model)
        assert len(added) == 2 * 2 * 4
        for p in model.parameters():
            p.data.add_(0.3 * p.requires_grad)
    tuned = model(x, t, condition)
    assert far(tuned, plain) > 1e-3
    tuned.square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert far(accelerate(model)(x, t, condition), tuned) < 2e-5


@pytest.mark.parametrize("kind", ["flag", "next", "moe_space", "moe_time"])
def test_autocast_computes_all_of_it(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    x, t, condition = [noise(4, 4, 4), noise(4, 6, 4)], torch.tensor([0.3, 0.6]), told(config, 2)
    steering = Steering(gate_threshold=0.2 if config.text_dim else 0.0)
    with torch.no_grad():
        full = model(x, t, condition, steering=steering)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, t, condition, steering=steering)
    for a, b in zip(full, mixed):
        assert b.dtype == torch.float32
        assert 0 < far(a, b) < 0.1 * a.abs().max()


def test_wrong_calls_are_refused() -> None:
    model, labelled = randomised(FLAG), randomised(LABEL)
    x, t, condition = noise(2, 4, 4, 4), torch.tensor([0.3, 0.6]), told(FLAG, 2)
    with pytest.raises(ValueError, match=r"times must be of shape \(2,\)"):
        model(x, t[:1], condition)
    with pytest.raises(ValueError, match="2 pictures with the conditions of 1"):
        model(x, t, condition[[0]])
    with pytest.raises(ValueError, match="the condition has no seq"):
        model(x, t, Condition(labels=torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ValueError, match="text of width 7"):
        model(x, t, Condition(seq=torch.zeros(2, 3, 7), mask=torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="pooled text of width 3"):
        model(x, t, replace(condition, pooled=torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="the condition has no labels"):
        labelled(x, t, condition)
    with pytest.raises(ValueError, match=r"label 6 is outside 0..4 \(5 is the null class\)"):
        labelled(x, t, Condition(labels=torch.tensor([5, 6])))
    with pytest.raises(ValueError, match="latents of 3 channels; this model has 4"):
        model(noise(2, 3, 4, 4), t, condition)
    with pytest.raises(ValueError, match=r"latents of \(4, 5\) cannot be cut into patches"):
        model(noise(2, 4, 4, 5), t, condition)
    with pytest.raises(ValueError, match="this model reads no text"):
        labelled(x, t, Condition(labels=torch.tensor([0, 1])), steering=Steering(gate_threshold=0.1))


def test_wrong_configurations_are_refused() -> None:
    for words, changes in {
        "heads of width 12 cannot be rotated by 3": {"dim": 40, "n_heads": 4, "rope_axes": 3},
        "not a multiple of n_heads": {"dim": 50},
        "not a multiple of n_kv_heads": {"n_kv_heads": 3},
        "keep_sigma asks": {"learn_sigma": False, "keep_sigma": True},
        "contradict": {"skip_sigma": True, "keep_sigma": True},
        "fixed_length needs pad_token": {"fixed_length": 9, "pad_token": False},
        "experts come with norms 'post'": {"experts": KINDS["moe_time"].experts},
    }.items():
        with pytest.raises(ValueError, match=words.replace("width 12", "width 10")):
            replace(FLAG, **changes)  # type: ignore[arg-type]


def test_video_and_audio_are_sequences_too() -> None:
    model = randomised(KINDS["video"])
    t, condition = torch.tensor([0.3, 0.6]), told(FLAG, 2)
    clip, sound = noise(2, 4, 3, 4, 6), noise(2, 4, 1, 2, 14)
    with torch.no_grad():
        out = model(clip, t, condition)
        assert out.shape == clip.shape
        # 3 frames of 2 rows of 3 patches and a [nextline], and a [nextframe] behind each.
        assert model.tokens(clip)[1].length == 3 * (2 * 4 + 1)
        mixed = model([clip[0], sound[1]], t, condition)
        assert far(mixed[0], out[0]) < 1e-5
        swapped = model(clip.flip(2), t, condition).flip(2)
        assert far(swapped, out) > 1e-3  # frames know their order
    audio = randomised(replace(FLAG, patch=(1, 1, 2), eol_token=False, learn_sigma=False, time_steps=1000))
    wave = noise(2, 4, 10)
    with torch.no_grad():
        out = audio(wave, t, condition)
        assert out.shape == wave.shape
        assert torch.equal(audio(wave, t + 4e-4, condition), out)  # the same step of 1000
        assert far(audio(wave, t + 2e-3, condition), out) > 1e-4
    with pytest.raises(ValueError, match="cannot tell frames apart"):
        randomised(NEXT)(clip, t, condition)
