"""What a model costs on each device of a tensor-parallel run, counted from the shapes of its tensors.

Source: the rules of `glmkit.models.partition`; which layers are quantised, `glmkit.quant.official`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from glmkit.models.partition import partition_of, ranges
from glmkit.quant.official import is_quantised_layer

WEIGHT_BITS = {"fp16": 16, "int8": 8, "int4": 4}
_HALF_BYTES = 2  # of a number in fp16 or bf16: what is not quantised, scales, keys and values


def memory_per_device(config: Any, shapes: Mapping[str, Sequence[int]], tensor_parallel: int) -> dict[str, Any]:
    """Bytes that a model takes on each of some devices; tensors that every rank holds are counted on each.

    Args:
        config: Of any family.
        shapes: Official name -> shape of every tensor of the whole model, not quantised; of a model that is made
            under `torch.device("meta")` they cost nothing.
        tensor_parallel: Number of devices.

    Returns:
        "weights_bytes": {"fp16", "int8", "int4"} -> bytes of weights, biases, norms and scales on one device;
        "kv_cache_bytes_per_token": keys and values of all layers for one token of one row, in half precision;
        "tensor_parallel": the number of devices.

    Raises:
        UsageError: The model cannot be divided so.
    """
    partition = partition_of(config)
    weights = dict.fromkeys(WEIGHT_BITS, 0)
    for name, whole in shapes.items():
        if name.endswith("inv_freq"):
            continue
        rule, shape = partition.rule(name), list(whole)
        if rule.dim is not None and tensor_parallel > 1:
            pieces = ranges(shape[rule.dim], rule, 0, tensor_parallel, name)
            shape[rule.dim] = sum(end - start for start, end in pieces)
        owner, _, leaf = name.rpartition(".")
        packed = leaf == "weight" and len(shape) == 2 and is_quantised_layer(owner)
        for kind, bits in WEIGHT_BITS.items():
            if packed and bits < 16:
                weights[kind] += prod(shape) * bits // 8 + shape[0] * _HALF_BYTES
            else:
                weights[kind] += prod(shape) * _HALF_BYTES
    groups = -(-config.num_key_value_heads // tensor_parallel)  # a group that cannot be divided is held in copies
    per_token = 2 * config.num_hidden_layers * groups * config.head_dim * _HALF_BYTES
    return {
        "tensor_parallel": tensor_parallel,
        "weights_bytes": weights,
        "kv_cache_bytes_per_token": per_token,
    }
