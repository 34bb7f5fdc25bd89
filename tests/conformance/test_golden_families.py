"""Golden cases of Mixtral, InternLM and Falcon, of shards and of training's folders; and that they can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.backbone.reference import from_reference
from accessory.backbone.reference_folders import build_language
from accessory.nn.moe import balance_loss, router_loss, routings
from accessory.nn.rope import table
from tests.golden import LLM as GOLDEN
from tests.golden import copied, needs_golden
from tools import conformance

CASES = (
    "06_falcon_new",
    "06_falcon_parallel",
    "06_falcon_sequential",
    "06_internlm",
    "06_internlm_layernorm",
    "06_mixtral",
    "06_mixtral_peft",
    "06_mixtral_sparse",
    "06_mixtral_top1",
    "08_tp_falcon",
    "08_tp_internlm",
    "08_tp_llama",
    "08_tp_llama_adapter",
    "08_tp_llama_peft",
    "08_tp_mixtral",
    "08_tp_mixtral_sparse",
    "10_checkpoint_full",
    "10_checkpoint_trainable",
)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_cases_pass(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([str(GOLDEN / case)]) == 0
    assert capsys.readouterr().out.endswith("1 passed, 0 failed, 0 unsupported\n")


def own_case(folder: Path, kind: str = "mixtral") -> Path:
    """A case of the same format with other sizes, its numbers from our own model (for the tool's own tests)."""
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 30, "hidden_dim": 128}
    args: dict[str, Any] = sizes | {"moe": {"num_experts": 5, "num_experts_per_tok": 3}, "load_balancing_weight": 0.25}
    shapes = {"tok_embeddings.weight": (30, 32), "output.weight": (30, 32), "norm.weight": (32,)}
    for name, shape in {"wq": (32, 32), "wk": (16, 32), "wv": (16, 32), "wo": (32, 32)}.items():
        shapes[f"layers.0.attention.{name}.weight"] = shape
    shapes |= {"layers.0.attention_norm.weight": (32,), "layers.0.ffn_norm.weight": (32,)}
    shapes["layers.0.feed_forward.gate.weight"] = (5, 32)
    if kind == "mixtral_sparse":
        shapes |= {f"layers.0.feed_forward.w{i}": (5 * 128, 32) for i in (1, 2, 3)}
    else:
        for e in range(5):
            own = {"w1": (128, 32), "w2": (32, 128), "w3": (128, 32)}
            shapes |= {f"layers.0.feed_forward.experts.{e}.{name}.weight": s for name, s in own.items()}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    model = build_language(from_reference(weights, args, kind))
    tokens = torch.randint(0, 30, (2, 6))
    with torch.no_grad(), routings(model) as log:
        out = model.logits(model(model.embed(tokens)))
    assert model.config.moe is not None
    (logits, chosen, best) = log[0]
    spread = logits.softmax(-1).sort(-1, descending=True).values
    weight, inside = 0.25, 1.0 if kind == "mixtral_sparse" else 0.25
    loss = inside * balance_loss(log[0])[None]
    rope = torch.view_as_real(table(torch.arange(6)[None], 8, 1e6))[0]
    io = {
        "in.tokens": tokens,
        "mid.freqs_cis_first_rows": rope,
        "mid.layers.0.gate_logits": logits,
        "mid.layers.0.topk_experts": chosen,
        "mid.layers.0.topk_weights_renormalised": best,
        "mid.layers.0.moe_margin_min": (spread[:, 2] - spread[:, 3]).min()[None],
        "out.train_logits": out,
        "out.train_mode_logits": out,
        "out.infer_logits": out[:, [3, 4, 5]].transpose(0, 1),
        "out.load_balancing_loss_per_layer": loss,
        "out.load_balancing_loss": loss,
        "out.load_balancing_weight_returned": torch.tensor([weight]),
        "out.load_balancing_contribution_to_total_loss": router_loss(model.config.moe, log)[None],
    }
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
    save_file({k: v.clone().contiguous() for k, v in io.items()}, folder / "io.safetensors")
    case = {"reference_class": f"accessory.model.LLM.{kind}.Transformer", "args": args}
    (folder / "config.json").write_text(json.dumps(case | {"infer_schedule": [[0, 4], [4, 1], [5, 1]]}))
    return folder


@pytest.mark.parametrize("kind", ["mixtral", "mixtral_sparse"])
def test_other_sizes_run(kind: str, tmp_path: Path) -> None:
    own_case(tmp_path / "case", kind)
    assert conformance.main([str(tmp_path)]) == 0


def change(file: str, name: str, by: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[name] = by(tensors[name])
        save_file(tensors, folder / file)

    return apply


def edit(update: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        update(config["args"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("io.safetensors", "out.load_balancing_loss", lambda t: t * 4), "load_balancing_loss differs"),
        (change("io.safetensors", "mid.layers.0.topk_experts", lambda t: t.flip(1)), "topk_experts is"),
        (change("weights.safetensors", "layers.0.feed_forward.gate.weight", lambda t: -t), "train_logits differs"),
        (change("weights.safetensors", "layers.0.feed_forward.experts.4.w2.weight", lambda t: -t), "logits differs"),
        (edit(lambda args: args["moe"].update(num_experts_per_tok=2)), "topk_experts is"),
        (edit(lambda args: args.update(rope_theta=1e4)), "freqs_cis differs"),
        (edit(lambda args: args["moe"].update(capacity=2)), "not understood: capacity"),
    ],
)
def test_a_spoilt_case_fails(
    spoil: Callable[[Path], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(own_case(tmp_path / "spoilt"))
    assert conformance.main([str(tmp_path)]) == 1
    assert words in capsys.readouterr().out


@needs_golden
@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        ("06_falcon_parallel", "layers.1.input_layernorm.bias", "train_logits differs"),
        ("06_internlm", "layers.0.mixer.Wqkv.bias", "train_logits differs"),
        ("08_tp_mixtral_sparse", "llma.layers.0.feed_forward.w2", "merged: tensors that differ"),
        ("10_checkpoint_trainable", "llma.layers.0.attention.wq.lora_b.weight", "after_loading differs"),
    ],
)
def test_an_altered_golden_tensor_fails(
    case: str, name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(GOLDEN / case, tmp_path)
    change("weights.safetensors", name, lambda t: t + 0.5)(folder)
    assert conformance.main([str(folder)]) == 1
    assert words in capsys.readouterr().out
