"""What GLM (2021) is tuned on beside questions and answers: cloze tasks, and the published seq2seq tasks.

    data.format: cloze      an example is a text with a blank and its answers; the loss is over the answers, and what is
                            measured beside it is how often the right one has the highest score
    data.format: seq2seq    source and target in the layout of a published task, such as a summary or a question

The loop knows neither: a seq2seq record is an `Example` like any other, and the batches of a cloze task are the keyword
arguments of the loss of `GLMForMultipleChoice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.data.cloze import ClozeSample, collate_cloze, encode_cloze
from glmkit.data.cloze_patterns import TASKS as CLOZE_TASKS
from glmkit.data.cloze_records import read_cloze
from glmkit.data.examples import Example, Examples, seq2seq_example
from glmkit.data.rows import Unreadable, read_rows, read_text
from glmkit.data.seq2seq import TASKS as SEQ2SEQ_TASKS
from glmkit.data.seq2seq import Seq2SeqTask, clean_summary, encode_seq2seq, without_filling
from glmkit.errors import DataError, UsageError
from glmkit.models.glm import GLMForConditionalGeneration, GLMForMultipleChoice
from glmkit.train.blocks import DataBlock, TrainBlock
from glmkit.train.sources import Batch, Records

FORMATS = ("cloze", "seq2seq")
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class ClozeItem(Example):
    """An encoded example of a cloze task.

    Attributes:
        (others): `input_ids` has the ids of all its rows, `labels` the one label, and `label_tokens` is 1.
        sample: The rows.
    """

    _: KW_ONLY
    sample: ClozeSample


class ClozeRecords(Records):
    """Examples of a cloze task in memory, in an order that seed and epoch decide.

    Args:
        examples: All of them.
        block: Batch sizes and seed.
    """

    def __init__(self, examples: Sequence[ClozeItem], block: TrainBlock) -> None:
        super().__init__(examples, 0, block)
        self._items = list(examples)

    def batch(self, members: Sequence[int]) -> Batch:
        """Join examples.

        Args:
            members: Their numbers.
        """
        return cloze_batch([self._items[number] for number in members])


def glm_head(model: nn.Module, block: DataBlock) -> nn.Module:
    """Give a GLM the head that its data asks for.

    Args:
        model: The loaded model.
        block: What to learn from.

    Returns:
        The model, or another head around its network.

    Raises:
        UsageError: The model is no GLM (2021), or settings do not fit the data.
    """
    if not isinstance(model, GLMForConditionalGeneration):
        raise UsageError(
            f"data.format={block.format} is for GLM, this model is {type(model).__name__}",
            hint="give model.path=glm-large or another GLM, or another data.format",
        )
    if block.packing:
        raise UsageError(f"data.packing is not for data.format={block.format}: a row is one example")
    return GLMForMultipleChoice.around(model) if block.format == "cloze" else model


# --- cloze ---


def cloze_examples(
    tokenizer: Any, path: str, block: DataBlock, *, limit: int | None = None, context: int | None = None
) -> list[ClozeItem]:
    """Read and encode a file of a cloze task.

    Args:
        tokenizer: A tokenizer of GLM.
        path: The file, see `glmkit.data.cloze_records`.
        block: `task`, `pattern_id` and `max_length` are used.
        limit: Stop after so many rows.
        context: Most tokens the model reads, None if nobody knows.

    Returns:
        The examples.

    Raises:
        DataError: The file has examples that cannot be used.
    """
    columns = block.max_length if context is None else min(block.max_length, context)
    task = str(block.task)
    words = (CLOZE_TASKS[task].patterns[block.pattern_id].words or {}).values()
    # A word of several tokens is scored as a text is, with all words of the task.
    several = any(len(tokenizer.encode_with_masks(word)) != 1 for word in words)
    items = []
    for example in read_cloze(path, task, limit=limit):
        sample = encode_cloze(
            tokenizer,
            task,
            example,
            pattern_id=block.pattern_id,
            max_seq_length=columns,
            multi_token=several,
        )
        choices = len(sample.target_ids)
        if not sample.label < choices or choices < 2:
            raise DataError(f"{example.uid}: the label is number {sample.label} of {choices} answers")
        ids = sample.input_ids[..., : _used([sample])].flatten().int()
        items.append(ClozeItem(ids, torch.tensor([sample.label]), 1, str(example.uid), sample=sample))
    return items


def cloze_batch(items: Sequence[ClozeItem]) -> Batch:
    """Join examples into a batch; columns that only fill up are left out.

    Args:
        items: The examples.

    Returns:
        The batch; `inputs` are the arguments of `GLMForMultipleChoice.label_loss`.
    """
    samples = [item.sample for item in items]
    columns = _used(samples)
    inputs = collate_cloze(samples)
    by_column = {"input_ids", "position_ids", "logit_mask"}
    if inputs["input_ids"].dim() == 3:
        by_column.add("target_ids")
    inputs = {name: value[..., :columns] if name in by_column else value for name, value in inputs.items()}
    tokens = sum(len(item.input_ids) for item in items)
    return Batch(inputs, label_tokens=len(items), tokens=tokens, where=[item.where for item in items])


def cloze_batches(items: Sequence[ClozeItem], size: int) -> list[Batch]:
    """Cut examples into batches, in their order.

    Args:
        items: The examples.
        size: Examples of a batch.
    """
    return [cloze_batch(items[start : start + size]) for start in range(0, len(items), size)]


def right_answers(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """Count the examples of a batch whose right answer has the highest score.

    Args:
        model: A `GLMForMultipleChoice`, or PEFT's model around one.
        inputs: Those of the batch, on its device.
    """
    scores = model.choice_scores(**{name: value for name, value in inputs.items() if name != "labels"})
    return int((scores.argmax(dim=1) == inputs["labels"]).sum())


def _used(samples: Sequence[ClozeSample]) -> int:
    """Columns up to the last one at which an answer is predicted."""
    return max(int(sample.logit_mask.nonzero()[:, -1].max()) for sample in samples) + 1


# --- seq2seq ---


def seq2seq_examples(
    tokenizer: Any, path: str, block: DataBlock, *, limit: int | None = None, context: int | None = None
) -> Examples:
    """Read and encode a file of source and target.

    Args:
        tokenizer: A tokenizer of GLM.
        path: `NAME.source` with `NAME.target` beside it, a line for a line; or rows with `source` and `target` (or the
            columns that `block` names), and what the task asks for: `question`, `answer`.
        block: `task`, the limits and `preset` are used: "paper" fills sources up to their limit, as the published
            runs did, and the model reads the filling.
        limit: Stop after so many rows.
        context: Most tokens the model reads, None if nobody knows.

    Returns:
        The examples.

    Raises:
        DataError: The file has records that cannot be used.
        UsageError: Source and target together may be longer than the model reads.
    """
    published = SEQ2SEQ_TASKS[str(block.task)]
    task = replace(
        published,
        source_tokens=block.max_source_length or published.source_tokens,
        target_tokens=block.max_target_length or published.target_tokens,
    )
    if context is not None and task.source_tokens + task.target_tokens > context:
        raise UsageError(
            f"{task.source_tokens} tokens of a source and {task.target_tokens} of a target are more than the {context} "
            "that the model reads",
            hint="lower data.max_source_length or data.max_target_length",
        )
    examples: list[Example] = []
    problems: list[str] = []
    for where, row in islice(_pairs(Path(path)), limit):
        try:
            examples.append(_encoded(tokenizer, row, where, task, block))
        except (DataError, UsageError) as error:
            problems.append(f"  - {where}: {error.message}")
    if problems:
        shown = "\n".join(problems[:_SHOWN_PROBLEMS])
        raise DataError(
            f"{len(problems)} of {len(problems) + len(examples)} rows of {path} cannot be used:\n{shown}",
            hint="correct these rows, or take them out",
        )
    if not examples:
        raise DataError(f"{path} has no records", hint="docs/data.md shows the forms")
    return Examples(examples)


def _encoded(tokenizer: Any, row: Any, where: str, task: Seq2SeqTask, block: DataBlock) -> Example:
    if isinstance(row, Unreadable):
        raise DataError(row.reason)
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, this is {type(row).__name__}")
    texts = [row.get(name, row.get(other)) for name, other in _columns(block)]
    for text, names in zip(texts, _columns(block)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"no text in the field {' or '.join(map(repr, names))}; the row has {', '.join(row)}")
    source, target = (
        clean_summary(str(block.task), text, target=bool(number)) for number, text in enumerate(map(str, texts))
    )
    given = {name: str(row[name]) for name in ("question", "answer") if name in row}
    encoded = encode_seq2seq(tokenizer, task, source, target, **given)
    return seq2seq_example(encoded if block.preset == "paper" else without_filling(encoded), where)


def _columns(block: DataBlock) -> tuple[tuple[str, str], tuple[str, str]]:
    """What source and target may be called."""
    return ("source", block.prompt_column), ("target", block.response_column)


def _pairs(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix != ".source":
        yield from read_rows(path)
        return
    beside = path.with_suffix(".target")
    for file in (path, beside):
        if not file.is_file():
            raise DataError(f"there is no file {file}", hint="NAME.source and NAME.target belong together")
    sources, targets = (read_text(file).rstrip("\r\n").split("\n") for file in (path, beside))
    if len(sources) != len(targets):
        raise DataError(f"{path} has {len(sources)} lines and {beside} {len(targets)}; expected a line for a line")
    for number, (source, target) in enumerate(zip(sources, targets), start=1):
        yield f"{path}:{number}", {"source": source, "target": target}
