"""POST /, as api.py of ChatGLM-6B and ChatGLM2-6B has it: prompt and history in, response and history out.

{"prompt": "你好", "history": [["hello", "hi"]], "max_length": 2048, "top_p": 0.7, "temperature": 0.95}
{"response": "…", "history": [["hello", "hi"], ["你好", "…"]], "status": 200, "time": "2023-03-14 12:00:00"}
"""

from __future__ import annotations

import asyncio
import time

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from glmkit.chat.following import Following, answer
from glmkit.chat.messages import Message, to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.errors import UsageError
from glmkit.serve.catalogue import Catalogue, Target
from glmkit.serve.choices import Choices, prompt_refusal
from glmkit.serve.failures import APIError
from glmkit.serve.json_body import read_body
from glmkit.serve.protection import admit
from glmkit.serve.shapes import LegacyAnswer, LegacyRequest

MAX_LENGTH, TOP_P, TEMPERATURE = 2048, 0.7, 0.95  # api.py's own; zero and missing mean these


async def create_legacy_answer(request: Request) -> Response:
    """Answers one question.

    Args:
        request: With a `LegacyRequest` as its body.

    Raises:
        APIError: The body does not fit, or `max_length` is shorter than the prompt.
        UsageError: The conversation has no form in this model.
        QueueFullError: Too many requests wait.
    """
    body, headers = await read_body(request, LegacyRequest)
    catalogue: Catalogue = request.app.state.catalogue
    target = catalogue.find(None)
    record = admit(request, target.engine)
    history = body.history or []
    messages = to_messages(body.prompt, history=history)
    for message in messages:
        target.check_length(message.content, "prompt" if message is messages[-1] else "history")

    async def begin(number: int) -> Following:
        try:
            return await answer(
                target.served,
                messages,
                owner=record.owner,
                temperature=body.temperature or TEMPERATURE,
                top_p=body.top_p or TOP_P,
                max_new_tokens=await asyncio.to_thread(_room, target, messages, body.max_length or MAX_LENGTH),
            )
        except UsageError as error:
            raise prompt_refusal(error, "prompt") from error

    async with Choices(begin, 1, record) as choices:
        (reply,) = await choices.replies()
    answered = LegacyAnswer(
        response=reply.text,
        history=[*history, [body.prompt, reply.text]],
        status=200,
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    return JSONResponse(answered.model_dump(), headers=headers)


def _room(target: Target, messages: list[Message], max_length: int) -> int:
    """What `max_length`, which counts the prompt too, leaves for the answer."""
    prompt = 0 if target.generation == 0 else len(prompt_ids(target.tokenizer, messages))
    if prompt >= max_length:
        raise APIError(
            400, f"max_length: the prompt has {prompt} tokens, which leaves none for an answer", param="max_length"
        )
    return max_length - prompt
