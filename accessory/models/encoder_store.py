"""Frozen encoders on disk, once: a file is named after the SHA-256 of its bytes, and models name it so.

A published checkpoint carries its encoders in every tensor-parallel shard (6.8 GB each for SPHINX). Here the models
that see with the same encoder share one file, in the encoder's published names and precision.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from accessory.backbone.store import read_file
from accessory.data.assets import default_cache


def encoder_path(digest: str, cache: Path | None = None) -> Path:
    """Where the file of that SHA-256 lies; ValueError where ``digest`` is no SHA-256 in hexadecimal."""
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise ValueError(f"tower.encoders names {digest!r}, which is no SHA-256 (64 hexadecimal digits)")
    return (cache or default_cache()) / "encoders" / f"{digest}.safetensors"


def keep_encoder(state: Mapping[str, Tensor], cache: Path | None = None) -> str:
    """Write an encoder's tensors unless the very same are there; returns their file's SHA-256.

    The same tensors under the same names make the same file in any order.
    """
    folder = encoder_path("0" * 64, cache).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".encoder.", dir=folder)
    os.close(handle)
    private = Path(name)
    try:
        # Clones: tensors of one storage cannot be written, and of a slice only the slice should be.
        save_file({k: state[k].detach().clone().contiguous() for k in sorted(state)}, private)
        digest = file_digest(private)
        if not encoder_path(digest, cache).exists():
            private.chmod(0o644)
            os.replace(private, encoder_path(digest, cache))
    finally:
        private.unlink(missing_ok=True)
    return digest


def read_encoder(digest: str, name: str, cache: Path | None = None) -> dict[str, Tensor]:
    """The tensors that :func:`keep_encoder` wrote; ``name`` is what an error calls them.

    Raises:
        ValueError: when the file is not there, or holds other bytes than its name says.
    """
    path = encoder_path(digest, cache)
    if not path.is_file():
        raise ValueError(
            f"tower.encoders names {name} by its SHA-256, but {path} is missing; convert its checkpoint again"
        )
    if (found := file_digest(path)) != digest:
        raise ValueError(f"{path} has SHA-256 {found}: the encoder {name} was changed or is torn; convert it again")
    return read_file(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
