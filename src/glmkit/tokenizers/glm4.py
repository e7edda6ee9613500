"""The tokenizer of GLM-4-9B and CodeGeeX4 (generation 4).

    0..N-1 byte sequences | N <|endoftext|>  [MASK]  [gMASK]  [sMASK]  <sop>  <eop>  <|system|>  N+7 <|user|>
    <|assistant|>  N+9 <|observation|>  and begin and end of image and video, up to N+13

    model input   [gMASK] <sop> text

N is 151329 in the released file. A BPE over bytes: the text is cut into words by a pattern, and in each word the
adjacent pair whose joined sequence has the lowest rank is joined, again and again. Nothing is normalised, and there is
no blank in front.

    encode_text(text)      all of it is text: what users wrote, what tools returned
    tokenizer(text)        control tokens written in it become their ids, as in the official class

The file is tiktoken's: one line for each sequence, in base64, and its rank, which is its id. A Rust BPE wants pairs in
order of preference; listing every way to cut a sequence into two, in the order of ranks, gives the same ids.

Source: tokenization_chatglm.py of glm-4-9b-chat (behaviour, not code). On purpose different: decoding puts no blanks
between control tokens and text; tokens are shown as strings in the letters of byte-level vocabularies, not as bytes;
ids behind the vocabulary, which the model has rows for, decode to nothing.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from glmkit.errors import TokenizerError, UsageError
from glmkit.runtime.vocabulary import byte_letters
from glmkit.tokenizers.chat_tokenizer import ChatTokenizer
from glmkit.tokenizers.folder import MODEL_FILE

ROLES = ("system", "user", "assistant", "observation")
END = "<|endoftext|>"
CONTROL_TOKENS = (
    *(END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *(f"<|{role}|>" for role in ROLES),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
MAX_FILE_BYTES = 16 * 2**20  # the released file has 2.6 MB
MAX_SEQUENCES = 300_000  # the released file has 151,329
MAX_SEQUENCE_BYTES = 1_000  # the longest of the released file has 512: blanks
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,7}\r?")


class ChatGLM4Tokenizer(ChatTokenizer):
    """The tokenizer of GLM-4-9B.

    Args:
        vocab_file: The file of ranks, usually `<folder>/tokenizer.model`.
        padding_side: Side of the padding; the models are used with left padding.
        clean_up_tokenization_spaces: Accepted for old configurations; text is never cleaned up.
        generation: 4, for callers that say it.
        **kwargs: `name_or_path` and `model_max_length` are kept; special tokens of a configuration file are fixed here
            and ignored.

    Raises:
        TokenizerError: The file is missing, broken or of another kind.
    """

    generation = 4
    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012 - a class attribute of the base
    saved_class = "ChatGLM4Tokenizer"

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        generation: int | None = None,
        **kwargs: Any,
    ) -> None:
        path = Path(vocab_file)
        data, sequences = read_ranks(path)
        if generation not in (None, 4):
            raise TokenizerError(f"{path} is the tokenizer of GLM-4-9B, which is generation 4, not {generation!r:.40}")
        self._sequences = sequences
        self.special_tokens = {name: len(sequences) + offset for offset, name in enumerate(CONTROL_TOKENS)}
        super().__init__(path, data, _build(path, sequences), padding_side, **kwargs)
        self.add_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
        prefix = [(name, self.special_tokens[name]) for name in ("[gMASK]", "<sop>")]
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[gMASK] <sop> $A",
            pair=f"[gMASK] <sop> $A $B {END}",
            special_tokens=[*prefix, (END, self.special_tokens[END])],
        )

    def _described(self) -> dict[str, Any]:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        added = {str(index): {"content": name, **flags, "special": True} for name, index in self.special_tokens.items()}
        names = {"eos_token": END, "pad_token": END, "additional_special_tokens": list(CONTROL_TOKENS)}
        return {"added_tokens_decoder": added, **names, "clean_up_tokenization_spaces": False}

    # --- vocabulary ---

    eos_token = pad_token = END
    eos_token_id = property(lambda self: self.special_tokens[END], doc="The id of <|endoftext|>.")
    pad_token_id = property(lambda self: self.special_tokens[END], doc="The same id: padding is known by its mask.")

    @property
    def commands(self) -> dict[str, int]:
        """The ids that only templates write, by name."""
        return self.special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        return list(CONTROL_TOKENS)

    @property
    def all_special_ids(self) -> list[int]:
        return list(self.special_tokens.values())

    @property
    def vocab_size(self) -> int:
        """The number of byte sequences; `len` counts the control tokens too."""
        return len(self._sequences)

    @property
    def prefix_ids(self) -> list[int]:
        """The ids in front of every input: [gMASK] and <sop>."""
        return [self.special_tokens["[gMASK]"], self.special_tokens["<sop>"]]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply: <|endoftext|>, and the roles that speak next."""
        return frozenset(self.special_tokens[name] for name in (END, "<|user|>", "<|observation|>"))

    def get_prefix_tokens(self) -> list[int]:
        """Official name of `prefix_ids`.

        Returns:
            The ids of [gMASK] and <sop>.
        """
        return self.prefix_ids

    def piece(self, index: int) -> str:
        """Gives the token of an id.

        Args:
            index: A token id.

        Returns:
            The letters that stand for its bytes, or the control token's name; nothing behind the vocabulary.
        """
        return self.backend_tokenizer.id_to_token(index) or "" if index >= 0 else ""

    # --- text to ids ---

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts [gMASK] and <sop> in front of ids, and <|endoftext|> behind a pair.

        Args:
            token_ids_0: Ids of the first text.
            token_ids_1: Ids of the second text.

        Returns:
            The ids for the model.
        """
        first = self.prefix_ids + list(token_ids_0)
        return first if token_ids_1 is None else [*first, *token_ids_1, self.eos_token_id]

    def build_single_message(self, role: str, metadata: str, message: str, tokenize: bool = True) -> Any:
        """Builds one message: the role, the header line, the content.

        Args:
            role: "system", "user", "assistant" or "observation".
            metadata: What stands in the header line: a tool's name, or nothing.
            message: The content; nothing in it is read as a control token.
            tokenize: False gives the text, in which the content can no longer be told from control tokens.

        Returns:
            Token ids, or the text.

        Raises:
            UsageError: There is no such role.
        """
        if role not in ROLES:
            raise UsageError(f"no role {role!r}; expected one of {', '.join(ROLES)}")
        if not tokenize:
            return f"<|{role}|>{metadata}\n{message}"
        # The line and the content are encoded apart, as officially; together a line end could join the content's first.
        return [self.special_tokens[f"<|{role}|>"], *self.encode_text(f"{metadata}\n"), *self.encode_text(message)]

    # --- ids to text ---

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns one list of ids into text, control tokens by name.

        Args:
            ids: Token ids; those behind the vocabulary are nothing.

        Returns:
            The text; bytes that form no character become U+FFFD.
        """
        count = len(self._sequences)
        parts = [
            self._sequences[index]
            if index < count
            else CONTROL_TOKENS[index - count].encode()
            if index < count + len(CONTROL_TOKENS)
            else b""
            for index in ids
            if index >= 0
        ]
        return b"".join(parts).decode("utf-8", errors="replace")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens to text.

        Args:
            tokens: Tokens, such as `tokenize` gives.

        Returns:
            The text.
        """
        return self.decode_ids(self.convert_tokens_to_ids(tokens))


def is_rank_file(path: Path) -> bool:
    """Whether a file looks like tiktoken's, by its first line.

    Args:
        path: The file.

    Returns:
        True for base64 and a number; a SentencePiece file is binary.
    """
    with path.open("rb") as file:
        line = file.readline(4 * MAX_SEQUENCE_BYTES)
    return line.endswith(b"\n") and _LINE.fullmatch(line[:-1]) is not None


def read_ranks(path: Path) -> tuple[bytes, list[bytes]]:
    """Reads a file of byte sequences and their ranks.

    Args:
        path: The file, usually `tokenizer.model`.

    Returns:
        Its content, and the sequences in the order of their ranks.

    Raises:
        TokenizerError: The file is missing, too large, of another form, or its ranks are not 0, 1, 2, ...; or a
            sequence occurs twice, or one of the 256 bytes is missing.
    """
    if not path.is_file():
        raise TokenizerError(
            f"no tokenizer: {path} is missing", hint=f"copy {path.name} from the checkpoint's original repository"
        )
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size_bytes} bytes; a file of ranks has at most {MAX_FILE_BYTES}",
            hint=f"copy {path.name} from the checkpoint's original repository",
        )
    data = path.read_bytes()
    count = data.count(b"\n")
    if count > MAX_SEQUENCES:  # before they are taken apart, which takes the memory
        raise TokenizerError(
            f"{path} has {count} lines, at most {MAX_SEQUENCES} expected",
            hint=f"copy {path.name} from the checkpoint's original repository",
        )
    lines = data.removesuffix(b"\n").split(b"\n")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        coded, _, rank = line.partition(b" ")
        try:
            sequence = base64.b64decode(coded, validate=True)
            if not 0 < len(sequence) <= MAX_SEQUENCE_BYTES or sequence in ranks:
                raise ValueError(f"a sequence of {len(sequence)} bytes that is empty, too long or occurs twice")
            if len(rank) > 8:
                raise ValueError("a rank of more than 7 digits")
            ranks[sequence] = int(rank)
        except ValueError as error:  # base64's own is one
            raise TokenizerError(
                f"{path} is no file of ranks: line {number} is {line[:40]!r} ({error})",
                hint="copy it again; a file of a few hundred bytes is often a Git LFS pointer (`git lfs pull`)",
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path} has ranks other than 0 to {len(ranks) - 1}", hint="copy it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path} lacks {len(missing)} of the 256 single bytes", hint="copy it again")
    return data, sorted(ranks, key=ranks.__getitem__)


def _build(path: Path, sequences: list[bytes]) -> Tokenizer:
    """The Rust tokenizer for plain text."""
    letters = byte_letters()
    words = [sequence.decode("latin-1").translate(letters) for sequence in sequences]
    ids = {word: rank for rank, word in enumerate(words)}
    merges = [
        (left, right)
        for word in words
        for cut in range(len(word) - 1, 0, -1)
        if (left := word[:cut]) in ids and (right := word[cut:]) in ids
    ]
    # A word that is a sequence as a whole is that one, even where no joining would lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
