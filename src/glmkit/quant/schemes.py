"""glmkit's own formats, "int8" and "int4": what is quantised, how config.json says it, and the layers it becomes.

    scheme   weight                          weight_scale          bits of a weight
    int8     int8 (out, in)                  float16 (out,)        8.0
    int4     int8 (out, in / 2), two in one  float16 (out, in/32)  4.5

Quantised are the four linears of each block, as in the official format; with output_layer "int8" the output layer too,
in the form of int8. Biases, norms and embeddings stay as they are. The bytes are those of the official format
(`glmkit.quant.linear`); what differs is that their scales are searched, and that int4 has one for each 32 columns.

config.json says it in `quantization_config`, so that no tool takes the folder for a plain one. What it does not know is
refused: numbers read in a wrong form would give answers, and wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glmkit.errors import ConfigError, UsageError
from glmkit.quant import search
from glmkit.quant.linear import GROUP, QuantizedLinear
from glmkit.quant.official import is_quantised_layer

METHOD, VERSION = "glmkit", 1
_KEYS = ("quant_method", "version", "scheme", "bits", "group_size", "output_layer", "made_by")
_NEWER = "a newer glmkit may have written it: pip install -U glmkit"


class Form(NamedTuple):
    """How one weight is stored.

    Args:
        bits: 8 or 4.
        group_size: Columns that share a scale; None for one scale in each row.
    """

    bits: int
    group_size: int | None

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Shapes of weight and scales for a matrix of `shape`, (out, in)."""
        rows, columns = shape
        scales = (rows,) if self.group_size is None else (rows, columns // self.group_size)
        return (rows, columns * self.bits // 8), scales

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix in this form, its scales in float16 included."""
        return rows * columns * self.bits // 8 + 2 * rows * (columns // self.group_size if self.group_size else 1)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scales in this form, of a floating-point matrix (out, in); see `glmkit.quant.search`."""
        return search.quantize_rows(weight) if self.group_size is None else search.quantize_groups(weight)


FORMS = {"int8": Form(8, None), "int4": Form(4, GROUP)}
"""Name of a scheme -> the form of the blocks' linears."""


@dataclass(frozen=True)
class Scheme:
    """One of our formats, as `quantization_config` in config.json says it.

    Args:
        name: "int8" or "int4".
        output_layer: "int8" if the output layer is quantised too, else None.
        made_by: How it was made, for people; it does not change what is read.
    """

    name: str
    output_layer: str | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """The form of the blocks' linears."""
        return FORMS[self.name]

    def to_config(self) -> dict[str, Any]:
        """The value of `quantization_config`."""
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "scheme": self.name,
            "bits": self.form.bits,
            "group_size": self.form.group_size,
            "output_layer": self.output_layer,
            "made_by": dict(self.made_by),
        }


def scheme_of(config: Any) -> Scheme | None:
    """Which of our formats a model's config says.

    Args:
        config: Of any family.

    Returns:
        The scheme; None for a model that is not in one of our formats.

    Raises:
        ConfigError: It has a `quantization_config` that is not read, with everything that is wrong with it.
    """
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, Mapping):  # an object is of transformers, which quantises by itself
        return None
    method = values.get("quant_method")
    if method != METHOD:
        raise ConfigError(
            f"quantization_config: quant_method is {method!r:.80}, expected {METHOD!r}",
            hint="load the unquantised checkpoint",
        )
    name = values.get("scheme")
    problems = [f"unknown key {key!r:.80}={values[key]!r:.80}" for key in values if key not in _KEYS]
    if values.get("version") != VERSION:
        problems.append(f"version={values.get('version')!r:.80}: this glmkit reads version {VERSION}")
    if not isinstance(name, str) or name not in FORMS:
        problems.append(f"scheme={name!r:.80}: expected {' or '.join(FORMS)}")
    else:
        problems += [
            f"{key}={values.get(key)!r:.80}: {name} has {expected!r}"
            for key, expected in FORMS[name]._asdict().items()
            if values.get(key) != expected
        ]
    if values.get("output_layer") not in (None, "int8"):
        problems.append(f"output_layer={values.get('output_layer')!r:.80}: expected null or 'int8'")
    if getattr(config, "quantization_bit", 0):
        problems.append(f"quantization_bit={config.quantization_bit} stands beside it: a folder has one format")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"this quantization_config cannot be read:{listed}", hint=_NEWER)
    made_by = values.get("made_by")
    return Scheme(str(name), values.get("output_layer"), made_by if isinstance(made_by, Mapping) else {})


def layers_of(model: nn.Module, scheme: Scheme) -> dict[str, Form]:
    """Which linears of a model are quantised, and how.

    Args:
        model: A model of any family that is not quantised, best on the meta device.
        scheme: The format.

    Returns:
        Name of the module -> its form.

    Raises:
        UsageError: A layer has no such form, or the output layer cannot be quantised.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: scheme.form for name in linears if is_quantised_layer(name)}
    size = scheme.form.group_size
    uneven = [name for name in found if size and linears[name].in_features % size]
    if uneven:
        listed = ", ".join(f"{name} ({linears[name].in_features} columns)" for name in uneven[:4])
        more = f" and {len(uneven) - 4} more" if len(uneven) > 4 else ""
        raise UsageError(
            f"{scheme.name} has groups of {size} columns, and these layers are no multiple of it: {listed}{more}",
            hint="use int8, which has one scale for each row",
        )
    if scheme.output_layer:
        found[_output_layer(model)] = FORMS[scheme.output_layer]
    return found


def _output_layer(model: nn.Module) -> str:
    """Name of the output layer, if it is a layer of its own."""
    get: Any = getattr(model, "get_output_embeddings", None)
    layer = None if get is None else get()
    name = next((name for name, module in model.named_modules() if module is layer), None)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    if name is None or not isinstance(layer, nn.Linear) or f"{name}.weight" in tied:
        raise UsageError(
            f"the output layer of {type(model).__name__} is its embedding, which stays as it is",
            hint="keep the output layer: leave out output_layer, --output-layer keep",
        )
    return name


def prepare_model(model: nn.Module, scheme: Scheme) -> None:
    """Gives a model on the meta device the layers of a scheme, to be filled from a checkpoint.

    Args:
        model: A model of any family, in which nothing is quantised.
        scheme: The format.

    Raises:
        UsageError: See `layers_of`.
    """
    for name, form in layers_of(model, scheme).items():
        linear: Any = model.get_submodule(name)
        weight, scale = form.shapes(linear.weight.shape)
        empty = torch.empty(weight, dtype=torch.int8, device="meta")
        scales = torch.empty(scale, dtype=torch.float16, device="meta")
        model.set_submodule(name, QuantizedLinear(empty, scales, linear.bias, form.bits))
