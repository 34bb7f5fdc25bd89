"""Samples that share a row without padding train what padded ones do, and none reaches another."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.backbone.llama import Llama
from accessory.data.collate import collate
from accessory.data.encode import DreamLayout
from accessory.models.build import Model, ProjectorConfig, ResamplerConfig
from accessory.models.dream_loss import DreamLossConfig
from accessory.models.dream_spans import NullPolicy
from accessory.models.generator import Generator
from accessory.nn.moe import MoEConfig
from accessory.peft.attach import LoraSpec, PrefixSpec, TrainSpec
from accessory.schema import Batch, Picture, Sample, Turn
from accessory.tokens import IMAGE, SKIP
from accessory.train.config import TrainConfig
from accessory.train.generation import DiffusionConfig, GenerationConfig, JointObjective
from accessory.train.language import layout, next_token_losses
from accessory.train.loop import train
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from tests.tiny import disturb
from tests.tiny_generator import SIZE, draw_model, shake, write_captions
from tests.unit.models.pictured import batch, mixed, model, picture, sample
from tests.unit.train.test_generation import Documents

PROJECTOR = TrainSpec(("projector.*", "tower.*"))
SETUPS: dict[str, dict[str, Any]] = {
    "full": {"projector": ProjectorConfig("linear_norm", start_end=True, words=5)},
    "lora": {"tuning": (LoraSpec(rank=3), PROJECTOR)},
    "prefix": {"tuning": (PrefixSpec(length=3), PROJECTOR)},
    "visual prefix": {
        "tuning": (PrefixSpec(length=3), TrainSpec(("resampler.*", "tower.*"))),
        "projector": None,
        "resampler": ResamplerConfig(length=3, width=16, depth=1, heads=2, max_tiles=8),
    },
    "experts": {},
}


def made(folder: Path, name: str) -> Model:
    found = model(folder, train=True, **SETUPS[name])
    if name == "experts":
        torch.manual_seed(2)
        found.net.backbone = Llama(replace(found.net.backbone.config, moe=MoEConfig(4, 2, balance=0.5, z=0.1)))
    disturb(found.net, 0.05)
    return found


def samples() -> list[Sample]:
    """Of lengths 20 to 200, with up to six tiles, blank ones among them."""
    long = sample("How many birds are there in this? " * 4, picture(7, 96, 48), answer="a boat, a dog and two birds")
    return [*mixed(), long, sample("Where is the apple?", answer="left of the pear. " * 3)]


def graded(net: nn.Module, objective: Callable[..., Any], b: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients."""
    net.train()
    net.zero_grad()
    loss, count, _ = objective(net, b)
    (loss / count).backward()
    return (loss / count).detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Equal to a share of the largest gradient of each tensor, or of a millionth of the largest of all."""
    assert a.keys() == b.keys()
    floor = 1e-2 * max(float(g.abs().max()) for g in a.values())
    for name, g in a.items():
        assert float((g - b[name]).abs().max()) <= tolerance * max(float(g.abs().max()), floor), name


def joined(b: Batch) -> Batch:
    """The samples as one plain row: what packing would be without isolation."""
    one = {name: getattr(b, name)[b.mask][None] for name in ("ids", "labels", "mask")}
    return replace(b, **one, counts=torch.tensor([len(b.tiles)]))


@pytest.mark.parametrize("name", SETUPS)
def test_packed_is_padded(tmp_path: Path, name: str) -> None:
    """Loss to 1e-5, every gradient to 1e-4 of its largest element."""
    own = made(tmp_path, name)
    padded = batch(own, samples())
    assert bool((padded.ids == SKIP).any()) == (own.net.projector is not None)  # else pictures take no position
    objective = DialogueObjective(ObjectiveConfig(), own.tokenizer)
    (loss, grads), (packed, found) = (graded(own.net, objective, replace(padded, packed=p)) for p in (False, True))
    torch.testing.assert_close(packed, loss, rtol=1e-5, atol=0)
    same(grads, found, 1e-4)
    assert len(grads) > 5
    leaking, _ = graded(own.net, objective, joined(padded))
    assert abs(float(leaking - loss)) > 2e-4 * float(loss)


def test_packed_updates_are_padded_ones(tmp_path: Path) -> None:
    """Twenty of them: losses to 1e-4, weights to 1e-3 of the way that they went."""
    for name in ("full", "lora", "prefix", "visual prefix"):
        ends: dict[str, dict[str, Tensor]] = {}
        losses: dict[str, float] = {}
        for kind in ("padded", "packed", "leaking"):
            own = made(tmp_path, name)
            start = {n: p.detach().clone() for n, p in own.net.named_parameters() if p.requires_grad}
            whole = batch(own, samples())
            given = joined(whole) if kind == "leaking" else replace(whole, packed=kind == "packed")
            config = TrainConfig(
                output_dir=str(tmp_path / name / kind), max_steps=20, lr=2e-3, min_lr=2e-3, eps=1e-5,
                precision="fp32", tensorboard=False,
            )  # fmt: skip
            objective = DialogueObjective(ObjectiveConfig(), own.tokenizer)
            losses[kind] = train(own.net, Documents([given]), objective, config).row["loss"]
            ends[kind] = {n: p.detach() - start[n] for n, p in own.net.named_parameters() if p.requires_grad}
        assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4), name

        def apart(kind: str, ends: dict[str, dict[str, Tensor]] = ends) -> float:
            moved = torch.cat([d.flatten() for d in ends["padded"].values()])
            return float((torch.cat([d.flatten() for d in ends[kind].values()]) - moved).norm() / moved.norm())

        assert apart("packed") < 1e-3, name
        assert apart("leaking") > 5e-2, name


def test_no_sample_reaches_another(tmp_path: Path) -> None:
    """Another first sample of the same size, words and picture: not a bit of the others' losses changes."""
    own = made(tmp_path, "prefix")
    first, *others = samples()[1:]
    other = sample(picture(99), "Where is this?", answer="a new cat")
    batches = [batch(own, [s, *others]) for s in (first, other)]
    n = [int(b.mask[0].sum()) for b in batches]
    assert n[0] != n[1]  # even of another length
    after = [(b.labels[0, 1:] != -100).sum() for b in batches]

    def losses(b: Batch) -> Tensor:
        rows = layout(b)
        with torch.no_grad():
            h = own.net(b.ids, b.tiles, layout=rows)
            return next_token_losses(own.net.logits, h, b.labels, rows)

    whole, changed = (losses(replace(b, packed=True))[k:] for b, k in zip(batches, after, strict=True))
    torch.testing.assert_close(whole, changed, rtol=0, atol=1e-6)
    # Switched off, the first sample is the others' past.
    whole, changed = (losses(joined(b))[k:] for b, k in zip(batches, after, strict=True))
    assert float((whole - changed[-len(whole) :]).abs().max()) > 1e-2


def dialogues(bridge: Generator, folder: Path) -> Batch:
    """One that draws twice and talks on, a long one that sees and draws, one that only talks."""
    own = bridge.conditioner.model.encoder
    encoder = own.under(own.template, DreamLayout(3, SIZE))
    red, blue, green = (Picture(str(folder / f"{c}.png")) for c in ("red", "blue", "green"))
    twice = (
        Turn("user", ("Draw a red hat",)), Turn("assistant", (red, "There is a red hat.")),
        Turn("user", ("and a blue one",)), Turn("assistant", ("Here:", blue)),
    )  # fmt: skip
    seen = (Turn("user", (red, "What is this? " * 6)), Turn("assistant", ("A hat.", green, "And a green one.")))
    talk = (Turn("user", ("What is this?",)), Turn("assistant", ("This is a cat.",)))
    rows = [replace(encoder.encode(Sample(t)), draw=k) for k, t in enumerate((twice, seen, talk))]
    return collate(rows, encoder.pad_id)


@pytest.mark.parametrize(
    ("drop", "chunk"), [(NullPolicy(all=0.0), 4), (NullPolicy(text=0.3, image=0.3, all=0.3), None)]
)
def test_dreams_in_packs_are_those_of_padded_rows(tmp_path: Path, drop: NullPolicy, chunk: int | None) -> None:
    write_captions(tmp_path)
    parts = ("queries", "start*", "end", "mix.*", "connector.*", "heads.*")  # what drops a context trains no backbone
    names = ("conditioner.dream.*",) if chunk else tuple(f"conditioner.dream.{p}" for p in parts)
    bridge = draw_model(tmp_path, dream=True, tuning=(*names, "denoiser.*"))
    shake(bridge.denoiser)
    padded = dialogues(bridge, tmp_path)
    config = GenerationConfig(DiffusionConfig(drop=drop), DreamLossConfig(1.0, 2.0, trigger=3.0))
    (loss, grads), (packed, found) = (
        graded(bridge, JointObjective(config, 0, chunk=chunk if p else None), replace(padded, packed=p))
        for p in (False, True)
    )
    torch.testing.assert_close(packed, loss, rtol=1e-5, atol=0)
    same(grads, found, 2e-4)
    assert any(n.startswith("conditioner.dream.queries") for n in grads)
    # A plain row would draw every picture from all samples before it, too.
    leaking, _ = graded(bridge, JointObjective(config, 0), joined(padded))
    assert abs(float(leaking - loss)) > 5e-5 * float(loss)


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, Tensor) or t.untyped_storage()._cdata in self.known:
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.now += size
            self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
            weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("name", ["full", "lora"])
def test_scores_are_never_all_in_memory(tmp_path: Path, name: str) -> None:
    own = made(tmp_path, name)
    padded = batch(own, samples() * 2)
    learned = int((padded.labels[:, 1:] != -100).sum())
    whole = graded(own.net, DialogueObjective(ObjectiveConfig(), own.tokenizer), padded)
    for chunk in (1, 7, learned, learned + 1):
        objective = DialogueObjective(ObjectiveConfig(), own.tokenizer, chunk=chunk)
        for packed in (False, True):
            loss, grads = graded(own.net, objective, replace(padded, packed=packed))
            torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=0)
            same(whole[1], grads, 1e-4)


def test_the_peak_of_memory_is_bounded_by_the_chunk() -> None:
    """2,000 positions, 4,000 words: all scores are 32 MB, of which the plain loss holds three copies at its peak."""
    torch.manual_seed(0)
    positions, words, chunk = 2000, 4000, 100
    table, h = torch.randn(words, 16, requires_grad=True), torch.randn(1, positions + 1, 16, requires_grad=True)
    labels = torch.randint(0, words, (1, positions + 1))
    all_scores = 4 * positions * words
    found = {}
    for size in (None, chunk):
        with Live() as live:
            loss = next_token_losses(lambda x: x @ table.t(), h, labels, chunk=size).sum()
            grads = torch.autograd.grad(loss, (table, h))
        found[size] = (loss.detach(), grads, live)
    torch.testing.assert_close(found[chunk][0], found[None][0], rtol=1e-6, atol=0)
    for a, b in zip(found[chunk][1], found[None][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert found[None][2].largest == all_scores
    assert found[None][2].peak > 2 * all_scores
    assert found[chunk][2].largest == all_scores * chunk // positions
    assert found[chunk][2].peak < 0.25 * all_scores


def test_rows_of_a_pack_keep_what_belongs_to_them(tmp_path: Path) -> None:
    own = made(tmp_path, "full")
    b = replace(batch(own, samples()), packed=True)
    assert b.to("cpu").packed
    rows = layout(b)
    assert rows is not None
    assert rows.lengths == tuple(b.mask.sum(1).tolist())
    assert int((rows.flat(b.ids) == IMAGE).sum()) == int((b.ids == IMAGE).sum())
    assert layout(replace(b, packed=False)) is None
