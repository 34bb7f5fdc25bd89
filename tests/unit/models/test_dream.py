"""The dream bridge: identity at the start, causality, batching, caching, the null, the trigger."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.objective import loss
from accessory.models.connector import HeadsConfig
from accessory.models.dream import Dream
from accessory.models.dream_config import Residual
from accessory.models.dream_presets import PRESETS
from accessory.peft.attach import LoraSpec, attach
from accessory.tokens import DREAM, DREAM_START, IMAGE
from tests.unit.models.dreams import (
    BOS,
    DIM,
    VOCAB,
    both,
    document,
    dream,
    encoder,
    flag_dit,
    mllm,
    padded,
    randomised,
    text,
)

NAMES = sorted(PRESETS)
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def told(condition: Condition) -> Tensor:
    """All numbers of a condition that are real, in one row a picture."""
    assert condition.seq is not None
    assert condition.mask is not None
    rows = [seq[real].flatten() for seq, real in zip(condition.seq, condition.mask, strict=True)]
    if condition.pooled is not None:
        rows = [torch.cat((row, pooled)) for row, pooled in zip(rows, condition.pooled, strict=True)]
    return torch.cat(rows)


# --- the start --------------------------------------------------------------------------------------------------------


def text_encoder_path(bridge: Dream, ids: Tensor, mask: Tensor | None = None) -> Condition:
    backbone = bridge.net.backbone
    states = backbone(backbone.embed(ids), mask=mask)
    return Condition(seq=states, mask=torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)


@pytest.mark.parametrize("lengths", [(6, 6), (7, 3, 4), (1,)])
@torch.no_grad()
def test_the_default_bridge_starts_as_the_text_encoder_bit_for_bit(lengths: tuple[int, ...]) -> None:
    bridge, denoiser = dream(seed=None), flag_dit()
    ids, mask = padded(text(*lengths), "right")
    plain = text_encoder_path(bridge, ids, None if bool(mask.all()) else mask)
    ours = bridge.condition(ids, mask=mask)
    assert plain.seq is not None
    assert ours.seq is not None
    assert torch.equal(ours.seq, plain.seq)
    assert ours.pooled is None
    x, t = torch.randn(len(ids), 3, 4, 4), torch.linspace(0.1, 0.9, len(ids))
    expected = denoiser(x, t, plain)
    assert torch.equal(denoiser(x, t, ours), expected)
    nobody = text_encoder_path(bridge, torch.tensor([[BOS]]))
    assert torch.equal(denoiser(x[:1], t[:1], bridge.null()), denoiser(x[:1], t[:1], nobody))
    # And it matters: with another head the same call gives other pictures.
    randomised(bridge.heads)
    assert (denoiser(x, t, bridge.condition(ids, mask=mask)) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_it_may_start_as_a_text_encoder_of_middle_states() -> None:
    bridge = dream(seed=None, residual=Residual(tap=-2, normed=True))
    backbone, ids = bridge.net.backbone, padded(text(6, 6), "right")[0]
    (middle,) = backbone(backbone.embed(ids), tap=(backbone.config.n_layers - 2,))
    found = bridge.condition(ids).seq
    assert found is not None
    assert torch.equal(found, backbone.norm(middle))
    raw = dream(seed=None, residual=Residual(tap=-2)).condition(ids).seq
    assert raw is not None
    assert (found - raw).abs().max() > 1e-2
    with pytest.raises(ValueError, match="final states are normed already"):
        Residual(normed=True)


@torch.no_grad()
def test_a_full_mask_takes_the_kernel_that_no_mask_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some machines the two round otherwise, and a text encoder gives none."""
    bridge, masks = dream(), []
    forward = bridge.net.backbone.forward

    def spy(*args: Any, **options: Any) -> Any:
        masks.append(options["mask"])
        return forward(*args, **options)

    monkeypatch.setattr(bridge.net.backbone, "forward", spy)
    ids = torch.stack(text(4, 4))
    bridge.read(ids, mask=torch.ones_like(ids, dtype=torch.bool))
    bridge.read(ids, mask=torch.arange(4) < torch.tensor([[4], [3]]))
    assert masks[0] is None
    assert masks[1] is not None


def test_the_default_bridge_trains_from_there() -> None:
    bridge, denoiser = dream(seed=None).train(), flag_dit()
    ids, data, noise = torch.stack(text(6, 6)), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    optimizer = torch.optim.Adam([p for p in bridge.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for step in range(8):
        made = bridge.condition(ids)
        value = loss(denoiser, data, made, noise=noise, t=torch.tensor([0.3, 0.6])).mean()
        optimizer.zero_grad()
        value.backward()
        queries = bridge.queries.grad
        assert queries is not None
        # A zero head lets no gradient through at first; from the second step on everything learns.
        assert (float(queries.abs().max()) > 0) == (step > 0)
        optimizer.step()
        seen.append(float(value.detach()))
    assert seen[-1] < seen[0] - 1e-3
    assert all(p.grad is None for p in bridge.net.parameters())


@torch.no_grad()
def test_a_half_precision_backbone_keeps_its_states() -> None:
    bridge = Dream(mllm().to(torch.bfloat16), dream(seed=None).config).eval()
    ids, mask = padded(text(7, 4), "right")
    made, plain = bridge.condition(ids, mask=mask).seq, text_encoder_path(bridge, ids, mask).seq
    assert made is not None
    assert plain is not None
    assert bridge.queries.dtype == torch.float32
    assert made.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(made, plain)
    assert bridge.logits(bridge(ids).h).dtype == torch.bfloat16


def test_a_tuned_backbone_learns_from_pictures() -> None:
    bridge = dream(joint=True).train()
    attach(bridge.net, (LoraSpec(rank=2),))
    for name, p in bridge.net.named_parameters():
        p.requires_grad_(".delta." in name)
    made = bridge.condition(torch.stack(text(5, 5))).seq
    assert made is not None
    made.square().sum().backward()
    grown = [p.grad for name, p in bridge.net.named_parameters() if ".delta.b" in name]
    assert len(grown) > 10
    assert all(g is not None and float(g.abs().max()) > 0 for g in grown)


@torch.no_grad()
def test_zero_heads_say_the_same_of_everything_as_of_nothing() -> None:
    heads = HeadsConfig("linear", width=DIM, pooled=DIM, zero_init=True)
    bridge, denoiser = dream("dreamllm", seed=None, connector=encoder(), heads=heads), flag_dit()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7])
    made, null = bridge.condition(torch.stack(text(6, 6))), bridge.null()[[0, 0]]
    assert torch.equal(denoiser(x, t, made), denoiser(x, t, null))
    randomised(bridge.heads)
    made, null = bridge.condition(torch.stack(text(6, 6))), bridge.null()[[0, 0]]
    assert (denoiser(x, t, made) - denoiser(x, t, null)).abs().max() > 1e-3


@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_text_scores_are_those_of_the_frozen_model(tie: bool) -> None:
    net = mllm(tie_embeddings=tie)
    ids = torch.stack(text(9, 9))
    base = net.logits(net(ids))
    bridge = dream(net=net)
    scores = bridge.logits(bridge(ids).h)
    assert torch.equal(scores[..., :VOCAB], base)
    assert scores.shape[-1] == VOCAB + 1 == bridge.trigger_id + 1
    assert bridge(ids).condition is None
    fresh = dream(net=net, seed=None)
    assert torch.allclose(fresh.logits(net(ids))[..., -1], base.mean(-1), atol=1e-5)
    assert fresh.start is not None
    assert torch.allclose(fresh.start, net.backbone.tok_embeddings.weight.mean(0))


# --- what sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "chatillusion"])
@torch.no_grad()
def test_a_picture_knows_what_was_before_and_not_what_comes(name: str) -> None:
    bridge = dream(name)
    before, after = text(5, 4)
    row = document(bridge, before, None, after)[None]
    made = bridge(row).condition
    assert made is not None
    later, earlier = row.clone(), row.clone()
    later[0, -2] = (later[0, -2] + 7) % VOCAB
    earlier[0, 2] = (earlier[0, 2] + 7) % VOCAB
    for other, same in ((later, True), (earlier, False)):
        found = bridge(other).condition
        assert found is not None
        assert torch.equal(told(found), told(made)) == same
        assert same or (told(found) - told(made)).abs().max() > 1e-3
    assert not torch.equal(bridge(later).h[0, -1], bridge(row).h[0, -1])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_hidden_spans_leave_later_text_as_it_would_be_without_them(window: int | None, side: str) -> None:
    bridge = dream(net=mllm(window=window), hide_queries_from_future=True)
    open_eyed = dream(net=bridge.net, hide_queries_from_future=False)
    a, b, c = text(5, 4, 3)
    start = torch.tensor([DREAM_START])
    rows = [document(bridge, a, None, b, None, c), document(bridge, a, None, c)]
    ids, mask = padded(rows, side)
    scores, others = (d.logits(d(ids, mask=mask).h) for d in (bridge, open_eyed))
    queries = bridge.config.num_queries
    for i, row in enumerate(rows):
        # Without the queries and ends, only the triggers stay: they were said.
        said = row[(row >= 0) | (row == DREAM_START)]
        x = bridge.net.backbone.embed(said[None])
        assert bridge.start is not None
        x[0, said == DREAM_START] = bridge.start
        expected = bridge.logits(bridge.net.backbone(x))[0]
        kept = mask[i] & ((ids[i] >= 0) | (ids[i] == DREAM_START))
        torch.testing.assert_close(scores[i][kept], expected, **EXACT)
        assert (others[i][kept] - expected).abs().max() > 1e-2
    assert int((ids == DREAM).sum()) == 3 * queries
    assert start.numel() == 1


@pytest.mark.parametrize("hide", [False, True])
@torch.no_grad()
def test_a_document_dreamt_step_by_step_is_the_document_in_one_forward(hide: bool) -> None:
    bridge = dream(hide_queries_from_future=hide)
    a, b, c = text(5, 4, 3)
    whole = document(bridge, a, None, b, None, c)[None]
    expected = bridge(whole)
    assert expected.condition is not None
    cache = bridge.net.backbone.cache(1, whole.shape[1])
    states = bridge.read(a[None], cache=cache)
    untouched, same = bridge.imagine(states, cache)
    assert cache.length == 5
    assert same is states
    first, states = bridge.imagine(states, cache, keep=True)
    torch.testing.assert_close(told(untouched), told(first), **EXACT)
    span = 1 if hide else 2 + bridge.config.num_queries
    assert cache.length == 5 + span == states.ids.shape[1]
    states = states.then(bridge.read(b[None], cache=cache))
    second, states = bridge.imagine(states, cache, keep=True)
    last = bridge.read(c[None], cache=cache).final
    torch.testing.assert_close(told(first), told(expected.condition[:1]), **EXACT)
    torch.testing.assert_close(told(second), told(expected.condition[1:]), **EXACT)
    torch.testing.assert_close(last, expected.h[:, -3:], **EXACT)
    # The second picture knows the first text: alone, its own text gives another.
    alone = told(bridge.condition(b[None]))
    assert (told(second)[-len(alone) :] - alone).abs().max() > 1e-3


# --- batches and caches -----------------------------------------------------------------------------------------------


def bridges() -> list[tuple[str, Dream]]:
    made = [(name, dream(name)) for name in NAMES]
    heads = HeadsConfig("linear", width=20, pooled=8)
    made.append(("appended", dream("default", tap=both(), residual=None, heads=heads, joint=True)))
    return made


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_gives_what_its_rows_give_alone(side: str) -> None:
    rows = text(7, 3, 5)
    ids, mask = padded(rows, side)
    for name, bridge in bridges():
        made = bridge.condition(ids, mask=mask)
        full = torch.nn.functional.pad(ids, (0, 0))
        for i, row in enumerate(rows):
            alone = bridge.condition(row[None])
            torch.testing.assert_close(told(made[i : i + 1]), told(alone), msg=name, **EXACT)
        careless = bridge.condition(full)
        assert len(told(careless)) != len(told(made)) or (told(careless) - told(made)).abs().max() > 1e-3, name


@torch.no_grad()
def test_documents_in_a_batch_give_what_they_give_alone() -> None:
    a, b, c = text(6, 3, 4)
    for name, bridge in bridges():
        rows = [document(bridge, a, None, b, None), document(bridge, c, None), a]
        ids, mask = padded(rows, "right")
        made = bridge(ids, mask=mask).condition
        assert made is not None
        assert len(made) == 3, name
        singles = [bridge(row[None]).condition for row in rows[:2]]
        assert singles[0] is not None
        assert singles[1] is not None
        expected = torch.cat([told(singles[0]), told(singles[1])])
        torch.testing.assert_close(told(made), expected, msg=name, **EXACT)
        torch.testing.assert_close(told(made[[0]]), told(bridge.condition(a[None])), msg=name, **EXACT)
        assert bridge(a[None]).condition is None


@torch.no_grad()
def test_two_passes_are_one_forward() -> None:
    ids, mask = padded(text(7, 4), "left")
    for name, bridge in bridges():
        other = Dream(bridge.net, replace(bridge.config, joint=not bridge.config.joint)).eval()
        other.load_state_dict(bridge.state_dict())
        torch.testing.assert_close(
            told(bridge.condition(ids, mask=mask)), told(other.condition(ids, mask=mask)), msg=name, **EXACT
        )
        # It matters that the span reads the context: another one gives another picture.
        assert (told(bridge.condition(ids)) - told(bridge.condition(ids.flip(1)))).abs().max() > 1e-3, name


# --- the null ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_null_of_training_is_that_of_inference(name: str) -> None:
    bridge = dream(name).train()
    a, b = text(6, 4)
    ids, mask = padded([document(bridge, a, None), document(bridge, b, None)], "right")
    trained = bridge(ids, mask=mask, drop=["all", "keep"]).condition
    kept = bridge(ids, mask=mask).condition
    bridge.eval()
    with torch.no_grad():
        null = bridge.null()
        assert bridge.null() is null
    assert trained is not None
    assert kept is not None
    assert trained.seq is not None
    assert trained.seq.requires_grad
    assert torch.equal(told(trained[:1]), told(null))
    assert torch.equal(told(trained[1:]), told(kept[1:]))
    assert (told(kept[:1])[:4] - told(null)[:4]).abs().max() > 1e-3
    layout = {part: value.shape[2:] for part, value in null.parts().items()}
    assert layout == {part: value.shape[2:] for part, value in kept.parts().items()}
    with torch.no_grad():
        bridge.connector.get_parameter(next(k for k, _ in bridge.connector.named_parameters())).mul_(1.5)
        assert bridge.null() is not null
        same = name == "default" and torch.equal(told(bridge.null()), told(null))
        assert not same


def test_text_or_pictures_alone_can_be_dropped() -> None:
    bridge = dream(net=mllm(eyes=True)).train()
    seen, words = torch.full((4,), IMAGE), text(5)[0]
    rows = [document(bridge, words[:2], seen, words[2:], None), document(bridge, words[:1], seen, words[1:3], None)]
    ids, mask = padded(rows, "right")
    tiles = torch.rand(2, 3, 4, 4)
    trained = bridge(ids, tiles, mask=mask, drop=["image", "text"]).condition
    kept = bridge(ids, tiles, mask=mask).condition
    assert trained is not None
    assert kept is not None
    bridge.eval()
    with torch.no_grad():
        features = bridge.net.encode(tiles)
        no_text = bridge.condition(torch.cat((words[:1], seen))[None], features=features[1:])
        no_image = bridge.condition(words[None])
        wrong = bridge.condition(torch.cat((words[:1], seen))[None], features=features[:1])
    assert torch.equal(told(trained[1:]), told(no_text))
    assert torch.equal(told(trained[:1]), told(no_image))
    assert not torch.allclose(told(trained[1:]), told(wrong), atol=1e-3)
    with pytest.raises(ValueError, match="2 dream spans, drop names 1"):
        bridge(ids, tiles, mask=mask, drop=["all"])
