"""Moments of a byte each: codes that are kept to the bit, right on average, and a loss that falls as AdamW's does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accessory.train import adamw8bit, checkpoint
from accessory.train.adamw8bit import BLOCK, MOMENTS, SMALL, AdamW8bit, Codes
from accessory.train.config import TrainConfig
from accessory.train.optim import Optimizer
from tests.distributed.spread import Mixed, column, config, made, trained

SETTINGS = TrainConfig(output_dir="unused", max_steps=50, lr=0.003, weight_decay=0.1, optimizer="adamw8bit")


def values(kind: str, count: int = 5 * BLOCK + 7) -> Tensor:
    """Moments of many sizes, some of them zero."""
    g = torch.Generator().manual_seed(3)
    found = torch.randn(count, generator=g) * 10.0 ** torch.randint(-6, 1, (count,), generator=g)
    found[::17] = 0
    return found if kind == "exp_avg" else found.square()


@pytest.mark.parametrize("kind", MOMENTS)
def test_codes_are_kept_to_the_bit(kind: str) -> None:
    given = values(kind).view(3, -1)
    made_of = Codes.of(given, kind)
    again = Codes.of(made_of.value(given.shape), kind)
    assert torch.equal(again.codes, made_of.codes)
    assert torch.equal(again.scales, made_of.scales)
    assert torch.equal(again.value(given.shape), made_of.value(given.shape))
    assert torch.equal(made_of.value(given.shape) == 0, (made_of.codes == 0).view(given.shape))
    if kind == "exp_avg_sq":
        assert torch.equal(made_of.codes == 0, given.view(-1) == 0)  # what is divided by does not vanish
    blocks = torch.nn.functional.pad(given.view(-1), (0, -given.numel() % BLOCK)).view(-1, BLOCK)
    off = (made_of.value(given.shape).view(-1) - given.view(-1)).abs()
    largest = blocks.abs().amax(1).repeat_interleave(BLOCK)[: given.numel()]
    power, top = MOMENTS[kind]
    assert float((off / largest).max()) <= power / top  # at most a level at the top, where levels are widest


def test_chance_is_right_on_average_and_the_nearest_level_is_not() -> None:
    start = torch.full((16, BLOCK), 0.5)
    start[:, 0] = 1.0

    def after(noise: torch.Generator | None) -> Tensor:
        kept = Codes.of(start, "exp_avg_sq")
        for _ in range(300):
            kept = Codes.of(kept.value(start.shape) * torch.where(start == 1, 1.0, 0.999), "exp_avg_sq", noise)
        return kept.value(start.shape)[:, 1:].mean()

    wanted = 0.5 * 0.999**300
    assert float(after(torch.Generator().manual_seed(1))) == pytest.approx(wanted, rel=0.01)
    assert float(after(None)) > 1.3 * wanted  # no step is half way to the next level: it never moves


class Deep(nn.Module):
    """Two wide layers and a narrow one, whose moments stay in fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 4))

    def loss(self, step: int) -> Tensor:
        """Of a task that can be learned."""
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step % 5))
        return (self.net(x) - x[:, :4].sin()).square().mean()


def stepped(model: Deep, optimizer: Optimizer, steps: range) -> list[float]:
    found = []
    for step in steps:
        loss = model.loss(step)
        loss.backward()
        optimizer.collect()
        optimizer.step(optimizer.config.lr)
        found.append(loss.item())
    return found


def test_the_loss_falls_as_that_of_adamw_in_a_quarter_of_the_memory() -> None:
    curves, optimizers = {}, {}
    for kind in ("adamw", "adamw8bit"):
        model = Deep()
        optimizers[kind] = Optimizer(model, replace(SETTINGS, optimizer=kind))  # type: ignore[arg-type]
        curves[kind] = stepped(model, optimizers[kind], range(50))
    (full, few) = curves["adamw"], curves["adamw8bit"]
    assert full[-1] < 0.5 * full[0]
    assert max(abs(a - b) for a, b in zip(full, few, strict=True)) < 0.02 * full[0]
    assert full[1:] != few[1:]
    stepper = optimizers["adamw8bit"].steppers[0]
    assert isinstance(stepper, AdamW8bit)
    big = [p for p in optimizers["adamw8bit"].masters.values() if p.numel() >= SMALL]
    rest = sum(p.numel() for p in optimizers["adamw8bit"].masters.values()) - sum(p.numel() for p in big)
    assert stepper.nbytes() == sum(2 * p.numel() + 2 * 4 * -(-p.numel() // BLOCK) for p in big) + 8 * rest
    entries = sum(p.numel() for p in optimizers["adamw"].masters.values())
    both = [t for n, t in optimizers["adamw"].state().items() if not n.startswith("step/")]
    assert sum(t.nbytes for t in both) == 8 * entries
    assert stepper.nbytes() < 2.3 * entries


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, steps: int) -> list[dict[str, float]]:
        settings = config(tmp_path / name, steps, None, optimizer="adamw8bit", min_lr=0.01, checkpoint_every=3)
        return trained(made(tmp_path), Mixed(None), settings, resume="auto")

    straight = run("straight", 6)
    run("broken", 3)
    assert [{k: v for k, v in r.items() if "loss" in k or "norm" in k} for r in run("broken", 6)] == [
        {k: v for k, v in r.items() if "loss" in k or "norm" in k} for r in straight
    ]
    one, other = (checkpoint.load(checkpoint.folder(tmp_path / n, 6)).tensors() for n in ("straight", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    plain = trained(made(tmp_path), Mixed(None), config(tmp_path / "plain", 6, None, min_lr=0.01))
    assert not torch.equal(column(plain, "loss")[2:], column(straight, "loss")[2:])  # it is another optimizer
    assert float(((column(plain, "loss") - column(straight, "loss")) / column(plain, "loss")).abs().max()) < 0.01


def test_moments_of_adamw_are_taken_over() -> None:
    model = Deep()
    full = Optimizer(model, replace(SETTINGS, optimizer="adamw"))
    stepped(model, full, range(5))
    few = Optimizer(model, SETTINGS)
    few.load_state(full.state())
    for name, value in full.state().items():
        kept = few.state()[name]
        assert torch.allclose(kept, value, atol=float(0.02 * value.abs().max())), name
    chance = torch.Generator().manual_seed(1)
    assert adamw8bit.Codes.of(values("exp_avg"), "exp_avg", chance).nbytes < 1.03 * values("exp_avg").numel()
