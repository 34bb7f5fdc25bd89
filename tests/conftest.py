"""Shared fixtures. One torch thread before torch is imported: two threads on a busy two-core machine cost 20x."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.skips import SkipLedger

torch.set_num_threads(1)
# The first backward pass of a process counts devices, and once a stand-in for CUDA is there (FakeTensorMode brings one)
# it starts threads that no fork survives, as tests of several ranks need.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_configure(config: pytest.Config) -> None:
    """Skips are counted and bounded."""
    config.pluginmanager.register(SkipLedger())


@pytest.fixture(autouse=True)
def _clean_global_state() -> Iterator[None]:
    """Every test starts from the same seed and leaves the default dtype as it found it."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def asset_cache() -> Path:
    """The cache folder with every default asset but the language model and the encoder; a skip says what is missing."""
    from accessory.data import assets

    root = assets.default_cache()
    missing = [n for n in assets.ASSETS if n not in ("smollm2", "efficientnet-lite0") and assets.find(n, root) is None]
    if missing:
        pytest.skip(f"assets not in {root}: {', '.join(missing)} (python -m accessory fetch)")
    return root
