"""GPTQ: int4 codes that keep a layer's outputs, not its weights, from a little calibration text.

What counts is the error of the products, `sum over x of |W x - Q x|^2 = tr((W - Q) H (W - Q)^T)` with `H = sum x x^T`.
Columns are rounded one after the other, and what rounding a column does to the products is made good by all columns
that are not rounded yet:

        rounded | this one |        still free                     U: upper triangular, inverse(H) = U^T U
                |  j       |   W[:, j+1:] -= e U[j, j+1:]          e = (W[:, j] - Q[:, j]) / U[j, j]

The scale of a group of 32 columns is searched (`glmkit.quant.search`) when its first column is reached, on the weights
as they are by then, and with the weight that each column's error has in the sum, `1 / U[j, j]^2`.

Layers are done in the order in which they run: what a layer sees as `x` comes from layers that are quantised already.

Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ" (2022), arXiv:2210.17323. What differs: the searched scales; U
comes from one Cholesky factor with columns in reverse order, not from the inverse of H and a second factor; columns
stay in their order, because groups are runs of 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.errors import UsageError
from glmkit.quant.linear import GROUP, QuantizedLinear, pack_nibbles
from glmkit.quant.official import is_quantised_layer
from glmkit.quant.search import check_columns, codes_of, search_scales

DAMPING = 0.01
"""Part of the mean of H's diagonal that is added to it, so that directions the text never shows are not free."""
_TOGETHER = 4 * GROUP  # columns whose corrections reach the rest of the matrix in one product


def quantize_model_gptq(
    model: Any,
    batches: Iterable[Tensor],
    *,
    scheme: str = "int4",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Replaces the linears of all blocks by int4 ones, block after block.

    Args:
        model: A model whose blocks run one after the other, on any device: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B,
            GLM-4-9B or GLM-130B.
        batches: Token ids of the calibration text, each (B, T) int64 without padding. Some ten thousand tokens do.
        scheme: "int4". int8 loses so little that there is nothing to make good.
        progress: Called with the number of layers done and of all.

    Returns:
        The same model.

    Raises:
        UsageError: Another scheme, a model that does not run block after block or has a prefix, one that is quantised
            already, no text, or a layer whose columns are no multiple of 32.
    """
    if scheme != "int4":
        raise UsageError(f"scheme={scheme!r} has no calibration", hint='use scheme="int4"')
    blocks = _blocks_of(model)
    layers = [_linears_of(block) for block in blocks]
    total, done = sum(map(len, layers)), 0
    if not total:
        raise UsageError("the model has no unquantised linears", hint="give a model with weights in 16 or 32 bit")
    for linears in layers:
        for linear in linears.values():
            check_columns(linear.in_features)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        states = _first_inputs(model, blocks[0], batches)
        for block, linears in zip(blocks, layers):
            for name in list(linears):
                linear = linears.pop(name)
                weight, scale = quantize_gptq(linear.weight, _hessian(block, linear, states))
                block.set_submodule(name, QuantizedLinear(weight, scale, linear.bias, 4))
                done += 1
                if progress is not None:
                    progress(done, total)
            for state in states:
                state[0] = block(*state)
    return model.train(was_training)


def quantize_gptq(weight: Tensor, hessian: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Quantises a weight to int4 in groups of 32 columns, so that its products stay.

    Args:
        weight: (N, K), floating point; K a multiple of 32.
        hessian: (K, K) float32, sum or mean of `x x^T` over the inputs x of the layer.
        damping: See `DAMPING`.

    Returns:
        As `glmkit.quant.search.quantize_groups`: int8 (N, K / 2) and float16 (N, K / 32).

    Raises:
        UsageError: As `quantize_groups`, or a Hessian with numbers that are not finite.
    """
    rows, columns = weight.shape
    check_columns(columns)
    factor = inverse_factor(hessian, damping)
    counts = factor.diagonal().square().reciprocal()
    w = weight.detach().t().float().contiguous()  # (K, N): a column is a run of memory
    w = w.clone() if w.data_ptr() == weight.data_ptr() else w
    codes = torch.empty(columns, rows, dtype=torch.int8, device=w.device)
    scales = torch.empty(columns // GROUP, rows, dtype=torch.float16, device=w.device)
    for start in range(0, columns, _TOGETHER):
        stop = min(start + _TOGETHER, columns)
        errors = torch.empty(stop - start, rows, device=w.device)
        for first in range(start, stop, GROUP):
            last = first + GROUP
            group = counts[first:last, None]
            scale = search_scales(w[first:last], group / group.mean())
            scales[first // GROUP] = scale
            for column in range(first, last):
                code = codes_of(w[column], scale)
                codes[column] = code.to(torch.int8)
                error = (w[column] - code * scale.float()).div_(factor[column, column])
                w[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
                errors[column - start] = error
            w[last:stop].addmm_(factor[first:last, last:stop].t(), errors[first - start : last - start], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return pack_nibbles(codes.t().contiguous()), scales.t().contiguous()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with `inverse(H) = U^T U`, after damping.

    With `H = R R^T` and R upper triangular, U is the inverse of R; R is a Cholesky factor with rows and columns in
    reverse order.

    Args:
        hessian: (K, K) float32.
        damping: See `DAMPING`. It grows tenfold where rounding has made H indefinite.

    Returns:
        (K, K) float32.

    Raises:
        UsageError: H has numbers that are not finite.
    """
    mean = hessian.diagonal().mean()
    if not mean.isfinite():
        raise UsageError(
            f"the inputs of a layer have a mean square of {mean.item()}; expected a finite one",
            hint="the model overflows on the calibration text: load it with dtype float32 or bfloat16",
        )
    reverse = hessian.flip(0, 1)
    added = damping * torch.where(mean > 0, mean, 1.0)
    reverse.diagonal().add_(added)
    lower, wrong = torch.linalg.cholesky_ex(reverse)
    while wrong != 0:
        reverse.diagonal().add_(9 * added)
        added = 10 * added
        lower, wrong = torch.linalg.cholesky_ex(reverse)
    del reverse  # 750 MB where K is 13,696
    upper = lower.flip(0, 1)
    del lower
    _invert(upper)
    return upper


def _invert(upper: Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves: products of large matrices, and no second matrix."""
    size = len(upper)
    if size <= _TOGETHER:
        identity = torch.eye(size, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    half = size // 2
    first, corner, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert(first)
    _invert(second)
    corner.copy_(first @ (corner @ second).neg_())


class _Reached(Exception):
    """Ends a forward pass where its inputs have been seen."""


def _blocks_of(model: Any) -> list[nn.Module]:
    network = getattr(model, "transformer", None)
    blocks = getattr(getattr(network, "encoder", network), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or model.config.model_type == "glm":
        raise UsageError(
            f"{type(model).__name__} is quantised without calibration only",
            hint="calibration is for ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and GLM-130B; leave it out",
        )
    if getattr(network, "prefix_encoder", None) is not None:
        raise UsageError(
            "a model with a prefix cannot be calibrated", hint="quantise the base model, then add the prefix"
        )
    return list(blocks)


def _linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are to be quantised, in the order in which they run, which is the order of the modules."""
    modules = block.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and is_quantised_layer(f".layers.{name}")}


def _first_inputs(model: Any, block: nn.Module, batches: Iterable[Tensor]) -> list[list[Any]]:
    """What the first block is called with, for each batch; all blocks share what follows the first argument."""
    states: list[list[Any]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        states.append(list(arguments))
        raise _Reached

    device = next(model.parameters()).device
    with block.register_forward_pre_hook(keep):
        for ids in batches:
            with suppress(_Reached):
                model(input_ids=ids.to(device), use_cache=False)
    if not states:
        raise UsageError("calibration without text", hint="give at least one batch of token ids")
    return states


def _hessian(block: nn.Module, linear: nn.Linear, states: list[list[Any]]) -> Tensor:
    """Sum of `x x^T` over what a layer of the block sees, (K, K) float32."""
    size = linear.in_features
    found = torch.zeros(size, size, device=linear.weight.device)

    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].reshape(-1, size).float()
        found.addmm_(x.t(), x)
        raise _Reached

    with linear.register_forward_pre_hook(add):
        for state in states:
            with suppress(_Reached):
                block(*state)
    return found
