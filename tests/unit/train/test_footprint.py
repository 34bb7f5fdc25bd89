"""What a run keeps in memory, traced over shapes, is what a real pass keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accessory.models.build import ProjectorConfig
from accessory.peft.attach import LoraSpec, TrainSpec
from accessory.train.adamw8bit import AdamW8bit
from accessory.train.config import EmaConfig, TrainConfig
from accessory.train.footprint import Shape, activations, kept, memory, standing
from accessory.train.optim import Optimizer
from tests.tiny import tiny_model

SHAPE = Shape(rows=3, positions=40, learned=17, tiles=4)
CPU = torch.device("cpu")
TRAIN = TrainConfig(output_dir="x", max_steps=1, lr=0.1)


def test_traced_is_kept(tmp_path: Path) -> None:
    kinds = {
        "all": tiny_model(tmp_path, train=True),
        "lora": tiny_model(tmp_path, train=True, tuning=(LoraSpec(rank=4),)),
        "words": tiny_model(
            tmp_path, train=True, projector=ProjectorConfig(words=7), tuning=(TrainSpec(("projector.*",)),)
        ),
    }
    found = {}
    for name, model in kinds.items():
        found[name] = activations(model.net, SHAPE, TRAIN, CPU)
        assert found[name] == kept(model.net, SHAPE, ()), name
    assert min(found.values()) > 0
    assert found["lora"] < found["all"]  # a frozen tower keeps nothing


def test_it_follows_what_the_run_does(tmp_path: Path) -> None:
    net = tiny_model(tmp_path, train=True).net
    whole = activations(net, SHAPE, TRAIN, CPU)
    assert activations(net, replace(SHAPE, rows=6, tiles=8, learned=34), TRAIN, CPU) > 1.8 * whole
    assert activations(net, SHAPE, replace(TRAIN, block_checkpointing=True), CPU) < whole
    assert activations(net, SHAPE, replace(TRAIN, cpu_autocast=True), CPU) < whole
    assert activations(net, SHAPE, TRAIN, CPU, language=False) < 0.7 * whole
    assert net.backbone.logits(net(torch.zeros(1, 3, dtype=torch.long))).isfinite().all()  # and it still computes


def test_the_optimizer_by_its_own_count(tmp_path: Path) -> None:
    net = tiny_model(tmp_path, train=True, tuning=(LoraSpec(rank=4),)).net.bfloat16()
    made = standing(net, replace(TRAIN, ema=EmaConfig()))
    optimizer = Optimizer(net, TRAIN)
    for p in net.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.collect()
    gradients = sum(g.nbytes for g in optimizer.gradients())
    optimizer.step(0.1)
    moments = sum(v.nbytes for k, v in optimizer.state().items() if not k.startswith("step/"))
    masters = sum(m.nbytes for m in optimizer.masters.values())
    assert (made.gradients, made.optimizer) == (gradients, moments + 2 * masters)  # the average is as large as these
    assert made.weights == sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    assert made.certain == made.total == made.weights + made.gradients + made.optimizer
    assert memory(CPU) > 10**8


def test_moments_of_a_byte_are_counted_as_they_are_held() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(512, 300), torch.nn.Linear(300, 7))
    few = replace(TRAIN, optimizer="adamw8bit")
    optimizer = Optimizer(net, few)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.1)
    [stepper] = [s for s in optimizer.steppers if isinstance(s, AdamW8bit)]
    assert standing(net, few).optimizer == pytest.approx(stepper.nbytes(), rel=0.002)
    assert standing(net, replace(few, optimizer="adamw")).optimizer > 3.5 * stepper.nbytes()
