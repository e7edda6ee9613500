"""The web app: its page, the files that belong to conversations, signing in, and the process that serves it all."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response

from glmkit.chat.interchange import MEDIA_TYPES
from glmkit.errors import GlmkitError
from glmkit.web.actions import Actions
from glmkit.web.desk import Desk
from glmkit.web.gate import FILE_POLICY, MAX_BODY_BYTES, Access, Gate
from glmkit.web.login import COOKIE, SESSION_SECONDS
from glmkit.web.look import asset, gradio, theme
from glmkit.web.page import build
from glmkit.web.texts import LANGUAGES, Language, say
from glmkit.web.wiring import Wiring

_MAX_FORM_BYTES = 16_384
_ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}


def create_app(desk: Desk, access: Access, language: Language = "zh") -> FastAPI:
    """Makes the web app.

    Args:
        desk: What it works on.
        access: Who may come in.
        language: Of a page that asks for none.

    Returns:
        An ASGI application; its life ends the desk's conversations.
    """
    gr = gradio()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    _add_files(app, desk)
    _add_login(app, access, language)
    page = build(language, user_known=access.passwords is not None)
    Wiring(Actions(page, desk, language)).connect()
    page.blocks.queue(default_concurrency_limit=None, api_open=False)
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,
        auth_dependency=(lambda request: request.scope.get("glm.user") or None)
        if access.passwords is not None
        else None,
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=False,
        max_file_size=MAX_BODY_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
    )
    app.add_middleware(Gate, access=access)
    return app


def _add_files(app: FastAPI, desk: Desk) -> None:
    """What belongs to conversations: pictures, exports, files of the interpreter; each for its owner only."""

    @app.get("/live")
    async def live() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/glm/{name}")
    async def get_asset(name: str) -> Response:
        if name not in _ASSETS:
            return _nothing()
        return Response(asset(name), media_type=_ASSETS[name], headers={"cache-control": "no-cache"})

    @app.get("/figures/{id}/{name}")
    async def get_figure(request: Request, id: str, name: str) -> Response:
        try:
            png = (await desk.open(request.scope["glm.user"], id)).figures[name]
        except (GlmkitError, KeyError):
            return _nothing()
        return Response(png, media_type="image/png", headers={"content-security-policy": FILE_POLICY, **_PRIVATE})

    @app.get("/files/{id}/{name}")
    async def get_file(request: Request, id: str, name: str) -> Response:
        try:
            talk = await desk.open(request.scope["glm.user"], id)
            # Not in a thread: meanwhile the folder's handle could be closed, and its number be that of another folder.
            content = desk.interpreters.of(talk.id).read_file(name)
        except GlmkitError:
            return _nothing()
        return _attachment(content, name, "application/octet-stream")

    @app.get("/export/{file}")
    async def get_export(request: Request, file: str) -> Response:
        id, _, form = file.rpartition(".")
        try:
            talk = await desk.open(request.scope["glm.user"], id)
            chosen = request.query_params.get("language", "")
            text = desk.export(talk, form, chosen if chosen in LANGUAGES else "en")
        except GlmkitError:
            return _nothing()
        return _attachment(text.encode(), f"{talk.title or 'chat'}.{form}", MEDIA_TYPES[form])


# Without a referrer at all a browser says that the form comes from nowhere (Origin: null), which the gate refuses.
_LOGIN_HEADERS = {"cache-control": "no-store", "referrer-policy": "same-origin"}
_PRIVATE = {"cache-control": "private, no-store"}


def _nothing() -> Response:
    return PlainTextResponse("not found", 404, headers={"content-security-policy": FILE_POLICY})


def _attachment(content: bytes, name: str, kind: str) -> Response:
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
    return Response(content, media_type=kind, headers={"content-security-policy": FILE_POLICY, **headers, **_PRIVATE})


# --- signing in ---


def _add_login(app: FastAPI, access: Access, language: Language) -> None:
    passwords, sessions = access.passwords, access.sessions

    def page(request: Request, problem: str = "", status: int = 200) -> Response:
        preferred = request.headers.get("accept-language", "")[:2].lower()
        chosen: Language = preferred if preferred in LANGUAGES else language
        text = login_page(chosen, problem and say(chosen, problem))
        return Response(text, status, media_type="text/html", headers=_LOGIN_HEADERS)

    @app.get("/login")
    async def get_login(request: Request) -> Response:
        return page(request) if passwords is not None else RedirectResponse("/", 303)

    @app.post("/login")
    async def post_login(request: Request) -> Response:
        if passwords is None:
            return RedirectResponse("/", 303)
        address = request.client.host if request.client is not None else ""
        if not sessions.begin_try(address):
            return page(request, "sign_in_slow", 429)
        form = parse_qs((await _form(request)).decode("utf-8", "replace"))
        name, password = (form.get(field, [""])[0] for field in ("user", "password"))
        if not await asyncio.to_thread(passwords.check, name or "glm", password):
            return page(request, "sign_in_wrong", 401)
        sessions.has_succeeded(address)
        response = RedirectResponse("/", 303)
        secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
        response.set_cookie(
            COOKIE, sessions.begin(name or "glm"), SESSION_SECONDS, httponly=True, samesite="strict", secure=secure
        )
        return response

    @app.get("/logout")
    async def get_logout(request: Request) -> Response:
        sessions.end(request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response


async def _form(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_FORM_BYTES:
            return b""
    return body


def login_page(language: Language, problem: str = "") -> str:
    """The page on which people sign in, as HTML.

    Args:
        language: Of its words.
        problem: Why it was not possible just now.
    """
    said = f'<p class="problem" role="alert">{html.escape(problem)}</p>' if problem else ""
    return (
        f'<!doctype html><html lang="{language}"><head><meta charset="utf-8"><title>glm web</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="stylesheet" href="/glm/page.css"></head><body class="glm-login"><main>'
        '<h1><span class="mark" aria-hidden="true"></span>glm web</h1><form method="post" action="/login">'
        f"{said}<label>{say(language, 'user')}"
        '<input name="user" autocomplete="username" placeholder="glm" autofocus></label>'
        f'<label>{say(language, "password")}<input name="password" type="password" required '
        f'autocomplete="current-password"></label><button>{say(language, "sign_in")}</button></form></main></body>'
        "</html>"
    )
