"""From the flags of `glm web` to a page that runs: models, passwords, tools, the interpreter, and the process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glmkit.chat.following import Served, serve
from glmkit.chat.store import ConversationStore
from glmkit.chat.tools import CODE_TOOLS
from glmkit.errors import UsageError
from glmkit.loading import load, name_adapters
from glmkit.location import locate
from glmkit.serve.server import http_server, listen, url_of
from glmkit.serve.settings import Settings, is_loopback
from glmkit.tools.examples import SAFE_TOOLS
from glmkit.tools.registry import Registry
from glmkit.web.app import create_app
from glmkit.web.desk import Desk
from glmkit.web.gate import Access
from glmkit.web.interpreters import open_interpreters
from glmkit.web.login import Passwords, Sessions
from glmkit.web.models import Models
from glmkit.web.texts import LANGUAGES, Language

PASSWORD_VARIABLE = "GLMKIT_WEB_PASSWORD"
_NO_PASSWORD_HINT = "--password-file FILE, or the variable " + PASSWORD_VARIABLE
_OFFERED = ("get_weather", "calculator", "get_time")  # of the examples; small models are confused by more
_TICK_SECONDS = 0.1
_LEAVE_SECONDS = 3.0


@dataclass(frozen=True)
class Request:
    """What `glm web` was asked for.

    Args:
        models: Folders, names or hub ids; the first is loaded at once, the others when somebody chooses them.
        loading: Arguments of `glmkit.load`; adapters belong to the first model.
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        allowed_hosts: Names in the Host header beside localhost, IP addresses and `host` itself.
        share: Make the page public through gradio's tunnel.
        password_file: File with `name:password` lines.
        language: Of a page that asks for none.
        minimum: The least isolation of the code interpreter: "full" or "reduced".
        unsafe: Run code also where there is next to no isolation.
        tools: A Python file whose public functions become tools; each call of them is asked for.
        store: Folder of the conversations; None: that of the user.
    """

    models: tuple[str, ...]
    loading: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 7860
    allowed_hosts: tuple[str, ...] = ()
    share: bool = False
    password_file: Path | None = None
    language: str = "zh"
    minimum: str = "full"
    unsafe: bool = False
    tools: Path | None = None
    store: Path | None = None


def launch(request: Request) -> int:
    """Serves the page until the process is told to end.

    Args:
        request: What was asked for.

    Returns:
        The exit code.

    Raises:
        GlmkitError: A model is not there or cannot be loaded, no password where one is needed, or the address cannot be
            listened on.
    """
    language = _language(request.language)
    passwords = read_passwords(request)
    fetch = bool(request.loading.get("download"))
    names = {_called(name): str(Path(locate(name, download=fetch)).absolute()) for name in request.models}
    adapters = {name: folder.absolute() for name, folder in name_adapters(request.loading.get("adapter")).items()}
    request = replace(request, loading={**request.loading, "adapter": adapters or None})
    registry = read_tools(request.tools)
    _check_port(request.port)
    listener = listen(request.host, request.port)
    with _private_folder():
        return asyncio.run(_serve(request, names, registry, Access(Sessions(), passwords), listener, language))


def read_passwords(request: Request) -> Passwords | None:
    """The passwords, from the file or the environment; the variable is removed, so that no child process has it.

    Args:
        request: What was asked for.

    Raises:
        UsageError: There is none although others can reach the page.
    """
    variable = os.environ.pop(PASSWORD_VARIABLE, None)
    if request.password_file is not None:
        return Passwords.read(request.password_file)
    if variable:
        return Passwords([variable])
    if request.share or not is_loopback(request.host):
        where = "--share" if request.share else f"--host {request.host}"
        raise UsageError(f"{where} lets others reach the page, and there is no password", hint=_NO_PASSWORD_HINT)
    return None


def read_tools(path: Path | None) -> Registry:
    """The examples, and the public functions of somebody's own file, which is run for that.

    Args:
        path: The file; None: only the examples.

    Raises:
        UsageError: It cannot be run, or a function in it cannot be a tool.
    """
    registry = Registry(SAFE_TOOLS)
    if path is None:
        return registry
    spec = importlib.util.spec_from_file_location("glmkit_user_tools", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path} is no Python file", hint="--tools my_tools.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    for name, value in vars(module).items():
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__:
            registry.add(value)
    return registry


async def _serve(
    request: Request,
    names: Mapping[str, str],
    registry: Registry,
    access: Access,
    listener: socket.socket,
    language: Language,
) -> int:
    def begin(name: str) -> Served:
        loading = dict(request.loading)
        if name != next(iter(names)):
            loading.pop("adapter", None)
        return serve(load(names[name], **loading), name)

    models = Models(list(names), begin, folders=names)
    hosts = {name.lower() for name in (*request.allowed_hosts, request.host)}
    interpreters = await open_interpreters(request.minimum, unsafe=request.unsafe)
    # What runs in the sandbox needs nobody's consent.
    isolated = interpreters.isolation is not None and interpreters.isolation.safe
    safe = [tool.name for tool in SAFE_TOOLS] + (list(CODE_TOOLS.values()) if isolated else [])
    offered = [tool.name for tool in registry if tool.name in _OFFERED or tool.name not in safe]
    desk = Desk(ConversationStore(request.store), models, registry, safe, interpreters, offered)
    try:
        await models.load(models.first)
        url = url_of(listener)
        if request.share:
            shared = await asyncio.to_thread(_share, listener)
            hosts.add(shared.removeprefix("https://"))
        app = create_app(desk, replace(access, hosts=frozenset(hosts)), language)
        print(f"glm web: {url} (Ctrl-C ends it)", flush=True)
        if request.share:
            print(f"public: {shared}", flush=True)
        await _run(app, listener)
    finally:
        await asyncio.to_thread(models.close)
    return 0


async def _run(app: Any, listener: socket.socket) -> None:
    """Answers until a signal; running answers end then, and what was said of them is kept."""
    settings = Settings(max_header_bytes=64 * 2**10, idle_seconds=60, write_seconds=120)
    server = http_server(app, settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
    async with app.router.lifespan_context(app):
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not stop.is_set() and not serving.done():
            await asyncio.sleep(_TICK_SECONDS)
        server.should_exit = True
        await asyncio.wait({serving}, timeout=_LEAVE_SECONDS)
        server.force_exit = True
    if not serving.done():
        await serving


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} does not exist", hint="0 to 65535; 0 takes a free one")


def _language(language: str) -> Language:
    if language not in LANGUAGES:
        raise UsageError(f"there is no language {language!r}", hint=" or ".join(LANGUAGES))
    return language


def _share(listener: socket.socket) -> str:
    """A public address, from gradio's tunnel; the only thing here that reaches out, and only when asked to."""
    import secrets

    from gradio.networking import setup_tunnel

    _, port = listener.getsockname()[:2]
    return str(setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None))


@contextlib.contextmanager
def _private_folder() -> Iterator[None]:
    """Works in an empty private folder: gradio may hand out what lies below the working and the temporary folder."""
    before, variables = Path.cwd(), {name: os.environ.get(name) for name in ("TMPDIR", "GRADIO_TEMP_DIR")}
    with tempfile.TemporaryDirectory(prefix="glm-web-", ignore_cleanup_errors=True) as folder:
        work = Path(folder) / "work"
        for name in ("work", "temporary", "uploads"):
            (Path(folder) / name).mkdir(mode=0o700)
        os.environ["TMPDIR"], os.environ["GRADIO_TEMP_DIR"] = f"{folder}/temporary", f"{folder}/uploads"
        tempfile.tempdir = None  # read again
        os.chdir(work)
        try:
            yield
        finally:
            os.chdir(before)
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            tempfile.tempdir = None


def _called(name: str) -> str:
    """What people call a model: its name; of a folder its last part."""
    return Path(name.rstrip("/")).name if Path(name).is_dir() else name
