"""Train the SentencePiece tokenizer of glm-nano.

    python nano/tokenizer.py --corpus DIR/train.jsonl --out DIR/tokenizer.model

The settings are those of ChatGLM3's tokenizer on a smaller scale: BPE, no normalisation, bytes for what is unknown,
digits one by one, runs of blanks as pieces. All Hanzi of GB2312's first level are in the vocabulary, so that ordinary
Chinese outside the corpus costs about one token a character. The nine control tokens are not in this file; the
tokenizer class appends them, which makes 6,144 ids.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

PIECES = 6135
_PUNCTUATION = "，。！？、；：“”‘’（）《》〈〉【】「」『』〔〕…—～·￥×÷°℃％＋－＝＜＞／＃＆＊＠　"


def common_hanzi() -> str:
    """List the 3,755 Hanzi of GB2312's first level.

    Returns:
        The characters of rows 16 to 55.
    """
    characters = []
    for row in range(16, 56):
        for cell in range(1, 95):
            try:
                characters.append(bytes((row + 0xA0, cell + 0xA0)).decode("gb2312"))
            except UnicodeDecodeError:
                continue  # the last five cells of row 55 are empty
    return "".join(characters)


def training_lines(corpus: Path, limit: int, seed: int = 1) -> Iterator[str]:
    """Turn conversations into lines for the trainer.

    Args:
        corpus: train.jsonl.
        limit: Number of records to use.
        seed: Seed of the choice.

    Yields:
        Lines without line ends. Lines after the first lose one leading blank, because the trainer puts one in front of
        every line and the text has it inside.
    """
    with corpus.open(encoding="utf-8") as file:
        records = file.readlines()
    random.Random(seed).shuffle(records)
    for text in records[:limit]:
        for message in json.loads(text)["conversations"]:
            content = message["content"]
            if "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            first, *rest = content.split("\n")
            if message.get("metadata"):
                yield message["metadata"]
            for line in [first, *(line.removeprefix(" ") for line in rest)]:
                if line:
                    yield line


def train(corpus: Path, out: Path, limit: int = 30_000) -> None:
    """Train the tokenizer and write it.

    Args:
        corpus: train.jsonl.
        out: Path of the model file.
        limit: Number of records to learn merges from.
    """
    ascii_characters = "".join(map(chr, range(33, 127)))
    with out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(corpus, limit),
            model_writer=file,
            model_type="bpe",
            vocab_size=PIECES,
            character_coverage=1.0,
            required_chars=common_hanzi() + _PUNCTUATION + ascii_characters,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            max_sentencepiece_length=16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=1,
        )


def main() -> None:
    """Train with the files named on the command line and print the size."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of glm-nano.")
    parser.add_argument("--corpus", type=Path, required=True, help="train.jsonl of nano/corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="path of tokenizer.model")
    parser.add_argument("--records", type=int, default=30_000, help="records to learn merges from")
    arguments = parser.parse_args()
    train(arguments.corpus, arguments.out, arguments.records)
    print(arguments.out, arguments.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
