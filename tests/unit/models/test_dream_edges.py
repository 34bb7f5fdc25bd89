"""The dream bridge at its edges: the trigger, the losses, what is refused."""

from __future__ import annotations

import pytest
import torch

from accessory.models.dream import Residual, TapConfig
from accessory.models.dream_loss import DreamLossConfig, language_loss
from accessory.models.dream_presets import PRESETS, preset
from accessory.tokens import DREAM_START, IGNORE
from tests.unit.models.dreams import VOCAB, document, dream, mllm, text

NAMES = sorted(PRESETS)


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_the_trigger_is_learned_beside_a_frozen_table() -> None:
    bridge = dream(seed=None).train()
    a, b = text(5, 4)
    ids = document(bridge, a, None, b)[None]
    labels = torch.where((ids >= 0) | (ids == DREAM_START), ids, IGNORE)
    trainable = [p for p in bridge.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    first = None
    for _ in range(30):
        scores = bridge.logits(bridge(ids).h)
        total, count = language_loss(scores, bridge.targets(labels), bridge.trigger_id)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        first = first if first is not None else scores.detach()
    assert first is not None
    column = scores[0, 4]
    assert int(column.argmax()) == bridge.trigger_id
    assert float(first[0, 4].softmax(-1)[bridge.trigger_id]) < 0.5
    assert bridge.start is not None
    assert bridge.start.grad is not None
    assert float(bridge.start.grad.abs().max()) > 0


@torch.no_grad()
def test_every_vector_of_a_span_is_where_it_belongs() -> None:
    net = mllm()
    a, b = text(3, 2)
    for trigger in (None, 17):
        bridge = dream(net=net, trigger=trigger)
        ids = torch.stack([document(bridge, a, None, b), document(bridge, b, None, a)])
        x, table = bridge.embed(ids), net.backbone.tok_embeddings.weight
        start = table[17] if trigger is not None else bridge.start
        assert start is not None
        span = torch.cat((start[None], bridge.queries, bridge.end[None]))
        assert torch.equal(x[0], torch.cat((table[a], span, table[b])))
        assert torch.equal(x[1], torch.cat((table[b], span, table[a])))
        assert bridge.logits(x).shape[-1] == VOCAB + (trigger is None)
        assert bridge.targets(torch.tensor([DREAM_START, 4, IGNORE])).tolist() == [bridge.trigger_id, 4, IGNORE]


def test_the_loss_weighs_its_parts() -> None:
    one, two = torch.tensor(2.0), torch.tensor(3.0)
    assert float(DreamLossConfig().total(one, two)) == 32.0
    assert float(DreamLossConfig(scale="l1").total(one, two)) == pytest.approx(32 / 11)
    assert float(DreamLossConfig(3.0, 4.0, "l2").total(one, two)) == pytest.approx(18 / 5)
    assert float(DreamLossConfig(language=0.0).total(torch.tensor(float("nan")), two)) == 30.0
    with pytest.raises(ValueError, match="not both 0"):
        DreamLossConfig(0.0, 0.0)
    scores, labels = torch.randn(1, 4, 6), torch.tensor([[0, 5, IGNORE, 2]])
    each = torch.nn.functional.cross_entropy(scores[0, [0, 2]], torch.tensor([5, 2]), reduction="none")
    total, count = language_loss(scores, labels, trigger_id=5, weight=3.0)
    assert (float(total), float(count)) == (pytest.approx(float(3 * each[0] + each[1])), 4.0)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    net = mllm()
    with pytest.raises(ValueError, match=r"tap\.positions 'queries' reads them"):
        dream("dreamllm", net=net, num_queries=0)
    with pytest.raises(ValueError, match="does not lead there"):
        dream("chatillusion", net=net, residual=Residual())
    with pytest.raises(ValueError, match="trigger 40 is no row"):
        dream(net=net, trigger=VOCAB)
    with pytest.raises(ValueError, match="tap -9"):
        dream(net=net, tap=TapConfig((-9,), positions="both"))
    with pytest.raises(ValueError, match="null_ids is empty"):
        dream(net=net, null_ids=()).null()
    with pytest.raises(ValueError, match="placeholders"):
        dream(net=net, null_ids=(-3,))
    bridge = dream(net=net)
    with pytest.raises(ValueError, match="no text and no picture before it"):
        bridge(document(bridge, None)[None])
    with pytest.raises(ValueError, match="dream preset 'dall-e' is not one of"):
        preset("dall-e")
    net.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match=r"set dream\.joint"):
        bridge.condition(text(4)[0][None])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_the_graph_of_every_batch(name: str) -> None:
    bridge = dream(name).train()
    own = {k: p for k, p in bridge.named_parameters() if p.requires_grad}
    bridge.logits(bridge(text(6)[0][None]).h).sum().backward()
    assert len(own) > 3
    assert [k for k, p in own.items() if p.grad is None] == []
