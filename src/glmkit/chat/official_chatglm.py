"""`chat` and `stream_chat` of ChatGLM-6B, with their signatures, defaults and return values.

The official code reads `<sop>`, `<eop>`, [MASK], `<pad>` and `<unk>` in a question as control tokens, and so do these
methods; `glmkit.chat.templates` does not.

Source: modeling_chatglm.py of ChatGLM-6B (behaviour, not code). On purpose different: the caller's list of logits
processors is not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glmkit.chat.official_replies import decode_reply, process_response_of_chatglm
from glmkit.chat.official_stream import with_invalid_score_processor
from glmkit.chat.rounds import Rounds
from glmkit.chat.templates import FORMATS

Pairs = list[tuple[str, str]]


@torch.inference_mode()
def chat(
    self: Any,
    tokenizer: Any,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    max_length: int = 2048,
    num_beams: int = 1,
    do_sample: bool = True,
    top_p: float = 0.7,
    temperature: float = 0.95,
    logits_processor: Any = None,
    **kwargs: Any,
) -> tuple[str, Pairs]:
    """Answers a question.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: The question.
        history: Earlier (question, answer) pairs.
        max_length: Tokens of prompt and answer.
        num_beams: Beams.
        do_sample: Whether to sample; else greedy.
        top_p: See `SamplingOptions`.
        temperature: See `SamplingOptions`.
        logits_processor: Applied to the logits, in front of the official one against invalid scores.
        **kwargs: Further arguments of `generate`, whose top_k of 50 is active.

    Returns:
        The answer and the new history.
    """
    options = {"max_length": max_length, "num_beams": num_beams, "do_sample": do_sample, "top_p": top_p}
    options |= {"temperature": temperature, "logits_processor": with_invalid_score_processor(logits_processor)}
    ids = _input_ids(self, tokenizer, query, history)
    made = self.generate(input_ids=ids, **options | kwargs).tolist()[0][ids.shape[1] :]
    response = process_response_of_chatglm(self, decode_reply(tokenizer, made))
    return response, [*(history or []), (query, response)]


def stream_chat(
    self: Any,
    tokenizer: Any,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    max_length: int = 2048,
    do_sample: bool = True,
    top_p: float = 0.7,
    temperature: float = 0.95,
    logits_processor: Any = None,
    **kwargs: Any,
) -> Iterator[tuple[str, Pairs]]:
    """Answers a question step by step.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: The question.
        history: Earlier (question, answer) pairs.
        max_length: Tokens of prompt and answer.
        do_sample: Whether to sample; else greedy.
        top_p: See `SamplingOptions`.
        temperature: See `SamplingOptions`.
        logits_processor: See `chat`.
        **kwargs: Further arguments of `stream_generate`.

    Yields:
        The answer so far, also where it is empty or ends in half a character, and the history with it. A mark becomes
        full-width when its neighbour is there.
    """
    options = {"max_length": max_length, "do_sample": do_sample, "top_p": top_p, "temperature": temperature}
    options["logits_processor"] = with_invalid_score_processor(logits_processor)
    ids = _input_ids(self, tokenizer, query, history)
    for made in self.stream_generate(input_ids=ids, **options | kwargs):
        text = decode_reply(tokenizer, made.tolist()[0][ids.shape[1] :])
        response = process_response_of_chatglm(self, text)
        yield response, [*(history or []), (query, response)]


def _input_ids(model: Any, tokenizer: Any, query: str, history: Sequence[tuple[str, str]] | None) -> Tensor:
    rounds = FORMATS[1]
    assert isinstance(rounds, Rounds)
    ids = tokenizer(rounds.text(query, history or ()), return_tensors="pt")["input_ids"]
    return ids.reshape(1, -1).to(model.device)
