"""Every family of the backbone against transformers: random weights, fp32, through the production converter."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers import FalconConfig as HFFalcon
from transformers import GemmaConfig as HFGemma
from transformers import LlamaConfig as HFLlama
from transformers import MistralConfig as HFMistral
from transformers import MixtralConfig as HFMixtral
from transformers import Qwen2Config as HFQwen2

from accessory.backbone.hf import save_hf
from accessory.backbone.keys import config_from_dict, config_to_dict, expected_shapes
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.sizes import from_hf_config, to_hf_config
from accessory.backbone.weights import from_tensors, load_backbone
from accessory.nn.moe import MoEConfig
from accessory.nn.rope import RopeScaling

TOL = {"rtol": 1e-4, "atol": 1e-5}
T = 24
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def rope(kind: str, **options: float) -> dict[str, object]:
    return {"rope_theta": 10000.0, "rope_type": kind, **options}


FALCON = {k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")}
# The first model, a later one, one with a single norm, and the small ones that compute in turn.
FALCON_7B = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_11B = {**FALCON_40B, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 112, "tie_word_embeddings": False}
FALCON_1B = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
Change = dict[str, object]
# name -> (transformers' config, the switch that must matter: a change to ours)
FAMILIES: dict[str, tuple[Callable[[], object], Change]] = {
    "llama-gqa": (lambda: HFLlama(**SMALL), {"rope_theta": 500.0}),
    "llama-mha": (lambda: HFLlama(**SMALL | {"num_key_value_heads": 4}), {"norm_eps": 0.1}),
    "llama-tied": (lambda: HFLlama(**SMALL, tie_word_embeddings=True), {"rope_theta": 500.0}),
    "llama-head-dim": (lambda: HFLlama(**SMALL, head_dim=16), {"rope_theta": 500.0}),
    "llama3-rope": (lambda: HFLlama(**SMALL, rope_parameters=dict(LLAMA3)), {"rope_scaling": None}),
    "llama-linear": (lambda: HFLlama(**SMALL, rope_parameters=rope("linear", factor=4.0)), {"rope_scaling": None}),
    "llama-yarn": (lambda: HFLlama(**SMALL, rope_parameters=dict(YARN)), {"rope_scaling": None}),
    "codellama": (
        lambda: HFLlama(**SMALL, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        {"rope_theta": 1e4},
    ),
    "mistral": (lambda: HFMistral(**SMALL, sliding_window=7), {"window": None}),
    "mistral-no-window": (lambda: HFMistral(**SMALL, sliding_window=None), {"window": 7}),
    "qwen2": (lambda: HFQwen2(**SMALL), {"qkv_bias": False}),
    "gemma": (lambda: HFGemma(**SMALL, head_dim=16), {"norm_offset": 0.0}),
    "internlm": (lambda: HFLlama(**SMALL, attention_bias=True), {"out_bias": False}),
    "llama-mlp-bias": (lambda: HFLlama(**SMALL, mlp_bias=True), {"mlp_bias": False}),
    "mixtral": (lambda: HFMixtral(**SMALL, **EXPERTS), {"moe": MoEConfig(5, 1)}),
    "mixtral-window": (lambda: HFMixtral(**SMALL, **EXPERTS, sliding_window=7), {"window": None}),
    "falcon-7b": (lambda: HFFalcon(**FALCON, **FALCON_7B), {"rope_theta": 500.0}),
    "falcon-40b": (lambda: HFFalcon(**FALCON, **FALCON_40B), {"activation": "silu"}),
    "falcon-11b": (lambda: HFFalcon(**FALCON, **FALCON_11B), {"norm_eps": 0.1}),
    "falcon-1b": (lambda: HFFalcon(**FALCON, **FALCON_1B), {"mlp_bias": False}),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights twice, the folder they went through, and ids (2, T)."""

    hf: PreTrainedModel
    ours: Llama
    folder: Path
    ids: Tensor


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(family: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(7)
    config = FAMILIES[family][0]()
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for p in hf.parameters():  # norms and biases too: ones and zeros would hide a wrong map
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp(family)
    hf.save_pretrained(folder, max_shard_size="50KB")
    return Pair(hf, load_backbone(folder), folder, torch.randint(0, 61, (2, T)))


def logits(model: Llama, ids: Tensor) -> Tensor:
    return model.logits(model(model.embed(ids)))


def far(a: Tensor, b: Tensor) -> bool:
    """Apart by much more than the tolerance of the equalities."""
    return bool((a - b).abs().max() > 1e-2 * a.abs().max())


def test_the_fixture_is_sharded(pair: Pair) -> None:
    assert len(list(pair.folder.glob("model-*.safetensors"))) > 1


@torch.no_grad()
def test_logits(pair: Pair) -> None:
    theirs = pair.hf(pair.ids).logits
    torch.testing.assert_close(logits(pair.ours, pair.ids), theirs, **TOL)
    assert far(theirs, theirs.roll(1, 1))


@torch.no_grad()
def test_the_option_matters(family: str, pair: Pair) -> None:
    changed = dataclasses.replace(pair.ours.config, **FAMILIES[family][1])
    assert changed != pair.ours.config
    wanted = expected_shapes(changed)
    state = {k: v for k, v in pair.ours.state_dict().items() if k in wanted}
    assert far(logits(pair.ours, pair.ids), logits(from_tensors(changed, state), pair.ids))


def test_gradients_of_the_inputs(pair: Pair) -> None:
    a = pair.hf.get_input_embeddings()(pair.ids).detach().requires_grad_()
    b = a.detach().clone().requires_grad_()
    pick = torch.randn(2, T, 61, generator=torch.Generator().manual_seed(1))
    (pair.hf(inputs_embeds=a).logits * pick).sum().backward()
    (pair.ours.logits(pair.ours(b)) * pick).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    # relative to the largest entry: near-zero entries are differences of large ones
    size = a.grad.abs().max()
    torch.testing.assert_close(b.grad / size, a.grad / size, **TOL)
    assert size > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(5, 9, 1, 9), (1,) * T, (23, 1)])
def test_cached_decoding_in_chunks(pair: Pair, chunks: tuple[int, ...]) -> None:
    theirs = pair.hf(pair.ids).logits
    x, cache = pair.ours.embed(pair.ids), pair.ours.cache(2, T)
    h = torch.cat([pair.ours(part, cache=cache) for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(pair.ours.logits(h), theirs, **TOL)
    # and the cache is what carries the past
    assert far(pair.ours.logits(pair.ours(x[:, -9:])), theirs[:, -9:])


@torch.no_grad()
def test_taps_are_hidden_states(pair: Pair) -> None:
    theirs = pair.hf(pair.ids, output_hidden_states=True).hidden_states
    x = pair.ours.embed(pair.ids)
    torch.testing.assert_close(x, theirs[0], **TOL)
    taps = pair.ours(x, tap=(0, 1))
    torch.testing.assert_close(taps, (theirs[1], theirs[2]), **TOL)
    torch.testing.assert_close(pair.ours(x), theirs[3], **TOL)  # the last entry is normed
    assert far(taps[0], taps[1])
    assert far(pair.ours(x, tap=-1), theirs[3])


@torch.no_grad()
def test_export_round_trip(pair: Pair, tmp_path: Path) -> None:
    save_hf(pair.ours, tmp_path / "out", max_shard_bytes=60_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    same = type(pair.hf) if pair.ours.config.window or pair.hf.config.model_type != "mistral" else LlamaForCausalLM
    assert type(again) is same  # Mistral without its window is a LLaMA
    assert again.dtype == torch.float32
    theirs = pair.hf.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in again.state_dict().items())
    torch.testing.assert_close(again(pair.ids).logits, pair.hf(pair.ids).logits, rtol=1e-6, atol=1e-6)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    # and back into ours, bit for bit
    back = load_backbone(tmp_path / "out").state_dict()
    assert all(torch.equal(v, back[k]) for k, v in pair.ours.state_dict().items())


def test_config_round_trips(pair: Pair) -> None:
    config = pair.ours.config
    assert from_hf_config(to_hf_config(config)) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@torch.no_grad()
def test_static_ntk_is_exported_as_its_base(tmp_path: Path) -> None:
    config = LlamaConfig(dim=32, n_layers=2, n_heads=2, vocab_size=30, rope_scaling=RopeScaling("ntk", 4.0))
    model = Llama(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_hf(model, tmp_path / "out")
    ids = torch.randint(0, 30, (1, 20))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(theirs, logits(model, ids), **TOL)
    plain = from_tensors(dataclasses.replace(config, rope_scaling=None), model.state_dict())
    assert far(theirs, logits(plain, ids))


INTERNLM2 = {  # of transformers' LLaMA, as the published files have it
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["internlm", "internlm2"])
def test_internlm_is_a_llama_under_other_names(kind: str, tmp_path: Path) -> None:
    """transformers has neither, so the same weights go once through its LLaMA and once through the published layout."""
    hf = LlamaForCausalLM(HFLlama(**SMALL, attention_bias=kind == "internlm")).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state = dict(hf.state_dict())
    stated = {k: v for k, v in SMALL.items() if v is not None} | {"model_type": kind, "bias": kind == "internlm"}
    stated |= {"rms_norm_eps": hf.config.rms_norm_eps, "auto_map": {"AutoConfig": "x"}}
    if kind == "internlm":
        stated |= {"rotary": {"base": 10000, "type": "dynamic"}}
    else:
        stated |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"}
        for i in range(3):
            at = f"model.layers.{i}.self_attn."
            q, k, v = (state.pop(f"{at}{n}_proj.weight").unflatten(0, (2, -1, 12)) for n in "qkv")
            state[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat((q, k, v), 1).flatten(0, 2)
        for name in [n for n in state if "wqkv" not in n]:
            stem = re.sub(r"model\.layers\.\d+\.", "", name.removesuffix(".weight"))
            state[name.replace(stem, INTERNLM2.get(stem, stem))] = state.pop(name)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(stated))
    ours, ids = load_backbone(tmp_path), torch.randint(0, 61, (2, T))
    theirs = hf(ids).logits
    torch.testing.assert_close(logits(ours, ids), theirs, **TOL)
    swapped = {k: v.roll(1, 0) if ".wk.weight" in k else v for k, v in ours.state_dict().items()}
    assert far(theirs, logits(from_tensors(ours.config, swapped), ids))
    if kind == "internlm2":
        name = "model.layers.0.attention.wqkv.weight"
        save_file(state | {name: state[name][:-1].clone()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"wqkv.* 95 rows.* need 96"):
            load_backbone(tmp_path)


@pytest.mark.slow
@pytest.mark.assets
def test_smollm2_equals_transformers_own_gguf_loading() -> None:
    assets = pytest.importorskip("accessory.data.assets")
    from accessory.backbone.gguf import load_gguf
    from accessory.backbone.hf import from_hf

    if assets.find("smollm2", None) is None:
        pytest.skip("SmolLM2 is not in the cache; python -m accessory fetch smollm2")
    path = assets.single_file("smollm2", "**/*.gguf")
    config, ours = load_gguf(path, torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = from_hf(config, dict(hf.state_dict()), "transformers")
    assert len(ours) == 272
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    ids = torch.arange(100, 132)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(from_tensors(config, ours), ids), hf(ids).logits, rtol=1e-3, atol=1e-3)
