"""Before a run says that it is done, its result is opened in a new process, as a user will, and its logits compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from glmkit.engine.probe import probe_logits
from glmkit.errors import OutputError
from glmkit.fresh import in_new_process
from glmkit.loading import load
from glmkit.train.arguments import ModelBlock
from glmkit.writing import save_tensors

_WRITE_AGAIN = "the checkpoints are whole; --resume writes the result again"
_ROUNDINGS = 16  # how many units of the frozen weights' rounding the logits may be away, relative to their size


def compare_result(model: nn.Module, block: ModelBlock, result: Path) -> str:
    """Open what was written and compare it with what was trained.

    Args:
        model: The trained model.
        block: The recipe's `model` block: the base that an adapter is opened with.
        result: Folder of the whole model, or of the adapter.

    Returns:
        What was compared and what came of it, for the report.

    Raises:
        OutputError: If the folder cannot be opened, or is not what was trained. The checkpoints are untouched.
    """
    adapter = (result / "adapter_config.json").exists() or result.name == "adapter"
    if adapter and block.path is None:
        return "not compared: the base is in no folder"
    dtype = max((one.dtype for one in model.parameters() if one.is_floating_point()), key=lambda kind: -kind.itemsize)
    order: dict[str, Any] = {
        "path": block.path if adapter else str(result),
        "adapter": str(result) if adapter else None,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device) if (block.quantize or "").startswith("bnb") else "cpu",
        "quantize": block.quantize if adapter else None,
        "kernels": "torch",  # as it was trained
        "family": block.family,
    }
    was_training = model.training
    model.eval()
    try:
        expected = probe_logits(model)
    finally:
        model.train(was_training)
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(folder, {"logits": expected}, file_name="probe.safetensors")
        apart = in_new_process(
            "glmkit.train.reopened:difference", {**order, "probe": f"{folder}/probe.safetensors"}, hint=_WRITE_AGAIN
        )
    limit = max(1e-4, _ROUNDINGS * torch.finfo(dtype).eps)
    if not apart <= limit:
        raise OutputError(
            f"{result} was written, but is not what was trained: its logits differ by {apart:.2%} of their size, "
            f"expected at most {limit:.2%}",
            hint=_WRITE_AGAIN,
        )
    return f"the same logits in a new process (largest part that differs: {apart:.1e} of their size)"


def difference(path: str, probe: str, **options: Any) -> float:
    """Does the new process's part: compares what is loaded with the trained model's logits.

    Args:
        path: Folder of the model.
        probe: File of the logits.
        **options: What else `glmkit.load` takes.

    Returns:
        How far they are apart, relative to their size.
    """
    expected = load_file(probe)["logits"]
    found = probe_logits(load(path, **options).model)
    return float((found - expected).norm() / (expected - expected.mean()).norm())
