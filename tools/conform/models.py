"""The reference's text models as the wrapper saves them, built through the production importer."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from accessory.backbone.llama import Llama
from accessory.backbone.reference import TYPES, from_reference
from accessory.models.mllm import MLLM
from accessory.peft.attach import attach
from tools.conform.comparison import UnsupportedError


def wrapped(folder: Path, config: dict[str, Any]) -> MLLM:
    """The model of a case whose weights carry the wrapper's names; what the reference trains requires a gradient."""
    kind = config["llama_type"]
    if kind not in TYPES:
        raise UnsupportedError(f"there is no importer of {kind} yet")
    weights = load_file(folder / "weights.safetensors")
    llama, specs, state = from_reference(weights, config["args"], kind)
    model = Llama(llama).eval()
    if specs:
        attach(model, specs)
    model.load_state_dict(state)
    return MLLM(model)
