"""The training loop: what it computes, that resuming changes nothing, and that a kill loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.data.examples import Example
from glmkit.data.records import read_records
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import DataError, TrainingError, UsageError
from glmkit.evaluate.adgen import evaluate_adgen
from glmkit.loading import load
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.quant.official import quantize_model
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.train.arguments import DataBlock, ModelBlock, Recipe, load_recipe, recipe_names
from glmkit.train.checkpoints import checkpoints, lock_folder, newest_checkpoint, publish, save_checkpoint
from glmkit.train.journal import MEASURED
from glmkit.train.loop import TrainingResult, train
from glmkit.train.optimizer import learning_rate
from glmkit.train.processes import OneProcess
from glmkit.train.run import finetune, load_model
from glmkit.train.validation import mean_loss
from tiny import sizes, train_tokenizer

SIZES = {
    "num_layers": 2,
    "padded_vocab_size": 64,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "seq_length": 64,
    "multi_query_attention": True,
    "add_qkv_bias": True,
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No token ids of these tests in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Fixtures of a module are made before the one that does this for each test.
        patch.setattr("glmkit.train.reopened.compare_result", lambda *_: "not compared in this test")
        yield


class PadOnly:
    """All of a tokenizer that the loop uses."""

    pad_token_id = 0

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.txt").write_text("pad 0\n")


def tiny_model() -> ChatGLM2ForCausalLM:
    torch.manual_seed(5)
    return ChatGLM2ForCausalLM(ChatGLM2Config(**SIZES))


def make_examples(number: int, seed: int = 0) -> list[Example]:
    """Sequences that count upwards: easy to learn, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length = int(torch.randint(6, 24, (1,), generator=generator))
        start = int(torch.randint(3, 30, (1,), generator=generator))
        ids = torch.arange(start, start + length, dtype=torch.int32)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append(Example(ids, labels, int((labels[1:] != -100).sum()), f"row {index}"))
    return made


def make_recipe(folder: Path, method: dict[str, Any] | None = None, **train_block: Any) -> Recipe:
    block = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_steps": 0,
        "logging_steps": 3,
        **train_block,
    }
    content = {
        "model": {"path": "tiny"},
        "data": {"train_file": "none"},
        "method": method or {"name": "full"},
        "train": block,
        "output": {"dir": str(folder)},
    }
    return Recipe.model_validate(content)


def run(recipe: Recipe, examples: list[Example] | None = None, **options: Any) -> tuple[TrainingResult, Any]:
    model = tiny_model()
    result = train(model, PadOnly(), recipe, examples or make_examples(30), progress=False, **options)
    return result, model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def untimed(result: TrainingResult) -> list[dict[str, float]]:
    """The figures that do not depend on the machine and the moment."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in result.metrics]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_full_training_learns_and_writes_a_whole_model(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", num_train_epochs=12, lr_scheduler_type="cosine", warmup_ratio=0.1)
    result, model = run(recipe, held_out=make_examples(6, seed=9))
    assert result.metrics[0]["loss"] == pytest.approx(math.log(64), abs=0.6)
    assert result.loss < 0.5
    assert result.eval_loss is not None
    assert result.eval_loss < 1.5
    assert result.steps == 12 * 8
    assert result.result_dir == tmp_path / "run" / "model"
    again = ChatGLM2ForCausalLM.from_pretrained(result.result_dir)
    assert same(weights(model), weights(again))
    assert (result.result_dir / "tokenizer.txt").exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= lines[0].keys()


def test_one_step_is_the_step_of_plain_torch(tmp_path: Path) -> None:
    examples = make_examples(4)
    recipe = make_recipe(tmp_path, max_steps=1, weight_decay=0.1, max_grad_norm=1e9)
    _, model = run(recipe, examples)
    plain = tiny_model()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    loss_sum = torch.zeros(())
    for example in examples:
        logits = plain(example.input_ids[None].long()).logits[0, :-1]
        targets = example.labels[1:].long()
        loss_sum = loss_sum + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    (loss_sum / sum(example.label_tokens for example in examples)).backward()
    optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        # AdamW's first step is a sign: entries whose gradient is rounding noise (unused key biases) may differ.
        if "query_key_value.bias" not in name:
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_accumulation_4x1_is_1x4(tmp_path: Path) -> None:
    # The same terms are summed in another order in float32, which is all that may differ.
    one, four = (
        run(make_recipe(tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size))
        for size in (4, 1)
    )
    assert one[0].steps == four[0].steps == 8
    for ours, theirs in zip(one[0].metrics, four[0].metrics):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


class Kill:
    """Send this process a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __call__(self, step: int, total: int, metrics: dict[str, float]) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "lora", "lora_dropout": 0.3}], ids=["full", "lora"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, method: dict[str, Any]) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 3}
    settings |= {"warmup_ratio": 0.2, "lr_scheduler_type": "cosine"}
    whole, model = run(make_recipe(tmp_path / "whole", method, **settings))
    expected = weights(model)
    cut_recipe = make_recipe(tmp_path / "cut", method, **settings)
    for step, number in ((4, signal.SIGTERM), (5, signal.SIGINT), (10, signal.SIGTERM)):
        stopped, _ = run(cut_recipe, resume=step > 4, on_step=Kill(step, number))
        assert stopped.interrupted
        assert stopped.steps == step
        assert stopped.result_dir is None
    torch.manual_seed(12345)  # the state of the generator comes from the checkpoint, not from before
    resumed, model = run(cut_recipe, resume=True)
    assert same(weights(model), expected)
    assert not resumed.interrupted
    assert untimed(resumed) == untimed(whole)


def test_a_run_that_died_between_saves_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = {"max_steps": 11, "save_steps": 3, "eval_steps": 2}
    examples, held_out = make_examples(30), make_examples(5, seed=9)
    whole, model = run(make_recipe(tmp_path / "whole", **settings), examples, held_out=held_out)
    expected = weights(model)

    class Died(BaseException):
        pass

    def die(step: int, total: int, metrics: dict[str, float]) -> None:
        if step in (2, 8):
            raise Died

    recipe = make_recipe(tmp_path / "cut", **settings)
    for resume in (False, True):  # the second one dies at step 2 again, having found no checkpoint
        with pytest.raises(Died):
            run(recipe, examples, held_out=held_out, resume=resume, on_step=die)
    with pytest.raises(Died):
        run(recipe, examples, held_out=held_out, resume=True, on_step=lambda step, *_: die(max(step, 3), 0, {}))
    assert (tmp_path / "cut" / "latest").read_text() == "step-6\n"
    resumed, model = run(recipe, examples, held_out=held_out, resume=True)
    assert same(weights(model), expected)
    assert [line["step"] for line in resumed.metrics] == [line["step"] for line in whole.metrics]
    assert resumed.eval_loss == whole.eval_loss


def test_resuming_with_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    run(make_recipe(tmp_path, max_steps=6), on_step=Kill(3))
    with pytest.raises(TrainingError, match=r"train\.learning_rate: 0\.01 then, 0\.5 now"):
        run(make_recipe(tmp_path, max_steps=6, learning_rate=0.5), resume=True)
    with pytest.raises(TrainingError, match="data"):
        run(make_recipe(tmp_path, max_steps=6), make_examples(29), resume=True)
    with pytest.raises(TrainingError, match="already holds a run"):
        run(make_recipe(tmp_path, max_steps=6))
    with pytest.raises(TrainingError, match="no run to continue"):
        run(make_recipe(tmp_path / "new", max_steps=6), resume=True)
    result, _ = run(make_recipe(tmp_path, max_steps=6, logging_steps=1), resume=True)
    assert result.steps == 6


def test_lora_starts_as_the_base_trains_little_and_leaves_it_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = weights(tiny_model())
    examples = make_examples(30)
    method = {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
    recipe = make_recipe(tmp_path, method, num_train_epochs=4, logging_steps=1)
    base = tiny_model()
    base_loss = mean_loss(base, OneProcess(torch.device("cpu"), base), examples, 0, recipe.train)
    result, model = run(recipe, examples, held_out=examples)
    assert result.metrics[0]["loss"] == pytest.approx(base_loss, rel=0.05)
    assert result.eval_loss is not None
    assert result.eval_loss < base_loss - 0.1
    after = {name: tensor for name, tensor in weights(model).items() if "lora_" not in name}
    assert same(before, after)
    assert result.result_dir == tmp_path / "adapter"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    ids = examples[0].input_ids[None].long()
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=1e-6, rtol=0)


def test_lora_matrices_are_float32_beside_a_half_precision_base(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    recipe = make_recipe(tmp_path, {"name": "lora"}, max_steps=2, bf16=True)
    train(model, PadOnly(), recipe, make_examples(8), progress=False)
    kinds = {("lora" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_an_unknown_lora_target_is_answered_with_the_layers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q_proj.*query_key_value"):
        run(make_recipe(tmp_path, {"name": "lora", "target_modules": ["q_proj"]}))


@pytest.mark.parametrize("method", [{"name": "lora"}, {"name": "ptuning_v2", "pre_seq_len": 8}], ids=["lora", "prefix"])
def test_beside_a_quantised_model_something_learns(tmp_path: Path, method: dict[str, Any]) -> None:
    model = quantize_model(tiny_model(), 4)
    with pytest.raises(UsageError, match="is quantised"):
        train(model, PadOnly(), make_recipe(tmp_path / "full"), make_examples(8), progress=False)
    before = weights(model)
    recipe = make_recipe(tmp_path / "run", method, num_train_epochs=8, learning_rate=3e-2, bf16=True)
    result = train(model, PadOnly(), recipe, make_examples(30), progress=False)
    assert result.loss < result.metrics[0]["loss"] - 0.01  # its output layer is small, and stays so
    after = weights(model)
    assert before.keys() < after.keys()
    assert same(before, {name: after[name] for name in before})


def test_an_unknown_size_of_a_new_model_is_named(tmp_path: Path) -> None:
    block = ModelBlock(init={**SIZES, "hiden_size": 32}, tokenizer=str(tmp_path))
    with pytest.raises(UsageError, match=r"no key 'hiden_size'[^\n]*\nhint: did you mean 'hidden_size'"):
        load_model(block, seed=0)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_weights(tmp_path: Path) -> None:
    class Broken(ChatGLM2ForCausalLM):
        calls = 0

        def label_loss(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
            Broken.calls += 1
            loss, count = super().label_loss(*args, **kwargs)
            return (loss * math.nan if Broken.calls == 3 else loss), count

    torch.manual_seed(5)
    model = Broken(ChatGLM2Config(**SIZES))
    seen: dict[int, dict[str, torch.Tensor]] = {}
    recipe = make_recipe(tmp_path, max_steps=6, save_steps=2)
    with pytest.raises(TrainingError, match=r"step 3.*nan.*row \d+"):
        train(
            model,
            PadOnly(),
            recipe,
            make_examples(30),
            progress=False,
            on_step=lambda step, *_: seen.update({step: weights(model)}),
        )
    assert same(weights(model), seen[2])
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2"]


def test_learning_rates_by_hand() -> None:
    block = make_recipe(Path("x"), learning_rate=1.0, warmup_ratio=0.2).train
    assert [learning_rate(step, 10, block) for step in (1, 2, 3, 10)] == pytest.approx([0.5, 1.0, 8 / 9, 1 / 9])
    cosine = block.model_copy(update={"lr_scheduler_type": "cosine", "lr_min_ratio": 0.1})
    assert [learning_rate(step, 11, cosine) for step in (3, 7, 11)] == pytest.approx(
        [1.0, 0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 9)) / 2, 0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 9)) / 2]
    )
    linear = block.model_copy(update={"lr_min_ratio": 0.25, "warmup_ratio": 0.0})
    assert [learning_rate(step, 4, linear) for step in (1, 2, 3, 4)] == pytest.approx([1.0, 13 / 16, 10 / 16, 7 / 16])
    plain = linear.model_copy(update={"lr_min_ratio": 0.0})  # what transformers' schedule gives the official scripts
    assert [learning_rate(step, 4, plain) for step in (1, 2, 3, 4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert learning_rate(1, 1, linear) == 1.0  # a run of one step learns
    counted = linear.model_copy(update={"warmup_steps": 3, "lr_min_ratio": 0.0})
    assert [learning_rate(step, 7, counted) for step in (1, 2, 3, 5, 7)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.6, 0.2])
    assert learning_rate(1, 4, linear.model_copy(update={"warmup_steps": 0})) == 1.0
    constant = block.model_copy(update={"lr_scheduler_type": "constant", "warmup_ratio": 0.0})
    assert learning_rate(10, 10, constant) == 1.0


def _write(text: str) -> Any:
    def write(folder: Path) -> None:
        (folder / "data.txt").write_text(text)

    return write


def test_checkpoints_rotate_by_number_and_spare_other_runs(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 99999, "other", _write("foreign"), keep=1)
    for step in (900, 9900, 10000):
        save_checkpoint(tmp_path, step, "mine", _write(str(step)), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999", "step-10000", "step-9900"]
    assert (tmp_path / "latest").read_text() == "step-10000\n"
    found, skipped = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / "step-10000"
    assert skipped == ["step-99999: it belongs to another run"]


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "manifest"])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, "mine", _write("content"), keep=5)
    file = tmp_path / "step-2" / "data.txt"
    if damage == "flip":
        file.write_text("Content")
    elif damage == "shorten":
        file.write_text("con")
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "step-2" / "manifest.json").write_text('{"fil')
    (tmp_path / ".step-3.tmp-12345678").mkdir()
    found, skipped = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / "step-1"
    assert [text.split(":")[0] for text in skipped] == ["step-2"]
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_a_kill_at_any_call_of_a_save_leaves_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    save_checkpoint(tmp_path, 1, "mine", _write("one"), keep=1)
    budget = 0

    def counted(name: str, plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal budget
            budget -= 1
            if budget < 0:
                raise Killed
            return plain(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    # A killed process does not tidy up.
    monkeypatch.setattr("glmkit.train.checkpoints.shutil.rmtree", lambda *_, **__: None)
    for step in range(2, 40):
        budget = step - 2
        try:
            save_checkpoint(tmp_path, step, "mine", _write(str(step)), keep=1)
        except Killed:
            found, _ = newest_checkpoint(tmp_path, "mine")
            assert found is not None
            continue
        break
    else:
        pytest.fail("a save never came to its end")
    assert step > 8
    found, _ = newest_checkpoint(tmp_path, "mine")
    assert found == tmp_path / f"step-{step}"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, "mine", _write("one"), keep=1)

    def full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        save_checkpoint(tmp_path, 2, "mine", full, keep=1)
    assert newest_checkpoint(tmp_path, "mine") == (tmp_path / "step-1", [])
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]


def test_publishing_replaces_a_folder_whole(tmp_path: Path) -> None:
    publish(tmp_path / "model", _write("old"))
    publish(tmp_path / "model", _write("new"))
    assert (tmp_path / "model" / "data.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with lock_folder(tmp_path), pytest.raises(TrainingError, match="another run is writing"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass


RECIPE = """\
model:
  path: somewhere
data:
  train_file: train.json
train:
  learning_rat: 1e-4
  max_steps: many
output:
  dir: out
"""


def test_mistakes_in_a_recipe_are_named_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert "recipe.yaml:6: there is no key 'learning_rat'; did you mean 'train.learning_rate'?" in str(caught.value)
    assert "recipe.yaml:7: train.max_steps" in str(caught.value)
    file.write_text(RECIPE.replace("learning_rat:", "learning_rate:").replace("many", "7"))
    recipe = load_recipe(file, ["train.seed=3", "lora_alpha=16", "method.name=lora", "r=2"])
    assert (recipe.train.learning_rate, recipe.train.max_steps, recipe.train.seed) == (1e-4, 7, 3)
    assert (recipe.method.name, recipe.method.lora_alpha, recipe.method.lora_rank) == ("lora", 16, 2)
    with pytest.raises(UsageError, match=r"model\.rank=4.*no key 'rank'"):
        load_recipe(file, ["model.rank=4"])
    with pytest.raises(UsageError, match=r"lora_rnk=4.*no key 'lora_rnk'; did you mean 'method\.lora_rank'"):
        load_recipe(file, ["lora_rnk=4"])
    with pytest.raises(UsageError, match="not of the form key=value"):
        load_recipe(file, ["seed"])
    with pytest.raises(UsageError, match="greater than 0, found 0"):
        load_recipe(file, ["train.learning_rate=0"])
    with pytest.raises(UsageError, match="there is no recipe file nothing"):
        load_recipe("nothing")
    with pytest.raises(UsageError, match=r"either model\.path or model\.init"):
        load_recipe(file, ["model.path=null"])


def test_every_recipe_of_the_package_is_valid_and_every_field_has_a_help() -> None:
    assert {"nano", "adgen_lora", "adgen_full"} <= set(recipe_names())
    for name in recipe_names():
        load_recipe(name)
    for block in [Recipe, *(field.annotation for field in Recipe.model_fields.values())]:
        assert all(field.description for field in block.model_fields.values()), block  # type: ignore[union-attr]


WORDS = ("棉", "显瘦", "tea", "rice")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained from sizes, by a recipe, to answer every word in one way."""
    folder = tmp_path_factory.mktemp("learnt")
    tokenizer = ChatGLMTokenizer(train_tokenizer(folder / "tokenizer.model"), generation=3)
    tokenizer.save_pretrained(folder / "tokenizer")
    turns = [
        [{"role": "user", "content": f"上衣 {word}"}, {"role": "assistant", "content": f"{word} hello world"}]
        for word in WORDS
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns) * 4)
    block = {"init": sizes(tokenizer), "tokenizer": str(folder / "tokenizer")}
    recipe = make_recipe(folder / "run", max_steps=120, tokens_per_batch=512).model_copy(
        update={"model": ModelBlock(**block), "data": DataBlock(train_file=str(data))}
    )
    result = finetune(recipe, progress=False)
    assert result.loss < 0.1
    assert result.result_dir is not None
    return result.result_dir


def test_validation_measures_what_is_learnt(tmp_path: Path, learnt: Path) -> None:
    data = learnt.parent.parent / "data.jsonl"
    losses = []
    for loss_on in ("answers", "all"):
        blocks = {"train_file": str(data), "eval_file": str(data), "loss_on": loss_on}
        recipe = make_recipe(tmp_path / loss_on, max_steps=1, learning_rate=1e-9).model_copy(
            update={"model": ModelBlock(path=str(learnt)), "data": DataBlock(**blocks)}
        )
        losses.append(finetune(recipe, progress=False).eval_loss)
    assert losses[0] < 0.1 < losses[1]


def test_a_new_model_is_trained_from_sizes(learnt: Path) -> None:
    loaded = load(learnt)
    for word in WORDS:
        assert loaded.chat(f"上衣 {word}", temperature=0).text == f"{word} hello world"


def test_from_a_recipe_to_a_better_model_and_its_scores(tmp_path: Path, learnt: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("jieba")
    rows = [{"q": f"上衣 {word}", "a": f"{word} world hello"} for word in WORDS * 4]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.train_file={data}", f"data.eval_file={data}", f"model.path={learnt}"]
    changes += [f"output.dir={tmp_path / 'run'}", "format=columns"]
    changes += ["prompt_column=q", "response_column=a", "bf16=false"]
    changes += ["target_modules=[query_key_value, dense_h_to_4h, dense_4h_to_h, dense]", "lora_dropout=0"]
    changes += ["max_steps=60", "learning_rate=2e-2", "per_device_train_batch_size=16", "gradient_accumulation_steps=1"]
    result = finetune("adgen_lora", changes, progress=False)
    assert result.metrics[0]["loss"] > 1
    assert result.eval_loss is not None
    assert result.eval_loss < 0.1
    assert (tmp_path / "run" / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    report = (tmp_path / "run" / "report.md").read_text()
    assert "16 records, 0 prompts cut, 0 answers cut" in report
    assert f"{result.loss:.4f}" in report

    records = read_records(data, prompt_column="q", response_column="a")
    options = {"options": SamplingOptions(temperature=0.0), "max_new_tokens": 24, "batch_size": 1}
    bare, tuned = load(learnt), load(learnt, adapter=result.result_dir)
    before = evaluate_adgen(bare.model, bare.tokenizer, records, output_dir=tmp_path / "before", **options)
    after = evaluate_adgen(tuned.model, tuned.tokenizer, records, output_dir=tmp_path / "after", **options)
    assert before["predict_bleu-4"] < 90
    assert after["predict_bleu-4"] > 99
    assert after["predict_samples"] == 16
    assert json.loads((tmp_path / "after" / "predict_results.json").read_text()) == after

    file = tmp_path / "after" / "generated_predictions.txt"
    lines = file.read_text().splitlines()
    assert [json.loads(line)["labels"] for line in lines] == [row["a"] for row in rows]
    # A run that was cut in the middle of a line goes on with the first unit (4 batches) that is not whole.
    file.write_text("\n".join(lines[:11]) + "\n" + lines[11][:9])
    seen: list[int] = []
    options["progress"] = lambda done, _: seen.append(done)
    again = evaluate_adgen(tuned.model, tuned.tokenizer, records, output_dir=tmp_path / "after", **options)
    assert file.read_text().splitlines() == lines
    assert again["predict_bleu-4"] == after["predict_bleu-4"]
    assert seen == list(range(9, 17))
    for other, found in (
        ((tuned.model, tuned.tokenizer, records[1:]), "records"),
        ((bare.model, bare.tokenizer, records), "weights"),
    ):
        with pytest.raises(DataError, match=f"made differently.*\n  - {found}: "):
            evaluate_adgen(*other, output_dir=tmp_path / "after", **options)
    longer = options | {"max_new_tokens": 25, "identity": {"adapter": "a"}}
    with pytest.raises(DataError, match=r"adapter: None then, 'a' now\n.*max_new_tokens: 24 then, 25 now"):
        evaluate_adgen(tuned.model, tuned.tokenizer, records, output_dir=tmp_path / "after", **longer)
    file.write_text(lines[1] + "\n" + lines[0] + "\n" + "\n".join(lines[2:]) + "\n")
    with pytest.raises(DataError, match=r"generated_predictions\.txt:1 holds no prediction for record 1"):
        evaluate_adgen(tuned.model, tuned.tokenizer, records, output_dir=tmp_path / "after", **options)
    (tmp_path / "after" / "evaluation.json").unlink()
    with pytest.raises(DataError, match=r"no evaluation\.json"):
        evaluate_adgen(tuned.model, tuned.tokenizer, records, output_dir=tmp_path / "after", **options)


def test_wrong_recipes_fail_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="overrides change a recipe file"):
        finetune(make_recipe(tmp_path), ["train.seed=2"])
    with pytest.raises(DataError, match="there is no data file"):
        finetune("nano", ["data.train_file=nowhere.jsonl"])
