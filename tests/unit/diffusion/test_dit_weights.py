"""Checkpoints: configurations from shapes, complete complaints, layouts there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.config import build, plain
from accessory.diffusion.dit_config import Experts, FlagDiTConfig
from accessory.diffusion.dit_sizes import SIZES
from accessory.diffusion.dit_weights import (
    convert_pickle,
    diffusers_arguments,
    from_diffusers,
    from_tensors,
    infer_config,
    load,
    published,
    save,
    to_diffusers,
)
from accessory.diffusion.flag_dit import FlagDiT
from tests.unit.diffusion.dits import FLAG, KINDS, LABEL, NEXT, NEXT_LABEL, noise, randomised, told

# What shapes cannot show.
HIDDEN = {
    "large_t2i": {"prediction": "epsilon", "keep_sigma": True, "fixed_length": 60},
    "video": {"rope_axes": 3},
    "moe_time": {"experts": Experts(time=4)},
    "moe_space": {"experts": Experts(space=4)},
}


def resolved(config: FlagDiTConfig) -> FlagDiTConfig:
    """With everything that rules would decide stated."""
    return replace(
        config, ffn_dim=config.hidden, n_kv_heads=config.kv_heads, adaln_dim=config.adaln_width, multiple_of=256
    )


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_come_from_shapes(kind: str) -> None:
    config, model = KINDS[kind], randomised(KINDS[kind])
    known = HIDDEN.get(kind, {}) | ({} if config.text_dim else {"n_heads": 4})
    found = from_tensors(model.state_dict(), **known).eval()
    assert found.config == resolved(config)
    x, t = noise(2, 4, 4, 4), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        assert torch.equal(found(x, t, told(config, 2)), model(x, t, told(config, 2)))
    assert all(p.requires_grad for p in found.parameters())


def test_the_published_sizes_come_from_their_shapes() -> None:
    assert len(SIZES) == 20
    for name, config in SIZES.items():
        with torch.device("meta"):
            state = FlagDiT(config).state_dict()
        known = {"prediction": config.prediction, "keep_sigma": config.keep_sigma, "fixed_length": config.fixed_length}
        assert infer_config(state, **known) == resolved(config), name


def test_the_height_of_the_modulation_tells_twins_apart() -> None:
    flag, next_ = (FlagDiT(c).state_dict() for c in (LABEL, NEXT_LABEL))
    assert flag.keys() == next_.keys()
    assert infer_config(flag, n_heads=4).norms == "pre"
    assert infer_config(next_, n_heads=4).norms == "post"


def test_narrow_gates_must_be_explained() -> None:
    state = FlagDiT(KINDS["moe_time"]).state_dict()
    with pytest.raises(ValueError, match="say which with `experts`"):
        infer_config(state, n_heads=4)


def test_all_that_does_not_fit_is_listed() -> None:
    state = FlagDiT(FLAG).state_dict()
    del state["cap_embedder.0.bias"], state["layers.1.ffn_norm.weight"]
    state |= {"y.weight": torch.zeros(2), "layers.0.attention.gate": torch.zeros(6)}
    with pytest.raises(ValueError, match="4 keys") as error:
        from_tensors(state, FLAG)
    text = str(error.value)
    for line in (
        "missing: cap_embedder.0.bias",
        "missing: layers.1.ffn_norm.weight",
        "unexpected: y.weight",
        "layers.0.attention.gate is of shape (6,), not (4,)",
    ):
        assert line in text
    with pytest.raises(ValueError, match=r"no x_embedder.weight, t_embedder.mlp.0.weight"):
        infer_config({"final_layer.linear.weight": torch.zeros(2, 2)})


def test_files_and_folders(tmp_path: Path) -> None:
    model = randomised(NEXT)
    save(model, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.config == NEXT
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert load(tmp_path / "ours", torch.bfloat16).x_embedder.weight.dtype == torch.bfloat16
    assert load(tmp_path / "ours", skip_sigma=True).config == replace(NEXT, skip_sigma=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    (tmp_path / "lumina").mkdir()
    save_file(state, tmp_path / "lumina" / "consolidated.00-of-01.safetensors")
    assert load(tmp_path / "lumina").config == resolved(NEXT)
    save_file(state, tmp_path / "lumina" / "consolidated_ema.00-of-01.safetensors")
    with pytest.raises(ValueError, match=r"it holds consolidated.00-of-01.safetensors, consolidated_ema"):
        load(tmp_path / "lumina")
    load(tmp_path / "lumina" / "consolidated_ema.00-of-01.safetensors")
    save_file(state, tmp_path / "consolidated.00-of-02.safetensors")
    with pytest.raises(ValueError, match="one of 2 tensor-parallel shards"):
        load(tmp_path / "consolidated.00-of-02.safetensors")
    with pytest.raises(ValueError, match="it holds none"):
        load(tmp_path / "nothing")
    save_file(to_diffusers(state), tmp_path / "diffusion_pytorch_model.safetensors")
    assert load(tmp_path / "diffusion_pytorch_model.safetensors").config == resolved(NEXT)


class Surprise:
    """Something that is not a tensor."""


def test_pickles_are_rewritten_and_nothing_else_is_read(tmp_path: Path) -> None:
    state = randomised(FLAG).state_dict()
    torch.save(dict(state), tmp_path / "consolidated.00-of-01.pth")
    with pytest.raises(ValueError, match="rewrite pickles with convert_pickle"):
        load(tmp_path / "consolidated.00-of-01.pth")
    convert_pickle(tmp_path / "consolidated.00-of-01.pth", tmp_path / "flag.safetensors")
    again = load(tmp_path / "flag.safetensors").state_dict()
    assert all(torch.equal(again[k], v) for k, v in state.items())
    torch.save({"a": Surprise()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_pickle(tmp_path / "bad.pth", tmp_path / "bad.safetensors")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="not a table of tensors"):
        convert_pickle(tmp_path / "numbers.pth", tmp_path / "bad.safetensors")
    assert not (tmp_path / "bad.safetensors").exists()


def test_audio_names() -> None:
    state = FlagDiT(replace(FLAG, patch=(1, 1, 1), latent_channels=5, eol_token=False, pad_token=False)).state_dict()
    theirs = {k.replace("x_embedder", "proj_in").replace("layers.", "blocks."): v for k, v in state.items()}
    assert theirs.keys() != state.keys()
    assert published(theirs).keys() == state.keys()
    assert infer_config(published(theirs)).patch == (1, 1, 1)


def test_diffusers_names_there_and_back() -> None:
    state = randomised(NEXT).state_dict()
    theirs = to_diffusers(state)
    assert len(theirs) == len(state) + 2 * 3  # wq and its norm's weight and bias are stored twice
    again = from_diffusers(theirs)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], v) for k, v in state.items())


def spoilt(theirs: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    changed = dict(theirs)
    changed.pop(name, None)
    return changed if tensor is None else changed | {name: tensor}


def test_diffusers_weights_that_have_no_place_are_refused() -> None:
    theirs = to_diffusers(randomised(NEXT).state_dict())
    query = theirs["layers.1.attn2.to_q.weight"]
    with pytest.raises(ValueError, match=r"layers.1.attn1.to_q.weight and layers.1.attn2.to_q.weight differ"):
        from_diffusers(spoilt(theirs, "layers.1.attn2.to_q.weight", query + 1e-6))
    with pytest.raises(ValueError, match="differ; this model has one projection"):
        published(spoilt(theirs, "layers.0.attn2.norm_q.bias", torch.zeros(48)))
    with pytest.raises(ValueError, match="only one of"):
        from_diffusers(spoilt(theirs, "layers.0.attn1.to_q.weight", None))
    with pytest.raises(ValueError, match="unknown key extra"):
        from_diffusers(spoilt(theirs, "extra", torch.zeros(1)))
    with pytest.raises(ValueError, match=r"missing: layers.0.feed_forward.w2.weight"):
        from_tensors(spoilt(theirs, "layers.0.feed_forward.linear_2.weight", None))
    with pytest.raises(ValueError, match=r"no place for 3 keys.*eol_token"):
        to_diffusers({k: v for k, v in FlagDiT(FLAG).state_dict().items() if "layers.1" not in k and "adaLN" not in k})
    with pytest.raises(ValueError, match=r"has no norms 'pre', rope_axes 1"):
        diffusers_arguments(FLAG)


def test_configurations_are_yaml() -> None:
    for config in (*KINDS.values(), *SIZES.values()):
        assert build(plain(config), FlagDiTConfig) == config
