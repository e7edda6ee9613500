"""Training methods: which parameters learn, in which numbers, and that what was learnt is written and read exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import glmkit
from glmkit.errors import CheckpointError, TrainingError, UsageError
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.models.language_model import summed_loss
from glmkit.quant.linear import QuantizedLinear
from glmkit.quant.official import quantize_linear, quantize_model
from glmkit.train.arguments import MethodBlock
from glmkit.train.methods import Method, make_method
from official_results import ATOL, Case

FAMILIES = ("chatglm", "chatglm2", "glm4", "glm")
LORA = {"name": "lora", "lora_rank": 3, "lora_alpha": 6, "lora_dropout": 0.0}
PREFIX = {"name": "ptuning_v2", "pre_seq_len": 5}
METHODS = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "num_layer_trainable": 1},
    "lora": {**LORA, "target_modules": ["query_key_value", "dense_4h_to_h"]},
    "ptuning_v2": PREFIX,
    "ptuning_v2 projected": {**PREFIX, "prefix_projection": True},
}
_GLM2 = {
    "num_layers": 2,
    "padded_vocab_size": 60,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "seq_length": 64,
}
_GLM1 = {
    "num_layers": 2,
    "vocab_size": 60,
    "hidden_size": 32,
    "inner_hidden_size": 64,
    "num_attention_heads": 4,
    "max_sequence_length": 64,
    "mask_token_id": 50,
    "gmask_token_id": 51,
    "bos_token_id": 52,
    "eos_token_id": 53,
    "pad_token_id": 3,
}
_GLM = {"num_layers": 2, "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 64}
_GLM |= {"sop_token_id": 52, "mask_token_ids": [50, 51], "output_predict": True}


class NoTokenizer:
    """All of a tokenizer that methods use."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.txt").write_text("none\n")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    torch.manual_seed(3)
    if family == "chatglm":
        model: Any = ChatGLMForCausalLM(ChatGLMConfig(**{**_GLM1, **sizes}))
    elif family == "glm":
        model = GLMForConditionalGeneration(GLMConfig(**{**_GLM, **sizes}))
    else:
        extra = {"generation": 4, "rope_ratio": 500, "rope_ratio_applies_to": "base"} if family == "glm4" else {}
        model = ChatGLM2ForCausalLM(ChatGLM2Config(**{**_GLM2, **extra, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def batch(family: str) -> dict[str, Tensor]:
    """Two rows of ids with labels on the second half, as the family wants them."""
    ids = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    if family == "chatglm":
        ids[:, 4], ids[:, 5] = 51, 52
    labels = torch.where(torch.arange(12) >= 6, ids, -100)
    inputs = {"input_ids": ids, "labels": labels}
    if family == "glm":
        inputs["attention_mask"] = torch.tensor([6, 4])
        where = torch.arange(12).clamp(max=6)
        inputs["position_ids"] = torch.stack((where, (torch.arange(12) - 6).clamp(min=0))).expand(2, 2, 12).clone()
    return inputs


def prepared(family: str, method: str, model: Any = None) -> tuple[Method, Any]:
    made = make_method(MethodBlock.model_validate(METHODS[method]))
    return made, made.prepare(tiny_model(family) if model is None else model)


def logits(model: Any, family: str) -> Tensor:
    inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs, return_dict=True, use_cache=False).logits.float()


def loss_and_gradients(model: Any, family: str) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total, count = model.label_loss(**batch(family))
    (total / count).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return float(total.detach()), found


def learn_a_little(model: Any, family: str) -> None:
    """Moves what learns by a random step, so that it differs from its start everywhere."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what learns ---


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_a_method_says_learns(family: str) -> None:
    _, model = prepared(family, "full")
    assert learning(model) == {name for name, _ in model.named_parameters()}
    _, model = prepared(family, "freeze")
    assert all(".layers.1." in name for name in learning(model))
    assert len(learning(model)) == sum(".layers.1." in name for name, _ in model.named_parameters())
    _, model = prepared(family, "lora")
    names = {name.rpartition(".lora.")[2] for name in learning(model)}
    assert (len(learning(model)), names) == (2 * 2 * 2, {"lora_A", "lora_B"})
    _, model = prepared(family, "ptuning_v2")
    start = f"{model.base_model_prefix}.prefix_encoder."
    assert learning(model) == {start + "embedding.weight"}
    _, model = prepared(family, "ptuning_v2 projected")
    parts = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    assert learning(model) == {start + part for part in parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_as_the_base(family: str) -> None:
    expected = logits(tiny_model(family), family)
    _, model = prepared(family, "lora")
    assert torch.equal(logits(model, family), expected)
    learn_a_little(model, family)
    assert not torch.allclose(logits(model, family), expected, atol=1e-2)


def test_lora_is_the_sum_of_base_and_product() -> None:
    """Putting B A into the weights by hand gives the same logits."""
    _, model = prepared("chatglm2", "lora")
    learn_a_little(model, "chatglm2")
    by_hand = tiny_model("chatglm2")
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora"):
                by_hand.get_submodule(name).weight += module.lora.lora_B @ module.lora.lora_A * (6 / 3)
    torch.testing.assert_close(logits(model, "chatglm2"), logits(by_hand, "chatglm2"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "heads"), [("chatglm", 4), ("chatglm2", 2), ("glm4", 2), ("glm", 4)])
def test_a_prefix_has_the_official_shapes_and_start(family: str, heads: int) -> None:
    row = 2 * 2 * heads * 8
    _, model = prepared(family, "ptuning_v2")
    encoder = getattr(model, model.base_model_prefix).prefix_encoder
    assert encoder.embedding.weight.shape == (5, row)
    assert float(encoder.embedding.weight.detach().std()) == pytest.approx(1, abs=0.1)  # N(0, 1), as officially
    _, model = prepared(family, "ptuning_v2 projected")
    encoder = getattr(model, model.base_model_prefix).prefix_encoder
    table = 32 if family in ("chatglm", "glm") else row
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    expected = {"embedding.weight": (5, table), "trans.0.weight": (32, table), "trans.0.bias": (32,)}
    assert shapes == expected | {"trans.2.weight": (row, 32), "trans.2.bias": (row,)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_asks_for_a_prefix_makes_the_same_one(tmp_path: Path, family: str) -> None:
    """The way of the official scripts: pre_seq_len in the config, and the base's weights."""
    tiny_model(family).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float16):
        config = AutoConfig.from_pretrained(tmp_path, pre_seq_len=40)
        auto = AutoModelForSeq2SeqLM if family == "glm" else AutoModelForCausalLM
        model = auto.from_pretrained(tmp_path, config=config, dtype=dtype)
        table = getattr(model, model.base_model_prefix).prefix_encoder.embedding.weight
        assert float(table.detach().float().std()) == pytest.approx(1, abs=0.1)
        assert learning(model) == {f"{model.base_model_prefix}.prefix_encoder.embedding.weight"}
        made = make_method(MethodBlock(name="ptuning_v2", pre_seq_len=40)).prepare(model)  # goes on with this one
        after = getattr(made, made.base_model_prefix).prefix_encoder.embedding.weight
        assert torch.equal(after, table.float())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_sees_the_prefix(family: str) -> None:
    """A prefix changes every position, and without it the model is what it was."""
    expected = logits(tiny_model(family), family)
    _, model = prepared(family, "ptuning_v2")
    model.eval()
    assert bool(((logits(model, family) - expected).abs().amax(-1) > 1e-3).all())
    model.config.pre_seq_len = None
    del getattr(model, model.base_model_prefix).prefix_encoder
    assert torch.equal(logits(model, family), expected)


# --- gradients ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_no_gradient(family: str, method: str) -> None:
    """Every activation is computed again, dropout of prefix and matrices included."""
    found = []
    for checkpointing in (False, True):
        _, model = prepared(family, method)
        learn_a_little(model, family)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        found.append(loss_and_gradients(model, family))
    (loss, gradients), (loss_again, gradients_again) = found
    assert loss == pytest.approx(loss_again, rel=1e-6)
    assert gradients.keys() == gradients_again.keys()
    assert len(gradients) == len(learning(model))
    for name, gradient in gradients.items():
        assert float(gradient.abs().max()) > 0 or "query_key_value.bias" in name, name
        torch.testing.assert_close(gradient, gradients_again[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ptuning_v2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_keeps_less(family: str, method: str) -> None:
    kept = []
    for checkpointing in (False, True):
        _, model = prepared(family, method)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sizes: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.label_loss(**batch(family))
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_in_chunks_is_the_loss(family: str) -> None:
    whole, gradients = loss_and_gradients(prepared(family, "full")[1], family)
    for size in (1, 4, 100):
        _, model = prepared(family, "full")
        model.loss_chunk_tokens = size
        chunked, same = loss_and_gradients(model, family)
        assert chunked == pytest.approx(whole, rel=1e-6)
        for name, gradient in gradients.items():
            assert float((gradient - same[name]).norm()) <= 1e-6 * float(gradient.norm()) + 1e-9, name


def test_logits_of_one_chunk_exist_at_once() -> None:
    """The most numbers of logits that are alive at any time, forwards and backwards."""
    weight = torch.randn(50, 8, requires_grad=True)
    sizes: list[int] = []

    def project(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states @ weight.t()

    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, _ = summed_loss(project, torch.randn(1, 40, 8, requires_grad=True), torch.arange(40)[None], 10)
    assert max(kept) <= 40 * 8  # hidden states, never 10 x 50 logits
    loss.backward()
    assert sizes == [10] * 8  # once forwards, once backwards


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_of_a_quantised_layer_is_that_of_its_dequantised_weight(bits: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 12).half().float()
    layer = quantize_linear(linear, bits)
    x, y = (torch.randn(3, 5, 16) for _ in range(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        product = layer(ours)
    assert kept == []  # nothing, above all no weight in full
    expected = nn.functional.linear(theirs, layer.dequantize().float(), linear.bias)
    assert torch.equal(product, expected)
    (product * y[..., :12]).sum().backward()
    (expected * y[..., :12]).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-6)
    assert layer.weight.grad is None
    assert not layer(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        again = layer(ours)
    assert again.dtype == torch.bfloat16
    again.float().sum().backward()


@pytest.mark.parametrize("method", ["lora", "ptuning_v2", "ptuning_v2 projected"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_beside_a_quantised_base_are_those_beside_its_dequantised_copy(
    family: str, bits: int, method: str
) -> None:
    quantised = quantize_model(tiny_model(family), bits)
    plain = tiny_model(family)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, QuantizedLinear):
                plain.get_submodule(name).weight.copy_(module.dequantize())
    found = []
    for model in (quantised, plain):
        torch.manual_seed(4)
        _, model = prepared(family, method, model)
        learn_a_little(model, family)
        found.append(loss_and_gradients(model, family))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_quantised_weights_do_not_learn(method: str) -> None:
    with pytest.raises(UsageError, match=r"quantised \(weights in int8\).*\n.*lora or ptuning_v2"):
        prepared("chatglm2", method, quantize_model(tiny_model("chatglm2"), 8))


# --- numbers ---


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["plain", "auto-bf16", "auto-fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "glm"])
def test_what_learns_is_float32_whatever_the_base(
    family: str, method: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    reference, _ = loss_and_gradients(_at_work(family, method, torch.float32), family)
    model = _at_work(family, method, dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if method != "full":
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        total, count = model.label_loss(**batch(family))
    assert total.dtype == torch.float32
    (total / count).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert len([p for p in model.parameters() if p.grad is not None]) == len(learning(model))
    assert float(total.detach()) == pytest.approx(reference, rel=0.05)


def _at_work(family: str, method: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(4)
    _, model = prepared(family, method, tiny_model(family, dtype))
    if method == "lora":
        learn_a_little(model, family)
    return model.eval()  # dropout would hide the difference


@pytest.mark.parametrize("method", ["lora", "ptuning_v2 projected"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_learning_beside_a_quantised_base_in_half_precision(method: str, dtype: torch.dtype) -> None:
    for autocast in (None, torch.bfloat16, torch.float16):
        model = quantize_model(tiny_model("chatglm2", dtype), 4)
        _, model = prepared("chatglm2", method, model)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            total, _ = model.train().label_loss(**batch("chatglm2"))
        total.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


def test_large_values_of_a_projected_prefix_do_not_overflow() -> None:
    """The two layers compute in float32 also where everything else is float16."""
    _, model = prepared("chatglm2", "ptuning_v2 projected")
    encoder = model.transformer.prefix_encoder.eval()
    with torch.no_grad():
        encoder.embedding.weight.fill_(30_000.0)
        encoder.trans[0].weight.fill_(1.0)
        encoder.trans[2].weight.fill_(1e-2)
    with torch.autocast("cpu", torch.float16):
        assert all(bool(part.isfinite().all()) for pair in encoder(1, torch.float16) for part in pair)


# --- written and read ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_is_restored_exactly(tmp_path: Path, family: str, method: str) -> None:
    made, model = prepared(family, method)
    learn_a_little(model, family)
    made.save(model, NoTokenizer(), tmp_path)
    again_made, again = prepared(family, method)
    again_made.restore(again, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("method", METHODS)
def test_gathered_tensors_are_saved_instead_of_the_models(tmp_path: Path, method: str) -> None:
    made, model = prepared("chatglm", method)
    every = made.folder_name == "model"
    learnt = {n: p.detach() + 1 for n, p in model.named_parameters() if p.requires_grad or every}
    made.save(model, NoTokenizer(), tmp_path, learnt)
    made.restore(model, tmp_path)
    for name, tensor in learnt.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    if every:
        stored = load_file(tmp_path / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], learnt["transformer.word_embeddings.weight"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_result_loads_with_the_same_logits(tmp_path: Path, family: str, method: str) -> None:
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    made, model = prepared(family, method)
    learn_a_little(model, family)
    (tmp_path / "result").mkdir()
    made.save(model, NoTokenizer(), tmp_path / "result")
    whole = made.folder_name == "model"
    loaded = glmkit.load(*([tmp_path / "result"] if whole else [tmp_path / "base", tmp_path / "result"]))
    torch.testing.assert_close(logits(loaded.model, family), logits(model.eval(), family), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(loaded.model, family), logits(base, family), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_is_written_as_the_official_scripts_do(tmp_path: Path, family: str, projected: bool) -> None:
    made, model = prepared(family, "ptuning_v2 projected" if projected else "ptuning_v2")
    made.save(model, NoTokenizer(), tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)  # so do they, and cut the start off
    start = "transformer.prefix_encoder."
    assert all(name.startswith(start) for name in state)
    encoder = getattr(model, model.base_model_prefix).prefix_encoder
    other = copy.deepcopy(encoder)
    other.load_state_dict({name[len(start) :]: tensor for name, tensor in state.items()})
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pre_seq_len"], config.get("prefix_projection", False)) == (5, projected)
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin", "config.json"}


def test_a_lora_is_written_as_peft_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for family in FAMILIES:
        made, model = prepared(family, "lora")
        learn_a_little(model, family)
        folder = tmp_path / family
        folder.mkdir()
        made.save(model, NoTokenizer(), folder)
        theirs = peft.PeftModel.from_pretrained(tiny_model(family), folder).eval()
        torch.testing.assert_close(logits(theirs, family), logits(model.eval(), family), atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        again, other = prepared(family, "lora")
        again.restore(other, tmp_path / "theirs")
        assert torch.equal(logits(other.eval(), family), logits(model, family))


def test_going_on_from_another_adapter_is_refused_by_name(tmp_path: Path) -> None:
    lora, model = prepared("chatglm2", "lora")
    (tmp_path / "lora").mkdir()
    lora.save(model, NoTokenizer(), tmp_path / "lora")
    prefix, model = prepared("chatglm2", "ptuning_v2")
    (tmp_path / "prefix").mkdir()
    prefix.save(model, NoTokenizer(), tmp_path / "prefix")
    for given, folder, problem in (
        (METHODS["lora"], "prefix", r"holds a P-Tuning prefix, not a LoRA\n.*ptuning_v2"),
        (METHODS["ptuning_v2"], "lora", r"holds a LoRA, not a P-Tuning prefix"),
        (METHODS["lora"] | {"lora_rank": 2}, "lora", r"has rank 3 and alpha 6, the recipe 2 and 6"),
        (METHODS["lora"] | {"lora_alpha": 7}, "lora", r"has rank 3 and alpha 6, the recipe 3 and 7"),
        (METHODS["lora"] | {"target_modules": ["dense"]}, "lora", r"matrices for 4 layers, the recipe for 2"),
        (METHODS["ptuning_v2"] | {"pre_seq_len": 4}, "prefix", r"a prefix of 5 columns without"),
        (METHODS["ptuning_v2 projected"], "prefix", r"5 columns without projection\n.*prefix_projection=false"),
    ):
        made = make_method(MethodBlock.model_validate(given))
        with pytest.raises(TrainingError, match=problem):
            made.restore(made.prepare(tiny_model("chatglm2")), tmp_path / folder)
    made, model = prepared("chatglm", "ptuning_v2")
    with pytest.raises(CheckpointError, match="made for another model"):
        made.restore(model, tmp_path / "prefix")


def test_methods_that_do_not_fit_a_model_say_why() -> None:
    with pytest.raises(UsageError, match="num_layer_trainable is 3, the model has 2 blocks"):
        make_method(MethodBlock(name="freeze")).prepare(tiny_model("chatglm2"))
    with pytest.raises(UsageError, match=r"q_proj, .*query_key_value"):
        make_method(MethodBlock(name="lora", target_modules=["q_proj", "dense"])).prepare(tiny_model("chatglm2"))
    _, model = prepared("chatglm2", "lora")
    with pytest.raises(UsageError, match="has a LoRA already"):
        prepared("chatglm2", "lora", model)
    _, model = prepared("chatglm2", "ptuning_v2")
    with pytest.raises(UsageError, match=r"a prefix of 5 columns without projection\n.*pre_seq_len=5"):
        prepared("chatglm2", "ptuning_v2 projected", model)


# --- the official numbers ---

OFFICIAL = ("chatglm", "chatglm2", "chatglm2-32k", "chatglm3")


def _sum_of_steps(case: Case, model: Any, name: str, check: Callable[[Any], None], steps: int) -> list[float]:
    """The loss before each of some SGD steps with rate 0.1, by the function that the loop calls."""
    losses = []
    inputs = case.inputs(name)
    for step in range(steps):
        model.zero_grad()
        total, count = model.label_loss(**inputs)
        (total / count).backward()
        losses.append(float(total.detach()) / count)
        if step == 0:
            check(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return losses


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
@pytest.mark.parametrize("family", OFFICIAL)
def test_official_gradients(shared: Path, family: str, method: str) -> None:
    """Full: norms of all gradients and four losses. Freeze: the norms of its block. LoRA: of the product that it adds.

    The gradient of a matrix product's weight G gives those of the matrices: B^T G and G A^T, times the scale.
    """
    case = Case(shared / "conformance" / family)
    facts = case.manifest["gradients"]
    stored = {name[5:]: torch.from_numpy(case.arrays[name]) for name in case.arrays.files if name.startswith("grad.")}
    made = make_method(MethodBlock.model_validate(METHODS[method] | {"target_modules": ["query_key_value"]}))
    model = made.prepare(case.model)
    if method == "lora":
        learn_a_little(model, family)  # and take out again what that adds, so that the network computes the same
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "lora"):
                    module.weight -= 2 * module.lora.lora_B @ module.lora.lora_A

    def check(model: Any) -> None:
        seen = 0
        for name, norm in facts["grad_norms"].items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
                seen += 1
        assert seen == {"full": len(facts["grad_norms"]), "freeze": len(learning(model)), "lora": 0}[method]
        for name, gradient in stored.items():
            layer = model.get_submodule(name.rpartition(".")[0]) if name.endswith("query_key_value.weight") else None
            if method == "lora" and layer is not None:
                a, b = layer.lora.lora_A, layer.lora.lora_B
                torch.testing.assert_close(a.grad, 2 * b.detach().T @ gradient, atol=ATOL, rtol=1e-3)
                torch.testing.assert_close(b.grad, 2 * gradient @ a.detach().T, atol=ATOL, rtol=1e-3)

    losses = _sum_of_steps(case, model, "train", check, 4 if method == "full" else 1)
    np.testing.assert_allclose(losses, facts["losses_over_plain_sgd_lr0.1"][: len(losses)], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["ptuning_emb", "ptuning_proj"])
@pytest.mark.parametrize("family", OFFICIAL)
def test_official_p_tuning(shared: Path, tmp_path: Path, family: str, kind: str) -> None:
    """From the plain model through `prepare` and `restore` of an official checkpoint to the official gradients."""
    case = Case(shared / "conformance" / family)
    facts, folder = case.manifest[kind], shared / "conformance" / family / kind
    length = json.loads((folder / "config.json").read_text())["pre_seq_len"]
    block = MethodBlock(name="ptuning_v2", pre_seq_len=length, prefix_projection=kind == "ptuning_proj")
    made = make_method(block)
    model = made.prepare(case.model)
    made.restore(model, folder)
    assert learning(model) == set(facts["requires_grad"])
    with torch.no_grad():
        for name in ("single", "batch_left_pad", "train"):
            case.close(f"{kind}.{name}", model.eval()(**case.inputs(f"{kind}.{name}")).logits)

    def check(model: Any) -> None:
        for name, norm in facts["grad_norms"].items():
            gradient = model.get_parameter(name).grad
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3), name
            if f"{kind}.grad.{name}" in case.arrays:
                np.testing.assert_allclose(gradient.numpy(), case.arrays[f"{kind}.grad.{name}"], atol=ATOL, rtol=1e-3)

    before, after = _sum_of_steps(case, model, f"{kind}.train", check, 2)
    assert before == pytest.approx(facts["loss"], abs=ATOL)
    assert after == pytest.approx(facts["loss_after_one_sgd_step_lr0.1_on_all_grad_params"], rel=1e-4)
    made.save(model, NoTokenizer(), tmp_path)
    names = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert names.keys() == torch.load(folder / "pytorch_model.bin", weights_only=True).keys()


def test_official_losses_of_the_families_without_stored_gradients(shared: Path) -> None:
    stored = load_file(shared / "conformance" / "glm4" / "loss.safetensors")
    model = AutoModelForCausalLM.from_pretrained(shared / "conformance" / "glm4" / "hf_repo")
    model.loss_chunk_tokens = 3
    total, count = make_method(MethodBlock()).prepare(model).label_loss(stored["input_ids"], stored["labels"])
    assert float(total.detach()) / count == pytest.approx(float(stored["loss"]), abs=ATOL)
    for name in ("seq2seq_rightpad", "seq2seq_leftpad"):
        stored = load_file(shared / "conformance" / "glm_base" / f"{name}.safetensors")
        model = GLMForConditionalGeneration.from_pretrained(shared / "conformance" / "glm_base" / "hf_repo").eval()
        inputs = {key: stored[key] for key in ("input_ids", "labels", "attention_mask", "position_ids")}
        total, count = make_method(MethodBlock()).prepare(model).label_loss(**inputs)
        assert float(total.detach()) / count == pytest.approx(float(stored["loss"]), abs=ATOL)


# --- bitsandbytes ---


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    made = tmp_path_factory.mktemp("base") / request.param
    inner = {"chatglm": {}, "glm": {}}.get(request.param, {"ffn_hidden_size": 64})
    model = tiny_model(request.param, hidden_size=64, **inner)  # bitsandbytes works in blocks of 64 columns
    model.save_pretrained(made)
    return made


_NEAR = {"bnb-int8": 0.1, "bnb-nf4": 1e-4}  # int8 rounds activations, too


def _dequantised(folder: Path, kind: str) -> Any:
    import bitsandbytes

    model, quantised = glmkit.load(folder).model, glmkit.load(folder, quantize=kind).model
    with torch.no_grad():
        for name, parameter in quantised.named_parameters():
            if kind == "bnb-int8" and not parameter.is_floating_point():
                model.get_parameter(name).copy_(parameter.data * parameter.SCB[:, None] / 127)
            elif not parameter.is_floating_point():
                whole = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
                model.get_parameter(name).copy_(whole)
    return model


@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4"])
def test_bitsandbytes_formats_are_those_of_transformers(folder: Path, kind: str) -> None:
    from transformers import BitsAndBytesConfig

    family = folder.name
    quantised = glmkit.load(folder, quantize=kind).model
    layers = [name.removesuffix(".weight") for name, p in quantised.named_parameters() if not p.is_floating_point()]
    assert len(layers) == 4 * 2
    options = {"load_in_8bit": True} if kind == "bnb-int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**options)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for name in layers:
        mine, other = quantised.get_submodule(name), theirs.get_submodule(name)
        assert type(mine) is type(other)
        assert torch.equal(mine.weight, other.weight)
        if kind == "bnb-int8":
            assert torch.equal(mine.weight.SCB, other.weight.SCB)
        else:
            assert torch.equal(mine.weight.quant_state.absmax, other.weight.quant_state.absmax)
    plain = logits(_dequantised(folder, kind), family)
    error = float((logits(quantised, family) - plain).norm() / plain.norm())
    assert error < _NEAR[kind]


@pytest.mark.parametrize("method", ["lora", "ptuning_v2"])
@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4"])
def test_learning_beside_bitsandbytes(folder: Path, tmp_path: Path, kind: str, method: str) -> None:
    """The gradients are those beside the dequantised base, and the result loads onto the quantised one."""
    family = folder.name
    found = []
    for base in (_dequantised(folder, kind), glmkit.load(folder, quantize=kind).model):
        torch.manual_seed(4)
        made, model = prepared(family, method, base)
        learn_a_little(model, family)
        found.append(loss_and_gradients(model, family))
    for name, gradient in found[0][1].items():
        near = float((found[1][1][name] - gradient).norm() / gradient.norm())
        assert near < _NEAR[kind], (name, near)
    made.save(model, NoTokenizer(), tmp_path)
    loaded = glmkit.load(folder, adapter=tmp_path, quantize=kind).model
    torch.testing.assert_close(logits(loaded, family), logits(model.eval(), family), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="is quantised"):
        prepared(family, "full", glmkit.load(folder, quantize=kind).model)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    quantize_model(tiny_model("chatglm2"), 8).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="already quantised to 8 bits, so it cannot become bnb-nf4"):
        glmkit.load(tmp_path, quantize="bnb-nf4")
    with pytest.raises(UsageError, match="already quantised to 8 bits"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["lora", "ptuning_v2 projected"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_a_quantised_checkpoint_loads_onto_it(
    tmp_path: Path, family: str, method: str, bits: int
) -> None:
    """A checkpoint that is stored quantised, and one that is quantised while it is loaded, are the same base."""
    tiny_model(family).save_pretrained(tmp_path / "plain")
    quantize_model(tiny_model(family), bits).save_pretrained(tmp_path / "stored")
    made, model = prepared(family, method, glmkit.load(tmp_path / "stored").model)
    learn_a_little(model, family)
    (tmp_path / "result").mkdir()
    made.save(model, NoTokenizer(), tmp_path / "result")
    for base, quantize in (("stored", None), ("plain", f"official-int{bits}")):
        loaded = glmkit.load(tmp_path / base, adapter=tmp_path / "result", quantize=quantize).model
        torch.testing.assert_close(logits(loaded, family), logits(model.eval(), family), atol=1e-5, rtol=1e-5)


def test_saving_a_whole_model_shows_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    method = make_method(MethodBlock(name="full"))
    method.save(method.prepare(tiny_model("chatglm2")), NoTokenizer(), tmp_path)
    assert capfd.readouterr().err == ""
    assert (tmp_path / "model.safetensors").exists()
