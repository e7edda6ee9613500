"""The control tokens of GLM (2021): their names, and cutting them out of a text."""

from __future__ import annotations

from typing import Any

from glmkit.errors import TokenizerError
from glmkit.runtime.control import Control

MASKS = ("MASK", "sMASK", "gMASK")
# The name of each in the training repository, and how it is written.
TOKENS = {
    "pad": "<|endoftext|>",
    "eos": "<|endoftext|>",
    "sep": "[SEP]",
    "ENC": "[CLS]",
    "MASK": "[MASK]",
    "unk": "[UNK]",
    "sop": "<|startofpiece|>",
    "eop": "<|endofpiece|>",
    "gMASK": "[gMASK]",
    "sMASK": "[sMASK]",
    "dBLOCK": "[dBLOCK]",
}


class MissingMaskError(TokenizerError, NotImplementedError):
    """A mask token that this vocabulary lacks (a NotImplementedError too, as the official classes raise)."""


def _index(name: str) -> Any:
    return property(lambda self: self.control[name].index, doc=f"The id of {TOKENS[name]}.")


def _token(name: str) -> Any:
    return property(lambda self: self.control[name].token)


class CommandNames:
    """The names under which scripts ask a tokenizer for its control tokens, made of its `control`."""

    control: Control

    def get_command(self, name: str) -> int:
        """Gives the id of a control token.

        Args:
            name: As the training repository calls it ("ENC", "MASK", "sop", ...) or as it is written ("[CLS]", ...).

        Returns:
            Its id.

        Raises:
            TokenizerError: There is no such token.
        """
        for command in self.control:
            if name in (command.name, command.token):
                return command.index
        known = ", ".join(dict.fromkeys(command.name for command in self.control))
        raise TokenizerError(f"{name!r} is no control token of this tokenizer; expected one of {known}")

    sop_token, sop_token_id = _token("sop"), _index("sop")  # begins the filling of a blank
    eop_token, eop_token_id = _token("eop"), _index("eop")  # ends it
    mask_token, mask_token_id = _token("MASK"), _index("MASK")
    cls_token, cls_token_id = _token("ENC"), _index("ENC")
    sep_token, sep_token_id = _token("sep"), _index("sep")
    unk_token, unk_token_id = _token("unk"), _index("unk")
    eos_token, eos_token_id = _token("eos"), _index("eos")
    pad_token, pad_token_id = _token("pad"), _index("pad")  # the same id as eos: never infer padding from ids

    @property
    def gmask_token_id(self) -> int:
        """The id of [gMASK], a blank for text that goes on."""
        return self._mask("gMASK")

    @property
    def smask_token_id(self) -> int:
        """The id of [sMASK], a blank for a sentence."""
        return self._mask("sMASK")

    def _mask(self, name: str) -> int:
        if name not in self.control:
            raise MissingMaskError(f"this vocabulary has no [{name}]", hint="use [MASK]")
        return self.control[name].index

    @property
    def mask_token_ids(self) -> list[int]:
        """The ids of all mask tokens there are."""
        return [self.control[name].index for name in MASKS if name in self.control]

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(command.token for command in self.control))

    @property
    def all_special_ids(self) -> list[int]:
        return list(dict.fromkeys(command.index for command in self.control))

    @property
    def special_tokens_map(self) -> dict[str, str]:
        names = ("cls", "eos", "mask", "pad", "sep", "unk")
        return {f"{name}_token": getattr(self, f"{name}_token") for name in names}

    @property
    def prefix_ids(self) -> list[int]:
        """The ids in front of every input: [CLS]."""
        return [self.cls_token_id]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end the filling of a blank: eop and eos."""
        return frozenset({self.eop_token_id, self.eos_token_id})
