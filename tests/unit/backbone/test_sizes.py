"""Published sizes and Hugging Face's configs."""

import dataclasses
import json

import numpy as np
import pytest

from accessory.backbone import keys
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES, find_size, from_hf_config, to_hf_config
from accessory.nn.moe import MoEConfig
from accessory.nn.rope import RopeScaling

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=40)

# As counted by transformers on the published configs, and stated on the model cards.
COUNTS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "internlm-7b": 7_321_948_160,
    "internlm-20b": 20_088_714_240,
    "internlm2-1.8b": 1_889_110_016,
    "internlm2-7b": 7_737_708_544,
    "internlm2-20b": 19_861_149_696,
    # With the table that is embedding and output at once counted once; the files of 7B and 180B hold it twice.
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 178_557_088_768,
}


def test_every_size_has_its_published_number_of_parameters() -> None:
    assert COUNTS.keys() == SIZES.keys()
    for name, config in SIZES.items():
        shapes = keys.expected_shapes(dataclasses.replace(config, n_layers=1))
        block = sum(int(np.prod(s)) for k, s in shapes.items() if k.startswith("layers."))
        rest = sum(int(np.prod(s)) for k, s in shapes.items() if not k.startswith("layers."))
        assert rest + config.n_layers * block == COUNTS[name], name


def test_a_whole_model_is_built_on_meta() -> None:
    built = keys.build_meta(SIZES["smollm2-135m"])
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert sum(p.numel() for p in built.parameters()) == COUNTS["smollm2-135m"]


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_survive_hugging_faces_config(name: str) -> None:
    config = SIZES[name]
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config
    assert find_size(config) is not None


def test_both_spellings_of_rotary_options_say_the_same() -> None:
    base = {k: v for k, v in to_hf_config(TINY).items() if not k.startswith("rope")}
    options = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0, "original_max_position_embeddings": 99}
    new = from_hf_config(base | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e5, **options}})
    mid = from_hf_config(base | {"rope_theta": 7e5, "rope_scaling": {"rope_type": "llama3", **options}})
    assert new == mid
    assert new.rope_theta == 7e5
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 99, 2.0, 5.0)
    old = from_hf_config(base | {"rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old.rope_scaling is not None
    assert (old.rope_scaling.kind, old.rope_scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "phi3"}, "phi3"),
        ({"brand_new_option": 3}, "brand_new_option=3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "relu"}, "relu"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "full_attention"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"model_type": "falcon", "alibi": True}, "alibi"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
    ],
)
def test_unknown_options_are_errors_that_name_them(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_hf_config(to_hf_config(TINY) | change)
    # None and False are switches that are off
    from_hf_config(to_hf_config(TINY) | {"brand_new_option": None, "clip_qkv": False})


def test_a_mixture_that_no_family_has_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match="window=4"):
        to_hf_config(dataclasses.replace(TINY, qkv_bias=True, window=4))
    with pytest.raises(ValueError, match="norm_offset"):
        to_hf_config(dataclasses.replace(TINY, norm_offset=1.0))
    falcon = dataclasses.replace(TINY, norm="layer", gated=False, activation="gelu")
    for change in ({"n_heads": 8, "n_kv_heads": 2}, {"qkv_bias": True, "n_kv_heads": 4}):  # in turn, or biased in parts
        with pytest.raises(ValueError, match="norm=layer"):
            to_hf_config(dataclasses.replace(falcon, **change))
    assert to_hf_config(dataclasses.replace(falcon, n_kv_heads=1))["multi_query"] is True
    with pytest.raises(ValueError, match="renormalise=False"):
        to_hf_config(dataclasses.replace(TINY, moe=MoEConfig(4, 2, renormalise=False)))


def test_configs_of_experts_and_blocks_are_checked() -> None:
    config = dataclasses.replace(TINY, moe=MoEConfig(4, 2, balance=0.5), norm="layer", order="parallel")
    assert keys.config_from_dict(json.loads(json.dumps(keys.config_to_dict(config)))) == config
    with pytest.raises(ValueError, match=r"backbone\.moe .*surprise"):
        keys.config_from_dict({"moe": {"surprise": 1}})
    with pytest.raises(ValueError, match="gated=False"):
        dataclasses.replace(TINY, moe=MoEConfig(4, 2), gated=False)
    with pytest.raises(ValueError, match=r"norm_offset 1\.0 belongs"):
        dataclasses.replace(TINY, norm="layer", norm_offset=1.0)
