"""Accessory: one LLaMA-family backbone that sees, encodes and dreams."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import accessory` costs nothing and loads no torch.
    if name == "load":
        from accessory.serve.chat import load

        return load
    raise AttributeError(f"module 'accessory' has no attribute {name!r}")
