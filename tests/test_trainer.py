"""The Trainer that MindFormers users know: the same loop behind another door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import glmkit
from glmkit.errors import TrainingError, UsageError
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.train.arguments import Recipe, load_recipe
from glmkit.train.run import finetune
from tiny import sizes, train_tokenizer

WORDS = ("棉", "显瘦", "tea", "rice")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Fixtures of a module are made before the one that does this for each test.
        patch.setattr("glmkit.train.reopened.compare_result", lambda *_: "not compared in this test")
        yield


def write_records(path: Path, answer: str) -> Path:
    rows = [{"content": f"上衣 {word}", "summary": answer.format(word)} for word in WORDS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 4), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers every word with the word and "hello world"."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = ChatGLMTokenizer(train_tokenizer(folder / "tokenizer.model"), generation=3)
    tokenizer.save_pretrained(folder / "tokenizer")
    data = write_records(folder / "data.json", "{} hello world")
    content = {
        "model": {"init": sizes(tokenizer), "tokenizer": str(folder / "tokenizer")},
        "data": {"train_file": str(data)},
        "train": {"max_steps": 120, "learning_rate": 1e-2, "tokens_per_batch": 512, "save_steps": 0},
        "output": {"dir": str(folder / "run")},
    }
    result = finetune(Recipe.model_validate(content), progress=False)
    assert result.result_dir is not None
    return result.result_dir


LORA = {
    "learning_rate": 2e-2,
    "batch_size": 16,
    "max_steps": 60,
    "lora_dropout": 0.0,
    "target_modules": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h", "dense"],
}


def test_what_mindformers_users_write(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("jieba")
    data = write_records(tmp_path / "train.json", "{} world hello")
    trainer = glmkit.Trainer(
        task="text_generation",
        model=str(base),
        train_dataset=str(data),
        eval_dataset=str(data),
        pet_method="lora",
        output_dir=str(tmp_path / "run"),
        args=LORA,
    )
    assert trainer.predict(input_data="上衣 tea", do_sample=False) == [{"text_generation_text": ["tea hello world"]}]
    before = trainer.evaluate()
    result = trainer.finetune(progress=False)
    assert (result.steps, result.result_dir) == (60, tmp_path / "run" / "adapter")
    assert result.eval_loss is not None
    assert result.eval_loss < 0.1
    after = trainer.evaluate()
    assert before["predict_bleu-4"] < 90 < 99 < after["predict_bleu-4"]
    assert after["predict_samples"] == 16
    asked = trainer.predict(input_data=["上衣 tea", "上衣 棉"], top_k=1)
    assert asked == [{"text_generation_text": ["tea world hello"]}, {"text_generation_text": ["棉 world hello"]}]
    # The base is asked again on purpose, and the adapter through another door.
    assert trainer.predict(input_data="上衣 tea", predict_checkpoint=base, do_sample=False) == [
        {"text_generation_text": ["tea hello world"]}
    ]
    other = glmkit.Trainer(model=base)
    assert other.predict("上衣 tea", predict_checkpoint=result.result_dir, do_sample=False) == asked[:1]
    with pytest.raises(TrainingError, match="already holds a run"):
        trainer.train(progress=False)


def test_the_loop_is_the_one_of_the_recipes(base: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "train.json", "{} world hello")
    settings: dict[str, Any] = {"learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 3}
    loaded = glmkit.load(base)
    trainer = glmkit.Trainer(
        model=loaded, train_dataset=data, args=settings, output_dir=str(tmp_path / "a"), logging_steps=1
    )
    ours = trainer.train(progress=False)
    changes = [f"path={base}", f"train_file={data}", f"dir={tmp_path / 'b'}", "logging_steps=1"]
    theirs = finetune(load_recipe(None, changes + [f"{k}={v}" for k, v in settings.items()]), progress=False)
    assert [line["loss"] for line in ours.metrics] == [line["loss"] for line in theirs.metrics]
    assert trainer.train(resume=True, progress=False).steps == 4


def test_settings_in_every_form_give_the_same_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {path: m}\ndata: {train_file: d}\ntrain: {lr: 0.5}\noutput: {dir: o}\n")
    common: dict[str, Any] = {"model": "m", "train_dataset": "d"}
    recipes = [
        glmkit.Trainer(args=str(file)).recipe,
        glmkit.Trainer(args=load_recipe(file)).recipe,
        glmkit.Trainer(**common, args={"train": {"learning_rate": 0.5}, "output": {"dir": "o"}}).recipe,
        glmkit.Trainer(**common, args={"lr": 0.5, "output_dir": "o"}).recipe,
        glmkit.Trainer(**common, learning_rate=0.5, output_dir="o").recipe,
        glmkit.Trainer(args={"model_name_or_path": "m", "train_file": "d", "output_dir": "o"}, lr=0.5).recipe,
    ]
    assert [recipe.model_dump() for recipe in recipes] == [recipes[0].model_dump()] * 6
    assert recipes[0].train.learning_rate == 0.5


def test_names_of_mindformers_choose_model_and_method() -> None:
    recipe = glmkit.Trainer(task="text-generation", model="glm2_6b_lora", train_dataset="d").recipe
    assert (recipe.model.path, recipe.method.name, recipe.output.dir) == ("glm2_6b", "lora", "output/glm2_6b")
    recipe = glmkit.Trainer(model_name="glm3_6b", pet_method="ptuning2", pre_seq_len=8).recipe
    assert (recipe.model.path, recipe.method.name, recipe.method.pre_seq_len) == ("glm3_6b", "ptuning_v2", 8)
    assert glmkit.Trainer(model="glm2_6b").recipe.method.name == "full"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "image_classification"}, "there is no task 'image_classification'"),
        ({"pet_method": "lroa"}, "there is no pet_method 'lroa'"),
        ({"learning_rat": 1}, "no key 'learning_rat'; did you mean 'train.learning_rate'?"),
        ({"args": {"train": {"lora_rank": 1}}}, "did you mean 'method.lora_rank'?"),
        ({"learning_rate": "much"}, "train.learning_rate: Input should be a valid number"),
    ],
)
def test_mistakes_are_answered(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        glmkit.Trainer(model="m", **arguments)
    assert message in str(caught.value)


def test_what_is_missing_is_named(base: Path) -> None:
    trainer = glmkit.Trainer(model=base)
    with pytest.raises(UsageError, match="nothing to learn from"):
        trainer.train()
    with pytest.raises(UsageError, match="nothing to measure on"):
        trainer.evaluate()
    with pytest.raises(UsageError, match="settings are given to Trainer"):
        trainer.train(learning_rate=1)


def test_what_cannot_fit_is_refused_before_the_weights_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmkit.train.fitting.free_bytes", lambda _: 1_000_000)
    monkeypatch.setattr("glmkit.train.run.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    data = write_records(tmp_path / "train.json", "{} world hello")
    changes = [f"path={base}", f"train_file={data}", f"dir={tmp_path / 'run'}"]
    with pytest.raises(TrainingError, match=r"of memory on each device, 0\.0 GB are free"):
        finetune(load_recipe(None, changes), progress=False)
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ended["ended"] == "failed"
    with pytest.raises(pytest.fail.Exception, match="the weights were read"):
        finetune(load_recipe(None, [*changes[:2], f"dir={tmp_path / 'forced'}"]), progress=False, force=True)
