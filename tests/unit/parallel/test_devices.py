"""Devices by name: what is not there or not known is refused before anything is loaded."""

import pytest
import torch

from accessory.parallel.groups import choose_device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with so many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(
    ("machine", "name", "rank", "chosen"),
    [
        (0, None, None, "cpu"),
        (0, "cpu", "1", "cpu"),
        (2, "cpu", None, "cpu"),
        (2, None, None, "cuda:0"),
        (2, None, "1", "cuda:1"),
        (2, "cuda", None, "cuda:0"),
        (2, "cuda", "1", "cuda:1"),
        (2, "cuda:1", "0", "cuda:1"),
    ],
    indirect=["machine"],
)
@pytest.mark.usefixtures("machine")
def test_a_device_by_name(name: str | None, rank: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(
    ("machine", "name", "said"),
    [
        (0, "cuda", "device cuda:0 is not available: torch finds no CUDA device"),
        (0, "cuda:1", "device cuda:1 is not available: torch finds no CUDA device"),
        (2, "cuda:2", "device cuda:2 is not available: the last one is cuda:1"),
        (2, "cuda:-1", "device 'cuda:-1' is unknown; it is cpu, cuda or cuda:N"),
        (2, "meta", "device 'meta' is unknown"),
        (2, "gpu", "device 'gpu' is unknown"),
    ],
    indirect=["machine"],
)
@pytest.mark.usefixtures("machine")
def test_a_device_that_is_not_there(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_device(name)
