"""One door for checkpoints: every form and back bit for bit, compared before it is kept, in the memory of a tensor."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import glmkit
import official
from glmkit import cli
from glmkit.chat.messages import to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.checkpoint import open_folder
from glmkit.engine.probe import probe_logits
from glmkit.errors import CheckpointError, OutputError, UsageError
from glmkit.export import FORMS, convert
from glmkit.export.folders import Converted
from glmkit.export.mindspore import MindSporeFile, mindformers_name, official_name, write_mindspore
from glmkit.export.state_file import StateFile, write_state
from glmkit.tokenizers import ChatGLMTokenizer
from test_adapters import FAMILIES, bases, write_lora

__all__ = ["bases"]  # a fixture
TABLE = "transformer.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole official folder of a tiny ChatGLM3: shards, python files, licence."""
    work = tmp_path_factory.mktemp("source")
    folder = official.write_folder(work / "chatglm3", tokenizer=official.train_tokenizer(work / "t.model"))
    (folder / "MODEL_LICENSE").write_text("The licence.\n")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_folder(folder) as opened:
        return dict(opened.read())


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name


def done(source: Path, target: Path, to: str, **options: Any) -> Converted:
    made = convert(source, target, to, **options)
    assert isinstance(made, Converted)
    return made


# --- folders ---


@pytest.mark.parametrize("form", ["shards", "bin-shards", "safetensors", "bin"])
def test_any_official_folder_becomes_safetensors(tmp_path: Path, form: str) -> None:
    folder = official.write_folder(tmp_path / "in", form=form, tokenizer=official.train_tokenizer(tmp_path / "t"))
    made = done(folder, tmp_path / "out", "official", shard_bytes=40_000)
    assert (made.difference, made.bytes_after, made.dtypes) == (0.0, made.bytes_before, ["float16"])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0].startswith("model-00001-of-0000")
    assert all((tmp_path / "out" / name).stat().st_size < 60_000 for name in files)
    assert_same_bits(tensors(tmp_path / "out"), tensors(folder))
    done(tmp_path / "out", tmp_path / "again", "official")
    assert_same_bits(tensors(tmp_path / "again"), tensors(folder))
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


def test_another_dtype(source: Path, tmp_path: Path) -> None:
    made = done(source, tmp_path / "wide", "official", dtype="float32")
    assert (made.dtypes, made.difference) == (["float32"], 0.0)
    assert made.bytes_after == 2 * made.bytes_before
    wide = tensors(tmp_path / "wide")
    assert all(torch.equal(tensor, wide[name].half()) for name, tensor in tensors(source).items())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    back = done(tmp_path / "wide", tmp_path / "back", "official", dtype="float16")
    assert back.difference == 0.0  # these numbers came from float16
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    narrow = done(tmp_path / "wide", tmp_path / "narrow", "native", dtype="bfloat16")
    assert narrow.difference is not None
    assert 1e-5 < narrow.difference < 0.02
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    large = wide | {"transformer.output_layer.weight": wide["transformer.output_layer.weight"] * 1e6}
    official.write_weights(tmp_path / "wide", large, "safetensors")
    with pytest.raises(OutputError, match=r"output_layer\.weight has numbers that float16 does not hold"):
        convert(tmp_path / "wide", tmp_path / "none", "official", dtype="float16")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_official_and_a_file(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bases(family)
    assert done(folder, tmp_path / "out", "official").difference == 0.0
    assert_same_bits(tensors(tmp_path / "out"), tensors(folder))
    assert type(glmkit.load(tmp_path / "out").tokenizer) is type(glmkit.load(folder).tokenizer)
    made = done(folder, tmp_path / "state.pth", "file")
    assert made.difference == 0.0
    assert_same_bits(torch.load(tmp_path / "state.pth", weights_only=True), tensors(folder))
    assert done(tmp_path / "state.pth", tmp_path / "back", "official", like=folder).difference == 0.0
    assert_same_bits(tensors(tmp_path / "back"), tensors(folder))


def test_what_stands_beside_the_weights(source: Path, tmp_path: Path) -> None:
    """Complete for us and for the official code, whose python files go along on request and are never run."""
    made = done(source, tmp_path / "plain", "official")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "MODEL_LICENSE", "README.md"),
        *("tokenizer.model", "tokenizer_config.json"),
    }
    assert "--keep-code" in made.notes[0]
    assert all(name in made.notes[0] for name in official.CODE)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "plain" / name).read_text()
    read_me = (tmp_path / "plain" / "README.md").read_text()
    assert "# chatglm3-6b" in read_me
    assert "commercial use after registration" in read_me
    assert "MODEL_LICENSE" in read_me
    assert str(tmp_path) not in read_me

    made = done(source, tmp_path / "kept", "official", keep_code=True)
    assert "not run" in made.notes[0]
    for name in official.CODE:
        assert (tmp_path / "kept" / name).read_bytes() == (source / name).read_bytes()
    for name in ("config.json", "tokenizer_config.json"):
        stored = json.loads((source / name).read_text())
        assert json.loads((tmp_path / "kept" / name).read_text())["auto_map"] == stored["auto_map"]
    model = AutoModel.from_pretrained(tmp_path / "kept", trust_remote_code=True)
    assert type(model).__module__.startswith("glmkit.")
    assert not any((folder / official.CANARY).exists() for folder in (source, tmp_path / "kept"))
    assert "no python files to carry" in done(tmp_path / "plain", tmp_path / "n", "official", keep_code=True).notes[0]


class _OfficialTokenizer:
    """How official tokenizers of ChatGLM2 and ChatGLM3 take the content of tokenizer_config.json.

    Some tokens are properties that nobody can set, and the base class sets every keyword that is named like a token.
    """

    eos_token = property(lambda self: "</s>")
    pad_token = property(lambda self: "<unk>")
    unk_token = property(lambda self: "<unk>")

    def __init__(
        self, vocab_file: str, padding_side: str = "left", clean_up_tokenization_spaces: bool = False, **kwargs: Any
    ) -> None:
        for name, value in kwargs.items():
            if name.endswith(("_token", "_token_id", "_tokens")):
                setattr(self, name, value)


def test_official_tokenizers_take_what_is_written(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    done(source, folder, "official")
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(  # as new versions of transformers save it
        json.dumps(described | {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"})
    )
    with pytest.raises(AttributeError):
        _OfficialTokenizer("", **json.loads((folder / "tokenizer_config.json").read_text()))
    done(folder, tmp_path / "out", "official")
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "ChatGLMTokenizer"
    _OfficialTokenizer("", **after)
    assert type(glmkit.load(tmp_path / "out").tokenizer) is ChatGLMTokenizer


def test_a_foreign_reader_of_the_official_layout(shared: Path, tmp_path: Path) -> None:
    """transformers' Auto classes read it; names, shapes and numbers are those of the official code's checkpoint."""
    stored = shared / "conformance" / "glm4"
    done(stored / "hf_native", tmp_path / "out", "official")
    assert_same_bits(tensors(tmp_path / "out"), tensors(stored / "hf_repo"))
    single = load_file(stored / "single.safetensors")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(single["input_ids"]).logits
    torch.testing.assert_close(logits, single["logits"], atol=1e-4, rtol=1e-4)
    made = done(shared / "conformance" / "glm130b" / "sat_mp2", tmp_path / "folder", "official")
    assert made.difference == 0.0


def test_the_chat_template_of_glm4(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Alone, transformers makes of it the ids that the model's own format has."""
    done(bases("glm4"), tmp_path / "out", "native")
    alone = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    asked = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "1 + 2 = ?"},
    ]
    found = alone.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert found == prompt_ids(glmkit.load(bases("glm4")).tokenizer, to_messages(asked))
    assert "chat_template" not in json.loads((bases("glm4") / "tokenizer_config.json").read_text())


def test_shards_of_a_folder_and_back(source: Path, tmp_path: Path) -> None:
    assert done(source, tmp_path / "two", "shards", degree=2).difference == 0.0
    assert done(tmp_path / "two", tmp_path / "back", "official").difference == 0.0
    kept = {name: tensor for name, tensor in tensors(source).items() if not name.endswith("inv_freq")}
    assert_same_bits(tensors(tmp_path / "back"), kept)


# --- bare files ---


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ".npz", ".ckpt"])
@pytest.mark.parametrize("names", ["file", "mindformers"])
def test_a_bare_file_and_back(source: Path, tmp_path: Path, suffix: str, names: str) -> None:
    file = tmp_path / f"glm3_6b{suffix}"
    made = done(source, file, names)
    assert (made.difference, made.tensors) == (0.0, len(tensors(source)))
    assert "--like" in made.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
    assert done(file, tmp_path / "back", "official", like=source).difference == 0.0
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    with pytest.raises(OutputError, match="exists"):
        convert(source, file, names)
    done(source, file, names, overwrite=True)


def test_other_libraries_read_the_files(source: Path, tmp_path: Path) -> None:
    """torch.load, numpy and zip tools; MindSpore's schema through Google's own protobuf."""
    wanted = tensors(source)
    done(source, tmp_path / "a.pth", "file")
    for mapped in (False, True):
        assert_same_bits(torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped), wanted)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
    with open_folder(tmp_path, weights=("a.pth",), config=None) as opened:
        assert {info.offset_bytes % 64 for info in opened.tensors.values()} == {0}
    done(source, tmp_path / "a.npz", "mindformers")
    table = np.load(tmp_path / "a.npz")
    assert "transformer.embedding.embedding_table" in table.files
    assert TABLE not in table.files
    assert np.array_equal(table["transformer.embedding.embedding_table"], wanted[TABLE].numpy())
    done(source, tmp_path / "a.ckpt", "mindformers")
    assert_same_bits({str(official_name(k)): v for k, v in _by_protobuf(tmp_path / "a.ckpt").items()}, wanted)


def _by_protobuf(path: Path) -> dict[str, torch.Tensor]:
    """A .ckpt file as MindSpore's load_checkpoint reads it."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="checkpoint.proto", package="c", syntax="proto2")
    for message, fields in {
        "TensorProto": [("dims", 3, 3, ""), ("tensor_type", 2, 9, ""), ("tensor_content", 2, 12, "")],
        "Value": [("tag", 2, 9, ""), ("tensor", 1, 11, ".c.TensorProto")],
        "Checkpoint": [("value", 3, 11, ".c.Value")],
    }.items():
        made = file.message_type.add(name=message)
        for number, (name, label, kind, of) in enumerate(fields, 1):
            made.field.add(name=name, number=number, label=label, type=kind, **({"type_name": of} if of else {}))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    read: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("c.Checkpoint"))()
    read.ParseFromString(path.read_bytes())
    parts: dict[str, bytes] = {}
    for value in read.value:
        parts[value.tag] = parts.get(value.tag, b"") + value.tensor.tensor_content
    kinds = {"Float16": torch.float16, "Float32": torch.float32, "BFloat16": torch.bfloat16}
    return {
        value.tag: torch.frombuffer(bytearray(parts[value.tag]), dtype=kinds[value.tensor.tensor_type])
        .view(list(value.tensor.dims))
        .clone()
        for value in read.value
    }


def test_names_of_mindformers(bases: Callable[[str], Path]) -> None:
    """What its convert_weight.py makes of official names, and back."""
    three, first = (glmkit.load(bases(name)).config for name in ("chatglm3", "chatglm"))
    assert mindformers_name(TABLE, three) == "transformer.embedding.embedding_table"
    norm = "transformer.layers.1.post_attention_layernorm"
    pairs = {
        "transformer.word_embeddings.weight": "transformer.word_embeddings.embedding_table",
        f"{norm}.weight": f"{norm}.gamma",
        f"{norm}.bias": f"{norm}.beta",
        "transformer.final_layernorm.weight": "transformer.final_layernorm.gamma",
        "transformer.layers.0.attention.dense.bias": "transformer.layers.0.attention.dense.bias",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: mindformers_name(name, first) for name in pairs} == pairs
    assert {name: official_name(own) for name, own in pairs.items()} == {name: name for name in pairs}
    assert official_name("adam_m.transformer.embedding.embedding_table") is None
    assert official_name("global_step") is None
    with pytest.raises(UsageError, match="MindFormers has no network of GLM"):
        mindformers_name("glm.word_embeddings.weight", glmkit.load(bases("glm")).config)


def test_a_training_checkpoint_of_mindformers(source: Path, tmp_path: Path) -> None:
    """Cut tensors, single numbers, a check sum at the end, and Adam's moments, which are left out and said."""
    model = tensors(source)
    state = {name.replace("word_embeddings.weight", "embedding_table"): tensor for name, tensor in model.items()}
    state |= {f"adam_m.{name}": tensor.float() for name, tensor in state.items()} | {"global_step": torch.tensor(7)}
    file = tmp_path / "rank_0.ckpt"
    with open(file, "wb") as opened:
        write_mindspore(opened, state, state.__getitem__, slice_bytes=1000)
        opened.write(b"crc_num" + bytes(10))
    table = MindSporeFile(file)
    assert table.tensors["global_step"].shape == ()
    assert_same_bits(dict(table.read()), state)
    table.close()
    made = done(file, tmp_path / "out", "official", like=source)
    assert f"left out: {len(model) + 1} entries" in made.notes[0]
    assert_same_bits(tensors(tmp_path / "out"), model)


@pytest.mark.parametrize("suffix", [".ckpt", ".npz", ".pth", ".safetensors"])
def test_damaged_and_hostile_files(source: Path, tmp_path: Path, suffix: str) -> None:
    """Every cut is refused or misses a tensor; any changed byte leads to an error of ours or to other numbers."""
    state = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2)}
    file = tmp_path / f"x{suffix}"
    write_state(file, state, state.__getitem__)
    data = file.read_bytes()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    for size in range(0, len(data), 23):
        file.write_bytes(data[:size])
        try:
            with StateFile(file, tmp_path) as opened:
                assert len(dict(opened.read())) < len(state)  # messages of .ckpt have no end mark
        except CheckpointError:
            continue
        assert suffix == ".ckpt"
    for place in range(0, len(data), 9):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        file.write_bytes(changed)
        try:
            with StateFile(file, tmp_path) as opened:
                assert sum(info.nbytes for info in opened.tensors.values()) < 1000
                dict(opened.read())
        except CheckpointError:
            pass
    if suffix == ".npz":
        np.savez(file, a=np.array([{}], dtype=object))
        with pytest.raises(CheckpointError, match="expected plain numbers"):
            StateFile(file, tmp_path)


def test_one_tensor_twice(source: Path, tmp_path: Path) -> None:
    """Under both of its names, or in two entries of a table: none of them is silently the right one."""
    state = tensors(source)
    both = {**state, mindformers_name(TABLE, glmkit.load(source).config): torch.zeros_like(state[TABLE])}
    for suffix in (".npz", ".ckpt", ".pth"):
        write_state(tmp_path / f"both{suffix}", both, both.__getitem__)
        with pytest.raises(CheckpointError, match="are names of the same tensor"):
            StateFile(tmp_path / f"both{suffix}", source)
    file = tmp_path / "twice.npz"
    write_state(file, state, state.__getitem__)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"{TABLE}.npy", archive.read(f"{TABLE}.npy"))
    with pytest.raises(CheckpointError, match="stands there twice"):
        StateFile(file, source)


def test_a_header_that_says_gigabytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy reads the whole header of an entry, which a zip packs into nothing, before it refuses its size."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x02\x00" + (1 << 20).to_bytes(4, "little") + b" " * (1 << 20))
    monkeypatch.setattr(np.lib.format, "read_array_header_2_0", lambda _: pytest.fail("the header was read"))
    with pytest.raises(CheckpointError, match="a header of 1048576 bytes"):
        StateFile(tmp_path / "a.npz", source)


# --- what is refused ---


def test_sources_of_every_kind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is a source of shards too; a bare file and the native layout become official first, and that is said."""
    monkeypatch.setenv("GLMKIT_MODELS", str(source.parent))
    assert done(source.name, tmp_path / "shards", "shards").difference == 0
    done(source, tmp_path / "state.pth", "file")
    for to, options in (("shards", {}), ("int8", {}), ("merged", {"adapter": tmp_path})):
        with pytest.raises(UsageError, match=r"bare file of weights(.|\n)*hint: first: glm convert .* --to official"):
            convert(tmp_path / "state.pth", tmp_path / "out", to, **options)
    done(source, tmp_path / "native", "native")
    with pytest.raises(UsageError, match=r"own layout(.|\n)*--to official"):
        convert(tmp_path / "native", tmp_path / "out", "shards")


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for to, options, message in (
        ("onnx", {}, "to='onnx': expected one of official, native"),
        ("official", {"adapter": "x"}, "adapter=x and to='official'"),
        ("native", {"degree": 2}, "degree=2 and to='native'"),
        ("merged", {}, "merges a base with an adapter"),
        ("official", {"like": tmp_path}, "is for a bare file of weights"),
        ("official", {"dtype": "float8"}, "float8"),
        ("file", {}, "expected a file that ends in"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(source, out, to, **options)
    done(source, tmp_path / "state.pth", "file")
    with pytest.raises(CheckpointError, match=r"no config\.json beside it") as caught:
        convert(tmp_path / "state.pth", out, "official")
    assert "--like" in str(caught.value.hint)
    done(source, tmp_path / "wide", "official", dtype="bfloat16")
    with pytest.raises(UsageError, match="numpy has no bfloat16"):
        convert(tmp_path / "wide", tmp_path / "a.npz", "file")
    state = tensors(source)
    torch.save({name: tensor for name, tensor in state.items() if name != TABLE}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight of shape .* is missing"):
        convert(tmp_path / "less.pth", out, "official", like=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less.pth", "state.pth", "wide"]


# --- proof ---


def test_a_result_that_computes_something_else_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes as they were made are not enough: a wrong row order, or a wrong field of config.json, is seen in logits."""
    folders: Any = importlib.import_module("glmkit.export.folders")
    right = folders.write_config
    for to, changes in (("official", {"add_qkv_bias": False}), ("native", {"rope_theta": 5e5})):
        with monkeypatch.context() as patch:
            patch.setattr(folders, "write_config", lambda new, values, c=changes: right(new, values | c))
            with pytest.raises((OutputError, CheckpointError), match=r"not what its source is|not part of this model"):
                convert(source, tmp_path / "out", to)
    native: Any = importlib.import_module("glmkit.export.native")
    genuine = native._counterparts

    def exchanged(official: str, rows: int, config: Any) -> Any:
        found = genuine(official, rows, config)
        if len(found) == 3:
            (_, *keys), (_, *values) = found[1:]
            found[1:] = [(found[1][0], *values), (found[2][0], *keys)]
        return found

    monkeypatch.setattr(native, "_counterparts", exchanged)
    with pytest.raises(OutputError, match="not what its source is: its logits differ by"):
        convert(source, tmp_path / "out", "native")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.new_process
def test_in_a_new_process(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way as users go it, by the command."""
    given = ["convert", str(source), str(tmp_path / "native"), "--to", "native", "--shard-size", "40kB", "--json"]
    assert cli.run(given) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["schema"], made["to"], made["dtypes"]) == (1, "native", ["float16"])
    assert 0 <= made["difference"] < 1e-4
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 1


def test_blocks_that_fit(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory holds one block only, one is compared on both sides, and that is said."""
    stored = tensors(source)
    outside = sum(2 * tensor.nbytes for name, tensor in stored.items() if ".layers." not in name)
    block = sum(2 * tensor.nbytes for name, tensor in stored.items() if ".layers.0." in name)
    monkeypatch.setattr("glmkit.export.proof._SHARE_OF_MEMORY", 1)
    monkeypatch.setattr("glmkit.export.proof.free_memory_bytes", lambda: outside + block)
    for to in ("official", "native"):
        made = done(source, tmp_path / to, to)
        assert made.difference is not None
        assert made.difference < 1e-4
        assert "the first 1 of 2 blocks" in made.notes[-1]
    monkeypatch.setattr("glmkit.export.proof.free_memory_bytes", lambda: outside)
    with pytest.raises(UsageError, match="not even memory for one block"):
        convert(source, tmp_path / "none", "official")


_MEASURED = """
import json, resource, sys
import glmkit.export.proof as proof
from glmkit.export import convert

proof.in_new_process = lambda *_, **__: 0.0  # which has memory of its own
warm, source, targets = json.load(sys.stdin)
for folder, number in ((warm, 0), (source, 1)):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for to, target in targets.items():
        convert(folder, target[number], to)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_more_memory_than_a_few_tensors(source: Path, tmp_path: Path) -> None:
    """46 MB of weights, 6 MB the largest tensor: each form is written, and the process grows by three of those."""
    sizes = {"hidden_size": 256, "ffn_hidden_size": 3_000, "kv_channels": 64, "padded_vocab_size": 1_000}
    large = official.write_folder(tmp_path / "in", dtype=torch.float32, num_layers=5, **sizes)
    total = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    largest = 4 * 256 * 6_000
    assert total > 7.5 * largest
    names = {"native": "n", "file": "f.pth"}
    targets = {to: [str(tmp_path / f"{warm}{name}") for warm in ("warm-", "")] for to, name in names.items()}
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED],
        input=json.dumps([str(source), str(large), targets]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout.split()[-1]) * 1024 < 3 * largest, run.stdout


# --- short forms ---


def test_merge_and_quantise_through_the_same_door(source: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", source)
    merged = convert(source, tmp_path / "merged", "merged", adapter=lora, keep_code=True)
    assert merged.kind == "lora"  # type: ignore[union-attr]
    expected = probe_logits(glmkit.load(source, adapter=lora, dtype="float32").model)
    found = probe_logits(glmkit.load(tmp_path / "merged", dtype="float32").model)
    assert (found - expected).norm() / expected.norm() < 0.01
    assert (tmp_path / "merged" / "modeling_chatglm.py").exists()
    assert "auto_map" in (tmp_path / "merged" / "config.json").read_text()
    assert set(FORMS) == {"official", "native", "shards", "file", "mindformers", "merged", "int8", "int4"}


def test_a_quantised_result_that_is_not_smaller_is_said(tmp_path: Path) -> None:
    """Small matrices of a checkpoint in float16: their scales weigh as much as the bits that int8 saves elsewhere."""
    from glmkit.export.quantized import _about_size

    folder = official.write_folder(tmp_path / "in", dtype=torch.float32)
    made = convert(folder, tmp_path / "int8", "int8")
    assert made.bytes_after < made.bytes_before  # type: ignore[union-attr]
    assert not any("not smaller" in note for note in made.notes)
    assert "the quantised folder is not smaller: 1,001 bytes" in _about_size(1_000, 1_001)[0]
    from glmkit.export.model_parallel import reshard

    shards = Path(__file__).parent / "fixtures" / "glm_base" / "hf_repo"
    reshard(shards, tmp_path / "one", 1)
    quantised = convert(tmp_path / "one", tmp_path / "q", "shards", bits=8)
    assert isinstance(quantised, Converted)
    assert quantised.difference is not None
    assert 0 < quantised.difference < 0.1
