"""Puts a trained glm-nano into the package: float16, official names, greedy by default.

python nano/package.py build/nano/run/model src/glmkit/builtin/glm-nano
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import glmkit
from glmkit.writing import save_tensors, write_folder

GREEDY = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


def package(source: Path, target: Path) -> None:
    """Writes the folder that comes with the package and opens it again."""
    loaded = glmkit.load(source, dtype=torch.float16)
    config = loaded.config
    config.dtype, config.generation = torch.float16, 3
    config.architectures = ["ChatGLMModel"]
    with write_folder(target, overwrite=True) as new:
        (new / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=2) + "\n")
        (new / "generation_config.json").write_text(json.dumps(GREEDY, indent=2) + "\n")
        loaded.tokenizer.save_pretrained(new)
        save_tensors(new, loaded.model.state_dict())
    again = glmkit.load(target)
    megabytes = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"{target}: {megabytes:.1f} MB; 你好 -> {again.chat('你好').text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    package(arguments.source, arguments.target)
