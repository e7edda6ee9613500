"""The HTTP API: which route does what, and the OpenAPI document about it.

GET  /v1/models, /v1/models/{id}             a base and its adapters
POST /v1/chat/completions                    chat_route.py
GET, DELETE /v1/chat/completions[/{id}]      stored.py
POST /v1/completions                         completion_route.py
POST /tokenize                               what a model would read
POST /                                       legacy.py
GET  /live, /ready, /health, /metrics        health.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from glmkit.chat.following import Served
from glmkit.chat.messages import Message, to_messages
from glmkit.chat.templates import chat_format, prompt_ids
from glmkit.serve.catalogue import Catalogue, Target
from glmkit.serve.chat_route import create_chat_completion
from glmkit.serve.completion_route import create_completion
from glmkit.serve.failures import RESPONSES, APIError
from glmkit.serve.health import add_health
from glmkit.serve.json_body import read_body
from glmkit.serve.legacy import create_legacy_answer
from glmkit.serve.logs import Journal
from glmkit.serve.protection import add_protection
from glmkit.serve.settings import Settings
from glmkit.serve.shapes import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Deleted,
    LegacyAnswer,
    LegacyRequest,
    Model,
    ModelList,
    StoredList,
    TokenizeRequest,
    Tokens,
)
from glmkit.serve.stored import Stored
from glmkit.serve.token_bytes import control_names
from glmkit.serve.tool_calls import offered_tools
from glmkit.serve.tool_calls import to_messages as read_messages

_REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, LegacyRequest)
_SCHEMAS = "#/components/schemas/{model}"
_EVENTS = {
    200: {"content": {"text/event-stream": {"schema": {"description": "chunks of the answer as JSON, then [DONE]"}}}}
}


def create_app(
    served: Served | Mapping[str, Served], settings: Settings | None = None, journal: Journal | None = None
) -> FastAPI:
    """Makes the application.

    Args:
        served: The model, or several by name.
        settings: Keys, limits and deadlines; None: the defaults, for this machine alone.
        journal: Where requests are logged; None: stderr.

    Returns:
        The application with all routes and what protects them.

    Raises:
        UsageError: Two models are called the same.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="glmkit",
        version=version("glmkit"),
        docs_url=None,
        redoc_url=None,
        responses=RESPONSES,
        separate_input_output_schemas=False,
    )
    app.state.catalogue = catalogue = Catalogue(served)
    app.state.stored = None if settings.store is None else Stored(settings.store)
    _add_routes(app)
    engines = {name: one.engine for name, one in catalogue.served.items()}
    add_health(app, settings, engines)
    add_protection(app, settings, tuple(engines.values()), journal)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> None:
    chat, completions = "/v1/chat/completions", "/v1/completions"
    app.add_api_route("/v1/models", list_models, response_model=ModelList)
    app.add_api_route("/v1/models/{model_id:path}", get_model, response_model=Model)
    _post(app, chat, create_chat_completion, ChatRequest, ChatCompletion, streams=True)
    app.add_api_route(chat, list_stored, response_model=StoredList)
    app.add_api_route(chat + "/{completion_id}", get_stored, response_model=ChatCompletion)
    app.add_api_route(chat + "/{completion_id}", delete_stored, methods=["DELETE"], response_model=Deleted)
    _post(app, completions, create_completion, CompletionRequest, Completion, streams=True)
    _post(app, "/tokenize", tokenize, TokenizeRequest, Tokens)
    _post(app, "/", create_legacy_answer, LegacyRequest, LegacyAnswer)


def _post(
    app: FastAPI, path: str, route: Any, body: type[BaseModel], answer: type[BaseModel], streams: bool = False
) -> None:
    """A route that reads its body itself, strictly; the document is told what it expects."""
    schema = {"$ref": _SCHEMAS.format(model=body.__name__)}
    app.add_api_route(
        path,
        route,
        methods=["POST"],
        response_model=answer,
        responses=_EVENTS if streams else None,  # type: ignore[arg-type]
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that FastAPI does not know of."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        _, bodies = models_json_schema([(shape, "validation") for shape in _REQUESTS], ref_template=_SCHEMAS)
        document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        for operations in document["paths"].values():
            for operation in operations.values():
                operation.get("responses", {}).pop("422", None)  # what FastAPI would say; it is 400 here
        app.openapi_schema = document
    return app.openapi_schema


# --- small routes ---


async def list_models(request: Request) -> ModelList:
    """All models."""
    return ModelList(data=_catalogue(request).describe())


async def get_model(request: Request, model_id: str) -> Model:
    """One model.

    Raises:
        APIError: 404: there is none of this name.
    """
    catalogue = _catalogue(request)
    return catalogue.describe_one(catalogue.find(model_id))


async def tokenize(request: Request) -> Response:
    """Says what a model would read: ids and text.

    Raises:
        APIError: Neither a text nor messages, or both.
        UsageError: The messages have no form in this model.
    """
    body, headers = await read_body(request, TokenizeRequest)
    if (body.text is None) == (body.messages is None):
        raise APIError(400, "text: send either text or messages", param="text")
    target = _catalogue(request).find(body.model)
    return JSONResponse(await asyncio.to_thread(_tokens, target, body), headers=headers)


def _tokens(target: Target, body: TokenizeRequest) -> dict[str, Any]:
    ids = _ids(target, body)
    return Tokens(
        tokens=ids, count=len(ids), context_length=target.served.context_tokens, prompt=_prompt_text(target, ids)
    ).model_dump()


def _ids(target: Target, body: TokenizeRequest) -> list[int]:
    tokenizer = target.tokenizer
    if body.text is not None:
        target.check_length(body.text, "text")
        if not body.add_special_tokens:
            return list(tokenizer.encode_text(body.text))
        if target.generation == 0:
            return list(tokenizer.fill_prompt(body.text))
        return list(chat_format(tokenizer).text_ids(tokenizer, body.text))
    messages = read_messages(body.messages or [])
    for message in messages:
        target.check_length(message.content, "messages")
    if target.generation == 0:
        return list(tokenizer.fill_prompt(messages[-1].content))
    return prompt_ids(tokenizer, with_tools(messages, offered_tools(body)))


def with_tools(messages: list[Message], tools: Any) -> list[Message]:
    """The conversation with tools in its system message, as an answer would have it.

    Args:
        messages: The conversation.
        tools: The tools; None leaves it as it is.
    """
    if tools is None:
        return messages
    system = messages[0].content if messages[0].role == "system" else ""
    rest = messages[1:] if messages[0].role == "system" else messages
    return [Message("system", system, tools=tools), *to_messages(rest)]


def _prompt_text(target: Target, ids: list[int]) -> str:
    """Ids as text, control tokens by their names."""
    names = control_names(target.tokenizer)
    parts: list[str] = []
    run: list[int] = []
    for token_id in [*ids, -1]:
        if token_id != -1 and token_id not in names:
            run.append(token_id)
            continue
        if run:
            parts.append(target.tokenizer.decode_ids(run))
            run = []
        parts.append(names.get(token_id, ""))
    return "".join(parts)


async def list_stored(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    order: Literal["asc", "desc"] = "asc",
    model: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """Stored completions in the order of their times.

    Raises:
        APIError: 400: this server stores nothing.
    """
    owner, stored = request.state.record.owner, _stored(request)
    found, more = await asyncio.to_thread(
        lambda: stored.list(owner, limit=limit, after=after, newest_first=order == "desc", model=model)
    )
    ends = {"first_id": found[0]["id"] if found else None, "last_id": found[-1]["id"] if found else None}
    return JSONResponse({"object": "list", "data": found, **ends, "has_more": more})


async def get_stored(request: Request, completion_id: str) -> Response:
    """A stored completion.

    Raises:
        APIError: 400: this server stores nothing. 404: there is none of this id.
    """
    return JSONResponse(await asyncio.to_thread(_stored(request).find, request.state.record.owner, completion_id))


async def delete_stored(request: Request, completion_id: str) -> Deleted:
    """Removes a stored completion.

    Raises:
        APIError: 400: this server stores nothing. 404: there is none of this id.
    """
    await asyncio.to_thread(_stored(request).delete, request.state.record.owner, completion_id)
    return Deleted(id=completion_id)


def _catalogue(request: Request) -> Catalogue:
    found: Catalogue = request.app.state.catalogue
    return found


def _stored(request: Request) -> Stored:
    stored: Stored | None = request.app.state.stored
    if stored is None:
        raise APIError(400, "this server stores nothing; it was started without --store FOLDER", code="store_is_off")
    return stored
