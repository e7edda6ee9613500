"""What was written is what it was written from: shown on the file's bytes, and by a process that knows nothing else.

    summed(fetch, sums)       remembers what was handed to the file
    check_written(new, sums)  reads every tensor again and compares
    compare(source, new)      a new process opens both, one after the other, and compares the logits of the probe

Where both models do not fit into memory, as many blocks of both as do are compared.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glmkit import hf
from glmkit.checkpoint import Folder
from glmkit.engine.probe import probe_ids, probe_logits
from glmkit.errors import OutputError, UsageError
from glmkit.export.sources import open_source, read_source
from glmkit.fresh import in_new_process
from glmkit.loading import load
from glmkit.machine import free_memory_bytes
from glmkit.models.architectures import is_native_layout
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.weights import load_model

_EXACT_BYTES = 4 * 10**9  # up to here the probe computes in float32, so that only the rounding of the result is seen
_ROUNDINGS = 16  # how many units of the rounding the logits may be away, relative to their size
_SHARE_OF_MEMORY = 0.6
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Comparison:
    """How near a written checkpoint is to what it was written from.

    Args:
        difference: Distance of its logits from the source's, relative to their size.
        blocks: How many blocks of the network were compared; all of them, or as many as memory held.
        of: How many it has.
    """

    difference: float
    blocks: int
    of: int

    @property
    def notes(self) -> list[str]:
        """What a user should know of it, in sentences."""
        if self.blocks == self.of:
            return []
        return [f"logits were compared after the first {self.blocks} of {self.of} blocks: more do not fit into memory"]


# --- bytes ---


def summed(fetch: Callable[[str], Tensor], sums: dict[str, int]) -> Callable[[str], Tensor]:
    """Like `fetch`, and keeps a check sum of every tensor that it gave.

    Args:
        fetch: Gives the tensor of a name.
        sums: Filled with name -> check sum.
    """

    def remembered(name: str) -> Tensor:
        tensor = fetch(name)
        sums[name] = _sum(tensor)
        return tensor

    return remembered


def check_written(written: Folder, sums: Mapping[str, int]) -> None:
    """Reads every tensor of a folder again and compares it with what was handed to the file.

    Args:
        written: The new checkpoint, opened.
        sums: From `summed`.

    Raises:
        OutputError: Tensors are missing, strange, or have other bytes.
    """
    if set(written.tensors) != set(sums):
        raise OutputError(f"{written.path} was not written as planned: it has other tensors")
    for name, tensor in written.read():
        if _sum(tensor) != sums[name]:
            raise OutputError(f"{name} was not written as it was made", hint="look at the disk; then write it again")


def _sum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# --- logits ---


def compare(expected: Mapping[str, Any], found: Mapping[str, Any], folder: Folder) -> Comparison:
    """Opens source and result in a new process, one after the other, and compares their logits.

    Args:
        expected: The source: `path`, and what else `open_source` and `glmkit.load` take of `like`, `config`, `family`,
            `adapter` and `adapter_config`.
        found: The result, likewise.
        folder: The opened source, which says how large it is.

    Returns:
        How near they are; whether that is near enough the caller says, see `require`.

    Raises:
        OutputError: The result cannot be opened again.
    """
    exact = folder.nbytes <= _EXACT_BYTES
    blocks, of = _blocks_that_fit(folder, 4 if exact else 2)
    arguments = {
        "expected": dict(expected),
        "found": dict(found),
        "dtype": "float32" if exact else "bfloat16",
        "blocks": None if blocks == of else blocks,
    }
    return Comparison(float(in_new_process("glmkit.export.proof:difference", arguments)), blocks, of)


def require(comparison: Comparison, folder: Folder, *, rounded: torch.dtype | None, what: str) -> None:
    """Refuses a result that is further from its source than rounding explains.

    Args:
        comparison: From `compare`.
        folder: The opened source.
        rounded: Dtype to which the result's numbers were rounded; None: none were.
        what: What the result should be, for the message: "what base and adapter are".

    Raises:
        OutputError: It is further away, or no number.
    """
    kinds = {rounded or torch.float32, torch.float32 if folder.nbytes <= _EXACT_BYTES else torch.bfloat16}
    limit = max(1e-4, _ROUNDINGS * max(torch.finfo(kind).eps for kind in kinds))
    if not comparison.difference <= limit:
        raise OutputError(
            f"what was written is not {what}: its logits differ by {comparison.difference:.2%} of their size,"
            f" expected at most {limit:.2%}",
            hint="nothing was kept; with --dtype float32 less is rounded",
        )


def difference(expected: Mapping[str, Any], found: Mapping[str, Any], dtype: str, blocks: int | None) -> float:
    """The new process's part: how far the logits of two checkpoints are apart, relative to the first ones' size.

    Args:
        expected: See `compare`.
        found: See `compare`.
        dtype: To compute in.
        blocks: How many blocks of the network are loaded; None: all.
    """
    first = _logits(dict(expected), dtype, blocks, is_new=False)
    second = _logits(dict(found), dtype, blocks, is_new=True)
    return float((second - first).norm() / (first - first.mean()).norm())


def _logits(side: dict[str, Any], dtype: str, blocks: int | None, *, is_new: bool) -> Tensor:
    """The probe's logits of one side; of the new one the tokenizer is opened too."""
    register()
    path, adapter, family = side.pop("path"), side.pop("adapter", None), side.pop("family", None)
    if adapter is not None:
        return probe_logits(load(path, adapter, dtype, "cpu", kernels="torch", family=family, **side).model)
    with open_source(path, **side) as folder:
        if is_native_layout(folder.config):
            return _native_logits(path, dtype, blocks)
        config, _ = read_source(folder, path, family, tokenizer=is_new)
        _complete(config)
        if blocks is not None:
            config.num_layers = blocks
            folder.tensors = {name: info for name, info in folder.tensors.items() if _block(name) < blocks}
        chosen = getattr(torch, dtype)
        return probe_logits(load_model(folder, LANGUAGE_MODELS[type(config)], config, chosen, torch.device("cpu")))


def _complete(config: CheckedConfig) -> None:
    """Gives control ids to a network that learns them from a tokenizer, if it has none; any will do to compare by."""
    last = config.vocab_size - 1
    if isinstance(config, GLMConfig) and (config.sop_token_id is None or not config.mask_token_ids):
        config.sop_token_id, config.mask_token_ids = last, [last - 1]
    if isinstance(config, GLM130BConfig) and config.bos_token_id > last:
        config.bos_token_id, config.gmask_token_id = last, last - 1
        config.mask_token_id, config.smask_token_id = last - 2, last - 3


@torch.inference_mode()
def _native_logits(path: str, dtype: str, blocks: int | None) -> Tensor:
    """The same of transformers' own class."""
    fewer = {} if blocks is None else {"num_hidden_layers": blocks}
    model = hf.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **fewer).eval()
    logits: Tensor = model(input_ids=torch.tensor([probe_ids(model.config)])).logits[0]
    return logits.float()


def _blocks_that_fit(folder: Folder, bytes_each: int) -> tuple[int, int]:
    """How many blocks memory holds with everything outside them, and how many there are."""
    sizes: dict[int, int] = {}
    for name, info in folder.tensors.items():
        stored = info.nbytes if info.dtype == torch.int8 else info.nbytes // info.dtype.itemsize * bytes_each
        sizes[_block(name)] = sizes.get(_block(name), 0) + stored
    free = free_memory_bytes()
    left = int(_SHARE_OF_MEMORY * (1 << 62 if free is None else free)) - sizes.pop(-1, 0)
    count = 0
    for block in sorted(sizes):
        left -= sizes[block]
        if left < 0:
            break
        count += 1
    if not count and sizes:
        raise UsageError(
            "there is not even memory for one block of the network, so the result could not be compared",
            hint="close other programs, or convert on a larger machine",
        )
    return count, len(sizes)


def _block(name: str) -> int:
    """The number of the block that a tensor belongs to; -1 outside of them."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1
