"""ChatGLM-6B's tokenizer against the official class, and against the sentencepiece library on many texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from glmkit.errors import TokenizerError, UsageError
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import TokenIdError
from test_tokenizer import random_texts


@pytest.fixture(scope="module")
def official(shared: Path) -> tuple[ChatGLM1Tokenizer, dict[str, Any]]:
    fixtures = shared / "conformance" / "tokenizer_chatglm" / "chatglm" / "fixtures.json"
    return ChatGLM1Tokenizer(shared / "tokenizers" / "chatglm-6b.ice_text.model"), json.loads(fixtures.read_text())


def small_file(path: Path) -> Path:
    """A file as icetk has it, which ends with the text's pieces: the reader adds control tokens, blanks and bytes."""
    corpus = ["你好，今天天气很好。", "hello world, how are you?", "上衣 材质 棉", "1 + 2 = 3", "I like tea"] * 20
    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=writer,
            model_type="unigram",
            vocab_size=80,
            pad_id=3,
            user_defined_symbols=["<n>"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM1Tokenizer:
    return ChatGLM1Tokenizer(small_file(tmp_path_factory.mktemp("ice") / "ice_text.model"))


def test_strings(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    tokenizer, fixtures = official
    for case in fixtures["strings"]:
        text, ids, whole = case["text"], case["ids"], case["ids_with_special"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer(text)["input_ids"] == whole, text
        if "pieces" in case:
            assert tokenizer.tokenize(text) == case["pieces"], text
        assert tokenizer.decode(ids) == case["decode_ids"], text
        assert tokenizer.decode(whole) == case["decode_ids_with_special"], text
        assert tokenizer.decode(whole, skip_special_tokens=True) == case["decode_ids_with_special_skip"], text


def test_pairs_truncation_and_batches(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    tokenizer, fixtures = official
    for case in fixtures["pairs"]:
        assert tokenizer(case["a"], case["b"])["input_ids"] == case["ids"]
    for case in fixtures["truncation"]:
        assert tokenizer(case["text"], truncation=True, max_length=case["max_length"])["input_ids"] == case["ids"]
    for case in fixtures["batches"]:
        assert dict(tokenizer(case["texts"])) == case["padding_false"]
        assert dict(tokenizer(case["texts"], padding=True)) == case["padding_true"]
        assert dict(tokenizer(case["texts"], padding="max_length", max_length=16)) == case["max_length_16"]
        arrays = tokenizer(case["texts"], padding=True, return_tensors="pt")
        for name, stored in case["padding_true"].items():
            assert torch.equal(arrays[name], torch.tensor(stored)), name
        again = tokenizer.pad([{"input_ids": row} for row in case["padding_false"]["input_ids"]])
        assert dict(again) == case["padding_true"]


def test_decoding(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    tokenizer, fixtures = official
    for case in fixtures["partial_decode"]:
        ids = case["ids"]
        shown = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
        assert shown[-len(case["decode_prefix"]) :] == case["decode_prefix"]
        assert [tokenizer.decode([index]) for index in ids] == case["decode_each_alone"]
    for text, expected in fixtures["decode_odd_ids"].items():
        if isinstance(expected, dict):
            with pytest.raises(IndexError):
                tokenizer.decode(json.loads(text))
        else:
            assert tokenizer.decode(json.loads(text)) == expected
    for index, expected in fixtures["ids_to_tokens_sample"].items():
        if isinstance(expected, dict):
            with pytest.raises(TokenIdError, match="out of range"):
                tokenizer.convert_ids_to_tokens(int(index))
        else:
            assert tokenizer.convert_ids_to_tokens(int(index)) == expected
            assert tokenizer.convert_tokens_to_ids(expected) == int(index)


def test_names(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    tokenizer, fixtures = official
    for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id", "model_input_names", "padding_side"):
        assert getattr(tokenizer, name) == fixtures[name], name
    assert sorted(tokenizer.all_special_tokens) == sorted(fixtures["all_special_tokens"])
    for piece, index in fixtures["special"].items():
        assert tokenizer.convert_tokens_to_ids(piece) == index
    assert (tokenizer.mask_token_id, tokenizer.gmask_token_id, tokenizer.end_token_id) == (130000, 130001, 2)
    assert tokenizer.stop_ids == {130005}


def test_real_texts_come_back(official: tuple[ChatGLM1Tokenizer, dict[str, Any]], shared: Path) -> None:
    """Text that the normaliser leaves alone: ids as the library gives them, and the text again after decoding."""
    tokenizer, _ = official
    lines = (shared / "data" / "adgen" / "dev.json").read_text(encoding="utf-8").splitlines()
    plain = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    for record in map(json.loads, lines):
        for text in (record["content"], record["summary"]):
            ids = tokenizer.encode_text(text)
            assert ids == plain.encode(text)
            assert tokenizer.decode_ids(ids) == plain.normalize(text).removeprefix("▁").replace("▁", " ")


def test_every_text_is_the_librarys(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    tokenizer, _ = official
    plain = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    rng = random.Random(7)
    alphabet = "ab 12,.，。！你好天　ｅ１\u00a0\u200b\u0301é🙂\u0000\ufeff\r"
    for _ in range(20_000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        if "  " not in text:
            assert tokenizer.encode_text(text) == plain.encode(text), repr(text)


def spelled_out(text: str) -> str:
    """What the official class makes of line ends, tabs and blanks, step by step."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return text


def test_random_texts_equal_the_library(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    """Blanks, control characters, half-width and combining marks, emoji, control tokens as text."""
    tokenizer, _ = official
    plain = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    control = set(tokenizer.special_tokens.values())
    for text in random_texts(5_000, seed=31):
        ids = tokenizer.encode_text(text)
        assert ids == plain.encode(spelled_out(text)), ascii(text)
        assert not control & set(ids)


def test_other_real_texts(official: tuple[ChatGLM1Tokenizer, dict[str, Any]], shared: Path) -> None:
    tokenizer, _ = official
    plain = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    for file in sorted((shared / "data" / "ceval" / "val").glob("*/*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for text in (text for text in json.loads(line).values() if isinstance(text, str)):
                assert tokenizer.encode_text(text) == plain.encode(spelled_out(text))


def test_official_attributes(official: tuple[ChatGLM1Tokenizer, dict[str, Any]]) -> None:
    """What scripts for the official class look at."""
    tokenizer, _ = official
    view = tokenizer.sp_tokenizer
    assert (view.num_tokens, view.num_text_tokens, view.num_image_tokens) == (130_344, 130_344, 0)
    assert (view["[gMASK]"], view["<sop>"], view[130_005]) == (130_001, 130_004, "<eop>")
    assert view.encode("a\n  b") == tokenizer.encode_text("a\n  b") == [104, 4, 130_009, 178]
    assert view.decode_tokens(view.tokenize("a\n  b")) == view.decode([104, 4, 130_009, 178]) == "a\n  b"
    names = ("bos", "eos", "end", "gmask", "mask", "pad", "unk")
    tokens = ["<sop>", "<eop>", "</s>", "[gMASK]", "[MASK]", "<pad>", "<unk>"]
    assert [getattr(tokenizer, f"{name}_token") for name in names] == tokens
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [view[token] for token in tokens]
    assert tokenizer.prefix_ids == [130_001, 130_004]
    assert len(tokenizer.get_vocab()) == len(tokenizer) == 130_344
    assert tokenizer.build_inputs_with_special_tokens([5], [6]) == [5, 130_001, 130_004, 6, 130_005]


def test_the_file_of_icetk_is_completed(official: tuple[ChatGLM1Tokenizer, dict[str, Any]], tmp_path: Path) -> None:
    """icetk's file ends in front of [MASK]; with the rest appended it gives the same ids."""
    tokenizer, _ = official
    model = sentencepiece_model_pb2.ModelProto.FromString(Path(tokenizer.vocab_file).read_bytes())
    del model.pieces[130_000:]
    model.trainer_spec.byte_fallback = False
    (tmp_path / "ice_text.model").write_bytes(model.SerializeToString())
    other = ChatGLM1Tokenizer(tmp_path / "ice_text.model")
    for text in [*random_texts(500, seed=32), "[MASK] a<sop>"]:
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"], ascii(text)
    assert other.get_vocab() == tokenizer.get_vocab()
    other.save_vocabulary(str(tmp_path), "again")
    assert (tmp_path / "again-ice_text.model").read_bytes() == (tmp_path / "ice_text.model").read_bytes()


# --- without shared/ ---


def test_blanks_and_lines(small: ChatGLM1Tokenizer) -> None:
    """Runs of blanks are cut from the longest piece on: 163 = 80 + 80 + 3."""
    pieces = small.tokenize("a" + " " * 163 + "b")
    assert [piece for piece in pieces if "blank" in piece] == ["<|blank_80|>"] * 2 + ["<|blank_3|>"]
    for text in ("a\n\tb", "a  b   c", "  a", "a" + " " * 81 + "b", "a" + " " * 161 + "b", "\n\n"):
        assert small.decode_ids(small.encode_text(text)) == text
    assert small.decode_ids(small.encode_text("x<|blank_81|>")) == "x<|blank_81|>"


def test_control_tokens_in_a_text(small: ChatGLM1Tokenizer) -> None:
    """A call reads five of them; `encode_text`, which chats use, reads none."""
    for token in ("<sop>", "<eop>", "[MASK]", "<pad>", "<unk>"):
        index = small.get_command(token)
        assert index in small.encode(f"one {token} two", add_special_tokens=False)
        assert small.encode(f"one {token} two") == small.encode(f"one{token}two")
        assert index not in small.encode_text(f"one {token} two")
    for token in ("[gMASK]", "[sMASK]", "</s>", "<ENC>"):
        assert small.get_command(token) not in small.encode(f"one {token} two", add_special_tokens=False)


def test_masks_and_positions(small: ChatGLM1Tokenizer) -> None:
    """[MASK] goes before [gMASK]; without <sop> all is context; what is given is kept."""
    sop, blank, gmask, pad = small.bos_token_id, small.mask_token_id, small.gmask_token_id, small.pad_token_id
    padded = small.pad({"input_ids": [[40, blank, 41, gmask, sop, 42], [40, 41]]}, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[40, blank, 41, gmask, sop, 42], [pad] * 4 + [40, 41]]
    assert padded["position_ids"][0].tolist() == [[0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]]
    assert padded["position_ids"][1].tolist() == [[0, 0, 0, 0, 0, 1], [0] * 6]
    seen = ~padded["attention_mask"]
    assert seen[0, 0].sum(1).tolist() == [4, 4, 4, 4, 5, 6]
    assert seen[1, 0].sum(1).tolist() == [0, 0, 0, 0, 2, 2]
    again = small.pad(dict(padded), padding="max_length", max_length=8)
    assert again["input_ids"].shape == (2, 8)
    assert torch.equal(again["position_ids"][:, :, 2:], padded["position_ids"])
    assert torch.equal(again["attention_mask"][:, :, 2:, 2:], padded["attention_mask"])
    assert again["attention_mask"][:, :, :2].all()
    assert again["attention_mask"][:, :, :, :2].all()


def test_what_a_call_returns(small: ChatGLM1Tokenizer) -> None:
    assert set(small("hello")) == {"input_ids"}
    cut = small("hello world how are you", truncation=True, max_length=4)  # as officially, with a mask of its own
    assert (set(cut), len(cut["input_ids"])) == ({"input_ids", "attention_mask", "position_ids"}, 4)
    assert cut["input_ids"][2:] == small.prefix_ids
    one = small("hello", padding=True, return_tensors="pt")
    length = one["input_ids"].shape[1]
    assert one["attention_mask"].shape == (1, 1, length, length)
    assert one["position_ids"].shape == (1, 2, length)
    assert "attention_mask" not in small(["a", "b c"], padding=True, return_attention_mask=False)
    assert small(["a"], pad_to_multiple_of=16, return_tensors="np")["input_ids"].shape == (1, 16)
    assert small("a", "b")["input_ids"][-1] == small.eos_token_id
    with pytest.raises(UsageError, match="1 texts and 2 second texts"):
        small(["a"], ["b", "c"])
    with pytest.raises(UsageError, match="no room"):
        small("hello", truncation=True, max_length=1)


def test_padding_on_either_side(small: ChatGLM1Tokenizer) -> None:
    left, right = (small(["你好", "hello world"], padding=True, padding_side=side) for side in ("left", "right"))
    pad = small.pad_token_id
    assert left["input_ids"][0][0] == pad
    assert right["input_ids"][0][-1] == pad
    count = left["input_ids"][0].count(pad)
    assert left["position_ids"][0][0][:count] == [0] * count
    assert all(left["attention_mask"][0][0][row] == [True] * len(left["input_ids"][0]) for row in range(count))


def test_save_and_load(small: ChatGLM1Tokenizer, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["num_image_tokens"]) == ("ChatGLMTokenizer", 0)
    again = ChatGLM1Tokenizer.from_pretrained(tmp_path)
    assert again.encode("你好 [MASK]") == small.encode("你好 [MASK]")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "position_encoding_2d": True}))
    for found in (
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(found) is ChatGLM1Tokenizer


def test_two_vocabularies(small: ChatGLM1Tokenizer, tmp_path: Path) -> None:
    """The older one is 20,000 higher; a folder whose parts disagree is refused by name."""
    small.save_vocabulary(str(tmp_path))
    older = ChatGLM1Tokenizer(tmp_path / "ice_text.model", num_image_tokens=20_000)
    assert older.encode("你好") == [index + 20_000 for index in small.encode("你好")]
    assert older.decode(older.encode("你好")) == "你好"
    assert older.convert_ids_to_tokens(7) == "<image_7>"
    assert older.vocab_size == small.vocab_size + 20_000
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": older.bos_token_id}))
    assert ChatGLM1Tokenizer.from_pretrained(tmp_path).num_image_tokens == 20_000
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": 0}))
    with pytest.raises(TokenizerError, match="different vocabularies: num_image_tokens is 0"):
        ChatGLM1Tokenizer.from_pretrained(tmp_path)


def test_a_model_with_other_ids_is_refused(small: ChatGLM1Tokenizer, tmp_path: Path) -> None:
    small.save_vocabulary(str(tmp_path))
    for values in (
        {"bos_token_id": 7},
        {"bos_token_id": small.bos_token_id, "eos_token_id": small.eos_token_id + 20_000},
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(TokenizerError, match="different vocabularies"):
            ChatGLM1Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="num_image_tokens=5"):
        ChatGLM1Tokenizer(small.vocab_file, num_image_tokens=5)
    with pytest.raises(TokenizerError, match="generation 1, not 2"):
        ChatGLM1Tokenizer(small.vocab_file, generation=2)


def _renamed(path: Path, piece: str) -> bytes:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    for one in model.pieces:
        if one.piece == piece:
            one.piece = "something else"
    return model.SerializeToString()


def test_files_of_other_kinds_are_refused(small: ChatGLM1Tokenizer, tmp_path: Path) -> None:
    whole = Path(small.vocab_file)
    for data, problem in (
        (whole.read_bytes()[:1000], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "truncated or no SentencePiece"),
        (_renamed(whole, "<pad>"), "<pad>"),
    ):
        (tmp_path / "ice_text.model").write_bytes(data)
        with pytest.raises(TokenizerError, match=problem):
            ChatGLM1Tokenizer(tmp_path / "ice_text.model")
    with pytest.raises(TokenizerError, match="is missing"):
        ChatGLM1Tokenizer(tmp_path / "other.model")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        small.encode("\ud800")
    with pytest.raises(UsageError, match="return_offsets_mapping"):
        small("x", return_offsets_mapping=True)
    with pytest.raises(TokenizerError, match="do_lower_case"):
        ChatGLM1Tokenizer(whole, do_lower_case=True)
