"""Models of released shapes with random weights, made in their final form: 6 billion weights in int4 in some seconds.

Speed depends on shapes and formats, not on values. So a pool of random numbers is written again and again, straight
into the tensors that the model will have; no float model exists at any time.

    config --meta--> shapes --quantised layers, still empty--> one tensor at a time filled --packed--> model
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.errors import UsageError
from glmkit.families import find_family
from glmkit.inspection import released_config
from glmkit.location import builtin
from glmkit.models.architectures import config_class
from glmkit.models.checked_config import CheckedConfig
from glmkit.quant.linear import QuantizedLinear, pack_model
from glmkit.quant.schemes import FORMS, Scheme
from glmkit.registration import LANGUAGE_MODELS
from glmkit.weights import empty_model

OFFICIAL_BITS = {"official-int8": 8, "official-int4": 4}
SCHEMES = ("bf16", "float32", *FORMS, *OFFICIAL_BITS)
_POOL = 2**20 + 1  # odd, so that rows of a matrix differ
_DEVIATION = 0.02  # of weights, about that of the released ones


def preset(name: str, layers: int | None = None) -> CheckedConfig:
    """The config of a released model.

    Args:
        name: Such as "chatglm3-6b"; "glm-nano" is the one of this package.
        layers: Number of blocks; None: as released.

    Returns:
        Its config.

    Raises:
        UsageError: There is no such model, or it has no such number of blocks.
    """
    family = find_family(name)
    if family is None or not family.chat:
        raise UsageError(
            f"{name!r} is no model to measure", hint="chatglm-6b, chatglm2-6b, chatglm3-6b, glm-4-9b-chat or glm-nano"
        )
    if family.name == "glm-nano":
        values = json.loads((builtin("glm-nano") / "config.json").read_text(encoding="utf-8"))
        config = config_class(values).from_dict(values)
    else:
        config = released_config(family)
    whole = config.num_layers
    if layers is not None and not 1 <= layers <= whole:
        raise UsageError(f"--layers {layers}: {family.name} has {whole} blocks")
    config.num_layers = layers or whole
    config.quantization_bit = 0
    return config


def random_model(config: CheckedConfig, scheme: str, *, output_layer: str = "keep", packed: bool = True) -> Any:
    """Makes a model of random weights.

    Args:
        config: Its sizes.
        scheme: One of `SCHEMES`.
        output_layer: "keep" or "int8"; schemes that are not ours always keep it.
        packed: Whether native code may compute with it, where there is any; else torch does everything.

    Returns:
        The model, in eval mode.

    Raises:
        UsageError: See `check_scheme`; or the output layer is the embedding.
    """
    dtype = torch.float32 if scheme == "float32" else torch.bfloat16
    config = _with_scheme(config, scheme, output_layer)
    model = empty_model(LANGUAGE_MODELS[type(config)], config).to(dtype)
    fill = _Filler(dtype)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            fill.quantised(module)
        else:
            fill.plain(module)
    for copied, table in dict(getattr(model, "_tied_weights_keys", None) or {}).items():
        owner, _, leaf = copied.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(table)
    pack_model(model, "auto" if packed else "torch")
    return model.eval()


def check_scheme(scheme: str, output_layer: str) -> None:
    """Refuses what `random_model` cannot make.

    Args:
        scheme: One of `SCHEMES`.
        output_layer: "keep" or "int8".

    Raises:
        UsageError: Something else.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"--scheme {scheme}", hint=f"one of {', '.join(SCHEMES)}")
    if output_layer not in ("keep", "int8"):
        raise UsageError(f"--output-layer {output_layer}", hint="keep or int8")


def _with_scheme(config: CheckedConfig, scheme: str, output_layer: str) -> CheckedConfig:
    """A copy of a config that says how the model is quantised, as a folder's does."""
    check_scheme(scheme, output_layer)
    config = copy.deepcopy(config)
    if scheme in OFFICIAL_BITS:
        config.quantization_bit = OFFICIAL_BITS[scheme]
    elif scheme in FORMS:
        config.quantization_config = Scheme(scheme, None if output_layer == "keep" else output_layer).to_config()
    return config


def first_block(model: Any) -> Any:
    """The same model with its first block alone; both hold the same tensors.

    Args:
        model: A model of several blocks.
    """
    config = copy.deepcopy(model.config)
    config.num_layers = 1
    with torch.device("meta"):
        small = type(model)(config)
    for name, module in list(small.named_modules()):
        if name and not list(module.children()):
            small.set_submodule(name, model.get_submodule(name))
    small.glm_kernels = model.glm_kernels
    return small.eval()


class _Filler:
    """Replaces tensors of the meta device by random ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.numbers = torch.randn(_POOL, generator=random) * _DEVIATION
        self.bytes = torch.randint(-128, 128, (_POOL,), dtype=torch.int8, generator=random)

    def quantised(self, layer: QuantizedLinear) -> None:
        """Random codes, with scales that give weights of the usual size."""
        weight = repeated(self.bytes, layer.weight.shape, torch.int8)
        most = 127 if layer.bits == 8 else 7
        scale = (self.numbers.abs() + 3 * _DEVIATION) / most
        layer.weight = nn.Parameter(weight, requires_grad=False)
        scales = repeated(scale, layer.weight_scale.shape, layer.weight_scale.dtype)
        layer.weight_scale = nn.Parameter(scales, requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(repeated(self.numbers, layer.bias.shape, self.dtype), requires_grad=False)

    def plain(self, module: nn.Module) -> None:
        """Random matrices; norms around one."""
        for name, tensor in list(module._parameters.items()):
            if tensor is None:
                continue
            filled = repeated(self.numbers, tensor.shape, tensor.dtype)
            if "Norm" in type(module).__name__ and name == "weight":
                filled += 1.0
            module._parameters[name] = nn.Parameter(filled, requires_grad=False)


def repeated(pool: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor filled with a row of numbers again and again.

    Args:
        pool: The numbers, (P,).
        shape: Of the result.
        dtype: Of the result.
    """
    result = torch.empty(shape, dtype=dtype)
    flat = result.view(-1)
    whole = flat.numel() // len(pool) * len(pool)
    flat[:whole].view(-1, len(pool)).copy_(pool)
    flat[whole:].copy_(pool[: flat.numel() - whole])
    return result
