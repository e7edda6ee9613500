"""The SentencePiece Unigram file ice_text.model, as ChatGLM-6B and GLM-130B use it.

    0 <unk>  1 <s>  2 </s>  3 <pad>  4 <n>  5..129999 pieces
    130000 [MASK]  130001 [gMASK]  130002 [sMASK]  130003 <unused_0>  130004 <sop>  130005 <eop>  130006 <ENC>
    130007 <dBLOCK>  130008 <|tab|>  130009..130087 <|blank_2|> .. <|blank_80|>  130088..130343 bytes

In front of all this there may be ids of image tokens: 20,000 in GLM-130B and in the first ChatGLM-6B, none in today's
ChatGLM-6B; every id here counts them. The file of ChatGLM-6B has all the pieces. That of icetk ends in front of [MASK],
and its code appends the rest, as is done here.

The normaliser makes blanks of line ends and tabs, so they are written as pieces first: a line end is `<n>`, a tab
`<|tab|>`, and a run of blanks the longest `<|blank_k|>`, then the next. Decoding turns them back.

Source: tokenization_chatglm.py of ChatGLM-6B, ice_tokenizer.py of icetk (behaviour, not code).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmkit.errors import TokenizerError
from glmkit.runtime.vocabulary import LINE_END, MAX_BLANKS, TAB, read_blanks, write_blanks
from glmkit.tokenizers.folder import read_config
from glmkit.tokenizers.sentencepiece_file import BYTE, CONTROL, UNKNOWN, USER_DEFINED, SentencePieceFile, read_model

MODEL_FILE = "ice_text.model"
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
IMAGE_TOKENS = 20_000  # in front of the vocabulary of the first ChatGLM-6B
_SPACES = (TAB, *(f"<|blank_{count}|>" for count in range(2, MAX_BLANKS + 1)))
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_IMAGE = re.compile(r"<image_([0-9]{1,9})>")


class IceText:
    """Text to ids and back with ice_text.model.

    Args:
        path: The file.
        image_tokens: How many ids of image tokens lie in front of the text's.
        control: Names of the control tokens, for a file that has none.

    Attributes:
        data: The file's content, to be saved again.
        pieces: The pieces of the text's ids, in order.
        types: Their types.
        ids: The id of every piece.

    Raises:
        TokenizerError: The file is missing, broken or of another kind.
    """

    def __init__(self, path: Path, image_tokens: int = 0, control: Sequence[str] = CONTROL_TOKENS) -> None:
        file = read_model(path)
        behind = [*((name, CONTROL) for name in control), *((name, USER_DEFINED) for name in _SPACES)]
        behind += [(name, BYTE) for name in _BYTES]
        added = behind if not {name for name, _ in behind} & set(file.texts) else []
        self.data = file.data
        self.image_tokens = image_tokens
        self.pieces = (*file.texts, *(name for name, _ in added))
        self.types = (*file.types, *(kind for _, kind in added))
        problem = _unlike_ice_text(file, dict(zip(self.pieces, self.types)), control)
        if problem:
            raise TokenizerError(
                f"{path} is no {MODEL_FILE} of ChatGLM-6B or GLM-130B: {problem}",
                hint="check that the file belongs to this checkpoint",
            )
        self._library = file.library(added)
        self.ids = {piece: image_tokens + index for index, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        """One more than the highest id."""
        return self.image_tokens + len(self.pieces)

    @property
    def processor(self) -> Any:
        """The sentencepiece library's own object, which does not count image tokens."""
        return self._library.processor

    def encode(self, text: str) -> list[int]:
        """Gives the ids of a text.

        Args:
            text: Valid Unicode; a control token written in it stays text, `<n>` and `<|blank_2|>` are what they mean.

        Returns:
            The ids, beginning with the blank in front.
        """
        ids = self._library.encode(write_blanks(text))
        return [self.image_tokens + index for index in ids] if self.image_tokens else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Gives the text of ids.

        Args:
            ids: Ids inside the vocabulary; those of image tokens are passed over.

        Returns:
            The text; control tokens are nothing.
        """
        written = self._library.decode([index - self.image_tokens for index in ids if index >= self.image_tokens])
        return read_blanks(written)

    def piece(self, index: int) -> str:
        """Gives the piece of an id.

        Args:
            index: An id inside the vocabulary.

        Returns:
            The piece, or `<image_k>`.
        """
        return f"<image_{index}>" if index < self.image_tokens else self.pieces[index - self.image_tokens]

    def piece_id(self, piece: str) -> int:
        """Gives the id of a piece.

        Args:
            piece: The piece, or `<image_k>`.

        Returns:
            Its id; that of <unk> if there is none.
        """
        image = _IMAGE.fullmatch(piece)
        if image and int(image.group(1)) < self.image_tokens:
            return int(image.group(1))
        return self.ids.get(piece, self.image_tokens)


def _unlike_ice_text(file: SentencePieceFile, types: dict[str, int], control: Sequence[str]) -> str | None:
    """The first property that is not that of the released files, in words, or None."""
    if file.model_type != "UNIGRAM":
        return f"the model type is {file.model_type}, expected UNIGRAM"
    problem = file.normalizer.problem("nmt_nfkc")
    if problem:
        return problem
    if not file.normalizer.add_dummy_prefix:
        return "there is no blank in front of a text"
    if file.types[:3] != (UNKNOWN, CONTROL, CONTROL) or file.texts[:3] != ("<unk>", "<s>", "</s>"):
        return "ids 0 to 2 are not <unk>, <s> and </s>"
    needed = [(name, CONTROL, "the control token") for name in ("<pad>", *control)]
    needed += [(name, USER_DEFINED, "the piece") for name in (LINE_END, *_SPACES)]
    needed += [(name, BYTE, "the byte") for name in _BYTES]
    return next((f"{what} {name} is missing" for name, kind, what in needed if types.get(name) != kind), None)


def image_tokens_of(folder: Path, told: int | None, ids: Mapping[str, int]) -> int:
    """Tells how many image tokens stand in front of ChatGLM-6B's text.

    Args:
        folder: The folder of the file.
        told: What tokenizer_config.json or the caller says: 0, 20,000 or nothing.
        ids: The ids without image tokens.

    Returns:
        0 or 20,000.

    Raises:
        TokenizerError: That, and the ids of control tokens in config.json, do not fit together.
    """
    if told is not None and (isinstance(told, bool) or told not in (0, IMAGE_TOKENS)):
        raise TokenizerError(
            f"num_image_tokens={told!r:.40}: expected 0, or {IMAGE_TOKENS} for the first release",
            hint="copy tokenizer_config.json from the checkpoint's original repository",
        )
    config = read_config(folder / "config.json")
    pairs = (("bos", "<sop>"), ("eos", "<eop>"), ("mask", "[MASK]"), ("gmask", "[gMASK]"), ("pad", "<pad>"))
    numbers = {f"{name}_token_id": token for name, token in pairs}
    shown = {name: config[name] - ids[token] for name, token in numbers.items() if isinstance(config.get(name), int)}
    counts = set(shown.values()) | ({told} if told is not None else set())
    if len(counts) > 1 or not counts <= {0, IMAGE_TOKENS}:
        listed = ", ".join(f"{name} is {config[name]}" for name in shown)
        raise TokenizerError(
            f"{folder}: tokenizer and model have different vocabularies: num_image_tokens is {told}, and in config.json"
            f" {listed}, where <sop> is {ids['<sop>']} and <eop> {ids['<eop>']} without image tokens",
            hint="check that all files of the folder belong to one release; its tokenizer_config.json has the "
            "num_image_tokens that fits the weights",
        )
    return counts.pop() if counts else 0
