"""A model or generator folder out of a checkpoint, whatever number of ranks wrote it and however they cut it."""

from __future__ import annotations

from pathlib import Path

import torch

from accessory.train import checkpoint

FINAL = "final-"
"""Texts of a checkpoint whose names begin so are those of the folder that the run exports at its end."""


def model_folder(path: Path, target: Path) -> None:
    """Write the folder that the run would have exported, had it ended with the checkpoint at ``path``. All or nothing.

    Raises:
        CheckpointError: when the checkpoint is damaged, or ``target`` cannot be written.
        ValueError: when it does not say what is exported, or lacks some of it.
    """
    content = checkpoint.load(path)
    kinds: dict[str, str] | None = content.state.get("export")
    texts = {f.name.removeprefix(FINAL): f.read_text(encoding="utf-8") for f in sorted(path.glob(f"{FINAL}*"))}
    if kinds is None or not texts:
        raise ValueError(f"{path} does not say what its run exports; resume the run and let it end")
    tensors = {**content.trainable, **(content.average if content.state["averaged"] else {})}
    if missing := sorted(kinds.keys() - tensors.keys()):
        raise ValueError(
            f"{path}: {len(missing)} tensors of what its run exports do not train, and no checkpoint has them "
            f"({', '.join(missing[:5])}); resume the run and let it end"
        )
    state = {name: tensors[name].to(getattr(torch, kind)) for name, kind in kinds.items()}
    texts["versions.json"] = (path / "versions.json").read_text(encoding="utf-8")
    checkpoint.write_folder(target, {"trainable.safetensors": state}, texts)
