"""Small tokenizers of GLM for the tests: the four kinds on vocabularies written here, and one whose words are ids."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import pre_tokenizers

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("Ġwo", "r"), ("l", "d")]
LINES = [
    "你好，世界。清华大学位于北京市海淀区，创建于 1911 年。",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "晚上睡不着怎么办？可以听音乐，也可以读书。<n>",
    "标题：足球 关键词：比赛 类别：体育 是 不是",
] * 30
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world ing ##ing play ##s . , ! ? a b ασ ας 中 文 < > |".split()


def byte_files(folder: Path, roberta: bool = False) -> Path:
    """vocab.json and merges.txt of GPT-2's or RoBERTa's form."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [left + right for left, right in MERGES]
    tokens = [*letters, *joined, "<|endoftext|>"]
    if roberta:
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *joined, "<mask>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def bert_files(folder: Path) -> Path:
    """vocab.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


def chinese_files(folder: Path, **options: object) -> Path:
    """cog-pretrain.model, trained here with the official file's properties."""
    folder.mkdir(exist_ok=True)
    settings = {
        "model_type": "bpe",
        "vocab_size": 220,
        "normalization_rule_name": "nmt_nfkc",
        "user_defined_symbols": ["<n>"],
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    with (folder / "cog-pretrain.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=writer, **(settings | options)
        )
    return folder


class WordIds:
    """A tokenizer whose words are the ids themselves, with the special ids of the small official checkpoint."""

    cls_token_id, eos_token_id, pad_token_id = 119, 118, 118
    mask_token_id, smask_token_id, gmask_token_id = 120, 125, 126
    mask_token_ids = (120, 125, 126)
    sop_token_id, eop_token_id = 123, 124
    _commands = {"ENC": 119, "eos": 118, "pad": 118, "MASK": 120, "sop": 123, "eop": 124}  # noqa: RUF012

    def get_command(self, name: str) -> int:
        return self._commands[name]

    def convert_tokens_to_ids(self, token: str) -> int:
        return {".": 100}[token]

    def encode_with_masks(self, text: str) -> list[int]:
        return [120 if word == "[MASK]" else int(word) for word in text.split() if word.isdigit() or word == "[MASK]"]

    def decode_ids(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))
