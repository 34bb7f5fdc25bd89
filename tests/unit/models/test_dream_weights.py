"""Bridges on disk: what is saved, what is refused, and the checkpoints of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.backbone.llama import Llama
from accessory.backbone.sizes import SIZES
from accessory.backbone.store import read_file, write_file
from accessory.models.dream import Dream
from accessory.models.dream_presets import PRESETS
from accessory.models.dream_weights import (
    PLUGINS,
    WEIGHTS_FILE,
    fill,
    from_dreamllm,
    from_gen_adapter,
    from_zoo,
    load,
    own_state,
    read_dreamllm,
    save,
    split_dreamllm,
    to_dreamllm,
    to_zoo,
)
from accessory.models.mllm import MLLM
from accessory.nn.projection import Projection
from accessory.peft.attach import LoraSpec, attach
from tests.unit.models.dreams import DIM, VOCAB, dream, flag_dit, mllm, randomised, small, text


@pytest.mark.parametrize("name", sorted(PRESETS))
@torch.no_grad()
def test_a_saved_bridge_says_the_same(name: str, tmp_path: Path) -> None:
    bridge = dream(name)
    save(bridge, tmp_path / "bridge")
    torch.manual_seed(99)
    again = load(bridge.net, tmp_path / "bridge").eval()
    assert again.config == bridge.config
    fresh = Dream(bridge.net, bridge.config).eval()
    ids = text(6)[0][None]
    denoiser = flag_dit(DIM if name == "default" else 24)
    x, t = torch.randn(1, 3, 4, 4), torch.tensor([0.4])
    expected = denoiser(x, t, bridge.condition(ids))
    assert torch.equal(denoiser(x, t, again.condition(ids)), expected)
    assert (denoiser(x, t, fresh.condition(ids)) - expected).abs().max() > 1e-3
    assert not any(k.startswith("net.") for k in read_file(tmp_path / "bridge" / WEIGHTS_FILE))


def test_what_trains_in_the_model_goes_along(tmp_path: Path) -> None:
    def tuned() -> Dream:
        made = dream(net=mllm(), joint=True)
        attach(made.net, (LoraSpec(rank=2),))
        made.net.requires_grad_(False)
        for name, p in made.net.named_parameters():
            p.requires_grad_(".delta." in name)
        return made

    bridge = tuned()
    for p in bridge.net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    save(bridge, tmp_path / "bridge")
    ids = text(6)[0][None]
    other = tuned()
    again = load(other.net, tmp_path / "bridge").eval()
    with torch.no_grad():
        seq, expected = again.condition(ids).seq, bridge.condition(ids).seq
        plain = dream(net=mllm(), joint=True).condition(ids).seq
    assert seq is not None
    assert expected is not None
    assert plain is not None
    assert torch.equal(seq, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["default", "dreamllm", "chatillusion"])
def test_the_file_of_a_7b_model_is_below_one_percent_of_it(name: str) -> None:
    with torch.device("meta"):
        net = MLLM(Llama(SIZES["llama2-7b"]).to(torch.bfloat16)).requires_grad_(False)
        bridge = Dream(net, replace(PRESETS[name], null_ids=(1,)))
    own = sum(v.nbytes for v in own_state(bridge).values())
    frozen = sum(p.nbytes for p in net.parameters())
    assert frozen > 13e9
    assert own > 1e6
    # In fp32 against bf16; ChatIllusion's adapter is as wide as SDXL's text and larger by design.
    assert own < (0.02 if name == "chatillusion" else 0.01) * frozen


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    bridge = dream()
    save(bridge, tmp_path / "bridge")
    path = tmp_path / "bridge" / WEIGHTS_FILE
    state = read_file(path)
    write_file(state | {"surprise": torch.ones(1), "net.nowhere": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"2 unexpected: .*surprise"):
        load(bridge.net, tmp_path / "bridge")
    with pytest.raises(ValueError, match="1 missing: queries"):
        fill(bridge, {k: v for k, v in state.items() if k != "queries"}, "here")
    with pytest.raises(ValueError, match=r"mis-shaped: end: \(3,\)"):
        fill(bridge, state | {"end": torch.ones(3)}, "here")
    with pytest.raises(ValueError, match="is no dream bridge"):
        load(bridge.net, tmp_path)


def test_names_are_those_that_old_files_hold() -> None:
    found = [f"{name} {k} {'x'.join(map(str, v.shape))}" for name in sorted(PRESETS) for k, v in named(name)]
    wanted = (Path(__file__).parents[2] / "structure" / "keys_dream.txt").read_text(encoding="utf-8").splitlines()
    assert len(wanted) > 60
    assert found == wanted, "names or shapes have changed: old bridges need a converter"


def named(name: str) -> list[tuple[str, Tensor]]:
    """What a small bridge of a preset saves."""
    return sorted(own_state(dream(name)).items())


# --- DreamLLM ---------------------------------------------------------------------------------------------------------


def checkpoint(hidden: bool = False) -> dict[str, Tensor]:
    """A whole state dict under DreamLLM's names, small."""
    head = "stable_diffusion_head."
    layers = {"weight": (10, DIM)} if not hidden else {"0.weight": (10, DIM), "2.weight": (10, 10)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.dream_embedding.dream_queries": (1, 5, DIM),
        "model.clip_vision_embedding.clip_vision_model.embeddings.class_embedding": (6,),
        "model.clip_vision_embedding.projector.projector.weight": (DIM, 6),
        "model.clip_vision_embedding.projector.projector.bias": (DIM,),
        f"{head}vae.decoder.conv_in.weight": (2, 2),
        f"{head}unet.conv_in.weight": (2, 2),
        "model.embed_tokens.weight": (VOCAB, DIM),
        "lm_head.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
    }
    shapes |= {f"{head}projector.projector.{k}": v for k, v in layers.items()}
    g = torch.Generator().manual_seed(1)
    return {k: torch.randn(v, generator=g) for k, v in shapes.items()}


@pytest.mark.parametrize("hidden", [False, True])
def test_dreamllm_comes_and_goes(hidden: bool) -> None:
    state = checkpoint(hidden)
    made = from_dreamllm(split_dreamllm(state), dream_start=38, dream_end=39, bos=1)
    bridge = Dream(mllm(), made.config)
    fill(bridge, made.bridge, "the checkpoint")
    assert bridge.trigger_id == 38
    assert bridge.start is None
    assert torch.equal(bridge.end, state["model.embed_tokens.weight"][39])
    assert made.projector.keys() == {"visual_proj.0.weight", "visual_proj.0.bias"}
    assert len(made.frozen) == 3
    assert made.llm.keys() == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    back = to_dreamllm(bridge)
    flat = {PLUGINS[plugin][2] + k: v for plugin, tensors in back.items() for k, v in tensors.items()}
    assert len(flat) == 2 + hidden
    assert all(torch.equal(v, state[k]) for k, v in flat.items())
    with pytest.raises(ValueError, match=r"DreamLLM has no bridge of connector\.kind 'encoder'"):
        to_dreamllm(dream())


def test_dreamllm_plugin_files_are_read(tmp_path: Path) -> None:
    files = split_dreamllm(checkpoint())
    for plugin, (new, _, _) in PLUGINS.items():
        torch.save(files[plugin], tmp_path / new)
    read = read_dreamllm(tmp_path)
    made = from_dreamllm(read | {"llm": files["llm"]}, 38, 39, 1)
    assert torch.equal(made.bridge["queries"], files["dream_embedding"]["dream_queries"][0])
    (tmp_path / "stable_diffusion_head.bin").unlink()
    with pytest.raises(ValueError, match=r"neither stable_diffusion_head\.bin nor unet_projector\.pt"):
        read_dreamllm(tmp_path)
    legacy = {"projector.weight": files["stable_diffusion_head"]["projector.projector.weight"]}
    torch.save(legacy, tmp_path / "unet_projector.pt")
    again = from_dreamllm(read_dreamllm(tmp_path) | {"llm": files["llm"]}, 38, 39, 1)
    assert again.config == made.config
    assert all(torch.equal(v, made.bridge[k]) for k, v in again.bridge.items())


def test_unknown_dreamllm_keys_are_listed() -> None:
    state = checkpoint() | {"model.dream_embedding.more": torch.ones(1), "vq_head.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"2 keys have no place .*dream_embedding: more, llm: vq_head\.weight"):
        from_dreamllm(split_dreamllm(state), 38, 39, 1)


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "sam"])
@torch.no_grad()
def test_the_projector_zoo_comes_and_goes(kind: str) -> None:
    made = randomised(Projection(kind, 6, 8, depth=3, hidden=(10, 12)))  # type: ignore[arg-type]
    theirs = to_zoo(kind, made.state_dict())  # type: ignore[arg-type]
    found, depth, state = from_zoo(theirs)
    assert found == kind
    assert depth == {"mlp": 3, "sam": 2}.get(kind, 1)
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())
    with pytest.raises(ValueError, match=r"1 keys have no place in a projector: other\.weight"):
        from_zoo(theirs | {"other.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="it is empty"):
        from_zoo({})


def test_a_gen_adapter_is_renamed() -> None:
    bridge = Dream(mllm(), small("chatillusion"))
    state = own_state(bridge)
    names = {"to_q": "connector.body.q", "seq_head": "heads.sequence"}
    theirs = {"sd_query": state["connector.body.queries"][None]}
    theirs |= {f"to_q.{p}": state[f"connector.body.q.{p}"] for p in ("weight", "bias")}
    theirs["seq_head.2.weight"] = state["heads.sequence.2.weight"]
    ours = from_gen_adapter(theirs, names)
    assert len(ours) == 4
    assert all(torch.equal(v, state[k]) for k, v in ours.items())
    with pytest.raises(ValueError, match="1 keys have no place in a GenAdapter: to_qs"):
        from_gen_adapter(theirs | {"to_qs": torch.ones(1)}, names)
