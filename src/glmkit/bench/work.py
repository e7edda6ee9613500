"""What a step of a model must read and compute at least, counted from its tensors and config."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from glmkit.quant.linear import QuantizedLinear


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that every step reads: all but the embedding, of which it reads some rows.

    Args:
        model: A language model in its final form, quantised and packed or not.

    Returns:
        Exact bytes, scales, biases and norms among them; of an output layer that is the embedding, the table's.
    """
    head = {tensor.data_ptr() for tensor in model.get_output_embeddings().parameters()}
    rows = {tensor.data_ptr() for tensor in model.get_input_embeddings().parameters()} - head
    tensors = {tensor.data_ptr(): tensor for tensor in model.parameters() if tensor.data_ptr() not in rows}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def cache_bytes(config: Any, rows: int, columns: float, number_bytes: int) -> int:
    """Bytes of keys and values that one step reads.

    Args:
        config: Of the model.
        rows: Rows of the batch.
        columns: Tokens in the cache, the mean of the steps.
        number_bytes: Bytes of a number in the cache.
    """
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(row * number_bytes * rows * columns)


def step_operations(model: Any, rows: int, columns: float) -> float:
    """Multiplications and additions of one decoding step: every weight once for each row, and attention.

    Args:
        model: The model.
        rows: Rows of the batch.
        columns: Tokens that are looked at.
    """
    blocks, head = _matrix_numbers(model)
    return 2.0 * rows * (blocks + head) + rows * _attention(model.config) * columns


def prompt_operations(model: Any, tokens: int) -> float:
    """The same of a prompt of one row, of whose last token alone logits are needed.

    Args:
        model: The model.
        tokens: Length of the prompt.
    """
    blocks, head = _matrix_numbers(model)
    return 2.0 * tokens * blocks + 2.0 * head + _attention(model.config) * tokens * (tokens + 1) / 2


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def _matrix_numbers(model: Any) -> tuple[int, int]:
    """Weights of the matrices of all blocks, and of the output layer."""
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if _is_linear(module)]
    sizes = {id(module): module.in_features * module.out_features for module in linears}
    total = sum(sizes.values())
    return total - sizes[id(head)], sizes[id(head)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, QuantizedLinear))


def _attention(config: Any) -> float:
    """Operations of one query of all heads and layers with one key and value."""
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
