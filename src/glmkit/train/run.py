"""From a recipe file to a trained model: load, tokenise, train, report."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from glmkit.data.examples import Example, Limits, make_examples
from glmkit.data.records import read_records
from glmkit.errors import UsageError
from glmkit.train.arguments import ModelBlock, Recipe, load_recipe
from glmkit.train.loop import OnStep, TrainingResult, train
from glmkit.train.progress import Progress
from glmkit.train.report import write_report


def finetune(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Do what a recipe says.

    Args:
        recipe: A YAML file, the name of a recipe of the package, or a loaded recipe.
        overrides: "key=value" changes to it.
        resume: Continue from the last checkpoint in the recipe's output folder.
        on_step: Called after every step, see `train`.
        progress: Show bars, or lines where there is no terminal.

    Returns:
        The result; loss curve and report lie in its output folder.

    Raises:
        UsageError: If the recipe is wrong.
        DataError: If the data cannot be used.
        TrainingError: If the run cannot start or go on.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise UsageError("overrides change a recipe file, not a recipe that is already loaded")
    # The data is read before the model: a wrong path should not cost minutes of loading.
    block = recipe.data
    columns = {"prompt_column": block.prompt_column, "response_column": block.response_column}
    records = read_records(block.train_file, limit=block.max_train_samples, **columns)
    eval_records = (
        read_records(block.eval_file, limit=block.max_eval_samples, **columns) if block.eval_file is not None else []
    )
    model, tokenizer = load_model(recipe.model, seed=recipe.train.seed)
    limits = Limits(
        source_tokens=block.max_source_length,
        target_tokens=block.max_target_length,
        total_tokens=min(block.max_length, getattr(model.config, "max_position_embeddings", block.max_length)),
    )
    with Progress("tokenising", len(records), enabled=progress) as bar:
        examples, cuts = make_examples(tokenizer, records, limits, loss_on=block.loss_on, progress=bar.update)
    eval_examples: list[Example] = []
    if eval_records:
        eval_examples, _ = make_examples(tokenizer, eval_records, limits, loss_on=block.loss_on)
    if progress:
        print(f"training data: {cuts}", file=sys.stderr)
    result = train(model, tokenizer, recipe, examples, eval_examples, resume, on_step, progress)
    write_report(result, recipe, examples, cuts, finished=time.strftime("%Y-%m-%d %H:%M:%S"))
    return result


def load_model(block: ModelBlock, *, seed: int) -> tuple[Any, Any]:
    """Load the model of a recipe, or make a new one with random weights.

    Args:
        block: The recipe's `model` block.
        seed: Seed of new weights.

    Returns:
        Model and tokenizer; the model lies on the device to train on.

    Raises:
        UsageError: If `init` has a name that the config does not have.
    """
    from glmkit.loading import choose_device, load

    if block.init is None:
        assert block.path is not None
        loaded = load(block.path, dtype=block.dtype, device=block.device)
        return loaded.model, loaded.tokenizer
    from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
    from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer

    assert block.tokenizer is not None
    _refuse_unknown(block.init, {*ChatGLM2Config.__dataclass_fields__, *ChatGLM2Config.attribute_map})
    tokenizer = ChatGLMTokenizer.from_pretrained(block.tokenizer)
    torch.manual_seed(seed)
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**block.init))
    return model.to(choose_device(block.device)), tokenizer


def _refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UsageError(
                f"model.init has no key {name!r}; expected the names of a ChatGLM2/3 config.json",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
