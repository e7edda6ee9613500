"""The weights of a graph, read one after the other: as they are stored, merged with a LoRA, or quantised on the way.

    folder (+ adapter) --one tensor--> merged --> as it is, or int8, or int4 --> a constant of the graph

What is quantised with `weights`: the four linears of each block in the form of that name (`glmkit.quant.schemes`); the
embedding and the output layer in the form of int8, since they are a fifth of a small int4 file, and lose little. Biases
and norms stay. A checkpoint that is quantised already keeps its numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.adapters import Lora, Prefix, open_adapter, read_adapter
from glmkit.checkpoint import Folder, shown_path
from glmkit.errors import UsageError
from glmkit.export.graph import skeleton
from glmkit.loading import choose_family, open_model, read_config, read_tokenizer
from glmkit.location import locate
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.prefix_encoder import PrefixEncoder
from glmkit.quant.linear import dequantize
from glmkit.quant.schemes import FORMS, Form, Scheme, layers_of, scheme_of
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.weights import check_model, empty_model, own_names

_ROWS = 1024  # compared at a time


@dataclass(frozen=True)
class Packed:
    """A quantised matrix, in the form of `glmkit.quant.linear`.

    Args:
        weight: int8 (out, in), for int4 (out, in / 2).
        scale: (out,) or (out, in / 32), floating point.
        bits: 8 or 4.
    """

    weight: Tensor
    scale: Tensor
    bits: int


@dataclass
class Weights:
    """An opened checkpoint, with the adapter that belongs to it.

    Args:
        folder: The checkpoint.
        config: Its config, with the sizes of a prefix, if there is one.
        tokenizer: Its tokenizer, or None.
        names: Stored name -> name in the model.
        adapter: What was learnt beside it, or None.
        location: Where the folder is.
        error: Distance of what was quantised from what it was made from, relative to its norm; known when all is read.
    """

    folder: Folder
    config: CheckedConfig
    tokenizer: Any | None
    names: dict[str, str]
    adapter: Lora | Prefix | None
    location: Path
    error: float | None = None

    @property
    def quantised(self) -> str | None:
        """What the checkpoint is quantised to, in words; None for a plain one."""
        scheme, bits = scheme_of(self.config), getattr(self.config, "quantization_bit", 0)
        return scheme.name if scheme is not None else f"the official int{bits} format" if bits else None

    def read(self, weights: str | None = None) -> Iterator[tuple[str, Tensor | Packed]]:
        """Reads what the graph needs, one weight in memory at a time; a prefix is not among it.

        Args:
            weights: None for the numbers of the checkpoint, "int8" or "int4" to quantise them.

        Yields:
            Name of the weight in the model, and the weight.

        Raises:
            UsageError: The checkpoint is quantised already, or a layer has no such form.
        """
        forms, stored = self.forms(weights), self._stored
        distance = norm = 0.0
        for own in stored:
            if own.endswith("_scale") and own.removesuffix("_scale") in stored:
                continue
            tensor = self._one(own)
            if own not in forms or isinstance(tensor, Packed):
                yield own, tensor
                continue
            packed = Packed(*forms[own].quantize(tensor), forms[own].bits)
            for rows in range(0, len(tensor), _ROWS):
                exact, part = tensor[rows : rows + _ROWS].float(), slice(rows, rows + _ROWS)
                found = dequantize(packed.weight[part], packed.scale[part], packed.bits).float()
                distance += float((found - exact).square().sum())
                norm += float(exact.square().sum())
            yield own, packed
        self.error = (distance / norm) ** 0.5 if norm else None

    def model(self) -> Any:
        """The float32 model without its prefix, which holds one block at a time.

        A block reads its weights when it is its turn, and gives them back: the model takes the memory of the embedding,
        the output layer and one block. It computes while the checkpoint is open.
        """
        model = skeleton(self.config)
        blocks = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
        names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one has one name
        inside = {id(parameter) for parameter in blocks.parameters()}

        def fill(module: torch.nn.Module, wanted: Callable[[Tensor], bool]) -> None:
            for part in module.modules():
                for leaf, parameter in part._parameters.items():
                    if parameter is not None and id(parameter) in names and wanted(parameter):
                        weight = self._one(names[id(parameter)])
                        if isinstance(weight, Packed):
                            weight = dequantize(weight.weight, weight.scale, weight.bits)
                        part._parameters[leaf] = torch.nn.Parameter(weight.float(), requires_grad=False)

        def lend(block: torch.nn.Module) -> None:
            empty = [(part, dict(part._parameters)) for part in block.modules()]

            def give_back(*_: object) -> None:
                for part, parameters in empty:
                    part._parameters.update(parameters)

            block.register_forward_pre_hook(lambda module, _: fill(module, lambda one: one.is_meta))
            block.register_forward_hook(give_back)

        for block in blocks:
            lend(block)
        fill(model, lambda parameter: id(parameter) not in inside)
        return model

    def prefix(self) -> list[Tensor] | None:
        """Keys and values in front of each layer's own, (1, K, P, D) float32, ordered as a graph's past; or None."""
        if not self.prefix_tokens:
            return None
        with torch.device("meta"):
            model = LANGUAGE_MODELS[type(self.config)](self.config)
        path, encoder = next((path, one) for path, one in model.named_modules() if isinstance(one, PrefixEncoder))
        if isinstance(self.adapter, Prefix):
            tensors = dict(self.adapter.read())
        else:
            tensors = {self.names[name]: tensor for name, tensor in self.folder.read(
                [name for name, own in self.names.items() if own.startswith(f"{path}.")])}  # fmt: skip
        state = {own.removeprefix(f"{path}."): tensor.float() for own, tensor in tensors.items()}
        encoder.load_state_dict(state, assign=True)
        with torch.inference_mode():
            return [one for pair in encoder.eval()(1, torch.float32) for one in pair]

    @property
    def prefix_tokens(self) -> int:
        """Columns of the prefix, `P`; 0 without one."""
        return getattr(self.config, "pre_seq_len", None) or 0

    def forms(self, weights: str | None) -> dict[str, Form]:
        """Which weights are quantised, and how.

        Args:
            weights: As in `read`.

        Returns:
            Name of a weight in the model -> the form that it gets.

        Raises:
            UsageError: As in `read`.
        """
        if weights is None:
            return {}
        if weights not in FORMS:
            raise UsageError(f"weights={weights!r}: expected {' or '.join(FORMS)}", hint="leave it out for float")
        if self.quantised is not None:
            raise UsageError(
                f"{shown_path(self.folder.path)} is quantised already, to {self.quantised}: its numbers are exported as"
                f" they are, and quantised again to {weights} they would lose more",
                hint="leave out --weights, or export the checkpoint that it was made from",
            )
        model = skeleton(self.config)
        forms = {f"{layer}.weight": form for layer, form in layers_of(model, Scheme(weights)).items()}
        tables = {id(model.get_input_embeddings().weight)}
        output = model.get_output_embeddings()
        tables |= set() if output is None else {id(output.weight)}
        return forms | {name: FORMS["int8"] for name, one in model.named_parameters() if id(one) in tables}

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Name in the model -> stored name, without those of a prefix."""
        return {own: name for name, own in self.names.items() if ".prefix_encoder." not in f".{own}"}

    def _one(self, own: str) -> Tensor | Packed:
        """One weight: merged, or quantised as it is stored."""
        stored = self._stored
        [(_, tensor)] = self.folder.read([stored[own]])
        if f"{own}_scale" not in stored:
            return self._merged(own, tensor)
        [(_, scale)] = self.folder.read([stored[f"{own}_scale"]])
        return Packed(tensor, scale, int(self._empty.get_submodule(own.removesuffix(".weight")).bits))

    @cached_property
    def _empty(self) -> Any:
        """The model without weights, as it is quantised in the checkpoint."""
        return empty_model(LANGUAGE_MODELS[type(self.config)], self.config)

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        if not isinstance(self.adapter, Lora) or layer not in self.adapter.layers or layer == name:
            return tensor
        a, b, scale = self.adapter.matrices(layer)
        return tensor.float().addmm_(b, a, alpha=scale)  # not rounded again


@contextmanager
def open_weights(
    source: str | Path, *, adapter: str | Path | None = None, family: str | None = None
) -> Iterator[Weights]:
    """Opens a checkpoint, and checks everything that its export will read.

    Args:
        source: Folder, model name or hub id.
        adapter: Folder of a LoRA or P-Tuning adapter.
        family: What the source is, if its folder does not say it.

    Yields:
        The weights.

    Raises:
        CheckpointError: Source or adapter is damaged, or they do not belong together.
        UsageError: A LoRA for a quantised checkpoint.
    """
    register()
    row, location = choose_family(source, family), locate(source)
    with ExitStack() as opened:
        folder = opened.enter_context(open_model(location))
        config = read_config(folder, row, overrule=family is not None)
        model = empty_model(LANGUAGE_MODELS[type(config)], config)
        check_model(folder, model)
        learnt = None
        if adapter is not None:
            learnt = read_adapter(opened.enter_context(open_adapter(Path(adapter).expanduser())), model, folder)
        found = Weights(folder, config, read_tokenizer(folder, config), own_names(folder, model), learnt, location)
        if isinstance(learnt, Prefix):
            config.pre_seq_len = learnt.config.pre_seq_len
            config.prefix_projection = learnt.config.prefix_projection
        if isinstance(learnt, Lora) and found.quantised is not None:
            raise UsageError(
                f"{shown_path(folder.path)} is quantised to {found.quantised}, and a LoRA cannot be merged into it"
                " without quantising it again",
                hint="export the checkpoint that it was made from: --weights quantises it after the merge",
            )
        yield found
