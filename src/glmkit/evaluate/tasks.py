"""What a task is: where its items come from, how a model answers them, and what the answers say.

A task knows nothing of files that are written, of cut runs and of other processes; `glmkit.evaluate.run` does.

    items()  ->  units of some batches each  ->  answer(unit) -> a row for each item  ->  figures(rows)
                 shared among processes          written as they come                    with intervals by bootstrap
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions, row_seed
from glmkit.errors import UsageError
from glmkit.loading import Loaded

Row = dict[str, Any]
"""What is known of one item after it was answered: plain values, written as a line of JSON."""


@dataclass(frozen=True)
class Figure:
    """A number that a task measures, in a form that samples of the rows can be drawn from.

    Its value is `sum(sums) / sum(weights)`; with groups the mean of the groups' values; with "exp" e to that power.

    Args:
        name: Such as "accuracy" or "rouge-l".
        sums: A number for each row.
        weights: Another for each row; None: 1.
        groups: A name for each row, such as its subject; None: one group.
        unit: "percent" (a value of 0.5 is shown as 50), "number", or "exp" (perplexity).
        better: Whether more is better, or less.
    """

    name: str
    sums: Sequence[float]
    weights: Sequence[float] | None = None
    groups: Sequence[str] | None = None
    unit: Literal["percent", "number", "exp"] = "percent"
    better: Literal["more", "less"] = "more"


class Task(Protocol):
    """A task, made with all its settings."""

    name: str
    """As it is called in `glm evaluate NAME`."""
    rows_file: str
    """Name of the file that gets the rows; "predictions.jsonl" unless official scripts call it otherwise."""
    batch_size: int
    """Items that go through the model together; a unit has some batches."""

    def items(self, loaded: Loaded) -> Sequence[Any]:
        """Reads the data, in an order that is always the same.

        Raises:
            DataError: It cannot be used, or the model cannot do this task; the message says which and why.
        """
        ...

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Answers some items.

        The result of an item must not depend on which other units there are or who computes them: with a seed, use
        `write_answers`, which makes a seed for the unit of `first`, the number of its first item.

        Args:
            loaded: The model.
            items: Some of `items()`, a unit.
            first: Number of the first of them in `items()`.
            progress: Called with how many of the unit are done.

        Returns:
            A row for each item, in their order. It says what was asked for (an id or label that a later run is
            compared with), what was answered, and whether or how well.
        """
        ...

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """What all rows together say; the first is the task's main figure."""
        ...

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Plain counts and facts that have no interval, such as how many answers were empty."""
        ...


def write_answers(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    first: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Writes the answers of a unit; with a seed they depend on the unit's place among all items, and on no other unit.

    Args:
        loaded: The model.
        prompts: Ids of each prompt.
        options: How tokens are chosen; the seed is that of the whole task.
        first: Number of the unit's first item.
        max_new_tokens: Longest answer.
        batch_size: Answers written together.
        progress: Called with how many are done.

    Returns:
        Ids of each answer, without the stop id.
    """
    return generate_batch(
        loaded.model,
        prompts,
        options if options.seed is None else replace(options, seed=row_seed(options.seed, first)),
        stop_ids=loaded.tokenizer.stop_ids,  # type: ignore[union-attr]
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=None if progress is None else lambda done, _: progress(done),
    )


@dataclass(frozen=True)
class Settings:
    """How items are answered, as the command and recipes say it; a task takes what it knows and refuses the rest.

    Args:
        batch_size: Items that go through the model together.
        max_new_tokens: Longest answer in tokens; None: the task's own.
        temperature: 0 always takes the likeliest token.
        top_p: 1 is off.
        seed: Makes sampled answers repeatable.
        limit: Only the first items.
        method: How a question with options is answered: "likelihood" or "chain-of-thought"; None: the task's own.
        shots: Examples in front of a question; None: the task's own.
        subjects: Only these; empty: all.
        window: Tokens of text that the model sees at most (perplexity).
        stride: By how many the window moves on.
        preset: "paper" does what the official scripts do, labels cut and all; None: what measures best.
        columns: Names of the columns of records by what they mean ("prompt", "response", "history").
        format: What rows of a data file look like; "auto" looks at them.
        source_tokens: Longest prompt, cut as training cuts it; None: whole.
        extra: What a single task knows beyond these.
    """

    batch_size: int = 32
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    limit: int | None = None
    method: str | None = None
    shots: int | None = None
    subjects: tuple[str, ...] = ()
    window: int | None = None
    stride: int | None = None
    preset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    format: str = "auto"
    source_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> SamplingOptions:
        """How tokens are chosen."""
        return SamplingOptions(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def only(self, task: str, *known: str) -> None:
        """Refuses settings that a task does not know; `batch_size` and `limit` are known to all.

        Args:
            task: Its name.
            *known: Names of the fields that it looks at.

        Raises:
            UsageError: Another one has been changed.
        """
        own = Settings()
        for one in fields(self):
            changed = getattr(self, one.name) != getattr(own, one.name)
            if changed and one.name not in (*known, "batch_size", "limit"):
                raise UsageError(
                    f"the task {task} has no setting {one.name}, and it is {getattr(self, one.name)!r}",
                    hint=f"it knows batch_size, limit{''.join(f', {name}' for name in known)}",
                )
