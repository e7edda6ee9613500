"""The tokenizer of ChatGLM2, ChatGLM3 and glm-nano: ids, text, padding, loading, and what must never happen.

Two vocabularies: a small one trained here with SentencePiece, so that the suite means something on any machine, and the
official one from ../shared where it is there, with the stored results of the official Python class.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

import tiny
from glmkit.errors import OutputError, TokenizerError, UsageError
from glmkit.hf import AutoTokenizer
from glmkit.tokenizers import ChatGLMTokenizer, register

CORPUS = [
    "你好，世界。清华大学位于北京市海淀区，创建于 1911 年。",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "def add(a, b):    return a + b  # 加法",
    "类型#裤*版型#宽松*风格#性感*图案#线条*裤型#阔腿裤",
    "sopping wet; the system has a user, an assistant and an observation <|user|> [MASK] </s>",
    "aaaa bbbb abab baba ----- ===== ......   two   blanks     five",
    "晚上睡不着怎么办？可以听音乐，也可以读书。",
    "The year is 2023, the price is 19.99 and the sum of 1+1 is 2.",
] * 40


def train(path: Path, **arguments: object) -> Path:
    """Trains a small SentencePiece BPE file with the properties of the official one."""
    options = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=writer, **(options | arguments)
        )
    return path


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("small") / "tokenizer.model")


@pytest.fixture(params=[2, 3], ids=["generation2", "generation3"])
def small(request: pytest.FixtureRequest, small_file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(small_file, generation=request.param)


@pytest.fixture(scope="session")
def official(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[ChatGLMTokenizer, dict]]:
    """Generation -> (tokenizer loaded from an official folder, stored results)."""
    found = {}
    for generation in (2, 3):
        folder = tmp_path_factory.mktemp(f"chatglm{generation}")
        shutil.copy(shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model", folder / "tokenizer.model")
        for name in ("tokenizer_config.json", "config.json"):
            shutil.copy(shared / "conformance" / f"chatglm{generation}" / "model" / name, folder)
        fixtures = shared / "conformance" / "tokenizer_chatglm" / f"chatglm{generation}" / "fixtures.json"
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
        found[generation] = (tokenizer, json.loads(fixtures.read_text(encoding="utf-8")))
    return found


def random_texts(count: int, seed: int) -> list[str]:
    """Texts that tokenizers get wrong: blanks, control characters, emoji, bytes, `▁`, control tokens as text."""
    rng = random.Random(seed)
    literal = [
        "[gMASK]",
        "[MASK]",
        "sop",
        "eop",
        "<|user|>",
        "<|assistant|>",
        "<0x0A>",
        "<0xFF>",
        "</s>",
        "<s>",
        "<unk>",
    ]
    words = ["清华大学", "你好", "世界", "the", "Brown", "def", "return", "http://a.b/c?d=e", "3.14159", "ChatGLM3-6B"]
    ranges = [
        (0x4E00, 0x9FFF), (0x20, 0x7E), (0x00, 0x1F), (0x1F300, 0x1FAFF), (0x80, 0x24F), (0x600, 0x6FF),
        (0xAC00, 0xD7A3), (0x3040, 0x30FF), (0x20000, 0x2A6DF), (0x2000, 0x206F), (0xFF00, 0xFFEF), (0xE000, 0xE0FF),
        (0x10FFF0, 0x10FFFF),
    ]  # fmt: skip
    odd = [
        "\0",
        "\u200b",
        "\u200d",
        "\ufeff",
        "▁",
        "\u3000",
        "\xa0",
        "\r\n",
        "\t",
        "\n",
        "\ufffd",
        "\u2028",
        "👨‍👩‍👧",
        "e\u0301",
    ]

    def part() -> str:
        kind = rng.randrange(8)
        if kind == 0:
            return " " * rng.choice([1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
        if kind == 1:
            return rng.choice(odd) * rng.randint(1, 3)
        if kind == 2:
            return rng.choice(literal)
        if kind == 3:
            return rng.choice(words) + rng.choice(["", " "])
        if kind == 4:
            return rng.choice(["a", "b", "ab", "aba", "=", "-", "*", "0", "哈", "\n", "\t", " \n", "▁ "]) * rng.randint(
                1, 40
            )
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))

    return ["".join(part() for _ in range(rng.randint(0, 10))) for _ in range(count)]


def assert_equals_sentencepiece(tokenizer: ChatGLMTokenizer, path: Path, texts: list[str]) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in texts:
        ids = reference.encode(text)
        assert tokenizer.encode_text(text) == ids, ascii(text)
        assert tokenizer.decode(ids) == reference.decode(ids), ascii(text)


def test_random_texts_small(small: ChatGLMTokenizer, small_file: Path) -> None:
    texts = random_texts(1000, seed=1)
    assert_equals_sentencepiece(small, small_file, texts)
    assert [small.decode(small.encode_text(text)) for text in texts] == [text.replace("▁", " ") for text in texts]


def test_random_texts_official(official: dict, shared: Path) -> None:
    path = shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model"
    assert_equals_sentencepiece(official[3][0], path, random_texts(2000, seed=2))


def test_broken_bytes_decode_like_sentencepiece(small: ChatGLMTokenizer, small_file: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(small_file))
    rng = random.Random(3)
    for _ in range(1000):
        ids = [
            rng.randrange(3, 259) if rng.random() < 0.7 else rng.randrange(259, 600) for _ in range(rng.randint(1, 12))
        ]
        assert small.decode(ids) == reference.decode(ids), ids


# --- the stored results of the official class ---


@pytest.mark.parametrize("generation", [2, 3])
def test_official_strings(official: dict, generation: int) -> None:
    tokenizer, stored = official[generation]
    parsing = ChatGLMTokenizer(tokenizer.vocab_file, encode_special_tokens=True, generation=generation)
    for case in stored["strings"]:
        text = case["text"]
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"], text
        assert tokenizer.encode_text(text) == parsing.encode_text(text) == case["ids"], text
        assert tokenizer(text)["input_ids"] == case["ids_with_special"], text
        assert tokenizer.decode(case["ids"]) == case["decode_ids"], text
        assert tokenizer.decode(case["ids_with_special"]) == case["decode_ids_with_special"], text
        skipped = tokenizer.decode(case["ids_with_special"], skip_special_tokens=True)
        assert skipped == case["decode_ids_with_special_skip"], text
        if "pieces" in case:
            assert tokenizer.tokenize(text) == tokenizer.tokenizer.tokenize(text) == case["pieces"], text
        if generation == 3:
            assert parsing.encode(text, add_special_tokens=False) == case["ids_encode_special_tokens_true"], text


@pytest.mark.parametrize("generation", [2, 3])
def test_official_pairs_truncation_batches(official: dict, generation: int) -> None:
    tokenizer, stored = official[generation]
    for case in stored["pairs"]:
        assert tokenizer(case["a"], case["b"])["input_ids"] == case["ids"]
        plain = [tokenizer.encode_text(case["a"]), tokenizer.encode_text(case["b"])]
        assert tokenizer.build_inputs_with_special_tokens(*plain) == case["ids"]
    for case in stored["truncation"]:
        assert tokenizer.encode(case["text"], truncation=True, max_length=case["max_length"]) == case["ids"]
    for case in stored["batches"]:
        assert dict(tokenizer(case["texts"])) == case["padding_false"]
        assert dict(tokenizer(case["texts"], padding=True)) == case["padding_true"]
        assert dict(tokenizer(case["texts"], padding="max_length", max_length=16)) == case["max_length_16"]
        assert dict(tokenizer.pad([tokenizer(text) for text in case["texts"]])) == case["padding_true"]
        arrays = tokenizer.pad(tokenizer(case["texts"]), return_tensors="pt")
        assert {key: value.tolist() for key, value in arrays.items()} == case["padding_true"]


@pytest.mark.parametrize("generation", [2, 3])
def test_official_vocabulary_and_decoding(official: dict, generation: int) -> None:
    tokenizer, stored = official[generation]
    for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id", "model_input_names", "padding_side"):
        assert getattr(tokenizer, name) == stored[name], name
    assert tokenizer.all_special_tokens == stored["all_special_tokens"] == []
    assert len(tokenizer) == tokenizer.tokenizer.n_words == stored["vocab_size"]
    for name, index in stored["special"].items():
        assert tokenizer.convert_tokens_to_ids(name) == index, name
    for kind, give in (("ids_to_tokens_sample", tokenizer.convert_ids_to_tokens), ("decode_odd_ids", tokenizer.decode)):
        for key, expected in stored[kind].items():
            ids = json.loads(key)
            if isinstance(expected, dict):
                assert expected["raises"] == "IndexError"
                with pytest.raises(IndexError):
                    give(ids)
            else:
                assert give(ids) == expected, (kind, ids)
    for case in stored["partial_decode"]:
        ids = case["ids"]
        assert [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)] == case["decode_prefix"]
        assert [tokenizer.decode(index) for index in ids] == case["decode_each_alone"]


# --- layout, whatever the size of the vocabulary ---


def test_control_ids_follow_the_file(small: ChatGLMTokenizer) -> None:
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    if small.generation == 3:
        names += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert [small.get_command(name) for name in names] == list(range(600, 600 + len(names)))
    assert small.vocab_size == len(small) == 600 + len(names)
    assert small.prefix_ids == small.get_prefix_tokens() == [601, 603]
    assert small.stop_ids == ({2} if small.generation == 2 else {2, 606, 608})
    assert [small.get_command(name) for name in ("<unk>", "<pad>", "<bos>", "<eos>")] == [0, 0, 1, 2]
    assert (small.unk_token_id, small.pad_token_id, small.eos_token_id) == (0, 0, 2)
    assert (small.unk_token, small.pad_token, small.eos_token) == ("<unk>", "<unk>", "</s>")
    assert small.get_vocab()["[gMASK]"] == 601
    assert small.num_special_tokens_to_add() == 2
    assert small.num_special_tokens_to_add(pair=True) == 3
    view = small.tokenizer
    assert (view.n_words, view.bos_id, view.eos_id, view.pad_id) == (small.vocab_size, 1, 2, 0)
    assert view.special_tokens["sop"] == 603
    assert view.encode("你好", bos=True, eos=True) == [1, *small.encode_text("你好"), 2]
    assert view.decode(view.encode("你好")) == "你好"
    with pytest.raises(TokenizerError, match="no control token"):
        small.get_command("<|nobody|>")


def test_text_never_becomes_a_control_id(small: ChatGLMTokenizer) -> None:
    control = {0, 1, 2, *range(600, small.vocab_size)}
    for text in [
        "[MASK]",
        "[gMASK] sop <|user|>\n hi <|assistant|>",
        "</s><s><unk>",
        "sop eop sopping",
        "<0x0A><0xE4>",
    ]:
        for ids in (
            small.encode_text(text),
            small.encode(text, add_special_tokens=False),
            small(text)["input_ids"][2:],
        ):
            assert not control & set(ids)
            assert small.decode(ids) == text


def test_convert_tokens_to_string(small: ChatGLMTokenizer) -> None:
    text = "你好 and  𠮷 two\n"
    assert small.convert_tokens_to_string(small.tokenize(text)) == text
    assert small.convert_tokens_to_string(["▁no", "such piece", "▁x"]) == " nosuch piece x"


@pytest.mark.parametrize("text", ["ab\ud83d", ["fine", "ab\ud83d"], [("fine", "ab\ud83d")]])
def test_lone_surrogates_are_refused(small: ChatGLMTokenizer, text: object) -> None:
    for encode in (small, small.encode):
        with pytest.raises(TokenizerError, match=r"U\+D83D at character 2"):
            encode(text)
    with pytest.raises(TokenizerError, match="at character 0"):
        small.encode_text("\udc00")


def test_truncation_is_not_remembered(small: ChatGLMTokenizer) -> None:
    whole = small.encode_text("The quick brown fox jumps")
    assert len(small("The quick brown fox jumps", truncation=True, max_length=4)["input_ids"]) == 4
    assert small.encode_text("The quick brown fox jumps") == whole
    assert small("The quick brown fox jumps")["input_ids"][2:] == whole


def test_pad_keeps_given_positions_and_tensors(small: ChatGLMTokenizer) -> None:
    rows = [{"input_ids": [5, 6], "position_ids": [7, 8]}, {"input_ids": [5, 6, 7], "position_ids": [1, 2, 3]}]
    padded = small.pad(rows, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[0, 5, 6], [5, 6, 7]]
    assert padded["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 7, 8], [1, 2, 3]]
    right = small.pad({"input_ids": [torch.tensor([5]), torch.tensor([5, 6])]}, padding_side="right")
    assert right["position_ids"].tolist() == [[0, 0], [0, 1]]
    assert right["attention_mask"].tolist() == [[1, 0], [1, 1]]
    one = small("你好", return_tensors="pt")
    assert one["position_ids"].tolist() == [list(range(one["input_ids"].shape[1]))]
    assert "attention_mask" not in small("你好", return_attention_mask=False)


# --- loading and saving ---


def test_save_and_reload(small: ChatGLMTokenizer, small_file: Path, tmp_path: Path) -> None:
    texts = random_texts(200, seed=4)
    expected = [small(text)["input_ids"] for text in texts]
    saved = small.save_pretrained(tmp_path / "out")
    assert sorted(Path(name).name for name in saved) == ["tokenizer.model", "tokenizer_config.json"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == small_file.read_bytes()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "ChatGLMTokenizer"
    assert config["generation"] == small.generation
    assert "auto_map" not in config
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "out")
    assert again.generation == small.generation
    assert [again(text)["input_ids"] for text in texts] == expected
    for twin in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert [twin(text)["input_ids"] for text in texts] == expected
        assert twin.decode(expected[0]) == small.decode(expected[0])
    with pytest.raises(UsageError, match="is a file"):
        small.save_pretrained(tmp_path / "out" / "tokenizer.model")


def make_folder(folder: Path, file: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(file, folder / "tokenizer.model")
    for name, content in files.items():
        stem, kind = name.rsplit("_", 1)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{kind}").write_text(text, encoding="utf-8")
    return folder


CODE_2 = "class ChatGLMTokenizer:\n    pass\n"
CODE_3 = CODE_2 + "    # <|system|>\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config_json": {"name_or_path": "THUDM/chatglm2-6b"}}, 2),
        ({"config_json": {"_name_or_path": "/models/ChatGLM3-6b-32k"}}, 3),
        ({"config_json": {"_name_or_path": "THUDM/chatglm2-6b-32k"}}, 2),
        ({"config_json": {"_name_or_path": "glm3_6b"}}, 3),
        ({"tokenization_chatglm_py": CODE_2}, 2),
        ({"tokenization_chatglm_py": CODE_3}, 3),
        ({"tokenizer_config_json": {"additional_special_tokens": ["<|user|>", "<|observation|>"]}}, 3),
        ({"tokenizer_config_json": {"name_or_path": "output/run1"}, "tokenization_chatglm_py": CODE_3}, 3),
        ({"tokenizer_config_json": {"generation": 2, "name_or_path": "THUDM/chatglm3-6b"}}, 2),
    ],
)
def test_generation_from_signs(small_file: Path, tmp_path: Path, files: dict, expected: int) -> None:
    folder = make_folder(tmp_path / "any", small_file, **files)
    assert ChatGLMTokenizer.from_pretrained(folder).generation == expected
    other = 5 - expected
    assert ChatGLMTokenizer.from_pretrained(folder, generation=other).generation == other


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no sign"),
        ({"config_json": "[broken"}, "no sign"),
        ({"config_json": {"_name_or_path": "my/chatglm2-and-chatglm3"}}, "no sign"),
        (
            {"tokenizer_config_json": {"name_or_path": "chatglm2-6b"}, "config_json": {"_name_or_path": "chatglm3-6b"}},
            "signs disagree",
        ),
        (
            {"tokenizer_config_json": {"name_or_path": "chatglm2-6b"}, "tokenization_chatglm_py": CODE_3},
            "signs disagree",
        ),
        ({"tokenizer_config_json": {"generation": 4}}, "no generation 4"),
    ],
)
def test_generation_is_never_guessed(small_file: Path, tmp_path: Path, files: dict, message: str) -> None:
    folder = make_folder(tmp_path / "chatglm3-6b", small_file, **files)  # a folder's own name is no sign
    with pytest.raises(TokenizerError, match=message) as caught:
        ChatGLMTokenizer.from_pretrained(folder)
    assert "generation=" in str(caught.value)


def test_configured_special_tokens_are_ignored(small_file: Path, tmp_path: Path) -> None:
    """Later revisions of the official configuration register role tokens, which would let text become control ids."""
    token = {"content": "<|user|>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    config = {
        "tokenizer_class": "ChatGLMTokenizer",
        "added_tokens_decoder": {"606": token},
        "additional_special_tokens": ["<|user|>"],
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "chat_template": "{{ messages }}",
    }
    tokenizer = ChatGLMTokenizer.from_pretrained(make_folder(tmp_path / "x", small_file, tokenizer_config_json=config))
    assert tokenizer.all_special_tokens == []
    assert 606 not in tokenizer("<|user|></s>")["input_ids"]
    assert 2 not in tokenizer("<|user|></s>")["input_ids"]


def test_encode_special_tokens_splits_at_roles_only(small_file: Path) -> None:
    tokenizer = ChatGLMTokenizer(small_file, encode_special_tokens=True, generation=3)
    ids = tokenizer.encode("<|user|>you<|assistant|>sop[MASK]", add_special_tokens=False)
    assert ids == [606, *tokenizer.encode_text("you"), 607, *tokenizer.encode_text("sop[MASK]")]
    assert not {606, 607} & set(tokenizer.encode_text("<|user|><|assistant|>"))


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("generation", [2, 3])
def test_auto_tokenizer_runs_no_code_of_the_folder(
    small_file: Path, tmp_path: Path, trust: bool | None, generation: int
) -> None:
    register()
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\n" + (CODE_3 if generation == 3 else CODE_2)
    config = {
        "name_or_path": f"THUDM/chatglm{generation}-6b",
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    folder = make_folder(tmp_path / "x", small_file, tokenizer_config_json=config, tokenization_chatglm_py=code)
    model = tiny.sizes(ChatGLMTokenizer(small_file, generation=generation))
    model |= {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    (folder / "configuration_chatglm.py").write_text(code, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert type(tokenizer) is ChatGLMTokenizer
    assert tokenizer.generation == generation
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=trust)) is ChatGLMTokenizer
    assert not canary.exists()


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("described", [{}, {"tokenizer_class": "Evil"}, None], ids=["auto_map only", "foreign", "none"])
def test_auto_tokenizer_takes_ours_for_every_chatglm_folder(
    small_file: Path, tmp_path: Path, trust: bool | None, described: dict | None
) -> None:
    register()
    register()
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\n{CODE_3}\nclass Evil(ChatGLMTokenizer): pass\n"
    folder = make_folder(tmp_path / "x", small_file, tokenization_chatglm_py=code)
    if described is not None:
        name = described.get("tokenizer_class", "ChatGLMTokenizer")
        described = described | {"auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{name}", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    model = tiny.sizes(ChatGLMTokenizer(small_file, generation=3)) | {"model_type": "chatglm"}
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, use_fast=False)) is ChatGLMTokenizer
    assert not canary.exists()


def test_auto_tokenizer_still_searches_for_others(tmp_path: Path) -> None:
    register()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nhello\n")
    assert "Bert" in type(AutoTokenizer.from_pretrained(tmp_path)).__name__


def test_hostile_folders_are_refused(small_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    (tmp_path / "tokenizer.model").write_bytes(small_file.read_bytes())
    for content, message in (("[" * 200_000, "no JSON"), (" " * 2_000_000, "bytes, at most"), ("[]", "JSON list")):
        config.write_text(content)
        with pytest.raises(TokenizerError, match=message):
            ChatGLMTokenizer.from_pretrained(tmp_path, generation=3)
        config.unlink()
    (tmp_path / "config.json").write_text("[" * 200_000)
    ChatGLMTokenizer.from_pretrained(tmp_path, generation=3)
    outside = tmp_path.with_name(tmp_path.name + "-outside")
    outside.mkdir()
    (outside / "tokenizer_config.json").write_text("{}")
    config.symlink_to(outside / "tokenizer_config.json")
    with pytest.raises(TokenizerError, match="link out of the folder"):
        ChatGLMTokenizer.from_pretrained(tmp_path, generation=3)
    config.unlink()
    (tmp_path / "tokenizer.model").rename(outside / "tokenizer.model")
    (tmp_path / "tokenizer.model").symlink_to(outside / "tokenizer.model")
    with pytest.raises(TokenizerError, match="link out of its folder"):
        ChatGLMTokenizer.from_pretrained(tmp_path, generation=3)
    # The cache of the hub keeps every file as a link to a blob.
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (outside / "tokenizer.model").rename(tmp_path / "blobs" / "abc")
    (snapshot / "tokenizer.model").symlink_to("../../blobs/abc")
    ChatGLMTokenizer.from_pretrained(snapshot, generation=3)


def test_the_view_converts_like_sentencepiece(small_file: Path) -> None:
    for generation in (2, 3):
        tokenizer = ChatGLMTokenizer(small_file, generation=generation)
        view = tokenizer.tokenizer
        pieces = view.tokenize("hello 你好")
        assert [view.convert_token_to_id(piece) for piece in pieces] == view.encode("hello 你好")
        assert [view.convert_id_to_token(index) for index in view.encode("hello 你好")] == pieces
        assert view.decode_tokens(pieces) == "hello 你好"
        assert view.convert_token_to_id("sop") == tokenizer.get_command("sop")
        assert view.convert_id_to_token(2) == ""
        assert view.sp_model.EncodeAsIds("hello") == tokenizer.encode_text("hello")
        assert view.sp_model is view.sp_model


def test_saving_over_its_own_folder_leaves_nothing_beside(small_file: Path, tmp_path: Path) -> None:
    ChatGLMTokenizer(small_file, generation=3).save_pretrained(tmp_path)
    ChatGLMTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    (tmp_path / "full" / "tokenizer.model").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot write"):
        ChatGLMTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("padding_side", "x", "padding_side='x': expected 'left' or 'right'"),
        ("padding_side", ["left"], "padding_side="),
        ("model_max_length", "x", "model_max_length='x': expected a whole number from 1, or null"),
        ("model_max_length", [5], "model_max_length="),
        ("model_max_length", 0, "model_max_length=0"),
        ("model_max_length", 2.5, r"model_max_length=2\.5"),
        ("model_max_length", True, "model_max_length=True"),
        ("model_max_length", float("inf"), "model_max_length=inf"),
        ("model_max_length", 1e30, None),
        ("model_max_length", None, None),
        ("model_max_length", 128, None),
    ],
)
def test_fields_of_the_folder_are_checked(
    small_file: Path, tmp_path: Path, field: str, value: object, message: str | None
) -> None:
    ChatGLMTokenizer(small_file, generation=3).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described | {field: value}))
    if message is None:
        found = ChatGLMTokenizer.from_pretrained(tmp_path).model_max_length
        assert (found, type(found)) == (int(value or 1e30), int)
        return
    with pytest.raises(TokenizerError, match=message):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_wrong_files_are_refused(small_file: Path, tmp_path: Path) -> None:
    data = small_file.read_bytes()

    def refuse(content: bytes | None, message: str) -> None:
        path = tmp_path / "tokenizer.model"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TokenizerError, match=message):
            ChatGLMTokenizer.from_pretrained(tmp_path, generation=3)

    refuse(None, "missing")
    refuse(b"", "truncated or no SentencePiece")
    refuse(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "truncated or no SentencePiece")
    for end in (1, 10, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 1):
        refuse(data[:end], "truncated or no SentencePiece")
    refuse(train(tmp_path / "u", model_type="unigram", vocab_size=390).read_bytes(), "UNIGRAM, expected BPE")
    refuse(train(tmp_path / "n", normalization_rule_name="nmt_nfkc").read_bytes(), "expected the identity")
    refuse(train(tmp_path / "d", user_defined_symbols=["<x>"]).read_bytes(), "ids 0 to 258")
    refuse(train(tmp_path / "b", byte_fallback=False, vocab_size=300).read_bytes(), "ids 0 to 258")
    (tmp_path / "ice_text.model").write_bytes(b"x")
    refuse(None, "ice_text.model of ChatGLM-6B")
    with pytest.raises(TokenizerError, match="could not be fetched"):
        ChatGLMTokenizer.from_pretrained("nobody/there", local_files_only=True)
