"""ImageBind-LLM's network from a vector to a token, and its cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.models import published_keys
from accessory.vision.resampler import Bind, Neighbours, make
from tests.unit.models.adapters import filled


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_the_bind_network_by_its_formula(legacy: bool) -> None:
    torch.manual_seed(0)
    bind = Bind(6, 8, width=20, depth=2, legacy=legacy)
    shapes = published_keys._bind(8, 6, 20, 2, legacy)
    w = filled(shapes)
    bind.load_state_dict(w, strict=True)
    features = torch.randn(3, 5, 6)
    x = F.linear(features[:, 0] / features[:, 0].norm(dim=-1, keepdim=True), *_pair(w, "image_bind_proj"))
    for i in (1, 2):
        norm, bias = _pair(w, f"image_bind_norm_{i}")
        y = F.layer_norm(x, (8,), norm, bias) if legacy else x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        hidden = F.silu(F.linear(y, *_pair(w, f"image_bind_f1_{i}"))) * F.linear(y, *_pair(w, f"image_bind_f3_{i}"))
        x = x + F.linear(hidden, *_pair(w, f"image_bind_f2_{i}"))
    torch.testing.assert_close(bind(features)[:, 0], x, rtol=1e-5, atol=1e-5)


def _pair(w: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return w[f"{name}.weight"], w.get(f"{name}.bias")


def test_the_cache_moves_a_vector_towards_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(5)
    known = F.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    x = F.normalize(torch.randn(2, 6, generator=generator), dim=-1)
    cache = Neighbours(known * 3, count=4)  # any length
    moved = cache(x)
    for row, out in zip(x, moved, strict=True):
        near = (known @ row).argsort(descending=True)[:4]
        weights = (20 * known[near] @ row).exp()
        mean = (weights[:, None] * known[near]).sum(0)
        torch.testing.assert_close(out, F.normalize(row + mean / mean.norm(), dim=-1))
    assert (moved - x).abs().max() > 0.05
    assert not cache.state_dict()  # it belongs to no checkpoint
    bind = Bind(6, 8, width=20, depth=1)
    before = bind(x[:, None])
    bind.near = cache
    assert torch.equal(bind.train()(x[:, None]), before)  # for inference alone
    assert (bind.eval()(x[:, None]) - before).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"the cache has shape \(40, 6\), expected \(N, C\) with N at least 41"):
        Neighbours(known, count=41)
    with pytest.raises(ValueError, match="vectors have width 5, those of the cache 6"):
        cache(torch.ones(1, 5))


def test_sizes_that_do_not_go_together_are_refused() -> None:
    sizes = {"width": 16, "depth": 1, "heads": 2}
    assert isinstance(make("bind", 6, 8, length=1, **sizes, vectors=torch.randn(20, 6)), Bind)
    with pytest.raises(ValueError, match=r"resampler\.length is 4, kind bind_legacy makes 1 token"):
        make("bind_legacy", 6, 8, length=4, **sizes)
    with pytest.raises(ValueError, match=r"resampler\.neighbours is for kind bind"):
        make("queries", 6, 8, length=4, **sizes, vectors=torch.ones(20, 6))
    with pytest.raises(ValueError, match=r"features have shape \(1, 2, 5\), expected \(N, P, 6\)"):
        Bind(6, 8, width=16, depth=1)(torch.ones(1, 2, 5))
