"""Round trip and ids of a ChatGLM2/3 tokenizer over real text, against sentencepiece on the same file.

    python bench/tokenizer_on_real_text.py TOKENIZER_FOLDER FILE.json [FILE.jsonl ...]

Every string in every JSON line counts as one text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer


def strings(value: Any) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from strings(list(value.values()))


def main() -> None:
    """Prints the counts."""
    folder, files = Path(sys.argv[1]), sys.argv[2:]
    started = time.monotonic()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder, generation=3)
    loading = time.monotonic() - started
    oracle = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    texts = [t for file in files for line in Path(file).read_text().splitlines() for t in strings(json.loads(line))]
    started = time.monotonic()
    ids = [tokenizer.encode_text(text) for text in texts]
    seconds = time.monotonic() - started
    equal = sum(mine == oracle.encode(text) for mine, text in zip(ids, texts))
    back = sum(tokenizer.decode(mine) == text for mine, text in zip(ids, texts))
    print(
        f"{len(texts)} texts, {sum(map(len, texts))} characters, {sum(map(len, ids))} tokens; ids equal {equal},"
        f" round trip {back}; load {loading:.2f} s, {sum(map(len, texts)) / seconds / 1e3:.0f} thousand characters/s"
    )


if __name__ == "__main__":
    main()
