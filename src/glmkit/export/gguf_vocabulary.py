"""A tokenizer as the tables of a GGUF file, from which llama.cpp makes the same ids.

    generation   llama.cpp's tokenizer          tables
    2, 3         "llama" (SentencePiece)        pieces, their types and scores
    4            "gpt2" (bytes), pre "glm4"     sequences in the letters of byte-level vocabularies, and merges

Ids behind the tokenizer's, which the model has rows for, are called [PAD64798] and so on, and are never used.

Two things differ from the file that llama.cpp's own converter makes, because with it text becomes other ids:

- ChatGLM's control ids `sop` and `eop` are called `<sop>` and `<eop>`. llama.cpp finds the names of control ids in a
  prompt as plain substrings, so that with the official names "philosophy" has a control id inside; and even where it
  does not look for them, its SentencePiece joins "so" and "p" to the id.
- GLM-4's pre-tokenizer is "glm4" and not "chatglm-bpe". The words are the same; but 893 of the 151,329 sequences, such
  as " 参考", are no result of merges, and only "glm4" takes a word that is a sequence as it is.

Source: llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmkit.errors import TokenizerError, UsageError
from glmkit.tokenizers import ChatGLM4Tokenizer, ChatGLMTokenizer
from glmkit.tokenizers.chatglm2 import CONTROL_TOKENS, ROLE_TOKENS
from glmkit.tokenizers.glm4 import CONTROL_TOKENS as CONTROL_TOKENS_4
from glmkit.tokenizers.sentencepiece_bpe import read_pieces
from glmkit.tokenizers.sentencepiece_file import CONTROL, NORMAL, UNUSED

_NAMES = {"sop": "<sop>", "eop": "<eop>"}

# llama.cpp guesses a template from its text where it cannot run it, and would take the one of another generation: so
# the two names do not stand side by side.
_START = "{{ '[gMASK]' + '<sop>' }}"
_BLOCKS = (
    _START + "{% for message in messages %}{% if message['content'] or KEEP %}"
    "{{ '<|' + message['role'] + '|>\\nGAP' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ROUNDS = (
    _START + "{% set state = namespace(round=1, system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set state.system = message['content'] %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[Round ' + state.round|string + ']\\n\\n问：' + state.system + message['content'] + '\\n\\n答：' }}"
    "{% set state.system = '' %}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% set state.round = state.round + 1 %}{% endif %}{% endfor %}"
)
TEMPLATES = {
    2: _ROUNDS,
    3: _BLOCKS.replace("KEEP", "true").replace("GAP", " "),  # the blank that SentencePiece puts before a content
    4: _BLOCKS.replace("KEEP", "false").replace("GAP", ""),
}
"""Generation -> its chat format in Jinja, for the names of control ids in these tables; without tools."""


@dataclass(frozen=True)
class Vocabulary:
    """The tables, named as in the keys of `tokenizer.ggml`.

    Args:
        model: "llama" or "gpt2".
        pre: Which words a text is cut into first.
        tokens: The name of every id.
        types: The kind of every id, in the numbers of a SentencePiece file.
        scores: The score of every id; none for "gpt2".
        merges: Pairs "left right", best first; none for "llama".
        ids: Ids with a role: "eos", "eot" and "eom" end an answer.
        add_space_prefix: Whether a blank is put in front of every text.
        template: The chat format in Jinja.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    ids: dict[str, int]
    add_space_prefix: bool
    template: str = field(repr=False)


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Makes the tables.

    Args:
        tokenizer: Of ChatGLM2, ChatGLM3 or GLM-4.
        rows: Number of rows of the model's embedding.

    Returns:
        The tables.

    Raises:
        UsageError: A tokenizer of another family.
        TokenizerError: It has more ids than the model has rows, or two ids of the same name.
    """
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        found = _bytes(tokenizer)
    elif isinstance(tokenizer, ChatGLMTokenizer):
        found = _pieces(tokenizer)
    else:
        raise UsageError(
            f"{type(tokenizer).__name__} has no tables in GGUF: llama.cpp runs ChatGLM2, ChatGLM3 and GLM-4",
            hint="--to openvino or --to onnx takes every family",
        )
    known = len(found.tokens)
    if known > rows:
        raise TokenizerError(
            f"the tokenizer has {known} ids, and the model's embedding {rows} rows",
            hint="copy the tokenizer's files from the checkpoint's original repository",
        )
    found.tokens.extend(f"[PAD{index}]" for index in range(known, rows))
    found.types.extend([UNUSED] * (rows - known))
    if found.scores:
        found.scores.extend([0.0] * (rows - known))
    if len(set(found.tokens)) != rows:
        raise TokenizerError(
            "two ids have the same name, which llama.cpp cannot tell apart",
            hint="--to openvino or --to onnx takes every family",
        )
    return found


def _pieces(tokenizer: ChatGLMTokenizer) -> Vocabulary:
    file = read_pieces(Path(tokenizer.vocab_file))
    control = CONTROL_TOKENS + (ROLE_TOKENS if tokenizer.generation == 3 else ())
    ids = {"eos": tokenizer.eos_token_id, "unk": 0, "pad": 0}
    if tokenizer.generation == 3:
        ids |= _ends(tokenizer)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[*file.texts, *(_NAMES.get(name, name) for name in control)],
        types=[*file.types, *[CONTROL] * len(control)],
        scores=[*file.scores, *[0.0] * len(control)],
        merges=[],
        ids=ids,
        add_space_prefix=file.normalizer.add_dummy_prefix,
        template=TEMPLATES[tokenizer.generation],
    )


def _bytes(tokenizer: ChatGLM4Tokenizer) -> Vocabulary:
    table = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(table["vocab"], key=table["vocab"].__getitem__)
    end: int = tokenizer.eos_token_id
    return Vocabulary(
        model="gpt2",
        pre="glm4",
        tokens=[*words, *CONTROL_TOKENS_4],
        types=[NORMAL] * len(words) + [CONTROL] * len(CONTROL_TOKENS_4),
        scores=[],
        merges=[" ".join(pair) for pair in table["merges"]],
        ids={"eos": end, "pad": end, **_ends(tokenizer)},
        add_space_prefix=False,
        template=TEMPLATES[4],
    )


def _ends(tokenizer: Any) -> dict[str, int]:
    """llama.cpp knows three kinds of ends; the roles that speak next are two of them."""
    return {"eot": tokenizer.get_command("<|user|>"), "eom": tokenizer.get_command("<|observation|>")}
