"""The key/value cache: an argument of the forward, never state of a layer."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values, (B, K, S, A) for every layer, allocated once for S positions.

    A forward writes its T new positions with :meth:`append`, layer by layer, and :meth:`advance` moves the end once.
    :meth:`truncate` forgets the newest positions, so that a chat can drop the tail that it does not share with the
    next turn. ``context`` (B, M, D): the visual prefix that the positions were read with, for those that follow; the
    backbone notes it here, and it is forgotten with the first position.
    """

    context: Tensor | None = None

    def __init__(
        self,
        n_layers: int,
        batch: int,
        max_length: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, n_kv_heads, max_length, head_dim)
        # One buffer a layer: in a compiled step, writing one layer of a joint buffer copies it all. Ordinary tensors
        # also in inference mode, because a step compiled for the one kind would be compiled again for the other.
        with torch.inference_mode(False):
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.length = 0

    @classmethod
    def over(cls, keys: list[Tensor], values: list[Tensor], length: int) -> "KVCache":
        """A cache of ``length`` positions over existing buffers (B, K, S, A), which it shares."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.length = keys, values, length
        return cache

    @property
    def max_length(self) -> int:
        """Positions that fit."""
        return self.keys[0].shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, A) after the cached positions of ``layer``; return all so far, (B, K, length + T, A).

        Raises:
            ValueError: when the positions do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {end} are needed")
        # View by view: an index of three parts costs several times as much, for every layer and token.
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, n: int) -> None:
        """Make the last ``n`` appended positions permanent."""
        self.length += n

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length
        if length == 0:
            self.context = None


class Past(KVCache):
    """A cache that is read, not written: what one forward appends is seen by that forward alone, with its gradients.

    Many continuations can look at one past, and training can keep the past of a frozen model without its graph.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.length = cache.keys, cache.values, cache.length
        self.context = cache.context

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The cached positions of ``layer`` with (B, K, T, A) behind them; nothing is kept."""
        keys, values = (t[layer].narrow(2, 0, self.length) for t in (self.keys, self.values))
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)

    def advance(self, n: int) -> None:
        """Nothing to make permanent."""
