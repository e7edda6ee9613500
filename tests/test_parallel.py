"""Tensor parallelism gives the single model's numbers; so does a model whose blocks lie on several devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

from glmkit import load
from glmkit.engine import SamplingOptions, stream
from glmkit.engine.cache import new_cache
from glmkit.errors import UsageError
from glmkit.export.model_parallel import quantize_shards, reshard
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.parallel import main, shard_model
from glmkit.placement import device_of, place_layers, plan_layers
from tiny_families import write_glm

SECONDS = 300  # starting two processes takes most of it, on a busy machine
# Sums in another order differ by a few units in the last place of float32; GLM-130B multiplies its residual stream by
# sqrt(2 L) twice in a block, so its own error against float64 is 3e-5 already.
# GLM-130B's random models are badly conditioned: a change of 1e-7 of the weights moves logits of 18 by 5e-4.
ATOL, ATOL_130B = 1e-5, 1e-3

_CHATGLM2 = {
    "num_layers": 2,
    "padded_vocab_size": 128,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "seq_length": 64,
    "generation": 3,
    "rope_ratio_applies_to": "base",
}
_GLM130B = {
    "num_layers": 3,
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "inner_hidden_size": 40,
    "max_sequence_length": 64,
    "mask_token_id": 89,
    "gmask_token_id": 90,
    "smask_token_id": 91,
    "bos_token_id": 92,
    "eos_token_id": [93, 88],
    "pad_token_id": 88,
}


def _models() -> dict[str, Any]:
    """A model with random weights of every family."""
    torch.manual_seed(0)
    glm = {"num_layers": 2, "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 64}
    glm |= {"mask_token_ids": [90, 91, 92], "sop_token_id": 93, "eos_token_id": 94}
    first = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 24}
    models = {
        "chatglm": ChatGLMForCausalLM(ChatGLMConfig(**first)),
        "chatglm2": ChatGLM2ForCausalLM(ChatGLM2Config(**_CHATGLM2)),
        "one group": ChatGLM2ForCausalLM(ChatGLM2Config(**{**_CHATGLM2, "multi_query_group_num": 1})),
        "int4": ChatGLM2ForCausalLM(ChatGLM2Config(**_CHATGLM2)).half(),
        "glm": GLMForConditionalGeneration(GLMConfig(**glm)),
        "glm-130b": GLM130BForCausalLM(GLM130BConfig(**_GLM130B)),
    }
    for model in models.values():
        for parameter in model.parameters():  # large enough that attention looks somewhere; biases and norms all differ
            parameter.data = 6 * parameter if parameter.ndim == 2 else parameter + 0.1 * torch.randn_like(parameter)
    models["int4"].quantize(4)
    return models


def _prompt(kind: str) -> list[int]:
    prompts = {
        "chatglm": [5, 66, 99, 5000, 130001, 130004],
        "glm": [5, 66, 7, 90, 8, 93],
        "glm-130b": [56, 41, 5, 18, 70, 50, 56, 90, 92],
    }
    return prompts.get(kind, [5, 66, 7, 90, 8])


def _job(name: str, folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    prompt = _prompt(kind)
    inputs = {"input_ids": torch.tensor([prompt])}
    return {"name": name, "folder": str(folder), "inputs": inputs, "prompt": prompt, "tokens": 12, **more}


def _run(folder: Path, jobs: list[dict[str, Any]], ranks: int = 2) -> list[dict[str, Any]]:
    """What each rank has found."""
    torch.save(jobs, folder / "jobs.pt")
    script = Path(__file__).with_name("parallel_ranks.py")
    done = _torchrun(ranks, [str(script), str(folder / "jobs.pt")])
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _torchrun(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*start, *arguments], capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )


def _alone(job: dict[str, Any]) -> tuple[torch.Tensor, list[int], tuple[int, int]]:
    """Logits and greedy ids of the undivided model, its key/value heads and their width."""
    model = load(job["folder"], dtype="float32", device="cpu").model
    with torch.no_grad():
        logits = model(**job["inputs"], use_cache=False).logits
    steps = stream(model, job["prompt"], SamplingOptions(temperature=0.0), stop_ids=(), max_new_tokens=job["tokens"])
    ids = [step.token_id for step in steps]
    return logits, ids, (model.config.num_key_value_heads, model.config.head_dim)


def _compare(found: tuple[dict[str, Any], dict[str, Any], dict[str, Any]], atol: float) -> None:
    job, first, second = found
    logits, ids, (heads, width) = _alone(job)
    torch.testing.assert_close(first["logits"], logits, atol=atol, rtol=1e-5)
    assert torch.equal(first["logits"], second["logits"])  # or the ranks would choose different tokens
    assert first["ids"] == second["ids"] == ids
    assert first["cache"][1] == second["cache"][1] == max(1, heads // 2)
    assert first["cache"][3] == width


# Two ranks -----------------------------------------------------------------------------------------------------------

NAMES = ("chatglm", "chatglm2", "one group", "int4", "glm", "glm-130b")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every family on two ranks, in one run: name -> (job, what rank 0 found, what rank 1 found)."""
    folder = tmp_path_factory.mktemp("ranks")
    models = _models()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    reshard(folder / "glm-130b", folder / "two", 2)
    quantize_shards(folder / "two", folder / "two int8", 8)
    reshard(folder / "glm", folder / "glm two", 2)
    jobs = [_job(name, folder / name, name) for name in NAMES]
    jobs += [_job(name, folder / name, "glm-130b") for name in ("two", "two int8")]
    jobs += [_job("glm two", folder / "glm two", "glm"), _job("drawn", folder / "chatglm2", "", temperature=1.0)]
    jobs += [_job("large", _write_large(folder / "large"), "", only_load=True)]
    first, second = _run(folder, jobs)
    return {job["name"]: (job, first[job["name"]], second[job["name"]]) for job in jobs}


def _write_large(folder: Path) -> Path:
    sizes = {"hidden_size": 512, "ffn_hidden_size": 2048, "padded_vocab_size": 16_000, "num_layers": 12}
    ChatGLM2ForCausalLM(ChatGLM2Config(**{**_CHATGLM2, **sizes})).save_pretrained(folder, max_shard_size="50MB")
    return folder


@pytest.mark.parametrize("name", [*NAMES, "glm two"])
def test_two_ranks_give_the_logits_and_the_answer_of_one(found: dict[str, Any], name: str) -> None:
    _compare(found[name], ATOL_130B if name == "glm-130b" else ATOL)


@pytest.mark.parametrize("name", ["two", "two int8"])
def test_ranks_read_their_own_files(found: dict[str, Any], name: str) -> None:
    _compare(found[name], ATOL_130B)
    quantised = "transformer.layers.0.mlp.dense_4h_to_h.weight_scale" in found[name][1]["shapes"]
    assert quantised == (name == "two int8")


def test_ranks_draw_the_same_tokens(found: dict[str, Any]) -> None:
    _, first, second = found["drawn"]
    assert first["ids"] == second["ids"]


def test_a_rank_holds_its_part_alone(found: dict[str, Any]) -> None:
    _, first, second = found["chatglm2"]
    shapes = first["shapes"]
    assert shapes == second["shapes"]
    assert shapes["transformer.embedding.word_embeddings.weight"] == (64, 32)
    layer = "transformer.encoder.layers.1."
    assert shapes[f"{layer}self_attention.query_key_value.weight"] == (16 + 8 + 8, 32)
    assert shapes[f"{layer}self_attention.query_key_value.bias"] == (32,)
    assert shapes[f"{layer}self_attention.dense.weight"] == (32, 16)
    assert shapes[f"{layer}mlp.dense_h_to_4h.weight"] == (48, 32)
    assert shapes[f"{layer}mlp.dense_4h_to_h.weight"] == (32, 24)
    assert shapes[f"{layer}input_layernorm.weight"] == (32,)


def test_the_whole_model_is_never_in_a_rank_s_memory(found: dict[str, Any]) -> None:
    """The peak holds the part, one tensor and a few buffers; the whole would be twice the part."""
    for result in found["large"][1:]:
        assert result["bytes"] > 80e6
        assert result["peak_bytes"] < 1.6 * result["bytes"]


SHARED = {
    "chatglm": ("chatglm/model", "chatglm"),
    "chatglm2": ("chatglm2/model", ""),
    "chatglm3": ("chatglm3/model", ""),
    "glm4": ("glm4/hf_repo", ""),
    "glm": ("glm_base/hf_repo", ""),
    "megatron_mp1": ("glm_base/megatron_mp1", ""),
    "megatron_mp2": ("glm_base/megatron_mp2", ""),
}
SHARDS = [f"sat_mp{degree}{suffix}" for degree in (1, 2) for suffix in ("", "_int8", "_int4")]


@pytest.fixture(scope="module")
def of_shared(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The official tiny checkpoints on two ranks."""
    folder = tmp_path_factory.mktemp("shared_ranks")
    official = shared / "conformance"
    jobs = []
    for name, (place, kind) in SHARED.items():
        shutil.copytree(official / place, folder / name, copy_function=shutil.copyfile)
        if name.startswith(("glm", "megatron")) and name != "glm4":
            values = json.loads((official / "glm_base/hf_repo/config.json").read_text())
            (folder / name / "config.json").write_text(
                json.dumps(values | {"mask_token_ids": [120, 125, 126], "sop_token_id": 123})
            )
        job = _job(name, folder / name, kind)
        if name in ("glm", "megatron_mp1", "megatron_mp2"):
            job["prompt"] = [119, 5, 66, 7, 120, 8, 118, 123]
        jobs.append(job)
    inputs = load_file(official / "glm130b/logits_gMASK.safetensors")
    stored = json.loads((official / "glm130b/manifest.json").read_text())["generation"]["gMASK"]
    for name in SHARDS:
        shutil.copytree(official / "glm130b" / name, folder / name, copy_function=shutil.copyfile)
        (folder / name / "config.json").write_text(json.dumps({"model_type": "glm-130b", **_GLM130B}))
        job = _job(name, folder / name, "glm-130b", prompt=stored["prompt_with_sop"])
        job["inputs"] = {
            "input_ids": inputs["input_ids"],
            "position_ids": inputs["position_ids"],
            "attention_mask": inputs["attention_mask_true_is_blocked"],
        }
        jobs.append(job)
    first, second = _run(folder, jobs)
    return {job["name"]: (job, first[job["name"]], second[job["name"]]) for job in jobs}


@pytest.mark.parametrize("name", SHARED)
def test_official_checkpoints_on_two_ranks(of_shared: dict[str, Any], name: str) -> None:
    _compare(of_shared[name], ATOL)


@pytest.mark.parametrize("name", SHARDS)
def test_official_shards_on_two_ranks(of_shared: dict[str, Any], shared: Path, name: str) -> None:
    """Logits of the official code with the weights of just these shards; int8 and int4 of one rank are divided."""
    _, first, second = of_shared[name]
    degree, _, bits = name.removeprefix("sat_mp").partition("_")
    file = f"logits_{bits}_mp{degree}" if bits else "logits_gMASK"
    expected = load_file(shared / f"conformance/glm130b/{file}.safetensors")["logits"]
    torch.testing.assert_close(first["logits"], expected, atol=3e-4, rtol=0)  # the fixture's own tolerance
    assert torch.equal(first["logits"], second["logits"])
    assert first["cache"][1] == 2
    if not bits:
        stored = json.loads((shared / "conformance/glm130b/manifest.json").read_text())["generation"]["gMASK"]
        start = len(stored["prompt_with_sop"])
        assert first["ids"] == second["ids"] == stored["greedy_topk1"][0][0][start:]


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_answers_once(tmp_path: Path) -> None:
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**_CHATGLM2))
    model.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--prompt-ids", "5,66,7", "--max-new-tokens", "6"]
    done = _torchrun(2, ["-m", "glmkit.parallel", *arguments])
    assert done.returncode == 0, done.stderr
    steps = stream(model.eval(), [5, 66, 7], SamplingOptions(temperature=0), stop_ids=(2,), max_new_tokens=6)
    assert done.stdout.split() == [str(step.token_id) for step in steps if step.is_text]


def test_a_rank_that_fails_ends_all_with_one_message(tmp_path: Path) -> None:
    ChatGLM2ForCausalLM(ChatGLM2Config(**_CHATGLM2)).save_pretrained(tmp_path / "model")
    script = tmp_path / "fails.py"
    script.write_text(
        "import os\n"
        "from glmkit import parallel\n"
        "from glmkit.errors import UsageError\n"
        "def fails(*_):\n"
        "    raise UsageError('rank 1 has lost its device', hint='look for it')\n"
        "if os.environ['RANK'] == '1':\n"
        "    parallel._sum_of_ranks = fails\n"
        "os._exit(parallel.main())\n"
    )
    done = _torchrun(2, [str(script), str(tmp_path / "model"), "--prompt-ids", "5,66,7"])
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1 has lost its device\nhint: look for it\n") == 1
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["MODEL"], "error: one of the arguments --prompt --prompt-ids is required"),
        (["MODEL", "--prompt-ids", "1,x"], "error: --prompt-ids '1,x'"),
        (["MODEL", "--prompt", "hello"], "has no tokenizer"),
        (["MODEL", "--prompt-ids", "1", "--device", "abacus"], "error: device='abacus'"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ChatGLM2ForCausalLM(ChatGLM2Config(**_CHATGLM2)).save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model") if word == "MODEL" else word for word in arguments]) == 2
    assert text in capsys.readouterr().err


def test_the_command_fills_blanks_where_the_config_names_no_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_glm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["sop_token_id"], config["mask_token_ids"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main([str(folder), "--prompt", "i like [MASK] .", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    wanted = load(folder, device="cpu").chat("i like [MASK] .", temperature=0, max_new_tokens=3)
    assert capsys.readouterr().out == f"{wanted.text}\n"


def test_a_table_of_devices_that_leaves_something_out_is_refused(tmp_path: Path) -> None:
    folder = write_glm(tmp_path)
    with pytest.raises(UsageError, match=r"glm\.transformer\.final_layernorm\.weight: no device"):
        load(folder, device={"glm.word_embeddings": "cpu", "glm.transformer.layers": "meta"})
    for nothing in ({}, []):
        with pytest.raises(UsageError, match="names no device"):
            load(folder, device=nothing)


# What cannot be divided ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "degree", "text"),
    [
        ({"num_attention_heads": 3, "multi_query_group_num": 3}, 2, "3 heads are no multiple of 2"),
        ({"ffn_hidden_size": 49}, 2, "49 rows or columns are no multiple of 2"),
        ({"padded_vocab_size": 127}, 2, "127 rows or columns are no multiple of 2"),
        (
            {"num_attention_heads": 12, "multi_query_group_num": 4, "padded_vocab_size": 120},
            6,
            "4 heads are no multiple of 6",
        ),
        ({"pre_seq_len": 4}, 2, "P-Tuning prefix"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(changes: dict[str, Any], degree: int, text: str) -> None:
    with torch.device("meta"):
        model = ChatGLM2ForCausalLM(ChatGLM2Config(**{**_CHATGLM2, **changes}))
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=text):
        shard_model(model, 0, degree)
    assert before == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_one_rank_is_the_model_itself() -> None:
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**_CHATGLM2))
    kinds = [type(module) for module in model.modules()]
    assert shard_model(model, 0, 1) is model
    assert kinds == [type(module) for module in model.modules()]


# Whole blocks on several devices -------------------------------------------------------------------------------------

BLOCKS = [f"transformer.encoder.layers.{index}" for index in range(5)]


def _five_blocks(**changes: Any) -> ChatGLM2ForCausalLM:
    torch.manual_seed(0)
    return ChatGLM2ForCausalLM(ChatGLM2Config(**{**_CHATGLM2, "num_layers": 5, **changes})).eval()


class _Devices(FakeTensorMode):
    """Tensors without numbers on cpu:0, cpu:1 …, which refuse to be mixed; a number that is asked for is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_model_moves_its_own_tensors_at_the_borders() -> None:
    """On three devices that compute nothing but refuse to mix: ids and logits on the first, keys with their block."""
    room = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2"), 10**9)
    with _Devices(), torch.no_grad():
        model = place_layers(_five_blocks(), list(room), room)
        devices = [str(next(block.parameters()).device) for block in model.transformer.encoder.layers]
        assert devices == sorted(devices)
        assert set(devices) == set(room)
        assert str(model.device) == "cpu:0"
        cache = new_cache(model, 2, 16)
        mask = torch.ones(2, 6, dtype=torch.int64, device="cpu:0")
        ids = torch.ones(2, 5, dtype=torch.int64, device="cpu:0")
        first = model(input_ids=ids, attention_mask=mask[:, :5], past_key_values=cache, use_cache=True)
        step = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert str(first.logits.device) == str(step.logits.device) == "cpu:0"
    assert [str(layer.keys.device) for layer in cache.layers] == devices


@pytest.mark.parametrize("kind", ["chatglm", "glm", "glm-130b"])
def test_every_family_runs_on_two_devices(kind: str) -> None:
    room = {"cpu:0": 10**9, "cpu:1": 10**9}
    whole = _models()[kind].eval()
    ids = torch.tensor([_prompt(kind)])
    layout = whole.input_layout(ids, torch.zeros(1, dtype=torch.int64))
    inputs = {"input_ids": ids, **layout.prompt(0, ids.shape[1])}
    with _Devices() as mode, torch.no_grad():
        model = type(whole)(whole.config).eval()
        place_layers(model, list(room), room)
        moved = {name: mode.from_tensor(value).to("cpu:0") for name, value in inputs.items()}
        logits = model(**moved, use_cache=False).logits
    assert str(logits.device) == "cpu:0"
    assert {str(tensor.device) for tensor in model.state_dict().values()} == set(room)


def test_hooks_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves are counted where a tensor would go to another device; here there is one, so the logits stay equal."""
    model = _five_blocks()
    ids = torch.tensor([[5, 66, 7, 90, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    before = len([hook for module in model.modules() for hook in module._forward_pre_hooks])
    place_layers(model, ["cpu"])
    assert len([hook for module in model.modules() for hook in module._forward_pre_hooks]) == before == 0
    from glmkit import placement

    placement._add_hooks(model, {"": torch.device("cpu")}, BLOCKS)
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    ends = ["transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer"]
    assert sorted(hooked) == sorted([*BLOCKS, *ends])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def _meta(**changes: Any) -> ChatGLM2ForCausalLM:
    with torch.device("meta"):
        return _five_blocks(**changes)


def test_blocks_are_shared_out_by_bytes_and_memory() -> None:
    model = _meta()
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    table = plan_layers(model, ["cpu:0", "cpu:1"], {"cpu:0": 10**9, "cpu:1": 10**9})
    assert str(table[""]) == "cpu:0"
    numbers = [int(str(table[block])[-1]) for block in BLOCKS]
    assert numbers == sorted(numbers)
    first = sum(p.numel() * 4 for name, p in model.named_parameters() if str(device_of(name, table)) == "cpu:0")
    block = sum(parameter.numel() * 4 for parameter in model.transformer.encoder.layers[0].parameters())
    assert abs(first - whole / 2) <= block  # the embedding and the output layer count too
    small = plan_layers(model, ["cpu:0", "cpu:1"], {"cpu:0": whole, "cpu:1": block + 1})
    assert [str(small[name]) for name in BLOCKS].count("cpu:1") == 1
    assert [str(table[name]) for name in plan_layers(model, ["meta"]) if name] != []


def test_the_plan_counts_bytes_as_they_will_be() -> None:
    """Linears of a block have 32 * 64 + 32 * 32 + 32 * 96 + 48 * 32 numbers, biases and norms 128 more."""
    linears, rest, ends = 7680, 5 * 128 + 32, 2 * 128 * 32
    for arguments, needed in (
        ({}, 4 * (5 * linears + rest + ends)),
        ({"dtype": torch.float16}, 2 * (5 * linears + rest + ends)),
        ({"dtype": torch.float16, "quantize": 4}, 5 * linears // 2 + 2 * (rest + ends)),
    ):
        plan_layers(_meta(), ["cpu:0"], {"cpu:0": needed}, **arguments)
        with pytest.raises(UsageError, match=f"the weights take {needed:,} bytes"):
            plan_layers(_meta(), ["cpu:0"], {"cpu:0": needed - 1}, **arguments)


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    text = r"the weights take [\d,]+ bytes, 32,896 of them on cpu:0; the devices cpu:0, cpu:1 have room for 1,000, "
    for rest in (1000, 10**9):
        with pytest.raises(UsageError, match=text):
            plan_layers(_meta(), ["cpu:0", "cpu:1"], {"cpu:0": 1000, "cpu:1": rest})


def test_a_table_of_devices_is_taken_as_it_is() -> None:
    table = {"": "meta", **dict.fromkeys(BLOCKS[:2], "meta")}
    model = place_layers(_meta(), table)
    assert model.hf_device_map == {name: torch.device("meta") for name in table}
    with pytest.raises(UsageError) as caught:
        place_layers(_meta(), {"transformer.encoder.layers.0.mlp": "meta", "nowhere": "meta"})
    assert "layers.0.mlp: a block must be on one device" in str(caught.value)
    assert "nowhere: no such module" in str(caught.value)
    assert "transformer.embedding.word_embeddings.weight: no device" in str(caught.value)


def test_the_official_table_is_taken_and_tied_ends_stay_together() -> None:
    """The table of load_model_on_gpus, with its names of modules that are not here."""
    ends = ("embedding.word_embeddings", "rotary_pos_emb", "encoder.final_layernorm", "output_layer")
    table = {f"transformer.{name}": "cpu:0" for name in ends} | {"lm_head": "cpu:0"}
    table |= {block: f"cpu:{index // 3}" for index, block in enumerate(BLOCKS)}
    with _Devices():
        model = place_layers(_five_blocks(), table)
        assert [str(next(block.parameters()).device) for block in model.transformer.encoder.layers] == [
            *("cpu:0", "cpu:0", "cpu:0", "cpu:1", "cpu:1")
        ]
    with torch.device("meta"):
        tied = GLM130BForCausalLM(GLM130BConfig(**_GLM130B))
    with pytest.raises(UsageError, match="the last norm must be on its device"):
        place_layers(tied, {"": "cpu:0", "transformer.final_layernorm": "cpu:1"})


def test_one_device_is_only_a_move() -> None:
    model = _five_blocks()
    parameters = list(model.parameters())
    assert place_layers(model, "cpu") is model
    assert all(one is other for one, other in zip(parameters, model.parameters()))
