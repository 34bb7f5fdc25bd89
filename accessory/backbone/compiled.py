"""One decoding step as one compiled graph: the model's own forward, traced for one token of one sequence.

The step is bound by reading the weights; compiled, the norms, rotations, gates and cache writes between the products
cost next to nothing, and a product of one vector is a loop at memory speed. Nothing is rewritten: what is compiled is
:meth:`Llama.forward`. Filled by :func:`accessory.backbone.fast.accelerate`, used by ``backbone/generate.py``.
"""

import torch
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.log import get
from accessory.nn.attention import Attention
from accessory.nn.block import Block
from accessory.nn.cache import KVCache
from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.norm import RMSNorm
from accessory.nn.packed import Packed
from accessory.nn.quantized import Int4, Int8, QuantizedTable

# Anything else in the model (a delta, a prefix, NF4 or sharded layers) means the ordinary forward.
_KNOWN = (
    Llama,
    nn.ModuleList,
    nn.Embedding,
    Block,
    Attention,
    FeedForward,
    RMSNorm,
    Linear,
    Packed,
    Int8,
    Int4,
    QuantizedTable,
)

_log = get(__name__)


class CompiledStep:
    """The slot ``Llama.step``: scores of the next token for one row, compiled at the first use.

    Compiling takes tens of seconds for a model of 30 blocks, and less in a later process because torch keeps what it
    compiled on disk. Where it fails (no C++ compiler, say) one line is logged and ``broken`` is set.
    """

    def __init__(self) -> None:
        self.broken = False
        # torch would check every module of the model again at every token, which costs a tenth of the step; ``key``
        # stands for all of that, and is made once an answer.
        trusted = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        self._run = torch.compile(_step, fullgraph=True, options={"guard_filter_fn": trusted})

    def key(self, model: Llama) -> str | None:
        """Everything the graph depends on besides numbers, or None where the ordinary forward must run.

        Weights are inputs of the graph: writing or replacing them needs no new key.
        """
        modules = list(model.modules())
        if self.broken or any(type(m) not in _KNOWN or m._forward_pre_hooks or m._forward_hooks for m in modules):
            return None
        if any(p.device.type != "cpu" for p in model.parameters()):
            return None
        parameters = [(n, tuple(p.shape), p.dtype, p.is_inference()) for n, p in model.named_parameters()]
        buffers = [(n, tuple(b.shape), b.stride(), b.dtype, b.is_inference()) for n, b in model.named_buffers()]
        packed = [n for n, m in model.named_modules() if isinstance(m, Int4) and m.packed]
        return repr((model.config, torch.get_num_threads(), parameters, buffers, packed))

    def covers(self, model: Llama, ids: Tensor, cache: KVCache) -> bool:
        """Whether the step may feed ``ids`` (B, 1): one row, no gradients, room behind it, and no window in reach."""
        end, window = cache.length + 1, model.config.window
        # A cache that the new position fills to the brim would be compiled anew: its length and its room are one.
        fits = 1 < end < cache.max_length and (window is None or end <= window)
        return fits and ids.shape == (1, 1) and not self.broken and not torch.is_grad_enabled()

    def __call__(self, key: str, model: Llama, ids: Tensor, cache: KVCache) -> Tensor | None:
        """Scores (1, 1, V) after ``ids`` (1, 1), whose position is then in the cache; None (and nothing) on failure."""
        if not hasattr(cache.keys[0], "_dynamo_dynamic_indices"):
            for buffer in (*cache.keys, *cache.values):
                torch._dynamo.mark_dynamic(buffer, 2)
        # The length travels as a shape: an integer would be compiled once as a constant and once more as a variable.
        length = torch.empty(cache.length + 1, dtype=torch.bool)
        torch._dynamo.mark_dynamic(length, 0)
        try:
            scores = self._run(key, model, ids, cache.keys, cache.values, length)
        except Exception as error:  # whatever torch or a C++ compiler raises: the ordinary forward still works
            self.broken = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning("decoding runs uncompiled, because compiling failed: %s", reason)
            return None
        cache.advance(1)
        return scores


def _step(key: str, model: Llama, ids: Tensor, keys: list[Tensor], values: list[Tensor], length: Tensor) -> Tensor:
    """What is compiled; ``length`` has as many elements as there are positions with the new one."""
    assert {key: True}[key]  # a value that is not looked at would not be guarded, and models would share a graph
    cache = KVCache.over(keys, values, length.shape[0] - 1)
    return model.logits(model(model.embed(ids), cache=cache))
