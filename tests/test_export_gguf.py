"""GGUF files: read by the package gguf, their numbers are the checkpoint's, and their tables make the same ids.

llama.cpp itself is asked by bench/gguf_in_llama_cpp.py. Here its two tokenizers are imitated on the tables of a file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import glmkit
from glmkit.chat.messages import Message
from glmkit.chat.templates import prompt_ids
from glmkit.checkpoint import open_folder
from glmkit.errors import ConfigError, MissingDependencyError, OutputError, UsageError
from glmkit.export import gguf as gguf_export
from glmkit.export.gguf import compare, export
from glmkit.export.gguf_tensors import gguf_name
from glmkit.export.gguf_vocabulary import Vocabulary, read_vocabulary
from glmkit.quant.linear import QuantizedLinear
from glmkit.runtime.vocabulary import byte_letters
from glmkit.tokenizers import ChatGLM4Tokenizer, ChatGLMTokenizer
from tiny import train_tokenizer, write_model
from tiny_families import write_chatglm, write_glm4

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "layernorm_epsilon": 1e-5}
TEXTS = [
    "philosophy, soprano: sop so p s op eop people",
    "xsop xeop sop\neop [gMASK]sop<sop><|user|> hi </s><s><unk> [MASK] <0x41> <|endoftext|>",
    "你好，世界！ 参考资料  而且 者\n\n\t \n 12345 3.14 ３．１４",
    "  two blanks,   three   \r\n and a tab\tand é ü Ω я العربية 日本語 \U0001f600 e\u0301 \u00a0 \u3000x",
    "def f(x):\n    return x ** 2  # don't, I'll, WE'RE",
    "",
]
CHATS = [
    [("user", "你好")],
    [("system", "Be kind."), ("user", "Is it sop?"), ("assistant", "No."), ("user", "两件上衣 多少钱？")],
]


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("new_process") is None:
        monkeypatch.setattr(gguf_export, "in_new_process", lambda _, order: compare(**json.loads(json.dumps(order))))


@pytest.fixture(scope="module")
def piece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("pieces") / "tokenizer.model")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, piece_file: Path) -> Path:
    """A ChatGLM3 in float32 whose norms and biases are no zeros and ones."""
    folder = write_model(tmp_path_factory.mktemp("three") / "model", piece_file, **SIZES)
    [file] = folder.glob("*.safetensors")
    torch.manual_seed(3)
    save_file({name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in load_file(file).items()}, file)
    (folder / "MODEL_LICENSE").write_text("Ask.")
    return folder


def tensors(file: str | Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> kind and numbers, by the package's own decoder."""
    return {
        one.name: (one.tensor_type.name, torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).astype("float32")))
        for one in gguf.GGUFReader(file).tensors
    }


def keys(file: str | Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with open_folder(folder) as opened:
        return dict(opened.read())


# --- numbers ---


def test_numbers_and_keys_are_the_checkpoints(three: Path, tmp_path: Path) -> None:
    done = export(three, tmp_path / "out")
    assert done.path == str(tmp_path / "out" / "model-F32.gguf")
    assert done.bytes == Path(done.path).stat().st_size
    assert done.difference < 1e-6
    assert (tmp_path / "out" / "MODEL_LICENSE").read_text() == "Ask."
    found, expected = tensors(done.path), stored(three)
    assert set(found) == {gguf_name(name) for name in expected}
    for name, tensor in expected.items():
        kind, numbers = found[gguf_name(name)]
        assert kind == "F32"
        assert torch.equal(numbers, tensor), name
    said = keys(done.path)
    sizes = {
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 8,
        "rope.freq_base": 10_000,
    }
    assert {name: said[f"chatglm.{name}"] for name in sizes} == sizes
    assert "chatglm.rope.scaling.factor" not in said
    assert said["general.architecture"] == "chatglm"
    assert said["general.name"] == "model"
    assert said["general.file_type"] == gguf.LlamaFileType.ALL_F32


@pytest.mark.parametrize(
    ("meaning", "base", "factor"), [("base", 500_000.0, None), ("position", 10_000.0, 50.0)], ids=["base", "position"]
)
def test_both_meanings_of_rope_ratio(
    meaning: str, base: float, factor: float | None, piece_file: Path, tmp_path: Path
) -> None:
    changes = {"rope_ratio": 50, "rope_ratio_applies_to": meaning, "add_qkv_bias": meaning == "base"}
    source = write_model(tmp_path / "source", piece_file, generation=2, **SIZES, **changes)
    done = export(source, tmp_path / "any.gguf")
    assert done.path == str(tmp_path / "any.gguf")
    assert done.difference < 1e-6  # the network is made of the file's keys
    said = keys(done.path)
    assert said["chatglm.rope.freq_base"] == base
    assert said.get("chatglm.rope.scaling.factor") == factor
    assert ("blk.0.attn_qkv.bias" in tensors(done.path)) is (meaning == "base")


def test_a_wide_float_becomes_f16(three: Path, tmp_path: Path) -> None:
    found = tensors(export(three, tmp_path / "out", weights="f16").path)
    for name, tensor in stored(three).items():
        kind, numbers = found[gguf_name(name)]
        assert kind == ("F16" if tensor.ndim == 2 else "F32")
        assert torch.equal(numbers, tensor.half().float() if tensor.ndim == 2 else tensor)


@pytest.mark.parametrize(("weights", "kind", "bound"), [("int8", "Q8_0", 0.006), ("int4", "Q4_0", 0.085)])
def test_quantised_weights_are_near(weights: str, kind: str, bound: float, three: Path, tmp_path: Path) -> None:
    done = export(three, tmp_path / "out", weights=weights)
    found = tensors(done.path)
    for name, tensor in stored(three).items():
        stored_as, numbers = found[gguf_name(name)]
        if tensor.ndim == 1:
            assert stored_as == "F32"
            assert torch.equal(numbers, tensor)
            continue
        assert stored_as == (kind if ".layers." in name else "Q8_0")
        assert (numbers - tensor).norm() / tensor.norm() < (bound if stored_as == kind else 0.006), name
        if stored_as == "Q8_0":  # no further than half a step of the largest number of its group
            step = tensor.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            assert ((numbers - tensor).unflatten(1, (-1, 32)).abs() <= 0.56 * step).all()
    assert 1e-4 < done.difference < 0.5
    assert any("logits differ" in note for note in done.notes)
    assert keys(done.path)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


@pytest.mark.parametrize("form", ["int8", "int4", "official-int8", "official-int4"])
def test_a_quantised_checkpoint_keeps_its_numbers(form: str, three: Path, tmp_path: Path) -> None:
    model = glmkit.load(three, dtype="float16", quantize=form, kernels="torch")
    model.model.save_pretrained(tmp_path / "quantised")
    model.tokenizer.save_pretrained(tmp_path / "quantised")
    found = tensors(export(tmp_path / "quantised", tmp_path / "out").path)
    compared = 0
    for name, layer in model.model.named_modules():
        if isinstance(layer, QuantizedLinear):
            kind, numbers = found[gguf_name(f"{name}.weight")]
            assert kind == ("Q8_0" if layer.bits == 8 else "Q4_0")
            assert torch.equal(numbers.half(), layer.dequantize()), name
            compared += 1
    assert compared == 8
    other = "int4" if "8" in form else "int8"
    with pytest.raises(UsageError, match="once more"):
        export(tmp_path / "quantised", tmp_path / "other", weights=other)


def test_a_lora_is_merged(three: Path, tmp_path: Path) -> None:
    layers = [f"transformer.encoder.layers.{index}.mlp.dense_4h_to_h" for index in range(2)]
    torch.manual_seed(5)
    pairs = {layer: (torch.randn(4, 96) * 0.3, torch.randn(64, 4) * 0.3) for layer in layers}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    state = {f"base_model.model.{layer}.lora_A.weight": a for layer, (a, _) in pairs.items()}
    state |= {f"base_model.model.{layer}.lora_B.weight": b for layer, (_, b) in pairs.items()}
    save_file(state, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["dense_4h_to_h"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    done = export(three, tmp_path / "out", adapter=adapter)
    assert done.difference < 1e-5
    for layer, (a, b) in pairs.items():
        expected = stored(three)[f"{layer}.weight"] + 2 * b @ a
        numbers = tensors(done.path)[gguf_name(f"{layer}.weight")][1]
        torch.testing.assert_close(numbers, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.new_process
def test_glm_nano_in_a_new_process(tmp_path: Path) -> None:
    source = Path(glmkit.__file__).parent / "builtin" / "glm-nano"
    done = export(source, tmp_path / "out")
    assert done.difference < 1e-6
    assert Path(done.path).name == "glm-nano-F16.gguf"
    found = tensors(done.path)
    for name, tensor in stored(source).items():
        assert torch.equal(found[gguf_name(name)][1], tensor.float())


# --- what is refused ---


def test_a_file_with_wrong_numbers_is_not_kept(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_export.encode
    monkeypatch.setattr(  # gate and up in the wrong order
        gguf_export, "encode", lambda found, one: right(found.roll(96, 0) if "ffn_up" in one.name else found, one)
    )
    for target in ("out", "out.gguf"):
        with pytest.raises(OutputError, match="not what the source is"):
            export(three, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_what_stands_there_stays(three: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export(three, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"
    export(three, tmp_path / "a.gguf", overwrite=True)
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_what_llama_cpp_does_not_compute(three: Path, piece_file: Path, tmp_path: Path) -> None:
    first = write_chatglm(tmp_path / "first")
    with pytest.raises(ConfigError, match="both directions"):
        export(first, tmp_path / "out")
    prefix = write_model(tmp_path / "prefix", piece_file, **SIZES, pre_seq_len=4)
    with pytest.raises(ConfigError, match="no place"):
        export(prefix, tmp_path / "out")
    narrow = write_model(tmp_path / "narrow", piece_file, **{**SIZES, "kv_channels": 8})
    with pytest.raises(ConfigError, match="heads"):
        export(narrow, tmp_path / "out")
    uneven = write_model(tmp_path / "uneven", piece_file, **{**SIZES, "ffn_hidden_size": 80})
    with pytest.raises(UsageError, match="80 columns"):
        export(uneven, tmp_path / "out", weights="int4")
    with pytest.raises(UsageError, match="q5_k"):
        export(three, tmp_path / "out", weights="q5_k")
    assert not (tmp_path / "out").exists()


def test_without_the_package(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="gguf"):
        export(three, tmp_path / "out")


# --- tables ---


def joined_pieces(table: Vocabulary) -> Callable[[str], list[int]]:
    """How llama.cpp cuts a text by the tables of its tokenizer "llama": the best pair of neighbours is joined."""
    ids = {name: index for index, name in enumerate(table.tokens)}

    def encode(text: str) -> list[int]:
        if not text:
            return []
        parts = list((" " * table.add_space_prefix + text).replace(" ", "▁"))
        while True:
            pairs = [
                (table.scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids
            ]
            if not pairs:
                break
            place = -max(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [
            index
            for part in parts
            for index in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
        ]

    return encode


def joined_bytes(table: Vocabulary, *, ignore_merges: bool = True) -> Callable[[str], list[int]]:
    """The same of its tokenizer "gpt2" with the pre-tokenizer "glm4", which takes whole words as they are."""
    ids = {name: index for index, name in enumerate(table.tokens)}
    merges = [tuple(pair.split(" ")) for pair in table.merges]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=ignore_merges))
    words = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return lambda text: list(tokenizer.encode(text).ids)


def parsed(table: Vocabulary, encode: Callable[[str], list[int]], text: str) -> list[int]:
    """What llama.cpp makes of a rendered prompt: names of control ids are found anywhere in it."""
    control = [name for name, kind in zip(table.tokens, table.types) if kind == 3]
    parts = re.split("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")", text)
    found: list[int] = []
    for part in parts:
        found += [table.tokens.index(part)] if part in control else encode(part)
    return found


def assert_same_prompts(tokenizer: Any, table: Vocabulary, encode: Callable[[str], list[int]]) -> None:
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(table.template)
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        text = template.render(messages=messages, add_generation_prompt=True)
        assert parsed(table, encode, text) == prompt_ids(tokenizer, [Message(*one) for one in chat])


def assert_same_ids(tokenizer: Any, encode: Callable[[str], list[int]], texts: Sequence[str] = TEXTS) -> None:
    for text in texts:
        assert encode(text) == list(tokenizer.encode_text(text)), text


@pytest.mark.parametrize("generation", [2, 3])
def test_tables_of_pieces(generation: int, piece_file: Path, tmp_path: Path) -> None:
    tokenizer = ChatGLMTokenizer(piece_file, generation=generation)
    source = write_model(tmp_path / "source", piece_file, generation=generation, **SIZES)
    said = keys(export(source, tmp_path / "out").path)
    table = read_vocabulary(tokenizer, tokenizer.vocab_size + 20)
    assert said["tokenizer.ggml.tokens"] == table.tokens
    assert said["tokenizer.ggml.token_type"] == table.types
    assert said["tokenizer.ggml.scores"] == table.scores
    assert said["tokenizer.chat_template"] == table.template
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.ggml.add_space_prefix"] is True
    ends = {said.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    assert ends == tokenizer.stop_ids
    assert table.tokens[tokenizer.get_command("[gMASK]")] == "[gMASK]"
    assert table.tokens[tokenizer.get_command("sop")] == "<sop>"
    assert_same_ids(tokenizer, joined_pieces(table))
    assert_same_prompts(tokenizer, table, joined_pieces(table))


def test_tables_of_bytes(tmp_path: Path) -> None:
    source = write_glm4(tmp_path / "source", **SIZES)
    tokenizer = ChatGLM4Tokenizer(source / "tokenizer.model")
    said = keys(export(source, tmp_path / "out").path)
    table = read_vocabulary(tokenizer, 300)
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "glm4"
    assert said["tokenizer.ggml.tokens"] == table.tokens
    assert {said[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")} == tokenizer.stop_ids
    assert said["chatglm.rope.freq_base"] == 5_000_000
    assert_same_ids(tokenizer, joined_bytes(table))
    assert_same_prompts(tokenizer, table, joined_bytes(table))


def test_the_released_pieces(shared: Path) -> None:
    """The official names of two control ids would be found in words: that is why they have others."""
    tokenizer = ChatGLMTokenizer(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", generation=3)
    table = read_vocabulary(tokenizer, 65_024)
    assert len(table.tokens) == 65_024
    assert_same_ids(tokenizer, joined_pieces(table))
    assert_same_prompts(tokenizer, table, joined_pieces(table))
    official = replace(table, tokens=[{"<sop>": "sop", "<eop>": "eop"}.get(name, name) for name in table.tokens])
    sop = tokenizer.get_command("sop")
    assert sop not in tokenizer.encode_text("xsop")
    assert sop in joined_pieces(official)("xsop")
    assert joined_pieces(official)("philosophy") == [5119, 30914, sop, 4951]  # what llama.cpp gives
    assert sop in parsed(official, joined_pieces(official), "philosophy")


@pytest.mark.slow
def test_the_released_ranks(shared: Path) -> None:
    """893 sequences are reached by no merge: that is why the pre-tokenizer is not chatglm-bpe."""
    tokenizer = ChatGLM4Tokenizer(shared / "tokenizers" / "glm4" / "tokenizer.model")
    table = read_vocabulary(tokenizer, 151_552)
    whole, merged = joined_bytes(table), joined_bytes(table, ignore_merges=False)
    assert_same_ids(tokenizer, whole)
    assert_same_prompts(tokenizer, table, whole)
    [index] = tokenizer.encode_text(" 参考")
    assert whole(" 参考") == [index]
    assert merged(" 参考") == [26767, 224, 98580]  # what llama.cpp gives with chatglm-bpe
    letters = byte_letters()
    assert table.tokens[index] == " 参考".encode().decode("latin-1").translate(letters)
