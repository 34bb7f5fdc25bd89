"""Classifier-free guidance: what it changes, what it leaves alone, and what it asks of the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Region, Steering
from accessory.diffusion.flag_dit import FlagDiT, FlagDiTConfig
from accessory.diffusion.guidance import Guidance, Guided
from tests.unit.diffusion.gaussian import Gaussian, told

X = torch.linspace(-2, 2, 2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
T = torch.tensor([0.3, 0.3])
CONDITION, NULL = told(1.0, -2.0), told(0.25)


def ask(guidance: Guidance | None, null: Condition | None = NULL, network: Gaussian | None = None) -> Tensor:
    out = Guided(network or Gaussian(), CONDITION, null, guidance)(X, T, 0.3)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("channels", [3, None])
def test_linear_in_scale_on_the_guided_channels(channels: int | None, batched: bool) -> None:
    outs = {s: ask(Guidance(s, channels, batched=batched)) for s in (0.0, 1.0, 2.0, 4.0)}
    torch.testing.assert_close(outs[2.0], (outs[0.0] + outs[4.0]) / 2)
    torch.testing.assert_close(outs[4.0] - outs[0.0], 4 * (outs[1.0] - outs[0.0]))
    alone = ask(None)
    assert torch.equal(outs[1.0], alone)
    assert (outs[4.0][:, :3] - alone[:, :3]).abs().min() > 0.1
    # The last channel is the conditional prediction where three are guided, and only there.
    assert torch.equal(outs[4.0][:, 3], alone[:, 3]) == (channels == 3)
    null = Gaussian()(X, T, told(0.25, 0.25))
    torch.testing.assert_close(outs[0.0][:, :3], null[:, :3])


def test_one_call_or_two() -> None:
    one, two = Gaussian(), Gaussian()
    torch.testing.assert_close(ask(Guidance(3.0), network=one), ask(Guidance(3.0, batched=False), network=two))
    assert one.asked == [4]
    assert two.asked == [2, 2]


def test_every_picture_may_have_its_own_null() -> None:
    own = ask(Guidance(3.0), told(0.25, 5.0))
    shared = ask(Guidance(3.0))
    torch.testing.assert_close(own[0], shared[0])
    assert (own[1] - shared[1]).abs().min() > 0.1


def test_lists_and_the_variance_channels() -> None:
    guidance = Guidance(3.0, 3)
    network = Gaussian()
    rows = Guided(network, CONDITION, NULL, guidance)([X[0], X[1, :, :2]], T, 0.3)
    torch.testing.assert_close(rows[0], ask(guidance)[0])
    torch.testing.assert_close(rows[1], ask(guidance)[1, :, :2])
    # A learned variance behind the latent channels is never guided.
    a, b = torch.randn(2, 2, 8, 3, 3)
    mixed = Guidance(3.0).combine(a, b, 4)
    assert isinstance(mixed, Tensor)
    assert torch.equal(mixed[:, 4:], a[:, 4:])
    torch.testing.assert_close(mixed[:, :4], b[:, :4] + 3 * (a[:, :4] - b[:, :4]))


def test_the_interval_saves_calls() -> None:
    network = Gaussian()
    guided = Guided(network, CONDITION, NULL, Guidance(3.0, interval=(0.25, 0.75)))
    outs = [guided(X, T, p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert network.asked == [2, 4, 4, 4, 2]
    assert [Guidance(s, interval=(0.5, 1.0)).acts(0.7) for s in (1.0, 2.0)] == [False, True]
    assert torch.equal(outs[0], ask(None))
    assert not torch.equal(outs[1], ask(None))


def test_rescale_brings_the_spread_back() -> None:
    alone, guided = ask(None), ask(Guidance(6.0))
    full, half = ask(Guidance(6.0, rescale=1.0)), ask(Guidance(6.0, rescale=0.5))

    def spread(x: Tensor) -> Tensor:
        return x.flatten(1).std(1)

    torch.testing.assert_close(spread(full), spread(alone))
    torch.testing.assert_close(half, (full + guided) / 2)
    fewer = ask(Guidance(6.0, 3, rescale=1.0))
    assert torch.equal(fewer[:, 3], alone[:, 3])


def test_the_network_works_in_its_own_dtype() -> None:
    class Small(torch.nn.Module):
        prediction, latent_channels = "flow", 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Tensor:
            assert condition.seq is not None
            self.seen += [x.dtype, t.dtype, condition.seq.dtype]
            return self.weight * x

    network = Small()
    out = Guided(network, CONDITION, NULL, Guidance(3.0))(X, T, 0.3)
    assert network.seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert isinstance(out, Tensor)
    assert out.dtype == torch.float32


def test_steering_knows_whose_rows_are_whose() -> None:
    regions = Steering(regions=(Region((0, 0, 1, 1), 0),), region_condition=told(9.0))
    seen = {}
    for batched in (True, False):
        network = Gaussian()
        Guided(network, CONDITION, NULL, Guidance(3.0, batched=batched), regions)(X, T, 0.3)
        seen[batched] = network.steerings
    assert [s.halves for s in seen[True] if s] == [2]
    first, second = seen[False]
    assert first is regions
    assert second is not None
    assert (second.regions, second.region_condition, second.halves) == ((), None, 1)
    network = Gaussian()
    Guided(network, CONDITION, NULL, Guidance(3.0), Steering(rope_scale=2.0))(X, T, 0.3)
    assert network.steerings == [Steering(rope_scale=2.0)]


def tiny() -> FlagDiT:
    """A small network that reads text, with nothing left at zero."""
    model = FlagDiT(FlagDiTConfig(dim=24, n_layers=2, n_heads=3, multiple_of=8, text_dim=6))
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    return model


def words(*lengths: int) -> Condition:
    seq = torch.randn(len(lengths), max(lengths), 6)
    return Condition(seq=seq, mask=torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("tied", ["shared", "regions", "none"])
def test_a_doubled_batch_is_two_calls_whatever_the_steering(tied: str) -> None:
    """Pictures that see each other, and prompts of regions: the unconditional rows must not be among them."""
    model, condition, null = tiny(), words(4, 2), words(1)
    regions = Steering(regions=(Region((0, 0, 0.5, 1), 0),), region_condition=words(3))
    steering = {"shared": Steering(shared_attention=True), "regions": regions, "none": None}[tied]
    x = torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        one, two = (
            Guided(model, condition, null, Guidance(3.0, batched=batched), steering)(x, T, 0.3)
            for batched in (True, False)
        )
        unsteered = Guided(model, condition, null, Guidance(3.0))(x, T, 0.3)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    apart = float((torch.as_tensor(one) - torch.as_tensor(unsteered)).abs().max())
    assert apart > 1e-2 if tied != "none" else apart == 0


def test_text_is_read_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, condition, null = tiny(), words(4, 2), words(1)
    reads: list[int] = []
    read = FlagDiT.read

    def counted(self: FlagDiT, condition: Condition, steering: Steering | None = None) -> object:
        reads.append(len(condition))
        return read(self, condition, steering)

    monkeypatch.setattr(FlagDiT, "read", counted)
    x = torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        guided = Guided(model, condition, null, Guidance(3.0, interval=(0.5, 1.0)))
        outs = [guided(x, torch.full((2,), t), t) for t in (0.1, 0.3, 0.6, 0.9)]
        assert reads == [2, 4]
        monkeypatch.delattr(FlagDiT, "read")
        again = Guided(model, condition, null, Guidance(3.0, interval=(0.5, 1.0)))
        for out, t in zip(outs, (0.1, 0.3, 0.6, 0.9), strict=True):
            torch.testing.assert_close(again(x, torch.full((2,), t), t), out, atol=1e-5, rtol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale 3.0 needs a null condition"):
        ask(Guidance(3.0), None)
    assert torch.equal(ask(Guidance(1.0), None), ask(None))
    with pytest.raises(ValueError, match="3 null conditions for 2 pictures"):
        ask(Guidance(3.0), told(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="different parts"):
        ask(Guidance(3.0), Condition(labels=torch.tensor([3])))
    for options, words in (
        ({"channels": 0}, "0 channels"),
        ({"rescale": 2.0}, r"rescale is 2\.0"),
        ({"interval": (0.8, 0.2)}, "must rise"),
    ):
        with pytest.raises(ValueError, match=words):
            Guidance(**options)  # type: ignore[arg-type]
