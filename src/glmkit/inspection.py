"""What a checkpoint is and what it costs, without loading it: `glm inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from glmkit.checkpoint import Folder
from glmkit.errors import UsageError
from glmkit.families import Family, find_family
from glmkit.loading import choose_family, open_model, read_config
from glmkit.location import DownloadError, locate
from glmkit.models.architectures import CONFIGS
from glmkit.models.chatglm2 import ChatGLM2ForSequenceClassification
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.quant.memory import memory_per_device
from glmkit.quant.official import is_quantised_layer
from glmkit.quant.schemes import FORMS, Form, scheme_of
from glmkit.registration import LANGUAGE_MODELS
from glmkit.runtime.exported import describe
from glmkit.weights import check_model, empty_model, own_names

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


def inspect(
    name: str, *, context_tokens: int | None = None, batch: int = 1, devices: Sequence[int] | None = None
) -> dict[str, Any]:
    """Describes a folder, or a family that is not on this machine (from its released sizes); or an exported model.

    Args:
        name: A folder, family name or hub id. Nothing is fetched.
        context_tokens: Context length for the KV cache estimate. None: 8,192, or what the model has if it has less.
        batch: Number of sequences for it.
        devices: Numbers of devices to divide the model over. None: 4 and 8 for GLM-130B, else none.

    Returns:
        Plain values ready for JSON: family, source, config, parameters, dtypes, stored_bytes, tensors (name, shape,
        dtype) and memory_bytes per weight format, each with weights, kv_cache (float16) and total; and
        memory_per_device_bytes: number of devices -> the same for each of them, tensor-parallel. Of an exported model
        what `glmkit.runtime.exported.describe` says.

    Raises:
        UsageError: Unknown name.
        DownloadError: A hub id that is not on this machine.
        CheckpointError, ConfigError: The folder cannot be loaded.
    """
    if (exported := describe(name)) is not None:
        return exported
    family = choose_family(name)
    try:
        location = locate(name, hub={"local_files_only": True})  # nobody looks at a model to fetch gigabytes
    except (UsageError, DownloadError):
        if family is None:
            raise
        location = None
    if location is None:
        assert family is not None
        config = released_config(family)
        source, stored = "released sizes; not on this machine", family.bytes
        tensors = _built(config)
        counted = set(tensors)
    else:
        with open_model(location) as folder:
            config, source, stored = read_config(folder, family), str(location), folder.nbytes
            tensors = {name: (tuple(info.shape), info.dtype) for name, info in folder.tensors.items()}
            counted = _check(folder, config)
            family = family or find_family(str(folder.config.get("_name_or_path", "")))
    generation = getattr(config, "generation", None) or (family.generation if family else None)
    context_tokens = context_tokens or min(8_192, config.max_position_embeddings)
    read = {name: tensors[name] for name in counted}
    if devices is None:
        devices = (4, 8) if isinstance(config, GLM130BConfig) and location is None else ()
    return {
        "schema": 1,
        "name": name,
        "family": family.name if family else None,
        "network": type(config).__name__.removesuffix("Config"),
        "generation": generation,
        "source": source,
        "licence": family.licence if family else None,
        "quantised": _format(config),
        "config": {key: value for key, value in config.to_diff_dict().items() if isinstance(value, (int, float, str))},
        "parameters": sum(_parameters(name, shape, config) for name, (shape, _) in read.items()),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for _, dtype in tensors.values()}),
        "stored_bytes": stored,
        "context_tokens": context_tokens,
        "batch": batch,
        "memory_bytes": _memory(read, config, context_tokens, batch),
        "memory_per_device_bytes": {
            number: _memory_per_device(read, config, number, context_tokens * batch) for number in devices
        },
        "tensors": [
            {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for name, (shape, dtype) in sorted(tensors.items())
        ],
    }


def released_config(family: Family) -> CheckedConfig:
    """The config of a released model, from the families table.

    Args:
        family: Its row.
    """
    return CONFIGS[family.architecture](**family.sizes)


def _built(config: CheckedConfig) -> Tensors:
    """The tensors that a released checkpoint of this config has, in float16 where they are not quantised."""
    model = empty_model(LANGUAGE_MODELS[type(config)], config)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    return {
        name: (tuple(tensor.shape), torch.float16 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _check(folder: Folder, config: CheckedConfig) -> set[str]:
    """Compares the tensors with those of the model, as loading does.

    Returns:
        The names of the tensors that loading reads: no constants, no second copies.
    """
    head = folder.tensors.get("classifier_head.weight")
    chosen = LANGUAGE_MODELS[type(config)]
    if head is not None and isinstance(config, ChatGLM2Config):
        # One of another form, or an empty one, is refused below by its shape.
        config.num_labels = head.shape[0] if len(head.shape) == 2 and head.nbytes else 1
        chosen = ChatGLM2ForSequenceClassification
    model = empty_model(chosen, config)
    check_model(folder, model)
    return set(own_names(folder, model))


def _memory_per_device(tensors: Tensors, config: CheckedConfig, number: int, tokens: int) -> dict[str, dict[str, int]]:
    """What one of several devices holds; the kind of numbers that are stored does not matter."""
    if getattr(config, "quantization_bit", 0) or scheme_of(config) is not None:
        raise UsageError(
            "the memory per device is counted from weights that are not quantised", hint="inspect the float16 model"
        )
    cost = memory_per_device(config, {name: shape for name, (shape, _) in tensors.items()}, number)
    cache = cost["kv_cache_bytes_per_token"] * tokens
    return {
        label: {"weights": weights, "kv_cache": cache, "total": weights + cache}
        for label, weights in zip(("float16", "int8", "int4"), cost["weights_bytes"].values())
    }


def _format(config: CheckedConfig) -> dict[str, Any] | None:
    """The format of quantised weights, for people and programs; None for a checkpoint of floating-point numbers."""
    scheme, bits = scheme_of(config), getattr(config, "quantization_bit", 0)
    if scheme is not None:
        return scheme.to_config()
    return {"quant_method": "official", "scheme": f"official-int{bits}", "bits": bits} if bits else None


def _parameters(name: str, shape: tuple[int, ...], config: CheckedConfig) -> int:
    if name.endswith(".weight_scale"):
        return 0
    scheme = scheme_of(config)
    bits = getattr(config, "quantization_bit", 0) if scheme is None else scheme.form.bits
    return prod(shape) * (2 if bits == 4 and _is_quantised(name, config) else 1)


def _is_quantised(name: str, config: CheckedConfig) -> bool:
    """Whether the official format quantises this weight, when it quantises."""
    owner, _, leaf = name.rpartition(".")
    embedding = getattr(config, "quantization_embeddings", False) and owner.endswith("word_embeddings")
    return leaf == "weight" and (embedding or is_quantised_layer(owner))


def _memory(tensors: Tensors, config: CheckedConfig, context_tokens: int, batch: int) -> dict[str, dict[str, int]]:
    """Bytes of weights (float16, official int8 and int4, our int4; scales included) and of a float16 KV cache."""
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # numbers of one token
    cache = row * 2 * context_tokens * batch
    table = {}
    forms = {"float16": None, "int8": FORMS["int8"], "int4": FORMS["int4"], "official-int4": Form(4, None)}
    for label, form in forms.items():
        weights = 0
        for name, (shape, _) in tensors.items():
            parameters = _parameters(name, shape, config)
            if form is not None and _is_quantised(name, config):
                weights += form.nbytes(shape[0], parameters // shape[0])
            else:
                weights += parameters * 2
        table[label] = {"weights": weights, "kv_cache": cache, "total": weights + cache}
    return table
