"""A checkpoint of ChatGLM2, ChatGLM3 or GLM-4 as a GGUF file, for llama.cpp and what is built on it.

    config.json       keys chatglm.*                         here
    tokenizer         keys tokenizer.*, the chat template    gguf_vocabulary
    weights           tensors, one at a time                 gguf_tensors

Then a new process reads the file with the decoder of the package gguf, puts its tensors into our network and compares
the logits of a fixed prompt, before the folder gets its name.

A rope_ratio that multiplies the base is in the base; one that divides positions (ChatGLM2-6B-32K) is linear scaling.

Source: llama.cpp, llama-arch.cpp and src/models/chatglm.cpp.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from glmkit.checkpoint import shown_path
from glmkit.engine.probe import probe_logits
from glmkit.errors import ConfigError, MissingDependencyError, OutputError, UsageError
from glmkit.export.constants import Weights, open_weights
from glmkit.export.folders import LICENCES
from glmkit.export.gguf_tensors import QUANTISED, WEIGHTS, Planned, encode, gguf_name, plan
from glmkit.export.gguf_vocabulary import Vocabulary, read_vocabulary
from glmkit.export.graph import Exported
from glmkit.families import Family, find_family
from glmkit.fresh import in_new_process
from glmkit.loading import choose_family, load
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.writing import make_folder_beside, sync_folder, write_folder

_ARCHITECTURE, _SUFFIX = "chatglm", ".gguf"
_EXACT_BYTES = 4 * 10**9  # up to here logits are compared in float32
# How far logits may be away, relative to their size; wrong rows or a wrong sign are at 1 and more.
_LIMITS = {"F32": 1e-4, "F16": 2e-2, "BF16": 0.15, "Q8_0": 0.15, "Q4_0": 0.7}


def export(
    source: str | Path,
    target: str | Path,
    *,
    weights: str | None = None,
    adapter: str | Path | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a checkpoint as a GGUF file.

    Args:
        source: Folder, model name or hub id of a ChatGLM2, ChatGLM3 or GLM-4.
        target: The file to make, if its name ends in .gguf; else a folder for it, in which it is called after model and
            weights, such as chatglm3-6b-Q4_0.gguf, and has the licence beside it. It appears when it is compared.
        weights: None for the numbers as they are, else "f16", "int8" (which is "q8_0") or "int4" ("q4_0"), see
            `gguf_tensors`.
        adapter: Folder of a LoRA adapter, which is merged tensor by tensor.
        family: What the source is, if its folder does not say it.
        overwrite: Whether an existing file or folder may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: No such weights, a source that is quantised already, or one without tokenizer.
        ConfigError: A model that llama.cpp's network of ChatGLM does not compute.
        CheckpointError: The source is damaged.
        OutputError: The file cannot be written, or its logits are not the source's.
        MissingDependencyError: The package gguf is not installed.
    """
    gguf = _package()
    if weights is not None and weights not in WEIGHTS:
        raise UsageError(f"weights={weights!r}: expected {', '.join(WEIGHTS)}, or none for the numbers as they are")
    with open_weights(source, adapter=adapter, family=family) as opened:
        config = _checked(opened)
        vocabulary = _vocabulary(opened)
        tensors = plan(opened, weights)
        kind = next(one.kind for one in tensors.values() if ".ffn_up." in one.name)
        row = choose_family(source, family) or find_family(str(opened.folder.config.get("_name_or_path", "")))
        name = row.name if row is not None else opened.location.resolve().name
        with _writing(Path(target), f"{name}-{kind}.gguf", overwrite) as file:
            _write(gguf, file, opened, config, vocabulary, tensors, _general(gguf, name, row, kind, tensors))
            for licence in LICENCES:
                data = opened.folder.read_bytes(licence)
                if data is not None:
                    (file.parent / licence).write_bytes(data)
            difference = _compare(opened, adapter, family, file, {one.kind for one in tensors.values()})
            size = file.stat().st_size
    path = Path(target) if Path(target).suffix == _SUFFIX else Path(target) / file.name
    notes = []
    if kind in QUANTISED.values():
        notes.append(f"{kind}: logits differ from the source's by {difference:.2%} of their size")
        if size >= opened.folder.nbytes:
            notes.append(f"it is not smaller: {size} bytes, and the source's tensors have {opened.folder.nbytes}")
    return Exported(str(path), size, notes, difference)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("gguf", "export") from error
    return gguf


@contextlib.contextmanager
def _writing(target: Path, name: str, overwrite: bool) -> Iterator[Path]:
    """The file to write: in a folder that appears when all is well, or itself what appears."""
    if target.suffix != _SUFFIX:
        with write_folder(target, overwrite) as new:
            yield new / name
        return
    target = target.expanduser().absolute()
    if target.exists() and not overwrite:
        raise OutputError(
            f"{shown_path(target)} exists", hint="choose another name, or --overwrite (in Python overwrite=True)"
        )
    new = make_folder_beside(target)
    try:
        yield new / target.name
        try:
            sync_folder(new)
            os.replace(new / target.name, target)
        except OSError as error:
            raise OutputError(
                f"cannot write {shown_path(target)}: {error.strerror}",
                hint="free space there, or choose a place that can be written to",
            ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


# --- what is taken ---


def _checked(opened: Weights) -> ChatGLM2Config:
    """The config, of a model that llama.cpp computes as we do."""
    config, path = opened.config, shown_path(opened.folder.path)
    if not isinstance(config, ChatGLM2Config):
        raise ConfigError(
            f"{path} holds a {type(config).__name__.removesuffix('Config')}: llama.cpp computes ChatGLM2, ChatGLM3 and"
            " GLM-4, and has no network that reads a prompt in both directions",
            hint="--to openvino or --to onnx takes every family",
        )
    if config.pre_seq_len:
        raise ConfigError(
            f"{path} has a P-Tuning prefix of {config.pre_seq_len} columns, for which GGUF has no place",
            hint="export the base; or --to openvino or --to onnx, which carry the prefix",
        )
    if config.add_bias_linear:
        raise ConfigError(
            f"{path} has add_bias_linear=true, and llama.cpp's network of ChatGLM no such biases",
            hint="--to openvino or --to onnx takes every family",
        )
    if config.num_attention_heads * config.kv_channels != config.hidden_size:
        raise ConfigError(
            f"{path} has {config.num_attention_heads} heads of {config.kv_channels} and"
            f" hidden_size={config.hidden_size}: in llama.cpp's network of ChatGLM the heads make up the hidden size",
            hint="--to openvino or --to onnx takes every family",
        )
    return config


def _vocabulary(opened: Weights) -> Vocabulary:
    if opened.tokenizer is None:
        raise UsageError(
            f"{shown_path(opened.folder.path)} has no tokenizer, and a GGUF file needs one",
            hint="copy the tokenizer's files from the checkpoint's original repository",
        )
    return read_vocabulary(opened.tokenizer, opened.config.vocab_size)


# --- the file ---


def _general(gguf: Any, name: str, row: Family | None, kind: str, tensors: dict[str, Planned]) -> dict[str, Any]:
    """The keys of `general`, by the names that the package's functions have."""
    parameters = sum(math.prod(one.shape) for one in tensors.values())
    found: dict[str, Any] = {
        "type": gguf.GGUFType.MODEL,
        "name": name,
        "size_label": gguf.size_label(parameters, 0, 0, 0),
        "file_type": int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]),
    }
    if kind in QUANTISED.values():
        maker = f"glmkit {metadata.version('glmkit')}"
        found |= {"quantization_version": gguf.GGML_QUANT_VERSION, "quantized_by": maker}
    if row is not None:
        found["license_name"] = row.licence
        if row.hub_id:
            found["source_url"] = f"https://huggingface.co/{row.hub_id}"
    return found


def _write(
    gguf: Any,
    file: Path,
    opened: Weights,
    config: ChatGLM2Config,
    vocabulary: Vocabulary,
    tensors: dict[str, Planned],
    general: dict[str, Any],
) -> None:
    writer = gguf.GGUFWriter(file, _ARCHITECTURE)
    for key, value in general.items():
        getattr(writer, f"add_{key}")(value)
    _write_sizes(gguf, writer, config)
    _write_vocabulary(writer, vocabulary)
    for one in tensors.values():
        kind = gguf.GGMLQuantizationType[one.kind]
        numbers, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(one.shape) // numbers * block_bytes
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (planned_as, one), (own, tensor) in zip(tensors.items(), opened.read(), strict=True):
            assert own == planned_as  # both in the order of the checkpoint
            writer.write_tensor_data(encode(tensor, one))
    except OSError as error:
        raise OutputError(
            f"cannot write {shown_path(file)}: {error.strerror}",
            hint="free space there, or choose a place that can be written to",
        ) from error
    finally:
        writer.close()


def _write_sizes(gguf: Any, writer: Any, config: ChatGLM2Config) -> None:
    base, divisor = config.rotary_base_and_scale()
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.multi_query_group_num)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    writer.add_rope_freq_base(base)
    if divisor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(divisor)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(False)  # it would be one id; a prompt begins with two, which the template writes
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.template)


# --- comparing ---


def _compare(opened: Weights, adapter: str | Path | None, family: str | None, file: Path, kinds: set[str]) -> float:
    exact = opened.folder.nbytes <= _EXACT_BYTES
    difference = in_new_process(
        "glmkit.export.gguf:compare",
        {
            "source": str(opened.location),
            "adapter": None if adapter is None else str(adapter),
            "family": family,
            "file": str(file),
            "dtype": "float32" if exact else "bfloat16",
        },
    )
    limit = max(_LIMITS[kind] for kind in kinds | ({"F32"} if exact else {"BF16"}))
    if not difference <= limit:
        raise OutputError(
            f"the file is not what the source is: its logits differ by {difference:.2%} of their size, expected at most"
            f" {limit:.2%}",
            hint="nothing was kept",
        )
    return float(difference)


def compare(source: str, adapter: str | None, family: str | None, file: str, dtype: str) -> float:
    """Puts what a GGUF file says into our network, sizes and tensors, and compares its logits with the source's.

    Args:
        source: The checkpoint.
        adapter: See `export`.
        family: See `export`.
        file: The file, read by the package gguf.
        dtype: To compute in.

    Returns:
        The distance relative to the size of the source's logits.

    Raises:
        OutputError: The file's tensors are not those of the network.
    """
    expected = probe_logits(load(source, adapter, dtype, "cpu", family=family, kernels="torch").model)
    found = probe_logits(_network(file, getattr(torch, dtype)))
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def _network(file: str, dtype: torch.dtype) -> ChatGLM2ForCausalLM:
    gguf = _package()
    reader = gguf.GGUFReader(file)
    names = {one.name for one in reader.tensors}
    with torch.device("meta"):
        model = ChatGLM2ForCausalLM(_config(reader, add_qkv_bias="blk.0.attn_qkv.bias" in names))
    waiting = {gguf_name(own): own for own in model.state_dict()}
    if names != set(waiting):
        raise OutputError(f"{shown_path(Path(file))} has other tensors: {', '.join(sorted(names ^ set(waiting)))}")
    for one in reader.tensors:
        numbers = torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).astype(np.float32)).to(dtype)
        owner, _, leaf = waiting[one.name].rpartition(".")
        module = model.get_submodule(owner)
        if numbers.shape != module._parameters[leaf].shape:
            raise OutputError(f"{one.name} of {shown_path(Path(file))} has the shape {list(numbers.shape)}")
        module._parameters[leaf] = nn.Parameter(numbers, requires_grad=False)
    return model.eval()


def _config(reader: Any, *, add_qkv_bias: bool) -> ChatGLM2Config:
    """The sizes that a file says, by our names."""

    def said(key: str) -> Any:
        return reader.fields[f"{_ARCHITECTURE}.{key}"].contents()

    heads, hidden = said("attention.head_count"), said("embedding_length")
    divides = f"{_ARCHITECTURE}.rope.scaling.factor" in reader.fields
    return ChatGLM2Config(
        num_layers=said("block_count"),
        padded_vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=hidden,
        ffn_hidden_size=said("feed_forward_length"),
        kv_channels=hidden // heads,
        num_attention_heads=heads,
        multi_query_group_num=said("attention.head_count_kv"),
        seq_length=said("context_length"),
        layernorm_epsilon=said("attention.layer_norm_rms_epsilon"),
        rope_ratio=said("rope.scaling.factor") if divides else said("rope.freq_base") / 10_000,
        rope_ratio_applies_to="position" if divides else "base",
        add_qkv_bias=add_qkv_bias,
    )
