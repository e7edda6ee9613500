"""What a run does beside learning: measuring without a trace, the best checkpoint, scales, figures, warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.data.records import read_records
from glmkit.devices import peak_bytes
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import TrainingError, UsageError
from glmkit.evaluate.adgen import METRICS, evaluate_adgen
from glmkit.loading import load
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.train import journal, precision, stepper, validation
from glmkit.train.arguments import ModelBlock, Recipe
from glmkit.train.checkpoints import checkpoints
from glmkit.train.journal import MEASURED, warning_signs
from glmkit.train.loop import TrainingResult, train
from glmkit.train.methods import make_method
from glmkit.train.optimizer import warnings_about
from glmkit.train.processes import OneProcess
from glmkit.train.run import finetune, load_model
from glmkit.train.speed import Operations, measured_peak
from glmkit.train.validation import Best, HeldOut
from tiny import sizes, train_tokenizer
from tiny_families import glm_tokenizer, train_ice_text
from tiny_runs import SIZES, PadOnly, examples

WORDS = ("棉", "显瘦", "tea", "rice")
LORA = {"name": "lora", "lora_dropout": 0.3}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Fixtures of a module are made before the one that does this for each test.
        patch.setattr("glmkit.train.reopened.compare_result", lambda *_: "not compared in this test")
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(train_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.model"), generation=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.json"
    rows = [{"content": f"上衣 {word}", "summary": f"{word} hello world"} for word in WORDS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 4), encoding="utf-8")
    return path


def make_recipe(folder: Path, method: dict[str, Any] | None = None, **train_block: Any) -> Recipe:
    block = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 0, "logging_steps": 1}
    content = {
        "model": {"path": "tiny"},
        "data": {"train_file": "none"},
        "method": method or {"name": "full"},
        "train": block | train_block,
        "output": {"dir": str(folder)},
    }
    return Recipe.model_validate(content)


def tiny_model(**changes: Any) -> ChatGLM2ForCausalLM:
    torch.manual_seed(5)
    return ChatGLM2ForCausalLM(ChatGLM2Config(**SIZES | changes))


def run(recipe: Recipe, held_out: Any = None, **options: Any) -> tuple[TrainingResult, Any]:
    model = tiny_model()
    return train(model, PadOnly(), recipe, examples(), held_out, progress=False, **options), model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def untimed(result: TrainingResult) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in result.metrics]


class Died(BaseException):
    pass


def dying_at(step: int) -> Any:
    def die(now: int, total: int, figures: dict[str, float]) -> None:
        if now == step:
            raise Died

    return die


# --- measuring ---


def chatting_recipe(folder: Path, base: Path, data: Path, **settings: Any) -> Recipe:
    recipe = make_recipe(folder, LORA, max_steps=6, probe_prompts=["上衣 tea"], max_predict_samples=3, **settings)
    block = recipe.data.model_copy(update={"train_file": str(data), "eval_file": str(data), "max_target_length": 8})
    return recipe.model_copy(update={"data": block, "model": ModelBlock(path=str(base))})


def test_measuring_changes_nothing_and_resuming_with_it_is_exact(
    tmp_path: Path, data: Path, tokenizer: ChatGLMTokenizer
) -> None:
    """Dropout is drawn from the generators that answering might have used."""
    pytest.importorskip("jieba")
    folder = tmp_path / "base"
    torch.manual_seed(5)
    ChatGLM2ForCausalLM(ChatGLM2Config(**sizes(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def tuned(name: str, **settings: Any) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
        loaded = load(folder)
        recipe = chatting_recipe(tmp_path / name, folder, data, **settings)
        options = {key: recipe_options.pop(key) for key in list(recipe_options)}
        result = finetune(recipe, progress=False, loaded=loaded, **options)
        return result, weights(loaded.model)

    recipe_options: dict[str, Any] = {}
    measured = {"eval_steps": 1, "predict_with_generate": True, "fp16": False, "save_steps": 2}
    plain, expected = tuned("plain")
    watched, found = tuned("watched", **measured)
    assert same(found, expected)
    assert [line["loss"] for line in plain.metrics] == [line["loss"] for line in watched.metrics]
    assert all({"eval_loss", *METRICS} <= line.keys() for line in watched.metrics)
    assert all("eval_loss" not in line for line in plain.metrics[:-1])

    recipe_options = {"on_step": dying_at(3)}
    with pytest.raises(Died):
        tuned("cut", **measured)
    recipe_options = {"resume": True}
    resumed, found = tuned("cut", **measured)
    assert same(found, expected)
    assert untimed(resumed) == untimed(watched)
    samples = [(tmp_path / name / "samples.jsonl").read_text(encoding="utf-8") for name in ("watched", "cut")]
    assert samples[0] == samples[1]
    assert [json.loads(line)["step"] for line in samples[0].splitlines()] == list(range(7))


def test_scores_and_answers_are_those_of_the_result(tmp_path: Path, data: Path, tokenizer: ChatGLMTokenizer) -> None:
    pytest.importorskip("jieba")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = make_recipe(
        tmp_path / "run", max_steps=60, tokens_per_batch=512, logging_steps=20, eval_steps=30,
        predict_with_generate=True, probe_prompts=["上衣 rice"],
    )  # fmt: skip
    block = recipe.data.model_copy(update={"train_file": str(data), "eval_file": str(data), "max_target_length": 16})
    source = ModelBlock(init=sizes(tokenizer), tokenizer=str(tmp_path / "tokenizer"))
    result = finetune(recipe.model_copy(update={"model": source, "data": block}), progress=False)
    assert result.result_dir is not None
    tuned = load(result.result_dir)
    records = read_records(data)
    scores = evaluate_adgen(
        tuned.model, tuned.tokenizer, records, options=SamplingOptions(temperature=0.0), max_new_tokens=16,
        output_dir=tmp_path / "scores",
    )  # fmt: skip
    last = result.metrics[-1]
    assert {name: round(last[name], 4) for name in METRICS} == {name: scores[f"predict_{name}"] for name in METRICS}
    assert last["bleu-4"] > 50
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 30, 60]
    assert lines[-1]["answer"] == tuned.chat("上衣 rice", temperature=0).text
    assert lines[0]["answer"] != lines[-1]["answer"]
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert lines[-1]["answer"] in report


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_steps": 3}, [3, 6, 9, 12]),
        ({"eval_epochs": 1}, [6, 12]),  # 21 records in batches of 4
        ({"eval_epochs": 2}, [12]),
        ({"eval_epochs": 1, "gradient_accumulation_steps": 4}, [2, 4]),  # the last window of a pass is short
        ({"eval_steps": 5, "eval_epochs": 1}, [5, 6, 10, 12]),
        ({}, [12]),
    ],
)
def test_validations_come_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], steps: list[int]
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(journal, "_SECONDS_BETWEEN_PICTURES", -1.0)
    monkeypatch.setattr(journal, "draw_png", lambda curve, path: drawn.append(len(curve.lines["validation"])))
    result, _ = run(make_recipe(tmp_path, num_train_epochs=2, logging_steps=100, **settings), examples(4))
    assert [line["step"] for line in result.metrics if "eval_loss" in line] == steps
    assert drawn == list(range(1, len(steps) + 1))  # a picture at each, with all of them so far


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float], name: str = "eval_loss") -> None:
    values = iter(losses)
    monkeypatch.setattr(validation.Validation, "measure", lambda *_: {name: next(values)})


def test_the_best_checkpoint_is_kept_and_is_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [3.0, 2.0, 2.5, 2.2, 2.1])
    seen: dict[int, dict[str, torch.Tensor]] = {}
    model = tiny_model()
    recipe = make_recipe(
        tmp_path, max_steps=10, eval_steps=2, save_steps=2, save_total_limit=1, load_best_model_at_end=True
    )
    result = train(
        model, PadOnly(), recipe, examples(), examples(4), progress=False,
        on_step=lambda step, *_: seen.update({step: weights(model)}),
    )  # fmt: skip
    assert (result.best_step, result.steps, result.interrupted) == (4, 10, False)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-8", "step-4"]
    assert result.result_dir is not None
    assert same(weights(ChatGLM2ForCausalLM.from_pretrained(result.result_dir)), seen[4])
    assert same(weights(model), seen[4])


def test_the_best_adapter_is_the_result_where_no_process_has_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared(OneProcess):
        whole = False

        def read(self, folder: Path) -> None:
            raise AssertionError("an adapter is no part of the parts")

    scripted(monkeypatch, [3.0, 2.0, 2.5])
    recipe = make_recipe(
        tmp_path, {"name": "lora"}, max_steps=6, eval_steps=2, save_steps=2, load_best_model_at_end=True
    )
    model = tiny_model()
    result = train(
        model, PadOnly(), recipe, examples(), examples(4), progress=False, processes=Shared(torch.device("cpu"), model)
    )
    assert result.result_dir is not None
    file = "adapter_model.safetensors"
    assert (result.result_dir / file).read_bytes() == (tmp_path / "step-4" / "adapter" / file).read_bytes()
    assert (result.result_dir / "README.md").exists()


def test_the_best_is_remembered_by_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 10, "eval_steps": 2, "load_best_model_at_end": True, "early_stopping_patience": 4}
    scripted(monkeypatch, [3.0, 2.0, 2.5])
    with pytest.raises(Died):  # the best one was saved, though no step asks for it
        run(make_recipe(tmp_path, **settings), examples(4), on_step=dying_at(7))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-2"]
    scripted(monkeypatch, [2.4, 2.3, 2.2])
    result, _ = run(make_recipe(tmp_path, **settings), examples(4), resume=True)
    assert (result.best_step, result.steps) == (4, 10)


@pytest.mark.parametrize(
    ("metric", "values", "last", "best"),
    [("eval_loss", [3.0, 2.0, 2.5, 2.4, 1.0], 8, 4), ("bleu-4", [3.0, 4.0, 4.5, 4.4, 4.5], 10, 6)],
)
def test_a_run_that_gets_no_better_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, values: list[float], last: int, best: int
) -> None:
    scripted(monkeypatch, values, metric)
    monkeypatch.setattr(validation, "METRICS", ("bleu-4",))
    settings = {"metric_for_best_model": metric, "predict_with_generate": True, "early_stopping_patience": 2}
    held_out = HeldOut(examples(4), records=["any"])  # type: ignore[list-item]
    result, _ = run(make_recipe(tmp_path, max_steps=30, eval_steps=2, **settings), held_out)
    assert (result.steps, result.best_step, result.interrupted) == (last, best, False)
    assert result.result_dir is not None


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"need records to measure on[^\n]*\nhint: set data\.eval_file"):
        run(make_recipe(tmp_path, early_stopping_patience=1))
    with pytest.raises(UsageError, match="metric_for_best_model: bleu-4 is not measured"):
        run(make_recipe(tmp_path, load_best_model_at_end=True, metric_for_best_model="bleu-4"), examples(4))

    class Parts(OneProcess):
        whole = False

    model = tiny_model()
    processes = Parts(torch.device("cpu"), model)
    recipe = make_recipe(tmp_path, probe_prompts=["x"])
    with pytest.raises(UsageError, match="holds a part of it"):
        train(model, PadOnly(), recipe, examples(), progress=False, processes=processes)


def test_the_best_by_hand() -> None:
    best = Best("rouge-l")
    assert [best.see(step, {"rouge-l": value}) for step, value in enumerate([1.0, 1.0, 2.0, 0.0])] == [
        True, False, True, False,
    ]  # fmt: skip
    assert (best.step, best.value, best.worse) == (2, 2.0, 1)
    assert not best.see(9, {"eval_loss": 0.0})
    assert best.worse == 1


# --- steps without numbers ---


def test_float16_steps_that_overflow_are_left_out_and_the_scale_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 2^34 overflows float16 gradients; it is halved until they fit, and the weights wait for that."""
    monkeypatch.setattr(precision, "_FIRST_SCALE", 2.0**34)
    settings = {"max_steps": 26, "fp16": True, "lr_scheduler_type": "constant"}
    seen: dict[int, dict[str, torch.Tensor]] = {}
    model = tiny_model()
    first = weights(model)
    whole = train(
        model, PadOnly(), make_recipe(tmp_path / "whole", **settings), examples(), progress=False,
        on_step=lambda step, *_: seen.update({step: weights(model)}),
    )  # fmt: skip
    skipped = [int(line.get("skipped_steps", 0)) for line in whole.metrics]
    lost = sum(skipped)
    assert 8 < lost < 22
    assert skipped == [1] * lost + [0] * (26 - lost)  # once it fits, it fits
    assert whole.metrics[-1]["loss_scale"] == 2.0 ** (34 - lost)
    assert same(seen[lost], first)
    assert not same(seen[lost + 1], first)
    assert all("loss" not in line for line in whole.metrics[:lost])
    assert whole.loss < whole.metrics[lost]["loss"]
    # A run that was cut just behind an overflow goes on with the scale it had.
    cut = make_recipe(tmp_path / "cut", save_steps=5, **settings)
    with pytest.raises(Died):
        run(cut, on_step=dying_at(8))
    resumed, model = run(cut, resume=True)
    assert same(weights(model), seen[26])
    assert untimed(resumed) == untimed(whole)
    for text in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_float16_learns_what_float32_learns(tmp_path: Path) -> None:
    losses = [
        run(make_recipe(tmp_path / name, max_steps=25, **settings))[0].loss
        for name, settings in (("half", {"fp16": True}), ("full", {}), ("brain", {"bf16": True}))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # 11 bits of mantissa
    assert losses[2] == pytest.approx(losses[1], rel=0.05)  # 8 bits


class Broken(ChatGLM2ForCausalLM):
    """Its loss is no number in some calls."""

    calls = 0
    bad: tuple[int, ...] = ()

    def label_loss(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
        self.calls += 1
        loss, count = super().label_loss(*args, **kwargs)
        return (loss * math.nan if self.calls in self.bad else loss), count


def broken_model(*bad: int) -> Broken:
    torch.manual_seed(5)
    model = Broken(ChatGLM2Config(**SIZES))
    model.bad = bad
    return model


def test_a_step_without_numbers_is_left_out_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = broken_model(3)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    recipe = make_recipe(tmp_path, max_steps=6, logging_steps=3, on_nonfinite_loss="skip")
    result = train(
        model, PadOnly(), recipe, examples(), progress=False,
        on_step=lambda step, *_: seen.update({step: weights(model)}),
    )  # fmt: skip
    assert result.steps == 6
    assert same(seen[3], seen[2])
    assert not same(seen[4], seen[3])
    assert [line.get("skipped_steps") for line in result.metrics] == [1, None]
    assert all(math.isfinite(value) for line in result.metrics for value in line.values())
    said = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "step 3: the loss is nan" in said
    assert "left out. Records: row " in said
    assert "step 3: the loss is nan" in capsys.readouterr().err


def test_steps_without_numbers_one_after_the_other_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper, "_MOST_SKIPPED", 3)
    recipe = make_recipe(tmp_path, max_steps=12, on_nonfinite_loss="skip")
    with pytest.raises(TrainingError, match="step 8: the loss is nan"):
        train(broken_model(2, 3, 5, 6, 7, 8), PadOnly(), recipe, examples(), progress=False)


# --- figures ---


def test_operations_of_a_step_by_hand() -> None:
    model = tiny_model()
    config = model.config
    width, mlp = config.hidden_size, config.ffn_hidden_size
    heads = config.num_attention_heads * config.kv_channels
    groups = 2 * config.multi_query_group_num * config.kv_channels
    block = width * (heads + groups) + heads * width + width * 2 * mlp + mlp * width
    head = width * config.padded_vocab_size
    make_method(make_recipe(Path("x")).method).prepare(model)
    full = Operations.of(model, "full")
    assert (full.per_token, full.per_label) == (6 * block, 6 * head)
    assert full.per_pair == 3 * 4 * config.hidden_size  # one layer
    assert full.of_step(100, 40, 10) == 100 * 6 * block + 40 * 6 * head + 100 * 5 * full.per_pair
    lora = tiny_model()
    make_method(make_recipe(Path("x"), {"name": "lora"}).method).prepare(lora)
    frozen = Operations.of(lora, "lora")
    assert (frozen.per_token, frozen.per_label) == (4 * block, 4 * head)
    deep = tiny_model(num_layers=3)
    make_method(make_recipe(Path("x"), {"name": "freeze", "num_layer_trainable": 1}).method).prepare(deep)
    assert Operations.of(deep, "freeze").per_token == 2 * 2 * block + 6 * block


def test_figures_of_the_machine(tmp_path: Path) -> None:
    result, _ = run(make_recipe(tmp_path, max_steps=6, logging_steps=3))
    assert len(result.metrics) == 2
    for line in result.metrics:
        assert 0 < line["mfu"] < 1
        assert 50e6 < line["peak_memory_bytes"] <= peak_bytes(torch.device("cpu"))
    # Six steps are one pass over 21 records.
    assert sum(line["samples_per_second"] * line["seconds"] for line in result.metrics) == pytest.approx(21)
    tokens = sum(line["tokens_per_second"] * line["seconds"] for line in result.metrics)
    assert tokens == pytest.approx(sum(len(one.input_ids) for one in examples()))
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(tmp_path, max_steps=4, eval_steps=2)
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"report_to": ["tensorboard"]})})
    result, _ = run(recipe, examples(4))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "eval_loss", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name])) for line in result.metrics if name in line]


def test_a_run_begins_with_what_really_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model().to(torch.bfloat16)
    recipe = make_recipe(tmp_path, LORA, max_steps=2, gradient_accumulation_steps=3, bf16=True)
    train(model, PadOnly(), recipe, examples())
    said = capsys.readouterr().err
    learnt = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"{learnt:,} of {sum(p.numel() for p in model.parameters()):,} parameters learn" in said
    for word in ("lora", "bfloat16/float32", "products in bfloat16", "one process", "2 steps of 3 batches of 4"):
        assert word in said
    assert said.splitlines()[0] in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "settings", "warning"),
    [
        ({"name": "ptuning_v2"}, {"learning_rate": 3e-2}, "learning rate of 0.03 is above the 0.02"),
        ({"name": "ptuning_v2", "prefix_projection": True}, {"fp16": True}, "prefix_projection with fp16"),
        ({"name": "full"}, {"learning_rate": 2e-2}, "forget what it knows"),
        ({"name": "ptuning_v2"}, {"learning_rate": 2e-2}, None),
        ({"name": "lora"}, {"learning_rate": 2e-2, "fp16": True}, None),
        ({"name": "full"}, {"learning_rate": 1e-4}, None),
    ],
)
def test_settings_that_are_known_to_go_wrong_are_named(
    method: dict[str, Any], settings: dict[str, Any], warning: str | None
) -> None:
    found = warnings_about(make_recipe(Path("x"), method, **settings))
    assert (warning is None) == (not found)
    assert warning is None or warning in found[0]


def test_signs_in_the_curves_are_told() -> None:
    def lines(losses: list[float], measured: list[float] | None = None) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
        for line, value in zip(found, measured or []):
            line["eval_loss"] = value
        return found

    assert warning_signs(lines([3, 2, 1.5, 1.2, 1, 0.9], [3, 2, 1, 1, 0.9, 0.8])) == []
    assert "has risen since step 2" in warning_signs(lines([3, 2, 1], [3, 1, 1.5]) + lines([1], [1.6]))[0]
    assert "has not fallen (3.000 at first, 2.990 at last)" in warning_signs(lines([3, 3, 3, 3, 2.99, 2.99]))[0]
    assert "2 steps were left out" in warning_signs([{"step": 10, "skipped_steps": 2}])[0]
    assert warning_signs([]) == []


# --- models ---


def test_an_adapter_is_gone_on_from(tmp_path: Path, data: Path, tokenizer: ChatGLMTokenizer) -> None:
    base = tmp_path / "base"
    torch.manual_seed(5)
    ChatGLM2ForCausalLM(ChatGLM2Config(**sizes(tokenizer))).save_pretrained(base)
    tokenizer.save_pretrained(base)

    def tune(name: str, method: dict[str, Any], adapter: Path | None = None, **settings: Any) -> TrainingResult:
        block = {"max_steps": 5, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant", **settings}
        recipe = make_recipe(tmp_path / name, method, **block)
        source = ModelBlock(path=str(base), adapter=None if adapter is None else str(adapter))
        files = recipe.data.model_copy(update={"train_file": str(data), "eval_file": str(data)})
        return finetune(recipe.model_copy(update={"model": source, "data": files}), progress=False)

    for method in ({"name": "lora", "lora_dropout": 0.0}, {"name": "ptuning_v2", "pre_seq_len": 4}):
        name = str(method["name"])
        first = tune(f"{name}-first", method)
        second = tune(f"{name}-second", method, first.result_dir, max_steps=1, learning_rate=1e-12)
        assert first.eval_loss is not None
        assert second.eval_loss == pytest.approx(first.eval_loss, rel=1e-5)
        assert first.metrics[0]["loss"] > first.eval_loss + 0.01
        with pytest.raises(UsageError, match="goes on with an adapter"):
            tune(f"{name}-third", {"name": "full"}, first.result_dir)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("chatglm", ChatGLMForCausalLM), ("chatglm2", ChatGLM2ForCausalLM), ("glm", GLMForConditionalGeneration)],
)
def test_a_new_model_of_any_family_is_made_from_sizes(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, family: str, kind: type
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if family == "chatglm":
        train_ice_text(folder / "ice_text.model")
        init = {"num_layers": 2, "vocab_size": 160, "hidden_size": 32, "inner_hidden_size": 64}
        init |= {"num_attention_heads": 4, "max_sequence_length": 64, "mask_token_id": 130, "gmask_token_id": 131}
        init |= {"bos_token_id": 134, "eos_token_id": 135}
    elif family == "glm":
        own = glm_tokenizer(folder)
        init = {"model_type": "glm", "num_layers": 2, "vocab_size": own.vocab_size + 5, "hidden_size": 32}
        init |= {"num_attention_heads": 4, "max_sequence_length": 64, "output_predict": True}
    else:
        tokenizer.save_pretrained(folder)
        init = sizes(tokenizer)
    block = ModelBlock(init=init, tokenizer=str(folder))
    model, found = load_model(block, seed=3)
    again, _ = load_model(block, seed=3)
    assert type(model) is kind
    assert same(weights(model), weights(again))
    assert found.generation == {"chatglm": 1, "chatglm2": 3, "glm": 0}[family]
    assert model.config.hidden_size == 32
