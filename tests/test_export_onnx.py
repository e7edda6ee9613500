"""ONNX: what onnxruntime computes from our files is what our engine computes, token for token in float32."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tiny_families
from glmkit.chat.blanks import FillingStream
from glmkit.chat.choices import choose
from glmkit.chat.conversation import reply_to
from glmkit.chat.messages import Message
from glmkit.engine.decode import generate_batch
from glmkit.engine.layout import layout_for
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import OutputError, UsageError
from glmkit.export.constants import Packed, open_weights
from glmkit.export.onnx import MODEL, export, write_graph
from glmkit.export.onnx_graph import draw
from glmkit.export.runtime_data import random_conversation
from glmkit.fresh import in_new_process
from glmkit.loading import load
from glmkit.quant.linear import dequantize
from glmkit.runtime import load as load_exported
from glmkit.runtime.session import OnnxSession

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A ChatGLM3, its export, and the graph that was drawn for it, still without weights."""
    folder = tmp_path_factory.mktemp("chat")
    source = tiny.write_model(folder / "source", tiny.train_tokenizer(folder / "tokenizer.model"), ffn_hidden_size=64)
    kept = []

    def keeping(traced: Any) -> Any:
        model = draw(traced)
        kept.append(copy.deepcopy(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmkit.export.onnx.draw", keeping)
        made = export(source, folder / "onnx")
    assert made.difference is not None
    assert made.difference < 1e-5
    return source, folder / "onnx", kept[0]


@pytest.fixture
def chat(exported: tuple[Path, Path, Any]) -> tuple[Path, Path]:
    return exported[:2]


def _equal_tokens(source: Path | str, exported: Path, prompts: list[list[int]], tokens: int = 16) -> None:
    """Left-padded batches and single rows, greedy, in float32."""
    one = load(str(source), dtype="float32", kernels="torch")
    limits: dict[str, Any] = {"stop_ids": one.tokenizer.stop_ids, "max_new_tokens": tokens}
    expected = generate_batch(one.model, prompts, GREEDY, **limits, batch_size=len(prompts))
    model = load_exported(exported, threads=1)
    assert model.generate(prompts, temperature=0.0, max_new_tokens=tokens) == expected
    assert model.generate(prompts[:1], temperature=0.0, max_new_tokens=tokens) == expected[:1]
    assert sum(map(len, expected)) > len(prompts)


def _prompts(exported: Path, *, tools: bool = False) -> list[list[int]]:
    model, source = load_exported(exported), random.Random(2)
    drawn = [model.prompt_ids(random_conversation(source, tools=tools)) for _ in range(12)]
    kept = [prompt for prompt in drawn if len(prompt) < 200][:5]
    assert len(set(map(len, kept))) > 2
    return kept


def test_tokens_are_those_of_the_engine(chat: tuple[Path, Path]) -> None:
    source, exported = chat
    _equal_tokens(source, exported, _prompts(exported, tools=True))


def test_answers_are_those_of_the_chat(chat: tuple[Path, Path]) -> None:
    source, exported = chat
    one, model = load(str(source), dtype="float32", kernels="torch"), load_exported(exported)
    said = [("user", "你好"), ("assistant", "tea"), ("user", "hello <|user|> world")]
    expected = reply_to(one.model, one.tokenizer, [Message(*each) for each in said], max_new_tokens=24)
    pieces = list(model.answer([{"role": role, "content": text} for role, text in said], max_new_tokens=24))
    assert "".join(pieces) == expected.text
    assert model.last.finish_reason == expected.finish_reason


def test_it_runs_without_torch(chat: tuple[Path, Path]) -> None:
    arguments = {"folder": str(chat[1]), "prompt": "你好", "max_new_tokens": 4}
    forbidden = ("torch", "transformers", "safetensors", "sentencepiece", "typer", "pydantic")
    assert in_new_process("glmkit.runtime.terminal:run", arguments, forbidden=forbidden) == 0


def test_the_graph_says_nothing_of_this_machine(chat: tuple[Path, Path]) -> None:
    content = (chat[1] / MODEL).read_bytes()
    assert b"src/glmkit" not in content
    assert b"site-packages" not in content
    onnx.checker.check_model(str(chat[1] / MODEL))


@pytest.fixture
def drawn(exported: tuple[Path, Path, Any]) -> Any:
    return exported[2]


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.05), ("int4", 0.4)])
def test_quantised_graphs_compute_with_our_numbers(
    weights: str, most: float, chat: tuple[Path, Path], drawn: Any, tmp_path: Path
) -> None:
    """The graph's logits are those of a model that has the dequantised weights, and near those of the source."""
    one = load(str(chat[0]), dtype="float32", kernels="torch")
    ids = torch.tensor([[0, 0, 300, 301, 302], [299, 300, 301, 302, 303]])
    pads = torch.tensor([2, 0])
    with open_weights(chat[0]) as opened:
        write_graph(copy.deepcopy(drawn), opened, tmp_path / MODEL, weights)
        packed = {name: weight for name, weight in opened.read(weights) if isinstance(weight, Packed)}
        assert len(packed) == 4 * 2 + 2  # the linears of two blocks, the embedding and the output layer
        assert opened.error is not None
        assert opened.error < most / 3
    given = layout_for(one.model, ids, pads).prompt(0, 5)
    with torch.inference_mode():
        exact = one.model(input_ids=ids, **given).logits[:, -1]
        state = one.model.state_dict()
        for name, weight in packed.items():
            state[name].copy_(dequantize(weight.weight, weight.scale.float(), weight.bits))
        expected = one.model(input_ids=ids, **given).logits[:, -1]
    session = OnnxSession(tmp_path / MODEL, threads=1)
    session.start(2)
    found = session.run(*(given[name].numpy() if name in given else ids.numpy() for name in
                          ("input_ids", "attention_mask", "position_ids")))  # fmt: skip
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()
    lost = float((torch.tensor(found) - exact).norm() / exact.norm())
    assert 1e-4 < lost < most


def test_what_differs_is_not_kept(
    chat: tuple[Path, Path], drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmkit.export.onnx.draw", lambda _: copy.deepcopy(drawn))
    monkeypatch.setattr("glmkit.export.onnx.trace", lambda *_, **__: None)
    monkeypatch.setattr("glmkit.export.agreement.in_new_process", lambda *_, **__: 0.01)
    with pytest.raises(OutputError, match="not what the source is"):
        export(chat[0], tmp_path / "new")
    with pytest.raises(UsageError, match="int3"):
        export(chat[0], tmp_path / "new", weights="int3")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_prefixes_are_seen_in_both_directions(tmp_path: Path) -> None:
    """GLM: two rows of positions, a mask that is given, several blanks in one text."""
    source = tiny_families.write_glm(tmp_path / "source")
    export(source, tmp_path / "onnx")
    model = load_exported(tmp_path / "onnx")
    texts = ["i like [MASK]", "tea and [MASK] rice .", "beijing is the [MASK] of [MASK] , tea"]
    _equal_tokens(source, tmp_path / "onnx", [model.prompt_ids(text) for text in texts], tokens=6)
    one = load(str(source), dtype="float32", kernels="torch")
    choices = choose(one.model, GREEDY, max_new_tokens=5)
    for text in texts:
        filling = FillingStream(one.model, one.tokenizer, [Message("user", text)], choices)
        assert "".join(model.answer(text, temperature=0.0, max_new_tokens=5)) == "".join(filling)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["generation 1", "generation 2", "generation 4", "glm-nano", "no 2d", "prefix", "prefix 1"]
)
def test_every_family(name: str, tmp_path: Path) -> None:
    make: dict[str, Callable[[], Path | str]] = {
        "generation 1": lambda: tiny_families.write_chatglm(tmp_path / "source", endless=True),
        "no 2d": lambda: tiny_families.write_chatglm(tmp_path / "source", position_encoding_2d=False),
        "generation 2": lambda: tiny.write_model(
            tmp_path / "source", tiny.train_tokenizer(tmp_path / "tokenizer.model"), generation=2, endless=True
        ),
        "generation 4": lambda: tiny_families.write_glm4(tmp_path / "source", endless=True),
        "glm-nano": lambda: "glm-nano",
        "prefix": lambda: tiny.write_model(
            tmp_path / "source", tiny.train_tokenizer(tmp_path / "tokenizer.model"), endless=True, pre_seq_len=3
        ),
        "prefix 1": lambda: tiny_families.write_chatglm(tmp_path / "source", endless=True, pre_seq_len=3),
    }
    source = make[name]()
    made = export(source, tmp_path / "onnx")
    assert made.difference is not None
    assert made.difference < 1e-5
    _equal_tokens(source, tmp_path / "onnx", _prompts(tmp_path / "onnx"))
