"""Exported models are recognised and described by their files; what wants a checkpoint says what runs them."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest

import glmkit
import official
from glmkit import cli
from glmkit.errors import CheckpointError, UsageError
from glmkit.inspection import inspect
from glmkit.runtime.exported import describe, recognise


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(file: Path) -> Path:
    """A header with values of every kind that is passed over, and two tensors of 64 and 34 bytes."""
    values = [
        _text("general.architecture") + struct.pack("<I", 8) + _text("chatglm"),
        _text("general.name") + struct.pack("<I", 8) + _text("ChatGLM3 6B"),
        _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("你"),
        _text("tokenizer.ggml.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.0, 1.0),
        _text("x.flag") + struct.pack("<IB", 7, 1),
        _text("chatglm.context_length") + struct.pack("<II", 4, 8192),
    ]
    tensors = [
        _text("b.weight") + struct.pack("<IQIQ", 1, 32, 8, 64),  # Q8_0: 34 bytes for 32 numbers
        _text("a.weight") + struct.pack("<IQQIQ", 2, 8, 4, 1, 0),  # F16
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values) + b"".join(tensors)
    file.write_bytes(head + bytes(-len(head) % 32) + bytes(64 + 34))
    return file


def openvino(folder: Path, *, ours: bool = True, genai: bool = True) -> Path:
    folder.mkdir()
    layers = "".join(
        f'<layer id="{at}">\n<data element_type="{kind}" shape="4, 8" offset="0" size="{size}" />\n</layer>'
        for at, (kind, size) in enumerate((("i4", 16), ("f16", 64), ("i4", 16), ("boolean", 1)))
    )
    (folder / "openvino_model.xml").write_text(
        f'<?xml version="1.0"?>\n<net name="Model0" version="11">\n{layers}</net>\n'
    )
    (folder / "openvino_model.bin").write_bytes(bytes(97))
    if genai:
        (folder / "openvino_tokenizer.xml").write_text("<net/>")
    if ours:
        said = {name: {} for name in ("tokens", "prompt", "reply", "layout", "sampling", "graph")}
        (folder / "runtime").mkdir()
        described = {"schema": 1, "family": "ChatGLM3", "context_tokens": 8192, **said}
        (folder / "runtime" / "runtime.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps(official.CONFIG))
    return folder


def onnx_folder(folder: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    folder.mkdir()
    tensor, kinds = onnx.helper.make_tensor, onnx.TensorProto
    node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=32, N=4, bits=4)
    constants = [
        tensor("w", kinds.UINT8, [4, 1, 16], bytes(64), raw=True),
        tensor("s", kinds.FLOAT, [4, 1], bytes(16), raw=True),
        tensor("h", kinds.FLOAT16, [3], bytes(6), raw=True),
    ]
    graph = onnx.helper.make_graph([node], "g", [], [], constants)
    onnx.save(onnx.helper.make_model(graph), str(folder / "model.onnx"))
    return folder


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = gguf(tmp_path / "nano-Q8_0.gguf")
    for name in (file, tmp_path):
        found = inspect(str(name))
        assert (found["exported"], found["family"], found["context_tokens"]) == ("gguf", "ChatGLM3 6B", 8192)
        assert found["weights_bytes"] == {"F16": 64, "Q8_0": 34}
        assert found["stored_bytes"] == file.stat().st_size
        assert found["uses"][0] == f"llama-cli -m {file}"
    assert cli.run(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "exported to GGUF, ChatGLM3 6B" in shown
    assert "F16 64 B, Q8_0 34 B" in shown
    with pytest.raises(UsageError, match="is an exported model \\(GGUF\\), not a checkpoint\nhint: llama-cli"):
        glmkit.load(file)


def test_openvino(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    folder = openvino(tmp_path / "ov")
    assert cli.run(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights_bytes"] == {"float16": 64, "int4": 32, "bool": 1}
    assert found["uses"] == [f"glm run {folder}", f'openvino_genai.LLMPipeline("{folder}", "CPU")']
    assert (found["family"], found["context_tokens"]) == ("ChatGLM3", 8192)
    for verb in (["chat", str(folder), "-p", "x"], ["convert", str(folder), str(tmp_path / "o"), "--to", "official"],
                 ["convert", str(folder), str(tmp_path / "o"), "--to", "shards"]):  # fmt: skip
        assert cli.run(verb) == 2
        assert f"hint: glm run {folder}" in capsys.readouterr().err
    assert cli.run(["inspect", str(folder), "--tensors"]) == 2
    assert "nothing can be chosen" in capsys.readouterr().err
    foreign = describe(openvino(tmp_path / "foreign", ours=False, genai=False))
    assert foreign is not None
    assert foreign["family"] is None
    assert "a loop and a tokenizer of your own" in foreign["uses"][0]


def test_onnx(tmp_path: Path) -> None:
    """What MatMulNBits unpacks is called by its bits, not by the bytes in which it is packed."""
    found = describe(onnx_folder(tmp_path / "onnx"))
    assert found is not None
    assert found["weights_bytes"] == {"int4": 64, "float32": 16, "float16": 6}


def test_a_checkpoint_is_none(tmp_path: Path) -> None:
    """Repositories keep exports beside the weights."""
    folder = official.write_folder(tmp_path / "model")
    (folder / "model.onnx").write_bytes(b"x")
    gguf(folder / "a.gguf")
    assert recognise(folder) is None
    assert recognise("glm-nano") is recognise("") is recognise(tmp_path / "none") is None


def test_damaged(tmp_path: Path) -> None:
    """Cut anywhere, or lying about sizes: an error of ours, and no memory for what is not there."""
    whole = gguf(tmp_path / "a.gguf").read_bytes()
    for cut in (0, 3, 8, 30, 100, len(whole) - 200, len(whole) - 98, len(whole) - 35):
        (tmp_path / "a.gguf").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"is no whole GGUF file"):
            describe(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 8 + bytes(64))
    with pytest.raises(CheckpointError, match="the file ends before"):
        describe(tmp_path / "a.gguf")
    folder = openvino(tmp_path / "ov")
    (folder / "openvino_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no openvino_model\.bin beside it"):
        describe(folder)
    graph = onnx_folder(tmp_path / "onnx") / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is no whole ONNX file"):
        describe(tmp_path / "onnx")
