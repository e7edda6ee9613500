"""Native steps of the network against the model's own forward, on every level that this CPU can run."""

from __future__ import annotations

import copy
import ctypes
import gc
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glmkit
from glmkit import hf
from glmkit.chat.messages import Message
from glmkit.chat.templates import prompt_ids
from glmkit.engine.cache import BufferCache, new_cache
from glmkit.engine.decode import generate_batch
from glmkit.engine.layout import CausalLayout
from glmkit.engine.native import Runner, runner_for, why_not
from glmkit.engine.sampling import SamplingOptions
from glmkit.kernels import build
from glmkit.kernels.decoder import MOST_TOKENS
from glmkit.kernels.levels import LEVELS, VARIABLE, compiler_flags, possible_levels
from glmkit.models.chatglm2 import MLP, ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.quant.linear import QuantizedLinear, pack_model, pack_nibbles
from glmkit.quant.official import quantize_model

VOCABULARY = 203
EXACT = 1e-5
"""What float32 sums in another order may differ by, as a share of the largest logit."""


TILES = "tiles"
"""The amx level with its instructions modelled in plain C++, which runs on every CPU."""


@pytest.fixture(scope="module", params=[*LEVELS, TILES])
def level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    name: str = request.param
    if name not in (*possible_levels(), TILES):
        pytest.skip(f"this CPU cannot run {name}")
    using = _use(possible_levels()[0] if name == TILES else name)
    used = next(using)
    with pytest.MonkeyPatch.context() as patch:
        if name == TILES:
            modelled = _modelled_tiles(tmp_path_factory.mktemp("tiles") / "tiles.so")
            patch.setattr("glmkit.kernels.decoder.library", lambda: modelled)
        yield used
    next(using, None)


def _modelled_tiles(path: Path) -> ctypes.CDLL:
    compiler = build.find_compiler()
    assert compiler is not None
    level = next(level for level in possible_levels() if level != "amx")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", "-DGLM_EMULATE_TILES", f"-I{Path(__file__).parent}"]
    command = [*compiler[0], *flags, *compiler_flags(level), "-o", str(path), str(build.SOURCE)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return ctypes.CDLL(str(path))


@pytest.fixture
def best() -> Iterator[str]:
    """The fixture above may still be there: pytest ends it with the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmkit.kernels.decoder.library", build.library)
        yield from _use(possible_levels()[0])


def _use(name: str) -> Iterator[str]:
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        build._choose.cache_clear()
        assert build.level() == name
        yield name
    build._choose.cache_clear()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHAPES: dict[str, dict[str, Any]] = {
    "chatglm3": {},
    "chatglm2-32k": {"rope_ratio": 16, "rope_ratio_applies_to": "position", "add_qkv_bias": False},
    "glm4": {"rope_ratio": 500, "rope_ratio_applies_to": "base", "layernorm_epsilon": 1.5625e-7},
    "biases": {"add_bias_linear": True},
    "one group of 16": {"num_attention_heads": 16, "multi_query_group_num": 1, "kv_channels": 32},
    "no groups": {"num_attention_heads": 3, "multi_query_group_num": 3, "kv_channels": 12, "hidden_size": 36},
}


def tiny(**changes: Any) -> ChatGLM2ForCausalLM:
    sizes = {
        "num_layers": 2,
        "padded_vocab_size": VOCABULARY,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "num_attention_heads": 6,
        "multi_query_group_num": 2,
        "seq_length": 4096,
        "multi_query_attention": True,
        "add_qkv_bias": True,
        "generation": 3,
    }
    torch.manual_seed(1)
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def random_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def runner_of(model: Any) -> Runner:
    runner = runner_for(model)
    assert runner is not None, why_not(model)
    return runner


def native_only(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    def refuse(*_: Any) -> None:
        raise AssertionError("left to the model")

    monkeypatch.setattr(runner, "_model", refuse)
    return runner


def off_by(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


@torch.inference_mode()
def forward(model: Any, ids: Tensor, **more: Any) -> Tensor:
    logits: Tensor = model(ids, **more).logits
    return logits


def run(runner: Any, ids: Tensor, cache: BufferCache, layout: dict[str, Tensor], keep: int = 1) -> Tensor:
    logits: Tensor = runner(ids, cache=cache, keep=keep, **layout)
    return logits


def in_steps(runner: Runner, ids: Tensor, steps: tuple[int, ...], cache: BufferCache, **more: Any) -> Tensor:
    assert sum(steps) == ids.shape[1]
    parts = [runner(part, cache=cache, keep=part.shape[1], **more) for part in ids.split(steps, dim=1)]
    return torch.cat(parts, dim=1)


# --- float32: the model's own numbers ---


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_any_length_are_the_models_forward(level: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(**SHAPES[shape])
    for rows in (1, 3):
        ids = random_ids(rows, 40)
        cache = new_cache(model, rows, 4)  # grows three times
        found = in_steps(native_only(runner_of(model), monkeypatch), ids, (9, 1, 5, 2, 1, 8, 3, 4, 7), cache)
        assert found.dtype == torch.float32
        assert off_by(found, forward(model, ids)) < EXACT


@pytest.mark.parametrize("rows", [2, 5])
def test_padding_on_the_left(level: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the decode loop does it: the prompts in chunks, then single tokens; against each row alone."""
    model = tiny()
    width, pads = 11, torch.tensor([0, 7, 3, 10, 5])[:rows]
    ids = random_ids(rows, width + 4)
    layout, runner = CausalLayout(width, pads), native_only(runner_of(model), monkeypatch)
    cache = new_cache(model, rows, 16)
    parts = [
        run(runner, ids[:, start:end], cache, layout.prompt(start, end), end - start)
        for start, end in ((0, 6), (6, 11))
    ]
    parts += [run(runner, ids[:, at : at + 1], cache, layout.step(1)) for at in range(width, width + 4)]
    found = torch.cat(parts, dim=1)
    for row, pad in enumerate(pads.tolist()):
        assert off_by(found[row, pad:], forward(model, ids[row : row + 1, pad:])[0]) < EXACT
        assert bool(found[row].isfinite().all())


def test_a_cache_that_was_cut_and_whose_rows_were_chosen(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    ids, other = random_ids(4, 20), random_ids(4, 6, seed=1)
    runner, cache = native_only(runner_of(model), monkeypatch), new_cache(model, 4, 20)
    in_steps(runner, ids, (7, 7, 6), cache)
    cache.truncate(13)
    cache.select_rows([2, 0])
    found = in_steps(runner, other[[2, 0]], (5, 1), cache)
    whole = torch.cat((ids[[2, 0], :13], other[[2, 0]]), dim=1)
    assert off_by(found, forward(model, whole)[:, 13:]) < EXACT


def test_native_steps_and_calls_of_the_model_share_a_cache(best: str) -> None:
    model = tiny()
    ids = random_ids(2, 90)
    runner, cache = runner_of(model), new_cache(model, 2, 64)
    parts = [runner(part, cache=cache, keep=part.shape[1]) for part in ids.split((60, 2, 25, 3), dim=1)]
    assert off_by(torch.cat(parts, dim=1), forward(model, ids)) < EXACT


def test_a_long_context_in_many_ranges(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(seq_length=8192)
    ids = random_ids(1, 2600)
    with torch.no_grad():
        model.transformer.encoder.layers[0].self_attention.query_key_value.weight.mul_(3)  # far from uniform weights
    cache, runner = new_cache(model, 1, 2600), runner_of(model)
    runner(ids[:, :2590], cache=cache)
    found = in_steps(native_only(runner, monkeypatch), ids[:, 2590:], (1, 9), cache)
    assert off_by(found, forward(model, ids)[:, 2590:]) < EXACT


def test_glm_nano_answers_as_with_torch(level: str) -> None:
    loaded = glmkit.load("glm-nano", dtype="float32")
    assert loaded.tokenizer is not None
    model, options = loaded.model, SamplingOptions(temperature=0.0)
    texts = ("你好", "类型#裙*颜色#蓝色*风格#简约", "What is the capital of France?", "写一段连衣裙的文案")
    prompts = [prompt_ids(loaded.tokenizer, [Message("user", text)]) for text in texts]

    def answers() -> list[list[int]]:
        return generate_batch(model, prompts, options, stop_ids=[], max_new_tokens=40, batch_size=3)

    assert why_not(model) is None
    found = answers()
    model.glm_kernels = "torch"
    assert runner_for(model) is None
    assert found == answers()
    assert all(len(set(answer)) > 3 for answer in found)


# --- 16 bits, and rounded weights ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["chatglm3", "one group of 16"])
def test_16_bits_lose_no_more_than_torch_does(level: str, dtype: torch.dtype, shape: str) -> None:
    model = tiny(**SHAPES[shape])
    exact = copy.deepcopy(model.to(dtype)).float()
    model.eval(), exact.eval()
    ids = random_ids(2, 60)
    wanted = forward(exact, ids)
    cache = new_cache(model, 2, 60)
    found = in_steps(runner_of(model), ids, (10, 1, 9, 10, 15, 15), cache)
    assert cache.layers[0].keys.dtype == dtype

    def error(logits: Tensor) -> float:
        return float((logits.double() - wanted).norm() / wanted.norm())

    assert error(found) < 0.7 * error(forward(model, ids))  # sums, norms and the residual stream are float32 here


def quantised(model: ChatGLM2ForCausalLM, kind: str) -> tuple[Any, Any]:
    """The model with quantised blocks, packed; and one in float64 with the matrices that these stand for."""
    exact = copy.deepcopy(model)
    if kind == "int4-groups":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                model.set_submodule(name, _in_groups(layer))
    else:
        quantize_model(model, int(kind[-1]))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            exact.get_submodule(name).weight.data = layer.dequantize().float()
    model.to(torch.bfloat16)
    ends = {name: one for name, one in model.named_parameters() if one.dtype == torch.bfloat16 and "scale" not in name}
    for name, parameter in ends.items():
        exact.get_parameter(name).data = parameter.data.float()
    assert pack_model(model, "native") > 0
    return model, exact.double()


def _in_groups(layer: nn.Linear) -> QuantizedLinear:
    groups = layer.weight.detach().unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1) / 7).half()
    q = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(1)
    return QuantizedLinear(pack_nibbles(q), scale, layer.bias, 4)


QUANTISED = ("int8", "int4", "int4-groups")
SIZES = {"num_layers": 1, "padded_vocab_size": 208, "hidden_size": 128, "ffn_hidden_size": 160, "kv_channels": 32}
# One block: what rounded activations change in one place, later blocks would only enlarge.


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_steps_are_near_the_matrices_they_stand_for(
    level: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, exact = quantised(tiny(**SIZES), kind)
    ids = random_ids(2, 70)
    wanted = forward(exact, ids)
    runner = native_only(runner_of(model), monkeypatch)
    found = in_steps(runner, ids, (12, 1, 7, 40, 10), new_cache(model, 2, 8))  # 40: halves around torch's attention
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.mean()) < 0.015
    assert float(error.max()) < 0.04


def test_a_quantised_prompt_with_padding(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, exact = quantised(tiny(**SIZES), "int4-groups")
    pads, width = torch.tensor([0, 30]), 64
    ids, layout = random_ids(2, width + 1), CausalLayout(width, pads)
    runner, cache = native_only(runner_of(model), monkeypatch), new_cache(model, 2, width + 1)
    first = run(runner, ids[:, :40], cache, layout.prompt(0, 40), 10)
    second = run(runner, ids[:, 40:64], cache, layout.prompt(40, 64), 24)
    last = run(runner, ids[:, 64:], cache, layout.step(1))
    found = torch.cat((first, second, last), dim=1)
    for row, pad in enumerate(pads.tolist()):
        wanted = forward(exact, ids[row : row + 1, pad:])[0, 30 - pad :]
        assert float(((found[row] - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean()) < 0.02


# --- the same bits ---


def prepared(kind: str) -> ChatGLM2ForCausalLM:
    if kind in QUANTISED:
        return quantised(tiny(**{**SIZES, "num_layers": 2}), kind)[0]
    return tiny(**{**SIZES, "num_layers": 2, "num_attention_heads": 16}).to(getattr(torch, kind)).eval()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", *QUANTISED])
def test_drafts_are_checked_with_the_bits_of_single_steps(level: str, kind: str) -> None:
    model = prepared(kind)
    ids = random_ids(1, 640)
    runner, one, many = runner_of(model), new_cache(model, 1, 640), new_cache(model, 1, 640)
    for start in (500, 12):  # across a range's end, and within a chunk
        for cache in (one, many):
            cache.truncate(0)
            for part in ids[:, :start].split(25, dim=1):
                runner(part, cache=cache)
        singles = in_steps(runner, ids[:, start : start + 16], (1,) * 16, one)
        together = in_steps(runner, ids[:, start : start + 16], (8, 5, 3), many)
        assert torch.equal(singles, together)
        assert bool(singles.isfinite().all())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4-groups"])
def test_a_row_has_the_same_bits_alone_and_among_others(level: str, kind: str) -> None:
    model = prepared(kind)
    pads, width = torch.tensor([0, 5, 9]), 10
    ids, layout, runner = random_ids(3, width + 3), CausalLayout(width, pads), runner_of(model)
    cache = new_cache(model, 3, 16)
    parts = [run(runner, ids[:, :width], cache, layout.prompt(0, width))]
    parts += [run(runner, ids[:, at : at + 1], cache, layout.step(1)) for at in range(width, width + 3)]
    found = torch.cat(parts, dim=1)
    for row, pad in enumerate(pads.tolist()):
        alone = new_cache(model, 1, 4)
        single = [runner(ids[row : row + 1, pad:width], cache=alone)]
        single += [runner(ids[row : row + 1, at : at + 1], cache=alone) for at in range(width, width + 3)]
        assert torch.equal(found[row], torch.cat(single, dim=1)[0])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", *QUANTISED])
def test_rows_with_caches_of_their_own_have_the_bits_that_each_has_alone(level: str, kind: str) -> None:
    """Of lengths on both sides of a range's end, some of which grow."""
    model = prepared(kind)
    runner, lengths = runner_of(model), (3, 600, 1, 511, 512, 40)
    own, alone = ([new_cache(model, 1, length + 2 * (row % 2)) for row, length in enumerate(lengths)] for _ in range(2))
    for row, length in enumerate(lengths):
        for cache in (own[row], alone[row]):
            runner(random_ids(1, length, seed=row), cache=cache)
    for step in range(3):
        ids = random_ids(len(lengths), 1, seed=50 + step)
        found = runner.rows(ids, own)
        wanted = [runner(ids[row : row + 1], cache=cache)[:, 0] for row, cache in enumerate(alone)]
        assert found is not None
        assert torch.equal(found, torch.cat(wanted))
        assert bool(found.isfinite().all())
    for one, other in zip(own, alone):
        assert {layer.filled_tokens for layer in one.layers} == {other.get_seq_length()}
        filled = other.get_seq_length()
        for mine, theirs in zip(one.layers, other.layers):
            assert torch.equal(mine.keys[:, :, :filled], theirs.keys[:, :, :filled])
            assert torch.equal(mine.values[:, :, :filled], theirs.values[:, :, :filled])


def test_threads_change_no_bit(level: str) -> None:
    model = glmkit.load("glm-nano", dtype="float32").model
    ids = random_ids(2, 620)

    def logits(threads: int) -> Tensor:
        runner, cache = runner_of(model), new_cache(model, 2, 620)
        torch.set_num_threads(1)
        runner(ids[:, :600], cache=cache)
        torch.set_num_threads(threads)
        return in_steps(runner, ids[:, 600:], (1, 8, 11), cache)

    assert torch.equal(logits(1), logits(2))
    assert torch.equal(logits(1), logits(3))


# --- when the model itself is asked ---


def test_without_native_code_there_is_no_runner(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    build._choose.cache_clear()
    assert runner_for(tiny()) is None
    assert "no native code" in str(why_not(tiny()))


def _hook(model: Any) -> None:
    model.transformer.encoder.layers[1].mlp.register_forward_hook(lambda *_: None)


def _own_forward(model: Any) -> None:
    block = model.transformer.encoder.layers[1]
    block.forward = block.forward


def _eager(model: Any) -> None:
    model.config._attn_implementation = "eager"


def _own_part(model: Any) -> None:
    class Silent(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    model.transformer.encoder.layers[1].mlp = Silent(model.config)


def _own_attention(model: Any) -> None:
    model.transformer.encoder.layers[1].self_attention.attend = lambda q, k, v, mask: q


def _cut_block(model: Any) -> None:
    del model.transformer.encoder.layers[1]


def _longer_output(model: Any) -> None:
    model.transformer.output_layer.weight = nn.Parameter(torch.randn(2 * VOCABULARY, 64))


def _wider_embedding(model: Any) -> None:
    model.transformer.embedding.word_embeddings.weight = nn.Parameter(torch.randn(VOCABULARY, 96))


def _other_eps(model: Any) -> None:
    model.transformer.encoder.layers[1].input_layernorm.eps = 0.1


def _quantise_without_packing(model: Any) -> None:
    quantize_model(model, 8)


OBSTACLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "training": (lambda model: model.train(), "training"),
    "hook": (_hook, "layers.1.mlp has a hook"),
    "own forward": (_own_forward, "a way of its own"),
    "eager": (_eager, "attention is eager"),
    "prefix": (lambda model: model.transformer.attach_prefix(2, False), "prefix"),
    "meta": (lambda model: model.to("meta"), "no plain tensor"),
    "float64": (lambda model: model.double(), "no linear layer"),
    "not packed": (_quantise_without_packing, "QuantizedLinear of block 0"),
    "own part": (_own_part, "a Silent stands in the place of a MLP"),
    "own attention": (_own_attention, "attention is not the usual one"),
    "cut block": (_cut_block, "1 blocks, its config says 2"),
    "longer output": (_longer_output, "output layer is of another kind"),
    "wider embedding": (_wider_embedding, "not all of the width 64"),
    "other eps": (_other_eps, "differ in eps"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_stands_beside_the_plain_network_is_left_to_the_model(best: str, name: str) -> None:
    model = tiny()
    assert why_not(model) is None
    change, reason = OBSTACLES[name]
    change(model)
    assert reason in str(why_not(model))
    assert runner_for(model) is None


def test_a_hook_for_all_modules_is_called(best: str) -> None:
    model = tiny()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "for all modules" in str(why_not(model))
    finally:
        handle.remove()
    assert why_not(model) is None


def test_other_caches_masks_and_wrong_ids_are_left_to_the_model(best: str) -> None:
    model, ids = tiny(), random_ids(2, 8)
    runner, wanted = runner_of(model), forward(tiny(), ids)[:, -1:]
    assert off_by(runner(ids, cache=hf.DynamicCache(config=model.config)), wanted) < EXACT
    holes = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]] * 2)
    cache = new_cache(model, 2, 8)
    assert (
        off_by(runner(ids, cache=cache, attention_mask=holes), forward(model, ids, attention_mask=holes)[:, -1:])
        < EXACT
    )
    cache.truncate(0)
    seen = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    assert off_by(runner(ids, cache=cache, attention_mask=seen), wanted) < EXACT
    cache.truncate(3)
    with pytest.raises(IndexError):
        runner(ids + VOCABULARY, cache=cache)
    assert cache.get_seq_length() == 3
    with pytest.raises(glmkit.errors.UsageError, match="2 rows"):
        runner(ids[:1], cache=new_cache(model, 2, 8))


def test_positions_are_those_that_were_asked_for(best: str) -> None:
    model, ids = tiny(), random_ids(1, 5)
    for positions in (torch.tensor([[7, 3, 3, 0, 1]]), torch.tensor([[100_000, 1, 2, 3, 4]])):
        found = runner_of(model)(ids, cache=new_cache(model, 1, 5), position_ids=positions, keep=5)
        assert off_by(found, forward(model, ids, position_ids=positions)) < EXACT
        narrow = runner_of(model)(
            ids.to(torch.int32), cache=new_cache(model, 1, 5), position_ids=positions.to(torch.int32), keep=5
        )
        assert torch.equal(narrow, found)


def test_weights_that_change_are_noticed(best: str) -> None:
    """In place between generations, and moved or converted within one."""
    model, ids = tiny().to(torch.bfloat16).eval(), random_ids(1, 6)
    runner_of(model)(ids, cache=new_cache(model, 1, 6))
    changed = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(changed)
    wanted = forward(copy.deepcopy(model).float().eval(), ids)
    runner, cache = runner_of(model), new_cache(model, 1, 6)
    found = runner(ids[:, :3], cache=cache, keep=3)
    assert off_by(found, wanted[:, :3]) < 0.03
    model.float()
    assert off_by(runner(ids[:, 3:], cache=cache, keep=3), wanted[:, 3:]) < 0.03
    model.config.rope_ratio, model.config.rope_ratio_applies_to = 8, "position"
    assert off_by(runner_of(model)(ids, cache=new_cache(model, 1, 6), keep=6), forward(model, ids)) < EXACT


def test_what_a_step_reads_is_not_freed_before_it_is_over(best: str) -> None:
    """Weights that are replaced between two steps, and rotary tables that another thread makes longer."""
    model, ids = tiny(), random_ids(1, 6)
    wanted = forward(model, ids)
    runner, cache = runner_of(model), new_cache(model, 1, 6)
    runner(ids[:, :3], cache=cache)
    layer = model.transformer.encoder.layers[1].mlp.dense_h_to_4h
    replaced = weakref.ref(layer.weight.untyped_storage())
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    read = runner._step.cosines
    runner._network.reach(model, 5000)
    gc.collect()
    assert replaced() is not None
    assert any(kept is not None and kept.data_ptr() == read for kept in runner._held)
    assert off_by(runner(ids[:, 3:], cache=cache, keep=3), wanted[:, 3:]) < EXACT
    assert runner._step.angles >= 5000


def test_adapters_run_by_the_model_and_the_base_beside_them_natively(best: str) -> None:
    from glmkit.adapters.switching import Adapters, LoraBeside, LoraMatrices

    model, ids = tiny(), random_ids(1, 4)
    wanted = forward(model, ids)
    adapters = Adapters(model)
    layer = model.transformer.encoder.layers[0].mlp.dense_4h_to_h
    beside = LoraBeside(adapters)
    beside.add("loud", LoraMatrices(torch.randn(4, 96), torch.randn(64, 4), 1.0))
    layer.lora = beside
    layer.register_forward_hook(beside.after)
    adapters.folders["loud"] = None  # type: ignore[assignment]
    assert why_not(adapters.view("loud")) == "the adapter 'loud' is active"
    assert runner_for(adapters.view("loud")) is None
    for base in (model, adapters.view(None)):
        runner = runner_of(base)
        assert off_by(runner(ids, cache=new_cache(model, 1, 4), keep=4), wanted) < EXACT
    with adapters.active("loud"):  # a runner that was made before
        loud = runner_for(model)
        assert loud is None
        found = runner(ids, cache=new_cache(model, 1, 4), keep=4)
        assert off_by(found, wanted) < EXACT  # the view of the base stays the base
    runner = runner_of(model)
    adapters.choose("loud")
    assert off_by(runner(ids, cache=new_cache(model, 1, 4), keep=4), wanted) > 0.01


def test_what_is_not_a_number_stays_so(level: str) -> None:
    model, ids = tiny(), random_ids(2, 4)
    ids[1] = (ids[0, 1] + 1) % VOCABULARY
    ids[0, [0, 2, 3]] = ids[1, 0]
    with torch.no_grad():
        model.transformer.embedding.word_embeddings.weight[ids[0, 1]] = float("nan")
    found = in_steps(runner_of(model), ids, (1, 2, 1), new_cache(model, 2, 4))
    assert bool(found[0, 0].isfinite().all())
    assert bool(found[1].isfinite().all())
    assert bool(found[0, 1:].isnan().all())


def test_a_model_that_is_gone_leaves_nothing_behind(best: str) -> None:
    model = tiny()
    runner = runner_of(model)
    runner(random_ids(1, MOST_TOKENS), cache=new_cache(model, 1, 40))
    weight = weakref.ref(model.transformer.output_layer.weight)
    del model, runner
    gc.collect()
    assert weight() is None
