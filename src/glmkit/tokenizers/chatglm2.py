"""The tokenizer of ChatGLM2-6B, ChatGLM2-6B-32K (generation 2), ChatGLM3-6B (generation 3) and glm-nano.

    0 <unk>  1 <s>  2 </s>  3..258 bytes  259..N-1 pieces | N [MASK]  N+1 [gMASK]  N+2 [sMASK]  N+3 sop  N+4 eop
    generation 3 only:  N+5 <|system|>  N+6 <|user|>  N+7 <|assistant|>  N+8 <|observation|>

    model input   [gMASK] sop text            one text
                  [gMASK] sop text text </s>  a pair

N is the size of the SentencePiece file (64789 in the released one). Ids from N on, and 0 to 2, are written by
templates only: no text is ever parsed into one. Unlike the official Python class this one is a fast tokenizer, and it
refuses lone surrogates instead of failing deep inside.

Source: tokenization_chatglm.py of the official checkpoints (behaviour, not code).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors

from glmkit.errors import OutputError, TokenizerError, UsageError
from glmkit.hf import BatchEncoding, TokenizersBackend
from glmkit.tokenizers.batches import ones_like, pad_like, positions, refuse_surrogates, tensor_type, to_lists
from glmkit.tokenizers.folder import (
    CONFIG_FILE,
    HUB_ARGUMENTS,
    MODEL_FILE,
    check_link,
    decide_generation,
    fetch_model_file,
    read_config,
)
from glmkit.tokenizers.sentencepiece_bpe import PieceDecoder, build_tokenizer, read_pieces
from glmkit.tokenizers.view import SentencePieceView
from glmkit.writing import write_text_atomic

CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("system", "user", "assistant", "observation")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)


class TokenIdError(TokenizerError, IndexError):
    """A token id outside the vocabulary (an IndexError too, as the official generation 2 raises)."""


class ChatGLMTokenizer(TokenizersBackend):
    """The tokenizer of ChatGLM2 and ChatGLM3.

    Args:
        vocab_file: The SentencePiece file, usually `<folder>/tokenizer.model`.
        padding_side: Side of the padding; the models are trained and used with left padding.
        clean_up_tokenization_spaces: Accepted for old configurations; text is never cleaned up.
        encode_special_tokens: Generation 3 only: whether the four role tokens written in a text become their ids. Each
            part between them is encoded with its own leading blank. Never set it for text that users write.
        generation: 2 or 3; None decides from the folder of `vocab_file`.
        **kwargs: `name_or_path` and `model_max_length` are kept; special tokens of a configuration file are fixed here
            and ignored.

    Raises:
        TokenizerError: The file is missing, broken or of another kind, or the generation cannot be told.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012 - a class attribute of the base
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        encode_special_tokens: bool = False,
        generation: int | None = None,
        **kwargs: Any,
    ) -> None:
        path = Path(vocab_file)
        if not path.is_file() and (path.parent / "ice_text.model").is_file():
            raise TokenizerError(
                f"{path.parent} holds ice_text.model of ChatGLM-6B (generation 1); expected {MODEL_FILE}",
                hint="this version reads ChatGLM2 and ChatGLM3; generation 1 comes in a later one",
            )
        pieces = read_pieces(path)
        self.generation = decide_generation(path.parent, generation)
        control = CONTROL_TOKENS + (ROLE_TOKENS if self.generation == 3 else ())
        plain = build_tokenizer(pieces, control)
        prefix = [(name, len(pieces) + CONTROL_TOKENS.index(name)) for name in ("[gMASK]", "sop")]
        plain.post_processor = processors.TemplateProcessing(
            single="[gMASK] sop $A", pair="[gMASK] sop $A $B </s>", special_tokens=[*prefix, ("</s>", 2)]
        )
        kept = {key: kwargs[key] for key in ("name_or_path", "model_max_length") if key in kwargs}
        super().__init__(tokenizer_object=plain, padding_side=padding_side, **kept)
        self.vocab_file = str(path)
        self._pieces = pieces
        self._plain = plain  # keeps no state between calls, while the base class's copy remembers truncation
        # Generation 2 decodes control ids to nothing, generation 3 to their names.
        self._decoder = PieceDecoder(pieces, control if self.generation == 3 else [""] * len(control))
        self.tokenizer = SentencePieceView(self, len(pieces), control, pieces.data)
        self.special_tokens = {"<bos>": 1, "<eos>": 2, "<pad>": 0, "<unk>": 0}
        self.encode_special_tokens = encode_special_tokens
        if encode_special_tokens and self.generation == 3:
            self.add_tokens([AddedToken(name, special=True, normalized=False) for name in ROLE_TOKENS])

    # --- loading and saving ---

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> ChatGLMTokenizer:
        """Loads the tokenizer of a checkpoint folder or hub id without running any file of it.

        Args:
            pretrained_model_name_or_path: A folder with tokenizer.model, or a hub id.
            *init_inputs: Further positional arguments of the class behind `vocab_file`.
            **kwargs: Arguments of the class (`generation`, `padding_side`, ...) and the usual ones for the hub
                (`revision`, `token`, `cache_dir`, ...). `trust_remote_code` changes nothing.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: See the class.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(name):
            vocab_file = Path(name, hub.get("subfolder") or "", MODEL_FILE)
        elif os.path.isfile(name):
            vocab_file = Path(name)
        else:
            vocab_file = fetch_model_file(name, hub)
        if not os.path.isfile(name):  # a file that the caller names may lie anywhere
            check_link(vocab_file)
        saved = read_config(vocab_file.parent / CONFIG_FILE)
        kept = ("padding_side", "encode_special_tokens", "model_max_length")
        arguments = {key: saved[key] for key in kept if key in saved} | kwargs
        return cls(vocab_file, *init_inputs, name_or_path=name, **arguments)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Writes tokenizer.model and a tokenizer_config.json that names class and generation.

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
        """
        if push_to_hub:
            raise UsageError(
                "save_pretrained(push_to_hub=True) is not supported", hint="use tokenizer.push_to_hub(...)"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise UsageError(f"{folder} is a file; expected a folder to save the tokenizer in")
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        config = {
            "tokenizer_class": "ChatGLMTokenizer",
            "generation": self.generation,
            "padding_side": self.padding_side,
            "encode_special_tokens": self.encode_special_tokens,
            "model_max_length": self.model_max_length,
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "remove_space": False,
        }
        config_path = folder / (prefix + CONFIG_FILE)
        written = self.save_vocabulary(os.fspath(folder), filename_prefix)
        write_text_atomic(config_path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return (str(config_path), *written)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the SentencePiece file as it was read.

        Args:
            save_directory: An existing folder.
            filename_prefix: What the file name starts with, followed by a dash.

        Returns:
            The path.

        Raises:
            OutputError: The file cannot be written.
        """
        path = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + MODEL_FILE)
        # Beside its place and then moved there: the folder may be the one that this tokenizer was read from.
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(self._pieces.data)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        return (str(path),)

    # --- vocabulary ---

    @property
    def unk_token(self) -> str:
        return "<unk>"

    @property
    def pad_token(self) -> str:
        return "<unk>"

    @property
    def eos_token(self) -> str:
        return "</s>"

    @property
    def unk_token_id(self) -> int:
        return 0

    @property
    def pad_token_id(self) -> int:
        return 0

    @property
    def eos_token_id(self) -> int:
        return 2

    @property
    def prefix_ids(self) -> list[int]:
        """The ids in front of every input: [gMASK] and sop."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply: </s>, and in generation 3 the roles that speak next."""
        if self.generation == 2:
            return frozenset({2})
        return frozenset({2, self.get_command("<|user|>"), self.get_command("<|observation|>")})

    def get_prefix_tokens(self) -> list[int]:
        """Official name of `prefix_ids`.

        Returns:
            The ids of [gMASK] and sop.
        """
        return self.prefix_ids

    def get_command(self, token: str) -> int:
        """Gives the id of a control token.

        Args:
            token: Its name, such as "[gMASK]", "sop", "<|user|>", "<eos>".

        Returns:
            Its id.

        Raises:
            TokenizerError: There is no such token in this generation.
        """
        known = self.special_tokens | self.tokenizer.special_tokens
        if token not in known:
            raise TokenizerError(
                f"{token!r} is no control token of generation {self.generation}; expected one of {', '.join(known)}"
            )
        return known[token]

    def piece(self, index: int) -> str:
        """Gives the piece of an id as the official class does: <s>, </s> and <unk> are empty.

        Args:
            index: A token id.

        Returns:
            The piece; in generation 2 control ids are empty, in generation 3 ids behind the vocabulary are.

        Raises:
            TokenIdError: Generation 2 and an id behind the vocabulary.
        """
        if self._outside(index) or index <= 2:
            return ""
        if index < len(self._pieces):
            return self._pieces.texts[index]
        return "" if self.generation == 2 else self.tokenizer.index_special_tokens[index]

    def _outside(self, index: int) -> bool:
        if 0 <= index < len(self._decoder):
            return False
        if index >= 0 and self.generation == 2:
            raise TokenIdError(
                f"token id {index} is out of range: ChatGLM2's tokenizer has {len(self._decoder)} ids, "
                "the model's vocabulary is padded beyond them"
            )
        return True

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Gives pieces for ids.

        Args:
            ids: One id or several.
            skip_special_tokens: Changes nothing, because no token is registered as special.

        Returns:
            One piece or several, see `piece`.
        """
        if isinstance(ids, int):
            return self.piece(ids)
        return [self.piece(int(index)) for index in ids]

    # --- text to ids ---

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text: no prefix ids, and nothing in it is read as a control token, whatever the settings.

        Args:
            text: Any text.

        Returns:
            Token ids, starting with the dummy prefix.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        return self._plain.encode(text, add_special_tokens=False).ids

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Splits text into pieces.

        Args:
            text: The text.
            pair: A second text.
            add_special_tokens: Whether [gMASK] and sop go in front.
            **kwargs: Arguments of the base class.

        Returns:
            The pieces.
        """
        refuse_surrogates((text, pair))
        return super().tokenize(text, pair, add_special_tokens=add_special_tokens, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Encodes a text, or a pair, to ids with [gMASK] and sop in front.

        Args:
            text: The text.
            text_pair: A second text; then </s> ends the ids.
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

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts [gMASK] and sop in front of ids, and </s> behind a pair.

        Args:
            token_ids_0: Ids of the first text.
            token_ids_1: Ids of the second text.

        Returns:
            The ids for the model.
        """
        first = self.prefix_ids + list(token_ids_0)
        return first if token_ids_1 is None else [*first, *token_ids_1, self.eos_token_id]

    # --- ids to text ---

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """Turns ids into text.

        Args:
            token_ids: An id, a list of ids, a list of such lists, or a tensor.
            skip_special_tokens: Changes nothing: generation 2 decodes control ids to nothing, generation 3 to their
                names, as the official classes do.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The text, or one per list. A pending part of a character becomes one U+FFFD per byte.

        Raises:
            TokenIdError: Generation 2 and an id behind the vocabulary.
        """
        ids = to_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode_ids(row) for row in ids]
        return self.decode_ids(ids)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Turns several lists of ids into texts.

        Args:
            sequences: Lists of ids or a tensor.
            skip_special_tokens: See `decode`.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            One text per list.
        """
        return [self.decode_ids([row] if isinstance(row, int) else row) for row in to_lists(sequences)]

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns one list of ids into text, without looking at their form.

        Args:
            ids: Token ids.

        Returns:
            The text, see `decode`.
        """
        return self._decoder.decode(index for index in ids if not self._outside(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces to text.

        Args:
            tokens: Pieces, such as `tokenize` gives.

        Returns:
            The text; a string that is no piece stands for itself.
        """
        ids = [index for token in tokens if (index := self._plain.token_to_id(token)) is not None]
        if len(ids) == sum(map(bool, tokens)):
            return self.decode_ids(ids)
        return "".join(tokens).replace("▁", " ")

    # --- prompts ---

    def build_prompt(self, query: str, history: Sequence[Sequence[str]] | None = None) -> str:
        """Writes the rounds of a ChatGLM2 conversation.

        Args:
            query: The new question.
            history: Earlier (question, answer) pairs.

        Returns:
            The text the model continues; encode it with [gMASK] and sop.

        Raises:
            UsageError: This is a generation-3 tokenizer, whose prompts are made of ids.
        """
        if self.generation != 2:
            raise UsageError("build_prompt is ChatGLM2's; ChatGLM3 has role ids", hint="use build_chat_input")
        rounds = [
            f"[Round {number}]\n\n问：{asked}\n\n答：{answered}\n\n"
            for number, (asked, answered) in enumerate(history or [], start=1)
        ]
        return "".join(rounds) + f"[Round {len(rounds) + 1}]\n\n问：{query}\n\n答："

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Gives the ids of one ChatGLM3 message.

        Args:
            role: "system", "user", "assistant" or "observation".
            metadata: What stands in the header line: a tool's name, or nothing.
            message: The content.

        Returns:
            The role id, the header line with its line end, the content; line and content each have a dummy prefix.

        Raises:
            UsageError: Generation 2, or no such role.
        """
        if self.generation != 3:
            raise UsageError("ChatGLM2 has no roles", hint="use build_prompt, or chat without tools")
        if role not in ROLES:
            raise UsageError(f"no role {role!r}; expected one of {', '.join(ROLES)}")
        return [self.get_command(f"<|{role}|>"), *self.encode_text(f"{metadata}\n"), *self.encode_text(message)]

    def build_chat_input(
        self, query: str, history: Sequence[Mapping[str, Any]] | None = None, role: str = "user"
    ) -> BatchEncoding:
        """Builds the model input of a ChatGLM3 conversation.

        Args:
            query: The new message.
            history: Earlier messages with role, content, and where needed metadata; a system message may have tools.
            role: Who says `query`.

        Returns:
            input_ids, attention_mask, position_ids as tensors (1, T), ending with the assistant id.
        """
        ids = self.prefix_ids
        for item in history or []:
            content = item["content"]
            if item["role"] == "system" and "tools" in item:
                content = join_tools(content, item["tools"])
            ids += self.build_single_message(item["role"], item.get("metadata", ""), content)
        ids += [*self.build_single_message(role, "", query), self.get_command("<|assistant|>")]
        data = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "position_ids": [list(range(len(ids)))]}
        return BatchEncoding(data, tensor_type="pt")


def join_tools(content: str, tools: object) -> str:
    """Appends tools to a system message as ChatGLM3 was trained to read them.

    Args:
        content: The sentence in front of the tools.
        tools: A list or mapping, written as it is.

    Returns:
        Content, a line end, and the tools as JSON with indent 4.
    """
    return content + "\n" + json.dumps(tools, indent=4, ensure_ascii=False)
