"""The tokenizer of GLM-130B: ice_text.model behind 20,000 ids of image tokens.

    0..19999 images | 20000 <unk>  20001 <s>  20002 </s>  20003 <pad>  20004 <n>  20005..149999 pieces
    150000 [MASK]  150001 [gMASK]  150002 [sMASK]  150003 eod  150004 sop  150005 eop  150006 ENC  150007 dBLOCK
    150008 tab  150009..150087 runs of 2 to 80 blanks, then bytes

    model input   text with masks, `</s>` unless it ends in a mask, sop

The command `eos` is `</s>`, not eod. Source: icetk-glm-130B and generate.py of GLM-130B (behaviour, not code).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glmkit.errors import TokenizerError
from glmkit.runtime.vocabulary import refuse_surrogates
from glmkit.tokenizers.folder import CONFIG_FILE, HUB_ARGUMENTS, find_model_file, folder_to_save_in, read_config
from glmkit.tokenizers.ice_text import MODEL_FILE, IceText
from glmkit.writing import write_bytes_atomic, write_text_atomic

IMAGE_TOKENS = 20_000
MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
_PIECES = {  # command -> the piece that stands for it in the file
    **{name: name for name in MASKS},
    "eod": "<unused_0>",
    "sop": "<sop>",
    "eop": "<eop>",
    "ENC": "<ENC>",
    "dBLOCK": "<dBLOCK>",
    "eos": "</s>",
    "bos": "<s>",
    "pad": "<pad>",
    "unk": "<unk>",
}
_MASK = re.compile(r"(\[[gs]?MASK\])")


class GLM130BTokenizer:
    """Text to ids and back, and prompts with blanks.

    Args:
        vocab_file: The SentencePiece file, usually `<folder>/ice_text.model`.
        num_image_tokens: Ids in front of the text's; 20,000 in the release.

    Raises:
        TokenizerError: The file is missing, broken or of another kind.
    """

    generation = 0
    padding_side = "left"

    def __init__(self, vocab_file: str | os.PathLike[str], num_image_tokens: int = IMAGE_TOKENS) -> None:
        if isinstance(num_image_tokens, bool) or not isinstance(num_image_tokens, int) or num_image_tokens < 0:
            raise TokenizerError(
                f"num_image_tokens={num_image_tokens!r:.40}: expected a whole number, {IMAGE_TOKENS:,}"
            )
        self.vocab_file = os.fspath(vocab_file)
        self.text = IceText(Path(vocab_file), num_image_tokens)
        self.num_image_tokens = num_image_tokens
        self._commands = {command: self.text.ids[piece] for command, piece in _PIECES.items()}

    # --- vocabulary ---

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model's vocabulary is padded beyond it."""
        return len(self.text)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def prefix_ids(self) -> list[int]:
        """The ids in front of every input: none."""
        return []

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end the filling of a blank: eop and eos."""
        return frozenset({self.get_command("eop"), self.get_command("eos")})

    @property
    def mask_token_ids(self) -> list[int]:
        """The ids of [MASK], [gMASK] and [sMASK]."""
        return [self.get_command(name) for name in MASKS]

    @property
    def eos_token_id(self) -> int:
        """`</s>`, which stands behind a text."""
        return self.get_command("eos")

    @property
    def pad_token_id(self) -> int:
        """`<pad>`."""
        return self.get_command("pad")

    def get_command(self, name: str) -> int:
        """Gives the id of a control token.

        Args:
            name: [MASK], [gMASK], [sMASK], eod, sop, eop, ENC, dBLOCK, eos, bos, pad or unk, with or without < >.

        Returns:
            Its id.

        Raises:
            TokenizerError: There is no such token.
        """
        found = self._commands.get(name.strip("<>"))
        if found is None:
            raise TokenizerError(
                f"{name!r} is no control token of GLM-130B; expected one of {', '.join(self._commands)}"
            )
        return found

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
        return self.text.encode(text)

    def encode(self, text: str) -> list[int]:
        """Encodes text in which [MASK], [gMASK] and [sMASK] mean what they say; adds nothing.

        Args:
            text: Any text; what stands between masks is encoded part by part, each with its own blank in front.

        Returns:
            Token ids.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        ids: list[int] = []
        for part in _MASK.split(text):
            ids += [self.get_command(part)] if part in MASKS else self.encode_text(part)
        return ids

    def fill_prompt(self, text: str) -> list[int]:
        """Encodes a text with blanks for filling; the caller appends sop and generates.

        Args:
            text: A text; without a mask it gets [gMASK] at its end.

        Returns:
            The text, and eos unless it ends in a mask.

        Raises:
            TokenizerError: The text has a lone surrogate.
        """
        if not _MASK.search(text):
            text += "[gMASK]"
        ids = self.encode(text)
        return ids if text.endswith(MASKS) else [*ids, self.eos_token_id]

    # --- ids to text ---

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns ids into text.

        Args:
            ids: Token ids; control tokens, image tokens and ids behind the vocabulary are nothing.

        Returns:
            The text.
        """
        return self.text.decode([index for index in ids if self.num_image_tokens <= index < len(self.text)])

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids into text: the usual name of `decode_ids`.

        Args:
            ids: As in `decode_ids`.

        Returns:
            The text.
        """
        return self.decode_ids(ids)

    # --- loading and saving ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> GLM130BTokenizer:
        """Loads the tokenizer of a folder or hub id.

        Args:
            pretrained_model_name_or_path: A folder with ice_text.model, the file, or a hub id.
            **kwargs: `num_image_tokens`, and the usual arguments for the hub.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: See the class.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        vocab_file = find_model_file(name, hub, MODEL_FILE)
        saved = read_config(vocab_file.parent / CONFIG_FILE)
        told = kwargs.get("num_image_tokens", saved.get("num_image_tokens", IMAGE_TOKENS))
        return cls(vocab_file, num_image_tokens=told)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> tuple[str, ...]:
        """Writes ice_text.model as it was read, and a tokenizer_config.json.

        Args:
            save_directory: The folder; it is made if it does not exist.

        Returns:
            The two paths.

        Raises:
            UsageError: `save_directory` is a file.
            OutputError: A file cannot be written.
        """
        folder = folder_to_save_in(save_directory)
        config = {"tokenizer_class": type(self).__name__, "num_image_tokens": self.num_image_tokens}
        write_bytes_atomic(folder / MODEL_FILE, self.text.data)
        write_text_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        return str(folder / MODEL_FILE), str(folder / CONFIG_FILE)
