"""Log-probabilities of an answer's tokens, as the model gave them before any filter, as chat and completions have them.

Only tokens of the content count: not the header line of ChatGLM3 and GLM-4, not a call of a tool, not what ends an
answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from glmkit.chat.templates import FORMATS
from glmkit.engine.decode import Step
from glmkit.serve.catalogue import Target
from glmkit.serve.shapes import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from glmkit.serve.token_bytes import shown


class TokenLog:
    """Takes the steps of one answer as they come.

    Args:
        target: The model.
        top: How many of the most likely tokens are told beside each.
        raw: Whether all tokens are content, as in a completion.
    """

    def __init__(self, target: Target, top: int, raw: bool = False) -> None:
        self._table, self._top = target.parts.tokens, top
        form = FORMATS.get(target.generation)
        divider = None if form is None or raw else form.divider
        self._divider = None if divider is None else target.tokenizer.get_command(divider)
        self._line: bytes | None = None if self._divider is None else b""  # the header so far; None: it is complete
        self._is_call = False
        self._taken = 0
        # SentencePiece's blank in front of a text is in the first token and not in the text.
        self._drops_blank = form is not None and form.dummy_prefix and not raw

    def take(self, steps: Sequence[Step]) -> list[TokenLogprob]:
        """The tokens of the content that are new.

        Args:
            steps: All steps of the answer so far.
        """
        fresh = steps[self._taken :]
        self._taken = len(steps)
        tokens = [self._token(step) for step in fresh if step.is_text and self._is_content(step.token_id)]
        return [token for token in tokens if token.bytes]

    def _is_content(self, token_id: int) -> bool:
        if self._divider is None:
            return True
        if token_id == self._divider:
            self._line, self._is_call = b"", False
            return False
        if self._line is not None:
            self._line += self._table.bytes_of(token_id)
            if b"\n" in self._line:
                self._is_call, self._line = bool(self._line.strip()), None
            return False
        return not self._is_call

    def _token(self, step: Step) -> TokenLogprob:
        likely = [self._told(token_id, logprob) for token_id, logprob in step.top_logprobs[: self._top]]
        one = self._told(step.token_id, step.logprob)
        self._drops_blank = self._drops_blank and not one.bytes
        return TokenLogprob(token=one.token, logprob=one.logprob, bytes=one.bytes, top_logprobs=likely)

    def _told(self, token_id: int, logprob: float) -> TopLogprob:
        data = self._table.bytes_of(token_id)
        if self._drops_blank:
            data = data.removeprefix(b" ")
        # -9999 stands for impossible, as in OpenAI's API: JSON has no infinity.
        return TopLogprob(token=shown(data), logprob=max(logprob, -9999.0), bytes=list(data))


def for_chat(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The form of chat completions.

    Args:
        tokens: The tokens.
    """
    return ChatLogprobs(content=list(tokens))


def for_completion(tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
    """The form of completions.

    Args:
        tokens: The tokens.
        offset: Where the first of them begins in the choice's text.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{one.token: one.logprob for one in token.top_logprobs} for token in tokens],
        text_offset=offsets,
    )
