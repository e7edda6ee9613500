"""After `import glmkit` the Auto classes load official folders with our classes, and run none of their code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import glmkit
import official
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM, ChatGLM2ForSequenceClassification
from glmkit.models.chatglm2_config import ChatGLM2Config

# Runs in a process of its own, in which torch is imported once and each order of imports in a fork of it.
_SCRIPT = """
import json, os, sys
import torch
folder, report = sys.argv[1:3]
for order in ("glmkit first", "transformers first"):
    if os.fork():
        os.wait()
        continue
    seen = []
    def watch(event, arguments):
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "")
        elif event == "compile":
            name = arguments[1]
        elif event == "import":
            name = arguments[0]
        else:
            return
        if any(word in str(name) for word in (folder, "_chatglm", "transformers_modules")):
            seen.append(f"{event} {name}")
    if order == "glmkit first":
        import glmkit
    import transformers
    if order == "transformers first":
        from transformers import AutoModel, AutoTokenizer, LlamaConfig
        import glmkit
    sys.addaudithook(watch)
    classes = {}
    for trust in (None, False, True):
        options = {} if trust is None else {"trust_remote_code": trust}
        for auto in ("Config", "Model", *("ModelFor" + of for of in sys.argv[3:]), "Tokenizer"):
            made = getattr(transformers, f"Auto{auto}").from_pretrained(folder, **options)
            classes.setdefault(auto, set()).add(f"{type(made).__module__}.{type(made).__name__}")
    with open(f"{report}.{order[0]}", "w") as file:
        json.dump({"classes": {auto: sorted(found) for auto, found in classes.items()}, "seen": seen}, file)
    os._exit(0)
"""
_KINDS = ("CausalLM", "Seq2SeqLM", "SequenceClassification")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("official")
    tokenizer = official.train_tokenizer(root / "tokenizer.model")
    return {number: official.write_folder(root / f"{number}", number, tokenizer=tokenizer) for number in (2, 3)}


@pytest.fixture(scope="module")
def folder(folders: dict[int, Path]) -> Path:
    return folders[3]


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatGLM2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)("你好，今天", return_tensors="pt")


def test_both_orders_of_import_and_no_foreign_code(folder: Path, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _SCRIPT,
            str(folder),
            str(tmp_path / "report"),
            "CausalLM",
            "Seq2SeqLM",
            "SequenceClassification",
        ],
        env={
            "PATH": "",
            "HF_MODULES_CACHE": str(modules),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    for first in "gt":
        report = tmp_path / f"report.{first}"
        assert report.is_file(), done.stderr
        found = json.loads(report.read_text())
        assert found["seen"] == []
        models = "glmkit.models.chatglm2"
        assert found["classes"] == {
            "Config": ["glmkit.models.chatglm2_config.ChatGLM2Config"],
            "Model": [f"{models}.ChatGLM2ForCausalLM"],
            "ModelForCausalLM": [f"{models}.ChatGLM2ForCausalLM"],
            "ModelForSeq2SeqLM": [f"{models}.ChatGLM2ForCausalLM"],
            "ModelForSequenceClassification": [f"{models}.ChatGLM2ForSequenceClassification"],
            "Tokenizer": ["glmkit.tokenizers.chatglm2.ChatGLMTokenizer"],
        }
    assert not (folder / official.CANARY).exists()
    assert not list(modules.rglob("*chatglm*"))


def test_the_canary_sings(tmp_path: Path) -> None:
    """The test above is worth something only if running the files would be seen."""
    folder = official.write_folder(tmp_path / "folder")
    exec((folder / "modeling_chatglm.py").read_text())
    assert (folder / official.CANARY).exists()


# --- generate ---


def greedily(model: ChatGLM2ForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest token of a full forward pass, again and again."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        if ids[0, -1] == 2:
            break
    return ids


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {"assistant": 1}],
    ids=["dynamic cache", "static cache", "no cache", "prompt lookup", "assistant model"],
)
def test_greedy_generation(model: ChatGLM2ForCausalLM, folder: Path, inputs: Any, options: dict[str, Any]) -> None:
    if "assistant" in options:
        assistant = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in assistant.transformer.encoder.layers[1].parameters():
            parameter.data *= 0.9  # so that it is right sometimes only
        options = {"assistant_model": assistant}
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=12, **options)
    assert sequences.tolist() == greedily(model, inputs["input_ids"], 12).tolist()


def test_sampling_and_beams(model: ChatGLM2ForCausalLM, inputs: Any) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=12).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.generate(**inputs, do_sample=True, top_k=1, max_new_tokens=12).tolist() == (
        greedily(model, inputs["input_ids"], 12).tolist()
    )

    def logprob(sequence: torch.Tensor) -> float:
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            logs = model(sequence).logits.log_softmax(-1)[0]
        return float(sum(logs[i - 1, sequence[0, i]] for i in range(start, sequence.shape[1])))

    # As many beams as there are tokens search two steps without missing anything.
    beams = model.generate(**inputs, do_sample=False, num_beams=448, max_new_tokens=2, min_new_tokens=2)
    with torch.no_grad():
        first = model(inputs["input_ids"]).logits[0, -1].log_softmax(-1)
        pairs = torch.cat((inputs["input_ids"].repeat(448, 1), torch.arange(448)[:, None]), dim=1)
        second = model(pairs, logits_to_keep=1).logits[:, -1].log_softmax(-1)
    allowed = first[:, None] + second
    allowed[2], allowed[:, 2] = -torch.inf, -torch.inf
    assert logprob(beams) == pytest.approx(float(allowed.max()), abs=1e-4)


@pytest.mark.parametrize("by", ["name", "object"])
def test_text_generation_pipeline(model: ChatGLM2ForCausalLM, folder: Path, inputs: Any, by: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen: dict[str, Any] = (
        {"model": str(folder), "dtype": torch.float32} if by == "name" else {"model": model, "tokenizer": tokenizer}
    )
    generator = pipeline("text-generation", **chosen, device="cpu")
    found = generator("你好，今天", do_sample=False, max_new_tokens=8, return_full_text=False)
    ids = greedily(model, inputs["input_ids"], 8)[0, inputs["input_ids"].shape[1] :].tolist()
    assert found == [{"generated_text": tokenizer.decode(ids, skip_special_tokens=True)}]


# --- saving ---


@pytest.mark.parametrize("generation", [2, 3])
def test_saved_folders_are_official_ones(
    folders: dict[int, Path], tmp_path: Path, inputs: Any, generation: int
) -> None:
    source = folders[generation]
    model = AutoModel.from_pretrained(source)
    assert model.dtype == torch.float16
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(official.weights()) - {"transformer.rotary_pos_emb.inv_freq"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path))
    assert after["architectures"] == ["ChatGLMModel"]
    assert "auto_map" not in after
    kept = {
        key: value for key, value in before.items() if key not in ("auto_map", "_name_or_path", "transformers_version")
    }
    assert kept.items() <= after.items()
    with torch.no_grad():
        first, second = (one(**inputs).logits for one in (model, AutoModel.from_pretrained(tmp_path)))
    assert torch.equal(first, second)
    assert AutoTokenizer.from_pretrained(tmp_path).generation == generation
    assert glmkit.load(tmp_path).tokenizer.generation == generation
    assert not list(tmp_path.glob("*.py"))


# --- PEFT ---


def test_lora_finds_its_default_target(folder: Path, tmp_path: Path, inputs: Any) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = base(**inputs).logits
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(".query_key_value.lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        tuned = model(**inputs).logits
        assert (tuned - expected).abs().max() > 0.1
        model.save_pretrained(tmp_path)
        merged = model.merge_and_unload()
        assert type(merged) is ChatGLM2ForCausalLM
        torch.testing.assert_close(merged(**inputs).logits, tuned, atol=1e-5, rtol=1e-5)
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(peft.PeftModel.from_pretrained(fresh, tmp_path).eval()(**inputs).logits, tuned)


# --- sequence classification ---


def classifier(**changes: Any) -> ChatGLM2ForSequenceClassification:
    torch.manual_seed(0)
    config = ChatGLM2Config.from_dict(official.CONFIG | changes)
    model = ChatGLM2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier_head.weight)
    torch.nn.init.normal_(model.classifier_head.bias)
    return model


def test_sequence_classification_is_a_linear_head_on_the_last_position(tmp_path: Path) -> None:
    model = classifier(num_labels=3)
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    with torch.no_grad():
        output = model(ids, attention_mask=mask, position_ids=positions)
        x = model.transformer(ids, mask, positions, output_hidden_states=True).hidden_states[-1][:, -1]
        normed = (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.transformer.encoder.final_layernorm.weight
        )
        direct = normed @ model.classifier_head.weight.T + model.classifier_head.bias
        alone = model(ids[1:, 2:]).logits
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.logits, direct, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.logits[1:], alone, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ChatGLMForSequenceClassification"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again) is ChatGLM2ForSequenceClassification
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask, position_ids=positions).logits, output.logits)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("regression", torch.tensor([0.5, -1.0])),
        ("single_label_classification", torch.tensor([2, 0])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_sequence_classification_losses(problem_type: str, labels: torch.Tensor, told: bool) -> None:
    count = 1 if problem_type == "regression" else 3
    model = classifier(num_labels=count, problem_type=problem_type if told else None)
    with torch.no_grad():
        output = model(torch.tensor([[5, 6, 7], [8, 9, 10]]), labels=labels)
    z = output.logits.double()
    if problem_type == "regression":
        expected = (z[:, 0] - labels).square().mean()
    elif problem_type == "single_label_classification":
        expected = (z.exp().sum(-1).log() - z.gather(1, labels[:, None])[:, 0]).mean()
    else:
        p = 1 / (1 + (-z).exp())
        expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_new_head_may_be_missing_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert model.classifier_head.weight.shape == (5, 32)
    assert torch.isfinite(model.classifier_head.weight).all()
    official.write_folder(tmp_path / "cut", form="safetensors")
    state = official.weights()
    del state["transformer.embedding.word_embeddings.weight"]
    official.write_weights(tmp_path / "cut", state, "safetensors")
    with pytest.raises(glmkit.errors.CheckpointError, match="word_embeddings"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut")


def test_seq2seq_is_the_language_model(folder: Path) -> None:
    assert type(AutoModelForSeq2SeqLM.from_pretrained(folder)) is ChatGLM2ForCausalLM
