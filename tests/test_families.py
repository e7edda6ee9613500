"""What holds for every family: a tiny folder laid out as each official repository, and one test for each invariant."""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import glmkit
from glmkit import cli
from glmkit.engine.cache import new_cache
from glmkit.engine.decode import generate_batch, stream
from glmkit.engine.layout import layout_for
from glmkit.engine.probe import probe_logits
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import CheckpointError, ConfigError
from glmkit.export.constants import open_weights
from glmkit.families import FAMILIES as ROWS
from glmkit.quant.official import is_quantised_layer
from glmkit.terminal import printable
from glmkit.train.arguments import MethodBlock
from glmkit.train.methods import LoraMethod
from official_families import CANARY, FAMILIES, Family, stored_weights, write_family, write_weights

GREEDY = SamplingOptions(temperature=0)
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class Made:
    """A family's folder and what `glmkit.load` makes of it; no test changes them.

    Args:
        family: The row.
        config: Its config.
        folder: The official layout.
        loaded: The model in float32 and its tokenizer.
        saved: What their `save_pretrained` wrote.
    """

    family: Family
    config: dict[str, Any]
    folder: Path
    loaded: glmkit.Loaded
    saved: Path

    @property
    def standard(self) -> Path:
        """A folder that transformers can open."""
        return self.folder if self.family.is_folder else self.saved


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    family: Family = request.param
    root = tmp_path_factory.mktemp("family")
    config = write_family(root / "official", family)
    loaded = glmkit.load(root / "official", dtype="float32")
    loaded.model.save_pretrained(root / "saved")
    loaded.tokenizer.save_pretrained(root / "saved")
    yield Made(family, config, root / "official", loaded, root / "saved")
    assert not (root / "official" / CANARY).exists(), "python files of the checkpoint were run"


def prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a question, up to where the answer begins."""
    if tokenizer.generation == 0:
        return [*tokenizer.fill_prompt(text), tokenizer.get_command("sop")]
    ids: list[int] = tokenizer.encode(text)
    return ids


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, (B, T), and how many columns of padding each has, (B,)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([width - len(row) for row in rows])


@torch.no_grad()
def logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, T, V) of rows that are padded on the left, with the masks and positions of the model's own layout."""
    ids, pads = padded(rows)
    return model(ids, **layout_for(model, ids, pads).prompt(0, ids.shape[1])).logits.float()


def greedy(loaded: glmkit.Loaded, ids: Sequence[int], count: int = 8) -> list[int]:
    steps = stream(loaded.model, ids, GREEDY, stop_ids=loaded.tokenizer.stop_ids, max_new_tokens=count)
    return [step.token_id for step in steps]


def until_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """Cuts behind the first stop id; what follows there is padding."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[: end + 1])


# --- doors ---


def test_a_model_that_holds_one_block_at_a_time_computes_the_same(made: Made) -> None:
    with open_weights(made.folder) as weights:
        model = weights.model()
        found = probe_logits(model)
        blocks = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
        assert all(parameter.is_meta for parameter in blocks.parameters())
    assert torch.equal(found, probe_logits(made.loaded.model))


@pytest.mark.parametrize("trusted", [False, True])
def test_every_door_gives_the_same_logits_and_ids(made: Made, trusted: bool) -> None:
    """And no door runs the python files, which the fixture sees."""
    family, loaded = made.family, made.loaded
    assert (loaded.family.name if loaded.family else None) == family.row
    assert type(loaded.model) is family.network
    config = transformers.AutoConfig.from_pretrained(made.standard, trust_remote_code=trusted)
    assert type(config) is type(loaded.config)
    ids = torch.tensor([prompt(loaded.tokenizer, family.texts[0])])
    options = {"trust_remote_code": True} if trusted else {}
    with torch.no_grad():
        expected = loaded.model(ids).logits
        for kind in family.autos:
            auto = getattr(transformers, f"AutoModel{kind}")
            model = auto.from_pretrained(made.standard, dtype=torch.float32, **options).eval()
            assert torch.equal(model(ids).logits, expected), kind
    assert expected.abs().max() > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.standard, **options)
    assert type(tokenizer) is type(loaded.tokenizer)
    for text in family.texts:
        assert tokenizer.encode(text) == loaded.tokenizer.encode(text)
        assert prompt(tokenizer, text) == prompt(loaded.tokenizer, text)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("made", [f for f in FAMILIES if f.code == "glm"], ids=lambda f: f.name, indirect=True)
def test_the_other_heads_of_glm(made: Made, trusted: bool, tmp_path: Path) -> None:
    """Choosing between answers, by what the language model thinks of them; and classes, whose head is new."""
    options = {"trust_remote_code": True} if trusted else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder, **options)
    encoded = tokenizer([made.family.texts[0]], return_tensors="pt")
    inputs = tokenizer.build_inputs_for_multiple_choice(encoded, [["hello", "world"]])
    chooser = transformers.AutoModelForMultipleChoice.from_pretrained(made.folder, dtype=torch.float32, **options)
    with torch.no_grad():
        scores = chooser.eval()(**inputs).logits[0]
        plain = {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask")}
        logs = made.loaded.model(**plain).logits[0].log_softmax(-1)
    for score, ids, places in zip(scores, inputs["choice_ids"][0], inputs["choice_indices"][0]):
        expected = sum(logs[place, token] for place, token in zip(places, ids))
        torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)
    classes = transformers.AutoModelForSequenceClassification
    classifier = classes.from_pretrained(made.folder, num_labels=3, dtype=torch.float32, **options).eval()
    classifier.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GLMForSequenceClassification"]
    again = classes.from_pretrained(tmp_path, **options).eval()
    with torch.no_grad():
        found = classifier(**encoded).logits
        assert found.shape == (1, 3)
        assert torch.equal(again(**encoded).logits, found)
    assert torch.equal(again.glm.word_embeddings.weight, made.loaded.model.glm.word_embeddings.weight)


def test_a_saved_folder_is_an_official_one(made: Made) -> None:
    """Official tensors bit for bit, official class names, nothing that leads to code; and it loads again."""
    family = made.family
    stored = load_file(made.saved / "model.safetensors")
    expected = stored_weights(family, made.config)
    names = {name.removeprefix("glm.") for name in stored}
    assert names == {name for name in expected if not name.endswith("inv_freq")}
    assert all(torch.equal(tensor, expected[name.removeprefix("glm.")].float()) for name, tensor in stored.items())
    config = json.loads((made.saved / "config.json").read_text())
    assert config["architectures"] == [family.architectures]
    assert "auto_map" not in config
    assert config["model_type"] == made.config["model_type"]
    given = {name: value for name, value in made.config.items() if name in config}
    given |= {"architectures": config["architectures"], "torch_dtype": "float32"}
    given.pop("transformers_version", None)
    assert given.items() <= config.items()
    assert {"vocab_size", "padded_vocab_size"} & set(config)
    assert not list(made.saved.glob("*.py"))
    again = glmkit.load(made.saved)
    for text in family.texts:
        ids = prompt(again.tokenizer, text)
        assert ids == prompt(made.loaded.tokenizer, text)
        assert again.tokenizer.decode_ids(ids) == made.loaded.tokenizer.decode_ids(ids)
        assert torch.equal(logits(again.model, [ids]), logits(made.loaded.model, [ids]))
    ids = torch.tensor([prompt(again.tokenizer, family.texts[1])])
    with torch.no_grad():
        expected_logits = made.loaded.model(ids).logits
        for kind in family.autos:
            model = getattr(transformers, f"AutoModel{kind}").from_pretrained(made.saved).eval()
            assert torch.equal(model(ids).logits, expected_logits), kind
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.saved)
    assert prompt(tokenizer, family.texts[2]) == prompt(made.loaded.tokenizer, family.texts[2])


def test_saving_keeps_the_stored_numbers(made: Made, tmp_path: Path) -> None:
    """Loaded in its own dtype and saved, a checkpoint has the names, the bits and the class that it had."""
    model = transformers.AutoModel.from_pretrained(made.standard, dtype=made.family.dtype)
    model.save_pretrained(tmp_path)
    stored, expected = load_file(tmp_path / "model.safetensors"), stored_weights(made.family, made.config)
    assert set(stored) == {name for name in expected if not name.endswith("inv_freq")}
    assert all(torch.equal(tensor, expected[name].to(made.family.dtype)) for name, tensor in stored.items())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == made.config["architectures"]


# --- the same numbers in other ways ---


def test_cached_is_uncached(made: Made) -> None:
    model, tokenizer = made.loaded.model, made.loaded.tokenizer
    question, answer = prompt(tokenizer, made.family.texts[1]), [5, 9, 17, 6, 11]
    whole = logits(model, [question + answer])[:, len(question) - 1 :]
    ids, pads = padded([question])
    layout, cache = layout_for(model, ids, pads), new_cache(model, 1, 4)
    with torch.no_grad():
        steps = [model(ids, past_key_values=cache, use_cache=True, **layout.prompt(0, len(question))).logits[:, -1]]
        for token in answer:
            one = torch.tensor([[token]])
            steps.append(model(one, past_key_values=cache, use_cache=True, **layout.step()).logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_a_padded_row_is_what_it_is_alone(made: Made) -> None:
    model, tokenizer = made.loaded.model, made.loaded.tokenizer
    rows = [prompt(tokenizer, text) for text in made.family.texts]
    assert len({len(row) for row in rows}) == 3
    together = logits(model, rows)
    for row, found in zip(rows, together):
        torch.testing.assert_close(found[-len(row) :], logits(model, [row])[0], atol=1e-4, rtol=1e-4)
    answers = generate_batch(model, rows, GREEDY, stop_ids=tokenizer.stop_ids, max_new_tokens=8, batch_size=len(rows))
    alone = [[token for token in greedy(made.loaded, row) if token not in tokenizer.stop_ids] for row in rows]
    assert answers == alone
    assert sum(map(len, answers)) > 3


def _official_inputs(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """What the official README gives to `generate` for several texts at once."""
    if hasattr(tokenizer, "build_inputs_for_generation"):
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        return {**tokenizer.build_inputs_for_generation(encoded, max_gen_length=8)}
    if tokenizer.generation == 0:  # GLM-130B, whose README knows no `generate`
        ids, pads = padded([prompt(tokenizer, text) for text in texts])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= pads[:, None]).long()}
    return {**tokenizer(texts, return_tensors="pt", padding=True)}


def test_our_greedy_answer_is_that_of_generate(made: Made) -> None:
    loaded, tokenizer = made.loaded, made.loaded.tokenizer
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": sorted(tokenizer.stop_ids)}
    for text in made.family.texts:
        inputs = _official_inputs(tokenizer, [text])
        ids = inputs["input_ids"][0].tolist()
        found = loaded.model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)[0, len(ids) :]
        assert found.tolist() == greedy(loaded, ids)


def test_generate_takes_the_tokenizers_padding(made: Made) -> None:
    loaded, tokenizer, texts = made.loaded, made.loaded.tokenizer, list(made.family.texts)
    inputs = _official_inputs(tokenizer, texts)
    found = loaded.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=sorted(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    for text, row in zip(texts, found[:, inputs["input_ids"].shape[1] :].tolist()):
        ids = _official_inputs(tokenizer, [text])["input_ids"][0].tolist()
        assert until_stop(row, tokenizer.stop_ids) == greedy(loaded, ids)


def test_eager_is_sdpa(made: Made) -> None:
    rows = [prompt(made.loaded.tokenizer, text) for text in made.family.texts]
    eager = made.family.network.from_pretrained(made.standard, dtype=torch.float32, attn_implementation="eager").eval()
    assert eager.config._attn_implementation == "eager"
    if hasattr(made.loaded.config, "sop_token_id"):  # which loading takes from the tokenizer
        eager.config.sop_token_id = made.loaded.config.sop_token_id
        eager.config.mask_token_ids = made.loaded.config.mask_token_ids
    assert made.loaded.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(eager, rows), logits(made.loaded.model, rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.1)])
def test_half_precision_is_near(made: Made, dtype: str, tolerance: float) -> None:
    """The tolerances are three times what rounding was seen to do, as a share of the logits' norm."""
    half = glmkit.load(made.folder, dtype=dtype, kernels="torch")  # native steps round less, so near ties may differ
    for text in made.family.texts:
        ids = prompt(half.tokenizer, text)
        expected = logits(made.loaded.model, [ids])
        assert (logits(half.model, [ids]) - expected).norm() < tolerance * expected.norm()
        assert greedy(half, ids, 1) == [int(logits(half.model, [ids])[0, -1].argmax())]


# --- quantising ---


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_while_loading_is_quantised_after_it(made: Made, bits: int, tmp_path: Path) -> None:
    rows = [prompt(made.loaded.tokenizer, text) for text in made.family.texts]
    after = glmkit.load(made.folder).model
    for name, module in after.named_modules():
        if is_quantised_layer(name):  # the official scales depend on the dtype that is quantised: here the stored one
            module.to(made.family.dtype)
    after.quantize(bits)
    quantised = glmkit.load(made.folder, quantize=f"official-int{bits}", kernels="torch")
    expected = logits(after, rows)
    assert quantised.config.quantization_bit == bits
    assert torch.equal(logits(quantised.model, rows), expected)
    assert (logits(made.loaded.model, rows) - expected).abs().max() > 1e-4
    quantised.model.save_pretrained(tmp_path)
    quantised.tokenizer.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith(".weight_scale") for name in stored) == 2 * len(LINEARS)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == bits
    assert torch.equal(logits(glmkit.load(tmp_path, kernels="torch").model, rows), expected)
    auto = made.family.network.from_pretrained(tmp_path, dtype=after.dtype)
    ids = torch.tensor([rows[0]])
    with torch.no_grad():
        assert torch.equal(auto(ids).logits, after(ids).logits)


# --- training ---


def test_lora_begins_as_the_base_and_ends_as_what_it_learnt(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    rows = [prompt(made.loaded.tokenizer, text) for text in made.family.texts]
    base = glmkit.load(made.folder, dtype="float32")
    method = LoraMethod(MethodBlock(name="lora", r=2, target_modules=["query_key_value", "dense"]))
    wrapped = method.prepare(base.model).eval()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    expected = logits(made.loaded.model, rows)
    assert torch.equal(logits(base.model, rows), expected)
    torch.manual_seed(0)
    for name, parameter in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    learnt = logits(base.model, rows)
    assert (learnt - expected).abs().max() > 0.01
    method.save(wrapped, base.tokenizer, tmp_path)
    again = glmkit.load(made.folder, adapter=tmp_path, dtype="float32")
    torch.testing.assert_close(logits(again.model, rows), learnt, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize(
    "made", [f for f in FAMILIES if f.network.__name__.startswith("ChatGLM")], ids=lambda f: f.name, indirect=True
)
def test_a_prefix_beside_the_base_is_a_prefix_in_the_model(made: Made, projects: bool, tmp_path: Path) -> None:
    """P-Tuning v2, through both doors; a padded row is what it is alone here, too."""
    config = transformers.AutoConfig.from_pretrained(made.folder, pre_seq_len=3, prefix_projection=projects)
    model = transformers.AutoModel.from_pretrained(made.folder, config=config, dtype=torch.float32).eval()
    learnt = {name: tensor for name, tensor in model.state_dict().items() if ".prefix_encoder." in name}
    assert len(learnt) == (5 if projects else 1)
    torch.manual_seed(0)
    for tensor in learnt.values():
        tensor.normal_(std=0.5)
    torch.save(learnt, tmp_path / "pytorch_model.bin")
    tuned = glmkit.load(made.folder, adapter=tmp_path, dtype="float32")
    rows = [prompt(tuned.tokenizer, text) for text in made.family.texts]
    found = logits(tuned.model, rows)
    assert torch.equal(found, logits(model, rows))
    assert (found - logits(made.loaded.model, rows)).abs().max() > 0.1
    for row, together in zip(rows, found):
        torch.testing.assert_close(together[-len(row) :], logits(model, [row])[0], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(made: Made) -> None:
    tokenizer = made.loaded.tokenizer
    question, answer = prompt(tokenizer, made.family.texts[1]), [5, 9, 17, 6, 11]
    ids = torch.tensor([question + answer])
    labels = torch.full_like(ids, -100)
    labels[0, len(question) :] = torch.tensor(answer)
    layout = layout_for(made.loaded.model, ids, torch.zeros(1, dtype=torch.int64)).prompt(0, ids.shape[1])

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = copy.deepcopy(made.loaded.model).train().requires_grad_(True)
        runs: list[str] = []
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # GLM has dropout
        loss, count = model.label_loss(ids, labels, **layout)
        assert count == len(answer)
        loss.backward()
        assert len(runs) == 2 * (2 if checkpointing else 1)  # layers, each again in the backward pass
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() == dict(made.loaded.model.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())


# --- the command ---


@pytest.fixture
def no_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_inspect_describes_the_folder(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli.run(["inspect", str(made.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    if made.family.row:  # by its name it is the same
        (tmp_path / made.family.row).symlink_to(made.folder)
        monkeypatch.setenv("GLMKIT_MODELS", str(tmp_path))
        assert cli.run(["inspect", made.family.row, "--json"]) == 0
        named = json.loads(capsys.readouterr().out)
        # The config then says what the name means: the generation, and what rope_ratio does.
        assert {name for name in found if found[name] != named[name]} <= {"name", "source", "config"}
    model = made.loaded.model
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["family"] == made.family.row
    assert found["network"] == type(model.config).__name__.removesuffix("Config")
    assert str(made.family.dtype).removeprefix("torch.") in found["dtypes"]
    cache = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim * 2  # K and V, layers, two bytes
    assert found["memory_bytes"]["float16"]["kv_cache"] == cache * model.config.max_position_embeddings
    assert found["memory_bytes"]["float16"]["weights"] == 2 * found["parameters"]


@pytest.mark.usefixtures("no_input")
def test_the_command_answers(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    text = made.family.texts[1]
    arguments = ["chat", str(made.folder), "-p", text, "--max-tokens", "8", "--temperature", "0", "--json"]
    assert cli.run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usage"]["completion_tokens"] > 0
    if made.family.fills:
        before, after = text.split("[MASK]")
        assert found["text"] == before + found["fillings"][0] + after
    assert cli.run([argument for argument in arguments if argument != "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == printable(found["text"]).strip()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_inspect_knows_every_name(
    row: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLMKIT_MODELS", str(tmp_path))
    assert cli.run(["inspect", row.name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == row.name
    assert found["licence"] == row.licence
    assert found["parameters"] > 10**6


# --- damage ---


def test_damaged_copies_are_refused_naming_the_tensors(made: Made, tmp_path: Path) -> None:
    family = made.family
    state = stored_weights(family, made.config)
    missing = next(name for name in state if name.endswith(".1.mlp.dense_4h_to_h.weight"))
    misshapen = next(name for name in state if name.endswith(".0.post_attention_layernorm.weight"))
    del state[missing]
    state[misshapen] = state[misshapen][:-2].contiguous()
    damaged = tmp_path / "damaged"
    shutil.copytree(
        made.folder, damaged, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.index.json")
    )
    write_weights(damaged, family, state)
    doors = [glmkit.load]
    if family.is_folder:
        doors += [getattr(transformers, f"AutoModel{kind}").from_pretrained for kind in family.autos]
    for door in doors:
        with pytest.raises(CheckpointError) as caught:
            door(damaged)
        assert missing in str(caught.value)
        assert misshapen in str(caught.value)


def test_glm130bs_config_and_tokenizer_must_agree(tmp_path: Path) -> None:
    """A release without a config.json takes its ids from the tokenizer, as the rows above do."""
    config = write_family(tmp_path, next(family for family in FAMILIES if family.name == "glm-130b"))
    changed = config | {"mask_token_id": config["mask_token_id"] + 1, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(
        ConfigError, match=f"mask_token_id is {changed['mask_token_id']}, not {config['mask_token_id']}"
    ):
        glmkit.load(tmp_path)
