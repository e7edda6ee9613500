"""Recipes: what a YAML file may say, checked word for word, with the line of every mistake.

The text under a field is its help. Names are those of Hugging Face's training arguments wherever they have one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glmkit.errors import UsageError


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelBlock(_Block):
    """Where the model comes from: an existing one, or a new one from sizes."""

    path: str | None = None
    """Folder, family name or hub id of the model to tune."""
    init: dict[str, Any] | None = None
    """Sizes of a new ChatGLM2/3 model to train from scratch, in the words of config.json; needs `tokenizer`."""
    tokenizer: str | None = None
    """Folder with the tokenizer of a new model."""
    dtype: str = "auto"
    """Precision in which frozen weights are loaded; trained weights are always float32."""
    device: str = "auto"
    """Where to train: auto, cpu, or a device of torch."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelBlock:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either model.path or model.init")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("model.init needs model.tokenizer, the folder of a tokenizer")
        return self


class DataBlock(_Block):
    """What to learn from."""

    train_file: str
    """JSON or JSON Lines with the training records."""
    eval_file: str | None = None
    """Records on which the validation loss is measured."""
    prompt_column: str = "content"
    """Field with the user's text, for records without `conversations`."""
    response_column: str = "summary"
    """Field with the answer, for records without `conversations`."""
    max_source_length: int | None = Field(None, ge=4)
    """Most tokens of a prompt with its template; longer user texts are shortened, the template never."""
    max_target_length: int | None = Field(None, ge=1)
    """Most tokens of an answer; a cut answer is trained without an end mark."""
    max_length: int = Field(2048, ge=4)
    """Most tokens of a whole record; the rest is cut on the right."""
    loss_on: Literal["answers", "all"] = "answers"
    """Learn the assistant's messages only, or every token."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use only the first records of train_file."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Use only the first records of eval_file."""


class MethodBlock(_Block):
    """Which parameters learn."""

    name: Literal["full", "lora"] = "full"
    """full: all parameters. lora: small matrices beside the frozen ones, saved as a PEFT folder."""
    r: int = Field(8, ge=1)
    """Rank of the LoRA matrices."""
    lora_alpha: float = Field(32, gt=0)
    """LoRA's output is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the input of the LoRA matrices."""
    target_modules: list[str] = ["query_key_value"]
    """Names of the linear layers that get LoRA matrices."""


class TrainBlock(_Block):
    """How to learn."""

    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up; cosine and linear end at lr_min_ratio."""
    lr_min_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a part of learning_rate."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Part of the steps over which the learning rate rises from 0."""
    num_train_epochs: int = Field(1, ge=1)
    """Passes over the data, unless max_steps is given."""
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; -1 means num_train_epochs decides."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Records per batch, unless tokens_per_batch is given."""
    tokens_per_batch: int | None = Field(None, ge=16)
    """Most tokens per batch, padding included, instead of a number of records."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches per optimizer step; every label token weighs the same whatever the division."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    bf16: bool = False
    """Compute matrix products in bfloat16 (weights, loss and optimizer stay float32)."""
    seed: int = Field(42, ge=0)
    """Seed of weights, order of the data and dropout."""
    logging_steps: int = Field(10, ge=1)
    """Write a line of metrics every so many steps."""
    eval_steps: int = Field(0, ge=0)
    """Measure the validation loss every so many steps; 0: at the end only."""
    save_steps: int = Field(500, ge=0)
    """Save a checkpoint every so many steps; 0: only when the run is stopped."""
    save_total_limit: int = Field(2, ge=1)
    """Keep this many checkpoints."""


class OutputBlock(_Block):
    """Where results go."""

    dir: str
    """Folder for checkpoints, metrics, report and the result; one run at a time."""


class Recipe(_Block):
    """A whole recipe."""

    model: ModelBlock
    """Where the model comes from."""
    data: DataBlock
    """What to learn from."""
    method: MethodBlock = MethodBlock()
    """Which parameters learn."""
    train: TrainBlock = TrainBlock()
    """How to learn."""
    output: OutputBlock
    """Where results go."""


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or one that comes with the package by its name.

    Args:
        path_or_name: A file, or a bare name such as "adgen_lora".
        overrides: "block.key=value" each, the value written as in YAML; the block may be left out where only one
            block has the key.

    Returns:
        The checked recipe.

    Raises:
        UsageError: If the file is missing or not YAML, or a key or value is wrong; names the line and the nearest
            key that exists.
    """
    name, text = _recipe_text(path_or_name)
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} must hold the blocks {', '.join(Recipe.model_fields)}")
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        location, value = _override(override)
        block = content.setdefault(location[0], {})
        for key in location[1:-1]:
            block = block.setdefault(key, {}) if isinstance(block, dict) else {}
        if not isinstance(block, dict):
            raise UsageError(f"{override!r}: {'.'.join(location[:-1])} is not a block of {name}")
        block[location[-1]] = value
        origins[location] = override
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = _lines(tree)
        problems = [_problem(name, item, lines, origins) for item in error.errors()]
        raise UsageError("\n".join(problems)) from None


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    folder = resources.files("glmkit") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _recipe_text(path_or_name: str | Path) -> tuple[str, str]:
    path = Path(path_or_name)
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    names = recipe_names()
    if str(path_or_name) in names:
        packaged = resources.files("glmkit") / "recipes" / f"{path_or_name}.yaml"
        return f"recipe {path_or_name}", packaged.read_text(encoding="utf-8")
    raise UsageError(
        f"there is no recipe file {path_or_name}", hint=f"give a YAML file or one of the names {', '.join(names)}"
    )


def _blocks() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _override(override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not key:
        raise UsageError(f"{override!r} is not of the form key=value", hint="for instance train.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    location = tuple(key.split("."))
    if len(location) == 1 and location[0] not in Recipe.model_fields:
        owners = [block for block, kind in _blocks().items() if location[0] in kind.model_fields]
        if len(owners) != 1:
            raise UsageError(f"{override!r}: {_unknown(location[0], ())}")
        location = (owners[0], location[0])
    return location, value


def _unknown(key: str, within: tuple[str, ...]) -> str:
    """Say that a key does not exist, and which one was probably meant."""
    dotted = {f"{block}.{name}": name for block, kind in _blocks().items() for name in kind.model_fields}
    dotted |= {name: name for name in Recipe.model_fields}
    here = [full for full in dotted if full.rpartition(".")[0] == ".".join(within)]
    close = difflib.get_close_matches(key, [dotted[full] for full in here], n=1, cutoff=0.6)
    if close:
        return f"there is no key {key!r}; did you mean {'.'.join([*within, close[0]])!r}?"
    elsewhere = [full for full, name in dotted.items() if name == key]
    elsewhere = elsewhere or [
        full for full, name in dotted.items() if difflib.get_close_matches(key, [name], cutoff=0.75)
    ]
    if elsewhere:
        return f"there is no key {key!r} here; did you mean {elsewhere[0]!r}?"
    return f"there is no key {key!r}; known are {', '.join(here)}"


def _problem(name: str, item: Any, lines: dict[tuple[str, ...], int], origins: dict[tuple[str, ...], str]) -> str:
    location = tuple(str(part) for part in item["loc"])
    if location in origins:
        where = origins[location]
    else:
        known = next((location[:size] for size in range(len(location), 0, -1) if location[:size] in lines), None)
        where = f"{name}:{lines[known]}" if known else name
    if item["type"] == "extra_forbidden":
        return f"{where}: {_unknown(location[-1], location[:-1])}"
    if item["type"] == "missing":
        return f"{where}: {'.'.join(location)} is missing; set it in the file or with {'.'.join(location)}=..."
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict | BaseModel) else f", found {item['input']!r}"
    return f"{where}: {'.'.join(location)}: {message}{found}"


def _lines(node: Any, within: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Map every key of a YAML tree to its line."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            location = (*within, str(key.value))
            found[location] = key.start_mark.line + 1
            found |= _lines(value, location)
    return found
