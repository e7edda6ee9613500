"""Which tokenizer a folder or hub id gets, by what is in its files; and that no code of it ever runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

import glmkit
from glmkit.errors import TokenizerError
from glmkit.hf import AutoTokenizer
from glmkit.tokenizers import (
    ChatGLM1Tokenizer,
    ChatGLM4Tokenizer,
    ChatGLMTokenizer,
    GLM130BTokenizer,
    has_tokenizer,
    load_tokenizer,
    tokenizer_class,
)
from glmkit.tokenizers.folder import decide_generation
from glmkit.tokenizers.glm import GLMBertTokenizer
from test_tokenizer import CORPUS, train
from test_tokenizer_chatglm import small_file as train_ice
from test_tokenizer_glm4 import write_ranks

FIRST = {"model_type": "chatglm", "position_encoding_2d": True, "inner_hidden_size": 64}
LATER = {
    "model_type": "chatglm",
    "padded_vocab_size": 700,
    "multi_query_attention": True,
    "_name_or_path": "chatglm3-6b",
}
GLM = {"model_type": "glm", "block_position_encoding": True, "num_layers": 2}
NATIVE = {"model_type": "glm", "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return {
        "ice": train_ice(folder / "ice_text.model"),
        "sentencepiece": train(folder / "sentencepiece.model"),
        "tiktoken": write_ranks(folder / "tiktoken.model"),
        "bert": folder / "vocab.txt",
    }


NAMES = {
    "ice": "ice_text.model",
    "sentencepiece": "tokenizer.model",
    "tiktoken": "tokenizer.model",
    "bert": "vocab.txt",
}
CASES = [
    ("ice", FIRST, {"tokenizer_class": "ChatGLMTokenizer"}, ChatGLM1Tokenizer),
    ("ice", None, {"tokenizer_class": "ChatGLMTokenizer"}, ChatGLM1Tokenizer),
    ("ice", FIRST, None, ChatGLM1Tokenizer),
    ("ice", {"model_type": "glm-130b"}, None, GLM130BTokenizer),
    ("ice", None, {"tokenizer_class": "GLM130BTokenizer"}, GLM130BTokenizer),
    ("sentencepiece", LATER, {"tokenizer_class": "ChatGLMTokenizer"}, ChatGLMTokenizer),
    ("sentencepiece", LATER, None, ChatGLMTokenizer),
    ("tiktoken", LATER | {"_name_or_path": "glm-4-9b"}, {"tokenizer_class": "ChatGLM4Tokenizer"}, ChatGLM4Tokenizer),
    ("tiktoken", LATER, {"tokenizer_class": "ChatGLMTokenizer"}, ChatGLM4Tokenizer),  # what it is, not what it says
    ("tiktoken", None, {"tokenizer_class": "ChatGLM4Tokenizer"}, ChatGLM4Tokenizer),
    ("tiktoken", NATIVE, {"tokenizer_class": "PreTrainedTokenizerFast", "generation": 4}, ChatGLM4Tokenizer),
    ("bert", GLM, None, GLMBertTokenizer),
    ("bert", GLM, {"tokenizer_class": "GLMBertTokenizer"}, GLMBertTokenizer),
    ("bert", None, {"tokenizer_class": "GLMBertTokenizer"}, GLMBertTokenizer),
]


def fill(folder: Path, files: dict[str, Path], kind: str, config: Any, described: Any) -> Path:
    """Writes a folder whose python files leave `canary` behind if they run."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(files[kind], folder / NAMES[kind])
    code = f"open({str(folder.parent / 'canary')!r}, 'w')\n\nclass Evil:\n    from_pretrained = None\n"
    for name in ("tokenization_chatglm.py", "tokenization_glm.py", "configuration_chatglm.py"):
        (folder / name).write_text(code)
    if config is not None:
        code_map = {"AutoConfig": "configuration_chatglm.Evil"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": code_map}))
    if described is not None:
        code_map = {"AutoTokenizer": ["tokenization_chatglm.Evil", None]}
        name = {"name_or_path": "THUDM/chatglm3-6b"} if kind == "sentencepiece" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(described | name | {"auto_map": code_map}))
    return folder


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize(("kind", "config", "described", "expected"), CASES)
def test_folders(
    files: dict[str, Path], tmp_path: Path, kind: str, config: Any, described: Any, expected: type, trust: bool | None
) -> None:
    folder = fill(tmp_path / "x", files, kind, config, described)
    assert has_tokenizer(folder)
    assert tokenizer_class(folder) is expected
    assert type(load_tokenizer(folder)) is expected
    assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, use_fast=False)) is expected
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize(("kind", "config", "described", "expected"), CASES)
def test_hub_ids(
    files: dict[str, Path], tmp_path: Path, kind: str, config: Any, described: Any, expected: type, trust: bool | None
) -> None:
    """A cache as the hub's client leaves it, and no network."""
    repository = tmp_path / "models--any--thing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    fill(repository / "snapshots" / ("a" * 40), files, kind, config, described)
    place = {"cache_dir": str(tmp_path), "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained("any/thing", trust_remote_code=trust, **place)
    assert type(tokenizer) is expected
    assert not list(tmp_path.rglob("canary"))


def test_the_config_that_is_given_counts(files: dict[str, Path], tmp_path: Path) -> None:
    folder = fill(tmp_path / "x", files, "tiktoken", None, None)
    config = glmkit.models.chatglm2_config.ChatGLM2Config(generation=4)
    assert type(AutoTokenizer.from_pretrained(folder, config=config)) is ChatGLM4Tokenizer
    assert load_tokenizer(folder, config).generation == 4
    with pytest.raises(TokenizerError, match="generation 4, not 3"):
        load_tokenizer(folder, glmkit.models.chatglm2_config.ChatGLM2Config(generation=3))


@pytest.mark.parametrize("declared", [["GLMBertTokenizer"], {"GLMBertTokenizer": 1}, 5, None])
def test_a_class_that_is_no_name_says_nothing(files: dict[str, Path], tmp_path: Path, declared: Any) -> None:
    folder = fill(tmp_path / "x", files, "bert", GLM, {"tokenizer_class": declared})
    assert type(AutoTokenizer.from_pretrained(folder)) is GLMBertTokenizer


def test_folders_with_two_vocabularies_or_none(files: dict[str, Path], tmp_path: Path) -> None:
    both = fill(tmp_path / "both", files, "ice", None, None)
    shutil.copy(files["sentencepiece"], both / "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"has ice_text\.model .* and tokenizer\.model"):
        tokenizer_class(both)
    for config, expected in ((FIRST, ChatGLM1Tokenizer), (LATER, ChatGLMTokenizer)):
        (both / "config.json").write_text(json.dumps(config))
        assert tokenizer_class(both) is expected
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not has_tokenizer(empty)
    with pytest.raises(TokenizerError, match="no vocabulary"):
        load_tokenizer(empty)
    for config, name in ((FIRST, "ice_text.model"), (LATER, "tokenizer.model")):
        (empty / "config.json").write_text(json.dumps(config))
        with pytest.raises(TokenizerError, match=f"{name} is missing"):
            load_tokenizer(empty)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("THUDM/codegeex2-6b", 2),
        ("zai-org/chatglm2-6b-32k", 2),
        ("chatglm3-6b-128k", 3),
        ("THUDM/chatglm-6b", None),
        ("glm_6b", None),
        ("THUDM/glm-4-9b-chat-1m", None),
        ("codegeex4-all-9b", None),
        ("glm4_9b", None),
    ],
)
def test_names_as_signs(files: dict[str, Path], tmp_path: Path, name: str, expected: int | None) -> None:
    """A SentencePiece BPE is of generation 2 or 3; a name that says 1 or 4 is in the way."""
    shutil.copy(files["sentencepiece"], tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": name}))
    if expected is None:
        with pytest.raises(TokenizerError, match="signs disagree"):
            decide_generation(tmp_path)
        assert ChatGLMTokenizer.from_pretrained(tmp_path, generation=3).generation == 3
    else:
        assert ChatGLMTokenizer.from_pretrained(tmp_path).generation == expected


def test_pieces_beyond_limits_are_refused(tmp_path: Path) -> None:
    """What the native library should not see."""
    from sentencepiece import sentencepiece_model_pb2

    data = train(tmp_path / "t", normalization_rule_name="identity").read_bytes()
    for change, message in (
        (lambda model: setattr(model.pieces[300], "piece", "x" * 200_000), "the longest piece has 200000 bytes"),
        (lambda model: setattr(model.pieces[300], "piece", ""), "or one has none"),
        (lambda model: setattr(model.pieces[300], "piece", model.pieces[301].piece), "occurs twice"),
        (lambda model: model.pieces[300].MergeFromString(b"\x0a\x01\xff"), "a piece is no UTF-8 text"),
        (lambda model: setattr(model.pieces[300], "score", float("nan")), "score is no number"),
    ):
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        change(model)
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        with pytest.raises(TokenizerError, match=message):
            ChatGLMTokenizer(tmp_path / "tokenizer.model", generation=3)
    ice = train_ice(tmp_path / "ice_text.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(ice)
    rules = bytearray(model.normalizer_spec.precompiled_charsmap)
    rules[8:2_000] = b"\xff" * 1_992
    model.normalizer_spec.precompiled_charsmap = bytes(rules)
    (tmp_path / "ice_text.model").write_bytes(model.SerializeToString())
    with pytest.raises(TokenizerError, match="the normaliser's rules are broken"):
        ChatGLM1Tokenizer(tmp_path / "ice_text.model")


def test_ice_text_of_another_kind(tmp_path: Path) -> None:
    for arguments, message in (
        ({"model_type": "bpe"}, "BPE, expected UNIGRAM"),
        ({"model_type": "unigram", "vocab_size": 390}, "expected nmt_nfkc"),
    ):
        train(tmp_path / "ice_text.model", **arguments)
        with pytest.raises(TokenizerError, match=message):
            ChatGLM1Tokenizer(tmp_path / "ice_text.model")
    with (tmp_path / "ice_text.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=writer, model_type="unigram", vocab_size=120, minloglevel=2
        )
    with pytest.raises(TokenizerError, match="the control token <pad> is missing"):
        ChatGLM1Tokenizer(tmp_path / "ice_text.model")
