"""The network against stored results of the official code, through the Auto classes that users call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import glmkit
from glmkit.errors import ConfigError
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.layers import rotary_angles, rotate_pairs
from official_results import ATOL, Case, score

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("chatglm2", "chatglm2-32k", "chatglm3")
FORWARD = (
    "single",
    "long",
    "batch_left_pad",
    "batch_left_pad_with_answers",
    "batch_left_pad_mask_only",
    "single_shifted_positions",
    "train",
)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return Case(shared / "conformance" / request.param)


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


@pytest.mark.parametrize("name", ["single", "batch_left_pad", "train"])
def test_eager_attention_computes_the_same(shared: Path, name: str) -> None:
    case = Case(shared / "conformance" / "chatglm2", attn_implementation="eager")
    with torch.no_grad():
        case.close(name, case.model(**case.inputs(name)).logits)


def incremental(case: Case, name: str) -> None:
    """Prefill, then greedy steps, as generate does it."""
    inputs = case.inputs(name)
    mask = inputs.pop("attention_mask", None)
    positions = inputs.pop("position_ids", None)
    ids = inputs["input_ids"]
    cache, logits, tokens = None, [], []
    for _ in range(9):
        with torch.no_grad():
            output = case.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        assert output.logits.shape[1] == 1
        cache, last = output.past_key_values, output.logits[:, -1]
        logits.append(last)
        ids = last.argmax(-1, keepdim=True)
        tokens.append(ids)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        if positions is not None:
            positions = positions[:, -1:] + 1
    np.testing.assert_array_equal(torch.cat(tokens, dim=1).numpy(), case.arrays[f"{name}.tokens"])
    case.close(name, torch.stack(logits, dim=1))


@pytest.mark.parametrize("name", ["incremental", "incremental_batch_left_pad"])
def test_incremental_decoding(case: Case, name: str) -> None:
    incremental(case, name)


@pytest.mark.parametrize("name", ["greedy24", "greedy24_batch_left_pad"])
def test_generate_greedily(case: Case, name: str) -> None:
    sequences = case.model.generate(**case.inputs(name), do_sample=False, max_new_tokens=24)
    np.testing.assert_array_equal(sequences.numpy(), case.arrays[f"{name}.sequences"])


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_generate_with_other_caches_and_assistance(case: Case, options: dict[str, object]) -> None:
    inputs = case.inputs("greedy24")
    sequences = case.model.generate(**inputs, do_sample=False, max_new_tokens=24, **options)
    np.testing.assert_array_equal(sequences.numpy(), case.arrays["greedy24.sequences"])


def test_generate_with_beams(case: Case) -> None:
    """transformers 5 rewrote beam search and may return another sequence; then its score must not be worse."""
    inputs = case.inputs("beam4")
    found = case.model.generate(**inputs, do_sample=False, max_new_tokens=24, num_beams=4)
    stored = torch.from_numpy(case.arrays["beam4.sequences"])
    assert score(case.model, found, 12, 2) >= score(case.model, stored, 12, 2) - 1e-4


def test_gradients_and_sgd(shared: Path, case: Case) -> None:
    """Gradient norms and the losses over plain SGD steps; activation checkpointing must change neither."""
    manifest, folder = case.manifest["gradients"], case.model.config._name_or_path
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
                stored = {k[5:]: v for k, v in case.arrays.items() if k.startswith("grad.")}
                for name, gradient in stored.items():
                    mine = model.get_parameter(name).grad.numpy()
                    np.testing.assert_allclose(mine, gradient, atol=ATOL, rtol=1e-3, err_msg=name)
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
@pytest.mark.parametrize("family", FAMILIES)
def test_p_tuning(shared: Path, family: str, kind: str) -> None:
    """The official recipe: the config says how long the prefix is, its tensors are loaded into `prefix_encoder`."""
    folder = shared / "conformance" / family
    length = json.loads((folder / kind / "config.json").read_text())["pre_seq_len"]
    projection = kind == "ptuning_proj"
    config = AutoConfig.from_pretrained(folder / "model", pre_seq_len=length, prefix_projection=projection)
    case = Case(folder, config=config)
    model = case.model
    state = torch.load(folder / kind / "pytorch_model.bin", weights_only=True)
    start = "transformer.prefix_encoder."
    model.transformer.prefix_encoder.load_state_dict({k[len(start) :]: v.float() for k, v in state.items()})

    prefix = model.transformer.prefix_encoder(1)
    for layer, (keys, values) in enumerate(prefix):
        stored = case.arrays[f"{kind}.prefix_past_key_values"][layer]  # (2, P, B, K, D)
        np.testing.assert_allclose(keys.detach().permute(2, 0, 1, 3).numpy(), stored[0], atol=ATOL)
        np.testing.assert_allclose(values.detach().permute(2, 0, 1, 3).numpy(), stored[1], atol=ATOL)
    for name in ("single", "batch_left_pad", "train"):
        with torch.no_grad():
            output = model(**case.inputs(f"{kind}.{name}"))
        case.close(f"{kind}.{name}", output.logits)
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
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        after = float(model(**case.inputs(f"{kind}.train")).loss)
    assert after == pytest.approx(facts["loss_after_one_sgd_step_lr0.1_on_all_grad_params"], rel=1e-4)

    loaded = glmkit.load(with_tokenizer(folder / "model", shared), adapter=folder / kind, dtype="float32").model
    with torch.no_grad():
        case.close(f"{kind}.single", loaded(**case.inputs(f"{kind}.single")).logits)


_folders: dict[Path, Path] = {}


def with_tokenizer(folder: Path, shared: Path) -> Path:
    """The same folder with the official tokenizer file beside the weights, made of links inside a copy."""
    import shutil
    import tempfile

    if folder not in _folders:
        copy = Path(tempfile.mkdtemp()) / "model"
        shutil.copytree(folder, copy)
        shutil.copy(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", copy / "tokenizer.model")
        _folders[folder] = copy
    return _folders[folder]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(shared: Path, family: str, dtype: str) -> None:
    """Our logits in half precision must lie as near to float32 as the official ones do, or nearer.

    The official generation 2 code rounds rotary positions and angles in half precision; ours does not.
    """
    folder = shared / "conformance" / family
    half = np.load(folder / "half.npz")
    official = json.loads((folder / "half_manifest.json").read_text())["max_abs_diff_vs_float32"]
    case = Case(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).eval()
    subset = case.arrays["vocab_subset"]
    for name in ("single", "long", "batch_left_pad"):
        inputs = case.inputs(name)
        with torch.no_grad():
            logits = model(**inputs).logits.float()[..., subset].numpy()
        seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool().numpy()
        error = np.abs(logits - case.arrays[f"{name}.logits"])[seen].max()
        assert error <= 1.5 * official[f"{dtype}.{name}"] + 0.01, (name, error, official[f"{dtype}.{name}"])
        stored = half[f"{dtype}.{name}.logits"]
        assert np.abs(logits - stored)[seen].max() <= 2.5 * official[f"{dtype}.{name}"] + 0.02


@pytest.mark.parametrize("name", ["base", "wide_kv", "bias_linear", "no_qkv_bias", "no_qk_scaling"])
def test_config_switches_that_are_exact(name: str) -> None:
    arrays = np.load(FIXTURES / "config_switches" / "arrays.npz")
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto.from_pretrained(FIXTURES / "config_switches" / f"chatglm2-{name}", dtype=torch.float32).eval()
        assert type(model) is ChatGLM2ForCausalLM
        with torch.no_grad():
            logits = model(torch.from_numpy(arrays[f"chatglm2-{name}.input_ids"])).logits
        np.testing.assert_allclose(logits.numpy(), arrays[f"chatglm2-{name}.logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mha", "multi_query_attention"),
        ("post_ln_residual", "apply_residual_connection_post_layernorm"),
        ("layernorm", "rmsnorm"),
        ("no_final_norm", "post_layer_norm"),
        ("fp32_residual", "fp32_residual_connection"),
    ],
)
def test_config_switches_that_are_refused(name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"unsupported: {field}="):
        AutoModel.from_pretrained(FIXTURES / "config_switches" / f"chatglm2-{name}")


@pytest.mark.parametrize("name", ["chatglm2", "chatglm2-32k.ratio16", "chatglm2-32k.ratio1", "chatglm3"])
def test_rotary(name: str) -> None:
    arrays = np.load(FIXTURES / "rotary" / "arrays.npz")
    scale = 16.0 if "ratio16" in name else 1.0
    start = f"{name}.kv_channels128.float32"
    cos, sin = rotary_angles(torch.from_numpy(arrays[f"{start}.positions"])[None], 64, 10_000.0, scale)
    mine = torch.stack((cos, sin), dim=-1)[0].numpy()
    # Angles up to 32,767 rad in float32 are exact to 2e-3.
    np.testing.assert_allclose(mine, arrays[f"{start}.cache"], atol=4e-3, rtol=0)
    near = arrays[f"{start}.positions"] < 2_048
    np.testing.assert_allclose(mine[near], arrays[f"{start}.cache"][near], atol=3e-4, rtol=0)
    x = torch.from_numpy(arrays[f"{name}.rotated.kv_channels128.x"]).transpose(0, 1)  # (B, T, H, D)
    positions = torch.from_numpy(arrays[f"{name}.rotated.kv_channels128.position_ids"])
    turned = rotate_pairs(x, *rotary_angles(positions, 64, 10_000.0, scale))
    stored = arrays[f"{name}.rotated.kv_channels128.x_rotated"]
    np.testing.assert_allclose(turned.transpose(0, 1).numpy(), stored, atol=ATOL, rtol=0)


def test_half_precision_keeps_long_positions() -> None:
    """`model.half()` must not round positions: neighbouring positions above 2,048 stay apart (float16 merges them)."""
    config = AutoConfig.from_pretrained(FIXTURES / "config_switches" / "chatglm2-base")
    model = ChatGLM2ForCausalLM(config).half()
    cos, _ = model.transformer.rotary(torch.tensor([[32_766, 32_767]]), torch.float16)
    expected = rotary_angles(torch.tensor([[32_766, 32_767]]), config.kv_channels // 2, 10_000.0)[0].half()
    assert torch.equal(cos, expected)
    assert not torch.equal(cos[0, 0], cos[0, 1])
