"""The zero-init prefix of LLaMA-Adapter (Zhang et al. 2023, section 3.2), V1 and V2."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from accessory.nn.attention import Attention, attend

Gate = Literal["tanh", "raw"]


class ZeroInitPrefix(nn.Module):
    """``gate * softmax(q k_p^T / sqrt(A)) v_p``: attention to P learned tokens with a softmax of its own.

    The tokens go raw (no norm) through the layer's own ``wk`` and ``wv``, with whatever hangs on those, and their keys
    are not rotated. The gate is one number per query head, through tanh or raw, and starts at zero: a fresh prefix
    changes nothing. ``new_gate`` adds one more factor for the whole layer, starting at one. ``sees`` False: the tokens
    stay as they are, whatever the context. Tensor parallelism sets ``between``, through which that factor comes to the
    heads of this rank.

    One token is ImageBind-LLM's attention-free form: its softmax is 1, so that ``gate * wv(token)`` is added.
    """

    new_gate: nn.Parameter | None
    between: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        n_heads: int,
        head_dim: int,
        dim: int,
        length: int,
        gate: Gate = "tanh",
        new_gate: bool = False,
        init_std: float = 1.0,
        sees: bool = True,
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"prefix length must be at least 1, got {length}")
        if gate not in ("tanh", "raw"):
            raise ValueError(f"prefix gate must be 'tanh' or 'raw', got {gate!r}")
        self.head_dim = head_dim
        self.tanh, self.sees = gate == "tanh", sees
        self.tokens = nn.Parameter(torch.randn(length, dim) * init_std)
        self.gate = nn.Parameter(torch.zeros(n_heads))
        self.register_parameter("new_gate", nn.Parameter(torch.ones(1)) if new_gate else None)
        # Whether the tokens meet the weights of wk and wv alone, without what hangs on those (LoRA): so LLaMA-Adapter's
        # own files, while LLaMA2-Accessory's have all of it.
        self.plain = False

    def forward(self, q: Tensor, attention: Attention, context: Tensor | None) -> Tensor:
        """Attend from rotated queries (B, H, T, A) to the prefix; returns (B, H, T, A) in the dtype of ``q``.

        ``context``: (B, P, D) per-row tokens added to the prefix, e.g. visual ones from a resampler.

        Raises:
            ValueError: when ``context`` has another number of tokens than the prefix.
        """
        tokens = self.tokens.to(q.dtype)[None]
        if context is not None and self.sees:
            if context.shape[1] != tokens.shape[1]:
                raise ValueError(f"context has {context.shape[1]} tokens, the prefix has length {tokens.shape[1]}")
            tokens = tokens + context.to(q.dtype)
        # (1 or B, P, K * A) -> (B, K, P, A)
        wk, wv = (attention.wk.plain, attention.wv.plain) if self.plain else (attention.wk, attention.wv)
        k = attention.heads(wk(tokens)).transpose(1, 2).expand(q.shape[0], -1, -1, -1)
        v = attention.heads(wv(tokens)).transpose(1, 2).expand(q.shape[0], -1, -1, -1)
        # Every query sees every prefix token; the mask says so, because None would mean causal here.
        everything = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
        gate = self.gate.float().tanh() if self.tanh else self.gate.float()
        if self.new_gate is not None:
            factor = self.new_gate.float()
            gate = gate * (factor if self.between is None else self.between(factor))
        return attend(q, k, v, everything) * gate.to(q.dtype)[:, None, None]
