"""Tar shards written by the tests."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_tar(
    path: Path, samples: Sequence[Mapping[str, bytes]], keys: Sequence[str] = (), format: int = tarfile.USTAR_FORMAT
) -> None:
    """Samples as members KEY.EXTENSION, keys 000000 and so on where none are given."""
    with tarfile.open(path, "w", format=format) as tar:
        for i, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{keys[i] if keys else f'{i:06}'}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
