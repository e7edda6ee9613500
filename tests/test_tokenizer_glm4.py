"""GLM-4's tokenizer against the official class, tiktoken and a plain restatement of its merging."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from glmkit.errors import TokenizerError, UsageError
from glmkit.tokenizers.glm4 import CONTROL_TOKENS, ChatGLM4Tokenizer, read_ranks
from test_tokenizer import CORPUS, random_texts

Official = tuple[ChatGLM4Tokenizer, dict[str, Any]]


@pytest.fixture(scope="module")
def official(shared: Path) -> Official:
    stored = json.loads((shared / "conformance" / "tokenizer_glm" / "glm4.json").read_text(encoding="utf-8"))
    return ChatGLM4Tokenizer.from_pretrained(shared / "tokenizers" / "glm4"), stored


def merge(sequences: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """The rule itself: the adjacent pair of lowest joined rank, the leftmost first."""
    while True:
        pairs = [left + right for left, right in pairwise(sequences)]
        best = min(((ranks[pair], place) for place, pair in enumerate(pairs) if pair in ranks), default=None)
        if best is None:
            return sequences
        place = best[1]
        sequences = [*sequences[:place], pairs[place], *sequences[place + 2 :]]


def write_ranks(path: Path, count: int = 400) -> Path:
    """A small file of ranks, made the way such files are: the most frequent adjacent pair joins."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in f" {word}".encode()] for text in CORPUS[:8] for word in text.split()]
    while len(ranks) < count:
        found: dict[bytes, int] = {}
        for word in words:
            for left, right in pairwise(word):
                found[left + right] = found.get(left + right, 0) + 1
        chosen = max(found, key=lambda pair: (found[pair], pair))
        ranks.setdefault(chosen, len(ranks))
        words = [merge([*word], {chosen: 0}) for word in words]
    path.write_bytes(b"".join(base64.b64encode(one) + b" %d\n" % rank for one, rank in ranks.items()))
    return path


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ranks(tmp_path_factory.mktemp("ranks") / "tokenizer.model")


@pytest.fixture
def small(small_file: Path) -> ChatGLM4Tokenizer:
    return ChatGLM4Tokenizer(small_file)


# --- the stored results of the official class ---


def test_strings(official: Official) -> None:
    tokenizer, stored = official
    for case in stored["strings"]:
        text = case["text"]
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"], text
        assert tokenizer(text)["input_ids"] == case["ids_with_prefix"], text
        assert tokenizer.encode_text(text) == case["ids_no_special_parsing"], text
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"], text
        assert tokenizer.decode(case["ids"]) == text  # the official class puts blanks around control tokens
        assert tokenizer.decode_ids(case["ids_with_prefix"]) == "[gMASK]<sop>" + text


def test_names_and_sizes(official: Official) -> None:
    tokenizer, stored = official
    assert (tokenizer.vocab_size, len(tokenizer)) == (stored["vocab_size"], stored["len"])
    assert [tokenizer.get_command(name) for name in CONTROL_TOKENS] == list(range(151_329, 151_343))
    assert tokenizer.stop_ids == {151_329, 151_336, 151_338}
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 151_329
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "Hello", "Ġworld"]) == [151_336, 9_703, 1_879]
    assert tokenizer.decode([151_343, 151_551]) == ""


def test_messages(official: Official) -> None:
    tokenizer, stored = official
    for case in stored["chats"]:
        if any("tools" in message for message in case["messages"]):
            continue
        ids, text = tokenizer.prefix_ids, "[gMASK]<sop>"
        for message in case["messages"]:
            arguments = message["role"], message.get("metadata", ""), message["content"]
            ids += tokenizer.build_single_message(*arguments)
            text += tokenizer.build_single_message(*arguments, tokenize=False)
        assert [*ids, tokenizer.get_command("<|assistant|>")] == case["ids"]
        assert text + "<|assistant|>" == case["text_add_generation_prompt"]


def test_batches(official: Official) -> None:
    tokenizer, stored = official
    case = stored["padded_batch"]
    expected = {name: case[name] for name in ("input_ids", "attention_mask", "position_ids")}
    assert dict(tokenizer(case["texts"], padding=True)) == expected
    assert dict(tokenizer.pad([tokenizer(text) for text in case["texts"]])) == expected
    arrays = tokenizer(case["texts"], padding=True, return_tensors="pt")
    assert {name: values.tolist() for name, values in arrays.items()} == expected


# --- against tiktoken ---


@pytest.fixture(scope="module")
def oracle(official: Official) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    _, sequences = read_ranks(Path(official[0].vocab_file))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = {sequence: rank for rank, sequence in enumerate(sequences)}
    return tiktoken.Encoding("glm4", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def test_random_texts_equal_tiktoken(official: Official, oracle: Any) -> None:
    tokenizer = official[0]
    for text in random_texts(5_000, seed=21):
        ids = oracle.encode_ordinary(text)
        assert tokenizer.encode_text(text) == ids, ascii(text)
        assert tokenizer.decode(ids) == text


def test_runs_and_joined_tokens_equal_tiktoken(official: Official, oracle: Any) -> None:
    """What merging gets wrong first: runs of one character, and tokens with a character taken out."""
    tokenizer = official[0]
    rng = random.Random(5)
    parts = ["a", "b", "aa", "ab", " ", "  ", "-", "=", "0", "\n", "哈", "的", "er", "in", "th", "e"]
    tokens = [text for index in range(256, 151_329, 7) if "\ufffd" not in (text := tokenizer.decode([index]))]
    for _ in range(10_000):
        run = "".join(rng.choice(parts) * rng.randint(1, 6) for _ in range(rng.randint(1, 12)))
        joined = "".join(rng.choices(tokens, k=rng.randint(1, 4)))
        cut = rng.randrange(len(joined))
        for text in (run, joined[:cut] + joined[cut + 1 :]):
            assert tokenizer.encode_text(text) == oracle.encode_ordinary(text), ascii(text)


@pytest.mark.slow
def test_every_character_equals_tiktoken(official: Official, oracle: Any) -> None:
    tokenizer = official[0]
    for code in [*range(0xD800), *range(0xE000, 0x110000)]:
        text = f"a{chr(code)}b 1{chr(code)} {chr(code) * 2}'{chr(code)}"
        assert tokenizer.encode_text(text) == oracle.encode_ordinary(text), hex(code)


def test_real_texts_equal_tiktoken_and_come_back(official: Official, oracle: Any, shared: Path) -> None:
    tokenizer = official[0]
    lines = (shared / "data" / "adgen" / "dev.json").read_text(encoding="utf-8").splitlines()
    lines += (shared / "data" / "ceval" / "val" / "STEM" / "college_physics.jsonl").read_text("utf-8").splitlines()
    for line in lines:
        for text in (text for text in json.loads(line).values() if isinstance(text, str)):
            ids = tokenizer.encode_text(text)
            assert ids == oracle.encode_ordinary(text)
            assert tokenizer.decode(ids) == text


# --- anywhere ---


def test_small_texts_equal_the_rule(small: ChatGLM4Tokenizer, small_file: Path) -> None:
    ranks = {sequence: rank for rank, sequence in enumerate(read_ranks(small_file)[1])}
    for word in [*("".join(random_texts(400, seed=3))).split(), *" ".join(CORPUS[:8]).split()]:
        if word.isalpha():  # one word of the pattern, with the blank in front
            text = f" {word}"
            expected = merge([bytes([byte]) for byte in text.encode()], ranks)
            assert small.encode_text(text) == [ranks[sequence] for sequence in expected], ascii(text)
    for text in random_texts(500, seed=4):
        assert small.decode(small.encode_text(text)) == text


def test_users_text_never_becomes_a_control_token(small: ChatGLM4Tokenizer) -> None:
    text = "".join(CONTROL_TOKENS) + "<|user|>\n hi"
    control = set(small.special_tokens.values())
    for ids in (
        small.encode_text(text),
        small.build_single_message("user", text, text)[1:],
        small.build_single_message("observation", "", text)[1:],
    ):
        assert not control & set(ids)
    assert control <= set(small(text)["input_ids"])  # a call reads them, as the official class does
    assert small(text)["input_ids"][:2] == small.prefix_ids == small.get_prefix_tokens()
    assert small.build_single_message("user", "", "x")[0] == small.get_command("<|user|>")
    assert small.build_single_message("user", "", "\nx") == [small.get_command("<|user|>"), 10, 10, ord("x")]
    with pytest.raises(UsageError, match="no role 'tool'"):
        small.build_single_message("tool", "", "x")
    with pytest.raises(TokenizerError, match="no control token of generation 4"):
        small.get_command("sop")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        small("\ud83d")


def test_parts_of_characters(small: ChatGLM4Tokenizer) -> None:
    ids = list("👋".encode())
    assert [small.decode(ids[:count]) for count in range(1, 5)] == ["\ufffd", "\ufffd", "\ufffd", "👋"]
    assert small.batch_decode([ids, [small.eos_token_id]], skip_special_tokens=True) == ["👋", ""]
    tokens = small.tokenize("你好 world")
    assert small.convert_tokens_to_string(tokens) == "你好 world"


def test_pairs_padding_and_truncation(small: ChatGLM4Tokenizer) -> None:
    one, two = small.encode_text("one"), small.encode_text("two")
    assert small("one", "two")["input_ids"] == [*small.prefix_ids, *one, *two, small.eos_token_id]
    assert small.build_inputs_with_special_tokens(one, two) == small("one", "two")["input_ids"]
    cut = small("one two three four five", truncation=True, max_length=4)
    assert cut["input_ids"][:2] == small.prefix_ids
    assert len(cut["input_ids"]) == 4
    assert len(small("one two three four five")["input_ids"]) > 4
    batch = small(["one", "one two three"], padding=True, return_tensors="pt")
    missing = int((batch["attention_mask"][0] == 0).sum())
    assert missing > 0
    assert batch["position_ids"][0, : missing + 2].tolist() == [0] * missing + [0, 1]
    assert torch.equal(batch["input_ids"][0, :missing], torch.full((missing,), small.pad_token_id))


def test_save_and_load(small: ChatGLM4Tokenizer, small_file: Path, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == small_file.read_bytes()
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (saved["tokenizer_class"], saved["generation"]) == ("ChatGLM4Tokenizer", 4)
    assert saved["added_tokens_decoder"][str(small.eos_token_id)]["content"] == "<|endoftext|>"
    texts = ["[gMASK] <sop> hi<|user|>", "你好  x"]
    for twin in (
        ChatGLM4Tokenizer.from_pretrained(tmp_path / "out"),
        ChatGLM4Tokenizer.from_pretrained(small_file, padding_side="left"),
        pickle.loads(pickle.dumps(small)),
        copy.deepcopy(small),
    ):
        assert dict(twin(texts)) == dict(small(texts))
        assert twin.stop_ids == small.stop_ids
    with pytest.raises(TokenizerError, match="generation 4, not 3"):
        ChatGLM4Tokenizer(small_file, generation=3)


def test_wrong_files_are_refused(small_file: Path, tmp_path: Path) -> None:
    lines = small_file.read_bytes().splitlines(keepends=True)
    path = tmp_path / "tokenizer.model"

    def refuse(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=message):
            ChatGLM4Tokenizer(path)

    with pytest.raises(TokenizerError, match="is missing"):
        ChatGLM4Tokenizer(path)
    refuse(b"", "no file of ranks: line 1")
    refuse(b"version https://git-lfs.github.com/spec/v1\n", "no file of ranks: line 1")
    refuse(b"".join(lines)[:-3], "no file of ranks|ranks other than")
    refuse(b"".join([*lines[:300], b"not/base64!! 300\n"]), "line 301")
    refuse(b"".join([*lines, b" 400\n"]), "line 401")
    refuse(b"".join([*lines, lines[7]]), "occurs twice")
    refuse(b"".join([*lines[:300], *lines[301:]]), "ranks other than 0 to 398")
    refuse(b"".join([*lines, b"QUJD -1\n"]), "line 401|ranks other than")
    refuse(b"".join([*lines, b"QUJD 99999999999999999999\n"]), "line 401")
    refuse(b"".join([*lines, base64.b64encode(b"x" * 2_000) + b" 400\n"]), "too long")
    few = [line for line in lines[:300] if line != lines[65]]
    refuse(b"".join(line.split(b" ")[0] + b" %d\n" % rank for rank, line in enumerate(few)), "lacks 1 of the 256")
    shutil.copy(small_file, path)
    ChatGLM4Tokenizer(path)
