"""Records to examples with several processes, each of which has the tokenizer once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from glmkit.data.cutting import Cuts, Limits
from glmkit.data.examples import Example, Examples, joined, make_examples, try_example
from glmkit.data.lengths import TruncationReport
from glmkit.data.records import Record

_CHUNK = 200  # records that travel to a process together

# What a process gives back: arrays instead of tensors, which would travel through shared files.
_Packed = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int, str, int, np.ndarray[Any, Any] | None]
_Made = tuple[_Packed | None, Cuts | None, str | None]

_work: Callable[[Record], tuple[Example | None, Cuts | None, str | None]]


def tokenise(
    tokenizer: Any,
    records: Sequence[Record],
    limits: Limits | None = None,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[Examples, TruncationReport]:
    """Do what `make_examples` does, with several processes; the result is the same.

    Args:
        tokenizer: The model's tokenizer.
        records: What to tokenise.
        limits: Where to cut.
        processes: How many.
        progress: Called with the number of records done and of all.
        **options: loss_on, preset and skip_overlength of `make_examples`.

    Returns:
        The examples and the report.

    Raises:
        DataError: As `make_examples`.
    """
    tell = (lambda done: None) if progress is None else partial(_tell, progress, len(records))
    processes = min(processes, -(-len(records) // _CHUNK))
    if processes < 2:
        return make_examples(tokenizer, records, limits, progress=tell, **options)
    examples: list[Example] = []
    cuts: list[Cuts] = []
    problems: list[str] = []
    skipped = 0
    for number, (packed, cut, problem) in enumerate(_shared(tokenizer, records, limits, processes, options), start=1):
        if packed is not None:
            examples.append(_unpack(packed))
        if cut is not None:
            cuts.append(cut)
        if problem is not None:
            problems.append(problem)
        skipped += packed is None and problem is None
        tell(number)
    return joined(examples, cuts, problems, skipped, len(records))


def _tell(progress: Callable[[int, int], None], total: int, done: int) -> None:
    progress(done, total)


def _shared(
    tokenizer: Any, records: Sequence[Record], limits: Limits | None, processes: int, options: dict[str, Any]
) -> Iterator[_Made]:
    """What each record gives, in order.

    The processes are forks of one that has only imported this module: a fork of this one could hang in its threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chunks = [records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
    with ProcessPoolExecutor(processes, context, _begin, (tokenizer, limits, options)) as pool:
        for made in pool.map(_make, chunks):
            yield from made


def _begin(tokenizer: Any, limits: Limits | None, options: dict[str, Any]) -> None:
    global _work
    torch.set_num_threads(1)
    _work = partial(_try, tokenizer, limits, options)


def _try(
    tokenizer: Any, limits: Limits | None, options: dict[str, Any], record: Record
) -> tuple[Example | None, Cuts | None, str | None]:
    return try_example(tokenizer, record, limits, **options)


def _make(records: Sequence[Record]) -> list[_Made]:
    return [
        (None if example is None else _pack(example), cuts, problem) for example, cuts, problem in map(_work, records)
    ]


def _pack(example: Example) -> _Packed:
    positions = None if example.position_ids is None else example.position_ids.numpy()
    ids, labels = example.input_ids.numpy(), example.labels.numpy()
    return ids, labels, example.label_tokens, example.where, example.sep, positions


def _unpack(packed: _Packed) -> Example:
    ids, labels, label_tokens, where, sep, positions = packed
    made = None if positions is None else torch.from_numpy(positions)
    return Example(torch.from_numpy(ids), torch.from_numpy(labels), label_tokens, where, sep, made)
