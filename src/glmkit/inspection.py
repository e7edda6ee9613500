"""What a checkpoint is and what it costs, without loading it: `glm inspect`."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from glmkit.checkpoint import Folder, open_folder
from glmkit.errors import UsageError
from glmkit.families import find_family
from glmkit.loading import check_model, read_config
from glmkit.location import DownloadError, locate
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM, ChatGLM2ForSequenceClassification
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.quant.official import is_quantised_layer, quantize_model

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


def inspect(name: str, *, context_tokens: int = 8_192, batch: int = 1) -> dict[str, Any]:
    """Describes a folder, or a family that is not on this machine (from its released sizes).

    Args:
        name: A folder, family name or hub id. Nothing is fetched.
        context_tokens: Context length for the KV cache estimate.
        batch: Number of sequences for it.

    Returns:
        Plain values ready for JSON: family, source, config, parameters, dtypes, stored_bytes, tensors (name, shape,
        dtype) and memory_bytes per weight format, each with weights, kv_cache (float16) and total.

    Raises:
        UsageError: Unknown name.
        DownloadError: A hub id that is not on this machine.
        CheckpointError, ConfigError: The folder cannot be loaded.
    """
    family = find_family(name)
    try:
        location = locate(name, hub={"local_files_only": True})  # nobody looks at a model to fetch gigabytes
    except (UsageError, DownloadError):
        if family is None:
            raise
        location = None
    if location is None:
        config, source, tensors = ChatGLM2Config(), "released sizes; not on this machine", {}
        stored = family.bytes if family else 0
    else:
        with open_folder(location) as folder:
            config, source, stored = read_config(folder, family), str(location), folder.nbytes
            tensors = {name: (tuple(info.shape), info.dtype) for name, info in folder.tensors.items()}
            _check(folder, config)
            family = family or find_family(str(folder.config.get("_name_or_path", "")))
    if not tensors:
        with torch.device("meta"):
            state = ChatGLM2ForCausalLM(config).state_dict()
        tensors = {name: (tuple(tensor.shape), torch.float16) for name, tensor in state.items()}
    return {
        "schema": 1,
        "name": name,
        "family": family.name if family else None,
        "generation": config.generation or (family.generation if family else None),
        "source": source,
        "licence": family.licence if family else None,
        "config": {key: value for key, value in config.to_diff_dict().items() if isinstance(value, (int, float, str))},
        "parameters": sum(_parameters(name, shape, config) for name, (shape, _) in tensors.items()),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for _, dtype in tensors.values()}),
        "stored_bytes": stored,
        "context_tokens": context_tokens,
        "batch": batch,
        "memory_bytes": _memory(tensors, config, context_tokens, batch),
        "tensors": [
            {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for name, (shape, dtype) in sorted(tensors.items())
        ],
    }


def _check(folder: Folder, config: ChatGLM2Config) -> None:
    """Compares the tensors with those of the model, as loading does."""
    head = folder.tensors.get("classifier_head.weight")
    if head is not None:
        config.num_labels = head.shape[0]
    with torch.device("meta"):
        model = (ChatGLM2ForCausalLM if head is None else ChatGLM2ForSequenceClassification)(config)
        if config.quantization_bit:
            quantize_model(model, config.quantization_bit)
    check_model(folder, model)


def _parameters(name: str, shape: tuple[int, ...], config: ChatGLM2Config) -> int:
    if name.endswith((".weight_scale", "inv_freq")):
        return 0
    packed = config.quantization_bit == 4 and is_quantised_layer(name.removesuffix(".weight"))
    return prod(shape) * (2 if packed and name.endswith(".weight") else 1)


def _memory(tensors: Tensors, config: ChatGLM2Config, context_tokens: int, batch: int) -> dict[str, dict[str, int]]:
    """Bytes of weights (float16, or official int8 and int4 with float16 scales) and of a float16 KV cache."""
    cache = 2 * config.num_layers * config.multi_query_group_num * config.kv_channels * 2 * context_tokens * batch
    table = {}
    for label, bits in (("float16", 16), ("int8", 8), ("int4", 4)):
        weights = 0
        for name, (shape, _) in tensors.items():
            quantised = bits < 16 and name.endswith(".weight") and is_quantised_layer(name.removesuffix(".weight"))
            parameters = _parameters(name, shape, config)
            weights += parameters * bits // 8 + 2 * shape[0] if quantised else parameters * 2
        table[label] = {"weights": weights, "kv_cache": cache, "total": weights + cache}
    return table
