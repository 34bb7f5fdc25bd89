"""Faster inference with the same forward: products are packed for the CPU and fused where they share an input; on
request single tokens take a compiled step.

Nothing else changes: slots of the existing layers are filled, and every tuning method (LoRA, bias, scale, prefix)
keeps working on top. Measured by ``benchmarks/generate.py``.
"""

import torch
from torch import nn

from accessory.backbone.compiled import CompiledStep
from accessory.backbone.llama import Llama
from accessory.nn.attention import Attention
from accessory.nn.packed import Packed
from accessory.nn.packing import pack, packed, unpack


@torch.no_grad()
def accelerate(model: Llama, compile: bool = False) -> Llama:
    """Fill the inference slots of ``model`` in place, and return it; its state dict does not change.

    Costs a second copy of the weights of the blocks and of the output table; quantised ones are re-ordered in place for
    this machine's kernels, which costs nothing. The copies are used only while gradients
    are off; a weight that is replaced or written later is noticed and its layer computes from the weight itself until
    :func:`accelerate` is called again. Weights of classes other than :class:`Linear` (tensor parallel) are
    left alone. ``compile``: also decode single sequences by a compiled step, see
    :class:`accessory.backbone.compiled.CompiledStep`; the first answer waits for the compiler. Call :func:`release`
    before moving the model to another device or dtype.
    """
    pack(model, Attention)
    table = model.tok_embeddings
    if model.output is not None:
        model.output.kernel = packed(model.output) or model.output.kernel
    elif isinstance(table, nn.Embedding):
        model.output_kernel = Packed((table.weight,))
    model.step = CompiledStep() if compile else None
    return model


def accelerate_for_cpu(model: Llama) -> Llama:
    """:func:`accelerate` where it pays, which is bf16 on a CPU; any other model is returned as it is."""
    like = model.like
    return accelerate(model) if like.device.type == "cpu" and like.dtype == torch.bfloat16 else model


def release(model: Llama) -> Llama:
    """Empty what :func:`accelerate` filled, in place, and give its memory back."""
    unpack(model, Attention)
    model.output_kernel = model.step = None
    return model
