"""Decay rules, groups, schedule, clipping and fp32 masters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from accessory.train.config import GroupConfig, TrainConfig
from accessory.train.optim import Optimizer, decays, hidden_matrix, learning_rate
from tests.toy import toy_batch, toy_model, toy_objective

CONFIG = TrainConfig(output_dir="unused", max_steps=10, lr=0.1, weight_decay=0.5)


def test_what_decays() -> None:
    flat, square = torch.zeros(3), torch.zeros(3, 3)
    for name in ("layers.0.attention.wq.weight", "layers.0.attention.wq.delta.a", "tok_embeddings.weight"):
        assert decays(name, square), name
    never = (
        "layers.0.attention_norm.weight", "norm.weight", "x.norm1.weight", "a.wq.bias", "a.prefix.tokens", "a.gate",
        "splice.image_start", "start_img", "splice.skip", "bridge.queries", "wq.scale",
    )  # fmt: skip
    for name in never:
        assert not decays(name, square), name
    assert not decays("anything.weight", flat)


def test_groups_by_pattern_first_match_wins() -> None:
    groups = (GroupConfig("projector.*", 10.0), GroupConfig("*.bias", 7.0), GroupConfig("embed.*", 0.5, 0.0))
    optimizer = Optimizer(toy_model(), replace(CONFIG, groups=groups))
    assert optimizer.groups == {
        ("embed.*", 0.5, 0.0): ["embed.weight"],
        ("projector.*", 10.0, 0.5): ["projector.weight"],
        ("projector.*", 10.0, 0.0): ["projector.bias"],
        ("*.bias", 7.0, 0.0): ["norm.bias", "output.bias"],
        ("main", 1.0, 0.0): ["norm.weight"],
        ("main", 1.0, 0.5): ["output.weight"],
    }


def test_a_pattern_without_a_match_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"'projektor\.\*' matches no trainable parameter; close names are projector"):
        Optimizer(toy_model(), replace(CONFIG, groups=(GroupConfig("projektor.*"),)))
    hidden = (GroupConfig("projector.*"), GroupConfig("p*.bias", 7.0))
    with pytest.raises(
        ValueError, match=r"'p\*\.bias' matches nothing that an earlier group left \(1 param.*projector"
    ):
        Optimizer(toy_model(), replace(CONFIG, groups=hidden))
    assert len(Optimizer(toy_model(), replace(CONFIG, groups=hidden[::-1])).groups) == 4
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer(toy_model().requires_grad_(False), CONFIG)


def test_schedule_by_steps() -> None:
    c = replace(CONFIG, warmup_steps=4, max_steps=104, min_lr=0.01)
    assert [learning_rate(c, s, 0) for s in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert learning_rate(c, 4, 0) == pytest.approx(0.1)
    assert learning_rate(c, 54, 0) == pytest.approx(0.055)
    assert learning_rate(c, 104, 0) == pytest.approx(0.01)
    assert learning_rate(c, 54, 1e9) == pytest.approx(0.055)  # the clock does not matter


def test_schedule_by_time_ends_cold_whatever_the_speed() -> None:
    c = replace(CONFIG, max_steps=1000, max_seconds=100.0, schedule_by="time")
    assert learning_rate(c, 3, 50.0) == pytest.approx(0.05)
    assert learning_rate(c, 3, 100.0) == pytest.approx(0.0)
    assert learning_rate(c, 750, 10.0) < 0.05  # steps run out first


def test_clipping_reports_the_norm_before() -> None:
    model = toy_model()
    groups = (GroupConfig("projector.*"),)
    for limit in (None, 0.05, 1e6):
        optimizer = Optimizer(model, replace(CONFIG, clip_norm=limit, groups=groups))
        toy_objective(model, toy_batch(range(4)))[0].backward()
        optimizer.collect()
        before = torch.cat([g.flatten() for g in optimizer.gradients()])
        total, parts = optimizer.clip()
        after = torch.cat([g.flatten() for g in optimizer.gradients()])
        assert torch.allclose(total, before.norm())
        assert parts.keys() == {"main", "projector.*"}
        assert torch.allclose(sum(p**2 for p in parts.values()) ** 0.5, total)
        if limit == 0.05:
            assert torch.allclose(after, before * limit / before.norm(), atol=1e-6)
        else:
            assert torch.equal(after, before)
        optimizer.steppers[0].zero_grad()


def test_matches_torch_adamw() -> None:
    model, other = toy_model(), toy_model()
    optimizer = Optimizer(model, CONFIG)
    decay = [p for n, p in other.named_parameters() if n in ("embed.weight", "projector.weight", "output.weight")]
    rest = [p for n, p in other.named_parameters() if "norm" in n or "bias" in n]
    reference = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.5}, {"params": [p for p in rest if p.requires_grad], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(3):
        for net in (model, other):
            toy_objective(net, toy_batch(range(step, step + 4)))[0].backward()
        optimizer.collect()
        optimizer.step(0.01 * (step + 1))
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.step()
        reference.zero_grad()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
        assert torch.equal(a, start[name]) == (not a.requires_grad)


def test_low_precision_parameters_have_fp32_masters() -> None:
    model = nn.Linear(4, 4).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = Optimizer(model, replace(CONFIG, weight_decay=0.0))
    for _ in range(20):  # a step of 1e-4 is below bf16's resolution at 1, twenty are not
        model(torch.ones(1, 4).bfloat16()).sum().backward()
        optimizer.collect()
        optimizer.step(1e-3)
    assert model.weight.dtype == torch.bfloat16
    assert torch.allclose(optimizer.masters["weight"], torch.full((4, 4), 0.98), atol=1e-4)
    assert torch.equal(model.weight, optimizer.masters["weight"].bfloat16())
    naive = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(20):
        naive -= 1e-3
    assert naive.item() == 1.0  # and it matters: without masters nothing would have moved


def test_state_survives_and_is_checked() -> None:
    model = toy_model()
    optimizer = Optimizer(model, CONFIG)
    toy_objective(model, toy_batch(range(4)))[0].backward()
    optimizer.collect()
    optimizer.step(0.1)
    state = {k: v.clone() for k, v in optimizer.state().items()}
    assert len(state) == 3 * len(optimizer.masters)
    fresh = Optimizer(toy_model(), CONFIG)
    fresh.load_state(state)
    assert all(torch.equal(fresh.state()[k], v) for k, v in state.items())
    del state["exp_avg/embed.weight"], state["exp_avg_sq/embed.weight"], state["step/embed.weight"]
    with pytest.raises(ValueError, match=r"1 names missing \['embed.weight'\]"):
        fresh.load_state(state)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])


def test_moments_lie_in_memory_as_their_parameters_do() -> None:
    """Convolutions with their channels last: a resumed update is that of a run which was never cut, bit for bit."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    def update(net: nn.Module, optimizer: Optimizer, step: int) -> None:
        g = torch.Generator().manual_seed(step)
        net(torch.randn(2, 3, 5, 5, generator=g)).square().sum().backward()
        optimizer.collect()
        optimizer.step(0.1)

    net = made()
    optimizer = Optimizer(net, CONFIG)
    update(net, optimizer, 0)
    other = made()
    other.load_state_dict(net.state_dict())
    resumed = Optimizer(other, CONFIG)
    resumed.load_state({k: v.clone(memory_format=torch.contiguous_format) for k, v in optimizer.state().items()})
    for step in (1, 2):
        update(net, optimizer, step)
        update(other, resumed, step)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    moment = resumed.state()["exp_avg/weight"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    assert not moment.is_contiguous()


def test_muon_takes_the_matrices_inside_blocks() -> None:
    torch.manual_seed(0)
    model = _Blocks()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def stepped(config: TrainConfig) -> dict[str, torch.Tensor]:
        model.load_state_dict(start)
        optimizer = Optimizer(model, config)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step(0.1)
        found = optimizer.state()
        again = Optimizer(model, config)
        again.load_state(found)
        assert {k: v.tolist() for k, v in again.state().items()} == {k: v.tolist() for k, v in found.items()}
        return {n: p.detach() - start[n] for n, p in model.named_parameters()}

    plain = replace(CONFIG, weight_decay=0.0)
    adamw, muon = stepped(plain), stepped(replace(plain, optimizer="muon"))
    for name, parameter in model.named_parameters():
        assert hidden_matrix(name, parameter) == (name in ("layers.0.weight", "layers.1.weight"))
        assert torch.equal(adamw[name], muon[name]) != hidden_matrix(name, parameter), name
    # An update of Muon is nearly orthogonal: all its singular values but the very small are of one size.
    assert _flatness(muon["layers.0.weight"]) > 0.5 > _flatness(adamw["layers.0.weight"])


def _flatness(update: torch.Tensor) -> float:
    sizes = torch.linalg.svdvals(update)
    return float(sizes[-2] / sizes[0])


def test_muon_without_a_block_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no trained parameter is a matrix inside a block"):
        Optimizer(toy_model(), replace(CONFIG, optimizer="muon"))
