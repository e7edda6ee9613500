"""From a recipe to a trained model: data, model, the loop; what is known of it goes into the run's folder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from glmkit.data.examples import Examples
from glmkit.data.lengths import TruncationReport
from glmkit.data.prepared import examples_of
from glmkit.data.records import Record, read_records
from glmkit.devices import choose_device
from glmkit.errors import DataError, MissingDependencyError, UsageError
from glmkit.loading import LANGUAGE_MODELS, Loaded, choose_family, load, open_model, read_config
from glmkit.loading import read_tokenizer as tokenizer_of
from glmkit.location import locate
from glmkit.models.architectures import config_class
from glmkit.tokenizers import load_tokenizer
from glmkit.train import reopened
from glmkit.train.arguments import DataBlock, ModelBlock, Recipe, load_recipe
from glmkit.train.fitting import require_fit
from glmkit.train.glm_examples import FORMATS as GLM_FORMATS
from glmkit.train.glm_examples import (
    ClozeItem,
    ClozeRecords,
    cloze_batches,
    cloze_examples,
    glm_head,
    right_answers,
    seq2seq_examples,
)
from glmkit.train.loop import OnStep, TrainingResult, train
from glmkit.train.progress import Progress
from glmkit.train.ranks import first_goes_first, loading_device
from glmkit.train.run_folder import RunRecord, recorded
from glmkit.train.sources import Source, reading_of, records_of
from glmkit.train.validation import HeldOut

_ANSWER_TOKENS = 256  # of answers at validations, where the recipe has no limit


def finetune(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
    allow_change: bool = False,
    force: bool = False,
    loaded: Loaded | None = None,
) -> TrainingResult:
    """Do what a recipe says.

    Args:
        recipe: A YAML file, the name of a recipe of the package, or a loaded recipe.
        overrides: "key=value" changes to it.
        resume: Continue from the last checkpoint in the recipe's output folder.
        on_step: Called after every step, see `train`.
        progress: Show bars, or lines where there is no terminal.
        allow_change: Resume also with settings that differ, if what that does is known; it is told.
        force: Begin also if the memory will not be enough, as far as can be known.
        loaded: The model, if it is loaded already; the recipe's `model` block then only says what it is.

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
    _check(recipe)
    first = os.environ.get("RANK", "0") == "0"
    progress = progress and first
    with recorded(recipe, resume=resume, writes=first) as record:
        # The data is read before the weights: a wrong path should not cost minutes of loading.
        tokenizer, context = tokenizer_and_context(recipe.model) if loaded is None else _of_loaded(loaded)
        with first_goes_first(recipe, recipe.model.device):  # the others find the token ids that it has kept
            data = _Data(recipe, tokenizer, context, record, progress)
            source, held_out = data.train(), data.held_out()
        if loaded is None and recipe.data.format not in GLM_FORMATS:
            _preflight(recipe, data, record, force)
        place = recipe.base.model_copy(update={"device": str(loading_device(recipe, recipe.model.device))})
        model = load_model(place, seed=recipe.train.seed)[0] if loaded is None else loaded.model
        if recipe.data.format in GLM_FORMATS:
            model = glm_head(model, recipe.data)
        record.facts |= {"model": recipe.model.path or "new, sizes below", **data.facts}
        adapter = None if recipe.model.adapter is None else Path(recipe.model.adapter)
        result = train(
            model,
            tokenizer,
            recipe,
            source,
            held_out,
            resume,
            on_step,
            progress,
            allow_change=allow_change,
            adapter=adapter,
        )
        if first and result.result_dir is not None:
            record.facts["opened again"] = _opened_again(model, recipe, result.result_dir)
        return result


def _preflight(recipe: Recipe, data: _Data, record: RunRecord, force: bool) -> None:
    """Refuse what cannot fit, before the weights are read."""
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    plan = require_fit(recipe, longest=data.longest(), world=world, local=local, force=force)
    if plan is None:  # so small that counting would take longer than it is worth
        return
    record.facts["memory planned"] = f"{plan.peak / 1e9:.2f} GB on each device"
    record.sections["Memory planned"] = f"```text\n{plan}\n```"


def _opened_again(model: Any, recipe: Recipe, result: Path) -> str:
    if recipe.data.format in GLM_FORMATS or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "not compared: the model here is a head of its own, or shared out"
    return reopened.compare_result(model, recipe.model, result)


def load_model(block: ModelBlock, *, seed: int) -> tuple[Any, Any]:
    """Load the model of a recipe, or make a new one with random weights.

    Args:
        block: The recipe's `model` block.
        seed: Seed of new weights.

    Returns:
        Model and tokenizer; the model lies on the device to train on. What `adapter` names is not in it.

    Raises:
        UsageError: If `init` has a name that the config does not have.
    """
    if block.init is None:
        assert block.path is not None
        loaded = load(
            block.path,
            dtype=block.dtype,
            device=block.device,
            quantize=block.quantize,
            kernels="torch",
            family=block.family,
        )
        return loaded.model, loaded.tokenizer
    config, tokenizer = _new(block)
    torch.manual_seed(seed)
    return LANGUAGE_MODELS[type(config)](config).to(choose_device(block.device)), tokenizer


def _new(block: ModelBlock) -> tuple[Any, Any]:
    """Config and tokenizer of a new model, of the family that its sizes are of."""
    assert block.init is not None
    assert block.tokenizer is not None
    kind = config_class(block.init)
    _refuse_unknown(block.init, {*kind.__dataclass_fields__, *kind.attribute_map, "model_type"}, kind.__name__)
    config = kind(**{name: value for name, value in block.init.items() if name != "model_type"})
    return config, load_tokenizer(locate(block.tokenizer), config)


def _refuse_unknown(names: Collection[str], known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UsageError(
                f"model.init has no key {name!r}; expected the names of a config.json ({kind})",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )


def tokenizer_and_context(block: ModelBlock) -> tuple[Any, int | None]:
    """Read tokenizer and context of a model without its weights.

    Args:
        block: The recipe's `model` block.

    Returns:
        The tokenizer, and how many columns the model has positions for, None if its config does not say.
    """
    if block.init is not None:
        config, tokenizer = _new(block)
        return tokenizer, getattr(config, "max_position_embeddings", None)
    assert block.path is not None
    family = choose_family(block.path, block.family)
    with open_model(locate(block.path)) as folder:
        config = read_config(folder, family, overrule=block.family is not None)
        return tokenizer_of(folder, config), getattr(config, "max_position_embeddings", None)


def read_eval_records(block: DataBlock, limit: int | None = None) -> list[Record]:
    """Read the questions and answers on which a recipe measures.

    Args:
        block: The recipe's `data` block; it has an eval_file.
        limit: Use only the first; by default `max_eval_samples`.

    Returns:
        The records that have an answer to compare with.
    """
    assert block.eval_file is not None
    columns = {"prompt_column": block.prompt_column, "response_column": block.response_column}
    limit = block.max_eval_samples if limit is None else limit
    found = read_records(
        block.eval_file, format=block.format, history_column=block.history_column, limit=limit, **columns
    )
    return [record for record in found if record.messages]


def _of_loaded(loaded: Loaded) -> tuple[Any, int | None]:
    return loaded.tokenizer, getattr(loaded.config, "max_position_embeddings", None)


def _check(recipe: Recipe) -> None:
    """Refuse at once what would fail after minutes."""
    for name in (recipe.data.train_file, recipe.data.eval_file, recipe.data.mix_file):
        if name is not None and not Path(name).exists():
            raise DataError(
                f"there is no data file {name}", hint="check the path; it is relative to the current folder"
            )
    if recipe.train.predict_with_generate and find_spec("jieba") is None:
        raise MissingDependencyError("jieba", "evaluate")
    if recipe.model.adapter is not None and recipe.method.name not in ("lora", "ptuning_v2"):
        raise UsageError(
            f"model.adapter goes on with an adapter, and method.name is {recipe.method.name}",
            hint="set method.name to lora or ptuning_v2; to train all weights of base and adapter, merge them first",
        )


@dataclass
class _Data:
    """The data of a run, as the loop wants it.

    Args:
        recipe: What is to be read, and how.
        tokenizer: The model's tokenizer.
        context: Most tokens the model has positions for, None if nobody knows.
        record: Takes what is found.
        progress: Show how reading goes.
    """

    recipe: Recipe
    tokenizer: Any
    context: int | None
    record: RunRecord
    progress: bool

    def __post_init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.learnt: Examples | None = None

    def train(self) -> Source:
        """Read what is to be learnt."""
        block = self.recipe.data
        if block.format == "cloze":
            items = self._cloze(block.train_file, block.max_train_samples)
            self.facts["training data"] = f"{block.train_file}: {len(items)} examples"
            return ClozeRecords(items, self.recipe.train)
        self.learnt, report = self._examples(block.train_file, block.max_train_samples, "training data")
        self._tell("training data", block.train_file, report)
        mixed = Examples(())
        if block.mix_file is not None:
            mixed, report = self._examples(block.mix_file, None, "general data")
            self._tell("general data", block.mix_file, report)
        source = records_of(self.recipe, self.learnt, mixed, self.tokenizer.pad_token_id, self.context)
        if block.packing:
            self.facts["packing"] = f"{source.filled():.1%} of the columns hold a token"
            self.record.say(f"packing: {self.facts['packing']}", show=self.progress)
        return source

    def longest(self) -> tuple[int, int] | None:
        """Tokens of the longest example, and most targets of one; None if nobody knows."""
        found = self.learnt
        return None if found is None else (int(found.lengths.max()), int(found.label_tokens.max()))

    def held_out(self) -> HeldOut:
        """Read what the run is measured on."""
        block, train_block = self.recipe.data, self.recipe.train
        if block.eval_file is None:
            return HeldOut()
        if block.format == "cloze":
            items = self._cloze(block.eval_file, block.max_eval_samples)
            size = train_block.per_device_eval_batch_size or train_block.per_device_train_batch_size
            batches = cloze_batches(items, size)

            def accuracy(model: Any, device: torch.device) -> dict[str, float]:
                inputs = ({name: value.to(device) for name, value in batch.inputs.items()} for batch in batches)
                return {"accuracy": 100 * sum(right_answers(model, one) for one in inputs) / len(items)}

            return HeldOut(batches, also=accuracy)
        examples, report = self._examples(block.eval_file, block.max_eval_samples, "validation data")
        if self.learnt is not None:
            report = replace(report, duplicates=len(set(self.learnt.digests()) & set(examples.digests())))
        self._tell("validation data", block.eval_file, report)
        return HeldOut(examples, self._records(), block.max_target_length or _ANSWER_TOKENS)

    def _cloze(self, file: str, limit: int | None) -> list[ClozeItem]:
        return cloze_examples(self.tokenizer, file, self.recipe.data, limit=limit, context=self.context)

    def _records(self) -> list[Record]:
        """The records that are answered at validations."""
        block, train_block = self.recipe.data, self.recipe.train
        if not train_block.predict_with_generate or block.eval_file is None:
            return []
        if Path(block.eval_file).is_dir() or block.format in GLM_FORMATS:
            raise UsageError(
                "predict_with_generate needs questions and answers as text",
                hint="let data.eval_file be the file itself, of a format of questions and answers",
            )
        wanted = min(train_block.max_predict_samples, block.max_eval_samples or train_block.max_predict_samples)
        return read_eval_records(block, wanted)

    def _examples(self, file: str, limit: int | None, title: str) -> tuple[Examples, TruncationReport]:
        block = self.recipe.data
        if block.format == "seq2seq":
            examples = seq2seq_examples(self.tokenizer, file, block, limit=limit, context=self.context)
            return examples, TruncationReport(
                len(examples), int(examples.lengths.sum()), int(examples.label_tokens.sum())
            )
        reading = reading_of(block, file, limit, self.context)
        with Progress(f"tokenising {title}", limit or 1, enabled=self.progress) as bar:
            return examples_of(
                reading,
                self.tokenizer,
                cache_dir=block.cache_dir,
                processes=block.num_proc,
                progress=lambda done, every: bar.update(done, total=every),
                say=lambda text: self.record.say(text, show=self.progress),
            )

    def _tell(self, title: str, file: str, report: TruncationReport) -> None:
        self.facts[title] = f"{file}: {report}"
        page = report.page(title)
        self.record.say(page, show=self.progress)
        self.record.sections[title.capitalize()] = f"```text\n{page}\n```"
