"""Recipes and flags: one set of names, other tools' names for them, and mistakes that are answered with a cure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmkit import cli
from glmkit.errors import UsageError
from glmkit.train.arguments import (
    VERBS,
    Recipe,
    as_given,
    as_resolved,
    blocks_of,
    load_recipe,
)
from glmkit.train.flags import schema, settings_from_flags, settings_help

RECIPE = """\
model:
  model_name_or_path: somewhere
  quantization_bit: 8
data:
  train_file: train.json   # the records
method:
  peft_type: PREFIX_TUNING
  num_virtual_tokens: 16
train:
  eval_step_interval: 500
output:
  output_dir: out
"""
NEEDED = ["path=m", "train_file=d", "dir=o"]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def glm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_keys_of_other_tools_are_read_in_files_and_in_changes(recipe_file: Path) -> None:
    plain = load_recipe(recipe_file)
    assert (plain.model.path, plain.model.quantize, plain.output.dir) == ("somewhere", "official-int8", "out")
    assert (plain.method.name, plain.method.pre_seq_len, plain.train.eval_steps) == ("ptuning_v2", 16, 500)
    # A change by any name replaces what the file says by another.
    changed = load_recipe(recipe_file, ["quantization_bit=4", "pre_seq_len=8", "train.eval_steps=7", "method.r=3"])
    assert (changed.model.quantize, changed.method.pre_seq_len) == ("official-int4", 8)
    assert (changed.train.eval_steps, changed.method.lora_rank) == (7, 3)
    again = load_recipe(recipe_file, ["eval_step_interval=9", "batch_size=5", "lr=3e-4", "output_dir=2024"])
    assert (again.train.eval_steps, again.train.per_device_train_batch_size) == (9, 5)
    assert (again.train.learning_rate, again.output.dir) == (3e-4, "2024")


def test_one_value_is_a_list_of_one() -> None:
    recipe = load_recipe(None, [*NEEDED, "report_to=tensorboard", "target_modules=[dense, query_key_value]"])
    assert recipe.output.report_to == ["tensorboard"]
    assert recipe.method.target_modules == ["dense", "query_key_value"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rat=1", "no key 'learning_rat'; did you mean 'train.learning_rate'?"),
        ("quantisation_bit=4", "did you mean 'model.quantization_bit' (that is model.quantize)?"),
        ("train.lora_rank=4", "no key 'lora_rank' here; did you mean 'method.lora_rank'?"),
        ("train.num_virtual_token=4", "did you mean 'method.num_virtual_tokens' (that is method.pre_seq_len)?"),
        ("method.rank=4", "no key 'rank'; did you mean 'method.lora_rank'?"),
        ("model=chatglm3-6b", "model is a block of settings: model.path, model.init"),
        ("train.eval_steps.x=1", "train.eval_steps is not a block"),
        ("zzz=1", "no key 'zzz'; known are model, data, method, train, distributed, output"),
        ("train.fp16=maybe", "train.fp16: Input should be a valid boolean"),
        ("lr_scheduler_type=cosin", "train.lr_scheduler_type: Input should be 'linear', 'cosine'"),
    ],
)
def test_mistakes_in_changes_name_the_change_and_the_cure(recipe_file: Path, change: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, [change])
    assert change in str(caught.value)
    assert message in str(caught.value)


def test_every_mistake_of_a_file_is_named_with_its_line(recipe_file: Path) -> None:
    text = RECIPE.replace("quantization_bit", "quantisation_bit").replace(
        "eval_step_interval: 500", "seed: x\n  lora_r: 2"
    )
    recipe_file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file)
    lines = str(caught.value).splitlines()
    assert [re.match(r".*recipe\.yaml:(\d+):", line)[1] for line in lines] == ["3", "10", "11"]  # type: ignore[index]
    assert "model.quantization_bit" in lines[0]
    assert "method.lora_rank" in lines[2]
    recipe_file.write_text(RECIPE.replace("train:\n", "train:\n  lr: 1\n  learning_rate: 2\n"))
    with pytest.raises(UsageError, match=r"recipe\.yaml:\d+: train: lr and learning_rate are the same"):
        load_recipe(recipe_file)
    recipe_file.write_text(RECIPE + "train:\n  lr: 1\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml:13: train is there twice, first in line 9"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# 学习率\nmodel: {}".encode("gb18030"), "is not UTF-8 text"),
        (b"x: " + b"[" * 2_000 + b"]" * 2_000, "not valid YAML: maximum recursion"),
        (b"model: {path: &a [*a]}", "model.path: Input should be a valid string"),
        (b"a: &a {b: *a}", "not valid YAML: maximum recursion"),
        (b"a: " + b"9" * 5_000, "not valid YAML: Exceeds the limit"),
        (b"a: 2020-99-99", "not valid YAML: month must be in 1..12"),
        (b"a: &a [x]\nb: [" + b"*a," * 30 + b"]", "more than 20 references"),
        (b"model: " + b"x" * 300_000, "more than 262,144 bytes"),
    ],
)
def test_what_is_no_recipe_is_said_in_a_line(recipe_file: Path, content: bytes, message: str) -> None:
    recipe_file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2_000


def test_a_folder_that_looks_like_a_date_is_a_folder(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["output.dir=2020-99-99"]).output.dir == "2020-99-99"


def test_without_a_file_the_changes_say_everything() -> None:
    assert load_recipe(None, NEEDED).data.train_file == "d"
    with pytest.raises(UsageError) as caught:
        load_recipe(None, ["lr=1"])
    assert [line.split(" is missing")[0] for line in str(caught.value).splitlines()] == [
        "the settings: model.path", "the settings: data.train_file", "the settings: output.dir",
    ]  # fmt: skip


def test_flags_become_changes() -> None:
    typed = "name --learning_rate 1e-4 --lr-scheduler-type=cosine --bf16 --fp16 false --max_steps -1 --dry-run k=v"
    rest, settings = settings_from_flags([*typed.split(), "--train.seed", "3"], {"--dry-run": False}, Recipe)
    assert rest == ["name", "--dry-run", "k=v"]
    assert settings == [
        "train.learning_rate=1e-4", "train.lr_scheduler_type=cosine", "train.bf16=true", "train.fp16=false",
        "train.max_steps=-1", "train.seed=3",
    ]  # fmt: skip
    rest, settings = settings_from_flags(["--set", "--bf16", "--", "--r", "4"], {"--set": True}, Recipe)
    assert (rest, settings) == (["--set", "--bf16", "--", "--r", "4"], [])


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (["--learning_rat", "1"], "no such option: --learning_rat; there is no key", "glm finetune --help"),
        (["--resum"], "no such option: --resum", "did you mean --resume?"),
        (["--max_steps"], "--max_steps needs a value", "--max_steps -1"),
        (["--train.lora_rank", "2"], "did you mean 'method.lora_rank'?", "glm finetune --help"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_from_flags(flags, {"--resume": False}, Recipe)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    "spelling",
    [
        ["--learning_rate", "1e-3", "--r", "4"],
        ["--learning-rate=1e-3", "--lora-rank=4"],
        ["--train.learning_rate", "1e-3", "--method.lora_rank", "4"],
        ["--set", "learning_rate=1e-3", "--set", "lora_rank=4"],
        ["learning_rate=1e-3", "method.r=4"],
        ["--lr", "1e-3", "lora_rank=4"],
    ],
)
def test_all_spellings_on_the_command_line_mean_the_same(
    capsys: pytest.CaptureFixture[str], spelling: list[str]
) -> None:
    code, out, err = glm(capsys, "finetune", "adgen_lora", *spelling, "--dry-run")
    assert (code, err) == (0, "")
    found = yaml.safe_load(out)
    assert (found["train"]["learning_rate"], found["method"]["lora_rank"]) == (1e-3, 4)
    assert out.count("# override") == 2


def test_no_recipe_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_name_or_path", "m", "--train_file", "d", "--output_dir", "o"]
    code, out, _ = glm(capsys, "finetune", *flags, "--dry-run")
    assert (code, yaml.safe_load(out)["output"]["dir"]) == (0, "o")
    code, out, _ = glm(capsys, "finetune", "path=m", "train_file=d", "dir=o", "--dry-run")
    assert (code, yaml.safe_load(out)["model"]["path"]) == (0, "m")
    code, _, err = glm(capsys, "finetune", "--lr", "1")
    assert code == 2
    assert "model.path is missing" in err


@pytest.mark.parametrize(("verb", "kind"), [(verb, kind) for kind, verb in VERBS.items()])
def test_help_and_schema_name_every_setting(capsys: pytest.CaptureFixture[str], verb: str, kind: Any) -> None:
    code, shown, _ = glm(capsys, verb, "--help")
    assert code == 0
    code, printed, _ = glm(capsys, verb, "--schema")
    described = json.loads(printed)
    assert described == schema(kind)
    plain = " ".join(shown.split())
    for name, block in blocks_of(kind).items():
        assert f"\n  {name}: " in shown
        properties = described["$defs"][block.__name__]["properties"]
        assert described["$defs"][block.__name__]["additionalProperties"] is False
        for key, field in block.model_fields.items():
            assert re.search(rf"^    --{key} ", shown, re.MULTILINE), key
            assert field.description
            assert " ".join(field.description.split()).rstrip(".") in plain, key
        assert set(properties) == {*block.model_fields, *block.synonyms}
        for foreign in block.synonyms:
            assert foreign in shown
    assert ("[32]" if verb == "evaluate" else "[0.0001]") in settings_help(kind)


def test_no_two_blocks_have_the_same_key() -> None:
    for kind in VERBS:
        keys = [key for block in blocks_of(kind).values() for key in (*block.model_fields, *block.synonyms)]
        assert sorted(set(keys)) == sorted(keys)


def test_help_imports_no_torch_and_is_fast() -> None:
    code = (
        "import glmkit_command, sys\n"
        "sys.argv = ['glm', 'finetune', '--help']\n"
        "try:\n    glmkit_command.main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)\n"
    )
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.endswith("False False\n")
    assert time.monotonic() - started < 5  # 0.3 s on an idle core


def test_a_recipe_is_kept_as_given_and_with_the_origin_of_every_value(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["lr=3e-4", 'probe_prompts=["a\\nb", 你好]'])
    given = as_given(recipe)
    assert RECIPE in given
    assert "# with lr=3e-4" in given
    resolved = as_resolved(recipe)
    again = Recipe.model_validate(yaml.safe_load(resolved))
    assert again.model_dump() == recipe.model_dump()
    assert "  learning_rate: 0.0003  # override\n" in resolved
    assert "  eval_steps: 500  # recipe\n" in resolved
    assert "  seed: 42  # default\n" in resolved
    assert '  probe_prompts: ["a\\nb", 你好]  # override\n' in resolved
    origins = re.findall(r"# (\w+)$", resolved, re.MULTILINE)
    assert len(origins) == sum(len(block.model_fields) for block in blocks_of(Recipe).values())
    assert (origins.count("override"), origins.count("recipe")) == (2, 7)
    made = Recipe.model_validate({"model": {"path": "m"}, "data": {"train_file": "d"}, "output": {"dir": "o"}})
    assert yaml.safe_load(as_given(made)) == made.model_dump(exclude_unset=True)
    assert as_resolved(made).count("# recipe") == 3


@pytest.mark.parametrize(
    ("method", "precision", "dtype", "loaded"),
    [
        ("lora", {"bf16": True}, "auto", "bfloat16"),
        ("ptuning_v2", {"fp16": True}, "auto", "float16"),
        ("lora", {}, "auto", "auto"),
        ("lora", {"bf16": True}, "float32", "float32"),
        ("full", {"bf16": True}, "auto", "auto"),
        ("freeze", {"bf16": True}, "auto", "auto"),
    ],
)
def test_what_stays_as_it_is_is_loaded_in_the_dtype_of_the_products(
    method: str, precision: dict[str, bool], dtype: str, loaded: str
) -> None:
    content = {
        "model": {"path": "x", "dtype": dtype},
        "data": {"train_file": "x"},
        "method": {"name": method},
        "train": precision,
        "output": {"dir": "x"},
    }
    assert Recipe.model_validate(content).base.dtype == loaded
