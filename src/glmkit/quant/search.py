"""Codes and scales of our int4 and int8 forms; those of int4 are searched, not taken from the largest number.

A group of int4 is 32 numbers `w` of a row that share a scale `s`; in their place stand codes `q` from -8 to 7, read as
`s q`. Rounding to nearest takes `s = max|w| / 7` and never uses the code -8. Three things are better:

    sign     with a negative scale the largest number may be code -8: 8 steps instead of 7 between it and zero
    clip     a smaller scale rounds the largest number down and all others finer
    fit      the best scale for given codes is  sum(w q) / sum(q q)

So a fixed list of codes `d` for the largest number `m` is tried, `s = m / d`. The codes whose error after the fit is
smallest win; codes and fit are then made once more in turn, with scales rounded to float16, and the better of this and
rounding to nearest is taken. GPTQ, which makes use of it too, weights the squared errors of columns.

Source of the sign: llama.cpp, block_q4_0 of ggml-quants.c, which takes d = -8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmkit.errors import UsageError
from glmkit.quant.linear import GROUP, pack_nibbles

# Codes to try for the number of largest magnitude, the most useful first. Positive ones would gain 0.1 %.
DIVISORS = (-8.2, -7.2, -8.7, -7.8, -6.5, -9.1)
_CHUNK = 1 << 18  # numbers searched together: a few MB of temporaries, which stay in the cache
_REFITS = 2
_LARGEST = torch.finfo(torch.float16).max


def quantize_groups(weight: Tensor, *, divisors: Sequence[float] = DIVISORS) -> tuple[Tensor, Tensor]:
    """Quantises a weight to int4 in groups of 32 columns.

    Args:
        weight: (N, K), floating point; K a multiple of 32.
        divisors: Which codes to try for the largest number of a group. None at all is rounding to nearest.

    Returns:
        Codes, int8 (N, K / 2), the even column in the high nibble, both nibbles two's complement; and scales, float16
        (N, K / 32), which may be negative. A group of zeros has scale 1.

    Raises:
        UsageError: K is no multiple of 32, a number is not finite, or too large for a scale in float16.
    """
    rows, columns = weight.shape
    check_columns(columns)
    packed = torch.empty(rows, columns // 2, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, columns // GROUP, dtype=torch.float16, device=weight.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].detach().unflatten(1, (-1, GROUP)).permute(2, 0, 1).float().contiguous()
        found = search_scales(part, divisors=divisors)  # (n, K/32)
        scale[start : start + step] = found
        packed[start : start + step] = pack_nibbles(codes_of(part, found).to(torch.int8).permute(1, 2, 0).flatten(1))
    return packed, scale


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight to int8 with a scale for each row, rounding to nearest.

    A search would take 3 % off an error that is a hundredth of int4's, so there is none.

    Args:
        weight: (N, K), floating point. Quotients are made in float32, whatever its dtype.

    Returns:
        Codes, int8 (N, K), and scales, float16 (N,). A row of zeros has scale 1.

    Raises:
        UsageError: A number is not finite, or too large for a scale in float16.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float16, device=weight.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].detach().float()
        found = part.abs().amax(1) / 127
        _check(part, found)
        scale[start : start + step] = _half(found)
        # float16 holds the scale of a row of tiny numbers so coarsely that a quotient may be far above 127
        codes[start : start + step] = (part / scale[start : start + step, None].float()).round_().clamp_(-127, 127)
    return codes, scale


def check_columns(columns: int) -> None:
    """Refuses a number of columns that cannot be divided into groups, with a UsageError."""
    if columns % GROUP:
        raise UsageError(
            f"a layer with {columns} columns has no int4 form, which has groups of {GROUP}", hint="use int8"
        )


def search_scales(w: Tensor, importance: Tensor | None = None, divisors: Sequence[float] = DIVISORS) -> Tensor:
    """The scales of groups that lie along the first dimension, so that sums over a group are sums of whole rows.

    Args:
        w: (32, ...), float32.
        importance: How much the squared error of each number counts, positive; a shape that broadcasts to that of w.
            None: all the same.
        divisors: Which codes to try for the largest number of a group.

    Returns:
        float16 (...), none of them 0.

    Raises:
        UsageError: A scale is too large for float16.
    """
    most, least = w.amax(0), w.amin(0)
    peak = torch.where(most > -least, most, least)
    _check(w, peak.abs() / 7)
    best = _half(peak.abs() / 7)
    if not divisors:
        return best
    weighted = w if importance is None else w * importance
    gain = torch.zeros_like(peak)  # what the codes found so far, with their fit, take from the error of all zeros
    scale = torch.zeros_like(peak)
    for divisor in divisors:
        q = (w * torch.where(peak == 0, 0.0, divisor / peak)).round_().clamp_(-8, 7)
        product, square = _sums(q, weighted, importance)
        fit = product / square
        found = product * fit
        better = found > gain  # never if all codes are 0 and fit is not a number
        gain, scale = torch.where(better, found, gain), torch.where(better, fit, scale)
    error = _error(w, codes_of(w, best), best, importance)
    for _ in range(_REFITS):
        scale = _half(scale)
        q = codes_of(w, scale)
        found = _error(w, q, scale, importance)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
        product, square = _sums(q, weighted, importance)
        scale = product / square
    return best


def codes_of(w: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes, in the dtype of w.

    Args:
        w: (32, ...).
        scale: (...), not 0.
    """
    return (w / scale.to(w.dtype)).round_().clamp_(-8, 7)


def _sums(q: Tensor, weighted: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(w q) and sum(q q) of each group, both weighted."""
    return (q * weighted).sum(0), (q.square() if importance is None else q.square() * importance).sum(0)


def _error(w: Tensor, q: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    rest = (w - q * scale.float()).square_()
    return (rest if importance is None else rest * importance).sum(0)


def _half(scale: Tensor) -> Tensor:
    """Rounded to float16; 1 where nothing is left (codes are 0 then) or there was nothing to fit."""
    half = scale.clamp(-_LARGEST, _LARGEST).half()
    return torch.where((half == 0) | half.isnan(), 1.0, half).half()


def _check(w: Tensor, scale: Tensor) -> None:
    """Refuses what no scale in float16 stands for. NaN goes through amax, so the scales tell."""
    if (scale <= _LARGEST).all():
        return
    wrong = w[~w.isfinite()]
    if len(wrong):
        raise UsageError(
            f"a weight holds {wrong[0].item()}; expected finite numbers",
            hint="the checkpoint is damaged, or its training has diverged",
        )
    raise UsageError(
        f"a weight of {w.abs().max().item():.3g} needs a scale beyond float16, whose largest is {_LARGEST:.0f}",
        hint="weights of trained models are far smaller; leave this layer as it is",
    )
