"""Faster inference with the same forward: products are packed for the CPU and fused where they share an input; on
request single tokens take a compiled step.

Nothing else changes: slots of the existing layers are filled, and every tuning method (LoRA, bias, scale, prefix)
keeps working on top. Measured by ``benchmarks/generate.py``.
"""

import torch

from accessory.backbone.compiled import CompiledStep
from accessory.backbone.llama import Llama
from accessory.nn.attention import Attention
from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.packed import Packed


@torch.no_grad()
def accelerate(model: Llama, compile: bool = False) -> Llama:
    """Fill the inference slots of ``model`` in place, and return it; its state dict does not change.

    Costs a second copy of the weights of the blocks and of the output table. The copies are used only while gradients
    are off; a weight that is replaced or written later is noticed and its layer computes from the weight itself until
    :func:`accelerate` is called again. Weights of classes other than :class:`Linear` (tensor parallel, quantised) are
    left alone. ``compile``: also decode single sequences by a compiled step, see
    :class:`accessory.backbone.compiled.CompiledStep`; the first answer waits for the compiler. Call :func:`release`
    before moving the model to another device or dtype.
    """
    for module in list(model.modules()):
        if isinstance(module, Attention) and _plain(module.wq, module.wk, module.wv):
            module.fused = Packed((module.wq.weight, module.wk.weight, module.wv.weight))
            module.wo.kernel = _packed(module.wo)
        elif isinstance(module, FeedForward) and _plain(module.w1, module.w3):
            module.fused = Packed((module.w1.weight, module.w3.weight))
            module.w2.kernel = _packed(module.w2)
    if model.output is not None:
        model.output.kernel = _packed(model.output)
    else:
        model.output_kernel = Packed((model.tok_embeddings.weight,))
    model.step = CompiledStep() if compile else None
    return model


def accelerate_for_cpu(model: Llama) -> Llama:
    """:func:`accelerate` where it pays, which is bf16 on a CPU; any other model is returned as it is."""
    table = model.tok_embeddings.weight
    return accelerate(model) if table.device.type == "cpu" and table.dtype == torch.bfloat16 else model


def release(model: Llama) -> Llama:
    """Empty what :func:`accelerate` filled, in place, and give its memory back."""
    for module in model.modules():
        if isinstance(module, Attention | FeedForward):
            module.fused = None
        elif isinstance(module, Linear):
            module.kernel = None
    model.output_kernel = model.step = None
    return model


def _plain(*linears: object) -> bool:
    return all(type(linear) is Linear for linear in linears)


def _packed(linear: Linear) -> Packed | None:
    return Packed((linear.weight,)) if _plain(linear) else None
