"""The API in a thread of this process, for measurements and the soak: what `glm serve` runs, on a free port."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import uvicorn

from glmkit.serve.app import create_app
from glmkit.serve.logs import Journal
from glmkit.serve.settings import Settings

_START_SECONDS = 30.0


class Server:
    """A server in a thread; a `with` block starts and ends it. It does not close what it serves.

    Args:
        served: The model, see `glmkit.chat.following.serve`.

    Attributes:
        url: Where it listens, inside the block.
    """

    def __init__(self, served: Any) -> None:
        self._nowhere = os.open(os.devnull, os.O_WRONLY)  # a log is written, and costs what it costs
        app = create_app(served, Settings(port=0), Journal(self._nowhere))
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> Server:
        self._thread.start()
        end = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(_START_SECONDS)
        os.close(self._nowhere)
