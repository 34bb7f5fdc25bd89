"""Groups of rows that train parameters of their own: what changes, what rests, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from accessory import config as configuration
from accessory.data.collate import collate
from accessory.models.build import Model
from accessory.peft.attach import BiasSpec, NormSpec, PrefixSpec, TrainSpec
from accessory.schema import Batch, Picture, Sample, Turn
from accessory.train.config import TrainConfig
from accessory.train.disjoint import DisjointObjective, RowGroup, frozen, select
from accessory.train.loop import train
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.train.run import RunConfig, run
from tests.tiny import disturb, tiny_model
from tests.unit.train.squares import write_squares

GROUPS = (
    RowGroup("align", ("captions*",), ("projector.*",)),
    RowGroup("instruct", ("text*",), ("backbone.*",)),
)


def adapted(folder: Path) -> Model:
    """Prefixes, biases and norms for instructions, a projector for captions, as LLaMA-Adapter V2 divides them."""
    tuning = (PrefixSpec(length=3), BiasSpec(), NormSpec(), TrainSpec(("projector.*",)))
    made = tiny_model(folder, train=True, tuning=tuning)
    disturb(made.net, 0.05)  # gates away from zero, so that everything behind them can learn
    return made


def rows(model: Model) -> tuple[Batch, Batch]:
    """A batch of captions and one of instructions, each of two rows."""
    encode = model.encoder.encode
    shown = [Picture(Image.new("RGB", (64, 64), c)) for c in ("red", "blue")]
    captions = [
        encode(Sample((Turn("user", (p, "What is this?")), Turn("assistant", ("a hat",))), "captions/train"))
        for p in shown
    ]
    talk = [
        encode(Sample((Turn("user", (q,)), Turn("assistant", (a,))), "text"))
        for q, a in (("What is red?", "A hat is."), ("And blue?", "The bird is blue."))
    ]
    return collate(captions, model.encoder.pad_id), collate(talk, model.encoder.pad_id)


class Watched:
    """Batches in order, and the parameters as they are before each and after the last."""

    def __init__(self, net: torch.nn.Module, batches: list[Batch]) -> None:
        self.net, self.batches, self.seen = net, batches, list[dict[str, Tensor]]()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.look()
            yield batch

    def look(self) -> None:
        self.seen.append({n: p.detach().clone() for n, p in self.net.named_parameters()})

    def changed(self) -> list[set[str]]:
        """What each update changed."""
        self.look()
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [{n for n, p in after.items() if not torch.equal(p, before[n])} for before, after in pairs]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def updates(folder: Path, disjoint: bool, order: str) -> tuple[list[set[str]], set[str]]:
    """What updates of captions (c), texts (t) and both (b) change, and all that trains."""
    model = adapted(folder)
    captions, texts = rows(model)
    both = collate([*_encoded(captions), *_encoded(texts)], model.encoder.pad_id)
    source = Watched(model.net, [{"c": captions, "t": texts, "b": both}[kind] for kind in order])
    inner = DialogueObjective(ObjectiveConfig(), model.tokenizer)
    objective = DisjointObjective(inner, GROUPS, model.net) if disjoint else inner
    config = TrainConfig(
        output_dir=str(folder / "run"), max_steps=len(order), lr=1e-2, min_lr=1e-2, batch_size=2, weight_decay=0.1,
        precision="fp32", tensorboard=False,
    )  # fmt: skip
    trained = {n for n, p in model.net.named_parameters() if p.requires_grad}
    train(model.net, source, objective, config)
    return source.changed(), trained


def _encoded(batch: Batch) -> list[Any]:
    from accessory.schema import Encoded

    share = len(batch.tiles) // len(batch.ids)
    return [
        Encoded(i[m], n[m], batch.tiles[k * share : (k + 1) * share], batch.sources[k])
        for k, (i, n, m) in enumerate(zip(batch.ids, batch.labels, batch.mask, strict=True))
    ]


def test_each_kind_of_row_changes_its_own_group_alone(tmp_path: Path) -> None:
    changed, trained = updates(tmp_path / "d", True, "ctcb")
    align = {n for n in trained if n.startswith("projector.")}
    instruct = trained - align
    assert {n.rsplit(".", 1)[-1] for n in instruct} >= {"gate", "bias", "weight"}
    assert changed[0]
    assert changed[0] <= align
    assert len(changed[1]) > 10
    assert changed[1] <= instruct
    assert changed[2] <= align, "moments and weight decay of the others rest too"
    assert changed[2] == changed[0]
    assert changed[3] & align
    assert changed[3] & instruct


def test_and_without_groups_every_row_changes_everything(tmp_path: Path) -> None:
    changed, trained = updates(tmp_path / "j", False, "ct")
    for found in changed:
        assert any(n.startswith("projector.") for n in found)
        assert any(n.startswith("backbone.") for n in found)
        assert found <= trained


def test_a_mixed_batch_is_the_sum_of_its_groups(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    captions, texts = rows(model)
    both = collate([_encoded(texts)[0], *_encoded(captions), _encoded(texts)[1]], model.encoder.pad_id)
    objective = DisjointObjective(DialogueObjective(ObjectiveConfig(), model.tokenizer), GROUPS, model.net)
    named = {n: p for n, p in model.net.named_parameters() if p.requires_grad}

    def gradients(batch: Batch) -> tuple[float, float, dict[str, Tensor]]:
        model.net.zero_grad()
        loss, count, metrics = objective(model.net, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(metrics["language"]) == pytest.approx(float(loss.detach()))
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
        return float(loss.detach()), float(count), found

    whole, first, second = gradients(both), gradients(captions), gradients(texts)
    assert whole[0] == pytest.approx(first[0] + second[0], rel=1e-5)
    assert whole[1] == first[1] + second[1]
    for name, gradient in whole[2].items():
        torch.testing.assert_close(gradient, first[2][name] + second[2][name], rtol=1e-4, atol=1e-6)
        assert not (first[2][name].any() and second[2][name].any()), name
    assert all(p.requires_grad for p in named.values())
    # And it matters: the plain objective lets captions pull at the backbone.
    model.net.zero_grad()
    DialogueObjective(ObjectiveConfig(), model.tokenizer)(model.net, captions)[0].backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None and bool(p.grad.any()) for n, p in named.items() if n.startswith("backbone."))


def test_rows_keep_their_own_tiles(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    captions, texts = rows(model)
    both = collate([_encoded(texts)[0], *_encoded(captions)], model.encoder.pad_id)
    part = select(both, [2, 0])
    assert torch.equal(part.tiles, captions.tiles[1:])
    assert part.sources == ("captions/train", "text")
    assert torch.equal(part.ids[0], both.ids[2])
    assert len(select(both, [0]).tiles) == 0
    assert select(both, [0, 1, 2]) is both


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    inner = DialogueObjective(ObjectiveConfig(), model.tokenizer)
    align, instruct = GROUPS
    for groups, words in (
        ((align,), r"is in 0 groups"),
        ((align, RowGroup("all", ("text",), ("*",))), r"projector\..* is in 2 groups"),
        ((*GROUPS, RowGroup("none", ("x",), ("projetcor.*",))), "'none' matches no trainable parameter"),
        ((align, RowGroup("align", ("x",), ("backbone.*",))), "share a name"),
    ):
        with pytest.raises(ValueError, match=words):
            DisjointObjective(inner, groups, model.net)
    other = RowGroup("instruct", ("chat",), instruct.parameters)
    with pytest.raises(ValueError, match="no group takes rows of source 'text'"):
        DisjointObjective(inner, (align, other), model.net)(model.net, rows(model)[1])
    trained = [p for p in model.net.parameters() if p.requires_grad]
    with frozen(model.net, frozenset()):
        assert not any(p.requires_grad for p in trained)
    assert all(p.requires_grad for p in trained)


def test_an_experiment_file_names_groups(tmp_path: Path) -> None:
    path = write_squares(tmp_path, 1)
    groups = (
        "objective.disjoint=[{name: align, sources: ['*'], parameters: ['projector.*', 'tower.*']}, "
        "{name: instruct, sources: [nothing], parameters: ['backbone.*']}]"
    )
    config = configuration.load(path, RunConfig, [groups])
    assert config.objective.disjoint[0] == RowGroup("align", ("*",), ("projector.*", "tower.*"))
    result = run(config, folder=tmp_path)
    assert result is not None
    assert result.row["rows/align"] > 0
    assert result.row["rows/instruct"] == 0
    with pytest.raises(ValueError, match="leave one of them out"):
        run(configuration.load(path, RunConfig, [groups, "train.block_checkpointing=true"]), folder=tmp_path)
