"""The key/value cache: what is written is read back, in order, and limits are errors."""

import pytest
import torch

from accessory.nn.cache import KVCache, Past


def test_append_advance_truncate() -> None:
    cache = KVCache(n_layers=2, batch=1, max_length=5, n_kv_heads=3, head_dim=4)
    k, v = torch.randn(2, 1, 3, 5, 4), torch.randn(2, 1, 3, 5, 4)
    for start, end in ((0, 2), (2, 3), (3, 5)):
        for layer in range(2):
            keys, values = cache.append(layer, k[layer, :, :, start:end], v[layer, :, :, start:end])
            assert torch.equal(keys, k[layer, :, :, :end])
            assert torch.equal(values, v[layer, :, :, :end])
        assert cache.length == start  # every layer writes at the same place
        cache.advance(end - start)
    cache.truncate(1)
    new = torch.randn(1, 3, 1, 4)
    keys, _ = cache.append(0, new, new)
    assert torch.equal(keys, torch.cat((k[0, :, :, :1], new), dim=2))


def test_too_many_positions_are_refused_and_write_nothing() -> None:
    cache = KVCache(1, 1, 3, 1, 2)
    with pytest.raises(ValueError, match="holds 3 positions, 4 are needed"):
        cache.append(0, torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2))
    assert not cache.keys[0].any()


@pytest.mark.parametrize("length", [-1, 1])
def test_truncate_out_of_range(length: int) -> None:
    with pytest.raises(ValueError, match="cannot truncate"):
        KVCache(1, 1, 3, 1, 2).truncate(length)


def test_a_past_is_read_and_not_written() -> None:
    cache = KVCache(n_layers=2, batch=1, max_length=3, n_kv_heads=1, head_dim=4)
    k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    cache.append(1, k, v)
    cache.advance(2)
    before = torch.stack(cache.keys)
    past, new = Past(cache), torch.randn(1, 1, 5, 4, requires_grad=True)  # more than fits the cache
    for _ in range(2):
        keys, values = past.append(1, new, 2 * new)
        past.advance(5)
        assert torch.equal(keys, torch.cat((k, new), 2))
        assert torch.equal(values, torch.cat((v, 2 * new), 2))
    (keys.sum() + values.sum()).backward()
    assert new.grad is not None
    assert torch.equal(new.grad, torch.full_like(new, 3.0))
    assert past.length == cache.length == 2
    assert torch.equal(torch.stack(cache.keys), before)
