"""Model-parallel folders for another number of ranks, in the official quantised form, or as an ordinary folder.

    reshard(source, target, 8)           any checkpoint -> mp_rank_00 … mp_rank_07, as change_mp.py and convert_tp.py
    quantize_shards(source, target, 4)   every rank's linears to int4, as the --quantization-bit of convert_tp.py
    unshard(source, target)              a model-parallel folder -> config.json and safetensors

Tensors are read one at a time. A torch file is written in one go, so one rank's tensors are in memory at once; a folder
of safetensors is written as it is read. All of them appear under their names only when they are complete, were read
again, and gave the source's logits in a new process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.checkpoint import MODEL_WEIGHTS, Folder, open_folder, shown_path
from glmkit.errors import CheckpointError, OutputError, UsageError
from glmkit.export.folders import Converted
from glmkit.export.numbers import chosen_dtype, dtype_names, recast
from glmkit.export.official import SHARD_BYTES, Result
from glmkit.export.proof import compare, require
from glmkit.export.sources import read_one
from glmkit.location import locate
from glmkit.models.architectures import is_native_layout
from glmkit.models.partition import Partition, ranges
from glmkit.quant.official import is_quantised_layer, quantize_rows
from glmkit.runtime.exported import refuse
from glmkit.shards import TRACKERS, ModelParallelFolder, is_model_parallel, open_model_parallel, rank_file
from glmkit.writing import write_bytes_atomic, write_folder, write_text_atomic

_CARRIED = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.json", "ice_text.model", "cog-pretrain.model", "vocab.txt", "vocab.json"),
    "merges.txt",
)  # files beside the weights that are copied


def reshard(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    degree: int,
    *,
    dequantize: bool = False,
    iteration: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes a checkpoint as a model-parallel folder for `degree` ranks.

    Args:
        source: A model-parallel folder of any number of ranks, or a folder with config.json and weights.
        target: The folder to make; it gets `latest`, for GLM `latest_checkpointed_iteration.txt` too, and the source's
            config.json if there is one.
        degree: Number of ranks, which must divide the heads, the inner size and the vocabulary.
        dequantize: Whether a quantised checkpoint may become one of float16 numbers.
        iteration: Name of the iteration's folder; None: the source's, "1" if it has none.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        CheckpointError: The source is damaged, or incomplete.
        UsageError: It cannot be divided so, or it is quantised.
        OutputError: The target cannot be written.

    Source: change_mp.py of GLM and convert_tp.py of GLM-130B. Optimiser and random states are left out.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise UsageError(f"degree={degree!r}: expected a number of ranks, 1 or more")
    if iteration is not None and Path(iteration).name != iteration:
        raise UsageError(f"iteration={iteration!r}: expected the plain name of a folder")
    with _open(source, dequantize) as folder:
        parallel = folder if isinstance(folder, ModelParallelFolder) else None
        has_scales = any(name.endswith("_scale") for name in folder.tensors)
        if has_scales or (parallel is not None and parallel.bits and not dequantize):
            raise _quantised(folder)
        partition = parallel.partition if parallel is not None else _partition(folder)
        names = {name: _file_name(name, partition) for name in folder.tensors}
        for name, info in folder.tensors.items():  # what cannot be divided is found before anything is written
            rule = partition.rule(name)
            if rule.dim is not None:
                if len(info.shape) <= rule.dim:
                    raise CheckpointError(shown_path(folder.path), [f"tensor {name} has the shape {list(info.shape)}"])
                ranges(info.shape[rule.dim], rule, 0, degree, name)
        step = iteration or (parallel.iteration if parallel is not None else "1")
        beside = _beside(folder.training, partition, degree, step)

        def shards() -> Iterator[dict[str, Tensor]]:
            for rank in range(degree):
                yield {file_name: _part(folder, name, partition, rank, degree) for name, file_name in names.items()}

        with write_folder(target, overwrite) as new:
            _write(new, step, shards(), beside, partition)
            _carry(folder, new)
            if parallel is None and partition.family == "glm":  # the GELU of the folder, not that of training files
                _write_config(new, {"gelu": "erf", **folder.config})
            return _proven(source, folder, new, target)


def quantize_shards(
    source: str | os.PathLike[str], target: str | os.PathLike[str], bits: int, *, overwrite: bool = False
) -> Converted:
    """Writes a model-parallel folder with every rank's linears in the official row-wise format.

    Each rank quantises what it holds, so the row scales of divided columns belong to this number of ranks.

    Args:
        source: A model-parallel folder of floating-point numbers, already of the wanted number of ranks.
        target: The folder to make.
        bits: 8 or 4.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done; `difference` is what the fewer bits cost.

    Raises:
        CheckpointError: The source is damaged.
        UsageError: Other bits, the source is quantised already, or int4 of an odd number of columns.
        OutputError: The target cannot be written.

    Source: the quantisation of GLM-130B's convert_tp.py.
    """
    if bits not in (4, 8):
        raise UsageError(f"bits={bits!r}: the official format has 4 or 8 bits")
    with open_model_parallel(source, needs_config=False) as folder:
        if folder.bits:
            raise _quantised(folder)

        def shards() -> Iterator[dict[str, Tensor]]:
            for rank in range(folder.degree):
                shard = {}
                for name, tensor in folder.read_rank(rank):
                    owner, _, leaf = name.rpartition(".")
                    if leaf == "weight" and is_quantised_layer(owner):
                        shard[name], shard[f"{name}_scale"] = quantize_rows(tensor, bits)
                    else:
                        shard[name] = tensor
                yield shard

        with write_folder(target, overwrite) as new:
            _write(new, folder.iteration, shards(), folder.training, folder.partition)
            _carry(folder, new)
            return _proven(source, folder, new, target, bits=bits)


def unshard(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes a model-parallel folder as an ordinary one, with config.json and safetensors.

    Args:
        source: A model-parallel folder; if several ranks are quantised the result is float16.
        target: The folder to make.
        config: The content of config.json, where the source has none and its tensors do not tell it.
        dtype: "auto" keeps each tensor's; "float32", "bfloat16" or "float16" is that of all.
        shard_bytes: The most tensor data in one file.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        CheckpointError: The source is damaged, or its config cannot be known.
        OutputError: The target cannot be written.
    """
    wanted = chosen_dtype(dtype)
    with open_model_parallel(source, config=config) as folder, write_folder(target, overwrite) as new:
        kept = {name: info for name, info in folder.tensors.items() if not name.endswith(".inv_freq")}
        tensors, fetch = recast(kept, lambda name: read_one(folder, name), wanted)

        def beside() -> list[str]:
            _carry(folder, new)
            _write_config(new, folder.config | ({} if wanted is None else {"torch_dtype": dtype}))
            return []

        side = {"path": os.fspath(source), "config": dict(config or {})}
        result = Result(target, "official", shard_bytes, before=folder.tensors)
        return result.write(new, folder, tensors, fetch, beside, side)


def _proven(
    source: str | os.PathLike[str], folder: Folder, new: Path, target: str | os.PathLike[str], *, bits: int = 0
) -> Converted:
    """Opens new shards again as one checkpoint, and compares it with the source: its numbers, and what it computes."""
    notes: list[str] = []
    difference = None
    with open_model_parallel(new, needs_config=False) as written:
        theirs = {_file_name(name, written.partition): name for name in folder.tensors}
        for name in written.tensors if not bits else ():
            if not torch.equal(read_one(written, name), read_one(folder, theirs[_file_name(name, written.partition)])):
                raise OutputError(
                    f"{name} was not written as it was read", hint="look at the disk; then write it again"
                )
        tensors, after = written.tensors, sum(rank.nbytes for rank in written.ranks)
    before = sum(rank.nbytes for rank in folder.ranks) if isinstance(folder, ModelParallelFolder) else folder.nbytes
    if "num_layers" in folder.config:
        known = {name: value for name, value in folder.config.items() if name != "quantization_bit"}
        found = compare({"path": os.fspath(source)}, {"path": str(new), "config": known}, folder)
        if not bits:
            require(found, folder, rounded=None, what="what its source is")
        difference, notes = found.difference, found.notes
    else:
        notes.append("logits were not compared: neither config.json nor the shards say the number of heads")
    if bits and after >= before:
        notes.append(f"the quantised shards are not smaller: {after:,} bytes of tensors, the source has {before:,}")
    return Converted(os.fspath(target), "shards", len(tensors), dtype_names(tensors), before, after, difference, notes)


def _open(source: str | os.PathLike[str], dequantize: bool) -> Folder:
    if is_model_parallel(source):
        return open_model_parallel(source, needs_config=False, dequantize=dequantize)
    location = locate(source)
    refuse(location)
    folder = open_folder(location, weights=MODEL_WEIGHTS)
    if is_native_layout(folder.config):
        folder.close()
        raise UsageError(
            f"{shown_path(location)} is in transformers' own layout", hint="first: glm convert SRC FOLDER --to official"
        )
    return folder


def _quantised(folder: Folder) -> UsageError:
    return UsageError(
        f"{shown_path(folder.path)} is quantised: the scales of its rows belong to its number of ranks",
        hint="divide the unquantised checkpoint and quantise the result; or use dequantize=True for float16 numbers",
    )


def _partition(folder: Folder) -> Partition:
    config = folder.config
    if "num_attention_heads" not in config or "model_type" not in config:
        raise CheckpointError(
            shown_path(folder.path),
            ["config.json lacks model_type or num_attention_heads"],
            hint="compare config.json with the one of the official repository",
        )
    groups = config.get("multi_query_group_num")
    kind = "chatglm2" if config["model_type"] == "chatglm" and groups else config["model_type"]
    return Partition(kind, config["num_attention_heads"], groups)


def _file_name(name: str, partition: Partition) -> str:
    """GLM's classes put `glm.` before the names, its training code does not."""
    return name.removeprefix("glm.") if partition.family == "glm" else name


def _part(folder: Folder, name: str, partition: Partition, rank: int, degree: int) -> Tensor:
    rule = partition.rule(name)
    if rule.dim is None or degree == 1:
        return next(tensor for _, tensor in folder.read([name]))
    size = folder.tensors[name].shape[rule.dim]
    return folder.read_part(name, rule.dim, ranges(size, rule, rank, degree, name))


def _beside(training: Mapping[str, Any], partition: Partition, degree: int, iteration: str) -> dict[str, Any]:
    """What a rank's file says beside its weights."""
    beside = dict(training)
    if partition.family == "glm" and not beside:
        beside = {"mp_world_size": degree, "iteration": int(iteration) if iteration.isdecimal() else 0}
    if "mp_world_size" in beside:
        beside["mp_world_size"] = degree
    return beside


def _write(
    new: Path, iteration: str, shards: Iterator[dict[str, Tensor]], beside: Mapping[str, Any], partition: Partition
) -> None:
    place = new / iteration
    try:
        place.mkdir()
        for rank, shard in enumerate(shards):
            torch.save({"module": shard, **beside}, place / rank_file(rank))
            shard.clear()  # its memory goes before the next is made
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError, as is too deep a nesting
        raise OutputError(f"cannot write {shown_path(place)}: {error}", hint="is there space on the disk?") from error
    for tracker in TRACKERS if partition.family == "glm" else TRACKERS[:1]:
        write_text_atomic(new / tracker, iteration)


def _write_config(new: Path, values: Mapping[str, Any]) -> None:
    write_text_atomic(new / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _carry(folder: Folder, new: Path) -> None:
    """Copies the config and the tokenizer, where there are any."""
    for name in _CARRIED:
        data = folder.read_bytes(name, limit_bytes=64 << 20)
        if data is not None:
            write_bytes_atomic(new / name, data)
