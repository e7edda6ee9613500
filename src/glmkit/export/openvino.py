"""OpenVINO: a folder that `openvino_genai.LLMPipeline` and `glm run` answer from, without torch in the process.

    openvino_model.xml, .bin    one stateful graph for prompts and steps: the cache is inside, `beam_idx` says which row
                                of it each row goes on from
    openvino_tokenizer.xml      text to ids, and openvino_detokenizer.xml back, where OpenVINO can express the tokenizer
    runtime/                    what `glm run` needs: prompts, vocabulary, layout
    config, tokenizer files     of the source

The graph is traced without weights; its constants are put in one after the other, float as they are stored or in our
int8 and int4 forms, which OpenVINO multiplies as they are.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmkit.export.agreement import disagreement
from glmkit.export.constants import Packed, Weights, open_weights
from glmkit.export.folders import complete_folder, completed_config
from glmkit.export.graph import Exported, Traced, trace
from glmkit.export.openvino_tokenizer import save_tokenizer
from glmkit.export.runtime_data import write_runtime_data
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.quant.schemes import FORMS
from glmkit.runtime.session import load_openvino
from glmkit.writing import write_folder, write_text_atomic

MODEL = "openvino_model.xml"
_UNPACKED = "/unpacked"  # how a Convert is called that gives a stored number in float32
_MARK = '<rt_info><attribute name="decompression" version="0" /></rt_info>'


def export(
    source: str | Path,
    target: str | Path,
    *,
    weights: str | None = None,
    adapter: str | Path | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model as an OpenVINO folder, and runs it in a process without torch before it gets its name.

    Args:
        source: Folder, model name or hub id.
        target: The folder to make.
        weights: "int8" or "int4" (`glmkit.export.constants`); None keeps the numbers as they are, quantised ones too.
        adapter: Folder of an adapter: a LoRA is merged, a P-Tuning prefix becomes the beginning of the cache.
        family: What the source is, if its folder does not say it.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: The source is quantised already, or a layer cannot be quantised so.
        CheckpointError: Source or adapter is damaged.
        MissingDependencyError: openvino or openvino-tokenizers is not installed.
        OutputError: The folder cannot be written, or does not say what the source says.
    """
    load_openvino()
    with open_weights(source, adapter=adapter, family=family) as opened, write_folder(target, overwrite) as new:
        forms = opened.forms(weights)  # refused before the graph is made
        model = build(trace(opened.config), opened, weights)
        save(model, new / MODEL)
        del model
        notes = _complete(new, opened)
        found = disagreement(
            opened, new, {"engine": "openvino", "file": MODEL}, adapter=adapter, family=family, exact=not forms
        )
        nbytes = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        notes += _about_weights(opened, weights, nbytes)
        if found is None:
            notes.append("the source is large and has a prefix: the graph ran, and was not compared")
    return Exported(str(target), nbytes, notes, found)


def _complete(new: Path, opened: Weights) -> list[str]:
    """Writes what stands beside the graph; returns what a user should know."""
    tokenizer, generation = opened.tokenizer, opened.folder.read_object("generation_config.json") or {}
    values = completed_config(opened.folder, opened.config)
    if opened.prefix_tokens:
        values["pre_seq_len"] = opened.prefix_tokens
    notes = complete_folder(new, opened.folder, values, tokenizer, made_by="exported to OpenVINO")
    if tokenizer is None:
        return [*notes, "so it cannot be chatted with: glm run and LLMPipeline need a tokenizer"]
    write_runtime_data(
        new, opened.config, tokenizer, {"engine": "openvino", "file": MODEL}, generation_config=generation or None
    )
    if not isinstance(opened.config, ChatGLM2Config) or not save_tokenizer(new, tokenizer):
        return [*notes, "openvino_genai.LLMPipeline cannot feed this family's masks and positions: use glm run"]
    generation["eos_token_id"] = sorted(tokenizer.stop_ids)  # where LLMPipeline looks for them
    write_text_atomic(new / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if opened.prefix_tokens:
        notes.append(
            'LLMPipeline(FOLDER, "CPU", ATTENTION_BACKEND="SDPA") keeps the P-Tuning prefix, as glm run does; other'
            " backends of openvino_genai have a cache of their own, which begins without it"
        )
    return notes


def _about_weights(opened: Weights, scheme: str | None, nbytes: int) -> list[str]:
    notes = []
    if opened.quantised is not None:
        notes.append(f"the source is quantised to {opened.quantised}: its numbers were taken as they are")
    if opened.error is not None:
        notes.append(f"{scheme}: weights differ by {opened.error:.1%} of their size")
    if scheme in FORMS and nbytes >= opened.folder.nbytes:
        notes.append(f"{scheme} is not smaller than the source: the rest of the folder outweighs it")
    return notes


# --- the graph ---


def build(traced: Traced, weights: Weights, scheme: str | None = None) -> Any:
    """Makes the graph, with its constants and its cache inside.

    Args:
        traced: The step.
        weights: Where its constants come from.
        scheme: "int8" or "int4" to quantise them, None to keep them.

    Returns:
        An `openvino.Model`.
    """
    ov = load_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about torch
        drawn = ov.convert_model(traced.program)
    parameters = dict(zip(traced.input_names, drawn.get_parameters(), strict=True))
    results = dict(zip(traced.output_names, drawn.get_results(), strict=True))
    for name, weight in weights.read(scheme):
        constant = _constant(weight, name)
        for target in parameters.pop(name).output(0).get_target_inputs():
            target.replace_source_output(constant.output(0))
    sinks = _keep_cache_inside(traced, parameters, results, weights.prefix())
    for name, parameter in parameters.items():
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
    logits = results["logits"]
    logits.output(0).set_names({"logits"})
    model = ov.Model([logits], sinks, list(parameters.values()), "step")
    model.validate_nodes_and_infer_types()
    return model


def _constant(weight: Tensor | Packed, name: str) -> Any:
    """The node that gives a weight in float32: a constant, or what unpacks it where it is multiplied."""
    ov = load_openvino()
    op = ov.opset15
    if isinstance(weight, Tensor):
        return _float32(_stored(weight, name), name)
    rows, columns = weight.weight.shape[0], weight.weight.shape[1] * 8 // weight.bits
    groups = [weight.scale.shape[1], -1] if weight.scale.ndim == 2 else [-1]
    shape = [rows, *groups[:-1], columns // (groups[0] if len(groups) == 2 else 1)]
    codes = weight.weight.contiguous().view(torch.uint8)
    if weight.bits == 4:  # OpenVINO has the even column in the low half of a byte
        codes = (codes >> 4) | (codes << 4)
    held = ov.Tensor(codes.numpy(), ov.Shape(shape), ov.Type.i4 if weight.bits == 4 else ov.Type.i8)
    scale = weight.scale if weight.scale.dtype == torch.float16 else weight.scale.float()
    factor = _stored(scale.reshape(*shape[:-1], 1), f"{name}_scale")
    codes_node = ov.op.Constant(held, shared_memory=False)
    codes_node.set_friendly_name(name)
    node = op.multiply(op.convert(codes_node, factor.get_element_type().to_dtype()), factor)
    if len(shape) == 3:
        node = op.reshape(node, op.constant(np.array([rows, columns], np.int64)), special_zero=False)
    return node if scale.dtype == torch.float32 else op.convert(node, np.float32)


def _stored(tensor: Tensor, name: str) -> Any:
    """A constant with the numbers of a tensor, in its dtype."""
    ov = load_openvino()
    kinds = {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    node = ov.op.Constant(ov.Tensor(data, ov.Shape(list(tensor.shape)), kinds[tensor.dtype]), shared_memory=False)
    node.set_friendly_name(name)
    return node


def _float32(node: Any, name: str) -> Any:
    op = load_openvino().opset15
    if node.get_element_type().get_type_name() == "f32":
        return node
    converted = op.convert(node, np.float32)
    converted.set_friendly_name(name + _UNPACKED)
    return converted


def _keep_cache_inside(
    traced: Traced, parameters: dict[str, Any], results: dict[str, Any], prefix: list[Tensor] | None
) -> list[Any]:
    """Turns past and present into a state whose rows `beam_idx` chooses; returns what writes it.

    The state begins with no column, or with a prefix, in as many rows as the first input_ids have.
    """
    ov = load_openvino()
    op, inputs = ov.opset15, traced.inputs
    beam_idx = op.parameter([-1], np.int32, name="beam_idx")
    zero = op.constant(np.int64(0))
    rows = op.gather(op.shape_of(parameters["input_ids"]), op.constant(np.array([0], np.int64)), zero)
    sinks = []
    for number, (past, present) in enumerate(zip(inputs.past_names, inputs.present_names)):
        sizes = op.constant(np.array([inputs.heads, inputs.prefix_tokens, inputs.width], np.int64))
        first = op.constant(np.float32(0)) if prefix is None else _stored(prefix[number], f"{past}.prefix")
        start = op.broadcast(first, op.concat([rows, sizes], 0))
        shape = ov.PartialShape([-1, inputs.heads, -1, inputs.width])
        read = op.read_value(start, past, np.float32, shape)
        chosen = op.gather(read, beam_idx, zero)
        for target in parameters.pop(past).output(0).get_target_inputs():
            target.replace_source_output(chosen.output(0))
        sinks.append(op.assign(results.pop(present).input_value(0).get_node(), past))
    parameters["beam_idx"] = beam_idx
    return sinks


def save(model: Any, path: Path) -> None:
    """Writes a graph, and says of its 16-bit constants that they are unpacked when they are used, not when it is read.

    Args:
        model: The graph.
        path: The .xml file; the constants go beside it, into the .bin file.
    """
    load_openvino().save_model(model, path, compress_to_fp16=False)
    text = path.read_text(encoding="utf-8")
    pattern = rf'(<layer id="\d+" name="[^"]*{re.escape(_UNPACKED)}" type="Convert"[^>]*>\s*<data [^>]*/>)'
    write_text_atomic(path, re.sub(pattern, rf"\1{_MARK}", text))
