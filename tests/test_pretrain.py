"""Pre-training: what a step computes, that resuming changes nothing, recipes, and a small model that learns."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from glmkit import cli
from glmkit.data.mixtures import MIXTURES
from glmkit.errors import DataError, TrainingError, UsageError
from glmkit.families import find_family
from glmkit.loading import load
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.tokenizers.glm import GLMChineseTokenizer
from glmkit.train.arguments import PretrainRecipe, Recipe, load_recipe, recipe_names
from glmkit.train.blank_examples import fill_blanks, pick_examples
from glmkit.train.optimizer import learning_rate
from glmkit.train.pretrain import PretrainResult, blank_ids, make_model, make_source, pretrain
from glmkit.train.sources import Blanks

TINY = [
    "init={num_layers: 1, hidden_size: 32, num_attention_heads: 2, max_sequence_length: 96}",
    "tokenizer_pieces=500",
    "made_documents=400",
    "seq_length=64",
    "eval_rows=16",
    "examples=1",
    "per_device_train_batch_size=8",
    "max_steps=60",
    "eval_steps=0",
    "logging_steps=10",
    "save_steps=0",
]


def recipe(output: Path, *changes: str) -> PretrainRecipe:
    overrides = [*TINY, f"output.dir={output}", *changes]
    return load_recipe("glm_pretrain_small", overrides, PretrainRecipe)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> PretrainResult:
    """A tiny model after some seconds."""
    output = tmp_path_factory.mktemp("learnt") / "run"
    result = pretrain(recipe(output, "train.learning_rate=3e-3", "max_steps=300"), progress=False)
    assert result.training.result_dir is not None
    return result


def parts(result: PretrainResult) -> tuple[GLMForConditionalGeneration, Any, Blanks]:
    folder = result.training.result_dir
    assert folder is not None
    used = recipe(result.training.output_dir)
    tokenizer = GLMChineseTokenizer.from_pretrained(folder)
    ids = blank_ids(tokenizer, used.blanks.whole())
    from glmkit.data.corpus import Corpus

    corpus = Corpus([result.training.output_dir / "corpus" / "train.txt"], form="lines")
    model = GLMForConditionalGeneration.from_pretrained(folder).eval()
    return model, tokenizer, make_source(used, corpus, tokenizer, ids)


def test_a_tiny_model_learns_and_is_an_official_folder(learnt: PretrainResult) -> None:
    result = learnt.training
    assert result.metrics[0]["loss"] > 4
    assert result.loss < result.metrics[0]["loss"] - 1.2
    assert result.eval_loss is not None
    assert result.eval_loss < result.metrics[0]["loss"] - 1.2
    names = {path.name for path in result.result_dir.iterdir()}  # type: ignore[union-attr]
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "cog-pretrain.model"} <= names
    config = json.loads((result.result_dir / "config.json").read_text())  # type: ignore[operator]
    assert config["model_type"] == "glm"
    assert config["gelu"] == "tanh"
    assert config["architectures"] == ["GLMForConditionalGeneration"]
    assert config["vocab_size"] % 128 == 0
    report = (result.output_dir / "report.md").read_text()
    assert "| bad lines met while drawing | 0 |" in report
    assert "## Blanks in held-out texts" in report
    assert all(mask in report for mask in ("[MASK]", "[sMASK]", "[gMASK]"))
    assert (result.output_dir / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert set(learnt.filled) == {"bert", "sentence", "gpt"}


def test_the_result_is_loaded_by_its_folder(learnt: PretrainResult) -> None:
    loaded = load(learnt.training.result_dir)  # type: ignore[arg-type]
    model, tokenizer, source = parts(learnt)
    assert isinstance(loaded.model, GLMForConditionalGeneration)
    assert isinstance(loaded.tokenizer, GLMChineseTokenizer)
    assert loaded.tokenizer.get_command("dBLOCK") == tokenizer.get_command("dBLOCK")
    batch = next(source.windows({}, 1)).batches[0].inputs
    with torch.no_grad():
        ours, theirs = model.label_loss(**batch)[0], loaded.model.label_loss(**batch)[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=0)


def test_the_loss_is_the_cross_entropy_of_part_b(learnt: PretrainResult) -> None:
    model, _, source = parts(learnt)
    samples = source.samples(0)
    batch = next(source.windows({}, 1)).batches[0]
    loss, number = model.label_loss(**batch.inputs)
    expected = torch.zeros(())
    for sample in samples:  # one by one, without padding, with the mask written out
        size = len(sample.input_ids)
        seen = torch.tril(torch.ones(size, size))
        seen[:, : sample.sep] = 1
        positions = torch.tensor([[sample.positions, sample.block_positions]])
        logits = model(
            torch.tensor([sample.input_ids]), position_ids=positions, attention_mask=seen[None, None]
        ).logits[0]
        losses = F.cross_entropy(logits, torch.tensor(sample.targets), reduction="none")
        expected = expected + (losses * torch.tensor(sample.loss_mask)).sum()
    assert number == batch.label_tokens == sum(sum(sample.loss_mask) for sample in samples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


class Kill:
    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int, total: int, metrics: dict[str, float]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = ["max_steps=14", "gradient_accumulation_steps=2", "model.init.output_dropout_prob=0.1"]
    whole = pretrain(recipe(tmp_path / "whole", *settings), progress=False).training
    cut = recipe(tmp_path / "cut", *settings)
    for step in (4, 9):
        stopped = pretrain(cut, resume=step > 4, on_step=Kill(step), progress=False).training
        assert stopped.interrupted
        assert stopped.steps == step
    state = json.loads((tmp_path / "cut" / "step-9" / "state.json").read_text())
    assert state["place"] == {"batches": 18, "bad_lines": 0}
    resumed = pretrain(cut, resume=True, progress=False).training
    assert whole.result_dir is not None
    assert resumed.result_dir is not None
    weights = [GLMForConditionalGeneration.from_pretrained(run.result_dir).state_dict() for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert resumed.eval_loss == whole.eval_loss
    with pytest.raises(TrainingError, match="already holds a run"):
        pretrain(cut, progress=False)
    (tmp_path / "cut" / "model" / "config.json").unlink()
    with pytest.raises(TrainingError, match=r"blanks\.block_mask_prob: None then, 0\.3 now"):
        pretrain(recipe(tmp_path / "cut", *settings, "block_mask_prob=0.3"), resume=True, progress=False)


def test_checkpointed_activations_give_the_same_losses(tmp_path: Path) -> None:
    losses = []
    for value in ("true", "false"):
        one = recipe(tmp_path / value, "max_steps=3", "logging_steps=1", f"gradient_checkpointing={value}")
        losses.append([line["loss"] for line in pretrain(one, progress=False).training.metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_going_on_with_a_model_begins_where_it_ended(tmp_path: Path, learnt: PretrainResult) -> None:
    changes = ["model.init=null", f"model.path={learnt.training.result_dir}", "max_steps=1", "learning_rate=1e-6"]
    first = pretrain(recipe(tmp_path / "next", *changes), progress=False).training
    assert first.eval_loss == pytest.approx(learnt.training.eval_loss, rel=1e-3)


def test_filling_writes_what_was_cut_out(learnt: PretrainResult) -> None:
    """A model that knows the answers is filled in exactly: positions, order and ends are those of training."""
    _, tokenizer, source = parts(learnt)
    corpus = source.rows.corpus
    examples = pick_examples(corpus, tokenizer, source.maker.ids, source.maker, 3, 64)
    assert {example.sample.kind for example in examples} == {"bert", "sentence", "gpt"}
    for example in examples:
        wanted = [[*span, example.ids.eop] for span in example.wanted()]
        answers = [token for span in wanted for token in span]
        seen: list[list[list[int]]] = []

        class Knowing(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, input_ids: Any, position_ids: Any, **_: Any) -> Any:
                seen.append(position_ids[0].tolist())  # noqa: B023
                logits = torch.zeros(1, 1, 2000)
                logits[0, 0, answers.pop(0)] = 1.0  # noqa: B023
                return SimpleNamespace(logits=logits)

        assert fill_blanks(Knowing(), example) == example.wanted()
        positions = set(zip(*(row[example.sample.sep :] for row in seen[-1])))
        trained = set(
            zip(example.sample.positions[example.sample.sep :], example.sample.block_positions[example.sample.sep :])
        )
        assert positions - trained <= {(blank, len(span)) for blank, span in zip(example.blanks(), wanted)}
        assert trained <= positions


def test_bad_lines_of_a_corpus_stop_before_training_or_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    good = "".join(json.dumps({"text": f"第{number}句话。今天天气很好。"}) + "\n" for number in range(200))
    file.write_text(good + "{broken\n" * 40)
    changes = ["made_documents=0", f"corpus.files=['{file}']", f"corpus.eval_files=['{file}']", "max_steps=5"]
    with pytest.raises(DataError, match=r"texts\.jsonl:201: Expecting property name"):
        pretrain(recipe(tmp_path / "a", *changes), progress=False)
    pretrain(recipe(tmp_path / "b", *changes, "on_bad_line=skip", "tokenizer_pieces=100"), progress=False)
    lines = (tmp_path / "b" / "report.md").read_text().splitlines()
    left_out = next(line for line in lines if "bad lines met" in line)
    assert int(left_out.split("|")[2]) > 0


# --- recipes ---


class _Sized:
    """All of a tokenizer that making a model needs."""

    mask_token_ids = (1, 2, 3)
    sop_token_id = 4

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


RECIPES = {
    # recipe: published sizes, ids of the tokenizer, parameters in millions, mixture
    "base": ("glm-base", 30_524, 109.6, "token"),
    "large": ("glm-large", 30_524, 334.6, "token"),
    "doc": ("glm-doc", 30_524, 334.6, "token_document"),
    "410m": ("glm-410m", 30_524, 410.2, "token_document"),
    "515m": ("glm-515m", 30_524, 514.9, "token_document"),
    "roberta": ("glm-roberta-large", 50_269, 354.8, "token_roberta"),
    "2b": ("glm-2b", 50_266, 1920.4, "2b"),
    "10b": ("glm-10b", 50_266, 9880.0, "10b"),
    "10b_stage2": ("glm-10b", 50_266, 9880.0, "10b_stage2"),
    "large_chinese": ("glm-large-chinese", 50_011, 355.6, "large_chinese"),
    "10b_chinese": ("glm-10b-chinese", 50_011, 9880.0, "10b"),
    "10b_chinese_stage2": ("glm-10b-chinese", 50_011, 9880.0, "10b_chinese_stage2"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_published_models_build_them(name: str) -> None:
    model_name, ids, millions, mixture = RECIPES[name]
    one = load_recipe(f"glm_pretrain_{name}", (), PretrainRecipe)
    assert one.blanks.whole() == MIXTURES[mixture]
    assert one.corpus.seq_length == (1024 if "stage2" in name else 512)
    assert one.train.max_grad_norm == 1.0
    if one.model.init is None:
        assert one.model.path is not None
        return
    with torch.device("meta"):
        model = make_model(one.model, _Sized(ids), seed=0)
    released = find_family(model_name)
    assert released is not None
    assert {key: getattr(model.config, key) for key in released.sizes} == released.sizes
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_optimizers_are_the_published_ones() -> None:
    def settings(name: str) -> tuple[float, ...]:
        block = load_recipe(f"glm_pretrain_{name}", (), PretrainRecipe).train
        return block.adam_beta1, block.adam_beta2, block.adam_epsilon, block.weight_decay, block.learning_rate

    assert settings("base") == (0.9, 0.98, 1e-6, 0.1, 4e-4)
    assert settings("large") == (0.9, 0.98, 1e-6, 0.1, 2e-4)
    for name in ("large_chinese", "roberta"):
        assert settings(name) == (0.9, 0.98, 1e-6, 0.01, 4e-4)
    for name in ("10b", "10b_chinese"):
        assert settings(name) == (0.9, 0.95, 1e-8, 0.1, 1e-4)
        assert settings(f"{name}_stage2") == (0.9, 0.95, 1e-8, 0.1, 3e-5)


def test_every_recipe_for_pretraining_is_valid_and_every_field_has_a_help() -> None:
    names = recipe_names(PretrainRecipe)
    assert set(names) == {"glm_pretrain_small", *(f"glm_pretrain_{name}" for name in RECIPES)}
    assert not set(names) & set(recipe_names(Recipe))
    for block in [PretrainRecipe, *(field.annotation for field in PretrainRecipe.model_fields.values())]:
        assert all(field.description for field in block.model_fields.values()), block  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["max_steps=-1"], r"train\.max_steps is missing"),
        (["tokens_per_batch=64"], "rows are counted by per_device_train_batch_size"),
        (["method.name=lora"], "a new model learns with method.name=full"),
        (["corpus.files=[a.txt]"], r"either corpus\.files or corpus\.made_documents"),
        (["mixture=10B"], "there is no mixture '10B'; known are token, "),
        (["bert_prob=0.9"], r"bert_prob 0\.9 and gap_sentence_prob 0\.3 exceed 1"),
        (["lr_scheduler_type=exponential", "lr_min_ratio=0"], "never reaches 0"),
        (["corpus.file=[a.txt]"], "did you mean 'corpus.files'"),
        (["model.path=x"], r"either model\.init"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, *changes)


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"corpus\.seq_length is 128, the model has positions for 96 tokens"):
        pretrain(recipe(tmp_path / "a", "seq_length=128"), progress=False)
    with pytest.raises(UsageError, match=r"no key 'num_layer'[^\n]*\nhint: did you mean 'num_layers'"):
        pretrain(recipe(tmp_path / "b", "model.init={num_layer: 1}"), progress=False)
    with pytest.raises(UsageError, match=r"model\.init\.vocab_size is 10; the tokenizer has ids up to"):
        pretrain(recipe(tmp_path / "c", "model.init.vocab_size=10"), progress=False)
    with pytest.raises(UsageError, match="hint: glm pretrain glm_pretrain_small"):
        load_recipe("glm_pretrain_small")
    with pytest.raises(UsageError, match="hint: glm finetune nano"):
        load_recipe("nano", (), PretrainRecipe)


def test_learning_rates_that_fall_before_the_end() -> None:
    block = recipe(Path("x"), "learning_rate=1", "lr_decay_steps=10", "warmup_ratio=0.2", "lr_min_ratio=0.25").train
    linear = block.model_copy(update={"lr_scheduler_type": "linear"})
    # Steps 1 and 2 warm up (a fifth of the 10), step 10 has the lowest rate, and it stays.
    rates = [learning_rate(step, 40, linear) for step in (1, 2, 6, 10, 40)]
    assert rates == pytest.approx([0.5, 1.0, 1 - 0.75 * 0.5, 0.25, 0.25])
    exponential = block.model_copy(update={"lr_scheduler_type": "exponential"})
    rates = [learning_rate(step, 40, exponential) for step in (2, 6, 10, 40)]
    assert rates == pytest.approx([1.0, 0.5, 0.25, 0.25])


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["pretrain", "glm_pretrain_small", *TINY, f"output.dir={tmp_path / 'run'}", "max_steps=2"]
    assert cli.run([*arguments, "--dry-run"]) == 0
    assert "mixture: large_chinese" in capsys.readouterr().out
    assert cli.run(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.strip().splitlines()[-1] == str(tmp_path / "run" / "model")
    assert "2 steps in " in printed.err
    for verb, name, other in (("finetune", "glm_pretrain_base", "pretrain"), ("pretrain", "nano", "finetune")):
        assert cli.run([verb, name]) == 2
        assert f"hint: glm {other} {name}" in capsys.readouterr().err
