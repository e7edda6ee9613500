"""How a question with examples in front of it is put to a model, and which token is the letter of an answer.

    chat    every example is a turn: the user asks, the assistant answers. What follows the last question is the answer
    text    one text for models that were not trained to chat:  opening, question, answer, ..., question
    blank   the text, with a blank where the answer belongs: GLM and GLM-130B

A letter is one of several tokens: SentencePiece has "A" and "▁A", with the blank in front, and which of them follows
depends on what stands there. It is not looked up but found: the prompt is encoded with each letter behind it, as
training encodes an answer, and the token in which the results differ is the letter's. What they share is the prompt.

    ChatGLM2    … 答 ： | ▁A              an answer is encoded for itself, and so begins with the blank
    ChatGLM3    … <|assistant|> ▁ \\n | ▁A        the same, behind the header line
    ChatGLM-6B  … [gMASK] sop | ▁A
    GLM-4       … <|assistant|> \\n | A
    text        … ▁Answer : | ▁A         … 答案 ： | A        it goes on within the text
    blank       … [MASK] sop | ▁A
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids, chat_format, prompt_ids
from glmkit.errors import DataError, UsageError
from glmkit.loading import Loaded

Form = Literal["chat", "text", "blank"]
Made = TypeVar("Made")

_READS_BOTH_WAYS = 1  # the generation whose text is closed before its answer begins


@dataclass(frozen=True)
class Asked:
    """A question and what is shown in front of it.

    Args:
        question: With the words that ask for the answer, "Answer:" say.
        examples: Other questions, with their answers.
        opening: What stands in front of everything.
        joint: What stands in a text between question and answer; a blank where words are divided by blanks.
    """

    question: str
    examples: tuple[tuple[str, str], ...] = ()
    opening: str = ""
    joint: str = ""

    def messages(self) -> list[Message]:
        """The question as the last of several turns."""
        turns = [*self.examples, (self.question, "")]
        turns[0] = (self._opened(turns[0][0]), turns[0][1])
        said = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn)]
        return said[:-1]

    def text(self) -> str:
        """The question as the end of a text."""
        shown = [f"{question}{self.joint}{answer}\n\n" for question, answer in self.examples]
        return self._opened("".join([*shown, self.question]))

    def _opened(self, text: str) -> str:
        return f"{self.opening}\n\n{text}" if self.opening else text


def form_of(loaded: Loaded, wanted: str | None = None) -> Form:
    """The form in which a model is asked.

    Args:
        loaded: The model.
        wanted: "chat" or "text"; None: "text" for the base models of the families table, "chat" for all others that
            have a chat format.

    Raises:
        UsageError: It is no form, or none for this model.
        DataError: The model has no tokenizer.
    """
    if wanted not in (None, "chat", "text"):
        raise UsageError(f"prompt={wanted!r}: expected chat or text")
    if loaded.tokenizer is None:
        raise DataError(
            f"{loaded.path} has no tokenizer, so nothing can be asked",
            hint="copy the tokenizer's files from the checkpoint's original repository",
        )
    if loaded.tokenizer.generation == 0:
        if wanted is not None:
            raise UsageError(f"prompt={wanted!r}: {type(loaded.model).__name__} fills blanks", hint="leave it out")
        return "blank"
    base = loaded.family is not None and not loaded.family.chat
    return cast(Form, wanted) if wanted else "text" if base else "chat"


def open_ids(tokenizer: Any, form: Form, asked: Asked) -> list[int]:
    """The ids behind which the model writes its answer.

    Args:
        tokenizer: The model's tokenizer.
        form: See `form_of`.
        asked: The question.

    Raises:
        DataError: A blank is to be filled, and the text has one of its own.
    """
    if form == "chat":
        return prompt_ids(tokenizer, asked.messages())
    if form == "text":
        return chat_format(tokenizer).text_ids(tokenizer, asked.text())
    return _blank_ids(tokenizer, asked.text())


def letter_ids(tokenizer: Any, form: Form, asked: Asked, letters: Sequence[str]) -> tuple[list[int], list[int]]:
    """The ids behind which the model chooses a letter, and the ids of the letters there.

    Args:
        tokenizer: The model's tokenizer.
        form: See `form_of`.
        asked: The question.
        letters: What it chooses from.

    Returns:
        The prompt, and one id for each letter.

    Raises:
        DataError: The letters are not one token each, and each another; or as in `open_ids`.
    """
    return _divided(_answered(tokenizer, form, asked, letters), letters)


def fitted(asked: Asked, made: Callable[[Asked], Made], fits: Callable[[Made], bool]) -> Made | None:
    """Leaves out examples, the first ones first, until a prompt fits.

    Args:
        asked: The question.
        made: Makes a prompt of it.
        fits: Whether the prompt does.

    Returns:
        The prompt; None if that of the question alone does not fit.
    """
    while True:
        prompt = made(asked)
        if fits(prompt):
            return prompt
        if not asked.examples:
            return None
        asked = replace(asked, examples=asked.examples[1:])


def _answered(tokenizer: Any, form: Form, asked: Asked, letters: Sequence[str]) -> list[list[int]]:
    if form == "chat":
        start = prompt_ids(tokenizer, asked.messages())
        return [[*start, *answer_ids(tokenizer, Message("assistant", letter), last=False)] for letter in letters]
    if form == "blank":
        start = _blank_ids(tokenizer, f"{asked.text()}[MASK]")
        return [[*start, *tokenizer.encode_text(f" {letter}")] for letter in letters]
    ids_of = chat_format(tokenizer).text_ids
    if tokenizer.generation == _READS_BOTH_WAYS:
        return [[*ids_of(tokenizer, asked.text()), *tokenizer.encode_text(letter)] for letter in letters]
    return [ids_of(tokenizer, f"{asked.text()}{asked.joint}{letter}") for letter in letters]


def _blank_ids(tokenizer: Any, text: str) -> list[int]:
    if "MASK]" in text.removesuffix("[MASK]"):
        raise DataError(f"a question has a mask token of its own: {text[:80]!r}", hint="leave that subject out")
    return [*tokenizer.fill_prompt(text), tokenizer.get_command("sop")]


def _divided(rows: Sequence[Sequence[int]], letters: Sequence[str]) -> tuple[list[int], list[int]]:
    """Rows that differ in their last token alone, as what they share and those tokens."""
    ends = [row[-1] for row in rows]
    if len(set(ends)) < len(rows) or any(list(row[:-1]) != list(rows[0][:-1]) for row in rows):
        raise DataError(f"in this vocabulary {', '.join(letters)} are not one token each, so none can be chosen")
    return list(rows[0][:-1]), ends
