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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, processors

from glmkit.errors import TokenizerError, UsageError
from glmkit.hf import BatchEncoding
from glmkit.tokenizers.chat_tokenizer import ChatTokenizer, TokenIdError
from glmkit.tokenizers.folder import MODEL_FILE, decide_generation
from glmkit.tokenizers.sentencepiece_bpe import build_tokenizer, piece_table, read_pieces
from glmkit.tokenizers.view import SentencePieceView

CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("system", "user", "assistant", "observation")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)


class ChatGLMTokenizer(ChatTokenizer):
    """The tokenizer of ChatGLM2 and ChatGLM3, and of CodeGeeX2, which is a ChatGLM2.

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
    saved_options: ClassVar[tuple[str, ...]] = (*ChatTokenizer.saved_options, "encode_special_tokens")

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
                hint="AutoTokenizer.from_pretrained takes the right class, which is ChatGLM1Tokenizer",
            )
        pieces = read_pieces(path)
        self.generation = decide_generation(path.parent, generation)
        control = CONTROL_TOKENS + (ROLE_TOKENS if self.generation == 3 else ())
        plain = build_tokenizer(pieces, control)
        prefix = [(name, len(pieces) + CONTROL_TOKENS.index(name)) for name in ("[gMASK]", "sop")]
        plain.post_processor = processors.TemplateProcessing(
            single="[gMASK] sop $A", pair="[gMASK] sop $A $B </s>", special_tokens=[*prefix, ("</s>", 2)]
        )
        super().__init__(path, pieces.data, plain, padding_side, **kwargs)
        self.pieces = pieces
        # Generation 2 decodes control ids to nothing, generation 3 to their names.
        self._decoder = piece_table(pieces, control if self.generation == 3 else [""] * len(control))
        self.tokenizer = SentencePieceView(self, len(pieces), control, pieces.data)
        self.special_tokens = {"<bos>": 1, "<eos>": 2, "<pad>": 0, "<unk>": 0}
        self.encode_special_tokens = encode_special_tokens
        if encode_special_tokens and self.generation == 3:
            self.add_tokens([AddedToken(name, special=True, normalized=False) for name in ROLE_TOKENS])

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

    @property
    def commands(self) -> dict[str, int]:
        """The ids that only templates write, by name."""
        return self.special_tokens | self.tokenizer.special_tokens

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
        if index < len(self.pieces):
            return self.pieces.texts[index]
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

    # --- text to ids ---

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
        ids = [index for token in tokens if (index := self.plain.token_to_id(token)) is not None]
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
