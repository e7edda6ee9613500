"""What the four tokenizers of GLM (2021) share: control tokens in a text, truncation, decoding, files.

A text goes two ways. `encode_text` takes it as it is. Everything else cuts the control tokens out of it first, so that
`[MASK]` in a question is the blank to fill:

    "One is [MASK] two."  ->  "One is", 50260, " two."  ->  vocabulary  ->  ids

Source: tokenization_glm.py of the Hugging Face repositories and data_utils/tokenization.py of the training repository
(behaviour, not code).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from glmkit.errors import TokenizerError, UsageError
from glmkit.hf import BatchEncoding, TokenizersBackend
from glmkit.runtime.control import Command, Control
from glmkit.runtime.vocabulary import refuse_surrogates
from glmkit.tokenizers.batches import clean_up, cut_pair, to_lists
from glmkit.tokenizers.folder import CONFIG_FILE, HUB_ARGUMENTS, folder_to_save_in, kept_arguments, read_config
from glmkit.tokenizers.glm_builders import generation_inputs, multiple_choice_inputs
from glmkit.tokenizers.glm_control import MASKS, TOKENS, CommandNames
from glmkit.tokenizers.glm_files import ADDED_FILE, fetch_folder, find_file, refuse_other_numbers
from glmkit.tokenizers.glm_vocabularies import Vocabulary
from glmkit.writing import write_bytes_atomic, write_text_atomic

Style = Literal["hf", "original"]


class GLMTokenizer(CommandNames, TokenizersBackend):
    """What the four tokenizers share; use one of the four in `glmkit.tokenizers.glm`.

    Args:
        vocabulary: The files.
        style: Whose habits are followed, see `glmkit.tokenizers.glm`.
        task_mask: Whether there are [gMASK] and [sMASK]; None: GPT-2 and Chinese have them.
        decoder_mask: Whether there is [dBLOCK].
        padding_side: Side of the padding; "right" unless the folder says otherwise.
        truncation_side: Which end is cut; "left", so that the end of a long text stays.
        **kwargs: `name_or_path` and `model_max_length` are kept; special tokens of a configuration are fixed here.

    Raises:
        TokenizerError: A file is missing, broken or of another kind, or the length is no number.
        UsageError: There is no such style or side, or a switch is neither true nor false.
    """

    generation = 0  # fills blanks, holds no conversation
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - a class attribute of the base
    padding_side = "right"
    truncation_side = "left"

    has_task_mask: ClassVar[bool] = True
    official_names: ClassVar[tuple[tuple[str, ...], ...]] = ()  # of each file, the first one is written
    saved_options: ClassVar[tuple[str, ...]] = (
        "style",
        "task_mask",
        "decoder_mask",
        "padding_side",
        "truncation_side",
        "model_max_length",
    )

    def __init__(
        self,
        vocabulary: Vocabulary,
        style: Style = "hf",
        task_mask: bool | None = None,
        decoder_mask: bool = False,
        padding_side: str = "right",
        truncation_side: str = "left",
        **kwargs: Any,
    ) -> None:
        if style not in ("hf", "original"):
            raise UsageError(f"style={style!r:.40}: expected 'hf' or 'original'")
        for side in (padding_side, truncation_side):
            if side not in ("left", "right"):
                raise UsageError(f"a side is {side!r:.80}: expected 'left' or 'right'")
        if not isinstance(task_mask, (bool, type(None))) or not isinstance(decoder_mask, bool):
            raise UsageError(f"task_mask={task_mask!r:.80}, decoder_mask={decoder_mask!r:.80}: expected true or false")
        self.vocabulary = vocabulary
        self.style = style
        self.task_mask = self.has_task_mask if task_mask is None else task_mask
        self.decoder_mask = decoder_mask
        self.control = Control(tuple(self._commands()), self._aliases())
        extra = {one.token: one.index for one in self.control if one.token not in vocabulary.tokens}
        super().__init__(
            tokenizer_object=vocabulary.backend(extra),
            padding_side=padding_side,
            truncation_side=truncation_side,
            **kept_arguments(kwargs),
        )

    # --- the control tokens ---

    def _numbers(self) -> dict[str, int]:
        """Official name of every control token to its id, in official order."""
        raise NotImplementedError

    def _commands(self) -> Iterable[Command]:
        for name, index in self._numbers().items():
            eats = ("left" if name in MASKS else "") if self.style == "original" else "both"
            yield Command(name, TOKENS[name], index, eats=eats)

    def _aliases(self) -> dict[str, str]:
        return {}  # other ways to write a token, and its name

    def _behind(self, start: int) -> dict[str, int]:
        """The optional tokens, numbered from `start`."""
        names = ["gMASK", "sMASK"] * self.task_mask + ["dBLOCK"] * self.decoder_mask
        return {name: start + offset for offset, name in enumerate(names)}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, control tokens included."""
        return len(self)

    def __len__(self) -> int:
        return max(len(self.vocabulary.tokens), 1 + max(command.index for command in self.control))

    # --- text to ids ---

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text: nothing in it is read as a control token.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        return self.vocabulary.encode([text])[0]

    def encode_with_masks(self, text: str) -> list[int]:
        """Encodes text in which `[MASK]` and the other control tokens mean what they say; adds nothing.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        return self._encode_all([text])[0]

    def fill_prompt(self, text: str) -> list[int]:
        """Encodes a text with blanks for filling; the caller appends `sop_token_id` and generates.

        Args:
            text: A text; without a mask token it gets one at its end, [gMASK] or where there is none [MASK].

        Returns:
            [CLS], the text, and eos unless the text ends in [gMASK].

        Raises:
            TokenizerError: The text has a mask token that this vocabulary lacks, and none that it has.

        Source:
            generate_samples.py of the training repository.
        """
        if "MASK]" not in text:
            text += " [gMASK]" if "gMASK" in self.control else " [MASK]"
        ids = self.encode_with_masks(text)
        if not set(ids) & set(self.mask_token_ids):
            known = " and ".join(f"[{name}]" for name in MASKS if name in self.control)
            raise TokenizerError(f"no mask token in {text[-80:]!r}; this vocabulary has {known}")
        end = [] if text.endswith("[gMASK]") else [self.eos_token_id]
        return [*self.prefix_ids, *ids, *end]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        refuse_surrogates(list(texts))
        blank_is_empty = self.style == "original"
        split = [[] if blank_is_empty and not text.strip() else self.control.split(text) for text in texts]
        plain = [part for parts in split for part in parts if isinstance(part, str)]
        encoded = iter(self.vocabulary.encode(plain))
        return [[i for part in parts for i in ([part] if isinstance(part, int) else next(encoded))] for parts in split]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts [CLS] in front of ids and the end behind them.

        Args:
            token_ids_0: Ids of the text.
            token_ids_1: Ids of a second text; only BERT's and RoBERTa's classes take one.

        Returns:
            The ids for the model.

        Raises:
            UsageError: There is a second text and this class takes none.
        """
        if token_ids_1 is not None:
            raise UsageError(
                f"{type(self).__name__} encodes no pairs",
                hint="write both texts into one, with [MASK] in it",
            )
        return [self.cls_token_id, *token_ids_0, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Counts the control tokens that are put around a text.

        Args:
            pair: Whether for a pair.

        Returns:
            How many.
        """
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Splits text into tokens.

        Args:
            text: The text.
            pair: A second text.
            add_special_tokens: Whether [CLS] and the end stand around it.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The tokens.
        """
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens)
        return list(map(self.convert_ids_to_tokens, ids))

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        """Encodes a text to ids.

        Args:
            text: The text.
            text_pair: A second text.
            add_special_tokens: Whether [CLS] and the end stand around it.
            **kwargs: See `__call__`.

        Returns:
            Token ids.
        """
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
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
            text: A text or a list of texts; `[MASK]` in them means the token.
            text_pair: Second texts, where the class takes them.
            add_special_tokens: Whether [CLS] and the end stand around each.
            padding: True or "longest" pads to the longest text, "max_length" to `max_length`.
            truncation: True cuts to `max_length` on `truncation_side`, so that [CLS] and the end stay.
            max_length: Most tokens, control tokens included; None takes `model_max_length`.
            return_tensors: "pt" or "np" for arrays (B, T) int64, None for lists.
            return_attention_mask: False leaves the mask out.
            pad_to_multiple_of: Pads further, to a multiple of this.
            padding_side: Instead of the tokenizer's own side.
            **kwargs: Refused if they ask for something; none of transformers' others are done here.

        Returns:
            input_ids and attention_mask (1 text, 0 padding).

        Raises:
            TokenizerError: A text has a lone surrogate.
            UsageError: An argument that is not done here.
        """
        wrong = [name for name, value in kwargs.items() if value and name != "verbose"]
        if wrong or not isinstance(text, (str, list, tuple)):
            what = f"the argument {', '.join(wrong)} is not supported" if wrong else f"expected texts, got {type(text)}"
            raise UsageError(f"{type(self).__name__}: {what}")
        single = isinstance(text, str)
        first = self._encode_all([text] if isinstance(text, str) else list(text))
        second = None if text_pair is None else self._encode_all([text_pair] if single else list(text_pair))
        if truncation is None:
            truncation = max_length is not None and padding in (False, None, "do_not_pad")
        cut = truncation not in (False, "do_not_truncate")
        limit = (self.model_max_length if max_length is None else max_length) if cut else None
        rows = [
            self._row(ids, None if second is None else second[number], add_special_tokens, limit)
            for number, ids in enumerate(first)
        ]
        data: dict[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if padding not in (False, None, "do_not_pad") or pad_to_multiple_of is not None:
            data = dict(
                super().pad(
                    data,
                    padding=padding or "longest",
                    max_length=max_length if padding == "max_length" else None,
                    pad_to_multiple_of=pad_to_multiple_of,
                    padding_side=padding_side,
                )
            )
        if return_attention_mask is False:
            del data["attention_mask"]
        if single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)

    def _row(self, first: list[int], second: list[int] | None, around: bool, limit: int | None) -> list[int]:
        """Cuts and joins."""
        if limit is not None:
            added = self.num_special_tokens_to_add(second is not None) if around else 0
            cut_pair(first, second, limit, added, self.truncation_side)
        return self.build_inputs_with_special_tokens(first, second) if around else first + (second or [])

    # --- ids to text ---

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns ids into text: control tokens by name, nothing cleaned up, ids behind the vocabulary dropped.

        Args:
            ids: Token ids.

        Returns:
            The text.
        """
        return "".join(self._texts(ids))

    def _texts(self, ids: Iterable[int]) -> list[str]:
        """The texts of the runs of ids between control tokens, and those tokens; the vocabulary's own are in runs."""
        tokens = self.vocabulary.tokens
        found: list[str] = []
        run: list[int] = []
        for index in ids:
            token = self.control.token_of.get(index)
            if 0 <= index < len(tokens) and token in (None, tokens[index]):
                run.append(index)
            elif token is not None:
                found += [self.vocabulary.decode(run)] * bool(run) + [token]
                run = []
        return found + [self.vocabulary.decode(run)] * bool(run)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turns ids into text as the official class of this style does.

        Args:
            token_ids: An id, a list of ids, a list of such lists, or a tensor.
            skip_special_tokens: Whether control tokens are left out.
            clean_up_tokenization_spaces: Whether the blank in front of marks is dropped; None: in style "hf".
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The text, or one per list.
        """
        ids = to_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        if skip_special_tokens:
            ids = [index for index in ids if index not in self.control.token_of]
        text = " ".join(self._texts(ids)) if self.style == "hf" else self.decode_ids(ids)
        if self.style == "hf" if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            text = clean_up(text)
        return text

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

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Gives tokens for ids.

        Args:
            ids: One id or several.
            skip_special_tokens: Whether control tokens are left out.

        Returns:
            One token or several; ids behind the vocabulary have empty ones.
        """
        if isinstance(ids, int):
            inside = 0 <= ids < len(self.vocabulary.tokens)
            return self.control.token_of.get(ids) or (self.vocabulary.tokens[ids] if inside else "")
        kept = (int(index) for index in ids if not skip_special_tokens or int(index) not in self.control.token_of)
        return [self.convert_ids_to_tokens(index) for index in kept]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens to text.

        Args:
            tokens: Tokens, such as `tokenize` gives.

        Returns:
            The text, see `decode_ids`.
        """
        return self.decode_ids(self.convert_tokens_to_ids(tokens))

    # --- model inputs ---

    def build_inputs_for_generation(
        self,
        model_input: Mapping[str, Any],
        max_gen_length: int = 512,
        targets: str | Sequence[str] | None = None,
        padding: bool = False,
    ) -> BatchEncoding:
        """Builds the inputs of filling the first blank of every row, or of learning to.

        Args:
            model_input: What the tokenizer returned: input_ids and attention_mask (B, S).
            max_gen_length: Most tokens to generate, or to learn, eop included.
            targets: What fills the blanks, to learn from.
            padding: With `targets`: whether rows are padded to `max_gen_length` instead of to the longest target.

        Returns:
            To generate: input_ids (B, S + 1) with sop behind, position_ids (B, 2, S + G), generation_attention_mask
            (B, 1, S + G, S + G); pass them to `model.generate` with `eos_token_id=tokenizer.eop_token_id`.
            To learn: input_ids and labels (B, S + G), position_ids, attention_mask. The labels stand where they are
            predicted, so the loss shifts nothing; -100 is ignored. A target that is too long loses its eop.

        Raises:
            TokenizerError: A row has no mask token; the message says which.
            UsageError: The number of targets is not that of rows.
        """
        return generation_inputs(self, model_input, max_gen_length, targets, padding)

    def build_inputs_for_multiple_choice(
        self, model_input: Mapping[str, Any], choices: Sequence[Sequence[str]], max_length: int | None = None
    ) -> BatchEncoding:
        """Builds the inputs of scoring several answers to every row in one pass.

        Args:
            model_input: What the tokenizer returned: input_ids and attention_mask (B, S).
            choices: The answers to each row.
            max_length: Most tokens of a row with its answers; None sets no limit.

        Returns:
            input_ids (B, T), position_ids (B, 2, T), attention_mask (B, 1, T, T); choice_ids, the ids of every answer,
            and choice_indices, where the model predicts them.

        Raises:
            TokenizerError: A row has no [MASK]; the message says which.
            UsageError: There is not a list of choices for every row, one is empty, or a row is too long.
        """
        return multiple_choice_inputs(self, model_input, choices, max_length)

    # --- loading and saving ---

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> GLMTokenizer:
        """Loads the tokenizer of a checkpoint folder or hub id without running any file of it.

        Args:
            pretrained_model_name_or_path: A folder with the vocabulary under its official name or the name that the
                training repository gives it, or a hub id.
            *init_inputs: Not used.
            **kwargs: Arguments of the class and the usual ones for the hub (`revision`, `token`, `cache_dir`, ...).

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: See the class; also if added_tokens.json numbers a control token differently.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        folder = (
            Path(name, hub.get("subfolder") or "")
            if os.path.isdir(name)
            else fetch_folder(name, cls.official_names, hub)
        )
        files = [find_file(folder, names) for names in cls.official_names]
        saved = read_config(folder / CONFIG_FILE)
        arguments = {key: saved[key] for key in cls.saved_options if key in saved} | kwargs
        tokenizer: GLMTokenizer = cls(*files, name_or_path=name, **arguments)  # type: ignore[arg-type]
        refuse_other_numbers(folder / ADDED_FILE, {one.token: one.index for one in tokenizer.control})
        return tokenizer

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Writes the vocabulary as it was read, and what the official class needs beside it.

        Args:
            save_directory: The folder; it is made if it does not exist.
            legacy_format: Ignored: there is one format.
            filename_prefix: What the file names start with, followed by a dash.
            push_to_hub: Not supported here.
            **kwargs: Ignored, for callers that pass more.

        Returns:
            The paths.

        Raises:
            UsageError: `push_to_hub` is set, or `save_directory` is a file.
            OutputError: A file cannot be written.
        """
        folder = folder_to_save_in(save_directory, push_to_hub)
        config = {
            "tokenizer_class": type(self).__name__,
            **{key: getattr(self, key) for key in self.saved_options},
            **self.special_tokens_map,
        }
        added = {one.token: one.index for one in self.control if one.index >= len(self.vocabulary.tokens)}
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        written = self.save_vocabulary(os.fspath(folder), filename_prefix)
        for name, content in ((CONFIG_FILE, config), (ADDED_FILE, added)):
            write_text_atomic(folder / (prefix + name), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            written += (os.fspath(folder / (prefix + name)),)
        return written

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the vocabulary's files as they were read, under their official names.

        Args:
            save_directory: An existing folder.
            filename_prefix: What the file names start with, followed by a dash.

        Returns:
            The paths.

        Raises:
            OutputError: A file cannot be written.
        """
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        paths = []
        for name, data in self.vocabulary.files.items():
            paths.append(Path(save_directory, prefix + name))
            write_bytes_atomic(paths[-1], data)
        return tuple(map(os.fspath, paths))
