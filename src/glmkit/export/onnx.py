"""ONNX: a folder that onnxruntime and `glm run` answer from, without torch in the process.

model.onnx         one graph for prompts and steps: past.N.key and past.N.value in, present.N.* out
model.onnx.data    its constants
runtime/           what `glm run` needs: prompts, vocabulary, layout, and the first past of P-Tuning
generation_config.json, chat_template.jinja, licences      of the source
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmkit.errors import UsageError
from glmkit.export.agreement import disagreement
from glmkit.export.constants import Weights, open_weights
from glmkit.export.folders import complete_folder, completed_config
from glmkit.export.graph import Exported, trace
from glmkit.export.onnx_graph import Constants, draw, external_file
from glmkit.export.runtime_data import write_runtime_data
from glmkit.writing import write_folder

MODEL = "model.onnx"
GRAPH = {"engine": "onnx", "file": MODEL}


def export(
    source: str | Path,
    target: str | Path,
    *,
    weights: str | None = None,
    adapter: str | Path | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model as a folder for onnxruntime; it appears only when a new process has run it.

    Args:
        source: Folder, model name or hub id, also of a quantised model, whose numbers are kept.
        target: The folder to make.
        weights: "int8" or "int4" to quantise the linears; None keeps the numbers.
        adapter: A LoRA, which is merged, or P-Tuning's prefix, which the folder carries.
        family: What the source is, if its folder does not say it.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        CheckpointError: Source or adapter is damaged.
        UsageError: An option does not fit the source, or there is no tokenizer.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        OutputError: The folder exists, cannot be written, or what was written is not the source.
    """
    with open_weights(source, adapter=adapter, family=family) as opened, write_folder(target, overwrite) as new:
        if opened.tokenizer is None:
            raise UsageError(
                f"{source} has no tokenizer, and what is exported answers texts",
                hint="copy the tokenizer's files from the checkpoint's original repository",
            )
        forms = opened.forms(weights)  # refused before the graph is made
        write_graph(draw(trace(opened.config, last_only=True)), opened, new / MODEL, weights)
        generation = opened.folder.read_object("generation_config.json")
        values = completed_config(opened.folder, opened.config)
        if opened.prefix_tokens:
            values["pre_seq_len"] = opened.prefix_tokens
        notes = complete_folder(new, opened.folder, values, opened.tokenizer, made_by="exported to ONNX")
        write_runtime_data(
            new, opened.config, opened.tokenizer, GRAPH, generation_config=generation, prefix=opened.prefix()
        )
        found = disagreement(
            opened, new, GRAPH, adapter=adapter, family=family, exact=not forms and not opened.quantised
        )
        size = sum(one.stat().st_size for one in new.rglob("*") if one.is_file())
        notes += _notes(opened, weights, size, found)
    return Exported(str(target), size, notes, found)


def write_graph(model: Any, opened: Weights, path: Path, weights: str | None = None) -> None:
    """Writes a graph and its constants, one of them in memory at a time.

    Args:
        model: The step, drawn without weights; it is changed.
        opened: Where its constants come from.
        path: The .onnx file; the constants go beside it.
        weights: "int8" or "int4" to quantise them, None to keep them.
    """
    with external_file(path).open("wb") as file:
        constants = Constants(model, file, external_file(path).name)
        for name, weight in opened.read(weights):
            constants.put(name, weight)
        constants.finish()
    path.write_bytes(model.SerializeToString())


def _notes(opened: Weights, weights: str | None, size: int, difference: float | None) -> list[str]:
    notes = []
    if difference is None:
        notes.append("the source is large and has a prefix: the graph ran, and was not compared")
    if opened.quantised is not None:
        notes.append(f"the source is quantised to {opened.quantised}: its numbers were taken as they are")
    if opened.error is not None:
        notes.append(f"{weights}: weights differ by {opened.error:.1%} of their size")
    if weights is not None and size >= opened.folder.nbytes:
        notes.append(f"{weights} is not smaller than the source: the rest of the folder outweighs it")
    if opened.prefix_tokens:
        notes.append("the P-Tuning prefix is in runtime/prefix.npy; other programs give it as the first past")
    return notes
