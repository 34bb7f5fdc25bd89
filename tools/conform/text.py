"""The text side: LLaMA, its adapters and its tuned variants."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.llama import Llama, attention_mask
from accessory.backbone.reference import from_reference, rename
from accessory.nn.feed_forward import FeedForward, ffn_width
from accessory.nn.rope import table
from accessory.peft.attach import attach, trainable_state
from tools.conform.comparison import Comparison, Handler, UnsupportedError

TEXT = {f"accessory.model.LLM.{kind}.Transformer": kind for kind in ("llama", "llama_adapter", "llama_peft")}


def text_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Cases 01 to 03 without images: training forward, intermediates, cached inference, trainable names."""
    kind = TEXT[config["reference_class"]]
    if config.get("with_visual"):
        raise UnsupportedError("needs the reference's vision tower")
    weights, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    llama_config, specs, state = from_reference(weights, config["args"], kind)
    model = Llama(llama_config).eval()
    if specs:
        attach(model, specs)
    model.load_state_dict(state)
    tokens = io.pop("in.tokens")
    training_forward(model, tokens, io, c)
    c.tensor("infer_logits", cached(model, tokens, config["infer_schedule"]), io.pop("out.infer_logits"))
    for name in [n for n in io if n.startswith("out.causal_mask_")]:
        query, key = map(int, name.removeprefix("out.causal_mask_").split("x"))
        mask = attention_mask(torch.ones(1, key, dtype=torch.bool), key - query, query, None, tokens.device)
        assert mask is not None
        c.tensor(name.removeprefix("out."), mask[0, 0], io.pop(name))
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")
    if specs:
        names = config["trainable"] if "trainable" in config else config["trainable_by_mode"]["sg"]
        theirs = rename({name: weights[name] for name in names}, llama_config.n_layers)
        c.equal("trainable names", sorted(trainable_state(model)), sorted(theirs))
    if (folder / "ffn_rounding.json").exists():
        feed_forward_sizes(json.loads((folder / "ffn_rounding.json").read_text()), c)


@torch.no_grad()
def training_forward(model: Llama, tokens: Tensor, io: dict[str, Tensor], c: Comparison) -> None:
    """The full forward, and the output of every sub-module that the case recorded."""
    if "mid.freqs_cis_first_rows" in io:
        expected = io.pop("mid.freqs_cis_first_rows")
        k, positions = model.config, torch.arange(expected.shape[0])[None]
        rope = table(positions, k.head_width, k.rope_theta, k.rope_scaling)
        # Complex factors, or a pair of cos and sin: either way (T, A/2, 2).
        pairs = torch.view_as_real(rope) if isinstance(rope, Tensor) else torch.stack(rope, -1)
        c.tensor("freqs_cis", pairs[0], expected)
    names = [n.removeprefix("mid.") for n in io if n.startswith("mid.")]
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def keep(_module: object, _inputs: object, output: Tensor, name: str = name) -> None:
            # The first call wins: it has the sequence, a prefix calls wk and wv once more for its tokens.
            seen.setdefault(name, output)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    logits = model.logits(model(model.embed(tokens)))
    for hook in hooks:
        hook.remove()
    for name in names:
        c.tensor(name, seen[name], io.pop(f"mid.{name}"))
    c.tensor("train_logits", logits, io.pop("out.train_logits"))


@torch.no_grad()
def cached(model: Llama, tokens: Tensor, schedule: list[list[int]]) -> Tensor:
    """Logits (calls, B, V) of the last position of each call ``[start, length]``, one cache for all."""
    cache = model.cache(tokens.shape[0], tokens.shape[1])
    rows = []
    for start, length in schedule:
        cache.truncate(start)
        h = model(model.embed(tokens[:, start : start + length]), cache=cache)
        rows.append(model.logits(h[:, -1:])[:, 0])
    return torch.stack(rows)


def feed_forward_sizes(rows: list[dict[str, Any]], c: Comparison) -> None:
    """Widths of the feed-forward layer for several (dim, multiple_of, multiplier)."""
    if not rows:
        c.problems.append("ffn_rounding.json is empty")
    for row in rows:
        hidden = ffn_width(row["dim"], row["multiple_of"], row["ffn_dim_multiplier"])
        with torch.device("meta"):
            layer = FeedForward(row["dim"], hidden)
        ours = {"hidden": hidden} | {n: list(getattr(layer, n).weight.shape) for n in ("w1", "w2", "w3")}
        c.equal("ffn_rounding", ours, {key: row[key] for key in ours})


HANDLERS: dict[str, Handler] = dict.fromkeys(TEXT, text_case)
"""By the reference class that the case was computed with."""
