"""Small files of LLaMA-Adapter, and what they compute by its formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.models import build, published_keys
from accessory.models.adapter_release import Found, lay_over, spelled
from accessory.models.published import RELEASES
from accessory.models.published_keys import Tuned, release
from accessory.models.reference import assemble
from accessory.nn.rope import rotate, table
from accessory.vision import presets
from accessory.vision.towers import TowerConfig

CLIP = {"embed_dim": 12, "vision_cfg": {"layers": 1, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}}
SMALL = LlamaConfig(dim=32, n_layers=3, n_heads=4, vocab_size=360, multiple_of=16, max_length=300)
FULL = Tuned(bias=True, norm=True, rank=2, new_gate=True)
FORMS = {
    "adapter_v1": Tuned(),
    "adapter_v1_caption": Tuned(),
    "adapter_v2": FULL,
    "adapter_v2_chat65b": Tuned(),
    "imagebind_llm": replace(FULL, new_gate=False),
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """The releases with two of three blocks adapted, narrow visual blocks, and a CLIP of 17 tokens."""
    options = {"config": CLIP, "activation": "quick_gelu", "projected": True}
    for name in ("clip-l-projected", "clip-h-projected"):
        monkeypatch.setitem(presets.PRESETS, name, TowerConfig("open_clip", "tiny", 32, options))
    for kind, row in RELEASES.items():
        form = row.adapter
        assert form is not None
        form = replace(
            form,
            layers=min(form.layers, 3 if kind == "imagebind_llm" else 2),
            length=min(form.length, 4),
            features=12,
            blocks=(32, form.blocks[1] // 2 or 1) if form.blocks else None,
            bind=(48, 2) if form.bind else None,
        )
        monkeypatch.setitem(RELEASES, kind, replace(row, adapter=form, image_size=32))


def filled(shapes: published_keys.Shapes, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(s, generator=generator) * (1.0 if "gate" in k or "_query" in k else 0.2)
        for k, s in shapes.items()
    }


def clip(seed: int = 2) -> dict[str, Tensor]:
    """A file of CLIP: the half that sees, and something of the other."""
    state = presets.build("clip-l-projected").get_submodule("model").state_dict()
    state = filled({f"visual.{k}": tuple(v.shape) for k, v in state.items()}, seed)
    return state | {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.ones(24)}


def parts(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LLaMA and the release's tensors."""
    torch.manual_seed(0)
    base = {k: v.detach() for k, v in Llama(SMALL).state_dict().items()}
    return base, filled(release(kind, SMALL, FORMS[kind]))


def laid(kind: str, change: Callable[[dict[str, Tensor]], object] | None = None, gate: Any = None) -> build.MLLM:
    """The network of a release, after a change to its file."""
    base, state = parts(kind)
    if change is not None:
        change(state)
    sees = {k.removeprefix("clip."): v for k, v in clip().items() if k.startswith("visual.")}
    state = {spelled(k): v for k, v in state.items()}  # as reading leaves it
    published = lay_over(SMALL, base, Found(state, {}, sees if RELEASES[kind].tower else {}), kind, gate)
    tower = presets.build("clip-l-projected") if RELEASES[kind].tower else None
    return assemble(published, tower)


@torch.no_grad()
def scores(net: build.MLLM) -> Tensor:
    ids = torch.tensor([[1, 7, 20, 33, 5, 9]])
    tiles = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)) if net.tower is not None else None
    context = None
    if tiles is not None:
        assert net.tower is not None
        assert net.resampler is not None
        context = net.resampler(net.tower(tiles).sequence())
    return net.logits(net(ids, context=context))


class Plain:
    """LLaMA-Adapter by its formulas, straight from the tensors of a file; nothing of this project's slots."""

    def __init__(self, base: dict[str, Tensor], state: dict[str, Tensor], kind: str, raw: bool = False) -> None:
        form = RELEASES[kind].adapter
        assert form is not None
        self.form, self.raw = form, raw
        self.w = base | {k.removeprefix("llama."): v for k, v in state.items()}

    def linear(self, x: Tensor, at: str, name: str) -> Tensor:
        w, key = self.w, f"{at}.{name}"
        y = F.linear(x * w.get(f"{key}_scale", torch.ones(1)), w[f"{key}.weight"])
        y = y + w.get(f"{key}.bias", w.get(f"{key}_bias", torch.zeros(1)))
        low = f"{at}.lora_{name}_l"
        if f"{low}1.weight" in w:
            y = y + F.linear(F.linear(x, w[f"{low}1.weight"]), w[f"{low}2.weight"])
        return y

    def attention(self, x: Tensor, i: int, seen: Tensor | float) -> Tensor:
        w, at, t = self.w, f"layers.{i}.attention", x.shape[1]

        def split(y: Tensor) -> Tensor:
            return y.view(1, -1, SMALL.n_heads, SMALL.head_width)

        q, k, v = (split(self.linear(x, at, n)) for n in ("wq", "wk", "wv"))
        turn = table(torch.arange(t)[None], SMALL.head_width, SMALL.rope_theta)
        q, k, v = rotate(q, turn).transpose(1, 2), rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
        scores = q @ k.transpose(2, 3) / SMALL.head_width**0.5
        scores = scores + torch.full((t, t), float("-inf")).triu(1)
        y = scores.softmax(-1) @ v
        first = SMALL.n_layers - self.form.layers
        if self.form.layers and i >= first:
            tokens = w[f"{self.form.tokens}.weight"].view(self.form.layers, 1, self.form.length, -1)[i - first] + seen
            # of the weights alone: neither LoRA nor a bias
            k, v = (split(F.linear(tokens, w[f"{at}.{n}.weight"])).transpose(1, 2) for n in ("wk", "wv"))
            gate = w[f"{at}.{self.form.gate}"]
            gate = (gate if self.raw else gate.tanh()) * w.get(f"{at}.new_gate", torch.ones(1))
            y = y + gate * ((q @ k.transpose(2, 3) / SMALL.head_width**0.5).softmax(-1) @ v)
        return self.linear(y.transpose(1, 2).flatten(2), at, "wo")

    def __call__(self, seen: Tensor | float) -> Tensor:
        w = self.w
        x = w["tok_embeddings.weight"][torch.tensor([[1, 7, 20, 33, 5, 9]])]

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, (SMALL.dim,), w[f"{name}.weight"], SMALL.norm_eps)

        for i in range(SMALL.n_layers):
            x = x + self.attention(norm(x, f"layers.{i}.attention_norm"), i, seen)
            y, at = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
            x = x + self.linear(F.silu(self.linear(y, at, "w1")) * self.linear(y, at, "w3"), at, "w2")
        return F.linear(norm(x, "norm"), w["output.weight"])
