"""GLM-130B against stored results of the official code: logits, cache, quantised weights, evaluation rows, sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import glm130b_tiny
from glmkit.data.glm130b_tasks import (
    TaskIds,
    batch_rows,
    generation_row,
    language_model_windows,
    multiple_choice_row,
    score_choices,
    window_loss,
)
from glmkit.engine.beams import BaseStrategy, search
from glmkit.engine.cache import new_cache
from glmkit.errors import ConfigError, DataError, UsageError
from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.models.glm130b_config import GLM130BConfig, config_from_tensors
from glmkit.models.partition import merge, partition_of
from glmkit.quant.linear import dequantize
from glmkit.quant.memory import memory_per_device
from glmkit.quant.official import quantize_model

ATOL = 3e-4  # the official code in float32 is 3e-5 from a float64 run
IDS = TaskIds(mask=89, gmask=90, sop=92, eop=93)


@pytest.fixture(scope="module")
def model() -> GLM130BForCausalLM:
    return glm130b_tiny.model()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["MASK", "gMASK"])
def test_logits_and_cache(name: str, implementation: str) -> None:
    case, model = glm130b_tiny.case(name), glm130b_tiny.model(implementation=implementation)
    with torch.no_grad():
        output = model(case["input_ids"], case["attention_mask_true_is_blocked"], case["position_ids"])
    torch.testing.assert_close(output.logits, case["logits"], atol=ATOL, rtol=0)
    cached = output.past_key_values.layers[0]  # the official one: all heads' keys, then all heads' values, rotated
    kv = torch.cat([t.transpose(1, 2).flatten(2) for t in (cached.keys, cached.values)], dim=-1)
    torch.testing.assert_close(kv, case["mem_kv.0"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["MASK", "gMASK"])
def test_masks_and_positions_follow_from_the_ids(model: GLM130BForCausalLM, name: str) -> None:
    case = glm130b_tiny.case(name)
    layout = model.input_layout(case["input_ids"], torch.zeros(1, dtype=torch.int64))
    made = layout.prompt(0, case["input_ids"].shape[1])
    assert torch.equal(made["attention_mask"], case["attention_mask_true_is_blocked"])
    assert torch.equal(made["position_ids"], case["position_ids"])
    with torch.no_grad():
        logits = model(case["input_ids"]).logits
    torch.testing.assert_close(logits, case["logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["MASK", "gMASK"])
def test_incremental_logits(model: GLM130BForCausalLM, name: str) -> None:
    case = glm130b_tiny.case(name)
    ids, wanted = case["input_ids"], case["incremental_logits"]
    context = ids.shape[1] - wanted.shape[1] + 1
    layout, cache = model.input_layout(ids[:, :context], torch.zeros(1, dtype=torch.int64)), new_cache(model, 1, 4)
    inputs, part, found = layout.prompt(0, context), ids[:, :context], []
    for place in range(context, ids.shape[1] + 1):
        with torch.no_grad():
            output = model(part, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(output.logits)
        part, inputs = ids[:, place : place + 1], layout.step()
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_padded_on_the_left_give_what_they_give_alone(implementation: str) -> None:
    """In one batch a row of each kind of mask; padding may even have the id of a mask."""
    model = glm130b_tiny.model(implementation=implementation)
    rows = [[73, 79, 56, 4, 89, 48, 92], [56, 41, 5, 90, 92], [3, 91, 7, 88, 92, 14, 15]]
    width = max(map(len, rows))
    pads = torch.tensor([width - len(row) for row in rows])
    ids = torch.tensor([[90] * (width - len(row)) + row for row in rows])
    layout = model.input_layout(ids, pads)
    with torch.no_grad():
        batch = model(ids, **layout.prompt(0, width)).logits
        by_mask = model(ids, attention_mask=(torch.arange(width) >= pads[:, None]).long()).logits
        for number, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(batch[number, -len(row) :], alone, atol=1e-4, rtol=0)
            torch.testing.assert_close(by_mask[number, -len(row) :], alone, atol=1e-4, rtol=0)
    assert batch.isfinite().all()


@pytest.mark.parametrize("name", ["MASK", "gMASK"])
def test_generate_gives_what_our_loop_gives(model: GLM130BForCausalLM, name: str) -> None:
    facts = glm130b_tiny.stored()["generation"][name]
    prompt = facts["prompt_with_sop"]
    other = [5, 6, 89 if name == "MASK" else 90, 92]
    ids = torch.tensor([prompt, [0] * (len(prompt) - len(other)) + other])
    mask = torch.ones_like(ids)
    mask[1, : len(prompt) - len(other)] = 0
    found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert found[0].tolist() == facts["greedy_topk1"][0][0]
    (alone,) = search(model, other, BaseStrategy(top_k=1), max_new_tokens=12)
    assert found[1, len(prompt) - len(other) :].tolist() == alone.ids


def test_a_part_of_a_prompt_is_refused(model: GLM130BForCausalLM) -> None:
    with torch.no_grad():
        cache = model(torch.tensor([[1, 90, 92]]), use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(UsageError, match="whole prompt"):
        model(torch.tensor([[3]]), past_key_values=cache)
    with torch.no_grad(), pytest.raises(UsageError, match="no start of an answer"):
        model(torch.tensor([[1, 90, 3]]))


def test_loss_at_labels_and_gradients_under_checkpointing() -> None:
    case, labels = glm130b_tiny.case("gMASK"), None
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = glm130b_tiny.model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        labels = case["input_ids"].clone()
        labels[:, :9] = -100
        total, targets = model.label_loss(case["input_ids"], labels)
        loss = model(case["input_ids"], labels=labels).loss
        assert targets == 9
        assert float(total.detach()) / targets == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(model.transformer.layers[0].attention.query_key_value.weight.grad)
    logs = case["logits"].log_softmax(-1)[0]
    by_hand = -sum(float(logs[t, case["input_ids"][0, t + 1]]) for t in range(8, 17)) / 9
    assert losses[0] == pytest.approx(by_hand, abs=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_a_folder_is_written_and_read(model: GLM130BForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "glm-130b"
    assert {k: config[k] for k in ("num_layers", "inner_hidden_size", "gmask_token_id", "eos_token_id")} == {
        "num_layers": 3,
        "inner_hidden_size": 40,
        "gmask_token_id": 90,
        "eos_token_id": [93, 88],
    }
    stored = load_file(tmp_path / "model.safetensors")
    official = {name for name in load_file(glm130b_tiny.FOLDER / "weights.safetensors") if "inv_freq" not in name}
    assert set(stored) == official
    again = GLM130BForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = glm130b_tiny.case("gMASK")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_deepnorm_initialisation() -> None:
    """Standard deviations of Xavier, times (2L)^-1/2 for all but queries and keys."""
    torch.manual_seed(0)
    config = GLM130BConfig(
        num_layers=8, hidden_size=256, num_attention_heads=4, inner_hidden_size=512, vocab_size=500, **small_ids()
    )
    model = GLM130BForCausalLM(config)
    model.init_weights()
    layer = model.transformer.layers[0]
    gain = (2 * 8) ** -0.5
    qkv = layer.attention.query_key_value.weight.detach().unflatten(0, (4, 3, 64))
    xavier = (2 / 512) ** 0.5
    assert float(qkv[:, 0].std()) == pytest.approx(xavier, rel=0.02)
    assert float(qkv[:, 1].std()) == pytest.approx(xavier, rel=0.02)
    assert float(qkv[:, 2].std()) == pytest.approx(gain * xavier, rel=0.02)
    assert float(layer.attention.dense.weight.detach().std()) == pytest.approx(gain * xavier, rel=0.02)
    for linear in (layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h):
        assert float(linear.weight.detach().std()) == pytest.approx(gain * (2 / 768) ** 0.5, rel=0.02)
        assert not linear.bias.any()


def small_ids() -> dict[str, Any]:
    return {name: value for name, value in glm130b_tiny.IDS.items() if name != "max_sequence_length"}


# --- what the release's files say ---


def test_sizes_from_tensors() -> None:
    shapes = {
        "transformer.word_embeddings.weight": (150528, 12288),
        **{f"transformer.layers.{i}.attention.query_key_value.weight": (36864, 12288) for i in range(70)},
        "transformer.layers.0.mlp.dense_h_to_4h.weight": (65536, 12288),
    }
    assert config_from_tensors(shapes).to_dict() == GLM130BConfig().to_dict()
    assert config_from_tensors(shapes, num_attention_heads=48).head_dim == 256
    int4 = dict(shapes)
    for i in range(70):
        int4[f"transformer.layers.{i}.attention.query_key_value.weight"] = (36864, 6144)
        int4[f"transformer.layers.{i}.attention.query_key_value.weight_scale"] = (36864,)
    config = config_from_tensors(int4)
    assert (config.quantization_bit, config.num_attention_heads, config.hidden_size) == (4, 96, 12288)
    del shapes["transformer.word_embeddings.weight"]
    with pytest.raises(ConfigError, match="word_embeddings"):
        config_from_tensors(shapes)


def test_names_of_transformers() -> None:
    config = GLM130BConfig()
    assert (config.num_hidden_layers, config.intermediate_size, config.max_position_embeddings) == (70, 32768, 2048)
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (128, 96, 150528)
    assert config.residual_scale == pytest.approx(11.832, abs=1e-3)
    for wrong in ({"layernorm_order": "pre"}, {"hidden_size": 100}, {"unknown_switch": 3}, {"num_layers": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GLM130BConfig.from_dict(wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_token_id", "abc"),
        ("gmask_token_id", -5),
        ("smask_token_id", 100),
        ("bos_token_id", [4]),
        ("eos_token_id", [5, 100]),
        ("pad_token_id", True),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        GLM130BConfig.from_dict({"vocab_size": 100, field: value})
    GLM130BConfig(vocab_size=100).check()  # the released ids stand for those that the tokenizer will tell


def test_memory_of_the_release() -> None:
    """260 GB in fp16, about 70 GB in int4: counted by hand from the sizes."""
    config = GLM130BConfig()
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in GLM130BForCausalLM(config).state_dict().items()}
    linears = 70 * (4 * 12288**2 + 3 * 12288 * 32768)
    rows = 70 * (3 * 12288 + 12288 + 65536 + 12288)  # of the linears, each with a scale and a bias
    norms, table = (70 * 4 + 2) * 12288, 150528 * 12288
    one = memory_per_device(config, shapes, 1)
    assert one["weights_bytes"] == {
        "fp16": 2 * (linears + rows + norms + table),
        "int8": linears + 2 * (2 * rows + norms + table),
        "int4": linears // 2 + 2 * (2 * rows + norms + table),
    }
    assert one["weights_bytes"]["fp16"] == pytest.approx(260e9, rel=0.02)
    assert one["weights_bytes"]["int4"] == pytest.approx(70e9, rel=0.05)
    assert one["kv_cache_bytes_per_token"] == 2 * 70 * 12288 * 2
    summed = 70 * 2 * 12288  # biases of dense and dense_4h_to_h, and the scales of their rows: on every device
    for degree in (4, 8):
        each = memory_per_device(config, shapes, degree)
        whole = norms + summed
        assert each["weights_bytes"]["fp16"] == 2 * ((linears + rows - summed + table) // degree + whole)
        divided = linears // 2 // degree + 2 * ((2 * (rows - summed) + table) // degree)
        assert each["weights_bytes"]["int4"] == divided + 2 * (whole + summed)
        assert each["kv_cache_bytes_per_token"] * degree == one["kv_cache_bytes_per_token"]
    assert memory_per_device(config, shapes, 4)["weights_bytes"]["int4"] < 24e9 / 1.2  # 4 x RTX 3090 (24 GB)
    assert memory_per_device(config, shapes, 8)["weights_bytes"]["int4"] < 11e9  # 8 x RTX 2080 Ti (11 GB)


# --- quantised files ---


def quantised_shards(shared: Path, bits: int, degree: int) -> list[dict[str, Tensor]]:
    folder = shared / "conformance" / "glm130b" / f"sat_mp{degree}_int{bits}" / "49300"
    files = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(degree)]
    return [torch.load(file, weights_only=True)["module"] for file in files]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("degree", [1, 2])
def test_logits_of_quantised_files(shared: Path, bits: int, degree: int) -> None:
    """Scales belong to a shard's rows, so a shard is dequantised before it is merged with the others."""
    shards = []
    for shard in quantised_shards(shared, bits, degree):
        scales = {name.removesuffix("_scale"): t for name, t in shard.items() if name.endswith("_scale")}
        shards.append(
            {
                name: dequantize(t, scales[name], bits) if name in scales else t
                for name, t in shard.items()
                if not name.endswith(("_scale", "inv_freq"))
            }
        )
    partition = partition_of(glm130b_tiny.model().config)
    weights = {name: merge([shard[name] for shard in shards], partition.rule(name), name) for name in shards[0]}
    stored = load_file(shared / "conformance" / "glm130b" / f"logits_int{bits}_mp{degree}.safetensors")
    for name, tensor in stored.items():
        if name.startswith("dequantized."):
            assert torch.equal(weights[name.removeprefix("dequantized.")], tensor)
    weights["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)  # says how wide heads are
    case, model = glm130b_tiny.case("gMASK"), glm130b_tiny.model(weights)
    with torch.no_grad():
        logits = model(case["input_ids"]).logits
    torch.testing.assert_close(logits, stored["logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_take_the_files_of_one_rank(shared: Path, bits: int) -> None:
    (shard,) = quantised_shards(shared, bits, 1)
    config = config_from_tensors({name: tuple(t.shape) for name, t in shard.items()}, **glm130b_tiny.IDS)
    assert config.quantization_bit == bits
    with torch.device("meta"):
        model = GLM130BForCausalLM(config)
        quantize_model(model, bits)
    missing, unexpected = model.load_state_dict(shard, strict=False, assign=True)
    assert not missing
    assert all(name.endswith("inv_freq") for name in unexpected)
    stored = load_file(shared / "conformance" / "glm130b" / f"logits_int{bits}_mp1.safetensors")
    with torch.no_grad():
        logits = model.float().eval()(glm130b_tiny.case("gMASK")["input_ids"]).logits
    torch.testing.assert_close(logits, stored["logits"], atol=ATOL, rtol=0)


def test_quantising_here_gives_the_official_files(shared: Path) -> None:
    for bits in (8, 4):
        (shard,) = quantised_shards(shared, bits, 1)
        model = quantize_model(glm130b_tiny.model().half(), bits)
        state = model.state_dict()
        for name, tensor in shard.items():
            if not name.endswith("inv_freq"):
                assert torch.equal(state[name], tensor), name


# --- evaluation ---


def builders() -> dict[str, Any]:
    return json.loads((glm130b_tiny.FOLDER / "builders.json").read_text())


def test_generation_rows() -> None:
    for case in builders()["generation"]:
        flags = {name: case[name] for name in ("use_task_mask", "unidirectional")}
        row, wanted = generation_row(case["text"], IDS, max_gen_length=5, max_seq_length=64, **flags), case["out"]
        assert row.token_ids == wanted["token"]
        assert row.position_ids == wanted["position_id"]
        assert row.target_position_ids == wanted["target_position_id"]
        assert row.context_length == wanted["context_length"]
        assert (~row.blocked).int().tolist() == wanted["attention_mask"]


def test_multiple_choice_rows_and_scores(model: GLM130BForCausalLM) -> None:
    for case in builders()["multiple_choice"]:
        row = multiple_choice_row(
            case["text"],
            case["choices"],
            IDS,
            single_token=case["is_single_token"],
            use_task_mask=case["use_task_mask"],
            max_seq_length=64,
        )
        wanted = case["sample"]
        places = wanted["choice_target_ids"]
        assert row.token_ids == wanted["token"]
        assert row.position_ids == wanted["position_id"]
        assert (~row.blocked).int().tolist() == wanted["attention_mask"]
        assert row.choice_places == ([places] if case["is_single_token"] else places)
        ids, positions, blocked = batch_rows([row])
        assert ids.tolist() == case["batch_tokens"]
        assert positions.tolist() == case["batch_position_ids"]
        with torch.no_grad():
            logits = model(ids, blocked, positions).logits
        assert logits.isfinite().all()
        assert score_choices(row, logits[0]) == pytest.approx(case["cond_log_prob"][0], abs=ATOL * 5)


def test_language_model_windows_and_loss(model: GLM130BForCausalLM) -> None:
    for case in builders()["language_model"]:
        options = {name: case[name] for name in ("max_seq_length", "generation_length", "unidirectional")}
        rows = language_model_windows(case["raw_tokens"], IDS, **options)
        assert len(rows) == len(case["items"])
        for row, wanted, loss in zip(rows, case["items"], case["summed_loss"]):
            assert row.token_ids == wanted["tokens"]
            assert row.target_ids == wanted["targets"]
            assert row.position_ids == wanted["position_ids"]
            assert row.blocked.tolist() == wanted["attention_mask"]
            assert row.loss_mask == wanted["loss_masks"]
            ids, positions, blocked = batch_rows([row])
            with torch.no_grad():
                logits = model(ids, blocked, positions).logits
            assert window_loss(row, logits[0]) == pytest.approx(loss, abs=ATOL * 20)


def test_every_token_is_scored_once() -> None:
    document = list(range(100, 200))
    for length, step in ((20, 8), (16, 15), (101, 50), (7, 1)):
        rows = language_model_windows(document, IDS, max_seq_length=length, generation_length=step)
        scored = [t for row in rows for t, counts in zip(row.target_ids, row.loss_mask) if counts]
        assert scored == document


def test_rows_of_texts_that_are_too_long_lose_their_beginning() -> None:
    text = list(range(60))
    assert generation_row(text, IDS, max_gen_length=10, max_seq_length=32).token_ids == [*range(40, 60), 89, 92]
    row = multiple_choice_row(text, [[70, 71], []], IDS, max_seq_length=32)
    assert row.token_ids == [*range(33, 60), 89, 92, 70, 92]
    assert row.choices == [[70, 71], [93]]
    with pytest.raises(DataError, match="no room"):
        generation_row(text, IDS, max_gen_length=31, max_seq_length=32)


def test_unidirectional_choices_follow_the_text() -> None:
    row = multiple_choice_row([5, 6, 7], [[30], [31, 32]], IDS, use_task_mask=True, unidirectional=True)
    assert row.token_ids == [90, 92, 5, 6, 7, 7, 31]
    assert row.position_ids == [0, 1, 2, 3, 4, 4, 5]
    assert row.choice_places == [[4], [5, 6]]
    visible = (~row.blocked).int().tolist()
    assert visible[3] == [1, 1, 1, 1, 0, 0, 0]
    assert visible[4] == [1, 1, 1, 1, 1, 0, 0]
    assert visible[6] == [1, 1, 1, 1, 0, 1, 1]
    with pytest.raises(UsageError, match="use_task_mask"):
        generation_row([5], IDS, unidirectional=True)
