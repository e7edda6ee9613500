"""Asks a server many questions at once and notes when each piece of each answer came; a process of its own.

    echo '{"url": "http://127.0.0.1:8000", "requests": [{...}, ...]}' | python bench/serving_client.py

Each request is the body of a streamed chat completion. What comes back, on one line: seconds from the first request to
the last answer, and for each request the seconds at which pieces of text came, and how many tokens the answer has.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx

_SECONDS = 3600.0  # one answer may take so long


async def ask(client: httpx.AsyncClient, body: dict[str, Any], start: float) -> dict[str, Any]:
    """Reads one streamed answer."""
    pieces: list[float] = []
    tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("error"):
                raise RuntimeError(str(event["error"]))
            if any(choice["delta"].get("content") for choice in event["choices"]):
                pieces.append(time.perf_counter() - start)
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return {"pieces": pieces, "tokens": tokens}


async def ask_all(url: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Sends all requests at once and waits for every answer."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_SECONDS, limits=limits, trust_env=False) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, body, start) for body in bodies))
        return {"seconds": time.perf_counter() - start, "answers": answers}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(asyncio.run(ask_all(given["url"], given["requests"]))))
