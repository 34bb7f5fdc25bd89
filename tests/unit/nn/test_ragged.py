"""Sequences that share a row are computed as if each had one of its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.nn import ragged
from accessory.nn.attention import attend
from accessory.nn.ragged import Ragged
from accessory.peft.attach import PrefixSpec, attach
from tests.tiny import disturb

LENGTHS = {
    "mixed": [3, 40, 1, 12, 11, 3],
    "sorted": [2, 2, 14, 14, 14],  # whose groups lie as they are
    "one": [7],
}


def layout(lengths: list[int]) -> Ragged:
    return Ragged.of(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_every_sequence_alone(name: str, dtype: torch.dtype) -> None:
    lengths = LENGTHS[name]
    rows = layout(lengths)
    assert (rows.order is None) == (name != "mixed")
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(1, h, n, 8, generator=g).to(dtype).requires_grad_() for h in (6, 2, 2))
    out = attend(q, k, v, rows)
    alone = torch.cat([attend(*p, None) for p in zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)], 2)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, alone, rtol=0, atol=tolerance)
    weight = torch.randn(out.shape, generator=g).to(dtype)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (out, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * tolerance)
    if name != "one":  # and it matters: a row without borders attends elsewhere
        assert float((attend(q, k, v, None) - out).detach().abs().max()) > 0.1


def test_positions_and_places() -> None:
    rows = layout([2, 3, 1])
    assert rows.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    padded = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]])
    assert rows.flat(padded).tolist() == [[1, 2, 3, 4, 5, 6]]
    at = rows.at(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]))
    assert rows.flat(padded)[0, at].tolist() == [2, 5, 6]
    for bad in ([[True, False], [False, False]], [[False, True], [True, True]]):
        with pytest.raises(ValueError, match="right-padded and not empty"):
            Ragged.of(torch.tensor(bad))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("context", [False, True])
def test_the_backbone_reads_each_alone(window: int | None, context: bool) -> None:
    torch.manual_seed(0)
    net = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=20, window=window))
    attach(net, [PrefixSpec(length=3)])
    disturb(net, 0.2)
    rows, x = layout(LENGTHS["mixed"]), torch.randn(6, 40, 32)
    tokens = torch.randn(6, 3, 32) if context else None

    def states(rows: Ragged) -> Tensor:
        return net(rows.flat(x), mask=rows, context=tokens)[0]

    found = states(rows)
    alone = [
        net(x[i : i + 1, :n], context=None if tokens is None else tokens[i : i + 1])[0]
        for i, n in enumerate(rows.lengths)
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="without a cache"):
        net(rows.flat(x), mask=rows, cache=net.cache(1, 99))
    # And it matters: what precedes a sequence in its row, its place there and its own context do.
    joined = net(rows.flat(x), context=None if tokens is None else tokens[:1])[0]
    assert float((joined - found)[3:].detach().abs().max()) > 0.05
    if tokens is not None:
        tokens = tokens.roll(1, 0)
        assert float((states(rows) - found).detach().abs().max()) > 0.05


def test_compiled_blocks_take_a_layout() -> None:
    torch.manual_seed(0)
    net = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=20))
    rows, x = layout(LENGTHS["mixed"]), torch.randn(6, 40, 32)
    plain = net(rows.flat(x), mask=rows)
    for block in net.layers:
        block.compile(dynamic=True, backend="eager")  # as training compiles them, without a code generator
    torch.testing.assert_close(net(rows.flat(x), mask=rows), plain, rtol=0, atol=1e-6)
    other = layout([5, 9])
    assert net(other.flat(x[:2, :9]), mask=other).shape == (1, 14, 32)


def test_flash_attention_gets_the_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; a stand-in for it computes what it documents."""
    lengths = LENGTHS["mixed"]
    rows = layout(lengths)

    def standing_in(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, m: int, n: int, causal: bool) -> Tensor:
        assert causal
        assert m == n == max(lengths)
        assert torch.equal(a, b)
        assert a.dtype == torch.int32
        ends = a.tolist()
        assert len(q) == ends[-1]
        parts = [
            attend(*(t[i:j].transpose(0, 1)[None] for t in (q, k, v)), None)[0].transpose(0, 1)
            for i, j in pairwise(ends)
        ]
        return torch.cat(parts)

    class OnCuda(Tensor):
        """A tensor that says it is on a GPU."""

        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

    q, k, v = (torch.randn(1, h, sum(lengths), 8).bfloat16() for h in (6, 2, 2))
    monkeypatch.setattr(ragged, "flash_attention", lambda: standing_in)
    assert rows.flash(q, k, v) is None  # on a CPU
    found = rows.flash(q.as_subclass(OnCuda), k, v)
    assert found is not None
    torch.testing.assert_close(found.as_subclass(Tensor), attend(q, k, v, rows), rtol=0, atol=2e-2)
    assert rows.masked(lambda _, t: torch.ones(1, 1, t, t).bool()).flash(q.as_subclass(OnCuda), k, v) is None
    monkeypatch.setattr(ragged, "flash_attention", lambda: None)
    assert rows.flash(q.as_subclass(OnCuda), k, v) is None
