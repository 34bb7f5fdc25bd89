"""What the papers and scripts of the published recipes say, and the parameters that their models have by formula."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """A language model by its published numbers."""

    dim: int
    layers: int
    heads: int
    kv: int
    ffn: int
    vocab: int = 32000
    experts: int = 0
    bias: bool = False  # on the projections of attention

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the stream, of keys, of the feed-forward."""
        return self.dim, self.dim // self.heads * self.kv, self.ffn

    def linears(self) -> list[tuple[int, int, bool]]:
        """(in, out, whether it has a bias under five-linear tuning) of every linear of a block."""
        d, k, f = self.widths
        attention = [(d, d, True), (d, k, False), (d, k, False), (d, d, True)]
        return attention + [(d, f, True), (f, d, True), (d, f, True)] * max(1, self.experts)

    @property
    def total(self) -> int:
        """All parameters: tables, blocks with two norms and a router, the last norm."""
        d, k, _ = self.widths
        block = sum(i * o for i, o, _ in self.linears()) + 2 * d + self.experts * d + self.bias * (2 * d + 2 * k)
        return 2 * self.vocab * d + self.layers * block + d

    def biases(self, all_of_them: bool = True) -> int:
        """Of the seven linears, or of those but wk and wv."""
        return self.layers * sum(o for _, o, five in self.linears() if five or all_of_them)

    def norms(self) -> int:
        """Scales of all norms."""
        return (2 * self.layers + 1) * self.dim

    def lora(self, rank: int = 16) -> int:
        """Both halves beside every linear."""
        return self.layers * sum(rank * (i + o) for i, o, _ in self.linears())

    def prefix(self, layers: int, length: int = 10) -> int:
        """Tokens, and a gate for each head."""
        return layers * (length * self.dim + self.heads)


S7 = Size(4096, 32, 32, 32, 11008)
S13 = Size(5120, 40, 40, 40, 13824)
S65 = Size(8192, 80, 64, 64, 22016)
S70 = Size(8192, 80, 64, 8, 28672)
TINY = Size(2048, 22, 32, 4, 5632)
CODE7 = replace(S7, vocab=32016)
CODE34 = Size(8192, 48, 64, 8, 22016)
INTERN = replace(S7, vocab=103168, bias=True)
INTERN2 = Size(4096, 32, 32, 8, 14336, 92544)
MIXTRAL = Size(4096, 32, 32, 8, 14336, experts=8)

# Parameters of the encoders as counted in published files, less what no forward pass reads: CLIP's text half (and, but
# for the adapter, its projection) and the positions of DINOv2's grid of 37 x 37 that one of 16 x 16 has not.
CLIP_TEXT = 49408 * 768 + 77 * 768 + 768 * 768 + 2 * 768 + 1
CLIP = 342_562_049 - CLIP_TEXT
DINO = 1_136_480_768 - (37 * 37 - 16 * 16) * 1536
CONVNEXT, QFORMER = 843_398_016, 1_091_114_496
TWO = CONVNEXT + DINO
FOUR = TWO + CLIP - 1024 * 768 + QFORMER


# OpenCLIP's ViT-H/14, which ImageBind sees with: stem and norms, 32 blocks, projection.
CLIP_H = 1280 * (3 * 14 * 14 + 1 + 257 + 4) + 32 * (12 * 1280**2 + 13 * 1280) + 1280 * 1024


def joint(dim: int, *widths: int) -> int:
    """Linear and LayerNorm for each width, the vectors around a view, and ours for a blank one."""
    return sum(width * dim + 3 * dim for width in widths) + 3 * dim


def bind(dim: int, width: int = 16384, depth: int = 3) -> int:
    """ImageBind-LLM's way from a vector of 1024 numbers to one token."""
    return 1024 * dim + dim + depth * (dim + 3 * dim * width)


def resampler(dim: int, length: int, depth: int, width: int = 768) -> int:
    """LLaMA-Adapter's way from CLIP's 768 numbers to prefix tokens."""
    block = 12 * width**2 + 9 * width + 4 * width  # matrices, their biases, two norms
    return depth * block + 768 * width + 3 * width + length * width + width * dim + 3 * dim


@dataclass(frozen=True)
class Recipe:
    """``rows`` of an epoch, ``epochs`` and those of warm-up, rows of an update over all ranks, learning rates, weight
    decay, clipping, length; ``own``: trained parameters, ``rest``: frozen ones. ``whole``: the rows are those of the
    data configuration."""

    rows: int
    epochs: float
    warm: float
    batch: int
    lr: float
    low: float
    decay: float
    clip: float | None
    length: int
    own: int
    rest: int = 0
    whole: bool = True


def _text() -> dict[str, Recipe]:
    full = Recipe(52_002, 4, 0.04, 256, 2e-5, 0, 0, 2, 512, S7.total)
    peft = replace(full, warm=1, batch=64, lr=5e-5, low=5e-6, decay=0.02, own=S7.biases() + S7.norms(), rest=0)
    peft = replace(peft, rest=S7.total - S7.norms())
    lora, adapter = S7.lora() + peft.own, S7.prefix(30) + S7.biases(False) + S7.norms()
    hub = replace(peft, rows=6_190, epochs=10, warm=2, batch=48, lr=1e-3)
    talk = replace(full, rows=94_145, epochs=3, length=2048)
    long = replace(talk, length=4096)
    half = replace(talk, epochs=4, warm=0.5, lr=3e-5, low=5e-6, decay=0.02)
    start = Recipe(25_000 * 512, 1, 5_000 / 400_000, 512, 1e-4, 1e-5, 0.02, 2, 2048, S7.total, whole=False)
    sparse = replace(full, rows=319_137, epochs=1, warm=0.1, batch=128, lr=5e-6, length=4096, own=MIXTRAL.total)
    added = MIXTRAL.lora() + MIXTRAL.biases()
    return {
        "alpaca": full,
        "alpaca_bias_norm": peft,
        "alpaca_lora": replace(peft, own=lora),
        "alpaca_qlora": replace(peft, own=lora),
        "alpaca_adapter": replace(peft, own=adapter),
        "alpaca_internlm": replace(full, epochs=3, own=INTERN.total),
        "gorilla": replace(full, rows=6_190, epochs=3),
        "gorilla_bias_norm": hub,
        "gorilla_lora": replace(hub, own=lora),
        "gorilla_adapter": replace(hub, own=adapter),
        "sharegpt": talk,
        "sharegpt_13b": replace(talk, own=S13.total),
        "sharegpt_70b": replace(long, batch=128, own=S70.total),
        "sharegpt_lora": replace(peft, rows=94_145, length=4096, own=lora),
        "ultrachat": replace(long, rows=1_468_352),
        "moss": replace(long, rows=1_160_000),
        "wizardlm": replace(long, rows=143_000),
        "wizardcode": replace(long, rows=111_272, own=CODE7.total),
        "wizardcode_34b": replace(talk, rows=111_272, batch=32, own=CODE34.total),
        "lima": replace(half, rows=1_030),
        "flan": replace(half, rows=1_340_000, length=4096),
        "platypus": replace(talk, rows=24_926, batch=128),
        "platypus_qlora_70b": replace(
            half, rows=24_926, warm=1, batch=32, length=512, own=S70.biases() + S70.norms(),
            rest=S70.total - S70.norms(),
        ),
        "pretrain": start,
        "pretrain_13b": replace(start, rows=25_000 * 256, batch=256, own=S13.total),
        "mixtral": sparse,
        "mixtral_sparse": sparse,
        "mixtral_lora": replace(sparse, batch=256, lr=2e-5, own=added, rest=MIXTRAL.total),
    }  # fmt: skip


def _adapters() -> dict[str, Recipe]:
    v1 = Recipe(52_002, 5, 2, 32, 9e-3 * 32 / 256, 0, 0.02, None, 512, S7.prefix(30), S7.total)
    seen = S7.total + CLIP
    pairs = 1_164_308_000
    first = replace(
        v1, rows=pairs, epochs=3, warm=0.1, lr=1e-4 * 32 / 256, decay=0.05, length=96, rest=seen,
        own=S7.prefix(31) + resampler(4096, 10, 8),
    )  # fmt: skip
    added = S7.biases(False) + S7.norms()
    bound = replace(first, own=S7.prefix(32, 1) + bind(4096), rest=S7.total + CLIP_H)
    second = replace(
        first, rows=309_990, epochs=4, warm=1, lr=1e-3 * 32 / 256, decay=0.02, length=512, own=added,
        rest=first.own + seen - S7.norms(),
    )  # fmt: skip
    both = replace(v1, rows=618_749, own=S7.prefix(31) + S7.prefix(1, 20) + resampler(4096, 20, 2))
    return {
        "adapter_v1": v1,
        "adapter_v1_caption": replace(v1, rows=566_747, own=v1.own + resampler(4096, 10, 2, 512), rest=seen),
        "adapter_v2_pretrain": first,
        "adapter_v2_finetune": second,
        "adapter_v2_finetune_lora": replace(second, own=S7.lora() + added),
        "adapter_v2_joint": replace(both, own=both.own + 2 * S7.biases() + S7.norms(), rest=seen - S7.norms()),
        "adapter_v2_chat65b": replace(
            second, rows=80_000, length=2048, own=2 * S65.biases() + S65.norms(), rest=S65.total - S65.norms(),
            whole=False,
        ),
        "imagebind_pretrain": bound,
        "imagebind_finetune": replace(second, own=S7.lora() + added, rest=bound.own + bound.rest - S7.norms()),
        "adapter_accessory_pretrain": replace(first, own=first.own + 31),
        "adapter_accessory": Recipe(
            653_471, 3, 0.2, 256, 5e-5, 5e-6, 0.02, 2, 512, S7.lora() + added, second.rest + 31
        ),
    }  # fmt: skip


def _pictures() -> dict[str, Recipe]:
    caption = Recipe(
        1_163_741_000,
        1,
        312 * 512 / 1_163_741_000,
        512,
        1e-4,
        1e-5,
        0.02,
        2,
        512,
        S13.total + joint(5120, 768),
        QFORMER,
    )
    tuned = replace(caption, rows=209_714, epochs=3, warm=0.2, batch=32, lr=3e-5, low=5e-6)
    peft = replace(
        tuned, batch=128, lr=5e-5, own=S13.lora() + S13.biases() + S13.norms() + joint(5120, 768),
        rest=S13.total - S13.norms() + QFORMER,
    )  # fmt: skip
    small = S7.total + joint(4096, 768)
    first = Recipe(
        10**9, 1, 312 * 512 / 1e9, 512, 1e-4, 1e-5, 0.02, 2, 2048, S13.total + joint(5120, 768, 5632), FOUR, whole=False
    )
    second = replace(first, rows=2_800_000, warm=0.03, batch=128, lr=2e-5, low=0, decay=0, clip=8)
    plain = replace(second, rows=15_290_000, warm=0.01, batch=256, length=4096, rest=TWO, whole=True)
    moe = replace(plain, lr=5e-6, own=MIXTRAL.total + joint(4096, 4608))
    released = replace(moe, own=MIXTRAL.total + joint(4096, 768, 5632), rest=FOUR)
    plus = replace(plain, own=S13.total + joint(5120, 4608))
    return {
        "qformer_caption": caption,
        "qformer_caption_7b": replace(caption, own=small),
        "qformer": tuned,
        "qformer_7b": replace(tuned, own=small),
        "qformer_lora": peft,
        "qformer_qlora": peft,
        "sphinx_stage1": first,
        "sphinx_stage1_coco": first,
        "sphinx_stage2": second,
        "sphinx_1k": replace(second, length=3072),
        "sphinx_2k": replace(second, length=4096),
        "sphinx_imagenet": replace(second, rows=1_281_167, whole=True),
        "sphinx_x_tiny": replace(plain, length=2048, own=TINY.total + joint(2048, 4608)),
        "sphinx_x_intern2": replace(plain, own=INTERN2.total + joint(4096, 4608)),
        "sphinx_x_plus": plus,
        "sphinx_x_plus_2k": plus,
        "sphinx_x_moe": moe,
        "sphinx_moe": released,
        "sphinx_moe_1k": released,
    }


RECIPES = {**_text(), **_adapters(), **_pictures()}
"""By the name of the file."""

# Positions of a square picture and of one twice as wide as high.
POSITIONS = {
    "adapter_v1_caption": (0, 0), "adapter_v2_pretrain": (0, 0), "qformer": (34, 34), "qformer_lora": (34, 34),
    "sphinx_stage2": (291, 291), "sphinx_1k": (1455, 1455), "sphinx_2k": (2910, 2910), "sphinx_imagenet": (1455, 1455),
    "sphinx_x_tiny": (1295, 779), "sphinx_x_intern2": (1295, 779), "sphinx_x_plus": (1295, 779),
    "sphinx_x_plus_2k": (2590, 1816), "sphinx_x_moe": (1295, 779), "sphinx_moe": (291, 291),
    "sphinx_moe_1k": (1455, 1455),
}  # fmt: skip

DOMAINS = {
    "dialogue": 1800, "mathematics": 600, "code": 80, "detection": 4900, "pose": 300, "classification": 1000,
    "grounding": 1000, "VQA": 700, "captions": 500, "instructions": 400, "OCR": 3000, "layout and text spotting": 1000,
    "set-of-mark": 10,
}  # fmt: skip
"""Thousands of rows of SPHINX-X by domain (arXiv 2402.05935)."""
