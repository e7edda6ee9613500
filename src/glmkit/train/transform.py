"""Checkpoints of several processes as one folder of safetensors, or for another number of processes.

    glm checkpoint transform RUN/step-1000 MODEL              what FSDP or ZeRO-3 wrote in parts -> a model folder
    glm checkpoint transform RUN/step-1000 STEP --ranks 4     the same in four parts, moments included
    glm checkpoint transform DEEPSPEED MODEL                  what DeepSpeed itself wrote -> a model folder

Nothing has to be transformed to resume: every number of processes reads the parts of every other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glmkit.errors import CheckpointError, UsageError
from glmkit.train.checkpoints import checkpoints, publish
from glmkit.train.parts import PARTS, WEIGHTS, fill, has_parts, shapes_of
from glmkit.train.zero_files import ZeroFiles, is_deepspeed
from glmkit.writing import save_tensors, write_folder

_LORA = "base_model.model."
_BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_NOT_BESIDE = ("trainer_state.json", "state.json", "manifest.json", "run.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Transformed:
    """What was written.

    Args:
        target: The folder.
        source: What the source was, in words.
        tensors: How many tensors.
        parameters: How many numbers they have.
    """

    target: Path
    source: str
    tensors: int
    parameters: int


def transform(
    source: str | Path,
    target: str | Path,
    *,
    ranks: int | None = None,
    model: str | Path | None = None,
    overwrite: bool = False,
) -> Transformed:
    """Merge a checkpoint of several processes, or write it for another number of them.

    Args:
        source: A checkpoint `step-N` of a run (or the run's folder: its newest) that is in parts, or a folder that
            DeepSpeed wrote.
        target: The folder to write.
        ranks: Write a checkpoint in so many parts instead of a model folder.
        model: Folder with config.json and tokenizer, where the source has none.
        overwrite: Replace an existing folder.

    Returns:
        What was written.

    Raises:
        UsageError: If the source is none of these.
        CheckpointError: If it is damaged, or holds more than tensors and plain values.
        OutputError: If the target cannot be written.
    """
    place = Path(source).expanduser()
    if not place.is_dir():
        raise UsageError(f"{place} is no folder", hint="a run's step-N, or a folder that DeepSpeed wrote")
    beside = None if model is None else Path(model).expanduser()
    if is_deepspeed(place):
        if ranks is not None:
            raise UsageError(
                "--ranks is for checkpoints of glmkit; a checkpoint of DeepSpeed is merged", hint="leave out --ranks"
            )
        return _merge_deepspeed(place, Path(target), beside or place, overwrite)
    if not (place / "state.json").is_file() and checkpoints(place):
        place = checkpoints(place)[0]
    if not has_parts(place):
        whole = next((place / name for name in ("model", "adapter") if (place / name).is_dir()), None)
        raise UsageError(
            f"{place} is no checkpoint in parts" + ("" if whole is None else ": it has the whole weights"),
            hint=f"{whole} can be loaded as it is" if whole else "a run's step-N, or a folder that DeepSpeed wrote",
        )
    if ranks is None:
        return _merge_parts(place, Path(target), beside or place / "model", overwrite)
    return _divide(place, Path(target), ranks, overwrite)


def _merge_parts(place: Path, target: Path, beside: Path, overwrite: bool) -> Transformed:
    parts = place / PARTS
    shapes = {key: size for key, size in shapes_of(parts).items() if key.startswith(f"{WEIGHTS}.")}
    if not (place / "model").is_dir():
        raise UsageError(
            f"{place} holds what was learnt beside a base model, and that is whole already",
            hint=f"{place / 'adapter'} is the adapter; glm merge joins it with its base",
        )
    dtypes = _dtypes(parts)
    promised = {
        key.removeprefix(f"{WEIGHTS}."): torch.empty(size, dtype=dtypes[key], device="meta")
        for key, size in shapes.items()
    }

    def fetch(name: str) -> Tensor:
        key = f"{WEIGHTS}.{name}"
        tensor = torch.empty(shapes[key], dtype=dtypes[key])
        fill(parts, {key: tensor})
        return tensor

    return _write_model(target, promised, fetch, beside, f"{_count(parts)} parts of step {_step(place)}", overwrite)


def _merge_deepspeed(place: Path, target: Path, beside: Path, overwrite: bool) -> Transformed:
    files = ZeroFiles(place)
    names = {name: name for name in files.shapes}
    if any(name.startswith(_LORA) for name in names):
        names = {
            name.replace(".default.", "."): name for name in names if ".lora_" in name or "modules_to_save" in name
        }
        if not (beside / "adapter_config.json").is_file():
            raise CheckpointError(
                str(beside),
                ["it holds LoRA matrices, but there is no adapter_config.json"],
                hint="name the folder that has it with --model",
            )
    tensors = {own: files.tensor(name) for own, name in names.items()}  # views of the files, not yet read
    said = f"DeepSpeed ZeRO-{'3' if files.stage == 3 else '1/2'}"
    file = "adapter_model.safetensors" if any(name.startswith(_LORA) for name in names) else "model.safetensors"
    return _write_model(target, tensors, tensors.__getitem__, beside, said, overwrite, file)


def _write_model(
    target: Path,
    tensors: dict[str, Tensor],
    fetch: Callable[[str], Tensor],
    beside: Path,
    said: str,
    overwrite: bool,
    file: str = "model.safetensors",
) -> Transformed:
    needed = "config.json" if file == "model.safetensors" else "adapter_config.json"
    if not (beside / needed).is_file():
        raise CheckpointError(
            str(beside),
            [f"no {needed}: the weights alone are no model"],
            hint="name the base model's folder with --model",
        )
    with write_folder(target, overwrite=overwrite) as new:
        save_tensors(new, tensors, fetch=fetch, file_name=file)
        for path in sorted(beside.iterdir()):
            wanted = path.suffix in _BESIDE and path.name not in _NOT_BESIDE and not path.name.endswith(".index.json")
            if path.is_file() and wanted:
                shutil.copyfile(path, new / path.name)
    return Transformed(target, said, len(tensors), sum(tensor.numel() for tensor in tensors.values()))


def _divide(place: Path, target: Path, ranks: int, overwrite: bool) -> Transformed:
    """Write all tensors in so many parts of about equal size."""
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: expected 1 or more")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{target} exists and is not empty", hint="choose another name, or --overwrite")
    parts = place / PARTS
    shapes, dtypes = shapes_of(parts), _dtypes(parts)
    shares: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    sizes = [0] * ranks
    for key in sorted(shapes, key=lambda key: -shapes[key].numel()):
        smallest = sizes.index(min(sizes))
        shares[smallest][key] = torch.empty(shapes[key], dtype=dtypes[key], device="meta")
        sizes[smallest] += shapes[key].numel()

    def fetch(key: str) -> Tensor:
        tensor = torch.empty(shapes[key], dtype=dtypes[key])
        fill(parts, {key: tensor})
        return tensor

    def write(folder: Path) -> None:
        shutil.copytree(place, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PARTS, "manifest.json"))
        (folder / PARTS).mkdir()
        for number, share in enumerate(shares):
            save_tensors(folder / PARTS, share, fetch=fetch, file_name=f"part-{number:05d}.safetensors")
        shutil.copyfile(parts / "steps.json", folder / PARTS / "steps.json")

    manifest = json.loads((place / "manifest.json").read_text())
    publish(target, write, {key: value for key, value in manifest.items() if key != "files"})
    said = f"{_count(parts)} parts of step {_step(place)} as {ranks}"
    return Transformed(target, said, len(shapes), sum(size.numel() for size in shapes.values()))


def _dtypes(parts: Path) -> dict[str, torch.dtype]:
    from safetensors import safe_open

    found: dict[str, torch.dtype] = {}
    for file in sorted(parts.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                found[key] = _DTYPES[opened.get_slice(key).get_dtype()]
    return found


def _count(parts: Path) -> int:
    return len(list(parts.glob("*.safetensors")))


def _step(place: Path) -> int:
    return int(json.loads((place / "state.json").read_text())["step"])
