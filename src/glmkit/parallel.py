"""One model on several devices, each of which holds a part of every matrix: tensor parallelism, from outside the model.

    ids -> embedding ---------> q, k, v of own heads -> dense ------> dense_h_to_4h -> dense_4h_to_h -> own vocabulary
           rows of a rank, sum  nothing to exchange     sum of ranks  own channels     sum of ranks     gathered

    torchrun --nproc_per_node 2 -m glmkit.parallel MODEL --prompt "hello"

`models/partition.py` says which part is whose. The model's own code runs unchanged: its attention has as many heads as
its matrices have rows for, and so has its cache. A sharded model computes answers; it is not trained.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit.checkpoint import Folder
from glmkit.devices import choose_device
from glmkit.engine import SamplingOptions, stream
from glmkit.errors import GlmkitError, UsageError
from glmkit.loading import Loaded, choose_dtype, choose_family, open_model, read_config, read_tokenizer
from glmkit.location import locate
from glmkit.models.partition import Rule, partition_of, ranges, split
from glmkit.quant.linear import QuantizedLinear
from glmkit.quant.official import quantize_model
from glmkit.quant.schemes import scheme_of
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.shards import PartFolder
from glmkit.translation import labelled, language
from glmkit.weights import load_model

Group = Any  # a torch.distributed process group, or None for the default one
_OUTPUTS = ("output_layer", "lm_head")


# Layers of a part ----------------------------------------------------------------------------------------------------


class SummedLinear(nn.Linear):
    """A linear layer of which each rank has some columns; the ranks' products are summed, then the bias is added."""

    group: Group = None

    def forward(self, input: Tensor) -> Tensor:
        return _sum_of_ranks(F.linear(input, self.weight), self.group, self.bias)


class SummedQuantizedLinear(QuantizedLinear):
    """The same with the tensors of the official quantised format."""

    group: Group = None

    def forward(self, x: Tensor) -> Tensor:
        return _sum_of_ranks(F.linear(x, self.dequantize().to(x.dtype)), self.group, self.bias)


class VocabularyEmbedding(nn.Embedding):
    """A table of which each rank has some rows; a token's row comes from the rank that has it."""

    group: Group = None
    first_row: int = 0

    def forward(self, input: Tensor) -> Tensor:
        own = input - self.first_row
        missing = (own < 0) | (own >= self.weight.shape[0])
        rows = F.embedding(own.masked_fill(missing, 0), self.weight).masked_fill_(missing.unsqueeze(-1), 0)
        return _sum_of_ranks(rows, self.group, None)


class GatheredLinear(nn.Linear):
    """An output layer of which each rank has some rows of the vocabulary; every rank gets all logits."""

    group: Group = None

    def forward(self, input: Tensor) -> Tensor:
        return _gather_columns(F.linear(input, self.weight, self.bias), self.group)


def _sum_of_ranks(part: Tensor, group: Group, bias: Tensor | None) -> Tensor:
    if part.device.type != "meta":
        dist.all_reduce(part, group=group)
    return part if bias is None else part + bias.to(part.dtype)


def _gather_columns(part: Tensor, group: Group) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


# Making a part of a model --------------------------------------------------------------------------------------------


def shard_model(model: nn.Module, rank: int, degree: int, group: Group = None) -> nn.Module:
    """Turns a whole model into the part of one rank, in place; also on the meta device.

    Args:
        model: A language model of any family, also in the official quantised format.
        rank: 0 to degree - 1.
        degree: Number of ranks.
        group: Process group of the ranks; None: the default one.

    Returns:
        The same model. Its parameters have the same names and fewer rows or columns; they are not trainable.

    Raises:
        UsageError: The model cannot be divided so, or has a prefix or adapters. Then it is unchanged.
    """
    if degree == 1:
        return model
    config: Any = model.config
    if getattr(config, "pre_seq_len", None):
        raise UsageError("a P-Tuning prefix is not divided over ranks", hint="load the model without the prefix")
    if getattr(model, "glm_adapters", None) is not None:
        raise UsageError("adapters are not divided over ranks", hint="first: glm merge BASE ADAPTER DST")
    partition = partition_of(config)
    found: dict[str, tuple[nn.Module, Rule]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, QuantizedLinear)):
            rule = partition.rule(f"{name}.weight")
            if rule.dim is not None:
                ranges(module.weight.shape[rule.dim], rule, rank, degree, f"{name}.weight")  # or raises, for all first
                found[name] = module, rule
    if getattr(config, "quantization_embeddings", False):
        raise UsageError("quantised embeddings are not divided over ranks", hint="load the checkpoint on one device")
    kept: dict[int, Any] = {}  # a table that is embedding and output layer in one stays one
    while found:
        name, (module, rule) = found.popitem()
        part: Any = _part(module, rule, rank, degree, group, name)
        if isinstance(module, nn.Embedding) or name.endswith(_OUTPUTS):
            part.weight = kept.setdefault(id(module.weight), part.weight)
        model.set_submodule(name, part)
        del module  # its memory goes before the next is made
    for module in model.modules():
        if hasattr(type(module), "logits"):  # the embedding is the output layer too
            tied: Any = module
            tied.logits = _Gathered(tied.logits, config.vocab_size, group)
    return model.requires_grad_(False)


def _part(module: Any, rule: Rule, rank: int, degree: int, group: Group, name: str) -> nn.Module:
    if isinstance(module, QuantizedLinear):
        module.unpack()
    weight = split(module.weight.detach(), rule, rank, degree, name)
    if isinstance(module, nn.Embedding):
        part: Any = VocabularyEmbedding(weight.shape[0], weight.shape[1], device="meta")
        part.first_row = rank * weight.shape[0]
    else:
        bias = None if module.bias is None else module.bias.detach()
        bias = split(bias, rule, rank, degree, name) if bias is not None and rule.dim == 0 else bias
        if isinstance(module, QuantizedLinear):
            scale = module.weight_scale.detach()
            scale = split(scale, rule, rank, degree, name) if rule.dim == 0 or scale.ndim == 2 else scale
            kind = QuantizedLinear if rule.dim == 0 else SummedQuantizedLinear
            part = kind(weight, scale, bias, module.bits)
            part.scale_dtype = module.scale_dtype
        else:
            linear = SummedLinear if rule.dim == 1 else GatheredLinear if name.endswith(_OUTPUTS) else nn.Linear
            part = linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            part.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    part.weight = nn.Parameter(weight, requires_grad=False)
    part.group = group
    return part.train(module.training)


@dataclass
class _Gathered:
    """The method `logits` of a model whose output layer is its embedding: every rank's columns, side by side."""

    own: Any
    columns: int
    group: Group

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.own(hidden)
        return logits if logits.shape[-1] == self.columns else _gather_columns(logits, self.group)


# Reading a part ------------------------------------------------------------------------------------------------------


def load_part(
    folder: Folder,
    cls: type,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    degree: int,
    group: Group = None,
) -> Any:
    """Builds one rank's part of a model; the whole model is never in memory.

    Args:
        folder: The opened checkpoint, ordinary or model-parallel. If it has files for just this number of ranks, the
            rank reads its own; else it keeps its rows and columns of each tensor.
        cls: The model class.
        config: Its config.
        dtype: Floating dtype of the result (quantised weights and their scales keep theirs).
        device: Where the part goes.
        rank: 0 to degree - 1.
        degree: Number of ranks.
        group: Process group of the ranks; None: the default one.

    Returns:
        The part, in eval mode.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, all of them.
        UsageError: The model cannot be divided so.
    """
    if scheme_of(config) is not None:
        raise UsageError(
            "glmkit's own int8 and int4 are for one device or whole blocks on several, not for tensor parallelism",
            hint="use the checkpoint that is not quantised, or an official int4 one",
        )
    part: Any = PartFolder(folder, partition_of(config), rank, degree)
    config.quantization_bit = part.bits

    def build(config: Any) -> nn.Module:
        model = cls(config)
        if part.bits:
            quantize_model(model, part.bits)
        return shard_model(model, rank, degree, group)

    return load_model(part, build, config, dtype, device)  # type: ignore[arg-type]


# Ranks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The processes of one run.

    Args:
        rank: This one, from 0.
        degree: How many there are.
        device: What this one computes on.
    """

    rank: int
    degree: int
    device: torch.device


@functools.cache
def _meeting_place() -> Any:
    """The store through which the ranks find each other, with this process's number and how many there are."""
    return next(dist.rendezvous("env://"))


def join_ranks(device: str = "auto") -> Ranks:
    """Joins the processes that `torchrun` has started; alone if it has not.

    Args:
        device: "auto" (each rank one accelerator if there is any, else the CPU) or a kind of device.

    Returns:
        Who this process is.

    Raises:
        UsageError: There is no such device, or fewer of them than ranks on this machine.
    """
    chosen = choose_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, chosen)
    if chosen.type != "cpu":
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        if local >= found:
            raise UsageError(
                f"rank {local} of this machine has no {chosen.type} device: there are {found}",
                hint=f"torchrun --nproc_per_node {found}, or --device cpu",
            )
        chosen = torch.device(chosen.type, local)
        torch.accelerator.set_device_index(local)
    store, rank, degree = _meeting_place()
    if not dist.is_initialized():
        backend = backends_for(chosen)
        dist.init_process_group(backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=degree)
    return Ranks(rank, degree, chosen)


def backends_for(device: torch.device) -> str:
    """Names the libraries over which tensors travel: gloo on the CPU, and the device's own.

    Args:
        device: What a rank computes on.

    Returns:
        The backend for `init_process_group`.
    """
    own = dist.get_default_backend_for_device(device)
    return own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}"


def load_parallel(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    *,
    family: str | None = None,
) -> Loaded:
    """Loads this rank's part of a model, with its tokenizer. Every rank calls it.

    Afterwards all ranks draw the same random numbers, so that they choose the same tokens if they make the same calls.

    Args:
        path: An ordinary or model-parallel folder, or a name; see `glmkit.load`.
        dtype: As for `glmkit.load`.
        device: As for `join_ranks`.
        family: As for `glmkit.load`.

    Returns:
        A `Loaded`, whose model is the part.

    Raises:
        UsageError: An unknown name, or the model cannot be divided so.
        CheckpointError: A damaged or foreign folder, with everything that is wrong with it.
    """
    ranks = join_ranks(device)
    register()
    row = choose_family(path, family)
    location = locate(path)
    with open_model(location) as folder:
        config = read_config(folder, row, overrule=family is not None)
        tokenizer = read_tokenizer(folder, config)
        chosen = choose_dtype(dtype, folder, ranks.device)
        model = load_part(folder, LANGUAGE_MODELS[type(config)], config, chosen, ranks.device, ranks.rank, ranks.degree)
    if ranks.degree > 1:
        seed = torch.randint(2**62, (1,), device=ranks.device)
        dist.broadcast(seed, 0)
        torch.manual_seed(int(seed))
    return Loaded(model, tokenizer, row, config, location)


# The command ---------------------------------------------------------------------------------------------------------


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="python -m glmkit.parallel --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers one prompt on all ranks; the first rank prints.

    Args:
        arguments: Without the name of the program; None: those of the process.

    Returns:
        The exit code.
    """
    parser = _Arguments(
        prog="torchrun --nproc_per_node N -m glmkit.parallel", description="Answers with a model divided over N ranks."
    )
    parser.add_argument("model", help="folder or name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="a question; for models that fill blanks a text with [MASK] or [gMASK]")
    what.add_argument("--prompt-ids", help="token ids with commas between them; the answer is printed as ids")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--family")
    try:
        given = parser.parse_args(arguments)
        ranks = join_ranks(given.device)
        loaded = load_parallel(given.model, given.dtype, given.device, family=given.family)
        for piece in _answer(loaded, given):
            if ranks.rank == 0:
                print(piece, end="", flush=True)
        if ranks.rank == 0:
            print(flush=True)
    except (GlmkitError, RuntimeError) as error:
        return _fail(error)
    if ranks.degree > 1:
        dist.barrier()  # a rank that is gone looks like a failure to one that still answers
        dist.destroy_process_group()
    return 0


def _answer(loaded: Loaded, given: argparse.Namespace) -> Iterator[str]:
    options = SamplingOptions(temperature=given.temperature, seed=given.seed)
    tokenizer, limit = loaded.tokenizer, given.max_new_tokens
    if given.prompt_ids is not None:
        try:
            ids = [int(number) for number in given.prompt_ids.split(",")]
        except ValueError as error:
            raise UsageError(f"--prompt-ids {given.prompt_ids!r}: expected numbers with commas between them") from error
        ends = getattr(loaded.config, "eos_token_id", None) if tokenizer is None else tokenizer.stop_ids
        stop_ids = [ends] if isinstance(ends, int) else list(ends or ())
        for step in stream(loaded.model, ids, options, stop_ids=stop_ids, max_new_tokens=limit):
            if step.is_text:
                yield f"{step.token_id} "
    else:
        yield from loaded.stream(given.prompt, options=options, max_new_tokens=limit)


def _fail(error: Exception) -> int:
    """The first rank that fails says why; the others only end, and so does one that waits for a rank that is gone."""
    is_first = True
    if "WORLD_SIZE" in os.environ:
        with contextlib.suppress(RuntimeError):  # the store may be gone with its owner
            is_first = _meeting_place()[0].add("failed", 1) == 1
    if is_first:
        print(labelled(error, language()), file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, GlmkitError) else 1


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a rank that fails must not wait at its exit for those that are still in a sum
