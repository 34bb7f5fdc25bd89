"""diffusers' networks and VAEs behind our contracts: the same numbers, and no silent misuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

from accessory.diffusion import unet
from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Denoiser, Prediction, Steering
from accessory.diffusion.latents import FAMILIES, DiffusersCodec, LatentCodec, load_vae
from accessory.diffusion.unet import DiffusersDenoiser

TOL = {"rtol": 1e-4, "atol": 2e-5}


def randomised(net: nn.Module, std: float = 0.1) -> nn.Module:
    torch.manual_seed(11)
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net.eval()


def small_unet(**options: object) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 12, **options},
    )  # fmt: skip


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34}


def small_sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip


def small_lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16),
        cap_feat_dim=12,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, what it predicts, its times, and the call that its pipeline makes."""

    build: Callable[[], nn.Module]
    prediction: Prediction
    t: Tensor
    direct: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


STEPS, TIMES = torch.tensor([3, 700, 999]), torch.tensor([0.0, 0.3, 0.9])


def direct_unet(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return net(x, t, encoder_hidden_states=c.seq).sample


def direct_sdxl(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return net(x, t, c.seq, added_cond_kwargs={"text_embeds": c.pooled, "time_ids": c.sizes}).sample


def direct_sd3(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    # as StableDiffusion3Pipeline: sigma is the share of noise, the step is 1000 sigma, the output noise - data
    sigma = 1 - t
    return -net(hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=c.seq, pooled_projections=c.pooled).sample


def direct_lumina2(net: nn.Module, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return net(hidden_states=x, timestep=t, encoder_hidden_states=c.seq, encoder_attention_mask=c.mask).sample


CASES = {
    "sd15": Case(small_unet, "epsilon", STEPS, direct_unet),
    "sd21-v": Case(lambda: small_unet(use_linear_projection=True), "v", STEPS, direct_unet),
    "sdxl": Case(lambda: small_unet(**SDXL), "epsilon", STEPS, direct_sdxl),
    "sd3": Case(small_sd3, "flow", TIMES, direct_sd3),
    "lumina2": Case(small_lumina2, "flow", TIMES, direct_lumina2),
}


def condition(batch: int = 3, length: int = 5) -> Condition:
    g = torch.Generator().manual_seed(2)
    return Condition(
        torch.randn(batch, length, 12, generator=g),
        torch.ones(batch, length, dtype=torch.bool),
        pooled=torch.randn(batch, 10, generator=g),
        sizes=torch.tensor([[64.0, 64, 0, 8, 64, 32]]).repeat(batch, 1),
    )


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def made(case: Case, **options: bool) -> DiffusersDenoiser:
    return DiffusersDenoiser(randomised(case.build()), case.prediction, **options)


def tensor(value: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(value, Tensor)
    return value


@torch.no_grad()
def test_the_same_bits_as_the_direct_call(case: Case) -> None:
    ours: Denoiser = made(case)
    x, c = torch.randn(3, 4, 8, 8), condition()
    y = tensor(ours(x, case.t, c, steering=Steering()))
    wanted = case.direct(ours.net, x, case.t, c)  # type: ignore[attr-defined]
    assert torch.equal(y, wanted)
    assert ours.latent_channels == 4
    # and text, pooled vector, sizes and time are looked at
    needs = ours.needs  # type: ignore[attr-defined]
    assert c.seq is not None
    assert c.pooled is not None
    changes = [replace(c, seq=c.seq.flip(0))]
    changes += [] if needs.pooled is None else [replace(c, pooled=c.pooled.flip(0))]
    changes += [replace(c, sizes=c.sizes * 3)] if needs.sizes and c.sizes is not None else []
    assert len(changes) == 1 + (needs.pooled is not None) + needs.sizes
    for other in changes:
        assert (tensor(ours(x, case.t, other)) - y).abs().max() > 1e-4
    assert (tensor(ours(x, case.t.flip(0), c)) - y).abs().max() > 1e-4


@torch.no_grad()
def test_padding_is_not_seen(case: Case) -> None:
    ours = made(case)
    x, c = torch.randn(3, 4, 8, 8), condition()
    counts = [2, 5, 2]
    assert c.seq is not None
    assert c.pooled is not None
    mask = torch.stack([torch.arange(5) < n for n in counts])
    padded = replace(c, mask=mask)
    y = tensor(ours(x, case.t, padded))
    spoilt = replace(padded, seq=torch.where(mask[..., None], c.seq, 50.0))
    torch.testing.assert_close(tensor(ours(x, case.t, spoilt)), y, **TOL)
    for i, n in enumerate(counts):
        short = replace(c[[i]], seq=c.seq[i : i + 1, :n], mask=mask[i : i + 1, :n])
        torch.testing.assert_close(tensor(ours(x[i : i + 1], case.t[i : i + 1], short))[0], y[i], **TOL)
    assert (tensor(ours(x, case.t, c)) - y).abs().max() > 1e-4
    # the same text padded on the left is the same text
    left = replace(padded, seq=torch.full_like(c.seq, 3.0), mask=mask.flip(1))
    assert left.seq is not None
    for i, n in enumerate(counts):
        left.seq[i, 5 - n :] = c.seq[i, :n]
    torch.testing.assert_close(tensor(ours(x, case.t, left)), y, **TOL)


@torch.no_grad()
def test_a_list_of_unequal_sizes_is_its_parts(case: Case) -> None:
    ours = made(case)
    c = condition()
    x = [torch.randn(4, 8, 8), torch.randn(4, 4, 8), torch.randn(4, 8, 8)]
    y = ours(x, case.t, c)
    assert isinstance(y, list)
    for i in range(3):
        alone = tensor(ours(x[i][None], case.t[i : i + 1], c[[i]]))[0]
        assert y[i].shape == x[i].shape
        torch.testing.assert_close(y[i], alone, **TOL)
    assert (y[0] - y[2]).abs().max() > 1e-3


def test_frozen_networks_pass_gradients_on(case: Case) -> None:
    ours = made(case).train()
    assert not ours.net.training
    assert not any(p.requires_grad for p in ours.parameters())
    c = condition()
    assert c.seq is not None
    seq = c.seq.clone().requires_grad_()
    tensor(ours(torch.randn(3, 4, 8, 8), case.t, replace(c, seq=seq))).square().sum().backward()
    assert seq.grad is not None
    assert seq.grad.abs().sum() > 0
    loose = made(case, frozen=False).train()
    assert loose.net.training
    assert all(p.requires_grad for p in loose.net.parameters())


def test_wrong_conditions_are_refused(case: Case) -> None:
    ours, x, c = made(case), torch.randn(3, 4, 8, 8), condition()
    assert c.seq is not None
    assert c.mask is not None
    assert c.pooled is not None

    def refused(said: str, **parts: object) -> None:
        with pytest.raises(ValueError, match=said):
            ours(x, case.t, replace(c, **parts))  # type: ignore[arg-type]

    refused("the condition has no seq", seq=None, mask=None)
    refused("width 12, the condition's have 7", seq=c.seq[..., :7])
    refused(r"rows \[1\] of the condition have no real position", mask=c.mask & torch.tensor([1, 0, 1])[:, None].bool())
    if ours.needs.pooled is not None:
        refused("pooled vector of width 10, the condition has none", pooled=None)
        refused("pooled vector of width 10, the condition has one of 4", pooled=c.pooled[:, :4])
    if ours.needs.sizes:
        refused("needs sizes", sizes=None)
    with pytest.raises(ValueError, match="latents of 4 channels"):
        ours(x[:, :3], case.t, c)
    with pytest.raises(ValueError, match="3 latents need 3 times"):
        ours(x, case.t[:2], c)
    with pytest.raises(ValueError, match="3 latents need 3 times and conditions"):
        ours(x, case.t, join([c, c]))
    with pytest.raises(ValueError, match="cannot be steered by rope_scale, region_condition"):
        ours(x, case.t, c, steering=Steering(rope_scale=2.0, regions=[], region_condition=c))
    wrong: Prediction = "v" if case.prediction == "flow" else "flow"
    with pytest.raises(ValueError, match="does not predict"):
        DiffusersDenoiser(ours.net, wrong)


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="no adapter for Linear"):
        DiffusersDenoiser(nn.Linear(2, 2), "epsilon")
    for options, said in (
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 6}, "encoder_hid_dim_type='text_proj'"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"in_channels": 9}, "out_channels=4"),
    ):
        with pytest.raises(ValueError, match=said):
            DiffusersDenoiser(small_unet(**options), "epsilon")


@torch.no_grad()
def test_labels_of_a_class_conditional_unet() -> None:
    ours = DiffusersDenoiser(randomised(small_unet(num_class_embeds=5)), "epsilon")
    x, c, labels = torch.randn(3, 4, 8, 8), condition(), torch.tensor([0, 4, 2])
    with pytest.raises(ValueError, match=r"needs labels \(0 to 4\)"):
        ours(x, STEPS, c)
    wanted = ours.net(x, STEPS, c.seq, class_labels=labels).sample
    assert torch.equal(tensor(ours(x, STEPS, replace(c, labels=labels))), wanted)


# --- folders ----------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "epsilon": lambda: diffusers.DDIMScheduler(),
    "v": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@torch.no_grad()
def test_folders_say_what_is_predicted(case: Case, tmp_path: Path) -> None:
    net = randomised(case.build())
    name = "unet" if case.prediction != "flow" else "transformer"
    net.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="has no scheduler"):
        unet.load(tmp_path)
    SCHEDULERS[case.prediction]().save_pretrained(tmp_path / "scheduler")
    x, c = torch.randn(3, 4, 8, 8), condition()
    for folder in (tmp_path, tmp_path / name):
        back = unet.load(folder)
        assert back.prediction == case.prediction
        torch.testing.assert_close(tensor(back(x, case.t, c)), case.direct(net, x, case.t, c), rtol=1e-5, atol=1e-6)
    assert unet.load(tmp_path, dtype=torch.bfloat16).net.dtype == torch.bfloat16


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no unet/ or transformer/"):
        unet.load(tmp_path)
    small_unet().save_pretrained(tmp_path / "unet", safe_serialization=False)
    with pytest.raises(ValueError, match="cannot be read"):
        unet.load(tmp_path, prediction="epsilon")
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        unet.prediction_of({"prediction_type": "sample"})
    assert unet.prediction_of({"_class_name": "PNDMScheduler"}) == "epsilon"
    diffusers.UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(ValueError, match="holds a UNet2DModel"):
        unet.load(tmp_path / "other", prediction="epsilon")


# --- VAEs -------------------------------------------------------------------------------------------------------------


def small_vae(family: str, **options: object) -> nn.Module:
    c = FAMILIES[family]
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=c.channels, scaling_factor=c.scale,
            shift_factor=c.shift or None, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, **options,
        ),
        std=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_vaes_have_their_constants(family: str, tmp_path: Path) -> None:
    vae, c = small_vae(family), FAMILIES[family]
    vae.save_pretrained(tmp_path / "vae")
    codec: LatentCodec = load_vae(tmp_path, family)
    x = torch.rand(2, 3, 16, 24)
    posterior = vae.encode(x * 2 - 1).latent_dist
    mode = tensor(codec.encode(x, mode=True))
    assert mode.shape == (2, c.channels, 2, 3)
    torch.testing.assert_close(mode, (posterior.mean - c.shift) * c.scale, **TOL)
    drawn = tensor(codec.encode(x, torch.Generator().manual_seed(3)))
    theirs = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, (theirs - c.shift) * c.scale, **TOL)
    assert (drawn - mode).abs().max() > 1e-3
    wanted = (vae.decode(mode / c.scale + c.shift).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(mode), wanted, **TOL)
    # and the constants matter
    assert (vae.decode(mode).sample / 2 + 0.5 - wanted).abs().max() > 1e-3
    wrong = next(f for f in FAMILIES if f != family)
    with pytest.raises(ValueError, match=f"not of family {wrong}"):
        load_vae(tmp_path, wrong)


@torch.no_grad()
def test_vaes_of_one_picture_at_a_time_and_always_in_fp32() -> None:
    codec = DiffusersCodec(small_vae("sdxl").half())
    assert {p.dtype for p in codec.parameters()} == {torch.float32}
    pictures = [torch.rand(3, 16, 24), torch.rand(3, 32, 16)]
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    z = codec.encode(pictures, seeds)
    alone = codec.encode(pictures[1][None], torch.Generator().manual_seed(2))
    torch.testing.assert_close(z[1], tensor(alone)[0], **TOL)
    with torch.autocast("cpu", torch.bfloat16):
        picture = codec.decode(z)[0]
    assert picture.dtype == torch.float32
    torch.testing.assert_close(picture, codec.decode(z)[0])
    assert not codec.train().vae.training


@torch.no_grad()
def test_vaes_with_statistics_for_each_channel() -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = small_vae("sdxl", latents_mean=mean, latents_std=std)
    codec = DiffusersCodec(vae)
    x = torch.rand(1, 3, 16, 16)
    z = vae.encode(x * 2 - 1).latent_dist.mean
    shaped = [torch.tensor(v).reshape(1, 4, 1, 1) for v in (mean, std)]
    torch.testing.assert_close(tensor(codec.encode(x, mode=True)), (z - shaped[0]) * 0.13025 / shaped[1], **TOL)
    assert codec.digest() != DiffusersCodec(small_vae("sdxl")).digest()


def test_folders_without_a_vae_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no VAE"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="no VAE family 'dc-ae'"):
        DiffusersCodec(small_vae("sd"), "dc-ae")
