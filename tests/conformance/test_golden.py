"""Numbers of the published reference: golden cases through the tool, and that the tool can fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.backbone.llama import Llama
from accessory.backbone.reference import from_reference, rename
from accessory.peft.attach import BiasSpec, LoraSpec, PrefixSpec, attach
from tests.golden import LLM as GOLDEN
from tests.golden import copied, needs_golden
from tools.conformance import main

TEXT_CASES = (
    "01_llama_ffnmult",
    "01_llama_gqa",
    "01_llama_mha_ropescale",
    "02_llama_adapter_plain",
    "02_llama_adapter_text",
    "03_llama_peft_bias",
    "03_llama_peft_full",
    "03_llama_peft_lora",
)


@needs_golden
@pytest.mark.parametrize("case", TEXT_CASES)
def test_text_cases_pass(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / case)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{case}: passed")
    assert "train_logits, infer_logits" in lines[0]
    assert lines[-1] == "1 passed, 0 failed, 0 unsupported"


def test_an_unknown_case_is_reported_as_unsupported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"reference_class": "nobody.Knows"}))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 1 unsupported\n")


def own_case(folder: Path, kind: str = "llama_adapter") -> Path:
    """A case of the same format with other sizes, its numbers from our own model (for the tool's own tests)."""
    args: dict[str, Any] = {"dim": 24, "n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 40, "multiple_of": 8}
    if kind != "llama":
        args |= {"lora_rank": 2}
    if kind == "llama_adapter":
        args |= {"prefix_len": 3, "prefix_layers": 2, "use_prefix_new_gate": True}
    config, specs, _ = from_reference({}, args, kind)
    model = Llama(config).eval()
    if specs:
        attach(model, specs)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens = torch.randint(0, 40, (2, 6))
    with torch.no_grad():
        logits = model.logits(model(model.embed(tokens)))
    schedule = [[0, 4], [4, 1], [5, 1]]
    weights = theirs(model.state_dict())
    names = [n for n in weights if any(word in n for word in ("bias", "lora", "norm", "prefix"))]
    folder.mkdir()
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
    io = {"in.tokens": tokens, "out.train_logits": logits, "out.infer_logits": logits[:, [3, 4, 5]].transpose(0, 1)}
    save_file({k: v.contiguous() for k, v in io.items()}, folder / "io.safetensors")
    case = {"reference_class": f"accessory.model.LLM.{kind}.Transformer", "args": args, "infer_schedule": schedule}
    trainable = {"trainable_by_mode": {"sg": names}} if kind == "llama_adapter" else {"trainable": names}
    (folder / "config.json").write_text(json.dumps(case | trainable))
    return folder


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names back to the reference's."""
    parts = {"tokens": "prefix", "gate": "prefix_gate", "new_gate": "prefix_new_gate"}
    stacks: dict[str, list[Tensor]] = {}
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".prefix." in name:
            leaf = name.split(".")[-1]
            stacks.setdefault(parts[leaf], []).append({"tokens": value[None], "new_gate": value[:1]}.get(leaf, value))
        else:
            out[name.replace("delta.a", "lora_a").replace("delta.b", "lora_b")] = value
    stacked = {name: torch.stack(values) for name, values in stacks.items()}
    if "prefix_new_gate" in stacked:
        stacked["prefix_new_gate"] = stacked["prefix_new_gate"][:, 0]
    return out | stacked


@pytest.mark.parametrize("kind", ["llama", "llama_adapter", "llama_peft"])
def test_other_sizes_run(kind: str, tmp_path: Path) -> None:
    own_case(tmp_path / "case", kind)
    assert main([str(tmp_path)]) == 0


def change_tensor(file: str, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / file)

    return apply


def bump(t: Tensor) -> Tensor:
    """One element, a little."""
    t = t.clone()
    t.view(-1)[-1] += 1e-2
    return t


def shake(t: Tensor) -> Tensor:
    """Every element, a lot."""
    return t + 0.5


def extra_key(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    save_file(weights | {"visual_proj.weight": torch.ones(2)}, folder / "weights.safetensors")


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change_tensor("io.safetensors", "out.train_logits", bump), "train_logits differs by 0.01"),
        (change_tensor("io.safetensors", "out.infer_logits", bump), "infer_logits differs by 0.01"),
        (change_tensor("io.safetensors", "out.train_logits", lambda t: t * float("nan")), "train_logits differs"),
        (change_tensor("io.safetensors", "out.train_logits", lambda t: t[:1].clone()), "train_logits has shape"),
        (change_tensor("weights.safetensors", "prefix_gate", shake), "logits differs"),
        (change_tensor("weights.safetensors", "prefix_new_gate", shake), "logits differs"),
        (change_tensor("weights.safetensors", "layers.0.attention.wo.bias", shake), "logits differs"),
        (extra_key, "1 keys have no place in a text model: visual_proj.weight"),
        (edit_config(lambda c: c["args"].update(surprise=1)), "not understood: surprise"),
        (edit_config(lambda c: c["args"].update(rope_scaling=0.5)), "logits differs"),
        (edit_config(lambda c: c["trainable_by_mode"]["sg"].pop()), "trainable names"),
        (edit_config(lambda c: c.update(infer_schedule=[[0, 4], [4, 2], [5, 1]])), "infer_logits differs"),
        (lambda folder: (folder / "io.safetensors").unlink(), "FileNotFoundError"),
    ],
)
def test_a_spoilt_case_fails(
    spoil: Callable[[Path], None],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_case(tmp_path / "good")
    spoil(own_case(tmp_path / "spoilt"))
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert out.endswith("1 passed, 1 failed, 0 unsupported\n")


@needs_golden
def test_an_altered_golden_tensor_fails(tmp_path: Path) -> None:
    folder = copied(GOLDEN / "03_llama_peft_full", tmp_path)
    assert main([str(folder)]) == 0
    change_tensor("io.safetensors", "mid.layers.0.attention.wo", bump)(folder)
    assert main([str(folder)]) == 1


def test_a_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])


def test_the_importer_reads_the_references_defaults() -> None:
    table = {"llma.tok_embeddings.weight": torch.zeros(77, 8)}
    config, specs, state = from_reference(table, {"vocab_size": -1, "rope_scaling": 0.25}, "llama_adapter")
    assert (config.dim, config.vocab_size, config.max_length, config.n_layers) == (4096, 77, 2048, 32)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0
    assert state.keys() == {"tok_embeddings.weight"}
    assert [spec.kind for spec in specs] == ["bias", "norm", "prefix"]
    assert BiasSpec(targets=("wq", "wo", "w1", "w2", "w3")) in specs
    assert PrefixSpec(length=10) in specs
    assert LoraSpec(rank=16) in from_reference({}, {"vocab_size": 9, "lora_rank": 16}, "llama_peft")[1]
    with pytest.raises(ValueError, match="llama_ens"):
        from_reference({}, {}, "llama_ens")
    with pytest.raises(ValueError, match="vocab_size"):
        from_reference({}, {}, "llama")


def test_the_importer_refuses_prefixes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"prefix_gate.*2 layers"):
        rename({"prefix_gate": torch.zeros(3, 4)}, 2)
    with pytest.raises(ValueError, match=r"prefix has shape \(2, 5"):
        rename({"prefix": torch.zeros(2, 5, 3, 4)}, 2)
