"""Pictures that enter through the prefixes: every way of generating says what repeated full forwards say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.backbone.fast import accelerate, release
from accessory.backbone.generate import Sampling, generate, stream
from accessory.evaluate.score import answers
from accessory.models import build
from accessory.models.build import Model, ResamplerConfig
from accessory.models.likelihood import likelihoods
from accessory.nn.attention import Attention
from accessory.peft.attach import PrefixSpec
from accessory.peft.prefix import ZeroInitPrefix
from accessory.peft.quantize import Quantization
from accessory.schema import Encoded, Sample
from accessory.tokens import IMAGE
from accessory.train.disjoint import DisjointObjective, RowGroup, select
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from tests.unit.models.pictured import FORMS, adapted, batch, picture, sample

NEW = 8
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=list(FORMS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return adapted(tmp_path_factory.mktemp("adapted"), request.param)


def prompt(made: Model, *parts: object) -> Encoded:
    asked = sample(*parts)  # type: ignore[arg-type]
    return made.encoder.encode(replace(asked, turns=asked.turns[:1]), generate=True)


def mixed(made: Model) -> list[Encoded]:
    """Rows of unequal lengths, the second and the last without a picture."""
    return [
        prompt(made, picture(1), "What is this?"),
        prompt(made, "How many birds are there in this picture?"),
        prompt(made, picture(2), "Where is the apple?"),
        prompt(made, "What is this?"),
    ]


@torch.inference_mode()
def by_forwards(made: Model, row: Encoded) -> tuple[list[int], Tensor]:
    """The most likely token of the whole sequence, again and again, and the scores that each was chosen from."""
    ids, said, scores = row.ids[None], list[int](), []
    tiles = row.tiles if len(row.tiles) else None
    for _ in range(NEW):
        scores.append(made.net.logits(made.net(ids, tiles))[0, -1])
        said.append(int(scores[-1].argmax()))
        ids = torch.cat((ids, torch.tensor([[said[-1]]])), 1)
    return said, torch.stack(scores)


@torch.inference_mode()
def generated(made: Model, rows: list[Encoded]) -> list[list[int]]:
    x, context = made.net.prompts(rows)
    return generate(made.net.backbone, x, sampling=Sampling(NEW), context=context)


def test_generation_is_the_argmax_of_full_forwards(made: Model) -> None:
    row = prompt(made, picture(1), "What is this?")
    assert bool((row.ids == IMAGE).any()) == (made.net.projector is not None)
    said, scores = by_forwards(made, row)
    assert generated(made, [row]) == [said]
    # ... and it matters what the picture is, and that there is one
    other = by_forwards(made, replace(row, tiles=1 - row.tiles))
    assert (other[1][0] - scores[0]).abs().max() > 1e-2
    if made.net.projector is None:
        blind = by_forwards(made, replace(row, tiles=row.tiles[:0]))
        assert (blind[1][0] - scores[0]).abs().max() > 1e-2


def test_some_answer_follows_its_picture(made: Model) -> None:
    said = {tuple(generated(made, [prompt(made, picture(n), "What is this?")])[0]) for n in range(8)}
    assert len(said) > 1


def test_rows_of_a_batch_say_what_they_say_alone(made: Model) -> None:
    rows = mixed(made)
    together = generated(made, rows)
    assert together == [generated(made, [row])[0] for row in rows]
    with torch.inference_mode():
        context = made.net.prompts(rows)[1]
        assert context is not None
        assert [bool(c.any()) for c in context] == [True, False, True, False]
        plain = [made.net.embed(row.ids[None], features=None)[0] for row in rows[1::2]]
        assert generate(made.net.backbone, plain, sampling=Sampling(NEW)) == together[1::2]  # as without any prefix
        # Rows that got another's picture would say something else.
        x, _ = made.net.prompts(rows)
        steps = [
            made.net.logits(made.net.backbone(x[0][None], context=c[None]))[0, -1] for c in (context[0], context[2])
        ]
    assert (steps[0] - steps[1]).abs().max() > 1e-2


def test_evaluation_does_not_depend_on_the_batch(made: Model) -> None:
    samples = [sample(picture(n), "What is this?") if n % 3 else sample("What is this?") for n in range(7)]
    alone = [answers(made, [s], NEW)[0] for s in samples]
    assert answers(made, samples, NEW) == alone
    assert alone[0] == alone[3] == alone[6]
    assert len(set(alone)) > 1


@torch.inference_mode()
def test_likelihoods_do_not_depend_on_the_batch(made: Model) -> None:
    rows = [made.encoder.encode(sample(*p)) for p in ((picture(1), "What?"), ("What?",), (picture(1), "And where?"))]
    together = likelihoods(made, rows)
    for row, found in zip(rows, together, strict=True):
        assert found.total == pytest.approx(likelihoods(made, [row])[0].total, abs=1e-3)
    other = likelihoods(made, [replace(rows[0], tiles=1 - rows[0].tiles)])[0]
    assert abs(other.total - together[0].total) > 1e-2


@torch.inference_mode()
def test_a_cache_goes_on_with_what_it_saw(made: Model) -> None:
    """A further turn over the cache equals the whole dialogue at once, without anybody handing the picture over."""
    row = prompt(made, picture(1), "What is this?")
    x, context = made.net.prompts([row])
    cache = made.net.backbone.cache(1, 200)
    said = [s[0] for s in stream(made.net.backbone, x[0][None], cache=cache, sampling=Sampling(3), context=context)]
    more = torch.tensor([said[-1], *made.tokenizer.encode(" Where is the apple?")])
    h = made.net(more[None], cache=cache)
    whole = torch.cat((row.ids, torch.tensor(said[:-1]), more))
    at_once = made.net(whole[None], row.tiles)[:, -len(more) :]
    torch.testing.assert_close(h, at_once, **CLOSE)
    cache.truncate(len(row.ids))
    cache.context = None
    forgotten = made.net(more[None], cache=cache)
    assert (forgotten - at_once).abs().max() > 1e-3


def test_packed_and_quantised_weights_see_too(tmp_path: Path) -> None:
    made = adapted(tmp_path)
    row = prompt(made, picture(1), "What is this?")
    said = generated(made, [row])
    accelerate(made.net.backbone)
    assert generated(made, [row]) == said
    release(made.net.backbone)
    wide = adapted(
        tmp_path, backbone=replace(made.config.backbone, llama=replace(made.net.backbone.config, ffn_dim=64))
    )
    small = build.shrink(wide, Quantization(kind="int8"))
    accelerate(small.net.backbone)
    said_small, scores = by_forwards(small, row)
    assert generated(small, [row]) == [said_small]
    assert (by_forwards(small, replace(row, tiles=1 - row.tiles))[1][0] - scores[0]).abs().max() > 1e-2


# --- forms ----------------------------------------------------------------------------------------------------------


def test_one_token_is_the_attention_free_form() -> None:
    """ImageBind-LLM's ``tanh(gate) * wv(vector + prefix)``, whatever the queries are."""
    torch.manual_seed(0)
    attention, prefix = Attention(12, 4, 2, 3), ZeroInitPrefix(4, 3, 12, 1)
    prefix.gate.data = torch.randn(4)
    q, vector = torch.randn(2, 4, 5, 3), torch.randn(2, 1, 12)
    v = attention.wv(prefix.tokens + vector).unflatten(-1, (2, 3)).transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close(prefix(q, attention, vector), (prefix.gate.tanh()[:, None, None] * v).expand(q.shape))


@torch.inference_mode()
def test_early_fusion_is_in_the_first_block_alone(tmp_path: Path) -> None:
    made = adapted(tmp_path, "v2 paper")
    first, last = (block.attention.prefix for block in made.net.backbone.layers)  # type: ignore[union-attr]
    assert isinstance(first, ZeroInitPrefix)
    assert isinstance(last, ZeroInitPrefix)
    assert (len(first.tokens), first.sees, len(last.tokens), last.sees) == (3, True, 2, False)
    both = batch(made, [sample(picture(1), "What?"), sample(picture(2), "What?")])
    h = made.net(both.ids, both.tiles, counts=both.counts)
    first.gate.zero_()
    shut = made.net(both.ids, both.tiles, counts=both.counts)
    assert torch.equal(shut[0, :3], shut[1, :3])  # no other block sees the picture
    assert (h[0, :3] - h[1, :3]).abs().max() > 1e-3


@pytest.mark.parametrize(("layers", "early"), [(None, 3), (2, 3), (1, 0)])
def test_early_fusion_takes_the_first_block_for_itself(tmp_path: Path, layers: int | None, early: int) -> None:
    with pytest.raises(ValueError, match=rf"prefix early {early} .* below 2, got {layers}"):
        adapted(tmp_path, "v1 caption", tuning=(PrefixSpec(length=2, layers=layers, early=early),))


def test_two_pictures_where_one_is_taken(tmp_path: Path) -> None:
    one = adapted(tmp_path)
    asked = sample(picture(1), "and", picture(2), "What?")
    with pytest.raises(ValueError, match=r"2 pictures \(2 tiles\) in one dialogue, this model takes 1 .*max_tiles"):
        one.encoder.encode(asked)
    two = adapted(tmp_path, resampler=ResamplerConfig(length=3, width=16, depth=2, heads=2, max_tiles=2))
    row = two.encoder.encode(asked)
    with torch.inference_mode():
        both = two.net.context(row.ids[None], row.tiles)
        assert both is not None
        torch.testing.assert_close(both[0], two.net.prefixes(row.tiles).mean(0), **CLOSE)
    with pytest.raises(ValueError, match=r"resampler\.max_tiles must be at least 1, got 0"):
        ResamplerConfig(max_tiles=0)


# --- training -------------------------------------------------------------------------------------------------------


def gradients(made: Model, samples: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    made.net.zero_grad()
    loss, _, _ = DialogueObjective(ObjectiveConfig(), made.tokenizer)(made.net, batch(made, samples))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {n: p.grad for n, p in made.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", list(FORMS))
def test_gradients_reach_the_visual_part_from_rows_with_pictures_alone(tmp_path: Path, form: str) -> None:
    made = adapted(tmp_path, form, train=True)
    shown, plain = sample(picture(1), "What?"), [sample("What is this?"), sample("Where?", answer="there")]
    trained = [n for n, p in made.net.named_parameters() if p.requires_grad]
    seen, visual = gradients(made, [shown])[1], [n for n in trained if n.startswith("resampler.")]
    assert sorted(seen) == sorted(trained)
    assert len(visual) > 20
    assert [n for n in visual if not seen[n].any() and not n.endswith("qkv.bias")] == []
    # Text alone leaves every one of them in the graph, at nothing.
    blind = gradients(made, plain)[1]
    assert all(n in blind and not blind[n].any() for n in visual)
    # A batch of both is the sum: the picture pulls at nobody else's row, nor the other way round.
    losses, both = gradients(made, [plain[0], shown, plain[1]])
    for n in trained:
        torch.testing.assert_close(both[n], seen[n] + blind[n], rtol=1e-3, atol=1e-4)
    assert float(losses) == pytest.approx(sum(float(gradients(made, s)[0]) for s in ([shown], plain)), rel=1e-4)


@torch.inference_mode()
def test_rows_without_pictures_do_not_notice_those_of_others(made: Model) -> None:
    both = batch(made, [sample("What is this?"), sample(picture(1), "What is this?")])
    swapped = replace(both, tiles=1 - both.tiles)
    h, other = (made.net(b.ids, b.tiles, counts=b.counts) for b in (both, swapped))
    assert torch.equal(h[0], other[0])
    assert (h[1] - other[1]).abs().max() > 1e-2
    alone = made.net(both.ids[:1])[0]
    torch.testing.assert_close(h[0], alone, **CLOSE)


def test_groups_of_rows_keep_their_tiles_without_positions(tmp_path: Path) -> None:
    """V2's joint training: pictures train the early fusion and the resampler, texts all else."""
    made = adapted(tmp_path, "v2 paper", train=True)
    named = [replace(sample(picture(1), "What?"), source="captions"), replace(sample("What?"), source="texts")]
    both = batch(made, [named[1], named[0]])
    assert len(select(both, [1]).tiles) == 1
    assert len(select(both, [0]).tiles) == 0
    with pytest.raises(ValueError, match=r"Batch\.counts"):
        select(replace(both, counts=None), [1])
    early = ("resampler.*", "backbone.layers.0.attention.prefix.*")
    groups = (
        RowGroup("align", ("captions",), early),
        RowGroup("instruct", ("texts",), ("backbone.layers.[!0]*", "backbone.layers.0.[!a]*", "backbone.norm.*",
                                          "backbone.layers.0.attention.w*", "backbone.layers.0.attention_norm.*")),
    )  # fmt: skip
    inner = DialogueObjective(ObjectiveConfig(), made.tokenizer)
    loss, _, metrics = DisjointObjective(inner, groups, made.net)(made.net, both)
    loss.backward()
    assert (metrics["rows/align"], metrics["rows/instruct"]) == (1.0, 1.0)
    changed = {n for n, p in made.net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {n.split(".")[0] for n in changed} == {"resampler", "backbone"}
    assert "backbone.layers.0.attention.prefix.gate" in changed
