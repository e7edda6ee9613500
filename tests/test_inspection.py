"""`inspect` says what a checkpoint is and costs; every number here is computed a second time by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import glmkit
import official
from glmkit import cli
from glmkit.errors import CheckpointError, UsageError
from glmkit.inspection import inspect
from glmkit.location import DownloadError

# Released sizes of ChatGLM3-6B: layers, hidden, vocabulary, inner, width of queries, keys and values together.
L, C, V, F, QKV = 28, 4096, 65024, 13696, 4096 + 2 * 2 * 128
QUANTISED = L * (QKV * C + C * C + 2 * F * C + C * F)
OTHERS = 2 * V * C + L * (QKV + 2 * C) + C
ROWS = L * (QKV + C + 2 * F + C)  # of the quantised matrices, one scale each


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    return official.write_folder(root / "model", tokenizer=official.train_tokenizer(root / "tokenizer.model"))


@pytest.mark.parametrize("name", ["chatglm3-6b", "THUDM/chatglm3-6b", "glm3_6b", "chatglm2-6b"])
def test_released_sizes(name: str) -> None:
    found = inspect(name, context_tokens=8192)
    assert found["parameters"] == 6_243_584_000 == QUANTISED + OTHERS
    memory = found["memory_bytes"]
    cache = 28 * 2 * 2 * 128 * 2 * 8192
    assert {cost["kv_cache"] for cost in memory.values()} == {cache} == {234_881_024}
    assert memory["float16"]["weights"] == 2 * 6_243_584_000
    assert memory["int8"]["weights"] == QUANTISED + 2 * ROWS + 2 * OTHERS
    assert memory["int4"]["weights"] == QUANTISED // 2 + 2 * (QUANTISED // 32) + 2 * OTHERS
    assert memory["official-int4"]["weights"] == QUANTISED // 2 + 2 * ROWS + 2 * OTHERS
    assert all(cost["total"] == cost["weights"] + cost["kv_cache"] for cost in memory.values())
    assert found["source"] == "released sizes; not on this machine"
    assert found["generation"] == int(found["family"][7])
    assert found["stored_bytes"] == pytest.approx(12.5e9)


def test_cache_grows_with_context_and_batch() -> None:
    small, large = (inspect("chatglm3-6b", context_tokens=n, batch=b) for n, b in ((1000, 1), (3000, 4)))
    kv = [found["memory_bytes"]["int4"]["kv_cache"] for found in (small, large)]
    assert kv == [28 * 2 * 2 * 128 * 2 * 1000, 12 * kv[0]]


def in_memory(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_folder(folder: Path) -> None:
    found = inspect(str(folder), context_tokens=100, batch=3)
    model = glmkit.load(folder, dtype="float16").model
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (found["family"], found["generation"], found["dtypes"]) == ("chatglm3-6b", 3, ["float16"])
    state = official.weights()
    assert found["stored_bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert {entry["name"]: (entry["shape"], entry["dtype"]) for entry in found["tensors"]} == {
        name: (list(tensor.shape), "float16") for name, tensor in state.items()
    }
    memory = found["memory_bytes"]
    assert memory["float16"]["weights"] == in_memory(model)
    for bits in (8, 4):
        quantised = glmkit.load(folder, dtype="float16", quantize=f"official-int{bits}").model
        assert memory[{8: "int8", 4: "official-int4"}[bits]]["weights"] == in_memory(quantised)
    with torch.no_grad():
        cache = model(torch.zeros(3, 100, dtype=torch.int64), use_cache=True).past_key_values
    assert memory["int4"]["kv_cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_folder_has_as_many_parameters_as_before(folder: Path, tmp_path: Path, bits: int) -> None:
    before = inspect(str(folder))
    loaded = glmkit.load(folder, dtype="float16", quantize=f"official-int{bits}")
    loaded.model.save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    assert found["parameters"] == before["parameters"]
    assert found["dtypes"] == ["float16", "int8"]
    assert found["config"]["quantization_bit"] == bits
    assert found["stored_bytes"] == in_memory(loaded.model)
    assert found["quantised"] == {"quant_method": "official", "scheme": f"official-int{bits}", "bits": bits}
    label = {8: "int8", 4: "official-int4"}[bits]
    assert found["memory_bytes"][label]["weights"] == in_memory(loaded.model)
    assert found["memory_bytes"]["float16"]["weights"] == before["memory_bytes"]["float16"]["weights"]


def test_a_classifier(tmp_path: Path) -> None:
    folder = official.write_folder(tmp_path / "m", form="safetensors")
    state = official.weights() | {"classifier_head.weight": torch.zeros(7, 32), "classifier_head.bias": torch.zeros(7)}
    official.write_weights(folder, state, "safetensors")
    assert inspect(str(folder))["parameters"] == inspect(str(official.write_folder(tmp_path / "o")))["parameters"] + 231
    state["classifier_head.bias"] = torch.zeros(6)
    official.write_weights(folder, state, "safetensors")
    with pytest.raises(CheckpointError, match=r"classifier_head\.bias"):
        inspect(str(folder))


@pytest.mark.parametrize("shape", [(), (7,), (0, 32), (7, 1, 32)])
def test_a_classifier_of_another_form_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = official.write_folder(tmp_path / "m", form="safetensors")
    state = official.weights() | {"classifier_head.weight": torch.zeros(shape), "classifier_head.bias": torch.zeros(1)}
    official.write_weights(folder, state, "safetensors")
    with pytest.raises(CheckpointError, match=rf"classifier_head\.weight has shape {re.escape(str(list(shape)))}, exp"):
        inspect(str(folder))


def test_names_that_mean_nothing_and_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("inspect went to the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    with pytest.raises(UsageError):
        inspect("no-such-model")
    with pytest.raises(DownloadError, match="not on this machine"):
        inspect("somebody/model")
    assert inspect("THUDM/chatglm3-6b-base")["family"] == "chatglm3-6b-base"


def glm(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.run(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = glm(capsys, str(folder))
    assert "query_key_value" not in plain
    listed = glm(capsys, str(folder), "--tensors")
    rows = [line.split() for line in listed.splitlines() if line.lstrip().startswith("transformer.")]
    expected = official.weights()
    assert len(rows) == len(expected)
    for name, *shape, dtype in rows:
        assert [int(size) for size in shape if size != "x"] == list(expected[name].shape)
        assert dtype == "float16"
    found: dict[str, Any] = json.loads(glm(capsys, str(folder), "--json", "--tensors"))
    assert len(found["tensors"]) == len(expected)
    assert found["parameters"] == inspect(str(folder))["parameters"]
    assert f"{found['parameters']:,}" in plain
