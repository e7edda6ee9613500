"""What the tokenizers of the chat models share: loading and saving, checks of text, padding with positions, decoding.

    tokenizer(text)         what the official class makes of a text: prefix ids, masks, positions
    encode_text(text)       the text alone; nothing in it is ever read as a control token
    decode_ids(ids)         the text of ids as it is

A class for one family says how its file is read, how plain text becomes ids and ids become text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer, models

from glmkit.errors import TokenizerError
from glmkit.hf import BatchEncoding, TokenizersBackend
from glmkit.runtime.vocabulary import refuse_surrogates
from glmkit.tokenizers.batches import ones_like, pad_like, positions, tensor_type, to_lists
from glmkit.tokenizers.folder import (
    CONFIG_FILE,
    HUB_ARGUMENTS,
    find_model_file,
    folder_to_save_in,
    kept_arguments,
    read_config,
)
from glmkit.writing import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from typing_extensions import Self


class TokenIdError(TokenizerError, IndexError):
    """A token id outside the vocabulary (an IndexError too, as the official classes raise)."""


class ChatTokenizer(TokenizersBackend):
    """Base of the chat models' tokenizers.

    Args:
        vocab_file: The vocabulary, a file.
        data: Its content.
        plain: The Rust tokenizer for plain text; its model is shared, not copied.
        padding_side: Side of the padding; the models are trained and used with left padding.
        **kwargs: `name_or_path` and `model_max_length` are kept; special tokens of a configuration file are fixed by
            the class and ignored.

    Raises:
        TokenizerError: The side or the length is none.

    Attributes:
        plain: As given; it keeps no state between calls.

    Class variables:
        generation: 1 to 4, which also names the chat format.
        file_name: Official name of the vocabulary's file.
        saved_class: What official folders call the class.
        saved_options: Attributes that are written to tokenizer_config.json and read from it.
    """

    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012 - a class attribute of the base
    padding_side = "left"

    generation: int
    file_name: ClassVar[str] = "tokenizer.model"
    saved_class: ClassVar[str] = "ChatGLMTokenizer"
    saved_options: ClassVar[tuple[str, ...]] = ("padding_side", "model_max_length")

    def __init__(
        self, vocab_file: Path, data: bytes, plain: Tokenizer, padding_side: str = "left", **kwargs: Any
    ) -> None:
        if padding_side not in ("left", "right"):
            raise TokenizerError(f"padding_side={padding_side!r:.80}: expected 'left' or 'right'")
        # The base class copies the tokenizer it is given, and looks at a large one for faults of other models; both
        # take longer than reading the file. So it gets an empty one, and that the model of `plain`.
        super().__init__(tokenizer_object=Tokenizer(models.BPE()), padding_side=padding_side, **kept_arguments(kwargs))
        own = self.backend_tokenizer
        for part in ("model", "normalizer", "pre_tokenizer", "decoder", "post_processor"):
            setattr(own, part, getattr(plain, part))
        self.plain = plain  # keeps no state between calls, while the base class's own remembers truncation
        self._data = data
        self.vocab_file = str(vocab_file)

    # --- loading and saving ---

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> Self:
        """Loads the tokenizer of a checkpoint folder or hub id without running any file of it.

        Args:
            pretrained_model_name_or_path: A folder with the vocabulary's file, that file, or a hub id.
            *init_inputs: Further positional arguments of the class behind `vocab_file`.
            **kwargs: Arguments of the class (`padding_side`, ...) and the usual ones for the hub (`revision`, `token`,
                `cache_dir`, ...). `trust_remote_code` changes nothing.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: See the class.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        vocab_file = find_model_file(name, hub, cls.file_name)
        saved = read_config(vocab_file.parent / CONFIG_FILE)
        arguments = {key: saved[key] for key in cls.saved_options if key in saved} | kwargs
        return cls(vocab_file, *init_inputs, **({"name_or_path": name} | arguments))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Writes the vocabulary as it was read, and a tokenizer_config.json that names class and generation.

        Args:
            save_directory: The folder; it is made if it does not exist.
            legacy_format: Ignored: there is one format.
            filename_prefix: What both file names start with, followed by a dash.
            push_to_hub: Not supported here.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The two paths.

        Raises:
            UsageError: `push_to_hub` is set, or `save_directory` is a file.
            OutputError: A file cannot be written.
        """
        folder = folder_to_save_in(save_directory, push_to_hub)
        config = {
            "tokenizer_class": self.saved_class,
            "generation": self.generation,
            **{key: getattr(self, key) for key in self.saved_options},
            **self._described(),
            "do_lower_case": False,
            "remove_space": False,
        }
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        config_path = folder / (prefix + CONFIG_FILE)
        written = self.save_vocabulary(os.fspath(folder), filename_prefix)
        write_text_atomic(config_path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return (str(config_path), *written)

    def _described(self) -> dict[str, Any]:
        """What the official class reads from tokenizer_config.json, and we do not."""
        return {"clean_up_tokenization_spaces": False}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the vocabulary's file as it was read.

        Args:
            save_directory: An existing folder.
            filename_prefix: What the file name starts with, followed by a dash.

        Returns:
            The path.

        Raises:
            OutputError: The file cannot be written.
        """
        path = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + self.file_name)
        write_bytes_atomic(path, self._data)
        return (str(path),)

    # --- vocabulary ---

    @property
    def commands(self) -> dict[str, int]:
        """The ids that only templates write, by name."""
        raise NotImplementedError

    def get_command(self, token: str) -> int:
        """Gives the id of a control token.

        Args:
            token: Its name, such as "[gMASK]" or "<|user|>".

        Returns:
            Its id.

        Raises:
            TokenizerError: There is no such token in this generation.
        """
        known = self.commands
        if token not in known:
            raise TokenizerError(
                f"{token!r} is no control token of generation {self.generation}; expected one of {', '.join(known)}"
            )
        return known[token]

    def piece(self, index: int) -> str:
        """Gives the piece of an id.

        Args:
            index: A token id.
        """
        raise NotImplementedError

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Gives pieces for ids.

        Args:
            ids: One id or several.
            skip_special_tokens: Whether the tokens of `all_special_tokens` are left out.

        Returns:
            One piece or several, see `piece`.
        """
        if isinstance(ids, int):
            return self.piece(ids)
        hidden = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.piece(int(index)) for index in ids if int(index) not in hidden]

    # --- text to ids ---

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text: no prefix ids, and nothing in it is read as a control token, whatever the settings.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        ids: list[int] = self.plain.encode(text, add_special_tokens=False).ids
        return ids

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Splits text into pieces.

        Args:
            text: The text.
            pair: A second text.
            add_special_tokens: Whether the control tokens stand around it that `__call__` puts there.
            **kwargs: Arguments of the base class.

        Returns:
            The pieces.
        """
        refuse_surrogates((text, pair))
        return super().tokenize(text, pair, add_special_tokens=add_special_tokens, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Encodes a text, or a pair, to ids with the control tokens around it.

        Args:
            text: The text.
            text_pair: A second text.
            *args: Further arguments of the base class.
            **kwargs: Further arguments of the base class (`add_special_tokens`, `truncation`, `max_length`, ...).

        Returns:
            Token ids.
        """
        refuse_surrogates((text, text_pair))
        return super().encode(text, text_pair, *args, **kwargs)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        *args: Any,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encodes one text or several for the model.

        Args:
            text: A text or a list of texts.
            text_pair: Second texts, to make pairs.
            *args: Further arguments of the base class.
            return_tensors: "pt" or "np" for arrays (B, T) int64, None for lists.
            return_attention_mask: False leaves the mask out.
            **kwargs: Further arguments of the base class (`padding`, `truncation`, `max_length`, ...).

        Returns:
            input_ids, attention_mask (1 text, 0 padding) and position_ids (0 on padding, then 0, 1, 2, ...).

        Raises:
            TokenizerError: A text has a lone surrogate.
        """
        refuse_surrogates((text, text_pair, kwargs.get("text_target")))
        plain = super().__call__(text, text_pair, *args, return_attention_mask=True, **kwargs)
        data = dict(plain)
        data["position_ids"] = positions(data["attention_mask"])
        if return_attention_mask is False:
            del data["attention_mask"]
        single = not data["input_ids"] or isinstance(data["input_ids"][0], int)
        return BatchEncoding(data, plain.encodings, tensor_type=return_tensors, prepend_batch_axis=single)

    def pad(self, encoded_inputs: Any, *args: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchEncoding:
        """Pads encoded inputs to one length, position_ids included.

        Args:
            encoded_inputs: What `__call__` returned, or a list of such.
            *args: Further arguments of the base class.
            return_tensors: "pt" or "np" for arrays, None for lists (arrays stay arrays).
            **kwargs: Further arguments of the base class (`padding`, `max_length`, `padding_side`, ...).

        Returns:
            The padded inputs; given position_ids are kept and get 0 on padding.
        """
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {key: [one[key] for one in encoded_inputs] for key in encoded_inputs[0]}
        return_tensors = return_tensors or tensor_type(encoded_inputs["input_ids"])
        lists = {key: to_lists(value) for key, value in encoded_inputs.items()}
        given = lists.pop("position_ids", None)
        lists["attention_mask"] = lists.get("attention_mask") or ones_like(lists["input_ids"])
        data = dict(super().pad(lists, *args, **kwargs))
        if given is None:
            data["position_ids"] = positions(data["attention_mask"])
        else:
            left = (kwargs.get("padding_side") or self.padding_side) == "left"
            data["position_ids"] = pad_like(given, data["input_ids"], left)
        return BatchEncoding(data, tensor_type=return_tensors)

    # --- ids to text ---

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns one list of ids into text, without looking at their form.

        Args:
            ids: Token ids.
        """
        raise NotImplementedError

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Turns ids into text.

        Args:
            token_ids: An id, a list of ids, a list of such lists, or a tensor.
            skip_special_tokens: Whether the tokens of `all_special_tokens` are left out; generations 2 and 3 have none.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The text, or one per list. A pending part of a character becomes U+FFFD.

        Raises:
            TokenIdError: Generations 1 and 2 and an id behind the vocabulary.
        """
        ids = to_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
        hidden = set(self.all_special_ids) if skip_special_tokens else ()
        return self.decode_ids([index for index in ids if index not in hidden])

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Turns several lists of ids into texts.

        Args:
            sequences: Lists of ids or a tensor.
            skip_special_tokens: See `decode`.
            **kwargs: See `decode`.

        Returns:
            One text per list.
        """
        return [self.decode(row, skip_special_tokens, **kwargs) for row in to_lists(sequences)]
