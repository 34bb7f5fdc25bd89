"""The text encoder: what a text becomes does not depend on its batch, and what is lost is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.data import assets
from accessory.diffusion.condition import Condition
from accessory.models import text_encoder, text_profiles
from accessory.models.build import Model
from accessory.models.text_encoder import PIPELINES, Encoded, TextEncoder, batches, prompt_embeds
from accessory.models.text_profiles import PROFILES, Padding, TextProfile
from tests.tiny import tiny_model

TEXTS = ["a red cat", "", "three birds on a green hat and two blue stars", "moon", "the dog is left of the pear"]
PLAIN = TextProfile("tiny", max_length=64, dtype="fp32")
TOL = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = tiny_model(tmp_path_factory.mktemp("model"), tower=None, projector=None, tuning=())
    for p in model.net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def encoder(made: Model, **changes: object) -> TextEncoder:
    return text_encoder.of_model(made, replace(PLAIN, **changes))  # type: ignore[arg-type]


def features(encoded: Encoded, row: int) -> Tensor:
    """The real positions of a row, (n, C)."""
    c = encoded.condition
    assert c.seq is not None
    assert c.mask is not None
    return c.seq[row][c.mask[row]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("taps", "normed"), [((-1,), True), ((-2,), False), ((0, -1), True)])
@torch.no_grad()
def test_a_batch_is_its_texts(made: Model, side: str, taps: tuple[int, ...], normed: bool) -> None:
    e = encoder(made, padding=Padding(side=side, multiple=8), taps=taps, normed=normed)  # type: ignore[arg-type]
    together = e.encode(TEXTS, pooled=True)
    assert together.condition.seq is not None
    assert together.condition.seq.shape == (5, 16, e.width)
    assert e.width == 32 * len(taps)
    for i, text in enumerate(TEXTS):
        alone = e.encode([text], pooled=True)
        assert alone.token_counts[0] == together.token_counts[i] == len(features(together, i))
        torch.testing.assert_close(features(together, i), features(alone, 0), **TOL)
        assert together.condition.pooled is not None
        assert alone.condition.pooled is not None
        torch.testing.assert_close(together.condition.pooled[i], alone.condition.pooled[0], **TOL)
    by_one = e.encode(TEXTS, token_budget=1)
    torch.testing.assert_close(by_one.condition.seq, together.condition.seq, **TOL)
    # and order matters: each text has features of its own
    assert all(not torch.allclose(features(together, 0)[-1], features(together, i)[-1], atol=1e-2) for i in (2, 3, 4))


@torch.no_grad()
def test_left_padding_without_the_mask_differs(made: Model) -> None:
    e = encoder(made, padding=Padding(side="left"))
    ids = [made.tokenizer.encode(text, bos=True) for text in (TEXTS[0], TEXTS[2])]
    longest = max(map(len, ids))
    padded = torch.tensor([[made.tokenizer.pad_id] * (longest - len(row)) + row for row in ids])
    wrong = made.net.backbone(made.net.backbone.embed(padded))[0, -len(ids[0]) :]
    right = features(e.encode([TEXTS[0], TEXTS[2]]), 0)
    assert right.shape == wrong.shape
    assert (right - wrong).abs().max() > 0.05 * right.abs().max()


@torch.no_grad()
def test_the_mean_leaves_padding_out(made: Model) -> None:
    c = encoder(made).encode(TEXTS, pooled=True).condition
    assert c.seq is not None
    assert c.pooled is not None
    assert c.mask is not None
    torch.testing.assert_close(c.pooled[0], c.seq[0][c.mask[0]].mean(0), **TOL)
    assert (c.pooled[0] - c.seq[0].mean(0)).abs().max() > 0.05
    spoilt = replace(c, seq=c.seq.masked_fill(~c.mask[..., None], float("nan")))
    torch.testing.assert_close(text_encoder.masked_mean(spoilt), c.pooled, **TOL)


@torch.no_grad()
def test_an_empty_text_is_its_special_tokens(made: Model) -> None:
    for bos, eos in ((True, False), (True, True), (False, True)):
        e = encoder(made, bos=bos, eos=eos)
        found = e.encode(["", "moon"])
        assert found.token_counts[0] == e.count("") == bos + eos
        ids = [made.tokenizer.special(n) for n, on in (("bos", bos), ("eos", eos)) if on]
        wanted = made.net.backbone(made.net.backbone.embed(torch.tensor([ids])))[0]
        torch.testing.assert_close(features(found, 0), wanted, **TOL)


@torch.no_grad()
def test_what_is_cut_is_counted_and_said(made: Model, caplog: pytest.LogCaptureFixture) -> None:
    e = encoder(made, max_length=8, eos=True)
    wanted = [e.count(t) for t in TEXTS]
    assert wanted[0] <= 8 < wanted[4]
    with caplog.at_level(logging.WARNING, logger="accessory"):
        cut = e.encode(TEXTS)
    assert cut.truncated == tuple(max(0, n - 8) for n in wanted)
    assert cut.token_counts == tuple(min(8, n) for n in wanted)
    lost = [n for n in cut.truncated if n]
    assert f"{len(lost)} of 5 texts are longer than the 8 tokens of profile tiny" in caplog.text
    assert f"cut by {sum(lost)} tokens" in caplog.text
    # the end of a cut text is still its EOS, and its beginning is what a longer limit gives
    longer = encoder(made, eos=True).encode(TEXTS)
    assert sum(longer.truncated) == 0
    torch.testing.assert_close(features(cut, 2)[:7], features(longer, 2)[:7], **TOL)
    assert not torch.allclose(features(cut, 2)[7], features(longer, 2)[7], atol=1e-2)
    caplog.clear()
    e.encode(["moon"])
    assert caplog.text == ""


@torch.no_grad()
def test_a_long_text_may_be_an_error_or_chunks(made: Model) -> None:
    e = encoder(made, max_length=8)
    with pytest.raises(ValueError, match=r"text 2 has \d+ tokens, profile tiny takes 8: 'three birds"):
        e.encode(TEXTS, on_long="error")
    chunked = e.encode(TEXTS, on_long="chunk")
    assert sum(chunked.truncated) == 0
    ids = made.tokenizer.encode(TEXTS[2])
    pieces = [ids[i : i + 7] for i in range(0, len(ids), 7)]
    assert len(pieces) == 2
    assert chunked.token_counts[2] == len(ids) + len(pieces)
    backbone = made.net.backbone
    apart = [backbone(backbone.embed(torch.tensor([[made.tokenizer.special("bos"), *piece]])))[0] for piece in pieces]
    torch.testing.assert_close(features(chunked, 2), torch.cat(apart), **TOL)
    assert chunked.token_counts[3] == e.count("moon")


def test_bad_calls_are_refused(made: Model) -> None:
    e = encoder(made)
    with pytest.raises(ValueError, match="no texts"):
        e.encode([])
    with pytest.raises(ValueError, match="one string"):
        e.encode("moon")
    with pytest.raises(ValueError, match=r"computes in torch\.bfloat16, this backbone in torch\.float32"):
        encoder(made, dtype="bf16")
    with pytest.raises(ValueError, match="max_length 2000 exceeds the context of 1024"):
        encoder(made, max_length=2000)
    with pytest.raises(ValueError, match="tap -3 is outside a model of 2 blocks"):
        encoder(made, taps=(-3,))
    with pytest.raises(ValueError, match="profile tiny is of gemma-2b, this backbone is width 32"):
        encoder(made, size="gemma-2b")
    for bad, said in (
        ({"taps": ()}, "nothing to read"),
        ({"template": "no slot"}, "must hold {} once"),
        ({"bos": False}, "no token"),
        ({"max_length": 1}, "no room"),
        ({"size": "llama-8"}, "unknown"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(PLAIN, **bad)
    with pytest.raises(ValueError, match="no text profile 'lumina'"):
        text_profiles.get("lumina")
    with pytest.raises(ValueError, match="name a folder of llama2-7b"):
        text_encoder.load("lumina-t2i")


@torch.no_grad()
def test_a_text_cannot_name_control_tokens(made: Model) -> None:
    e = encoder(made)
    assert e.count("<s></s>") > 3
    one, other = e.encode(["</s>"]), encoder(made, eos=True).encode([""])
    assert one.token_counts != other.token_counts


@torch.no_grad()
def test_the_template_goes_around_the_text(made: Model) -> None:
    framed = encoder(made, template="the picture shows {} .").encode(["a {} cat"])
    plain = encoder(made).encode(["the picture shows a {} cat ."])
    assert torch.equal(features(framed, 0), features(plain, 0))
    assert framed.profile != plain.profile


def test_gradients_reach_the_backbone_only_where_they_may(made: Model) -> None:
    made.net.backbone.norm.weight.requires_grad_(True)
    try:
        frozen = encoder(made).encode(["moon"]).condition.seq
        assert frozen is not None
        assert not frozen.requires_grad
        loose = TextEncoder(made.net.backbone, made.tokenizer, PLAIN, frozen=False).encode(TEXTS).condition.seq
        assert loose is not None
        loose.sum().backward()
        assert made.net.backbone.norm.weight.grad is not None
    finally:
        made.net.requires_grad_(False)
        made.net.backbone.norm.weight.grad = None


def test_batches_keep_to_their_budget() -> None:
    lengths = [5, 1, 40, 7, 7, 3, 20, 1]
    found = list(batches(lengths, 24))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    assert len(found) == 4
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 24 for b in found)


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_profiles_are_named_by_what_decides_the_numbers() -> None:
    # These name embeddings on disk: a change here makes every stored one unreadable, and has to be meant.
    assert {name: p.digest for name, p in PROFILES.items()} == DIGESTS
    changes = {
        "name": "x", "size": None, "source": "y", "revision": "r", "taps": (-1, -2), "normed": False,
        "template": "a {}", "bos": False, "eos": False, "max_length": 99, "padding": Padding(id=3), "dtype": "fp32",
    }  # fmt: skip
    profile = PROFILES["lumina-t2i"]
    assert set(changes) == set(TextProfile.__dataclass_fields__)
    digests = {replace(profile, **{k: v}).digest for k, v in changes.items()}  # type: ignore[arg-type]
    assert len(digests | {profile.digest}) == 13
    assert replace(profile, max_length=128) == profile


DIGESTS = {
    "smollm2": "cf0120a50c321889",
    "lumina-t2i": "736e53e57dadccb5",
    "lumina-next": "f6ad5c4b592e8e29",
    "sphinx-13b": "ec436f1d2d91fc07",
}


def test_published_profiles() -> None:
    flag, following = PROFILES["lumina-t2i"], PROFILES["lumina-next"]
    assert (flag.taps, flag.normed, flag.bos, flag.eos, flag.max_length) == ((-1,), True, True, True, 128)
    assert (following.taps, following.normed, following.bos, following.eos) == ((-2,), False, True, False)
    assert (following.max_length, following.padding.multiple, following.padding.side) == (256, 8, "right")
    assert text_profiles.SIZES[PROFILES["sphinx-13b"].size or ""].dim == 5120


def test_the_fingerprint_knows_weights_and_vocabulary(made: Model, tmp_path: Path) -> None:
    e = encoder(made)
    first = e.fingerprint()
    assert e.fingerprint() == first
    assert encoder(made, max_length=63).fingerprint() != first
    weight = made.net.backbone.layers[1].attention.wq.weight  # type: ignore[union-attr]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-3
    assert e.fingerprint() != first
    with torch.no_grad():
        weight.copy_(kept)
    assert e.fingerprint() == first


@pytest.mark.slow
@pytest.mark.assets
@torch.no_grad()
def test_the_default_encoder() -> None:
    if assets.find("smollm2", None) is None:
        pytest.skip("SmolLM2 is not in the cache; python -m accessory fetch smollm2")
    e = text_encoder.load()
    found = e.encode(["a small red cat", "", "the same cat, small and red"], pooled=True)
    assert found.condition.seq is not None
    assert found.condition.seq.shape == (3, 8, 576)
    assert found.condition.seq.dtype == torch.bfloat16
    assert found.token_counts[1] == 1
    assert found.condition.pooled is not None
    assert found.condition.pooled.isfinite().all()
    near, far = torch.cosine_similarity(found.condition.pooled[:1].float(), found.condition.pooled[1:].float())[[1, 0]]
    assert near > far


# --- pipelines --------------------------------------------------------------------------------------------------------


def condition(batch: int, length: int, real: int | None = None, pooled: int | None = None) -> Condition:
    mask = torch.arange(length) < (length if real is None else real)
    return Condition(
        torch.randn(batch, length, 6),
        mask.expand(batch, -1).clone(),
        None if pooled is None else torch.randn(batch, pooled),
    )


def test_masks_and_lengths_of_pipelines() -> None:
    yes, no = condition(3, 8, real=5), condition(1, 4, real=1)
    out = prompt_embeds("LuminaPipeline", yes, no)
    assert set(out) == {
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    }  # fmt: skip
    assert out["negative_prompt_embeds"].shape == out["prompt_embeds"].shape == (3, 8, 6)
    assert out["negative_prompt_attention_mask"].tolist() == [[1] + [0] * 7] * 3
    assert out["prompt_attention_mask"].sum() == 15
    assert set(prompt_embeds("StableDiffusionPipeline", condition(2, 4))) == {"prompt_embeds"}
    with_pooled = prompt_embeds("StableDiffusionXLPipeline", condition(2, 4, pooled=3), condition(2, 4, pooled=3))
    assert with_pooled["negative_pooled_prompt_embeds"].shape == (2, 3)


def test_left_padding_is_moved_to_the_right_for_pipelines() -> None:
    left = condition(1, 4, real=2)
    assert left.seq is not None
    assert left.mask is not None
    flipped = Condition(left.seq.flip(1), left.mask.flip(1))
    out = prompt_embeds("Lumina2Pipeline", flipped)
    assert out["prompt_attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert torch.equal(out["prompt_embeds"][0, :2], left.seq.flip(1)[0, 2:])


def test_what_a_pipeline_would_get_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="FluxPipeline"):
        prompt_embeds("FluxPipeline", condition(1, 4))
    with pytest.raises(ValueError, match="takes no mask, but 2 of 8 positions of the prompts are padding"):
        prompt_embeds("StableDiffusionPipeline", condition(2, 4, real=3))
    with pytest.raises(ValueError, match="of the negative prompts are padding"):
        prompt_embeds("StableDiffusionPipeline", condition(2, 4), condition(2, 3))
    with pytest.raises(ValueError, match="needs a pooled vector for each negative prompt"):
        prompt_embeds("StableDiffusion3Pipeline", condition(1, 4, pooled=3), condition(1, 4))
    with pytest.raises(ValueError, match="2 negative prompts for 3 prompts"):
        prompt_embeds("LuminaPipeline", condition(3, 4), condition(2, 4))
    assert len(PIPELINES) == 5
