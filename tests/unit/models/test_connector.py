"""Connectors and heads against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.models.connector import Connector, ConnectorConfig, Heads, HeadsConfig, Mix, masked_mean
from accessory.nn.projection import Projection
from tests.unit.models.dreams import randomised


def reference_gen_adapter(p: dict[str, Tensor], states: list[Tensor], heads: int, depth: int) -> Tensor:
    """ChatIllusion's adapter by its table, a picture and a head at a time; ``states`` (L, in) without padding."""

    def path(name: str, x: Tensor) -> Tensor:
        y = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        return F.layer_norm(y, y.shape[-1:], p[f"{name}_norm.weight"], p[f"{name}_norm.bias"])

    out = []
    for x in states:
        q, k, v = path("q", p["queries"]), path("k", x), path("v", x)
        for i in range(depth):
            a = q.shape[1] // heads
            parts = []
            for h in range(heads):
                at = slice(h * a, (h + 1) * a)
                scores = q[:, at] @ k[:, at].T / a**0.5
                parts.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v[:, at])
            q = torch.cat(parts, 1) @ p[f"blocks.{i}.wo.weight"].T + p[f"blocks.{i}.wo.bias"]
        out.append(q)
    return torch.stack(out)


@torch.no_grad()
def test_the_gen_adapter_is_its_formula() -> None:
    made = randomised(Connector(10, ConnectorConfig("gen_adapter", width=16, depth=2, heads=4, num_tokens=6)))
    x, mask = torch.randn(3, 7, 10), torch.arange(7) < torch.tensor([[7], [3], [5]])
    p = {k.removeprefix("body."): v for k, v in made.state_dict().items()}
    y, seen = made(x, mask)
    expected = reference_gen_adapter(p, [row[real] for row, real in zip(x, mask, strict=True)], 4, 2)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert seen.shape == (3, 6)
    assert bool(seen.all())
    careless = reference_gen_adapter(p, list(x), 4, 2)
    assert (careless[1] - y[1]).abs().max() > 1e-3
    single = reference_gen_adapter(p, [row[real] for row, real in zip(x, mask, strict=True)], 2, 2)
    assert (single - y).abs().max() > 1e-3  # the number of heads matters


@torch.no_grad()
def test_the_encoder_looks_both_ways_and_past_padding() -> None:
    made = randomised(Connector(10, ConnectorConfig("encoder", width=16, depth=2, heads=2)))
    x, mask = torch.randn(1, 6, 10), torch.tensor([[False, True, True, True, False, True]])
    y, _ = made(x, mask)
    alone, _ = made(x[:, mask[0]], mask[:, mask[0]])
    torch.testing.assert_close(y[:, mask[0]], alone, atol=1e-5, rtol=1e-4)
    other = x.clone()
    other[0, 5] += 1
    assert (made(other, mask)[0][0, 1] - y[0, 1]).abs().max() > 1e-3
    nothing, _ = made(x, torch.zeros_like(mask))
    assert bool(nothing.isfinite().all())


@torch.no_grad()
def test_heads_read_what_is_real() -> None:
    heads = randomised(Heads(6, 4, HeadsConfig("mlp", width=4, pooled=3)))
    y, mask = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[5], [2]])
    y[1, 3:] = float("nan")
    seq, pooled = heads(y, mask)
    p = heads.state_dict()
    hidden = (y @ p["sequence.0.weight"].T + p["sequence.0.bias"]).relu()
    torch.testing.assert_close(
        seq[mask], (hidden @ p["sequence.2.weight"].T + p["sequence.2.bias"])[mask], atol=1e-6, rtol=1e-5
    )
    assert pooled is not None
    torch.testing.assert_close(pooled[1], y[1, :2].mean(0) @ p["pooled.weight"].T + p["pooled.bias"])
    assert torch.equal(masked_mean(y, mask)[0], y[0].sum(0) / 5)
    zero = Heads(6, 4, HeadsConfig("linear", width=4, pooled=3, zero_init=True))
    seq, pooled = zero(torch.randn(2, 5, 6), mask)
    assert pooled is not None
    assert float(seq.abs().max()) == float(pooled.abs().max()) == 0


@torch.no_grad()
def test_layers_are_mixed() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(Mix(2, 4, "softmax", False)((a, b)), (a + b) / 2)
    made = Mix(2, 4, "softmax", False)
    assert made.weights is not None
    made.weights.copy_(torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(made((a, b)), made.weights.softmax(0)[0] * a + made.weights.softmax(0)[1] * b)
    assert torch.equal(Mix(2, 4, "concat", False)((a, b)), torch.cat((a, b), -1))
    assert Mix(2, 4, "concat", True).width == 8
    assert torch.equal(Mix(1, 4, "last", False)((a,)), a)
    torch.testing.assert_close(
        Mix(2, 4, "softmax", True)((a, 100 * a)), F.rms_norm(a, (4,), eps=1e-5), atol=1e-3, rtol=0
    )
    with pytest.raises(ValueError, match="does not take 2 layers"):
        Mix(2, 4, "last", False)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not an even multiple"):
        ConnectorConfig("encoder", width=9, heads=3)
    with pytest.raises(ValueError, match="at least 1"):
        ConnectorConfig("mlp", depth=0)
    with pytest.raises(ValueError, match="is not the output width"):
        Heads(6, 4, HeadsConfig())
    with pytest.raises(ValueError, match="zero_init needs a head"):
        Heads(6, 6, HeadsConfig(zero_init=True))
    with pytest.raises(ValueError, match="depth of at least 2"):
        Projection("mlp", 3, 4, depth=1)
    with pytest.raises(ValueError, match="square grid of tokens, there are 6"):
        Projection("conv", 3, 4)(torch.randn(1, 6, 3))
