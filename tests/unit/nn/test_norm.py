"""RMSNorm in half precision: fp32 inside, rounded before the weight."""

import torch

from accessory.nn.norm import RMSNorm


def test_half_precision_is_normalised_in_fp32() -> None:
    norm = RMSNorm(576, eps=1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = (3 * torch.randn(2, 7, 576)).bfloat16()
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    assert torch.equal(norm(x), expected)
    narrow = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight
    assert not torch.equal(narrow, expected)  # rounding on the way would show


def test_a_norm_that_trains_in_fp32_returns_the_dtype_of_its_input() -> None:
    norm = RMSNorm(16)
    x = torch.randn(2, 16)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm(x).dtype == torch.float32
