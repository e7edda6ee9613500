"""`Trainer(task="text_generation", model=…)`: the training loop in the form that MindFormers users know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.evaluate.adgen import evaluate_adgen
from glmkit.loading import Loaded, load
from glmkit.pipelines import TextGenerationPipeline, pipeline
from glmkit.train.arguments import Recipe, find_key, load_recipe, one_line
from glmkit.train.loop import TrainingResult
from glmkit.train.run import finetune, read_eval_records

_METHODS = {"": "full", "lora": "lora", "ptuning2": "ptuning_v2", "ptuning": "ptuning_v2", "p-tuning-v2": "ptuning_v2"}


@dataclass(frozen=True)
class _Weights:
    """What is evaluated and asked: a model, or a base with an adapter."""

    path: str
    adapter: str | None
    name: str


class Trainer:
    """Trains, evaluates and asks a model; every setting is one of a recipe.

        trainer = Trainer(task="text_generation", model="glm2_6b", train_dataset="train.json", eval_dataset="dev.json")
        trainer.finetune()
        trainer.evaluate()
        trainer.predict(input_data="你好")        # [{"text_generation_text": ["…"]}]

    Args:
        task: "text_generation".
        model: A name such as "chatglm3-6b" or "glm2_6b", a folder, or what `glmkit.load` returned, whose model is
            changed by training. A name that ends in `_lora` chooses that method, as in MindFormers.
        train_dataset: Records to learn from.
        eval_dataset: Records to measure on.
        args: Settings: a recipe (name, file or `Recipe`), or a dictionary of blocks or of single settings by the names
            that flags have, those of other tools included.
        pet_method: "lora" or "ptuning2": the method, if `args` does not say it; else all parameters learn.
        model_name: The model, if `model` is left out.
        **settings: Single settings, such as learning_rate=1e-4.

    Raises:
        UsageError: An unknown task, method or setting.
    """

    def __init__(
        self,
        task: str = "text_generation",
        model: str | Path | Loaded | None = None,
        train_dataset: str | Path | None = None,
        eval_dataset: str | Path | None = None,
        args: str | Path | Recipe | Mapping[str, Any] | None = None,
        pet_method: str = "",
        model_name: str | None = None,
        **settings: Any,
    ) -> None:
        if task.replace("-", "_") != "text_generation":
            raise UsageError(f"there is no task {task!r}", hint="did you mean 'text_generation'?")
        if pet_method not in _METHODS:
            known = ", ".join(filter(None, _METHODS))
            raise UsageError(f"there is no pet_method {pet_method!r}", hint=f"one of {known}")
        self._loaded = model if isinstance(model, Loaded) else None
        named = model.path if isinstance(model, Loaded) else model or model_name
        name, method = (None, pet_method) if named is None else _split(str(named), pet_method)
        given: dict[str, Any] = {"model.path": name, "method.name": _METHODS[method] if method else None}
        given |= {"data.train_file": train_dataset, "data.eval_file": eval_dataset}
        given = {key: str(value) for key, value in given.items() if value is not None}
        base, listed = (args, {}) if isinstance(args, str | Path) else (None, _settings(args))
        changes = {_own_name(key): value for key, value in (listed | settings).items()} | given
        if base is None:
            changes.setdefault("model.path", "glm-nano")
            changes.setdefault("output.dir", str(Path("output") / Path(changes["model.path"]).name))
            changes.setdefault("data.train_file", "")  # asking needs none
        self.recipe = load_recipe(base, [f"{key}={one_line(value)}" for key, value in changes.items()])
        self.result: TrainingResult | None = None
        self._pipeline: TextGenerationPipeline | None = None
        self._asked: Loaded | None = None

    def train(self, *, resume: bool = False, progress: bool = True, **changes: Any) -> TrainingResult:
        """Learn, starting from the model's weights.

        Args:
            resume: Go on with the run in the output folder.
            progress: Show bars, or lines where there is no terminal.
            **changes: `resume_training`, which is `resume`; `resume_from_checkpoint`, the same.

        Returns:
            The result; the trained model or adapter is in its `result_dir`, and the one that is asked from now on.
        """
        for name in ("resume_training", "resume_from_checkpoint"):
            resume = bool(changes.pop(name, None)) or resume
        if changes:
            raise UsageError(f"{', '.join(changes)}: settings are given to Trainer(...)")
        if not self.recipe.data.train_file:
            raise UsageError("there is nothing to learn from", hint="Trainer(..., train_dataset=FILE)")
        loaded, self._loaded = self._loaded, None  # training changes it, so it can begin one run only
        self.result = finetune(self.recipe, resume=resume, progress=progress, loaded=None if resume else loaded)
        self._forget()
        return self.result

    def finetune(self, finetune_checkpoint: str | Path | None = None, **options: Any) -> TrainingResult:
        """Learn; the same as `train`, in the words of MindFormers.

        Args:
            finetune_checkpoint: Folder or name of the model to start from, instead of the one that was given.
            **options: See `train`.

        Returns:
            See `train`.
        """
        if finetune_checkpoint is not None:
            block = self.recipe.model.model_copy(update={"path": str(finetune_checkpoint)})
            self.recipe, self._loaded = self.recipe.model_copy(update={"model": block}), None
            self._forget()
        return self.train(**options)

    def evaluate(
        self,
        eval_dataset: str | Path | None = None,
        eval_checkpoint: str | Path | None = None,
        *,
        output_dir: str | Path | None = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, float]:
        """Answer all records greedily and score the answers.

        Args:
            eval_dataset: Records, instead of those that were given.
            eval_checkpoint: Folder of an adapter or a model to measure instead.
            output_dir: Folder for predictions and results; by default one in the output folder for these weights.
            max_new_tokens: Longest answer; by default data.max_target_length, else 256.

        Returns:
            predict_bleu-4, predict_rouge-1 and the others of `glm evaluate adgen`.
        """
        block = self.recipe.data
        file = eval_dataset or block.eval_file
        if file is None:
            raise UsageError("there is nothing to measure on", hint="Trainer(..., eval_dataset=FILE)")
        weights = self._weights(eval_checkpoint)
        loaded = self._model(eval_checkpoint)
        train_block = self.recipe.train
        return evaluate_adgen(
            loaded.model,
            loaded.tokenizer,
            read_eval_records(block.model_copy(update={"eval_file": str(file)})),
            options=SamplingOptions(temperature=0.0),
            max_new_tokens=max_new_tokens or block.max_target_length or 256,
            batch_size=train_block.per_device_eval_batch_size or train_block.per_device_train_batch_size,
            output_dir=output_dir or Path(self.recipe.output.dir) / f"evaluation-{weights.name}",
        )

    def predict(
        self,
        input_data: str | Sequence[str] = (),
        predict_checkpoint: str | Path | None = None,
        **settings: Any,
    ) -> list[dict[str, list[str]]]:
        """Answer a text or several.

        Args:
            input_data: The texts.
            predict_checkpoint: Folder of an adapter or a model to ask instead.
            **settings: See `glmkit.pipeline`: do_sample, top_k, top_p, temperature, max_length, seed and others.

        Returns:
            One dictionary for each text: {"text_generation_text": [answer]}.
        """
        if predict_checkpoint is not None:
            return pipeline(model=self._model(predict_checkpoint))(input_data, **settings)
        if self._pipeline is None:
            self._pipeline = pipeline(model=self._model(None))
        return self._pipeline(input_data, **settings)

    def _forget(self) -> None:
        self._pipeline = self._asked = None

    def _weights(self, checkpoint: str | Path | None) -> _Weights:
        block = self.recipe.model
        base = block.path or ""
        folder = None if checkpoint is None else Path(checkpoint)
        name = "base" if folder is None else folder.name
        if folder is None and self.result is not None and self.result.result_dir is not None:
            folder, name = self.result.result_dir, f"step-{self.result.steps}"
        if folder is None:
            return _Weights(base, block.adapter, name)
        whole = (folder / "config.json").is_file()
        return _Weights(str(folder), None, name) if whole else _Weights(base, str(folder), name)

    def _model(self, checkpoint: str | Path | None) -> Loaded:
        """The model to ask: trained, if it was, and whole again, whatever training did to the one in memory."""
        if checkpoint is None and self.result is None and self._loaded is not None:
            return self._loaded
        if checkpoint is None and self._asked is not None:
            return self._asked
        weights, block = self._weights(checkpoint), self.recipe.model
        # A fine-tuned whole model was saved in full; the settings of its base are not its own.
        base = weights.path == block.path
        of_base: dict[str, Any] = {"quantize": block.quantize, "family": block.family} if base else {}
        found = load(weights.path, adapter=weights.adapter, dtype=block.dtype, device=block.device, **of_base)
        if checkpoint is None:
            self._asked = found
        return found


def _split(name: str, method: str) -> tuple[str, str]:
    """Take the method off a name such as glm2_6b_lora."""
    for ending in ("_lora", "_ptuning2"):
        if name.endswith(ending) and not Path(name).exists():
            return name.removesuffix(ending), method or ending[1:]
    return name, method


def _own_name(key: str) -> str:
    """A setting's name with its block, if it is known; else as it was given, to be refused by that name."""
    location = find_key(key, Recipe)
    return key if location is None else ".".join(location)


def _settings(args: Recipe | Mapping[str, Any] | None) -> dict[str, Any]:
    """Lay out settings as "block.key" or "key" and value."""
    if args is None:
        return {}
    content = args.model_dump(mode="json", exclude_unset=True) if isinstance(args, Recipe) else args
    laid_out: dict[str, Any] = {}
    for name, value in content.items():
        if name in Recipe.model_fields and isinstance(value, Mapping):
            laid_out |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            laid_out[name] = value
    return laid_out
