"""What is done with the data of a recipe without the weights of its model: writing its token ids, and showing them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from glmkit.data.lengths import TruncationReport
from glmkit.data.prepared import examples_of, prepare
from glmkit.data.preview import Paint, preview
from glmkit.errors import UsageError
from glmkit.train.blocks import Recipe
from glmkit.train.glm_examples import FORMATS as GLM_FORMATS
from glmkit.train.progress import Progress
from glmkit.train.run import tokenizer_and_context
from glmkit.train.sources import reading_of


def prepare_data(
    recipe: Recipe, folder: str | Path, *, shards: int = 1, overwrite: bool = False, progress: bool = True
) -> TruncationReport:
    """Write the training data of a recipe as token ids.

    Args:
        recipe: The recipe.
        folder: The folder to write; data.train_file can be that folder afterwards.
        shards: Arrow files to write.
        overwrite: Replace a folder that exists.
        progress: Show a bar, or lines where there is no terminal.

    Returns:
        The report of the lengths.

    Raises:
        UsageError: The data has no token ids of its own kind, as cloze tasks.
        DataError: The data cannot be used.
        OutputError: The folder exists or cannot be written.
    """
    block = recipe.data
    _refuse_glm_formats(block.format)
    tokenizer, context = tokenizer_and_context(recipe.model)
    reading = reading_of(block, block.train_file, block.max_train_samples, context)
    with Progress("tokenising", 1, enabled=progress) as bar:
        return prepare(
            reading,
            tokenizer,
            folder,
            shards=shards,
            processes=block.num_proc,
            overwrite=overwrite,
            progress=lambda done, every: bar.update(done, total=every),
        )


def preview_data(recipe: Recipe, count: int, *, paint: Paint | None = None) -> str:
    """Show the first training records of a recipe as the model will see them.

    Args:
        recipe: The recipe.
        count: How many.
        paint: Colours a text by an ANSI code; None marks what is learnt with [[ ]].

    Returns:
        The page: the records, what the limits do to all of them, and how long they are.

    Raises:
        UsageError: The data has no text that a model goes on with, as cloze tasks.
        DataError: The data cannot be used.
    """
    block = recipe.data
    _refuse_glm_formats(block.format)
    tokenizer, context = tokenizer_and_context(recipe.model)
    reading = reading_of(block, block.train_file, block.max_train_samples, context)
    examples, report = examples_of(reading, tokenizer, cache_dir=block.cache_dir, processes=block.num_proc)
    records = []
    if not Path(block.train_file).is_dir() and block.preset != "paper":
        wanted = {example.where for example in islice(examples, count)}
        records = [record for record in reading.records() if record.where in wanted]
    return preview(tokenizer, examples, report, count, records=records, limits=reading.limits, paint=paint)


def _refuse_glm_formats(format: str) -> None:
    if format in GLM_FORMATS:
        raise UsageError(f"data.format={format} is read anew at every start, and is no text that a model goes on with")
