"""The small GLM-130B whose results are stored, for the tests of model, strategies and tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.models.glm130b_config import config_from_tensors

FOLDER = Path(__file__).parent / "fixtures" / "glm130b"
IDS = {
    "mask_token_id": 89,
    "gmask_token_id": 90,
    "smask_token_id": 91,
    "bos_token_id": 92,
    "eos_token_id": [93, 88],
    "pad_token_id": 0,
    "max_sequence_length": 64,
}


def stored() -> dict[str, Any]:
    """What the official code generated, and from what."""
    return json.loads((FOLDER / "manifest.json").read_text())


def case(name: str) -> dict[str, Tensor]:
    """Inputs and results of one prompt, "MASK" or "gMASK"."""
    tensors = load_file(FOLDER / "logits.safetensors")
    return {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def model(weights: dict[str, Tensor] | None = None, implementation: str = "sdpa") -> GLM130BForCausalLM:
    """The model in float32, with the stored weights or others of the same names."""
    weights = weights or load_file(FOLDER / "weights.safetensors")
    config = config_from_tensors({name: tuple(tensor.shape) for name, tensor in weights.items()}, **IDS)
    config._attn_implementation = implementation
    network = GLM130BForCausalLM(config)
    missing, unexpected = network.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    assert not missing
    assert all(name.endswith("rotary_emb.inv_freq") for name in unexpected)
    return network.eval()
