"""The recipes of the package: the settings are those of their sources, the heads say what they need, each one runs."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny_families
from glmkit import cli, verbs
from glmkit.data.cloze_patterns import TASKS as CLOZE_TASKS
from glmkit.data.seq2seq import TASKS as SEQ2SEQ_TASKS
from glmkit.errors import DataError
from glmkit.families import find_family
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.glm import GLMBertTokenizer
from glmkit.train.arguments import VERBS, EvaluationRecipe, Recipe, load_recipe, recipe_names
from glmkit.train.evaluation import evaluate
from glmkit.train.packaged import head_of, packaged_file, packaged_names, recipe_text
from glmkit.train.run import finetune
from glmkit.train.zero_config import read_config, stage_of
from glmkit.verbs.app import _FLAG_SYNONYMS
from tiny import sizes, train_tokenizer, write_model

TUNING = recipe_names()
EVALUATING = recipe_names(EvaluationRecipe)
VERB_OF = {name: verb for kind, verb in VERBS.items() for name in recipe_names(kind)}
ADGEN = [name for name in TUNING if name.startswith("adgen_")]

# --- what the sources say ---

OFFICIAL_SCRIPT = {"train.lr_scheduler_type": "linear", "train.weight_decay": 0.0, "train.max_grad_norm": 1.0,
                   "train.adam_beta2": 0.999, "train.warmup_ratio": 0.0}  # fmt: skip
MINDFORMERS = {"train.learning_rate": 5e-5, "train.lr_min_ratio": 0.02, "train.adam_beta2": 0.95, "train.seed": 0,
               "train.weight_decay": 0.1, "train.lr_scheduler_type": "linear", "train.num_train_epochs": 1,
               "train.max_steps": -1}  # fmt: skip
LORA_8 = {"method.name": "lora", "method.lora_rank": 8, "method.lora_alpha": 32, "method.lora_dropout": 0.1,
          "method.target_modules": ["query_key_value"]}  # fmt: skip
STEP_16 = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 16}
CHATGLM3 = OFFICIAL_SCRIPT | {
    "model.path": "chatglm3-6b", "data.max_length": 769, "data.num_proc": 16,
    "train.max_steps": 3000, "train.learning_rate": 5e-5, "train.per_device_train_batch_size": 4,
    "train.per_device_eval_batch_size": 16, "train.eval_steps": 500, "train.save_steps": 500,
    "train.logging_steps": 10, "train.predict_with_generate": True, "train.max_predict_samples": 50,
}  # fmt: skip
TOOLS = OFFICIAL_SCRIPT | STEP_16 | {
    "model.path": "chatglm3-6b", "data.max_length": 2048, "train.max_steps": 1000, "train.logging_steps": 1,
    "train.save_steps": 500,
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "adgen_full": OFFICIAL_SCRIPT | {
        "model.path": "chatglm2-6b", "method.name": "full", "train.learning_rate": 1e-4, "train.max_steps": 5000,
        "train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 1, "train.fp16": True,
        "train.logging_steps": 10, "train.save_steps": 1000, "distributed.deepspeed": "deepspeed_zero2.json",
    },
    "adgen_full_2k": MINDFORMERS | {
        "model.path": "chatglm2-6b", "method.name": "full", "data.max_length": 2048, "data.packing": True,
        "train.per_device_train_batch_size": 2, "train.save_steps": 1000, "train.save_total_limit": 1,
        "train.gradient_checkpointing": True, "distributed.deepspeed": "deepspeed_zero2.json",
    },
    "adgen_lora": MINDFORMERS | LORA_8 | {
        "model.path": "chatglm2-6b", "train.per_device_train_batch_size": 8, "train.save_steps": 500,
        "train.save_total_limit": 2,
    },
    "adgen_lora_2k": MINDFORMERS | LORA_8 | {
        "model.path": "chatglm2-6b", "data.max_length": 2048, "data.packing": True,
        "train.per_device_train_batch_size": 4, "train.save_steps": 1000, "train.save_total_limit": 1,
    },
    "adgen_ptuning": OFFICIAL_SCRIPT | STEP_16 | {
        "model.path": "chatglm2-6b", "model.quantize": "official-int4", "method.name": "ptuning_v2",
        "method.pre_seq_len": 128, "method.prefix_projection": False, "train.learning_rate": 2e-2,
        "train.max_steps": 3000, "train.logging_steps": 10, "train.save_steps": 1000,
    },
    "adgen_ptuning_8": OFFICIAL_SCRIPT | STEP_16 | {
        "model.path": "chatglm-6b", "model.quantize": None, "method.name": "ptuning_v2", "method.pre_seq_len": 8,
        "train.learning_rate": 1e-2, "train.fp16": True, "train.max_steps": 3000, "train.logging_steps": 10,
        "train.save_steps": 1000, "train.save_total_limit": 3,
    },
    "adgen_freeze": {
        "method.name": "freeze", "method.num_layer_trainable": 3, "train.learning_rate": 5e-5,
        "train.lr_scheduler_type": "cosine", "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 4, "train.num_train_epochs": 3,
    },
    "alpaca_lora": OFFICIAL_SCRIPT | LORA_8 | {
        "model.path": "chatglm-6b", "model.quantize": "official-int8", "data.max_length": 200,
        "data.skip_overlength": True, "train.per_device_train_batch_size": 6, "train.gradient_accumulation_steps": 1,
        "train.max_steps": 52000, "train.save_steps": 1000, "train.save_total_limit": 2, "train.learning_rate": 1e-4,
        "train.fp16": True, "train.logging_steps": 50, "train.gradient_checkpointing": True,
        "output.report_to": ["tensorboard"],
    },
    "chat_ptuning": OFFICIAL_SCRIPT | STEP_16 | {
        "model.path": "chatglm-6b", "model.quantize": "official-int4", "data.prompt_column": "prompt",
        "data.response_column": "response", "data.history_column": "history", "data.max_source_length": 256,
        "data.max_target_length": 256, "method.name": "ptuning_v2", "method.pre_seq_len": 128,
        "train.learning_rate": 1e-2, "train.max_steps": 3000, "train.save_steps": 1000,
    },
    "toolalpaca_ptuning": TOOLS | {
        "method.name": "ptuning_v2", "method.pre_seq_len": 128, "train.learning_rate": 2e-2,
    },
    "toolalpaca_lora": TOOLS | LORA_8 | {"train.learning_rate": 5e-5},
    "chatglm3_lora": CHATGLM3 | LORA_8,
    "chatglm3_ptuning": CHATGLM3 | {"method.name": "ptuning_v2", "method.pre_seq_len": 128},
    "chatglm3_full": CHATGLM3 | {"method.name": "full", "distributed.deepspeed": "deepspeed_zero3.json"},
    "glm_cloze": {
        "data.format": "cloze", "data.task": "rte", "data.pattern_id": 0, "data.max_length": 256,
        "method.name": "full", "train.learning_rate": 1e-5, "train.lr_scheduler_type": "linear",
        "train.warmup_ratio": 0.1, "train.weight_decay": 0.1, "train.num_train_epochs": 50,
        "train.per_device_train_batch_size": 16, "train.fp16": True, "train.logging_steps": 50,
    },
    "glm_seq2seq": {
        "data.format": "seq2seq", "data.task": "customization", "data.max_source_length": 512,
        "data.max_target_length": 128, "train.learning_rate": 1e-5, "train.lr_scheduler_type": "linear",
        "train.warmup_ratio": 0.06, "train.weight_decay": 0.01, "train.num_train_epochs": 10, "train.fp16": True,
        "train.eval_steps": 1000, "train.logging_steps": 50,
    },
}  # fmt: skip

MINDFORMERS_EVAL = {
    "model.dtype": "float16", "data.max_source_length": 256, "evaluate.task": "adgen",
    "evaluate.per_device_eval_batch_size": 32, "evaluate.max_target_length": 256, "evaluate.temperature": 0,
}  # fmt: skip
EVALUATION_SOURCES: dict[str, dict[str, Any]] = {
    "adgen_full_eval": MINDFORMERS_EVAL | {"model.path": "output/adgen_full/model", "model.adapter": None},
    "adgen_lora_eval": MINDFORMERS_EVAL | {
        "model.path": "chatglm2-6b", "model.adapter": "output/adgen_lora/adapter",
    },
    "adgen_ptuning_eval": {
        "model.path": "chatglm2-6b", "model.quantize": "official-int4",
        "model.adapter": "output/adgen_ptuning/adapter", "data.max_source_length": 64, "evaluate.task": "adgen",
        "evaluate.per_device_eval_batch_size": 32, "evaluate.max_target_length": 64, "evaluate.temperature": 0.95,
        "evaluate.top_p": 0.7, "evaluate.preset": "paper",
    },
    "tools_eval": {
        "model.path": "chatglm3-6b", "model.adapter": "output/toolalpaca_lora/adapter", "evaluate.task": "tools",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATING)
def test_an_evaluation_is_that_of_its_source(name: str) -> None:
    recipe = load_recipe(name, kind=EvaluationRecipe).model_dump()
    wanted = EVALUATION_SOURCES[name]
    assert {key: recipe[key.partition(".")[0]][key.partition(".")[2]] for key in wanted} == wanted
    # What a recipe measures is what another one leaves behind, and each has a folder of its own.
    folders = {load_recipe(one).output.dir for one in TUNING}
    measured = recipe["model"]["adapter"] or recipe["model"]["path"]
    assert str(Path(measured).parent) in folders
    assert recipe["evaluate"]["output_dir"] == f"output/{name}"


@pytest.mark.parametrize("name", SOURCES)
def test_settings_are_those_of_the_source(name: str) -> None:
    recipe = load_recipe(name).model_dump()
    found = {key: recipe[key.partition(".")[0]][key.partition(".")[2]] for key in SOURCES[name]}
    assert found == SOURCES[name]


def test_every_recipe_with_a_source_is_compared_with_it() -> None:
    assert set(SOURCES) == set(TUNING) - {"nano", "nano_mixed", "nano_protocol", "nano_balance", "quickstart"}
    assert set(EVALUATION_SOURCES) == set(EVALUATING)


def test_the_lengths_of_tasks_are_the_published_ones() -> None:
    recipe = load_recipe("glm_seq2seq")
    task = SEQ2SEQ_TASKS["customization"]
    assert (recipe.data.max_source_length, recipe.data.max_target_length) == (task.source_tokens, task.target_tokens)
    assert (recipe.train.num_train_epochs, recipe.train.learning_rate) == (task.epochs, task.learning_rate)
    assert (recipe.train.warmup_ratio, recipe.train.weight_decay) == (task.warmup, task.weight_decay)
    assert "rte" in CLOZE_TASKS


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configurations_of_deepspeed_fit(stage: int) -> None:
    file = packaged_file(f"deepspeed_zero{stage}.json")
    assert file is not None
    for name in TUNING:
        recipe = load_recipe(name)
        config = read_config(file, recipe, 8)
        assert stage_of(config) == stage
        rows = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * 8
        assert recipe.train.tokens_per_batch or config["train_batch_size"] == rows
    official = json.loads(file.read_text())
    assert official["zero_optimization"]["allgather_bucket_size"] == 5e8


# --- heads ---


@pytest.mark.parametrize("name", VERB_OF)
def test_a_head_says_what_a_recipe_needs(name: str) -> None:
    head = head_of(recipe_text(name))
    assert head.title
    assert {"hardware", "memory", "time", "source", "command"} <= set(head.facts)
    assert re.search(r"\d", head.facts["memory"])
    assert re.search(r"\d (GB|MiB)", head.facts["memory"])
    assert not [line for line in recipe_text(name).splitlines() if len(line) > 140]


@pytest.mark.parametrize("name", VERB_OF)
def test_the_command_of_a_head_is_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last one runs this recipe, and its changes are settings."""
    command = shlex.split(head_of(recipe_text(name)).facts["command"].splitlines()[-1])
    if command == ["nano/make.sh"]:
        return
    if command[0] == "torchrun":
        assert command[3:5] == ["-m", "glmkit"]
        assert command[2] == ("4" if name == "chatglm3_full" else "8")
        command = ["glm", *command[5:]]
    assert command[:3] == ["glm", VERB_OF[name], name]
    assert cli.run([*command[1:], "--dry-run"]) == 0
    assert ("max_target_length" if name in EVALUATING else "learning_rate") in capsys.readouterr().out


@pytest.mark.parametrize("name", ADGEN)
def test_the_official_cutting_of_adgen_is_a_change_away(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.data.preset == "whole"
    if recipe.data.packing:
        return
    # With template the longest of 1,070 questions has 115 tokens and the longest answer 175: nothing is cut.
    assert (recipe.data.max_source_length, recipe.data.max_target_length) == (128, 256)
    changes = re.findall(r"data\.\w+=\w+", recipe_text(name))
    if name != "adgen_freeze":
        assert load_recipe(name, changes).data.preset == "paper"
        assert load_recipe(name, changes).data.max_source_length == 64


def test_models_of_recipes_are_known() -> None:
    for name in TUNING:
        path = load_recipe(name).model.path
        assert path in (None, "glm-nano") or path.startswith("build/nano/") or find_family(path), name


# --- glm recipe ---


def test_all_recipes_pass_a_dry_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, Any] = dict.fromkeys(TUNING, Recipe) | dict.fromkeys(EVALUATING, EvaluationRecipe)
    for name, kind in kinds.items():
        started = time.monotonic()
        assert cli.run([VERB_OF[name], name, "--dry-run"]) == 0
        assert time.monotonic() - started < 5, name
        printed = yaml.safe_load(capsys.readouterr().out)
        assert kind.model_validate(printed).model_dump() == load_recipe(name, kind=kind).model_dump()


def test_flags_and_a_recipe_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "m", "--adapter", "a #1", "--dtype", "float32", "--device", "cpu", "-q", "official-int8"]
    flags += ["--family", "chatglm2-6b", "--data", "d.json", "--limit", "3", "--batch-size", "2", "--max-tokens", "9"]
    flags += ["--temperature", "0.5", "--top-p", "0.8", "--seed", "7", "-o", "out", "--dry-run"]
    assert cli.run(["evaluate", "tools", *flags]) == 0
    alone = yaml.safe_load(capsys.readouterr().out)
    assert alone["model"] == {
        "path": "m", "init": None, "tokenizer": None, "dtype": "float32", "device": "cpu", "family": "chatglm2-6b",
        "quantize": "official-int8", "adapter": "a #1",
    }  # fmt: skip
    assert (alone["data"]["file"], alone["data"]["max_samples"]) == ("d.json", 3)
    rest = {
        "preset": None, "method": None, "shots": None, "subjects": [], "window": None, "stride": None, "extra": {},
    }  # fmt: skip
    assert alone["evaluate"] == rest | {
        "task": "tools", "per_device_eval_batch_size": 2, "max_target_length": 9, "temperature": 0.5, "top_p": 0.8,
        "seed": 7, "output_dir": "out",
    }  # fmt: skip
    assert cli.run(["evaluate", "tools_eval", *flags]) == 0  # flags change a recipe, too
    assert yaml.safe_load(capsys.readouterr().out) == alone
    assert cli.run(["evaluate", "adgen", "--data", "d.json", "--max_source_length", "64", "--dry-run"]) == 0
    default = yaml.safe_load(capsys.readouterr().out)
    assert (default["model"]["path"], default["data"]["max_source_length"]) == ("glm-nano", 64)
    assert default["evaluate"] == rest | {
        "task": "adgen", "per_device_eval_batch_size": 32, "max_target_length": None, "temperature": 0.0, "top_p": 1.0,
        "seed": None, "output_dir": None,
    }  # fmt: skip
    assert cli.run(["evaluate", "ceval", "--data", "folder", "--shots", "5", "--subjects", "[law]", "--dry-run"]) == 0
    chosen = yaml.safe_load(capsys.readouterr().out)["evaluate"]
    assert (chosen["task"], chosen["shots"], chosen["subjects"]) == ("ceval", 5, ["law"])


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["evaluate", "adgen_lora"], "adgen_lora is not for this verb", "glm finetune adgen_lora"),
        (["evaluate", "glm_pretrain_small"], "is not for this verb", "glm pretrain glm_pretrain_small"),
        (["finetune", "tools_eval"], "tools_eval is not for this verb", "glm evaluate tools_eval"),
        (["evaluate", "adgen_lora_evla"], "no recipe of that name", "did you mean glm evaluate adgen_lora_eval?"),
        (["evaluate"], "missing argument 'TASK'", "cloze, or a recipe"),
        (["evaluate", "tools"], "--data is missing: dialogues with tools", "glm evaluate tools --data PATH"),
        (["evaluate", "tools_eval", "evaluate.task=sums"], "there is no task 'sums'", ""),
        (["evaluate", "tools_eval", "data.file=null"], "data.file is missing: dialogues with tools", ""),
        (["evaluate", "tuning.yaml"], "tuning.yaml has no block 'evaluate'", "glm finetune tuning.yaml"),
        (["finetune", "eval.yaml"], "eval.yaml has a block 'evaluate'", "glm evaluate eval.yaml"),
        (["evaluate", "tools_eval", "data.max_source_length=64"], "tools_eval: data.max_source_length is for", ""),
        (["evaluate", "tools_eval", "model.tokenizer=t"], "an existing model is measured: give model.path", ""),
        (["evaluate", "tools_eval", "max_token=3"], "no key 'max_token'", "did you mean"),
    ],
)
def test_mistakes_with_evaluations(
    words: list[str],
    error: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tuning.yaml").write_text(recipe_text("adgen_lora"))
    Path("eval.yaml").write_text(recipe_text("tools_eval"))
    assert cli.run([*words, "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert error in printed
    assert hint in printed


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["recipe", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == packaged_names()
    assert {"deepspeed_zero2", "deepspeed_zero3", "glm_pretrain_small", *TUNING, *EVALUATION_SOURCES} <= set(listed)
    assert cli.run(["recipe", "list", "--long"]) == 0
    assert "memory: 7 GB in all" in capsys.readouterr().out
    assert cli.run(["recipe", "list", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["recipes"]
    assert next(one for one in described if one["name"] == "alpaca_lora")["command"].startswith("glm finetune")
    assert cli.run(["recipe", "show", "adgen_lora"]) == 0
    assert capsys.readouterr().out == recipe_text("adgen_lora")
    assert cli.run(["recipe", "copy", "adgen_lora"]) == 0
    assert capsys.readouterr().out == "adgen_lora.yaml\n"
    assert load_recipe("adgen_lora.yaml").model_dump() == load_recipe("adgen_lora").model_dump()
    assert cli.run(["recipe", "copy", "deepspeed_zero2", "own/ds.json"]) == 0
    assert json.loads(Path("own/ds.json").read_text())["zero_optimization"]["stage"] == 2
    capsys.readouterr()
    assert cli.run(["recipe", "copy", "adgen_lora"]) != 0
    assert "adgen_lora.yaml exists already" in capsys.readouterr().err
    assert cli.run(["recipe", "show", "adgen_lroa"]) != 0
    assert "did you mean adgen_lora?" in capsys.readouterr().err


def test_a_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipe", "explain", "num_virtual_tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "method.pre_seq_len  N",
        "  Columns of a P-Tuning prefix.",
        "  default: 128",
        "  limits: at least 1",
        "  also called: num_virtual_tokens",
    ]
    assert {"adgen_ptuning_8": "8", "adgen_ptuning": "128"}.items() <= dict(line.split() for line in lines[6:]).items()
    assert cli.run(["recipe", "explain", "train.lr_min_ratio"]) == 0
    assert "  limits: at least 0, at most 1\n" in capsys.readouterr().out
    assert cli.run(["recipe", "explain", "path"]) == 0  # of both kinds of recipes
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("model.path")] == [
        "model.path  TEXT"
    ] * 2
    assert cli.run(["recipe", "explain", "evaluate.max_new_tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluate.max_target_length  N"
    assert lines[-1].split() == ["tools_eval", "256"]
    assert cli.run(["recipe", "explain", "learning_rat"]) != 0
    assert "did you mean 'train.learning_rate'?" in capsys.readouterr().err


# --- each of them runs ---

TURNS = [
    {"role": "user", "content": "上衣 棉 tea"},
    {"role": "assistant", "content": "1 + 2"},
    {"role": "tool", "name": "add", "parameters": {"a": 1}, "observation": "3"},
    {"role": "assistant", "content": "rice"},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "adgen": [{"content": f"上衣 棉 {number}", "summary": f"hello {number} world"} for number in range(8)],
    "alpaca": [{"instruction": "1 + 2", "input": "tea" * (number % 2), "output": "3"} for number in range(8)],
    "columns": [{"prompt": "tea", "response": "rice", "history": [["hello", "world"]] * (n % 2)} for n in range(8)],
    "toolalpaca": [{"tools": [{"name": "add"}], "conversations": TURNS}] * 8,
    "auto": [{"conversations": [TURNS[0], TURNS[-1]]} for _ in range(8)],
    "cloze": [{"premise": "i like tea", "hypothesis": "i like rice", "label": "entailment"}] * 8,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model for every family that recipes name."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = train_tokenizer(folder / "tokenizer.model")
    for generation in (2, 3):
        write_model(folder / f"chatglm{generation}-6b", vocabulary, generation=generation, num_layers=4)
    ChatGLMTokenizer(vocabulary, generation=3).save_pretrained(folder / "tokenizer")
    tiny_families.write_chatglm(folder / "chatglm-6b")
    names = {name: folder / name for name in ("chatglm2-6b", "chatglm3-6b", "chatglm-6b", "tokenizer")}
    return names | dict.fromkeys(("glm-roberta-large", "glm-large-chinese"), _write_glm(folder / "glm"))


def _write_glm(folder: Path) -> Path:
    folder.mkdir()
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] i like tea and rice yes no , . ? "'.split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = GLMBertTokenizer(folder / "vocab.txt")
    torch.manual_seed(0)
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 64}
    ids = {"sop_token_id": tokenizer.sop_token_id, "mask_token_ids": tokenizer.mask_token_ids}
    config = GLMConfig(**shape, **ids, vocab_size=tokenizer.vocab_size + 8, output_predict=True)
    GLMForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(name: str, models: dict[str, Path], folder: Path) -> list[str]:
    """The changes that make a recipe fit for a small model, and nothing else."""
    recipe = load_recipe(name)
    form = recipe.data.format
    if form == "seq2seq":
        file = folder / "train.source"
        file.write_text("i like tea and rice\n" * 8)
        (folder / "train.target").write_text("tea and rice\n" * 8)
    else:
        file = folder / "train.jsonl"
        rows = ROWS.get(name.partition("_")[0], ROWS.get(form, []))
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    changes = [f"data.train_file={file}", f"output.dir={folder / 'run'}", "train.max_steps=2", "data.num_proc=1"]
    changes += ["train.logging_steps=1", f"data.cache_dir={folder / 'cache'}", "distributed.deepspeed=null"]
    changes += ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2", "train.warmup_ratio=0"]
    if recipe.data.eval_file:
        changes += [f"data.eval_file={file}", "train.max_predict_samples=2"]
    if recipe.data.max_source_length:
        changes += ["data.max_source_length=48", "data.max_target_length=12"]
    if recipe.train.tokens_per_batch:
        changes += ["train.tokens_per_batch=64"]
    changes += [f"data.max_length={min(recipe.data.max_length, 160)}"]
    if recipe.method.name == "ptuning_v2":
        changes += [f"method.pre_seq_len={min(recipe.method.pre_seq_len, 8)}"]
    if recipe.model.init is not None:
        vocabulary = ChatGLMTokenizer.from_pretrained(models["tokenizer"])
        return [*changes, f"model.init={sizes(vocabulary)}", f"model.tokenizer={models['tokenizer']}"]
    path = "chatglm3-6b" if str(recipe.model.path).startswith("build/nano/") else str(recipe.model.path)
    return [*changes, f"model.path={models.get(path, path)}"]


@pytest.mark.parametrize("name", TUNING)
def test_a_recipe_runs_from_end_to_end(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(name)
    if recipe.method.name == "lora":
        pytest.importorskip("peft")
    if recipe.train.predict_with_generate:
        pytest.importorskip("jieba")
    if recipe.output.report_to:
        pytest.importorskip("tensorboard")
    result = finetune(name, small(name, models, tmp_path), progress=False)
    assert result.steps == 2
    losses = [line["loss"] for line in result.metrics]
    assert len(losses) == 2
    assert all(0 < loss < 30 for loss in losses)
    assert result.result_dir == tmp_path / "run" / ("model" if recipe.method.name in ("full", "freeze") else "adapter")
    assert [*result.result_dir.glob("*.safetensors"), *result.result_dir.glob("pytorch_model.bin")]
    assert (recipe.data.eval_file is None) == (result.eval_loss is None)


def small_evaluation(name: str, models: dict[str, Path], folder: Path) -> list[str]:
    """The changes that make an evaluation fit for a small model, which nobody has tuned."""
    recipe = load_recipe(name, kind=EvaluationRecipe)
    file = folder / "dev.jsonl"
    rows = ROWS["toolalpaca" if recipe.evaluate.task == "tools" else "adgen"][:3]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    path = models.get(str(recipe.model.path), models["chatglm2-6b"])
    changes = [f"data.file={file}", f"model.path={path}", "model.dtype=float32", "model.adapter=null"]
    return [*changes, "evaluate.max_target_length=4", f"evaluate.output_dir={folder / 'results'}"]


@pytest.mark.parametrize("name", EVALUATING)
def test_an_evaluation_runs_from_end_to_end(
    name: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "tools_eval":
        pytest.importorskip("jieba")
    changes = small_evaluation(name, models, tmp_path)
    assert cli.run(["evaluate", name, *changes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["output"]) == (1, str(tmp_path / "results"))
    again = evaluate(name, [*changes[:-1], f"output_dir={tmp_path / 'again'}"])
    timeless = {key: value for key, value in again.results.items() if "runtime" not in key and "second" not in key}
    assert timeless.items() <= found["results"].items()
    if name == "tools_eval":
        assert found["results"]["call_turns"] == 3
        assert json.loads((tmp_path / "results" / "tool_call_results.json").read_text()) == found["results"]
    else:
        assert found["results"]["predict_samples"] == 3
        lines = (tmp_path / "results" / "generated_predictions.txt").read_text(encoding="utf-8")
        assert lines == (tmp_path / "again" / "generated_predictions.txt").read_text(encoding="utf-8")


def test_a_tuned_adapter_is_measured_from_end_to_end(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("jieba")
    tuned = finetune("adgen_lora", [*small("adgen_lora", models, tmp_path), "train.learning_rate=0.5"], progress=False)
    changes = small_evaluation("adgen_lora_eval", models, tmp_path)
    answers = []
    for adapter in ("null", str(tuned.result_dir)):
        folder = tmp_path / Path(adapter).name
        found = evaluate("adgen_lora_eval", [*changes, f"model.adapter={adapter}", f"output_dir={folder}"])
        assert found.output_dir == folder
        answers.append((folder / "generated_predictions.txt").read_text(encoding="utf-8"))
    assert answers[0] != answers[1]
    # Longer questions are shortened in their text, and one is told how many.
    long = tmp_path / "long.jsonl"
    rows = [{"content": text, "summary": "rice"} for text in ("tea" + " rice" * 90, "tea")]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    changes += [f"data.file={long}", "data.max_source_length=40", f"evaluate.output_dir={tmp_path / 'long'}"]
    assert cli.run(["evaluate", "adgen_lora_eval", *changes]) == 0
    assert "prompts shortened to data.max_source_length=40: 1\n" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"the limit is 4\b") as refused:
        evaluate("adgen_lora_eval", [*changes, "data.max_source_length=4"])
    assert refused.value.hint == "raise data.max_source_length, or data.max_source_length=null"


# --- the guides ---

GUIDES = [Path(__file__).parent.parent / "docs" / name for name in ("finetuning.md", "migration.md", "start.md")]


def commands_of(page: Path) -> list[list[str]]:
    """Commands of a page, in blocks and in tables, that name what exists: no place-holders."""
    text = page.read_text(encoding="utf-8")
    found = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    found += re.findall(r"`((?:glm|torchrun) [^`]+)`", text)
    commands = [shlex.split(line, comments=True) for line in found if "…" not in line]
    commands = [["glm", *line[5:]] if line[3:5] == ["-m", "glmkit"] else line for line in commands if line]
    return [line for line in commands if line[0] == "glm" and not {"MODEL", "RECIPE", "KEY", "FOLDER"} & set(line)]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_tuning_commands_of_the_guides_are_checked_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for line in commands_of(page):
        if line[1:2] == ["finetune"] and len(line) > 2 and line[2] in TUNING:
            kept = [word for word in line[1:] if word != "--resume"]
            if "--preview" in kept:
                del kept[kept.index("--preview") : kept.index("--preview") + 2]
            kept += [] if "--dry-run" in kept else ["--dry-run"]
            assert cli.run(kept) == 0, (line, capsys.readouterr().err)
            seen += 1
        elif line[1:2] == ["evaluate"] and len(line) > 2:
            assert cli.run([*line[1:], "--dry-run"]) == 0, (line, capsys.readouterr().err)
    assert seen > (4 if page.stem == "start" else 10)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_other_commands_of_the_guides_have_verbs_and_flags_that_exist(page: Path) -> None:
    seen = 0
    whole: Any = verbs.command()
    for line in commands_of(page):
        command, words = whole, line[1:]
        while hasattr(command, "commands") and words:
            assert words[0] in command.commands, line
            command, words = command.commands[words[0]], words[1:]
        if command.name in ("finetune", "pretrain", "evaluate"):  # every setting is a flag
            continue
        flags = {flag for parameter in command.params for flag in parameter.opts} | set(_FLAG_SYNONYMS)
        assert {word for word in words if word.startswith("--")} <= flags, line
        seen += 1
    assert seen > 5
