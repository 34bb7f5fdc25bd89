"""Codecs without a library: pixel space, our own autoencoder, and what all codecs share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accessory.diffusion import autoencoder
from accessory.diffusion.autoencoder import AutoencoderConfig, TinyAutoencoder
from accessory.diffusion.latent_cache import CacheReader, CacheWriter
from accessory.diffusion.latents import FAMILIES, Codec, LatentCodec, PixelCodec, noise_like

SMALL = {"width": 8, "depth": 1}


def tensor(value: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_published_constants() -> None:
    # (z - shift) * scale, from the model cards of the VAEs
    assert {k: (c.channels, c.scale, c.shift, c.factor) for k, c in FAMILIES.items()} == {
        "sd": (4, 0.18215, 0.0, 8),
        "sdxl": (4, 0.13025, 0.0, 8),
        "sd3": (16, 1.5305, 0.0609, 8),
        "flux": (16, 0.3611, 0.1159, 8),
    }


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_pixel_space_is_exact(patch: int) -> None:
    codec: LatentCodec = PixelCodec(patch)
    x = torch.rand(2, 3, 8, 16)
    z = tensor(codec.encode(x))
    assert z.shape == (2, 3 * patch**2, 8 // patch, 16 // patch) == (2, codec.channels, 8 // patch, 16 // patch)
    torch.testing.assert_close(codec.decode(z), x)
    # a cell of the grid holds its own patch
    torch.testing.assert_close(z[0, :, 0, 0], (x[0, :, :patch, :patch] * 2 - 1).flatten())


def test_lists_are_of_any_sizes() -> None:
    codec = PixelCodec(2)
    pictures = [torch.rand(3, 4, 8), torch.rand(3, 6, 2)]
    z = codec.encode(pictures)
    assert isinstance(z, list)
    assert [tuple(v.shape) for v in z] == [(12, 2, 4), (12, 3, 1)]
    back = codec.decode(z)
    for a, b in zip(back, pictures, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_shapes_are_refused() -> None:
    codec = PixelCodec(2)
    for bad in (torch.rand(1, 3, 5, 4), torch.rand(3, 4, 4), torch.rand(1, 1, 4, 4)):
        with pytest.raises(ValueError, match="sides multiples of 2"):
            codec.encode(bad)
    with pytest.raises(ValueError, match=r"latents must be \(B, 12, h, w\)"):
        codec.decode(torch.rand(1, 4, 2, 2))
    with pytest.raises(ValueError, match="scale of 3 numbers for 4 channels"):
        Codec(4, 8, scale=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="patch"):
        PixelCodec(0)


def test_noise_belongs_to_the_picture() -> None:
    x = torch.zeros(3, 2, 4)
    together = noise_like(x, seeded(5, 6, 7))
    assert torch.equal(together[1:2], noise_like(x[1:2], seeded(6)))
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="2 generators for 3 pictures"):
        noise_like(x, seeded(1, 2))


@pytest.mark.parametrize("latent", ["tanh", "norm", "kl"])
@pytest.mark.parametrize(("factor", "channels"), [(4, 4), (8, 8), (2, 4)])
def test_our_autoencoder_has_the_shapes(latent: str, factor: int, channels: int) -> None:
    config = AutoencoderConfig(channels, factor, latent=latent, **SMALL)  # type: ignore[arg-type]
    codec: LatentCodec = TinyAutoencoder(config)
    x = torch.rand(2, 3, 16, 32)
    z = tensor(codec.encode(x))
    assert z.shape == (2, channels, 16 // factor, 32 // factor)
    assert tensor(codec.decode(z)).shape == x.shape
    again = tensor(codec.encode(x))
    assert torch.equal(z, again) == (latent != "kl")
    assert torch.equal(tensor(codec.encode(x, mode=True)), tensor(codec.encode(x, mode=True)))
    drawn = tensor(codec.encode(x, seeded(1, 2)))
    assert torch.equal(drawn[1:], tensor(codec.encode(x[1:], seeded(2)))) or torch.allclose(
        drawn[1:], tensor(codec.encode(x[1:], seeded(2))), atol=1e-5
    )
    if latent == "tanh":
        assert z.abs().max() < 1
    if latent == "norm":
        torch.testing.assert_close(z.mean(1), torch.zeros(2, 16 // factor, 32 // factor), atol=1e-4, rtol=0)


def test_the_default_autoencoder_is_of_the_promised_size() -> None:
    count = sum(p.numel() for p in TinyAutoencoder().parameters())
    assert 1_000_000 < count < 2_000_000


def blobs(count: int) -> Tensor:
    """Pictures (count, 3, 16, 16) of one coloured square each."""
    g = torch.Generator().manual_seed(0)
    x = torch.ones(count, 3, 16, 16)
    for picture in x:
        i, j = torch.randint(0, 9, (2,), generator=g).tolist()
        picture[:, i : i + 8, j : j + 8] = torch.rand(3, 1, 1, generator=g)
    return x


@pytest.mark.parametrize("latent", ["tanh", "kl"])
def test_our_autoencoder_learns(latent: str) -> None:
    torch.manual_seed(1)
    model = TinyAutoencoder(AutoencoderConfig(4, 4, 16, 1, latent=latent))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = blobs(16)
    first = None
    for _ in range(100):
        losses = model.losses(x)
        first = first or losses["pixels"].item()
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
    assert set(losses) == {"pixels", "edges"} | ({"kl"} if latent == "kl" else set())
    assert first is not None
    assert losses["pixels"].item() < 0.35 * first
    model.fit(x.split(8))
    z = tensor(model.encode(x, mode=True))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    mse = ((tensor(model.decode(z)) - x) ** 2).mean()
    assert mse < 0.5 * x.var()


def test_every_parameter_of_our_autoencoder_gets_a_gradient() -> None:
    model = TinyAutoencoder(AutoencoderConfig(latent="kl", **SMALL))  # type: ignore[arg-type]
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    sum(model.losses(torch.rand(2, 3, 16, 16)).values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_save_and_load(tmp_path: Path) -> None:
    model = TinyAutoencoder(AutoencoderConfig(8, 4, latent="norm", **SMALL))  # type: ignore[arg-type]
    model.fit([torch.rand(2, 3, 16, 16)])
    model.save(tmp_path / "ae.safetensors")
    back = autoencoder.load(tmp_path / "ae.safetensors")
    x = torch.rand(1, 3, 16, 16)
    assert back.config == model.config
    assert torch.equal(tensor(back.encode(x)), tensor(model.encode(x).detach()))  # type: ignore[union-attr]
    assert back.digest() == model.digest()
    assert not any(p.requires_grad for p in back.parameters())
    with torch.no_grad():
        back.scale *= 1.01
    assert back.digest() != model.digest()
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "ae.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable"):
        autoencoder.load(tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match="is missing"):
        autoencoder.load(tmp_path / "none.safetensors")


def test_bad_sizes_are_refused() -> None:
    for bad, said in (({"factor": 3}, "factor"), ({"width": 12}, "width"), ({"latent": "norm", "channels": 1}, "norm")):
        with pytest.raises(ValueError, match=said):
            AutoencoderConfig(**bad)  # type: ignore[arg-type]


def test_latents_in_a_cache_are_those_of_their_codec(tmp_path: Path) -> None:
    codec = TinyAutoencoder(AutoencoderConfig(latent="kl", **SMALL)).requires_grad_(False)  # type: ignore[arg-type]
    x = torch.rand(3, 3, 16, 16)
    with CacheWriter(tmp_path, {"codec": codec.digest()}) as cache:
        found = codec.moments(x)
        assert found.std is not None
        for i in range(3):
            cache.add(str(i), {"mean": found.mean[i], "std": found.std[i]})
    row = CacheReader(tmp_path, {"codec": codec.digest()})["2"]
    torch.testing.assert_close(row["mean"], found.mean[2])
    assert row["std"].min() > 0
    with torch.no_grad():
        next(codec.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="made by something else"):
        CacheReader(tmp_path, {"codec": codec.digest()})
