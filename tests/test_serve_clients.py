"""The clients that people have, against a server on a socket: openai, LangChain, curl."""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import glmkit
from glmkit.chat.following import Served, serve
from glmkit.serve.app import create_app
from glmkit.serve.settings import ApiKey, Settings
from serving import Listening, quiet

openai = pytest.importorskip("openai")

KEY = "key-of-the-tests"
HELLO = [{"role": "user", "content": "你好"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City name"}},
            "required": ["city"],
        },
    },
}


class Live:
    """A server in a thread of its own, for clients that block."""

    def __init__(self, served: Served, settings: Settings) -> None:
        self.served = served
        self._app = create_app(served, settings, quiet())
        self._settings = settings
        self._there = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self._there.wait()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with Listening(self._app, self._settings) as listening:
            self.url = listening.url
            self._there.set()
            await self._end.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    served = serve(glmkit.load("glm-nano"), "glm-nano", max_running=4, max_waiting=4)
    server = Live(served, Settings(api_keys=(ApiKey.of(KEY),)))
    yield server
    server.close()
    served.close()


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def wait_until_idle(live: Live, seconds: float = 5.0) -> None:
    """Waits until the engine has nothing to do."""
    end = time.monotonic() + seconds
    while live.served.engine.state().busy:
        assert time.monotonic() < end, "the engine is still busy"
        time.sleep(0.005)


# --- the official client ---


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["glm-nano"]
    assert client.models.retrieve("glm-nano").context_length == 1024


def test_an_answer_with_everything(client: Any, live: Live) -> None:
    made = client.chat.completions.create(
        model="glm-nano", messages=HELLO, temperature=0, n=2, logprobs=True, top_logprobs=2, user="u", seed=3
    )
    expected = live.served.loaded.chat("你好", temperature=0).text
    assert [choice.message.content for choice in made.choices] == [expected, expected]
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].logprobs.content[0].top_logprobs[0].token
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made._request_id.startswith("req_")


def test_a_stream_with_usage(client: Any, live: Live) -> None:
    text, usage, count = "", None, 0
    with client.chat.completions.create(
        model="glm-nano", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            count += 1
            usage = chunk.usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
    assert text == live.served.loaded.chat("你好", temperature=0).text
    assert usage is not None
    assert usage.completion_tokens > 0
    assert count > 5


def test_characters_of_several_tokens_arrive_whole(client: Any) -> None:
    prompt, emoji = [6136, 6138], "👩‍👩‍👧"
    ids = client.post("/../tokenize", body={"text": f"说{emoji}", "add_special_tokens": False}, cast_to=object)[
        "tokens"
    ]
    bias = {str(token): 100 for token in ids}
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="glm-nano", prompt=[*prompt, *ids], stream=True, max_tokens=60, logit_bias=bias, seed=5, temperature=2
        )
    ]
    whole = client.completions.create(
        model="glm-nano", prompt=[*prompt, *ids], max_tokens=60, logit_bias=bias, seed=5, temperature=2
    )
    assert "".join(pieces) == whole.choices[0].text
    assert any(ord(letter) > 0x1000 for letter in whole.choices[0].text)
    held = [piece for piece in pieces if "\ufffd" in piece]
    assert "".join(held).count("\ufffd") == whole.choices[0].text.count("\ufffd")


def test_a_tool_is_called_and_answered(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather like in Beijing?"}]
    first = client.chat.completions.create(
        model="glm-nano", messages=messages, tools=[WEATHER], temperature=0, tool_choice="required"
    ).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls"
    assert list(json.loads(call.function.arguments)) == ["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny", "temperature": 21}'}
    second = client.chat.completions.create(
        model="glm-nano", messages=[*messages, first.message, result], tools=[WEATHER], temperature=0
    )
    assert second.choices[0].finish_reason == "stop"
    assert "sunny" in second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens > 50


def test_a_streamed_call_is_put_together_by_the_client(client: Any) -> None:
    with client.chat.completions.stream(
        model="glm-nano",
        messages=[{"role": "user", "content": "What is the weather like in Beijing?"}],
        tools=[WEATHER],
        temperature=0,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    ) as stream:
        done = stream.get_final_completion()
    (call,) = done.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert "city" in json.loads(call.function.arguments)


def test_structured_answers_are_parsed(client: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    kinds = {"sunny": (bool, ...), "degrees": (int, pydantic.Field(ge=-50, le=60))}
    answer = pydantic.create_model("Weather", **kinds)
    parsed = client.chat.completions.parse(model="glm-nano", messages=HELLO, response_format=answer, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, answer)


def test_completions(client: Any) -> None:
    made = client.completions.create(
        model="glm-nano", prompt=["你好", "hello"], max_tokens=4, logprobs=1, temperature=0
    )
    assert [choice.index for choice in made.choices] == [0, 1]
    assert "".join(made.choices[0].logprobs.tokens) == made.choices[0].text


def test_errors_are_the_clients_own(client: Any, live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="glm-nano", messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="glm-nano", messages=[{"role": "user", "content": "长" * 5000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=live.url + "/v1", api_key="another-key", max_retries=0).models.list()


def test_async_clients_share_the_engine_and_a_full_one_says_so(live: Live) -> None:
    async def main() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as client:

            async def one(number: int) -> Any:
                return await client.chat.completions.create(
                    model="glm-nano", messages=[{"role": "user", "content": f"{number}+1"}], max_tokens=8, temperature=0
                )

            alone = [(await one(number)).choices[0].message.content for number in range(4)]
            together = await asyncio.gather(*(one(number) for number in range(4)))
            assert [made.choices[0].message.content for made in together] == alone
            many = await asyncio.gather(
                *(
                    client.chat.completions.create(model="glm-nano", messages=HELLO, n=4, max_tokens=40)
                    for _ in range(6)
                ),
                return_exceptions=True,
            )
            return [made for made in many if not isinstance(made, Exception)], [
                made for made in many if isinstance(made, Exception)
            ]

    answered, refused = asyncio.run(main())
    assert answered
    assert refused
    assert all(isinstance(error, openai.RateLimitError) for error in refused)
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
    wait_until_idle(live)


@pytest.mark.parametrize("count", [1, 4])
def test_a_client_that_leaves_frees_its_place(client: Any, live: Live, count: int) -> None:
    before = live.served.engine.state().aborted
    stream = client.chat.completions.create(
        model="glm-nano", messages=HELLO, n=count, stream=True, temperature=2, max_tokens=900, logit_bias={"2": -100}
    )
    next(iter(stream))
    assert live.served.engine.state().busy
    stream.close()
    wait_until_idle(live)
    assert live.served.engine.state().aborted == before + count


def test_stored_completions_are_off(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="--store"):
        client.chat.completions.list()


# --- LangChain ---


@pytest.fixture
def langchain(live: Live) -> Any:
    package = pytest.importorskip("langchain_openai")
    return package.ChatOpenAI(
        base_url=live.url + "/v1", api_key=KEY, model="glm-nano", temperature=0, max_retries=0, stream_usage=True
    )


def test_langchain_answers_and_streams(langchain: Any, live: Live) -> None:
    expected = live.served.loaded.chat("你好", temperature=0).text
    assert langchain.invoke("你好").content == expected
    chunks = list(langchain.stream("你好"))
    assert "".join(chunk.content for chunk in chunks) == expected
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 5


def test_langchain_agent_calls_a_tool(langchain: Any) -> None:
    agents = pytest.importorskip("langchain.agents")
    tools = pytest.importorskip("langchain_core.tools")
    asked: list[str] = []

    def get_weather(city: str) -> str:
        """Get the weather of a city"""
        asked.append(city)
        return json.dumps({"weather": "sunny", "temperature": 21})

    agent = agents.create_agent(langchain, [tools.tool(get_weather)])
    question = {"messages": [("user", "What is the weather like in Beijing?")]}
    *_, called, result, last = agent.invoke(question, {"recursion_limit": 6})["messages"]
    assert len(asked) == 1
    assert called.tool_calls[0]["args"] == {"city": asked[0]}
    assert result.tool_call_id == called.tool_calls[0]["id"]
    assert "sunny" in last.content


# --- curl ---


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_speaks_the_official_form(live: Live) -> None:
    def curl(*arguments: str) -> Any:
        command = ["curl", "-sS", "--noproxy", "*", "-H", f"Authorization: Bearer {KEY}", *arguments]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)

    body = json.dumps({"prompt": "你好", "history": []}, ensure_ascii=False)
    first = curl("-X", "POST", live.url, "-H", "Content-Type: application/json", "-d", body)
    assert first["status"] == 200
    assert first["history"] == [["你好", first["response"]]]
    again = json.dumps({"prompt": "谢谢", "history": first["history"], "max_length": 512, "top_p": 0.8})
    second = curl("-X", "POST", live.url + "/", "-H", "Content-Type: application/json", "-d", again)
    assert len(second["history"]) == 2
    assert set(second) == {"response", "history", "status", "time"}


# --- the example page ---


class State(SimpleNamespace):
    """Attributes that can be asked for by `in`."""

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


class Page:
    """As much of Streamlit as the example uses: widgets give their defaults, and what is shown is kept."""

    def __init__(self, question: str) -> None:
        self.question = question
        self.shown: list[str] = []
        self.session_state = State()
        self.sidebar = nullcontext()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None  # set_page_config, title

    def selectbox(self, label: str, options: list[str]) -> str:
        return options[0]

    def text_area(self, label: str) -> str:
        return "be kind"

    def slider(self, label: str, low: float, high: float, value: float) -> float:
        assert low <= value <= high
        return value

    def button(self, label: str) -> bool:
        return False

    def chat_input(self, label: str) -> str:
        return self.question

    def chat_message(self, role: str) -> Page:
        self.shown.append(role)
        return self

    def markdown(self, text: str) -> None:
        self.shown.append(text)

    def write_stream(self, pieces: Iterator[str]) -> str:
        self.shown.append("".join(pieces))
        return str(self.shown[-1])


def test_the_streamlit_page_talks_to_the_server(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parents[1] / "examples" / "streamlit_chat.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) < 45
    monkeypatch.setenv("GLMKIT_URL", live.url + "/v1")
    monkeypatch.setenv("GLMKIT_API_KEY", KEY)
    page = Page("你好")
    monkeypatch.setitem(sys.modules, "streamlit", page)  # type: ignore[arg-type]
    for turn in range(2):  # a page runs its script again for every question
        runpy.run_path(str(file))
        assert page.shown[-3:-1] == ["你好", "assistant"]
        assert page.shown[-1]
        assert len(page.session_state.messages) == 2 * (turn + 1)
