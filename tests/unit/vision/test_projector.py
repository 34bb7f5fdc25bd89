"""Projector and resampler."""

import pytest
import torch
from torch import nn

from accessory.vision.projector import Projector
from accessory.vision.resampler import Resampler
from accessory.vision.tower import TokenGroup

GROUPS = (TokenGroup("qformer", 6, 2), TokenGroup("visual", 10, 5))


def test_groups_are_projected_alone_and_joined_in_order() -> None:
    proj = Projector(GROUPS, 8, start_end=True)
    q, v = torch.randn(3, 2, 6), torch.randn(3, 5, 10)
    out = proj((q, v))
    assert out.shape == (3, 7, 8)
    assert proj.num_tokens == 7
    torch.testing.assert_close(out[:, :2], proj.qformer_proj(q))
    torch.testing.assert_close(out[:, 2:], proj.visual_proj(v))
    assert proj((q[:0], v[:0])).shape == (0, 7, 8)


def test_names_are_those_of_published_checkpoints() -> None:
    ends = ("0.weight", "0.bias", "1.weight", "1.bias")
    want = {f"{g}_proj.{e}" for g in ("qformer", "visual") for e in ends} | {"skip", "start_img", "end_img"}
    proj = Projector(GROUPS, 8, start_end=True)
    assert set(proj.state_dict()) == want
    assert proj.skip.shape == proj.start_img.shape == proj.end_img.shape == (8,)
    assert "start_img" not in Projector(GROUPS, 8).state_dict()


@pytest.mark.parametrize(("kind", "layers"), [("linear_norm", 2), ("mlp", 3), ("linear", 1)])
def test_kinds(kind: str, layers: int) -> None:
    proj = Projector(GROUPS[1:], 8, kind)
    assert len(proj.visual_proj) == layers
    out = proj((torch.randn(2, 5, 10),))
    assert (out.mean(-1).abs().max() < 1e-5) == (kind == "linear_norm")


def test_bad_groups_are_errors() -> None:
    proj = Projector(GROUPS, 8)
    with pytest.raises(ValueError, match="got 1 token groups"):
        proj((torch.zeros(1, 2, 6),))
    with pytest.raises(ValueError, match=r"'visual' has shape \(1, 4, 10\), expected \(N, 5, 10\)"):
        proj((torch.zeros(1, 2, 6), torch.zeros(1, 4, 10)))
    with pytest.raises(ValueError, match=r"one width, got \[\('visual', 6\), \('visual', 7\)\]"):
        Projector((TokenGroup("visual", 6, 2), TokenGroup("visual", 7, 2)), 8)
    with pytest.raises(ValueError, match="'conv'"):
        Projector(GROUPS, 8, "conv")


def _twin(block: nn.Module, eps: float) -> nn.TransformerEncoderLayer:
    """The same block from torch's own parts."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", layer_norm_eps=eps, batch_first=True, norm_first=True
    )
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state = {f"{b}.{e}": block.state_dict()[f"{a}.{e}"] for a, b in names.items() for e in ("weight", "bias")}
    state |= {f"self_attn.in_proj_{e}": block.state_dict()[f"attn.qkv.{e}"] for e in ("weight", "bias")}
    layer.load_state_dict(state)
    return layer


def _reference(res: Resampler, x: torch.Tensor, eps: float) -> torch.Tensor:
    tokens = res.clip_proj_norm(res.clip_proj(x))
    y = torch.cat([res.visual_query.weight[None].repeat(len(x), 1, 1), tokens], 1)
    for block in res.visual_blocks:
        y = _twin(block, eps)(y)
    return res.visual_proj_norm(res.visual_proj(y[:, :3]))


def test_resampler_equals_torchs_own_layers_and_eps_matters() -> None:
    res = Resampler(12, 20, 3, width=16, depth=2, heads=4, eps=1e-2)
    x = torch.randn(2, 7, 12)
    out = res(x)
    assert out.shape == (2, 3, 20)
    torch.testing.assert_close(out, _reference(res, x, 1e-2), atol=1e-5, rtol=1e-4)
    assert (out - _reference(res, x, 1e-6)).abs().max() > 1e-4
    assert (res(x.flip(1)) - out).abs().max() < 1e-5  # no positions: a set of features
    assert (res(x.flip(0)) - out).abs().max() > 1e-3
    assert res(x[:0]).shape == (0, 3, 20)


def test_resampler_names_and_errors() -> None:
    res = Resampler(12, 20, 3, width=16, depth=1, heads=4)
    assert res.visual_blocks[0].norm1.eps == 1e-5
    ends = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    stems = [f"visual_blocks.0.{e}" for e in ends]
    stems += ["clip_proj", "clip_proj_norm", "visual_proj", "visual_proj_norm"]
    assert set(res.state_dict()) == {f"{s}.{e}" for s in stems for e in ("weight", "bias")} | {"visual_query.weight"}
    with pytest.raises(ValueError, match=r"\(1, 2, 5\), expected \(N, P, 12\)"):
        res(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="width 16 a multiple of heads 5"):
        Resampler(12, 20, width=16, heads=5)


def test_visual_words_follow_the_projected_tokens() -> None:
    group = TokenGroup("visual", 6, 4)
    projector = Projector([group], 5, "mlp", words=3)
    assert (projector.num_projected, projector.num_tokens) == (4, 5)
    tokens = torch.randn(2, 4, 6)
    out = projector([tokens])
    assert out.shape == (2, 5, 5)
    words = projector.words
    assert words is not None
    with torch.no_grad():  # a head that is sure shows a word of the table as it is
        words.head.weight.zero_()
        words.head.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    torch.testing.assert_close(projector([tokens])[:, -1], words.table[1].expand(2, -1))
    torch.testing.assert_close(projector([tokens])[:, :4], out[:, :4])
    # The word is chosen by the whole tile: the order of its tokens does not matter, what they hold does.
    with torch.no_grad():
        words.head.weight.normal_()
        words.head.bias.zero_()
    word = projector([tokens])[:, -1]
    torch.testing.assert_close(projector([tokens.flip(1)])[:, -1], word)
    assert (projector([tokens + 1])[:, -1] - word).abs().max() > 1e-3
    with pytest.raises(ValueError, match="words must not be negative, got -1"):
        Projector([group], 5, words=-1)


def test_sharpness_shows_one_word_and_leaves_the_scores() -> None:
    group, tokens = TokenGroup("visual", 6, 4), torch.randn(2, 4, 6)
    soft = Projector([group], 5, "mlp", words=3)
    sharp = Projector([group], 5, "mlp", words=3, sharpness=1000)
    sharp.load_state_dict(soft.state_dict())
    assert soft.words is not None
    assert sharp.words is not None
    with torch.no_grad():
        soft.words.head.weight.mul_(3)
        sharp.words.head.weight.mul_(3)
    scores = soft.words.scores(tokens)
    torch.testing.assert_close(sharp.words.scores(tokens), scores)
    best = soft.words.table[scores.argmax(-1)]
    torch.testing.assert_close(sharp([tokens])[:, -1], best, atol=1e-3, rtol=0)
    assert (soft([tokens])[:, -1] - best).abs().max() > 1e-3
    with pytest.raises(ValueError, match="sharpness of visual words must be positive, got 0"):
        Projector([group], 5, words=3, sharpness=0)
