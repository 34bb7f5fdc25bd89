"""The loss is the plain one, its sums add up, and the alignment finds its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import config as configuration
from accessory.backbone.llama import Llama
from accessory.data.emoji import Concept, concepts
from accessory.models.build import Model, ProjectorConfig
from accessory.nn.moe import MoEConfig, router_loss, routings
from accessory.schema import Sample
from accessory.tokens import IGNORE
from accessory.train import objective
from accessory.train.objective import AlignConfig, DialogueObjective, ObjectiveConfig, first_answer
from tests.tiny import disturb
from tests.unit.models.pictured import batch, mixed, model, picture, sample

NAMES = ("red cat", "green hat", "three birds", "moon")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four concepts instead of the emoji."""
    known = tuple(Concept(f"{i}", name, (), "", "") for i, name in enumerate(NAMES))
    monkeypatch.setattr(objective, "concepts", lambda cache: known)


@pytest.fixture
def made(tmp_path: Path) -> Model:
    built = model(tmp_path, train=True)
    disturb(built.net)
    return built


def aligned(made: Model, **options: object) -> DialogueObjective:
    config = ObjectiveConfig(**{"align": AlignConfig(source=None), **options})  # type: ignore[arg-type]
    found = DialogueObjective(config, made.tokenizer)
    found.prepare(made.net)
    return found


def rows() -> list[Sample]:
    return [
        sample("What is this?", answer="moon"),  # a name, but no picture to align it with
        sample(picture(1), "What is this?", answer="green hat"),
        sample(picture(2), picture(3, 96, 48), "What is this?", answer="a boat"),  # no name
        sample(picture(4, 96, 48), "What is this?", answer="three birds"),
    ]


def naive(made: Model, samples: list[Sample]) -> Tensor:
    """Every logit of every position, then the loss."""
    b = batch(made, samples)
    logits = made.net.logits(made.net(b.ids, b.tiles)).float()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), b.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def test_routers_of_experts_are_balanced_in_training(made: Model) -> None:
    experts = MoEConfig(4, 2, balance=0.5, z=0.1)
    made.net.backbone = Llama(replace(made.net.backbone.config, moe=experts))
    made.net.train()
    b = batch(made, mixed())
    total, count, metrics = DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, b)
    with routings(made.net) as log:
        made.net(b.ids, b.tiles)
    added = router_loss(experts, log, b.mask.flatten()) * count
    torch.testing.assert_close(total, naive(made, mixed()) + added, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(metrics["router"], added.detach())
    assert float(added.detach()) > 0.4 * int(count)
    gate = made.net.backbone.layers[0].get_parameter("feed_forward.gate.weight")
    assert bool(torch.autograd.grad(total, gate)[0].any())
    # padding has a router too, and is not counted
    assert not torch.allclose(router_loss(experts, log), router_loss(experts, log, b.mask.flatten()))
    half = DialogueObjective(ObjectiveConfig(balance=0.25), made.tokenizer)
    half.prepare(made.net)
    wanted = router_loss(replace(experts, balance=0.25), log, b.mask.flatten()) * count
    torch.testing.assert_close(half(made.net, b)[2]["router"], wanted.detach())
    assert float(wanted.detach()) < 0.7 * float(added.detach())
    made.net.eval()
    assert "router" not in DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, b)[2]


def test_a_balance_is_for_experts(made: Model) -> None:
    with pytest.raises(ValueError, match=r"objective.balance 0.1 is for a mixture of experts"):
        DialogueObjective(ObjectiveConfig(balance=0.1), made.tokenizer).prepare(made.net)
    with pytest.raises(ValueError, match=r"objective.balance -1.0 must not be negative"):
        ObjectiveConfig(balance=-1.0)


def test_the_loss_is_that_of_all_logits(made: Model) -> None:
    b = batch(made, mixed())
    total, count, metrics = DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, b)
    wanted = naive(made, mixed())
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    assert int(count) == int((b.labels[:, 1:] != IGNORE).sum()) > 10
    assert float(metrics["language"]) == float(total.detach())
    grads = [torch.autograd.grad(v, made.net.backbone.norm.weight)[0] for v in (total, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    other = replace(b, labels=b.labels.roll(1, 1))
    assert (
        abs(float(DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, other)[0].detach() - total.detach()))
        > 1
    )


@pytest.mark.usefixtures("named")
def test_sums_of_parts_are_the_sum_of_the_whole(made: Model) -> None:
    plain = DialogueObjective(ObjectiveConfig(), made.tokenizer)
    whole, count, _ = plain(made.net, batch(made, mixed()))
    parts = [plain(made.net, batch(made, [row])) for row in mixed()]
    torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-5, atol=1e-3)
    assert sum(int(p[1]) for p in parts) == int(count)


@pytest.mark.usefixtures("named")
def test_weights_multiply_the_parts(made: Model) -> None:
    found = aligned(made, language=0.5, align=AlignConfig(weight=3.0, source=None))
    total, count, metrics = found(made.net, batch(made, rows()))
    wanted = 0.5 * float(metrics["language"]) + 3 * float(metrics["align"])
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["align"]) > 0.1 * int(count)


@pytest.mark.usefixtures("named")
def test_the_first_picture_of_named_rows_is_aligned(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found, b = aligned(made, language=0.0), batch(made, rows())
    seen: list[Tensor] = []
    aligner = made.net.aligner
    assert aligner is not None
    monkeypatch.setattr(
        aligner, "forward", lambda f, t, w=None, real=aligner.forward: (seen.append(f), real(f, t, w))[1]
    )
    total, count, metrics = found(made.net, b)
    # tiles: row 1 has number 0; row 2 numbers 1 to 4; row 3 begins at 5
    torch.testing.assert_close(seen[0], made.net.encode(b.tiles)[[0, 5]])
    assert int(count) == 2
    scores = aligner(seen[0], made.net.tower.tokens(b.tiles)[0][[0, 5]])  # type: ignore[union-attr]
    wanted = sum(F.cross_entropy(s, torch.tensor([1, 2])) for s in scores)  # mean of two heads, sum of two rows
    assert float(total) == pytest.approx(float(wanted), rel=1e-4)
    assert int(metrics["aligned_right"]) == int((scores[0].argmax(-1) == torch.tensor([1, 2])).sum())


@pytest.mark.usefixtures("named")
def test_a_free_head_is_there_only_where_it_is_asked_for(made: Model) -> None:
    found = aligned(made, language=0.0, align=AlignConfig(source=None, free_head=False))
    assert made.net.aligner is not None
    assert [n for n, _ in made.net.aligner.named_parameters()] == ["log_scale"]
    b = batch(made, rows())
    total, _, _ = found(made.net, b)
    (scores,) = made.net.aligner(made.net.encode(b.tiles)[[0, 5]], torch.zeros(2, 1, 1))
    wanted = F.cross_entropy(scores, torch.tensor([1, 2]), reduction="sum")
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"align\.source: is missing"):
        configuration.build({"align": {}}, ObjectiveConfig)


@pytest.mark.usefixtures("named")
def test_without_language_the_backbone_does_not_run(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = made.net.backbone.forward
    monkeypatch.setattr(made.net.backbone, "forward", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    total, _, _ = aligned(made, language=0.0)(made.net, batch(made, rows()))
    assert calls == []
    total.backward()
    moved = {n.split(".")[0] for n, p in made.net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"tower", "projector", "aligner"}
    aligned(made)(made.net, batch(made, rows()))
    assert calls == [1]


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("language", [0.0, 1.0])
def test_every_batch_has_the_same_metrics(made: Model, language: float) -> None:
    found = aligned(made, language=language)
    results = [found(made.net, batch(made, part)) for part in (rows(), rows()[:1], rows()[1:2], rows()[2:3])]
    keys = [set(m) for _, _, m in results]
    assert keys == [{"align", "aligned_rows", "aligned_right"} | ({"language"} if language else set())] * 4
    assert [int(c) > 0 for _, c, _ in results] == ([True] * 4 if language else [True, False, True, False])
    for total, _, _ in results:
        assert torch.isfinite(total)
        total.backward()  # also where there is nothing to align


def test_align_needs_a_tower_and_something_must_be_learned(made: Model) -> None:
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        ObjectiveConfig(language=0)
    with pytest.raises(ValueError, match="language weight -1"):
        ObjectiveConfig(language=-1)


@pytest.mark.parametrize(
    ("labels", "answer"),
    [
        ([IGNORE, 5, 6, 2, IGNORE, 7], [5, 6]),
        ([IGNORE, 5, IGNORE, 7], [5]),
        ([5, 6], [5, 6]),
        ([IGNORE], []),
        ([2, 5], []),
        ([5, 9, 6], [5]),
    ],
)
def test_first_answer(labels: list[int], answer: list[int]) -> None:
    assert first_answer(labels, {2, 9}) == answer


def test_real_names_are_found_as_the_template_writes_them(made: Model, asset_cache: Path) -> None:
    found = DialogueObjective(ObjectiveConfig(align=AlignConfig(source=None)), made.tokenizer, asset_cache)
    found.prepare(made.net)
    known = concepts(asset_cache)
    assert len(known) > 1000
    rows = [made.encoder.row(sample("What is this?", answer=c.label).turns) for c in known]
    answers = [first_answer(r.labels.tolist(), found.ends) for r in rows]
    assert made.net.aligner.targets(answers).tolist() == list(range(len(known)))  # type: ignore[union-attr]


@pytest.mark.usefixtures("named")
def test_swapped_rows_keep_their_word_and_get_anothers_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(tmp_path, train=True, projector=ProjectorConfig(words=len(NAMES)))
    found, b = aligned(made, align=AlignConfig(source=None, swap=1.0)), batch(made, rows())
    shown: list[Tensor] = []
    real = made.net.forward
    monkeypatch.setattr(made.net, "forward", lambda *a, **k: (shown.append(k["features"]), real(*a, **k))[1])
    found(made.net, b)
    found(made.net.eval(), b)
    plain = made.net.encode(b.tiles)
    n = plain.shape[1] - 1
    others = [i for i in range(len(plain)) if i not in (0, 5)]
    torch.testing.assert_close(shown[0][[0, 5], :n], plain[[5, 0], :n])
    assert (plain[0, :n] - plain[5, :n]).abs().max() > 1e-3
    torch.testing.assert_close(shown[0][:, n], plain[:, n])
    torch.testing.assert_close(shown[0][others], plain[others])
    torch.testing.assert_close(shown[1], plain)  # not when the loss is only measured
    with pytest.raises(ValueError, match=r"swap is 1\.5, it is a share"):
        AlignConfig(source=None, swap=1.5)


@pytest.mark.usefixtures("named")
def test_a_swap_needs_visual_words(made: Model) -> None:
    with pytest.raises(ValueError, match=r"set model\.projector\.words"):
        aligned(made, align=AlignConfig(source=None, swap=0.5))
