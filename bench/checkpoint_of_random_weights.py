"""Writes a checkpoint of ChatGLM3-6B's shape with random weights, to measure real sizes without real weights.

    python bench/checkpoint_of_random_weights.py FOLDER [--layers 28] [--dtype bfloat16]

28 layers in bfloat16 are 12.5 GB. The values repeat after 64 million numbers; no figure depends on them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.writing import save_tensors, write_folder

_POOL = 64 * 2**20


def write_checkpoint(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """Writes config and weights and returns the bytes of the weights."""
    config = ChatGLM2Config(num_layers=layers, generation=3, rope_ratio_applies_to="base", dtype=dtype)
    with torch.device("meta"):
        shapes = ChatGLM2ForCausalLM(config).to(dtype).state_dict()
    pool = (
        torch.empty(_POOL, dtype=torch.float32).normal_(std=0.02, generator=torch.Generator().manual_seed(1)).to(dtype)
    )

    def tensor(name: str) -> torch.Tensor:
        shape = shapes[name].shape
        if name.endswith("layernorm.weight"):
            return torch.ones(shape, dtype=dtype)
        numbers = shape.numel()
        return pool.repeat(-(-numbers // _POOL))[:numbers].view(shape)

    def names() -> Iterator[str]:
        yield from shapes

    with write_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=2))
        save_tensors(new, shapes, fetch=tensor, max_shard_bytes=2 * 10**9)
    return sum(t.numel() * t.element_size() for t in shapes.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    size = write_checkpoint(arguments.folder, arguments.layers, getattr(torch, arguments.dtype))
    print(f"{arguments.folder}: {size / 1e9:.2f} GB")
