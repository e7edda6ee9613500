"""Folders written by `glm convert` have what vLLM reads, and Ray Serve's copies get the whole API.

vLLM itself is not installed here. What it reads is written down as tables, from vllm-project/vllm: the registry of
architectures, models/chatglm.py, models/glm.py (models/llama.py with another rotation), and configs/chatglm.py.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import GlmConfig

import official
from glmkit.chat.messages import Message
from glmkit.chat.templates import prompt_ids
from glmkit.checkpoint import open_folder
from glmkit.export.native import from_native, to_native
from glmkit.tokenizers import load_tokenizer
from tiny import train_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of an installed package", allow_module_level=True)

ARCHITECTURES = {"GlmForCausalLM": "glm", "ChatGLMModel": "chatglm", "ChatGLMForConditionalGeneration": "chatglm"}

# Tensors as vLLM's classes have them, {n}: a number of a layer. Several parts go into one tensor, in this order.
_NATIVE = {
    "model.embed_tokens.weight": 1,
    "model.layers.{n}.input_layernorm.weight": 1,
    "model.layers.{n}.self_attn.qkv_proj.weight": 3,
    "model.layers.{n}.self_attn.qkv_proj.bias": 3,
    "model.layers.{n}.self_attn.o_proj.weight": 1,
    "model.layers.{n}.post_attention_layernorm.weight": 1,
    "model.layers.{n}.mlp.gate_up_proj.weight": 1,  # both in one, which its loader takes apart
    "model.layers.{n}.mlp.down_proj.weight": 1,
    "model.norm.weight": 1,
    "lm_head.weight": 1,
}
_OFFICIAL = {
    "transformer.embedding.weight": 1,
    "transformer.encoder.layers.{n}.input_layernorm.weight": 1,
    "transformer.encoder.layers.{n}.self_attention.query_key_value.weight": 1,  # q, k and v in one
    "transformer.encoder.layers.{n}.self_attention.query_key_value.bias": 1,
    "transformer.encoder.layers.{n}.self_attention.dense.weight": 1,
    "transformer.encoder.layers.{n}.post_attention_layernorm.weight": 1,
    "transformer.encoder.layers.{n}.mlp.dense_h_to_4h.weight": 1,
    "transformer.encoder.layers.{n}.mlp.dense_4h_to_h.weight": 1,
    "transformer.encoder.final_layernorm.weight": 1,
    "transformer.output_layer.weight": 1,
}
# Fields of config.json that ChatGLMForCausalLM reads and whose defaults in ChatGLMConfig are other ones, or missing.
_FIELDS = (
    "add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm", "ffn_hidden_size",
    "fp32_residual_connection", "hidden_dropout", "hidden_size", "kv_channels", "layernorm_epsilon",
    "multi_query_attention", "multi_query_group_num", "num_attention_heads", "num_layers", "original_rope",
    "padded_vocab_size", "post_layer_norm", "rmsnorm", "seq_length", "tie_word_embeddings",
)  # fmt: skip

CONVERSATION = [
    Message("user", "你好，我是谁？"),
    Message("assistant", "hello world"),
    Message("user", "1 + 2 = 3, how are you?"),
]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def loaded_by_vllm(name: str) -> str | None:
    """The tensor of vLLM's class that a tensor of a folder goes into, as its loader finds it."""
    if "rotary_pos_emb.inv_freq" in name:
        return None
    name = name.replace(".word_embeddings", "")
    return re.sub(r"\.(q|k|v)_proj\.", ".qkv_proj.", name)


def assert_loads(folder: Path, table: dict[str, int], layers: int) -> None:
    """Every tensor goes somewhere, and every tensor of the class gets all its parts."""
    with open_folder(folder) as opened:
        names = [name for name, _ in opened.read()]
    parts: dict[str, int] = {}
    for name in names:
        target = loaded_by_vllm(name)
        if target is not None:
            parts[target] = parts.get(target, 0) + 1
    assert parts == {name.format(n=n): count for name, count in table.items() for n in range(layers)}


@pytest.mark.parametrize(
    ("generation", "changes"),
    [(2, {}), (3, {}), (3, {"rope_ratio": 50}), (2, {"rope_ratio": 16})],
    ids=["chatglm2", "chatglm3", "chatglm3 long", "chatglm2-32k"],
)
def test_the_native_layout(tmp_path: Path, generation: int, changes: dict[str, Any]) -> None:
    source = official.write_folder(tmp_path / "source", generation, **changes)
    to_native(source, tmp_path / "native")
    values = config(tmp_path / "native")
    assert [ARCHITECTURES.get(name) for name in values["architectures"]] == ["glm"]
    assert_loads(tmp_path / "native", _NATIVE, layers=2)
    read = GlmConfig.from_pretrained(tmp_path / "native")  # vLLM reads the config through transformers
    before = config(source)
    assert read.model_type == "glm"
    assert read.head_dim * read.num_attention_heads == before["hidden_size"]
    assert (read.num_hidden_layers, read.num_key_value_heads) == (2, before["multi_query_group_num"])
    assert (read.vocab_size, read.max_position_embeddings) == (before["padded_vocab_size"], before["seq_length"])
    assert (read.attention_bias, read.tie_word_embeddings, read.hidden_act) == (True, False, "silu")
    # The rotation: half of each head, whatever vLLM finds; base and scale as the model was trained.
    divided = generation == 2 and "rope_ratio" in changes
    assert read.rope_parameters["partial_rotary_factor"] == 0.5
    assert read.rope_parameters["rope_theta"] == 10_000.0 * (1 if divided else changes.get("rope_ratio", 1))
    assert read.rope_parameters["rope_type"] == ("linear" if divided else "default")


@pytest.mark.parametrize(("generation", "changes"), [(3, {}), (3, {"rope_ratio": 50})])
def test_the_official_layout(tmp_path: Path, generation: int, changes: dict[str, Any]) -> None:
    source = official.write_folder(tmp_path / "source", generation, **changes)
    to_native(source, tmp_path / "native")
    from_native(tmp_path / "native", tmp_path / "back")
    values = config(tmp_path / "back")
    assert [ARCHITECTURES.get(name) for name in values["architectures"]] == ["chatglm"]
    assert values["model_type"] == "chatglm"
    assert [name for name in _FIELDS if name not in values] == []
    assert values["hidden_size"] // values["num_attention_heads"] == values["kv_channels"]  # what vLLM computes itself
    assert values.get("rope_ratio", 1) == changes.get("rope_ratio", 1)  # vLLM: base = 10,000 x rope_ratio
    assert_loads(tmp_path / "back", _OFFICIAL, layers=2)


def test_a_divided_position_must_go_native(tmp_path: Path) -> None:
    """ChatGLM2-6B-32K divides positions by rope_ratio; vLLM's chatglm class would multiply the base instead."""
    source = official.write_folder(tmp_path / "source", 2, rope_ratio=16)
    to_native(source, tmp_path / "native")
    from_native(tmp_path / "native", tmp_path / "back")
    assert config(tmp_path / "back")["rope_ratio_applies_to"] == "position"
    assert GlmConfig.from_pretrained(tmp_path / "native").rope_parameters["factor"] == 16.0


_ALONE = """
import json, sys
sys.modules["glmkit"] = None  # whatever is installed: transformers alone, as in vLLM
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = json.loads(sys.argv[2])
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
print(json.dumps(tokenizer(text, add_special_tokens=False)["input_ids"]))
"""


def ids_alone(folder: Path, messages: list[Message]) -> list[int]:
    """Ids of a conversation from transformers in a process without glmkit, the way vLLM's chat API makes them."""
    given = json.dumps([{"role": message.role, "content": message.content} for message in messages])
    done = subprocess.run([sys.executable, "-c", _ALONE, str(folder), given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ids: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ids


@pytest.mark.parametrize("generation", [2, 3])
def test_a_conversation_has_the_same_ids(tmp_path: Path, tokenizer_file: Path, generation: int) -> None:
    source = official.write_folder(tmp_path / "source", generation, tokenizer=tokenizer_file)
    native = tmp_path / "native"
    to_native(source, native)
    complete = runpy.run_path(str(EXAMPLES / "vllm_folder.py"))["complete"]
    complete(source, native)
    tokenizer = load_tokenizer(source)
    messages = [Message("system", "I like tea"), *CONVERSATION] if generation == 3 else CONVERSATION
    assert ids_alone(native, messages) == prompt_ids(tokenizer, messages)
    ends = json.loads((native / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted(tokenizer.stop_ids)
    assert 2 in ends


@pytest.mark.slow  # a tokenizer of 151,000 tokens is written and read four times
def test_a_conversation_of_glm4_has_the_same_ids(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(shared / "conformance" / "glm4" / "hf_repo", source)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / "glm4" / name, source)
    native = tmp_path / "native"
    to_native(source, native)
    runpy.run_path(str(EXAMPLES / "vllm_folder.py"))["complete"](source, native)
    assert ids_alone(native, CONVERSATION) == prompt_ids(load_tokenizer(source), CONVERSATION)


def test_without_the_example_no_text_becomes_a_role(tmp_path: Path, tokenizer_file: Path) -> None:
    """Why the folder is not complete by itself: its tokenizer reads no control token out of a text."""
    source = official.write_folder(tmp_path / "source", 3, tokenizer=tokenizer_file)
    to_native(source, tmp_path / "native")
    described = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "chat_template" not in described
    stored = json.loads((tmp_path / "native" / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["added_tokens"] == []
    # The official layout has no tokenizer.json: vLLM needs the official repository's own python file beside it.
    from_native(tmp_path / "native", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").glob("tok*")) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_ray_serve_builds_the_api_in_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ray: the example is valid, and its builder makes the application that `glm serve` has."""
    pytest.importorskip("fastapi")
    from glmkit.chat import following

    serve = following.serve
    seen: dict[str, Any] = {}

    class Bound:
        def __init__(self, cls: type) -> None:
            self.cls = cls

        def bind(self) -> Bound:
            return self

    def deployment(**options: Any) -> Any:
        seen.update(options)
        return Bound

    def ingress(builder: Any) -> Any:
        seen["builder"] = builder
        return lambda cls: cls

    ray = types.ModuleType("ray")
    ray.serve = types.SimpleNamespace(deployment=deployment, ingress=ingress)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("GLM_MODEL", raising=False)
    module = runpy.run_path(str(EXAMPLES / "ray_serve.py"))
    assert isinstance(module["app"], Bound)
    assert seen["num_replicas"] == 2
    made: list[Any] = []
    monkeypatch.setattr(following, "serve", lambda *given, **options: made.append(serve(*given, **options)) or made[-1])
    app = seen["builder"]()
    paths = {getattr(route, "path", "") for route in app.routes}
    made[0].close()
    assert made[0].name == "glm-nano"
    assert {"/v1/chat/completions", "/v1/models", "/health"} <= paths
