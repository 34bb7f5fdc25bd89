"""The entry point of lmms-eval: names our classes, and imports neither them nor torch."""

from __future__ import annotations

from typing import Any

MODULE = "accessory.evaluate.lmms"


def manifest() -> Any:
    """What the harness's registry (``lmms_eval.models``, from 0.7 on) takes from an entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="accessory",
        chat_class_path=f"{MODULE}.AccessoryChat",
        simple_class_path=f"{MODULE}.AccessorySimple",
        aliases=("sphinx",),
    )
