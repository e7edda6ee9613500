"""The tokenizer of ChatGLM-6B (generation 1).

    model input   text [gMASK] <sop>               one text
                  text [gMASK] <sop> text <eop>    a pair

Its vocabulary, and how blanks and line ends are written, is told in `glmkit.tokenizers.ice_text`. The first release had
20,000 image tokens in front, so every id was 20,000 higher (`num_image_tokens`).

Called on a text, the tokenizer reads `<sop> <eop> [MASK] <pad> <unk>` in it as control tokens, as the official class
does, so that a blank to fill can be written; blanks beside them are dropped, and what follows begins like a text of its
own. `encode_text` reads nothing in a text.

Padded inputs carry masks and positions of their own form: attention_mask (B, 1, T, T) bool with True where attention is
BLOCKED, and position_ids (B, 2, T). They take [MASK] before [gMASK], where the model itself takes [gMASK] first.

Source: tokenization_chatglm.py of ChatGLM-6B (behaviour, not code).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer, models

from glmkit.errors import TokenizerError, UsageError
from glmkit.hf import BatchEncoding
from glmkit.runtime.control import Command, Control
from glmkit.runtime.vocabulary import refuse_surrogates
from glmkit.tokenizers.batches import clean_up, cut_pair, prefix_places, tensor_type, to_lists
from glmkit.tokenizers.chat_tokenizer import ChatTokenizer, TokenIdError
from glmkit.tokenizers.ice_text import CONTROL_TOKENS, MODEL_FILE, IceText, image_tokens_of
from glmkit.tokenizers.view import IceTextView

_PARSED = ("<sop>", "<eop>", "<unk>", "<pad>", "[MASK]")  # what a text is cut at
_NO_PADDING = (False, None, "do_not_pad")


class ChatGLM1Tokenizer(ChatTokenizer):
    """The tokenizer of ChatGLM-6B; its folders call it ChatGLMTokenizer.

    Args:
        vocab_file: The SentencePiece file, usually `<folder>/ice_text.model`.
        num_image_tokens: 0, or 20,000 for the first release; None: what config.json beside the file says, else 0.
        padding_side: Side of the padding.
        generation: 1, for callers that say it.
        **kwargs: `name_or_path` and `model_max_length` are kept; special tokens of a configuration file are fixed here
            and ignored.

    Raises:
        TokenizerError: The file is missing, broken or of another kind, or the folder's vocabularies disagree.
    """

    generation = 1
    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012 - a class attribute of the base
    file_name = MODEL_FILE
    saved_options: ClassVar[tuple[str, ...]] = (*ChatTokenizer.saved_options, "num_image_tokens")

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        num_image_tokens: int | None = None,
        padding_side: str = "left",
        generation: int | None = None,
        **kwargs: Any,
    ) -> None:
        path = Path(vocab_file)
        for unsupported in ("do_lower_case", "remove_space"):
            if kwargs.get(unsupported):
                raise TokenizerError(
                    f"{unsupported}=true: no released tokenizer of ChatGLM-6B does that",
                    hint="copy tokenizer_config.json from the checkpoint's original repository",
                )
        if generation not in (None, 1):
            raise TokenizerError(f"{path} is {MODEL_FILE} of ChatGLM-6B, which is generation 1, not {generation!r:.40}")
        text = IceText(path)
        image_tokens = image_tokens_of(path.parent, num_image_tokens, text.ids)
        self.text = text = IceText(path, image_tokens) if image_tokens else text
        names = ("<unk>", "<s>", "</s>", "<pad>", *CONTROL_TOKENS)
        self.special_tokens = {name: text.ids[name] for name in names}
        parsed = (Command(name, name, self.special_tokens[name], eats="both") for name in _PARSED)
        self._control = Control(tuple(parsed), {})
        table = Tokenizer(models.WordLevel(vocab=text.ids, unk_token="<unk>"))
        super().__init__(path, text.data, table, padding_side, **kwargs)
        self.num_image_tokens = image_tokens
        self.sp_tokenizer = IceTextView(text)

    def _described(self) -> dict[str, Any]:
        return {f"{name}_token": getattr(self, f"{name}_token") for name in _NAMES}

    # --- vocabulary ---

    bos_token, eos_token, end_token, pad_token, unk_token = "<sop>", "<eop>", "</s>", "<pad>", "<unk>"
    mask_token, gmask_token = "[MASK]", "[gMASK]"
    bos_token_id = property(lambda self: self.special_tokens["<sop>"], doc="The id that begins an answer.")
    eos_token_id = property(lambda self: self.special_tokens["<eop>"], doc="The id that ends an answer.")
    end_token_id = property(lambda self: self.special_tokens["</s>"], doc="The id of </s>, which nothing uses.")
    pad_token_id = property(lambda self: self.special_tokens["<pad>"])
    unk_token_id = property(lambda self: self.special_tokens["<unk>"])
    mask_token_id = property(lambda self: self.special_tokens["[MASK]"], doc="The id of a blank in a text.")
    gmask_token_id = property(lambda self: self.special_tokens["[gMASK]"], doc="The id of the blank behind a text.")

    @property
    def commands(self) -> dict[str, int]:
        """The ids that only templates write, by name."""
        return self.special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        return list(_PARSED)

    @property
    def all_special_ids(self) -> list[int]:
        return [self.special_tokens[token] for token in _PARSED]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {f"{name}_token": getattr(self, f"{name}_token") for name in ("bos", "eos", "unk", "pad", "mask")}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model's vocabulary is padded beyond it."""
        return len(self.text)

    def __len__(self) -> int:
        return len(self.text)

    def get_vocab(self) -> dict[str, int]:
        """Gives the whole vocabulary, image tokens as `<image_0>`, `<image_1>` and so on.

        Returns:
            Piece -> id.
        """
        return {f"<image_{index}>": index for index in range(self.num_image_tokens)} | self.text.ids

    @property
    def prefix_ids(self) -> list[int]:
        """[gMASK] and <sop>, which in this generation stand behind the text."""
        return [self.gmask_token_id, self.bos_token_id]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The id that ends a reply: <eop>."""
        return frozenset({self.eos_token_id})

    def piece(self, index: int) -> str:
        """Gives the piece of an id.

        Args:
            index: A token id.

        Returns:
            The piece, or `<image_k>`.

        Raises:
            TokenIdError: An id behind the vocabulary.
        """
        self._check(index)
        return self.text.piece(index)

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self.text):
            raise TokenIdError(
                f"token id {index} is out of range: ChatGLM-6B's tokenizer has {len(self.text)} ids, "
                "the model's vocabulary is padded beyond them"
            )

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Gives ids for pieces.

        Args:
            tokens: One piece or several.

        Returns:
            One id or several; what is no piece has that of <unk>.
        """
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else self.text.piece_id(tokens)
        return [self.text.piece_id(token) for token in tokens]

    # --- text to ids ---

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text: nothing in it is read as a control token, and none is added.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        return self.text.encode(text)

    def encode_with_masks(self, text: str) -> list[int]:
        """Encodes text in which `<sop> <eop> [MASK] <pad> <unk>` mean the tokens; adds nothing.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        parts = self._control.split(text)
        return [index for part in parts for index in ([part] if isinstance(part, int) else self.text.encode(part))]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Splits text into pieces.

        Args:
            text: The text.
            pair: A second text.
            add_special_tokens: Whether [gMASK] and <sop> stand behind it.
            **kwargs: See `__call__`.

        Returns:
            The pieces.
        """
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens=add_special_tokens, **kwargs))

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        """Encodes a text, or a pair, to ids.

        Args:
            text: The text.
            text_pair: A second text; then <eop> ends the ids.
            add_special_tokens: Whether [gMASK] and <sop> stand behind the text.
            **kwargs: See `__call__`.

        Returns:
            Token ids.
        """
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts [gMASK] and <sop> behind ids, and after those a second text and <eop>.

        Args:
            token_ids_0: Ids of the first text.
            token_ids_1: Ids of the second text.

        Returns:
            The ids for the model.
        """
        first = [*token_ids_0, *self.prefix_ids]
        return first if token_ids_1 is None else [*first, *token_ids_1, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Counts the control tokens that are put behind a text.

        Args:
            pair: Whether for a pair.

        Returns:
            How many.
        """
        return 3 if pair else 2

    def __call__(  # type: ignore[override]
        self,
        text: Any = None,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encodes one text or several for the model.

        Args:
            text: A text or a list of texts.
            text_pair: Second texts, to make pairs.
            add_special_tokens: Whether [gMASK] and <sop> stand behind each.
            padding: True or "longest" pads to the longest, "max_length" to `max_length`.
            truncation: True cuts the end of the longer text so that all has `max_length` ids.
            max_length: Most ids, control tokens included.
            return_tensors: "pt" or "np" for arrays, None for lists.
            return_attention_mask: False leaves the mask out.
            pad_to_multiple_of: Pads further, to a multiple of this.
            padding_side: Instead of the tokenizer's own side.
            **kwargs: Refused if they ask for something; none of transformers' others are done here.

        Returns:
            input_ids; with padding or a `max_length`, as officially, also attention_mask and position_ids, see `pad`.

        Raises:
            TokenizerError: A text has a lone surrogate.
            UsageError: An argument that is not done here.
        """
        wrong = [name for name, value in kwargs.items() if value and name != "verbose"]
        if wrong or not isinstance(text, (str, list, tuple)):
            what = f"the argument {', '.join(wrong)} is not supported" if wrong else f"expected texts, got {type(text)}"
            raise UsageError(f"{type(self).__name__}: {what}")
        refuse_surrogates((text, text_pair))
        single = isinstance(text, str)
        texts, pairs = ([text], [text_pair]) if single else (list(text), list(text_pair or [None] * len(text)))
        if len(texts) != len(pairs):
            raise UsageError(f"{len(texts)} texts and {len(pairs)} second texts; expected as many of both")
        if truncation is None:
            truncation = max_length is not None and padding in _NO_PADDING
        limit = None
        if truncation not in (False, "do_not_truncate"):
            limit = self.model_max_length if max_length is None else max_length
        rows = [self._row(one, other, add_special_tokens, limit) for one, other in zip(texts, pairs)]
        if padding in _NO_PADDING and max_length is None and pad_to_multiple_of is None:
            return BatchEncoding(
                {"input_ids": _unnested(rows, single and return_tensors is None)}, tensor_type=return_tensors
            )
        if padding in _NO_PADDING and pad_to_multiple_of is not None:
            padding = "longest"
        padded = self.pad(
            {"input_ids": rows},
            padding,
            max_length,
            pad_to_multiple_of,
            padding_side,
            return_attention_mask,
            return_tensors,
        )
        if single and return_tensors is None:
            return BatchEncoding({name: values[0] for name, values in padded.items()})
        return padded

    def _row(self, text: str, pair: str | None, around: bool, limit: int | None) -> list[int]:
        """Encodes, cuts and joins."""
        first = self.encode_with_masks(text)
        second = None if pair is None else self.encode_with_masks(pair)
        if limit is not None:
            added = self.num_special_tokens_to_add(second is not None) if around else 0
            cut_pair(first, second, limit, added, self.truncation_side)
        return self.build_inputs_with_special_tokens(first, second) if around else first + (second or [])

    def pad(  # type: ignore[override]
        self,
        encoded_inputs: Any,
        padding: bool | str | None = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads encoded inputs to one length, and gives them masks and positions.

        Args:
            encoded_inputs: What `__call__` returned, or a list of such.
            padding: True or "longest", "max_length", or False.
            max_length: The length for "max_length".
            pad_to_multiple_of: Pads further, to a multiple of this.
            padding_side: Instead of the tokenizer's own side.
            return_attention_mask: False leaves the mask out.
            return_tensors: "pt" or "np" for arrays, None for lists (arrays stay arrays).
            verbose: Ignored.

        Returns:
            input_ids (B, T), attention_mask (B, 1, T, T) bool with True = blocked, position_ids (B, 2, T). Given masks
            and positions of this form are kept; else they are made from the ids.
        """
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {key: [one[key] for one in encoded_inputs] for key in encoded_inputs[0]}
        return_tensors = return_tensors or tensor_type(encoded_inputs["input_ids"])
        rows = to_lists(encoded_inputs["input_ids"])
        single = bool(rows) and isinstance(rows[0], int)
        rows = [rows] if single else rows
        left = (padding_side or self.padding_side) == "left"
        width = 0 if padding in _NO_PADDING else max(map(len, rows), default=0)
        if padding == "max_length" and max_length is not None:
            width = max_length
        if pad_to_multiple_of:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        names = ("input_ids", "attention_mask", "position_ids")
        data: dict[str, Any] = {name: [] for name in names}
        for number, row in enumerate(rows):
            made = prefix_places(row, self.bos_token_id, (self.mask_token_id, self.gmask_token_id))
            given = [encoded_inputs.get(name) for name in names[1:]]
            mask, places = (
                one if value is None else np.asarray(value if single else value[number])
                for one, value in zip(made, given)
            )
            count = max(0, width - len(row))
            missing = (count, 0) if left else (0, count)
            data["input_ids"].append([self.pad_token_id] * missing[0] + row + [self.pad_token_id] * missing[1])
            data["attention_mask"].append(np.pad(mask, ((0, 0), missing, missing), constant_values=True))
            data["position_ids"].append(np.pad(places, ((0, 0), missing)))
        if return_attention_mask is False:
            del data["attention_mask"]
        if return_tensors is None:
            data = {name: _unnested([to_lists(row) for row in values], single) for name, values in data.items()}
        else:
            data = {name: np.stack(values) for name, values in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)

    # --- ids to text ---

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turns ids into text as the official class does, which joins marks to the word in front of them.

        Args:
            token_ids: An id, a list of ids, a list of such lists, or a tensor.
            skip_special_tokens: Whether <unk> is left out; the other control tokens decode to nothing anyway.
            clean_up_tokenization_spaces: False leaves blanks in front of marks as they are.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The text, or one per list. A pending part of a character becomes one U+FFFD per byte.

        Raises:
            TokenIdError: An id behind the vocabulary.
        """
        texts = super().decode(
            token_ids, skip_special_tokens, clean_up_tokenization_spaces=clean_up_tokenization_spaces
        )
        return texts if clean_up_tokenization_spaces is False or isinstance(texts, list) else clean_up(texts)

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns one list of ids into text as it is, without joining marks.

        Args:
            ids: Token ids; padding and image tokens are nothing.

        Returns:
            The text, see `decode`.
        """
        kept = [index for index in ids if index != self.pad_token_id]
        for index in kept:
            self._check(index)
        return self.text.decode(kept)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces to text.

        Args:
            tokens: Pieces, such as `tokenize` gives.

        Returns:
            The text.
        """
        return self.decode_ids(self.convert_tokens_to_ids(tokens))


_NAMES = ("bos", "eos", "end", "gmask", "mask", "pad", "unk")


def _unnested(rows: list[Any], single: bool) -> Any:
    return rows[0] if single else rows
