"""The tokenizers of GLM (2021): four vocabularies, one class each, and the control tokens that make blanks.

    class                vocabulary                pad=eos  CLS    SEP    MASK   sop    eop    gMASK  sMASK
    GLMBertTokenizer     BERT uncased, 30522       0        101    102    103    30522  30523  -      -
    GLMRobertaTokenizer  RoBERTa, 50265            2        0      2      50264  50265  50266  -      -
    GLMGPT2Tokenizer     GPT-2, 50257              50256    50259  50261  50260  50257  50258  50263  50264
    GLMChineseTokenizer  SentencePiece, 50000      50000    50002  50001  50003  50006  50007  50009  50008

    one text    [CLS] text eos    (BERT: [CLS] text [SEP], RoBERTa: <s> text </s>)

Two codes with different habits read these vocabularies, and `style` says which one is followed:

                                  "hf", the Hugging Face classes      "original", the training repository
    blanks beside a mask token    dropped on both sides               dropped in front of it
    GPT-2's <|endoftext|>         is text                             is the token
    decoding                      a blank around tokens that the      exactly the tokens
                                  vocabulary's file lacks, marks
                                  joined to the word in front
    gMASK and sMASK               GPT-2 and Chinese                   with `task_mask`, any vocabulary
    [dBLOCK]                      -                                   with `decoder_mask`
    Chinese numbers               as above                            as above with `fix_command_token`; without it
                                                                      gMASK is 50007, the number of eop, too

`[UNK]` follows the vocabulary's own or stands behind `[SEP]` (50262, 50004).

Source: tokenization_glm.py of the Hugging Face repositories and data_utils/tokenization.py of the training repository
(behaviour, not code). On purpose different: a tokenizer never returns `token_type_ids`, which no GLM model takes;
`vocab_size` counts the control tokens; ids behind the vocabulary, which models have rows for, decode to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from glmkit.errors import TokenizerError, UsageError
from glmkit.runtime.control import Command
from glmkit.tokenizers.folder import CONFIG_FILE, read_config
from glmkit.tokenizers.glm_files import find_file
from glmkit.tokenizers.glm_tokenizer import GLMTokenizer, Style
from glmkit.tokenizers.glm_vocabularies import BytePieces, SentencePieces, WordPieces, read_file

__all__ = [
    "GLMBertTokenizer",
    "GLMChineseTokenizer",
    "GLMGPT2Tokenizer",
    "GLMRobertaTokenizer",
    "GLMTokenizer",
    "glm_tokenizer_class",
]


class GLMBertTokenizer(GLMTokenizer):
    """The tokenizer of GLM-Base, GLM-Large, GLM-Doc, GLM-410M and GLM-515M.

    Args:
        vocab_file: vocab.txt.
        style: See the module.
        **kwargs: See `GLMTokenizer`.
    """

    vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012 - a class attribute of the base
    official_names = (("vocab.txt", "bert-*-uncased-vocab.txt"),)
    has_task_mask = False

    def __init__(self, vocab_file: str | os.PathLike[str], style: Style = "hf", **kwargs: Any) -> None:
        super().__init__(WordPieces(Path(vocab_file), whole_words=style == "original"), style, **kwargs)

    def _commands(self) -> Iterable[Command]:
        for command in super()._commands():
            padding = command.name in ("pad", "eos")
            yield Command(command.name, "[PAD]" if padding else command.token, command.index, eats=command.eats)

    def _numbers(self) -> dict[str, int]:
        ids, count = self.vocabulary.tokens.index, len(self.vocabulary.tokens)
        own = {"pad": "[PAD]", "ENC": "[CLS]", "MASK": "[MASK]", "unk": "[UNK]", "sep": "[SEP]", "eos": "[PAD]"}
        numbers = {name: ids(token) for name, token in own.items()}
        return numbers | {"sop": count, "eop": count + 1} | self._behind(count + 2)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts [CLS] in front of ids, and [SEP] behind each text; [PAD] is the end of pre-training only.

        Args:
            token_ids_0: Ids of the text.
            token_ids_1: Ids of a second text.

        Returns:
            The ids for the model.
        """
        second = [] if token_ids_1 is None else [*token_ids_1, self.sep_token_id]
        return [self.cls_token_id, *token_ids_0, self.sep_token_id, *second]

    def decode_ids(self, ids: Iterable[int]) -> str:
        """Turns ids into text: words and control tokens with a blank between them, nothing cleaned up.

        Args:
            ids: Token ids.

        Returns:
            The text.
        """
        return " ".join(self._texts(ids)).replace(" ##", "")


class GLMGPT2Tokenizer(GLMTokenizer):
    """The tokenizer of GLM-2B and GLM-10B.

    Args:
        vocab_file: vocab.json.
        merges_file: merges.txt.
        **kwargs: See `GLMTokenizer`.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}  # noqa: RUF012
    official_names = (("vocab.json", "gpt2-vocab.json"), ("merges.txt", "gpt2-merges.txt"))

    def __init__(self, vocab_file: str | os.PathLike[str], merges_file: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(_byte_pieces(vocab_file, merges_file, ("<|endoftext|>",)), **kwargs)

    def _commands(self) -> Iterable[Command]:
        for command in super()._commands():
            if self.style == "hf" and command.name in ("pad", "eos"):
                command = Command(command.name, command.token, command.index, parsed=False)
            yield command

    def _numbers(self) -> dict[str, int]:
        count = len(self.vocabulary.tokens)
        end = self.vocabulary.tokens.index("<|endoftext|>")
        new = ("sop", "eop", "ENC", "MASK", "sep", "unk")
        numbers = {"pad": end, "eos": end} | {name: count + offset for offset, name in enumerate(new)}
        return numbers | self._behind(count + len(new))


class GLMRobertaTokenizer(GLMTokenizer):
    """The tokenizer of GLM-RoBERTa. The blank is RoBERTa's own <mask>; style "hf" reads `[MASK]` as it too.

    Args:
        vocab_file: vocab.json, in fairseq's numbering.
        merges_file: merges.txt, which is that of GPT-2.
        **kwargs: See `GLMTokenizer`.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}  # noqa: RUF012
    official_names = (("vocab.json", "roberta-vocab.json"), ("merges.txt", "roberta-merges.txt"))
    has_task_mask = False
    _own: ClassVar[dict[str, str]] = {
        "pad": "</s>",
        "eos": "</s>",
        "sep": "</s>",
        "ENC": "<s>",
        "MASK": "<mask>",
        "unk": "<unk>",
    }

    def __init__(self, vocab_file: str | os.PathLike[str], merges_file: str | os.PathLike[str], **kwargs: Any) -> None:
        needed = tuple(dict.fromkeys(self._own.values()))
        super().__init__(_byte_pieces(vocab_file, merges_file, needed), **kwargs)

    def _commands(self) -> Iterable[Command]:
        for command in super()._commands():
            if self.style == "hf" and command.name == "MASK":
                command = Command("MASK", self._own["MASK"], command.index, eats="left")
            elif self.style == "hf" and command.name in self._own:
                command = Command(command.name, self._own[command.name], command.index, parsed=False)
            yield command

    def _aliases(self) -> dict[str, str]:
        return {"[MASK]": "MASK"} if self.style == "hf" else {}

    def _numbers(self) -> dict[str, int]:
        count = len(self.vocabulary.tokens)
        numbers = {name: self.vocabulary.tokens.index(token) for name, token in self._own.items()}
        return numbers | {"sop": count, "eop": count + 1} | self._behind(count + 2)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts <s> in front of ids and </s> behind them, and two </s> between a pair.

        Args:
            token_ids_0: Ids of the text.
            token_ids_1: Ids of a second text.

        Returns:
            The ids for the model.
        """
        second = [] if token_ids_1 is None else [self.sep_token_id, *token_ids_1, self.sep_token_id]
        return [self.cls_token_id, *token_ids_0, self.sep_token_id, *second]


class GLMChineseTokenizer(GLMTokenizer):
    """The tokenizer of GLM-Large-Chinese and GLM-10B-Chinese.

    Args:
        vocab_file: cog-pretrain.model.
        style: See the module.
        fix_command_token: Style "original" only: the numbers of GLM-Large-Chinese. Without it they are those that
            GLM-10B-Chinese was trained with, where [gMASK] and eop share an id; its published weights for Hugging Face
            have the row of that id twice and need the fixed ones.
        **kwargs: See `GLMTokenizer`.

    Raises:
        UsageError: Style "hf" with the numbers that are not fixed.
    """

    vocab_files_names = {"vocab_file": "cog-pretrain.model"}  # noqa: RUF012
    official_names = (("cog-pretrain.model",),)
    saved_options = (*GLMTokenizer.saved_options, "fix_command_token")

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        style: Style = "hf",
        fix_command_token: bool = True,
        **kwargs: Any,
    ) -> None:
        if style == "hf" and not fix_command_token:
            raise UsageError(
                "fix_command_token=False with style='hf': the Hugging Face classes know the fixed numbers only",
                hint="use style='original' for a checkpoint of the training repository",
            )
        self.fix_command_token = fix_command_token
        super().__init__(SentencePieces(Path(vocab_file)), style, **kwargs)

    def _numbers(self) -> dict[str, int]:
        count = len(self.vocabulary.tokens)
        numbers = {"pad": count, "eos": count, "sep": count + 1, "ENC": count + 2, "MASK": count + 3, "unk": count + 4}
        numbers |= {"sop": count + 6, "eop": count + 7}
        behind = self._behind(count + (8 if self.fix_command_token else 7))
        if self.task_mask and self.fix_command_token:
            behind["sMASK"], behind["gMASK"] = behind["gMASK"], behind["sMASK"]
        return numbers | behind


def _byte_pieces(
    vocab_file: str | os.PathLike[str], merges_file: str | os.PathLike[str], needed: tuple[str, ...]
) -> BytePieces:
    pieces = BytePieces(Path(vocab_file), Path(merges_file))
    missing = [token for token in needed if token not in pieces.tokens]
    if missing:
        raise TokenizerError(
            f"{vocab_file} lacks {', '.join(missing)}",
            hint="GPT-2's vocabulary has <|endoftext|>, RoBERTa's has <s>, </s>, <unk> and <mask>",
        )
    return pieces


def glm_tokenizer_class(folder: str | os.PathLike[str]) -> type[GLMTokenizer]:
    """Tells which of the four tokenizers a folder holds.

    Args:
        folder: The folder.

    Returns:
        What `tokenizer_class` in tokenizer_config.json says, else what the vocabulary's files say.

    Raises:
        TokenizerError: There is no vocabulary of GLM, or there are several.
    """
    path = Path(folder)
    named = {
        one.__name__: one for one in (GLMBertTokenizer, GLMChineseTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer)
    }
    told = read_config(path / CONFIG_FILE).get("tokenizer_class")
    if isinstance(told, str) and told in named:
        return named[told]
    found: list[type[GLMTokenizer]] = [
        one for one in (GLMChineseTokenizer, GLMBertTokenizer) if find_file(path, one.official_names[0]).is_file()
    ]
    vocabulary = find_file(path, ("vocab.json", "gpt2-vocab.json", "roberta-vocab.json"))
    if vocabulary.is_file():
        found.append(GLMRobertaTokenizer if b'"<mask>"' in read_file(vocabulary) else GLMGPT2Tokenizer)
    if len(found) == 1:
        return found[0]
    names = "cog-pretrain.model, vocab.txt, or vocab.json with merges.txt"
    what = "more than one vocabulary" if found else "no vocabulary"
    raise TokenizerError(
        f"{path} has {what} of GLM; expected one of {names}",
        hint='name the class in tokenizer_config.json, as "tokenizer_class"',
    )
