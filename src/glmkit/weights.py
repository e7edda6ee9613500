"""From an open folder to a filled model: which stored tensor belongs where, all of them checked before one is read.

stored names --own_names--> names of the model     the prefix that a head puts in front, constants and copies aside
check_model                 shapes and kinds of numbers, everything that is wrong at once
load_model                  one tensor at a time into its dtype, device and, if asked for, quantised form
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glmkit import hf
from glmkit.checkpoint import Folder, check_tensors, shown_path
from glmkit.errors import CheckpointError, UsageError
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm import official_name
from glmkit.models.glm_network import GLMPreTrainedModel
from glmkit.pickles import printable
from glmkit.placement import check_table, device_of, place_layers, plan_layers
from glmkit.quant.bitsandbytes import BITS, quantized_linear
from glmkit.quant.linear import QuantizedLinear, return_free_memory
from glmkit.quant.official import is_quantised_layer, quantize_model, quantize_rows
from glmkit.quant.schemes import FORMS, Form, Scheme, layers_of, prepare_model, scheme_of

Devices = Sequence[torch.device | str | int] | Mapping[str, torch.device | str | int] | str
"""Devices in the order of the blocks, a table of modules to devices, or "auto" for all accelerators."""


def load_model(
    folder: Folder,
    cls: type[Any],
    config: CheckedConfig,
    dtype: torch.dtype,
    device: torch.device | Devices,
    *,
    quantize: int | str | None = None,
) -> Any:
    """Builds the model on the meta device and fills it, one tensor in memory at a time.

    Args:
        folder: The opened checkpoint.
        cls: Which model class.
        config: Its config.
        dtype: Floating dtype of the result (quantised weights and their scales keep theirs).
        device: Where the tensors go; or several devices, or a table of modules to devices, for whole blocks on each.
        quantize: To quantise each block's linears as they are read: 4 or 8 for the official format, "int8" or "int4"
            for ours, or the name of one of bitsandbytes, see `glmkit.quant.bitsandbytes`.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, all of them.
        UsageError: The checkpoint is quantised to other bits, or the devices or their table do not fit the model.
    """
    stored_as = getattr(config, "quantization_bit", 0) or getattr(scheme_of(config), "name", None)
    if stored_as and quantize not in (None, stored_as):
        found, wanted = (one if isinstance(one, str) else f"{one} bits" for one in (stored_as, quantize))
        raise UsageError(
            f"the checkpoint is already quantised to {found}, so it cannot become {wanted}",
            hint="leave out quantize, or load the unquantised checkpoint",
        )
    model = empty_model(cls, config)
    check_model(folder, model)
    bits = quantize if quantize != stored_as else None
    forms = layers_of(model, Scheme(bits)) if isinstance(bits, str) and bits in FORMS else {}
    places = {"": device} if isinstance(device, torch.device) else _table(model, device, dtype, bits)
    names = own_names(folder, model)
    for stored, tensor in folder.read(names):
        place = device_of(names[stored], places)
        assert place is not None
        if not _quantise(model, names[stored], tensor, dtype, place, bits, forms):
            _place(model, names[stored], tensor, dtype, place)
    for copy, table in _tied(model).items():
        owner, _, leaf = copy.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(table)
    if isinstance(bits, int):
        model.config.quantization_bit = bits
    elif forms:
        model.config.quantization_config = Scheme(str(bits), made_by={"how": "search"}).to_config()
    if bits:
        return_free_memory()
    if len(set(places.values())) > 1:
        place_layers(model, places)
    hf.set_generation_config(model, read_generation(folder))
    return model.eval()


def read_generation(folder: Folder) -> dict[str, Any] | None:
    """Reads a generation_config.json, which transformers takes apart field by field.

    Args:
        folder: The opened checkpoint.

    Returns:
        Its content, None if there is none.

    Raises:
        CheckpointError: It is no JSON object, or transformers has no use for a value in it.
    """
    values = folder.read_object("generation_config.json")
    try:
        hf.GenerationConfig.from_dict(values or {})
    except Exception as error:  # whatever a field of another kind leads to there
        problem = f"generation_config.json is refused by transformers: {printable(str(error))}"
        hint = "correct the field, or take the file away: answers are then chosen as the official code does"
        raise CheckpointError(shown_path(folder.path), [problem], hint=hint) from error
    return values


def empty_model(cls: type[Any], config: CheckedConfig) -> Any:
    """The model that a config means, on the meta device, with the layers of the format that it is stored in.

    Args:
        cls: Which model class.
        config: Its config.

    Raises:
        ConfigError: It says a format that is not known.
        UsageError: The model has no such form.
    """
    scheme, bits = scheme_of(config), getattr(config, "quantization_bit", 0)
    with torch.device("meta"):
        model = cls(config)
        if bits:
            quantize_model(model, bits)
        if scheme is not None:
            prepare_model(model, scheme)
    return model


def _table(model: nn.Module, devices: Devices, dtype: torch.dtype, bits: int | str | None) -> dict[str, torch.device]:
    """Which module goes to which device; a table of the caller's is checked before anything is read."""
    if not isinstance(devices, Mapping):
        form = FORMS.get(str(bits)) or Form(BITS[bits] if isinstance(bits, str) else bits or 0, None)
        return plan_layers(model, devices, dtype=dtype, quantize=form.bits or None, group_size=form.group_size)
    table = {name: torch.device(device) for name, device in devices.items()}
    check_table(model, table)
    return table


def own_names(folder: Folder, model: nn.Module) -> dict[str, str]:
    """Which stored tensors are read, and what the model calls them.

    A file of the network alone lacks the name that a head's class puts in front of it ("glm.", "transformer."), and the
    other way round. Left out are constants that old checkpoints store, and second copies of a tied table.

    Args:
        folder: The opened checkpoint.
        model: The model, best on the meta device.

    Returns:
        Stored name -> name in the model, in the order of the folder; a name that fits nowhere stays as it is.
    """
    state = model.state_dict()
    start = f"{getattr(model, 'base_model_prefix', '')}."
    tied = _tied(model)
    names = {}
    for stored in folder.tensors:
        name = stored
        if isinstance(model, GLMPreTrainedModel):
            name = official_name(stored, state)
        elif stored not in state and start + stored in state:
            name = start + stored
        elif stored not in state and stored.removeprefix(start) in state:
            name = stored.removeprefix(start)
        if not _is_constant(stored, model) and name not in tied:
            names[stored] = name
    return names


def _tied(model: nn.Module) -> dict[str, str]:
    """Names whose tensor is another's, and whose: the output layer's, where it is the embedding's."""
    return dict(getattr(model, "_tied_weights_keys", None) or {})


def _is_constant(name: str, model: nn.Module) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def check_model(folder: Folder, model: nn.Module, *, new: tuple[str, ...] = ()) -> None:
    """Compares a folder's tensors with a model's, names and shapes, before anything is read.

    Args:
        folder: The opened checkpoint.
        model: The model, best on the meta device.
        new: Beginnings of names that may be missing, because they start untrained.

    Raises:
        CheckpointError: Naming every tensor in question.
    """
    state, names, tied = model.state_dict(), own_names(folder, model), _tied(model)
    stored_as = {own: stored for stored, own in names.items()}
    expected = {
        stored_as.get(name, name): tuple(tensor.shape)
        for name, tensor in state.items()
        if name not in tied and (name in stored_as or not name.startswith(new))
    }
    # A second copy of a tied table is not read, but one of other sizes belongs to another model.
    expected |= {copy: tuple(state[copy].shape) for copy in tied if copy in folder.tensors}
    if folder.has("adapter_config.json"):
        raise CheckpointError(
            shown_path(folder.path),
            ["adapter_config.json lies beside the weights, so it is open whether the adapter shall be used"],
            hint="move the adapter's files into a folder of their own and give it as adapter=",
        )
    prefixes = [name for name in folder.tensors if ".prefix_encoder." in name]
    if prefixes and len(prefixes) == len(folder.tensors):
        raise CheckpointError(
            shown_path(folder.path),
            ["it holds a P-Tuning prefix only, not a whole model"],
            hint="glmkit.load(BASE, adapter=THIS_FOLDER)",
        )
    strange = [
        problem for stored, own in names.items() for problem in _wrong_kind(folder, stored, model, state.get(own))
    ]
    try:
        check_tensors(
            folder, expected, ignore=lambda name: name in folder.tensors and name not in names and name not in expected
        )
    except CheckpointError as error:
        raise CheckpointError(error.folder, [*error.problems, *strange], hint=error.hint) from None
    if strange:
        hint = "config.json must say how the checkpoint is quantised, and only that of a quantised one may"
        raise CheckpointError(shown_path(folder.path), strange, hint=hint)


def _wrong_kind(folder: Folder, stored: str, model: nn.Module, own: torch.Tensor | None) -> list[str]:
    """What is wrong with the kind of numbers of a stored tensor, in words; None or one."""
    if own is None:
        return []
    found = folder.tensors[stored].dtype
    ours = scheme_of(getattr(model, "config", None)) is not None
    wanted = None
    if not own.is_floating_point() and found != own.dtype:
        said = "quantization_config" if ours else "quantization_bit"
        wanted = f"{str(own.dtype).removeprefix('torch.')}, as config.json says {said}"
    elif own.is_floating_point() and not found.is_floating_point:
        wanted = "a floating-point type"
    elif ours and stored.endswith(".weight_scale") and found != torch.float16:
        wanted = "float16, as quantization_config says"
    if wanted is None:
        return []
    return [f"tensor {stored} is {str(found).removeprefix('torch.')}, expected {wanted}"]


def _quantise(
    model: nn.Module,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | str | None,
    forms: Mapping[str, Form],
) -> bool:
    """Puts a tensor that is to be quantised into the model; returns False, and does nothing, if it is none."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not bits or leaf != "weight" or not isinstance(module, nn.Linear) or not is_quantised_layer(owner):
        return False
    if isinstance(bits, int):
        weight, scale = quantize_rows(tensor.to(device), bits)
        layer: nn.Module = QuantizedLinear(weight, scale, module.bias, bits)
    elif owner in forms:
        weight, scale = forms[owner].quantize(tensor.to(device))
        layer = QuantizedLinear(weight, scale, module.bias, forms[owner].bits)
    else:
        layer = quantized_linear(tensor.to(dtype), module.bias, bits, device)
    model.set_submodule(owner, layer)
    return True


def _place(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Puts one tensor into the model, in its final form."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "weight_scale":
        module.scale_dtype = tensor.dtype  # type: ignore[assignment]
    elif tensor.is_floating_point():
        # A prefix may hold numbers that float16 does not; its encoder hands them over in the network's dtype.
        tensor = tensor.to(torch.float32 if ".prefix_encoder." in f".{name}" else dtype)
    trained = module._parameters[leaf].requires_grad  # type: ignore[union-attr]
    module._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=trained)
