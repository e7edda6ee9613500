"""Any checkpoint as a folder in the official layout, or as a bare file of weights.

    to_official(source, folder)   safetensors with the official names, config, tokenizer: from folders (.bin too), bare
                                  files and MindFormers' tables
    to_file(source, file)         one state dict: .pth, .bin, .safetensors; with MindFormers' names .ckpt, .npz too

Tensors go from file to file one at a time; the result is read again, and compared in a new process.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glmkit.checkpoint import Folder, open_folder, shown_path
from glmkit.errors import OutputError, UsageError
from glmkit.export.folders import Converted, complete_folder, completed_config
from glmkit.export.mindspore import mindformers_name
from glmkit.export.numbers import chosen_dtype, coarsest, dtype_names, recast
from glmkit.export.proof import check_written, compare, require, summed
from glmkit.export.sources import open_source, read_one, read_source
from glmkit.export.state_file import SUFFIXES, StateFile, sync_file, write_state
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.weights import check_model, empty_model
from glmkit.writing import ShapedTensor, save_tensors, write_folder

SHARD_BYTES = 5_000_000_000
"""What one file of a folder holds at most, as in the official folders' size."""


@dataclass(frozen=True)
class Result:
    """A folder that is written, and proven to be its source, before it gets its name.

    Args:
        target: Its name.
        to: Its form.
        shard_bytes: The most tensor data in one file.
        before: Name -> what the tensor of this name was before it was rounded.
    """

    target: str | os.PathLike[str]
    to: str
    shard_bytes: int
    before: Mapping[str, ShapedTensor]

    def write(
        self,
        new: Path,
        folder: Folder,
        tensors: Mapping[str, ShapedTensor],
        fetch: Callable[[str], Tensor],
        beside: Callable[[], list[str]],
        source: Mapping[str, Any],
    ) -> Converted:
        """Writes it.

        Args:
            new: The folder under its temporary name.
            folder: The source.
            tensors: Name -> shape and dtype.
            fetch: Gives the tensor of a name.
            beside: Writes what stands beside the weights; returns what the user should know.
            source: How the source is opened again, see `glmkit.export.proof.compare`.

        Returns:
            What was done.

        Raises:
            OutputError: The folder cannot be written, or is not what its source is.
        """
        sums: dict[str, int] = {}
        save_tensors(new, tensors, fetch=summed(fetch, sums), max_shard_bytes=self.shard_bytes)
        notes = beside()
        with open_folder(new) as written:
            check_written(written, sums)
            after = written.nbytes
        found = compare(source, {"path": str(new)}, folder)
        require(found, folder, rounded=coarsest(self.before, tensors), what="what its source is")
        return Converted(
            os.fspath(self.target), self.to, len(tensors), dtype_names(tensors), folder.nbytes, after,
            found.difference, [*notes, *found.notes],
        )  # fmt: skip


def to_official(
    source: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    family: str | None = None,
    keep_code: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Writes a checkpoint as a folder of safetensors with the official names.

    Args:
        source: A folder, model name or hub id, or a bare file of weights, MindFormers' too.
        target: The folder to make; it appears only when it is complete and compared.
        like: For a bare file: the folder whose config.json and tokenizer belong to it.
        dtype: "auto" keeps each tensor's; "float32", "bfloat16" or "float16" is that of all.
        shard_bytes: The most tensor data in one file.
        family: What the source is, if it does not say it.
        keep_code: Whether the source's python files go along, unchanged and never run.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: No such dtype, or a quantised source for which there is no other.
        CheckpointError: The source is damaged, or is no whole model.
        OutputError: The folder cannot be written, or is not what its source is.
    """
    register()
    wanted = chosen_dtype(dtype)
    with open_source(source, like=like) as folder:
        config, tokenizer = read_source(folder, source, family)
        check_model(folder, empty_model(LANGUAGE_MODELS[type(config)], config))
        tensors, fetch = recast(folder.tensors, lambda name: read_one(folder, name), wanted)
        values = completed_config(folder, config)
        if wanted is not None:
            values = {name: value for name, value in values.items() if name != "dtype"} | {"torch_dtype": dtype}
        with write_folder(target, overwrite) as new:

            def beside() -> list[str]:
                done = "converted to the official layout"
                notes = complete_folder(new, folder, values, tokenizer, made_by=done, keep_code=keep_code)
                return [*_about_training(folder), *notes]

            side = _side(source, like, family)
            result = Result(target, "official", shard_bytes, before=folder.tensors)
            return result.write(new, folder, tensors, fetch, beside, side)


def to_file(
    source: str | Path,
    target: str | Path,
    *,
    mindformers: bool = False,
    like: str | Path | None = None,
    dtype: str = "auto",
    family: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes the weights of a checkpoint as one bare file.

    Args:
        source: See `to_official`.
        target: The file; its ending says which kind. It appears only when it is complete and compared.
        mindformers: Whether tensors get MindFormers' names; else their official ones.
        like: See `to_official`.
        dtype: See `to_official`.
        family: See `to_official`.
        overwrite: Whether an existing file may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: No such ending or dtype, or MindFormers has no such network.
        CheckpointError: The source is damaged, or is no whole model.
        OutputError: The file cannot be written, or is not what its source is.
    """
    register()
    path = Path(os.path.realpath(Path(target).expanduser()))
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{shown_path(path)}: expected a file that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{shown_path(path)} exists", hint="choose another name, or --overwrite (overwrite=True)")
    wanted = chosen_dtype(dtype)
    beside = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(4)}{path.suffix}")
    with open_source(source, like=like) as folder:
        if not folder.has("config.json"):
            raise UsageError(
                f"{shown_path(folder.path)} holds shards", hint="first: glm convert SRC FOLDER --to official"
            )
        config, _ = read_source(folder, source, family)
        check_model(folder, empty_model(LANGUAGE_MODELS[type(config)], config))
        tensors, fetch = recast(folder.tensors, lambda name: read_one(folder, name), wanted)
        names = {mindformers_name(name, config) if mindformers else name: name for name in tensors}
        sums: dict[str, int] = {}
        remembered = summed(fetch, sums)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            renamed = {name: tensors[own] for name, own in names.items()}
            write_state(beside, renamed, lambda name: remembered(names[name]))
            with StateFile(beside, folder.path) as written:
                check_written(written, sums)
                after = written.nbytes
            found = compare(
                _side(source, like, family),
                {"path": str(beside), "like": str(folder.path), "family": family},
                folder,
            )
            require(found, folder, rounded=coarsest(folder.tensors, tensors), what="what its source is")
            sync_file(beside)
            os.replace(beside, path)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OutputError(
                    f"cannot write {shown_path(path)}: {error.strerror}",
                    hint="free space there, or choose a place that can be written to",
                ) from error
            raise
        notes = [
            "a bare file has neither config nor tokenizer; the way back is"
            f" glm convert {path.name} FOLDER --to official --like SRC"
        ]
        to = "mindformers" if mindformers else "file"
        return Converted(
            str(target), to, len(tensors), dtype_names(tensors), folder.nbytes, after, found.difference,
            [*_about_training(folder), *notes, *found.notes],
        )  # fmt: skip


def _side(source: str | Path, like: str | Path | None, family: str | None) -> dict[str, Any]:
    return {"path": str(source), "like": None if like is None else str(like), "family": family}


def _about_training(folder: Folder) -> list[str]:
    left_out = getattr(folder, "left_out", [])
    if not left_out:
        return []
    return [f"left out: {len(left_out)} entries that training keeps beside the weights, such as {left_out[0]}"]
