"""ChatGLM-6B against stored results of the official code, through the Auto classes and the loader."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import glmkit
from glmkit.engine.decode import generate_batch, stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import CheckpointError, ConfigError, UsageError
from glmkit.models.chatglm import ChatGLMForCausalLM, ChatGLMModel, _rotate
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.quant.linear import QuantizedLinear, dequantize
from official_results import ATOL, Case, score

FIXTURES = Path(__file__).parent / "fixtures"
FORWARD = (
    "single",
    "mask_token",
    "mask_and_gmask",
    "mask_and_gmask_tokenizer_rule",
    "long",
    "batch_left_pad",
    "batch_left_pad_with_answers",
    "batch_left_pad_ids_only",
    "train",
)
GREEDY = SamplingOptions(temperature=0)


@pytest.fixture(scope="module")
def case(shared: Path) -> Case:
    return Case(shared / "conformance" / "chatglm")


@pytest.mark.parametrize("name", FORWARD)
def test_forward(case: Case, name: str) -> None:
    with torch.no_grad():
        output = case.model(**case.inputs(name), output_hidden_states=True)
    case.close(name, output.logits)
    logsumexp = output.logits.logsumexp(-1).numpy()
    np.testing.assert_allclose(logsumexp, case.arrays[f"{name}.logsumexp"], atol=ATOL, rtol=0)
    np.testing.assert_array_equal(output.logits.argmax(-1).numpy(), case.arrays[f"{name}.argmax"])
    if name == "train":
        assert float(output.loss) == pytest.approx(case.manifest["cases"]["train"]["loss"], abs=ATOL)
    if name == "single":
        states = torch.stack(output.hidden_states).numpy()
        np.testing.assert_allclose(states, case.arrays["single.hidden_states"], atol=ATOL, rtol=0)
        np.testing.assert_allclose(output.logits[0, -1].numpy(), case.arrays["single.logits_full_last"][0], atol=ATOL)
        for layer in range(2):  # the official cache is sequence-first
            cached = output.past_key_values.layers[layer]
            for mine, theirs in ((cached.keys, "k"), (cached.values, "v")):
                stored = case.arrays[f"single.cache.{layer}.{theirs}"]
                np.testing.assert_allclose(mine.permute(2, 0, 1, 3).numpy(), stored, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["single", "mask_and_gmask", "long"])
def test_positions_and_masks_worked_out_from_ids(case: Case, name: str) -> None:
    network, ids = case.model.transformer, case.inputs(name)["input_ids"]
    np.testing.assert_array_equal(network.positions(ids).numpy(), case.arrays[f"{name}.official_position_ids"])
    layout = case.model.input_layout(ids, torch.zeros(1, dtype=torch.int64)).prompt(0, ids.shape[1])
    np.testing.assert_array_equal(layout["attention_mask"].numpy(), case.arrays[f"{name}.official_masks"])
    np.testing.assert_array_equal(layout["position_ids"].numpy(), case.arrays[f"{name}.official_position_ids"])


@pytest.mark.parametrize("name", ["single", "batch_left_pad", "train"])
def test_eager_attention_computes_the_same(shared: Path, name: str) -> None:
    case = Case(shared / "conformance" / "chatglm", attn_implementation="eager")
    with torch.no_grad():
        case.close(name, case.model(**case.inputs(name)).logits)


def test_masks_of_other_types_are_not_looked_at(case: Case) -> None:
    """As in the official code: an integer mask is dropped, and padding counts as context."""
    ids = case.inputs("batch_left_pad_ids_only")["input_ids"]
    with torch.no_grad():
        logits = case.model(ids, attention_mask=(ids != 3).long()).logits
    case.close("batch_left_pad_ids_only", logits)


def incremental(case: Case, name: str) -> None:
    """Prefill, then greedy steps, with the arguments that generate makes; they are the stored ones of the official."""
    inputs = case.inputs(name)
    ids, cache, logits = inputs.pop("input_ids"), None, []
    start = ids.shape[1]
    for step in range(case.arrays[f"{name}.tokens"].shape[1]):
        prepared = case.model.prepare_inputs_for_generation(ids, past_key_values=cache, use_cache=True, **inputs)
        assert prepared["input_ids"].shape[1] == (1 if cache is not None else start)
        for argument in ("input_ids", "position_ids", "attention_mask"):
            stored = f"{name}.step{step}.model_{argument}"
            if stored in case.arrays:
                np.testing.assert_array_equal(prepared[argument].numpy(), case.arrays[stored])
        with torch.no_grad():
            output = case.model(**prepared)
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
    np.testing.assert_array_equal(ids[:, start:].numpy(), case.arrays[f"{name}.tokens"])
    case.close(name, torch.stack(logits, dim=1))


@pytest.mark.parametrize("name", ["incremental", "incremental_batch_left_pad"])
def test_incremental_decoding(case: Case, name: str) -> None:
    incremental(case, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True, "top_k": 1},
    ],
)
@pytest.mark.parametrize("name", ["greedy24", "greedy24_batch_left_pad"])
def test_generate_greedily(case: Case, name: str, options: dict[str, Any]) -> None:
    if "batch" in name and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers looks up prompts in a single row")
    sequences = case.model.generate(**case.inputs(name), **({"do_sample": False, "max_new_tokens": 24} | options))
    np.testing.assert_array_equal(sequences.numpy(), case.arrays[f"{name}.sequences"])


def test_generate_without_the_tokenizers_masks(case: Case) -> None:
    """Masks and positions of other models, which transformers makes too, are not looked at; padding is context."""
    ids = case.inputs("greedy24_batch_left_pad")["input_ids"]
    plain = case.model.generate(ids, do_sample=False, max_new_tokens=6)
    other = {"attention_mask": (ids != 3).long(), "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    assert torch.equal(case.model.generate(ids, **other, do_sample=False, max_new_tokens=6), plain)
    for step in range(ids.shape[1], plain.shape[1]):
        with torch.no_grad():
            logits = case.model(plain[:, :step]).logits[:, -1]
        unfinished = plain[:, step] != 3
        assert torch.equal(logits.argmax(-1)[unfinished], plain[:, step][unfinished])


def test_generate_with_beams(case: Case) -> None:
    """Positions go on rightly in every beam: the best sequence is the stored one, or scores no worse."""
    found = case.model.generate(**case.inputs("beam4"), do_sample=False, max_new_tokens=24, num_beams=4)
    stored = torch.from_numpy(case.arrays["beam4.sequences"])
    prompt = case.inputs("beam4")["input_ids"].shape[1]
    assert score(case.model, found, prompt, 130005) >= score(case.model, stored, prompt, 130005) - 1e-4


def test_beams_of_a_padded_batch_are_those_of_each_row(case: Case) -> None:
    inputs = case.inputs("greedy24_batch_left_pad")
    options = {"do_sample": False, "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    together = case.model.generate(**inputs, **options, **scores).sequences_scores.view(-1, 2)
    for row, found in zip(inputs["input_ids"], together):
        alone = case.model.generate(row[row != 3][None], **options, **scores).sequences_scores
        torch.testing.assert_close(found, alone, atol=ATOL, rtol=0)


def test_our_loop_is_generate(case: Case) -> None:
    """One stream, and a batch whose rows have different lengths; a padded row gives what it gives alone."""
    ids = case.inputs("greedy24")["input_ids"][0].tolist()
    stored = case.arrays["greedy24.sequences"][0, len(ids) :].tolist()
    steps = list(stream(case.model, ids, GREEDY, stop_ids={130005}, max_new_tokens=24, prefill_chunk_tokens=4))
    assert [step.token_id for step in steps] == stored[: len(steps)]
    assert len(steps) == 24 or steps[-1].token_id == 130005
    inputs = case.inputs("greedy24_batch_left_pad")
    prompts = [[token for token in row if token != 3] for row in inputs["input_ids"].tolist()]
    answers = generate_batch(case.model, prompts, GREEDY, stop_ids={130005}, max_new_tokens=24, batch_size=3)
    width = inputs["input_ids"].shape[1]
    for row, answer in enumerate(answers):
        expected = case.arrays["greedy24_batch_left_pad.sequences"][row, width:].tolist()
        assert answer == (expected[: expected.index(130005)] if 130005 in expected else expected)


def test_a_prompt_is_not_continued_behind_a_cache(case: Case) -> None:
    ids = case.inputs("single")["input_ids"]
    with torch.no_grad():
        cache = case.model(ids).past_key_values
    with pytest.raises(UsageError, match="both directions"):
        stream(case.model, ids[0].tolist(), GREEDY, stop_ids=(), max_new_tokens=1, cache=cache)
    with pytest.raises(UsageError, match="position_ids"):
        case.model(ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"attention_mask": torch.zeros(3, 1, 5, 5, dtype=torch.bool)}, r"attention_mask has the shape \[3, 1, 5, 5\]"),
        ({"position_ids": torch.zeros(3, 16, dtype=torch.int64)}, r"position_ids has .* expected \[3, 2, 16\]"),
    ],
)
def test_masks_and_positions_that_do_not_fit(case: Case, given: dict[str, torch.Tensor], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        case.model(case.inputs("batch_left_pad")["input_ids"], **given)


def test_a_row_without_mask_or_start_is_named(case: Case) -> None:
    ids = case.inputs("batch_left_pad_ids_only")["input_ids"].clone()
    ids[1][ids[1] == 130001] = 5
    with pytest.raises(UsageError, match=r"row 1 .* no mask token: expected one of the ids 130001, 130000"):
        case.model(ids)
    ids[2][ids[2] == 130004] = 5
    with pytest.raises(UsageError, match=r"row 2 .* no start of an answer \(id 130004\)"):
        case.model(ids)


def test_gradients_and_sgd(shared: Path, case: Case) -> None:
    """Gradient norms and the losses over plain SGD steps; activation checkpointing must change neither."""
    manifest, folder = case.manifest["gradients"], shared / "conformance" / "chatglm" / "model"
    for checkpointing in (False, True):
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = []
        for step in range(4):
            loss = model(**case.inputs("train")).loss
            losses.append(loss.item())
            model.zero_grad()
            loss.backward()
            if step == 0:
                for name, norm in manifest["grad_norms"].items():
                    gradient = model.get_parameter(name).grad
                    assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
                    if f"grad.{name}" in case.arrays:
                        np.testing.assert_allclose(gradient.numpy(), case.arrays[f"grad.{name}"], atol=1e-5, rtol=0)
                rows = case.arrays["grad_rows.transformer.word_embeddings.weight.rows"]
                stored = case.arrays["grad_rows.transformer.word_embeddings.weight"]
                both_uses = model.transformer.word_embeddings.weight.grad[rows].numpy()
                np.testing.assert_allclose(both_uses, stored, atol=1e-5, rtol=0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        np.testing.assert_allclose(losses, manifest["losses_over_plain_sgd_lr0.1"], rtol=1e-3, atol=1e-3)


def test_label_loss_is_the_loss(case: Case) -> None:
    inputs = case.inputs("train")
    with torch.no_grad():
        total, targets = case.model.label_loss(inputs["input_ids"], inputs["labels"])
    assert targets == int((inputs["labels"][:, 1:] != -100).sum())
    assert float(total) / targets == pytest.approx(case.manifest["cases"]["train"]["loss"], abs=ATOL)


@pytest.mark.parametrize("kind", ["ptuning_emb", "ptuning_proj"])
def test_p_tuning(shared: Path, tmp_path: Path, kind: str) -> None:
    """The official recipe: the config says how long the prefix is, its tensors are loaded into `prefix_encoder`."""
    folder = shared / "conformance" / "chatglm"
    length = json.loads((folder / kind / "config.json").read_text())["pre_seq_len"]
    config = AutoConfig.from_pretrained(folder / "model", pre_seq_len=length, prefix_projection=kind == "ptuning_proj")
    case = Case(folder, config=config)
    model = case.model
    state = torch.load(folder / kind / "pytorch_model.bin", weights_only=True)
    start = "transformer.prefix_encoder."
    model.transformer.prefix_encoder.load_state_dict({k[len(start) :]: v.float() for k, v in state.items()})
    for layer, (keys, values) in enumerate(model.transformer.prefix_encoder(1)):
        stored = case.arrays[f"{kind}.prefix_past_key_values"][layer]  # (2, P, B, H, D)
        np.testing.assert_allclose(keys.detach().permute(2, 0, 1, 3).numpy(), stored[0], atol=ATOL)
        np.testing.assert_allclose(values.detach().permute(2, 0, 1, 3).numpy(), stored[1], atol=ATOL)
    for name in ("single", "batch_left_pad", "train"):
        with torch.no_grad():
            case.close(f"{kind}.{name}", model(**case.inputs(f"{kind}.{name}")).logits)
    incremental(case, f"{kind}.incremental")
    name = f"{kind}.greedy24_batch_left_pad"
    sequences = model.generate(**case.inputs(name), do_sample=False, max_new_tokens=24)
    np.testing.assert_array_equal(sequences.numpy(), case.arrays[f"{name}.sequences"])

    facts = case.manifest[kind]
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(facts["requires_grad"])
    loss = model(**case.inputs(f"{kind}.train")).loss
    assert loss.item() == pytest.approx(facts["loss"], abs=ATOL)
    loss.backward()
    for parameter, norm in facts["grad_norms"].items():
        gradient = model.get_parameter(parameter).grad
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3), parameter
        np.testing.assert_allclose(gradient.numpy(), case.arrays[f"{kind}.grad.{parameter}"], atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    after = model(**case.inputs(f"{kind}.train")).loss
    assert after.item() == pytest.approx(facts["loss_after_one_sgd_step_lr0.1_on_all_grad_params"], abs=ATOL)

    loaded = glmkit.load(folder / "model", adapter=folder / kind, dtype="float32").model
    with torch.no_grad():
        case.close(f"{kind}.single", loaded(**case.inputs(f"{kind}.single")).logits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(shared: Path, dtype: str) -> None:
    """Our logits in half precision must lie as near to float32 as the official ones do, or nearer."""
    folder = shared / "conformance" / "chatglm"
    official = json.loads((folder / "half_manifest.json").read_text())["max_abs_diff_vs_float32"]
    case = Case(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).eval()
    for name in ("single", "long", "batch_left_pad"):
        with torch.no_grad():
            logits = model(**case.inputs(name)).logits.float()[..., case.arrays["vocab_subset"]].numpy()
        error = np.abs(logits - case.arrays[f"{name}.logits"]).max()
        assert error <= 1.5 * official[f"{dtype}.{name}"] + 0.01, (name, error)


def test_rotary_of_all_stored_sizes(shared: Path) -> None:
    check_rotary(np.load(shared / "conformance" / "rotary" / "arrays.npz"))


# --- without shared/ ---


def check_rotary(arrays: Any) -> None:
    """Angles from frequencies in float16, also at far positions; the two halves of a head turn by a position each."""
    tiny = {"num_layers": 1, "num_attention_heads": 1, "vocab_size": 130_528, "inner_hidden_size": 8}
    checked = 0
    for name in sorted({key.rsplit(".", 1)[0] for key in arrays.files if key.startswith("v1.")}):
        width = int(name.partition("head_dim")[2].partition(".")[0])
        with torch.device("meta"):
            model = ChatGLMModel(ChatGLMConfig(hidden_size=width, **tiny))
        if name.startswith("v1.rotated"):
            rows = [torch.from_numpy(arrays[f"{name}.{row}"]) for row in ("position_ids", "block_position_ids")]
            rotary = model.rotary(torch.stack(rows, dim=1), torch.float32)
            for part in ("q", "k"):
                x = torch.from_numpy(arrays[f"{name}.{part}"]).transpose(0, 1)  # the official one is sequence-first
                turned = _rotate(x, rotary).transpose(0, 1).numpy()
                np.testing.assert_allclose(turned, arrays[f"{name}.{part}_rotated"], atol=1e-5, rtol=0)
        elif name.endswith("float32"):
            positions = torch.from_numpy(arrays[f"{name}.positions"])
            angles = model.rotary(torch.stack((positions, positions))[None], torch.float32)
            for cos, sin in angles:
                for mine, theirs in ((cos, "cos"), (sin, "sin")):
                    stored = arrays[f"{name}.{theirs}"]  # the angles twice
                    np.testing.assert_allclose(torch.cat((mine, mine), -1)[0].numpy(), stored, atol=1e-6, rtol=0)
        checked += 1
    assert checked >= 3


def test_rotary() -> None:
    check_rotary(np.load(FIXTURES / "rotary" / "chatglm.npz"))


@pytest.mark.parametrize("name", ["base", "pos1d"])
def test_config_switches(name: str) -> None:
    arrays = np.load(FIXTURES / "config_switches" / "arrays.npz")
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto.from_pretrained(FIXTURES / "config_switches" / f"chatglm-{name}", dtype=torch.float32).eval()
        assert type(model) is ChatGLMForCausalLM
        with torch.no_grad():
            logits = model(torch.from_numpy(arrays[f"chatglm-{name}.input_ids"])).logits
        np.testing.assert_allclose(logits.numpy(), arrays[f"chatglm-{name}.logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["base", "pos1d"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    """What is saved has the official names, the one table under both of them, and loads again through both doors."""
    folder = FIXTURES / "config_switches" / f"chatglm-{name}"
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["ChatGLMModel"]
    assert config["inner_hidden_size"] == first.config.inner_hidden_size
    stored, official = load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(stored) == {tensor for tensor in official if not tensor.endswith("rotary_emb.inv_freq")}
    assert all(torch.equal(tensor, official[of].float()) for of, tensor in stored.items())
    ids = torch.from_numpy(np.load(FIXTURES / "config_switches" / "arrays.npz")[f"chatglm-{name}.input_ids"])
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval(),
        glmkit.load(tmp_path / "saved").model,
        glmkit.load(folder, dtype="float32").model,
    ):
        assert again.lm_head.weight is again.transformer.word_embeddings.weight
        with torch.no_grad():
            assert torch.equal(again(ids).logits, first(ids).logits)


def sizes(**changes: Any) -> dict[str, Any]:
    small = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 32}
    return {"model_type": "chatglm", "position_encoding_2d": True, **small, **changes}


def test_both_vocabularies() -> None:
    """Ids that config.json leaves out are those of its vocabulary, never the stale defaults of the official class."""
    new, old = (ChatGLMConfig.from_dict(sizes(vocab_size=rows)) for rows in (130_528, 150_528))
    assert (new.bos_token_id, new.gmask_token_id, new.pad_token_id) == (130_004, 130_001, 3)
    assert (old.bos_token_id, old.gmask_token_id, old.pad_token_id) == (150_004, 150_001, 20_003)
    for changes, problem in (
        ({"vocab_size": 130_528, "bos_token_id": 150_004}, r"bos_token_id=150004 .* vocabulary of 150,528"),
        ({"vocab_size": 150_528, "gmask_token_id": 130_001}, r"gmask_token_id=130001 is that of .* 130,528"),
        ({"vocab_size": 1_000}, "bos_token_id is missing, and no released vocabulary has 1000 rows"),
        ({"vocab_size": 1_000, "mask_token_id": 7, "gmask_token_id": 8, "bos_token_id": 9, "eos_token_id": 1_000,
          "pad_token_id": 3}, "eos_token_id=1000 lies outside"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=problem):
            ChatGLMConfig.from_dict(sizes(**changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 17),
        ("num_attention_heads", 16),
        ("tie_word_embeddings", False),
        ("quantization_bit", 3),
        ("quantization_embeddings", True),
        ("pre_seq_len", -1),
        ("num_layers", 10**6),
        ("layernorm_epsilon", 0),
        ("rope_ratio", 2),
    ],
)
def test_config_values_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="config cannot be loaded"):
        ChatGLMConfig.from_dict(sizes(vocab_size=130_528, **{field: value}))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_official_quantised_checkpoint(shared: Path, bits: int) -> None:
    folder = shared / "conformance" / "quantization" / f"chatglm-int{bits}"
    arrays = np.load(shared / "conformance" / "quantization" / "arrays.npz")
    name = f"chatglm-int{bits}"
    for model in (AutoModel.from_pretrained(folder, dtype=torch.float32), glmkit.load(folder, dtype="float32").model):
        assert isinstance(model.transformer.layers[0].attention.dense, QuantizedLinear)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(arrays[f"{name}.input_ids"])).logits
        np.testing.assert_allclose(logits.numpy(), arrays[f"{name}.logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("embeddings", [False, True])
def test_quantise_save_and_load_again(tmp_path: Path, bits: int, embeddings: bool) -> None:
    """`.quantize` on a loaded model; with the embedding too, the output layer is the same packed table."""
    folder = FIXTURES / "config_switches" / "chatglm-base"
    ids = torch.from_numpy(np.load(FIXTURES / "config_switches" / "arrays.npz")["chatglm-base.input_ids"])
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModel.from_pretrained(folder, dtype=torch.float16).quantize(bits, embeddings).float().eval()
    with torch.no_grad():
        logits = model(ids).logits
    if embeddings:
        table = model.transformer.word_embeddings
        assert model.lm_head.weight is table.weight
        assert table.weight.dtype == torch.int8
        by_hand = dequantize(table.weight, table.weight_scale.half(), bits).float()
        assert torch.equal(table(ids), by_hand[ids])
    # The weights are those of the plain model rounded to the grid, so it must compute the same with them.
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear) and name != "lm_head":
                plain.get_submodule(name).weight.copy_(module.dequantize())
        if embeddings:
            plain.transformer.word_embeddings.weight.copy_(by_hand)
        np.testing.assert_allclose(plain(ids).logits.numpy(), logits.numpy(), atol=2e-3, rtol=0)
    model.half().save_pretrained(tmp_path / "saved")
    again = glmkit.load(tmp_path / "saved", dtype="float32").model
    with torch.no_grad():
        np.testing.assert_allclose(again(ids).logits.numpy(), logits.numpy(), atol=2e-3, rtol=0)
    if not embeddings:
        loading = glmkit.load(folder, dtype="float32", quantize=f"official-int{bits}").model
        for name in loading.state_dict():
            if name.endswith(".weight_scale"):
                owner = name.removesuffix("_scale")
                assert torch.equal(loading.state_dict()[owner], again.state_dict()[owner])


def test_a_folder_with_one_table_loads_too(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(FIXTURES / "config_switches" / "chatglm-base", folder)
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = glmkit.load(folder).model
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_a_second_table_of_other_sizes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(FIXTURES / "config_switches" / "chatglm-base", folder)
    state = load_file(folder / "model.safetensors")
    rows, width = state["transformer.word_embeddings.weight"].shape
    state["lm_head.weight"] = torch.ones(rows, width)  # as large as the table: not read
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = glmkit.load(folder, dtype="float32").model
    assert torch.equal(model.lm_head.weight, state["transformer.word_embeddings.weight"].float())
    for shape, message in (
        ((rows + 8, width), f"lm_head.weight has a vocabulary of {rows + 8} rows, config.json says {rows}"),
        ((rows, width - 2), f"tensor lm_head.weight has shape [{rows}, {width - 2}], expected [{rows}, {width}]"),
    ):
        state["lm_head.weight"] = torch.ones(shape)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=re.escape(message)):
            glmkit.load(folder)


# --- invariants ---


def a_model(name: str = "base", **kwargs: Any) -> ChatGLMForCausalLM:
    folder = FIXTURES / "config_switches" / f"chatglm-{name}"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


# Of the small vocabulary: [MASK] 300, [gMASK] 301, <sop> 304, <eop> 305, padding 3.
ROWS = ([11, 12, 301, 304, 13, 14], [300, 15, 16, 17, 18, 304, 19], [20, 301, 304], [21, 300, 22, 301, 23, 304, 24, 25])


def padded(rows: Any = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    return torch.tensor([[3] * (width - len(row)) + row for row in rows]), torch.tensor([width - len(r) for r in rows])


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["base", "pos1d"])
def test_padded_batch_is_each_row_alone_and_cached_is_uncached(name: str, back_end: str) -> None:
    model = a_model(name, attn_implementation=back_end)
    ids, pads = padded()
    further = torch.randint(10, 290, (len(ids), 5), generator=torch.Generator().manual_seed(0))
    layout = model.input_layout(ids, pads)
    width = ids.shape[1]
    with torch.no_grad():
        output = model(ids, **layout.prompt(0, width), use_cache=True)
        pieces = [output.logits]
        for step in range(5):
            last = model(further[:, step : step + 1], **layout.step(), past_key_values=output.past_key_values)
            pieces.append(last.logits)
        together = torch.cat(pieces, dim=1)
        for row, pad, more, found in zip(ROWS, pads.tolist(), further.tolist(), together):
            alone = model(torch.tensor([row + more])).logits[0]
            torch.testing.assert_close(found[pad:], alone, atol=ATOL, rtol=0)
    assert together.isfinite().all()


@pytest.mark.parametrize("name", ["base", "pos1d"])
def test_generate_is_one_forward_pass_per_token(name: str) -> None:
    """With and without a cache, with the positions worked out or given, the next token is that of the whole row."""
    model = a_model(name)
    for row in ROWS:
        expected = list(row)
        for _ in range(8):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            if expected[-1] == 305:
                break
        ids = torch.tensor([row])
        given = model.input_layout(ids, torch.tensor([0])).prompt(0, len(row))
        for options in ({}, {"use_cache": False}, given, {"cache_implementation": "static"}):
            found = model.generate(ids, do_sample=False, max_new_tokens=8, **options)
            assert found[0].tolist() == expected


def test_back_ends_and_checkpointing_have_the_same_gradients() -> None:
    """Also where rows of padding see nothing: nothing is NaN."""
    ids, pads = padded()
    labels = torch.where(ids == 3, -100, ids)
    gradients = []
    for options, checkpointing in (({}, False), ({"attn_implementation": "eager"}, False), ({}, True)):
        model = a_model(**options).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, **model.input_layout(ids, pads).prompt(0, ids.shape[1]), labels=labels).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-4)


def test_logits_of_some_positions_and_the_loss_of_labels() -> None:
    model = a_model()
    ids = torch.tensor([ROWS[0]])
    labels = torch.tensor([[-100, -100, -100, -100, 13, 14]])
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
        by_hand = torch.nn.functional.cross_entropy(whole[0, 3:5], labels[0, 4:], reduction="sum")
        total, targets = model.label_loss(ids, labels)
        torch.testing.assert_close(total, by_hand)
        assert targets == 2
        torch.testing.assert_close(model(ids, labels=labels).loss, by_hand / 2)
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=8).loss, by_hand / 8)
        torch.testing.assert_close(
            model(None, inputs_embeds=model.get_input_embeddings()(ids), **given(model, ids)).logits, whole
        )


def given(model: ChatGLMForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return model.input_layout(ids, torch.zeros(len(ids), dtype=torch.int64)).prompt(0, ids.shape[1])


def test_a_model_of_the_older_vocabulary_is_the_same_behind_its_pictures() -> None:
    """20,000 rows more in front: the same text has ids that are 20,000 higher, and the same logits there."""
    torch.manual_seed(0)
    new, old = (ChatGLMForCausalLM(ChatGLMConfig.from_dict(sizes(vocab_size=n))).eval() for n in (130_528, 150_528))
    state = {name: torch.randn_like(tensor) * 0.1 for name, tensor in new.state_dict().items()}
    table = state.pop("lm_head.weight")
    state["transformer.word_embeddings.weight"] = table
    new.load_state_dict(state, strict=False)
    old.load_state_dict(
        state | {"transformer.word_embeddings.weight": torch.cat((torch.zeros(20_000, 16), table))}, False
    )
    ids = torch.tensor([[5, 74874, 130_001, 130_004, 77, 78]])
    with torch.no_grad():
        torch.testing.assert_close(old(ids + 20_000).logits[..., 20_000:], new(ids).logits)


@pytest.mark.parametrize("left", ["both names", "the table alone"])
def test_a_quantised_table_may_be_stored_once_or_twice(tmp_path: Path, left: str) -> None:
    model = AutoModel.from_pretrained(FIXTURES / "config_switches" / "chatglm-base", dtype=torch.float16)
    model.quantize(4).quantize(4, True)  # the table may follow; what is quantised stays as it is
    model.quantize(4, True).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    tied = {"lm_head.weight", "lm_head.weight_scale"}
    assert tied <= set(state)
    assert state["lm_head.weight"].dtype == torch.int8
    if left == "the table alone":
        kept = {name: tensor for name, tensor in state.items() if name not in tied}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([ROWS[0]])
    again_by_load = glmkit.load(tmp_path, dtype="float16", kernels="torch").model
    for again in (AutoModel.from_pretrained(tmp_path), again_by_load):
        assert again.lm_head.weight is again.transformer.word_embeddings.weight
        assert again.lm_head.weight_scale is again.transformer.word_embeddings.weight_scale
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
