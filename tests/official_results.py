"""What the official code computed for one family of shared/conformance, beside our model with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

ATOL = 1e-4  # the float32 noise of the official code against a float64 run is 5e-6 to 3e-5


class Case:
    """One family's stored results and its model in float32."""

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        self.arrays = np.load(folder / "arrays.npz")
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **kwargs).eval()

    def inputs(self, name: str) -> dict[str, torch.Tensor]:
        start = f"{name}.in."
        return {
            key[len(start) :]: torch.from_numpy(self.arrays[key]) for key in self.arrays.files if key.startswith(start)
        }

    def close(self, name: str, logits: torch.Tensor, atol: float = ATOL) -> None:
        subset = self.arrays["vocab_subset"]
        np.testing.assert_allclose(logits[..., subset].numpy(), self.arrays[f"{name}.logits"], atol=atol, rtol=0)


def score(model: Any, sequence: torch.Tensor, prompt: int, eos: int) -> float:
    """The mean log-probability of what a sequence has behind its prompt, up to and with the first end."""
    ids = sequence[0].tolist()
    ids = ids[: ids.index(eos, prompt) + 1] if eos in ids[prompt:] else ids
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return sum(float(logs[i - 1, ids[i]]) for i in range(prompt, len(ids))) / (len(ids) - prompt)
