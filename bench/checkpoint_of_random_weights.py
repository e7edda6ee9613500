"""Writes a checkpoint of a released model's shape with random weights, to measure real sizes without real weights.

    python bench/checkpoint_of_random_weights.py FOLDER [--family chatglm3-6b] [--layers 28] [--dtype bfloat16]

ChatGLM3-6B's 28 layers in bfloat16 are 12.5 GB. The values repeat after 64 million numbers; no figure depends on them.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

import glmkit  # noqa: F401 - makes the classes known
from glmkit.families import find_family
from glmkit.inspection import released_config
from glmkit.registration import LANGUAGE_MODELS
from glmkit.writing import save_tensors, write_folder

_POOL = 64 * 2**20


def write_checkpoint(
    folder: Path, family: str, layers: int | None, dtype: torch.dtype, *, vocabulary: int | None = None
) -> int:
    """Writes config and weights and returns the bytes of the weights."""
    row = find_family(family)
    assert row is not None, f"no family {family}"
    config = released_config(row)
    config.dtype, config.num_layers = dtype, layers or config.num_layers
    if vocabulary is not None:
        config.padded_vocab_size = vocabulary
    if row.architecture == "chatglm2":
        config.generation, config.rope_ratio_applies_to = row.generation, "position" if row.generation == 2 else "base"
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(config)](config).to(dtype)
    tied = set(model._tied_weights_keys or {})
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    pool = (
        torch.empty(_POOL, dtype=torch.float32).normal_(std=0.02, generator=torch.Generator().manual_seed(1)).to(dtype)
    )

    def tensor(name: str) -> torch.Tensor:
        shape = shapes[name].shape
        if "layernorm" in name:
            return torch.ones(shape, dtype=dtype)
        numbers = shape.numel()
        start = zlib.crc32(name.encode()) % _POOL  # tensors of one shape that are equal are stored once by some formats
        return pool.roll(start).repeat(-(-numbers // _POOL))[:numbers].view(shape)

    def names() -> Iterator[str]:
        yield from shapes

    with write_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=2))
        save_tensors(new, shapes, fetch=tensor, max_shard_bytes=2 * 10**9)
    return sum(t.numel() * t.element_size() for t in shapes.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="chatglm3-6b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    size = write_checkpoint(arguments.folder, arguments.family, arguments.layers, getattr(torch, arguments.dtype))
    print(f"{arguments.folder}: {size / 1e9:.2f} GB")
