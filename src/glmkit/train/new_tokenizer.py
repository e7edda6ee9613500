"""A tokenizer for a new GLM: SentencePiece pieces learnt from a corpus, numbered like those of the Chinese models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from glmkit.data.corpus import Corpus
from glmkit.errors import UsageError
from glmkit.writing import write_bytes_atomic

_SAMPLED_BYTES = 30_000_000
_LINE_CHARACTERS = 1000  # the trainer leaves out lines that are much longer


def make_tokenizer_file(corpus: Corpus, pieces: int, path: Path, *, seed: int = 1) -> None:
    """Learn pieces from a sample of a corpus and write them as cog-pretrain.model.

    Args:
        corpus: The texts.
        pieces: How many pieces; fewer if the corpus has not so many.
        path: The file.
        seed: Seed of the sample.

    Raises:
        UsageError: If SentencePiece cannot learn so many, or so few.
    """
    import io

    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(corpus, seed),
            model_writer=written,
            model_type="bpe",
            vocab_size=pieces,
            hard_vocab_limit=False,
            character_coverage=0.9999,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=True,
            remove_extra_whitespaces=True,
            user_defined_symbols=["<n>"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(
            f"no tokenizer of {pieces} pieces can be learnt from this corpus: {error}",
            hint="choose another model.tokenizer_pieces; Chinese text needs some thousands",
        ) from None
    write_bytes_atomic(path, written.getvalue())


def _lines(corpus: Corpus, seed: int) -> Iterator[str]:
    generator = random.Random(f"tokenizer {seed}")
    left = min(corpus.size_bytes, _SAMPLED_BYTES)
    while left > 0:
        text = corpus.draw(generator).text
        left -= len(text.encode())
        for line in text.splitlines():
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]
