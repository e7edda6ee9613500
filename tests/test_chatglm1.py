"""ChatGLM-6B against stored results of the official code, through the Auto classes and the loader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import glmkit
from glmkit.engine.decode import generate_batch, stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import ConfigError, UsageError
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.quant.official import OfficialQuantizedLinear, dequantize_rows

FIXTURES = Path(__file__).parent / "fixtures"
ATOL = 1e-4  # the float32 noise of the official code against a float64 run is 5e-6 to 3e-5
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


class Case:
    """The stored results and the model in float32."""

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        self.arrays = np.load(folder / "arrays.npz")
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **kwargs).eval()

    def inputs(self, name: str) -> dict[str, torch.Tensor]:
        start = f"{name}.in."
        return {
            key[len(start) :]: torch.from_numpy(self.arrays[key]) for key in self.arrays.files if key.startswith(start)
        }

    def close(self, name: str, logits: torch.Tensor) -> None:
        subset = self.arrays["vocab_subset"]
        np.testing.assert_allclose(logits[..., subset].numpy(), self.arrays[f"{name}.logits"], atol=ATOL, rtol=0)


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
    """Prefill, then greedy steps, with the arguments that generate makes."""
    inputs = case.inputs(name)
    given = {
        f"prompt_{key}": inputs.get(long) for key, long in (("mask", "attention_mask"), ("positions", "position_ids"))
    }
    ids, cache, logits = inputs["input_ids"], None, []
    start = ids.shape[1]
    for _ in range(case.arrays[f"{name}.tokens"].shape[1]):
        prepared = case.model.prepare_inputs_for_generation(ids, cache, **given, use_cache=True)
        assert prepared["input_ids"].shape[1] == (1 if cache is not None else start)
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


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("name", ["greedy24", "greedy24_batch_left_pad"])
def test_generate_greedily(case: Case, name: str, options: dict[str, Any]) -> None:
    if "batch" in name and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers looks up prompts in a single row")
    sequences = case.model.generate(**case.inputs(name), do_sample=False, max_new_tokens=24, **options)
    np.testing.assert_array_equal(sequences.numpy(), case.arrays[f"{name}.sequences"])


def test_generate_with_beams(case: Case) -> None:
    """Positions go on rightly in every beam: the best sequence is the stored one, or scores no worse."""
    found = case.model.generate(**case.inputs("beam4"), do_sample=False, max_new_tokens=24, num_beams=4)
    stored = torch.from_numpy(case.arrays["beam4.sequences"])
    prompt = case.inputs("beam4")["input_ids"].shape[1]
    assert score(case.model, found, prompt) >= score(case.model, stored, prompt) - 1e-4


def score(model: ChatGLMForCausalLM, sequence: torch.Tensor, prompt: int) -> float:
    ids = sequence[0].tolist()
    ids = ids[: ids.index(130005, prompt) + 1] if 130005 in ids[prompt:] else ids
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return sum(float(logs[i - 1, ids[i]]) for i in range(prompt, len(ids))) / (len(ids) - prompt)


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
                    assert float(model.get_parameter(name).grad.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
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
        assert float(model.get_parameter(parameter).grad.norm()) == pytest.approx(norm, rel=1e-3), parameter

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


# --- without shared/ ---


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
    """What is saved has the official names, the table twice or once, and loads again through both doors."""
    folder = FIXTURES / "config_switches" / f"chatglm-{name}"
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["ChatGLMModel"]
    assert config["inner_hidden_size"] == first.config.inner_hidden_size
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
        assert isinstance(model.transformer.layers[0].attention.dense, OfficialQuantizedLinear)
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
        by_hand = dequantize_rows(table.weight, table.weight_scale.half(), bits).float()
        assert torch.equal(table(ids), by_hand[ids])
    # The weights are those of the plain model rounded to the grid, so it must compute the same with them.
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, OfficialQuantizedLinear) and name != "lm_head":
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
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "one"
    shutil.copytree(FIXTURES / "config_switches" / "chatglm-base", folder)
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = glmkit.load(folder).model
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
