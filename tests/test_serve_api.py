"""The API's shapes: what clients may send, what they get, and what they are told when it does not fit."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

import glmkit
from glmkit.chat.following import Served, serve
from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids, conversation_ids, prompt_ids
from glmkit.chat.tools import ToolCallError, parse_json_call, parse_tool_call
from glmkit.engine.decode import Step, Usage
from glmkit.errors import GenerationError, QueueFullError, UsageError
from glmkit.serve.app import create_app
from glmkit.serve.catalogue import Catalogue
from glmkit.serve.logs import Journal
from glmkit.serve.settings import ApiKey, Settings
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from test_adapters import write_lora
from tiny import say, train_tokenizer, write_model
from tiny_families import write_chatglm, write_glm, write_glm4

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "你好"}]
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": "get_time", "description": "Time", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]


@contextmanager
def client_of(served: Served, **settings: Any) -> Iterator[TestClient]:
    app = create_app(served, Settings(**settings), Journal(os.open(os.devnull, os.O_WRONLY)))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    served = serve(glmkit.load("glm-nano"), "glm-nano")
    yield served
    served.close()


@pytest.fixture(scope="module")
def api(nano: Served) -> Iterator[TestClient]:
    with client_of(nano) as client:
        yield client


class Script:
    """An engine that says given ids, whatever it is asked, and keeps what it was given."""

    def __init__(self, ids: Sequence[int] = (), fails_after: int | None = None, full: bool = False) -> None:
        self.ids, self.fails_after, self.full = list(ids), fails_after, full
        self.prompts: list[list[int]] = []
        self.readers: list[tuple[str | None, str | None]] = []

    def check_room(self, places: int = 1) -> None:
        if self.full:
            raise QueueFullError("64 requests wait already, at most 64 may", hint="try again")

    def state(self) -> Any:
        return SimpleNamespace(max_running=16, max_waiting=64)

    def wake(self) -> None:
        """Nobody sleeps."""

    def stream(self, prompt: Sequence[int], options: Any, *, stop_ids: Any, max_new_tokens: int, **more: Any) -> Any:
        self.prompts.append(list(prompt))
        self.readers.append((more.get("adapter"), more.get("owner")))
        return _Said(self._steps(frozenset(stop_ids), max_new_tokens))

    def _steps(self, stops: frozenset[int], limit: int) -> Iterator[Step]:
        usage = Usage(0, len(self.prompts[-1]), 1, 0.1, 0.1)
        for number, token in enumerate(self.ids):
            if number == self.fails_after:
                raise GenerationError("secret words of the engine")
            finish = "stop" if token in stops else "length" if number + 1 == limit else None
            yield Step(token, -0.5, finish, usage if finish else None)
            if finish:
                return


class _Said:
    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def __next__(self) -> Step:
        return next(self._steps)

    def do_not_wait(self, notify: Any) -> None:
        """All of it is there."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(train_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model"), generation=3)


def scripted(tokenizer: ChatGLMTokenizer, script: Script, generation: int = 3) -> Served:
    config = SimpleNamespace(vocab_size=len(tokenizer) + 20, max_position_embeddings=1024)
    model = SimpleNamespace(config=config, generation_config=None)
    return Served(SimpleNamespace(model=model, tokenizer=tokenizer), script, "script")  # type: ignore[arg-type]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def ask(client: TestClient, path: str = CHAT, **body: Any) -> Any:
    if path == CHAT:
        body.setdefault("messages", HELLO)
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


# --- models, tokens ---


def test_models_have_their_context_and_no_paths(api: TestClient) -> None:
    (model,) = api.get("/v1/models").json()["data"]
    assert model["id"] == "glm-nano"
    assert model["context_length"] == 1024
    assert model["root"] == "glm-nano"
    assert api.get("/v1/models/glm-nano").json() == model
    assert "/" not in json.dumps(model)
    missing = api.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_adapters_are_models_and_keys_are_owners(tokenizer: ChatGLMTokenizer) -> None:
    script = Script(say(tokenizer, "好"))
    served = scripted(tokenizer, script)
    served.model.glm_adapters = SimpleNamespace(names=("ads", "law"))
    keys = (ApiKey.of("first-key-1"), ApiKey.of("second-key-2"))
    with client_of(served, api_keys=keys) as client:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("first-key-1", "second-key-2"))
        models = client.get("/v1/models", headers=one).json()["data"]
        assert [(model["id"], model["parent"], model["root"]) for model in models] == [
            ("script", None, "script"),
            ("ads", "script", "script"),
            ("law", "script", "script"),
        ]
        for model, headers in (("ads", one), ("script", one), (None, two), ("law", two)):
            for path, body in ((CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})):
                answered = client.post(path, json={"model": model, **body}, headers=headers).json()
                assert answered["model"] == (model or "script")
    adapters = [adapter for adapter, _ in script.readers[::2]]
    owners = [owner for _, owner in script.readers]
    assert adapters == ["ads", None, None, "law"]
    assert owners == [keys[0].owner] * 4 + [keys[1].owner] * 4
    with pytest.raises(UsageError, match="two models"):
        create_app({"ads": served})


def test_tokenize_gives_what_an_answer_reads(tokenizer: ChatGLMTokenizer) -> None:
    script = Script(say(tokenizer, "好"))
    with client_of(scripted(tokenizer, script)) as client:
        conversation = [{"role": "developer", "content": "be kind"}, *HELLO]
        ask(client, messages=conversation, tools=TOOLS)
        told = ask(client, "/tokenize", messages=conversation, tools=TOOLS)
        assert told["tokens"] == script.prompts[0]
        assert told["count"] == len(script.prompts[0])
        assert told["prompt"].startswith("[gMASK]sop<|system|>\n be kind\n[\n")
        assert told["prompt"].endswith("<|user|>\n 你好<|assistant|>")
        text = ask(client, "/tokenize", text="<|user|> 你好")
        assert text["prompt"] == "[gMASK]sop<|user|> 你好"
        assert tokenizer.get_command("<|user|>") not in text["tokens"]
        bare = ask(client, "/tokenize", text="你好", add_special_tokens=False)
        assert bare["tokens"] == tokenizer.encode_text("你好")


# --- chat ---


def test_stream_and_whole_answer_are_the_same(api: TestClient, nano: Served) -> None:
    expected = nano.loaded.chat("你好", temperature=0)
    whole = ask(api, temperature=0)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["object"] == "chat.completion"
    usage = whole["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    body = {"messages": HELLO, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    response = api.post(CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == usage["completion_tokens"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(chunk["usage"] is None and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == expected.text
    assert len(chunks) > 4
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_many_choices_have_seeds_of_their_own(api: TestClient) -> None:
    settings = {"n": 4, "temperature": 1.5, "seed": -7, "max_tokens": 12}
    first, again = (ask(api, **settings)["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in first]
    assert [choice["index"] for choice in first] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in again]
    assert ask(api, **{**settings, "n": 1})["choices"][0]["message"]["content"] == texts[0]
    *chunks, _done = events(api.post(CHAT, json={"messages": HELLO, "stream": True, **settings}).text)
    for number, text in enumerate(texts):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == number]
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"]


def test_the_fingerprint_is_that_of_the_weights_and_of_what_computes_them(
    nano: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fingerprint(name: str = "glm-nano", **loading: Any) -> str:
        loaded = glmkit.load("glm-nano", **loading)
        return Catalogue(Served(loaded, nano.engine, "base" if "adapter" in loading else name)).find(name).fingerprint

    same = Catalogue(nano).find(None).fingerprint
    assert fingerprint() == same
    others = [fingerprint(dtype="float16"), fingerprint(quantize="int8"), fingerprint("other")]
    base = Path(glmkit.__file__).parent / "builtin" / "glm-nano"
    adapters = [{"ads": write_lora(tmp_path / str(seed), base, seed=seed)} for seed in (1, 2)]
    assert len({same, *(fingerprint("ads", adapter=adapter) for adapter in adapters)}) == 3
    monkeypatch.setattr(torch, "__version__", "0.1")
    others.append(fingerprint())
    assert len({same, *others}) == 5


def test_length_stop_and_both_names_of_the_limit(api: TestClient) -> None:
    short = ask(api, temperature=0, max_tokens=3)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert ask(api, temperature=0, max_completion_tokens=3.0)["choices"] == short["choices"]
    assert ask(api, temperature=0, max_tokens=400, max_completion_tokens=3)["choices"] == short["choices"]
    whole = ask(api, temperature=0, max_tokens=2**31 - 1)["choices"][0]["message"]["content"]
    stop = whole[4:6]
    for stops in (stop, [stop, "never"]):
        stopped = ask(api, temperature=0, stop=stops)["choices"][0]
        assert stopped["message"]["content"] == whole.split(stop)[0]
        assert stopped["finish_reason"] == "stop"


def test_cached_tokens_are_told(api: TestClient) -> None:
    first = ask(api, temperature=0, messages=[{"role": "user", "content": "hello, who are you? 一二三"}])
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    messages = [{"role": "user", "content": "hello, who are you? 一二三"}, said, {"role": "user", "content": "thanks"}]
    second = ask(api, temperature=0, messages=messages)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] <= cached < second["usage"]["prompt_tokens"]


def test_fields_of_no_effect_are_named_and_others_refused(api: TestClient) -> None:
    response = api.post(
        CHAT,
        json={"messages": HELLO, "max_tokens": 1, "user": "u", "service_tier": "auto", "a b\r\nc": 1, "audio": None},
    )
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "service_tier, a?b??c, audio"
    refused = api.post(CHAT, json={"messages": HELLO, "reasoning_effort": "low"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reasoning_effort"
    assert refused.json()["error"]["code"] == "unsupported_parameter"


def test_text_parts_and_names_are_read(tokenizer: ChatGLMTokenizer) -> None:
    script = Script(say(tokenizer, "好"))
    with client_of(scripted(tokenizer, script)) as client:
        parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
        messages = [
            {"role": "system", "content": "a"},
            {"role": "developer", "content": [{"type": "text", "text": "b"}]},
            {"role": "user", "content": parts, "name": "tea"},
        ]
        ask(client, messages=messages)
    expected = [Message("system", "a\nb"), Message("user", "hello\nworld")]
    assert script.prompts[0] == prompt_ids(tokenizer, expected)


# --- refusals ---

_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-320}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": 2**63}, "max_completion_tokens"),
    ({"seed": 2**200}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": "a" * 1001}, "stop"),
    ({"stop": 1}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"store": True}, "store"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}] * 10_001}, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "assistant"}, *HELLO]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "长" * 3000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "长" * 300_000}]}, "messages"),
    ({"model": 1}, "model"),
    ({"tools": [{"type": "python"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "tools[0]"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": TOOLS * 65}, "tools"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "functions": [WEATHER]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"functions": [WEATHER], "function_call": {"name": "other"}}, "function_call"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ({"guided_regex": "(a+)+"}, "guided_regex"),
    ({"prompt_logprobs": 2**31}, "prompt_logprobs"),
    ({"best_of": 2**31}, "best_of"),
]


@pytest.mark.parametrize(("change", "param"), _REFUSED, ids=lambda value: json.dumps(value)[:50])
def test_what_does_not_fit_is_refused_by_its_name(api: TestClient, change: dict[str, Any], param: str) -> None:
    response = api.post(CHAT, json={"messages": HELLO, "max_tokens": 1, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert len(response.text) < 2000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'"text"', 400),
        (b"null", 400),
        (b'{"messages": [], "messages": []}', 400),
        (b'{"messages": [], "temperature": NaN}', 400),
        (b'{"messages": [], "temperature": -Infinity}', 400),
        (b'{"messages": [], "temperature": 1e999}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "x": "\\udfff"}', 400),
        (b'{"\\ud800": 1}', 400),
        (b"\xef\xbb\xbf{}", 400),
        ('{"messages": []}'.encode("utf-16"), 400),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b'{"messages": []} x', 400),
        (b'{"seed": ' + b"9" * 5_000_000 + b"}", 400),
        (b'{"seed": ' + b"9" * 301 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": ' + b"9" * 300 + b"}", 400),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"x": ' + b"[" * 101 + b"]" * 101 + b"}", 400),
        (b'{"x": ' + b'{"a":' * 100_000, 400),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_json_is_read_strictly(api: TestClient, body: bytes, status: int) -> None:
    started = time.process_time()
    response = api.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_only_json_in_utf8_is_read(api: TestClient, headers: dict[str, str]) -> None:
    body = json.dumps({"messages": HELLO}).encode()
    assert api.post(CHAT, content=body, headers=headers).status_code == 415
    good = {"content-type": "application/json; charset=UTF-8"}
    body = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
    assert api.post(CHAT, content=body, headers=good).status_code == 200


def test_prompts_around_the_edge_of_the_context(api: TestClient) -> None:
    def tokens(count: int) -> list[int]:
        return [820] * count

    for count, status in ((1023, 200), (1024, 400), (102_400, 400)):
        response = api.post("/v1/completions", json={"prompt": tokens(count), "max_tokens": 5, "temperature": 0})
        assert response.status_code == status
        if status == 200:
            assert response.json()["usage"]["completion_tokens"] == 1
            assert response.json()["choices"][0]["finish_reason"] in ("length", "stop")
        else:
            assert response.json()["error"]["code"] == "context_length_exceeded"


def test_oldest_turns_that_do_not_fit_are_told(api: TestClient) -> None:
    old = [{"role": "user", "content": "很长" * 2000}, {"role": "assistant", "content": "好"}]
    assert ask(api, messages=[*old, *HELLO], max_tokens=4)["dropped_turns"] == 1
    assert "dropped_turns" not in ask(api, max_tokens=4)


def test_long_conversations_of_short_turns_cost_little(api: TestClient) -> None:
    turns = [{"role": role, "content": "一二三四五六七八" * 10} for role in ("user", "assistant")] * 4999
    started = time.process_time()
    assert ask(api, messages=[*turns, *HELLO], max_tokens=2)["dropped_turns"] > 4900
    assert time.process_time() - started < 5


@pytest.mark.parametrize("unit", [" ", "好", "\u200b", "ab", "\n", "👩\u200d👧", "7"])
def test_a_megabyte_of_one_kind_is_refused_soon(api: TestClient, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    started = time.process_time()
    response = api.post(CHAT, json={"messages": [{"role": "user", "content": text}]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert time.process_time() - started < 10


# --- tools ---


def test_second_turn_of_tools_is_the_training_format(api: TestClient, nano: Served, monkeypatch: Any) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    stream = nano.engine.stream

    def spy(prompt: Sequence[int], *args: Any, **options: Any) -> Any:
        generation = stream(prompt, *args, **options)
        seen.append((list(prompt), generation))  # type: ignore[arg-type]
        return generation

    monkeypatch.setattr(nano.engine, "stream", spy)
    question = {"role": "user", "content": "北京今天天气怎么样？"}
    first = ask(api, messages=[question], tools=TOOLS[:1], temperature=0, tool_choice="required")
    message, reason = first["choices"][0]["message"], first["choices"][0]["finish_reason"]
    assert message["content"] is None
    assert reason == "tool_calls"
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"weather": "晴"}'}
    answered = ask(api, messages=[question, message, result], tools=TOOLS[:1], temperature=0)
    assert answered["choices"][0]["finish_reason"] == "stop"
    assert answered["choices"][0]["message"]["content"]
    trained = [
        Message("system", "", tools=[WEATHER]),
        Message("user", question["content"]),
        Message("assistant", "", "get_weather", arguments=arguments),
        Message("observation", '{"weather": "晴"}'),
        Message("assistant", answered["choices"][0]["message"]["content"]),
    ]
    ids, _ = conversation_ids(nano.tokenizer, trained)
    prompt, _ = seen[1]
    assert ids[: len(prompt)] == prompt
    # What was read and written in the first turn is the beginning of the second: nothing is read again.
    written = answer_ids(nano.tokenizer, trained[2], last=False)
    assert prompt[: len(seen[0][0]) + len(written)] == seen[0][0] + written
    assert answered["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(seen[0][0])


def test_parallel_calls_of_the_history_stand_with_their_results(tokenizer: ChatGLMTokenizer) -> None:
    script = Script(say(tokenizer, "好"))
    calls = [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}},
        {"id": "b", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
    ]
    results = [
        {"role": "tool", "tool_call_id": "b", "content": "12"},
        {"role": "tool", "tool_call_id": "a", "content": "晴"},
    ]
    spoken = {"role": "assistant", "content": "我来看看", "tool_calls": calls}
    with client_of(scripted(tokenizer, script)) as client:
        ask(client, messages=[*HELLO, spoken, *results], tools=TOOLS)
        for wrong, param in (
            ([*HELLO, spoken, results[0]], "messages[1].tool_calls[0]"),
            ([*HELLO, spoken, *results, {**results[0], "tool_call_id": "c"}], "messages[2]"),
            ([*HELLO, spoken, results[0], *results], "messages[3].tool_call_id"),
            ([*HELLO, results[0]], "messages[1]"),
            ([*HELLO, spoken, {"role": "tool", "content": "1"}], "messages[2].tool_call_id"),
            ([*HELLO, {**spoken, "tool_calls": [{**calls[0], "id": "b"}, calls[1]]}, results[0]], None),
            ([*HELLO, {**spoken, "tool_calls": calls[:1]}, *HELLO], "messages[1].tool_calls[0]"),
        ):
            response = client.post(CHAT, json={"messages": wrong, "tools": TOOLS})
            assert response.status_code == 400
            assert param is None or response.json()["error"]["param"] == param
    expected = [
        Message("system", "", tools=[WEATHER, CLOCK]),
        Message("user", "你好"),
        Message("assistant", "我来看看"),
        Message("assistant", "", "get_weather", arguments={"city": "北京"}),
        Message("observation", "晴"),
        Message("assistant", "", "get_time", arguments={}),
        Message("observation", "12"),
    ]
    assert script.prompts[0] == prompt_ids(tokenizer, expected)


@pytest.mark.parametrize("arguments", ["", "{}", None])
def test_calls_without_arguments(tokenizer: ChatGLMTokenizer, arguments: str | None) -> None:
    script = Script(say(tokenizer, "好"))
    function = {"name": "get_time", **({} if arguments is None else {"arguments": arguments})}
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }
    with client_of(scripted(tokenizer, script)) as client:
        ask(client, messages=[*HELLO, called, {"role": "tool", "tool_call_id": "a", "content": ""}], tools=TOOLS)
    expected = [Message("assistant", "", "get_time", arguments={}), Message("observation", "")]
    assert (
        script.prompts[0][-len(ids) :] == (ids)
        if (ids := prompt_ids(tokenizer, expected)[len(tokenizer.prefix_ids) :])
        else False
    )


@pytest.mark.parametrize(
    "arguments", ["[1]", "{", "1", '{"a": NaN}', '{"a": 1e999}', "[" * 5000, '{"a":' * 40 + "1" + "}" * 40]
)
def test_arguments_that_are_no_object_are_refused(api: TestClient, arguments: str) -> None:
    function = {"name": "get_time", "arguments": arguments}
    called = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "a", "content": ""}
    response = api.post(CHAT, json={"messages": [*HELLO, called, result], "tools": TOOLS})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


def test_a_tool_may_have_the_name_of_a_choice(api: TestClient) -> None:
    tools = [{"type": "function", "function": {**CLOCK, "name": "none"}}]
    choice = {"type": "function", "function": {"name": "none"}}
    answer = ask(api, tools=tools, tool_choice=choice, max_tokens=40)["choices"][0]
    shown = answer["message"].get("tool_calls") or answer["message"]["content"]
    assert "none" in str(shown)


def test_tool_choices(api: TestClient, nano: Served) -> None:
    question = [{"role": "user", "content": "你好"}]
    named = {"type": "function", "function": {"name": "get_time"}}
    for _ in range(2):
        forced = ask(api, messages=question, tools=TOOLS, tool_choice=named, temperature=1)["choices"][0]
        calls = forced["message"].get("tool_calls", [{"function": {"name": "get_time"}}])
        assert calls[0]["function"]["name"] == "get_time"
        assert forced["finish_reason"] == "tool_calls" or "malformed_tool_call" in forced["message"]
    free = ask(api, messages=question, tools=TOOLS, tool_choice="none", temperature=0)
    assert free["choices"] == ask(api, messages=question, temperature=0)["choices"]  # the model is told of no tools
    auto = ask(api, messages=question, tools=TOOLS, temperature=0, parallel_tool_calls=True, tool_choice="auto")
    assert auto["usage"]["prompt_tokens"] > free["usage"]["prompt_tokens"]
    assert ask(api, messages=question, tools=[], tool_choice="none", temperature=0)["choices"] == free["choices"]


def test_a_streamed_call_comes_whole_with_an_index(tokenizer: ChatGLMTokenizer) -> None:
    spoken = say(tokenizer, "我来看看", end="<|assistant|>")
    call = say(tokenizer, "```python\ntool_call(city='北京', days=2)\n```", "get_weather", "<|observation|>")
    with client_of(scripted(tokenizer, Script(spoken + call))) as client:
        body = {"messages": HELLO, "tools": TOOLS, "stream": True}
        *chunks, _done = events(client.post(CHAT, json=body).text)
        whole = ask(client, tools=TOOLS)["choices"][0]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "我来看看" == whole["message"]["content"]
    ((told,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert told["index"] == 0
    assert told["id"]
    assert told["type"] == "function"
    assert told["function"] == whole["message"]["tool_calls"][0]["function"]
    assert told["function"] == {"name": "get_weather", "arguments": '{"city": "北京", "days": 2}'}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" == whole["finish_reason"]


def test_functions_are_answered_in_their_own_form(tokenizer: ChatGLMTokenizer) -> None:
    script = Script(say(tokenizer, "```python\ntool_call(city='北京')\n```", "get_weather", "<|observation|>"))
    expected = {"name": "get_weather", "arguments": '{"city": "北京"}'}
    with client_of(scripted(tokenizer, script)) as client:
        for body in ({"functions": [WEATHER]}, {"tools": [WEATHER]}, {"tools": {"get_weather": WEATHER}}):
            (choice,) = ask(client, **body)["choices"]
            assert choice["message"]["function_call"] == expected
            assert choice["finish_reason"] == "function_call"
            assert "tool_calls" not in choice["message"]
            assert choice["message"]["content"] is None
            *chunks, _ = events(client.post(CHAT, json={"messages": HELLO, "stream": True, **body}).text)
            assert chunks[1]["choices"][0]["delta"] == {"function_call": expected}
            assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
        messages = [
            *HELLO,
            {"role": "assistant", "content": None, "function_call": expected},
            {"role": "function", "name": "get_weather", "content": "晴"},
        ]
        ask(client, messages=messages, functions=[WEATHER])
        lonely = client.post(CHAT, json={"messages": [*messages[:2], *HELLO], "functions": [WEATHER]})
        assert lonely.json()["error"]["param"] == "messages[1].function_call"
    assert script.prompts[-1] == prompt_ids(
        tokenizer,
        [
            Message("system", "", tools=[WEATHER]),
            Message("user", "你好"),
            Message("assistant", "", "get_weather", arguments={"city": "北京"}),
            Message("observation", "晴"),
        ],
    )


@pytest.mark.parametrize(
    ("name", "text", "offered"),
    [
        ("get_weather", "```python\nos.system('x')\n```", True),
        ("get_weather", "```python\ntool_call('北京')\n```", True),
        ("no_tool", "```python\ntool_call(a=1)\n```", True),
        ("no_tool", "```python\ntool_call(a=1)\n```", False),
    ],
)
def test_what_is_no_call_comes_back_as_text(tokenizer: ChatGLMTokenizer, name: str, text: str, offered: bool) -> None:
    script = Script(say(tokenizer, text, name, "<|observation|>"))
    body = {"tools": TOOLS} if offered else {}
    with client_of(scripted(tokenizer, script)) as client:
        (choice,) = ask(client, **body)["choices"]
        *chunks, _ = events(client.post(CHAT, json={"messages": HELLO, "stream": True, **body}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == f"{name}\n{text}" == "".join(delta.get("content", "") for delta in deltas)
    assert ("malformed_tool_call" in choice["message"]) is offered is ("malformed_tool_call" in deltas[-1])


def test_stop_texts_are_not_looked_for_in_calls(tokenizer: ChatGLMTokenizer) -> None:
    spoken = say(tokenizer, "我来看看", end="<|assistant|>")
    call = say(tokenizer, "```python\ntool_call(city='北京')\n```", "get_weather", "<|observation|>")
    with client_of(scripted(tokenizer, Script(spoken + call))) as client:
        (choice,) = ask(client, tools=TOOLS, stop=["city", "get_weather"])["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        (choice,) = ask(client, tools=TOOLS, stop="看看")["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "我来")
        assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize(
    "text",
    [
        "```python\n" + " " * 65_000,
        "```python\n" + "`" * 65_000,
        "```python\ntool_call(" + "class=1," * 7_000 + ")",
        "tool_call(a=" + "(" * 65_000,
        "{" * 65_000,
        "{" * 1_000_000,
    ],
    ids=["blanks", "fences", "keywords", "parentheses", "braces", "megabyte"],
)
def test_reading_a_call_takes_linear_time(text: str) -> None:
    started = time.process_time()
    with suppress(ToolCallError):
        parse_tool_call(text)
    with suppress(ToolCallError):
        parse_json_call(text)
    assert time.process_time() - started < 3


# --- any text ---

_PARTS = ["你好", "天气 很好", "👩\u200d👩\u200d👧", "🇨🇳", "สวัสดี", "e\u0301\u0327", "한글", "tea", "<|user|>"]
_PARTS += [" ", "\n", "\ufffd", "\x00"]


def check_a_text(client: TestClient, script: Script, tokenizer: ChatGLMTokenizer, chance: random.Random) -> None:
    """Whatever a model writes and whatever ends it, the stream and the whole answer say the same."""
    text = "".join(chance.choices(_PARTS, k=chance.randint(1, 8)))
    ids = tokenizer.encode_text(text)
    for _ in range(chance.choice([0, 0, 2])):
        ids.insert(chance.randint(0, len(ids)), chance.randint(3, 258))  # a byte alone
    plain = tokenizer.decode_ids(ids)
    stops = []
    for _ in range(chance.randint(0, 3)):
        start = chance.randrange(len(plain)) if plain else 0
        stops.append(chance.choice([plain[start : start + chance.randint(1, 5)], "never", "天气"]) or "x")
    script.ids = [*ids, 2]
    limit = chance.choice([None, chance.randint(1, len(ids) + 2)])
    body = {"prompt": "a", "stop": stops, **({} if limit is None else {"max_tokens": limit})}
    body.setdefault("max_tokens", 1000)
    whole = ask(client, "/v1/completions", **body)
    usage = {"stream_options": {"include_usage": True}}
    *chunks, last, done = events(client.post("/v1/completions", json={**body, "stream": True, **usage}).text)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    (choice,) = whole["choices"]
    assert done == "[DONE]"
    assert "".join(pieces) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert last["usage"] == whole["usage"]
    assert not any(stop in choice["text"] for stop in stops)
    assert sum(piece.count("\ufffd") for piece in pieces) == choice["text"].count("\ufffd")
    if limit is None and not any(stop in plain for stop in stops):
        assert choice["text"] == plain  # what was held back is given out at the end
    else:
        assert plain.startswith(choice["text"].rstrip("\ufffd"))


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text_and_any_stops(tokenizer: ChatGLMTokenizer, count: int) -> None:
    chance, script = random.Random(count), Script()
    with client_of(scripted(tokenizer, script)) as client:
        for _ in range(count):
            check_a_text(client, script, tokenizer, chance)


# --- log-probabilities ---


def test_logprobs_of_chat_are_those_of_its_text(api: TestClient) -> None:
    settings = {
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
        "messages": [{"role": "user", "content": "你好"}],
    }
    (choice,) = ask(api, **settings)["choices"]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == choice["message"]["content"]
    for token in tokens:
        best = token["top_logprobs"]
        assert len(best) == 3
        assert best[0]["token"] == token["token"]
        assert best[0]["logprob"] == pytest.approx(token["logprob"], abs=1e-5)
        assert best[0]["logprob"] >= best[1]["logprob"] >= best[2]["logprob"]
        assert token["logprob"] <= 0
    *chunks, _ = events(api.post(CHAT, json={**settings, "stream": True}).text)
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in tokens]
    assert all(one["logprob"] == pytest.approx(two["logprob"], abs=1e-4) for one, two in zip(streamed, tokens))


def test_logprobs_of_completions_have_offsets(api: TestClient, nano: Served) -> None:
    settings = {"temperature": 0, "max_tokens": 6, "logit_bias": {str(stop): -100 for stop in nano.tokenizer.stop_ids}}
    (choice,) = ask(api, "/v1/completions", prompt="你好", logprobs=2, **settings)["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert len(told["top_logprobs"][0]) == 2
    for token, offset in zip(told["tokens"], told["text_offset"]):
        assert choice["text"][offset : offset + len(token)] == token
    without = ask(api, "/v1/completions", prompt="你好", temperature=0, logprobs=0, max_tokens=6)["choices"][0][
        "logprobs"
    ]
    assert without["top_logprobs"] == [{}] * len(without["tokens"])


# --- completions ---


def test_completions_go_on_with_texts_and_ids(api: TestClient, nano: Served) -> None:
    ids = [*nano.tokenizer.prefix_ids, *nano.tokenizer.encode_text("你好")]
    text, by_ids = (ask(api, "/v1/completions", prompt=prompt, temperature=0) for prompt in ("你好", ids))
    assert text["choices"] == by_ids["choices"]
    assert text["object"] == "text_completion"
    both = ask(api, "/v1/completions", prompt=["你好", "hello"], n=2, temperature=0, max_tokens=5, echo=True)
    assert [choice["text"][:2] for choice in both["choices"]] == ["你好", "你好", "he", "he"]
    assert both["usage"]["completion_tokens"] <= 20
    body = {"prompt": "你好", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events(api.post("/v1/completions", json=body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text["choices"][0]["text"]
    assert last["usage"]["completion_tokens"] == text["usage"]["completion_tokens"]
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == text["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [999_999]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 13}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": "长" * 3000}, "prompt"),
    ],
    ids=str,
)
def test_completions_refuse_by_name(api: TestClient, change: dict[str, Any], param: str) -> None:
    response = api.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


# --- the official form ---


def test_official_form_counts_the_prompt_and_takes_zero_as_default(tokenizer: ChatGLMTokenizer) -> None:
    class Kept(Script):
        def stream(self, prompt: Sequence[int], options: Any, **limits: Any) -> Any:
            self.options, self.limit = options, limits["max_new_tokens"]
            return super().stream(prompt, options, **limits)

    script = Kept(say(tokenizer, "好"))
    with client_of(scripted(tokenizer, script)) as client:
        body = {"prompt": "你好", "history": [["hello", "world"]], "temperature": 0, "top_p": 0.0, "max_length": 0}
        answered = ask(client, "/", **body)
        assert answered["response"] == "好"
        assert answered["status"] == 200
        assert answered["history"] == [["hello", "world"], ["你好", "好"]]
        time.strptime(answered["time"], "%Y-%m-%d %H:%M:%S")
        messages = [Message("user", "hello"), Message("assistant", "world"), Message("user", "你好")]
        assert script.prompts[0] == prompt_ids(tokenizer, messages)
        assert (script.options.temperature, script.options.top_p) == (0.95, 0.7)
        assert script.limit == 2048 - len(script.prompts[0])
        ask(client, "/", prompt="你好", max_length=20)
        assert script.limit == 20 - len(script.prompts[1])
        for wrong, param in (
            ({"prompt": 1}, "prompt"),
            ({}, "prompt"),
            ({"prompt": "a", "history": [["a"]]}, "history[0]"),
            ({"prompt": "a", "history": [["a", None]]}, "history[0][1]"),
            ({"prompt": "a", "max_length": 2}, "max_length"),
            ({"prompt": "a", "temperature": -1}, "temperature"),
        ):
            response = client.post("/", json=wrong)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param


# --- what goes wrong inside ---


def test_failures_before_and_after_the_first_piece(tokenizer: ChatGLMTokenizer) -> None:
    ids = say(tokenizer, "hello world how are you")
    with client_of(scripted(tokenizer, Script(ids, fails_after=0))) as client:
        for stream in (False, True):
            response = client.post(CHAT, json={"messages": HELLO, "stream": stream})
            assert response.status_code == 500
            assert "secret" not in response.text
            assert "req_" in response.text
    with client_of(scripted(tokenizer, Script(ids, fails_after=len(ids) - 2))) as client:
        *chunks, last = events(client.post(CHAT, json={"messages": HELLO, "stream": True}).text)
        assert chunks[1]["choices"][0]["delta"]["content"]
        assert last["error"]["code"] == "internal_error"
        assert "secret" not in json.dumps(last)
    with client_of(scripted(tokenizer, Script(ids, full=True))) as client:
        response = client.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1


# --- other generations ---


def test_models_of_rounds_chat_and_refuse_tools(tmp_path: Path) -> None:
    folders = {
        "two": write_model(tmp_path / "two", train_tokenizer(tmp_path / "t.model"), generation=2, endless=True),
        "one": write_chatglm(tmp_path / "one", endless=True),
    }
    for name, folder in folders.items():
        served = serve(glmkit.load(str(folder)), name)
        with client_of(served) as client:
            assert ask(client, max_tokens=3, model=name)["usage"]["completion_tokens"] == 3
            assert "问：" in ask(client, "/tokenize", messages=HELLO)["prompt"] or name == "one"
            for body in ({"tools": TOOLS}, {"functions": [WEATHER]}):
                response = client.post(CHAT, json={"messages": HELLO, **body})
                assert response.status_code == 400
                assert response.json()["error"]["param"] == next(iter(body))
            late = [*HELLO, {"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}, *HELLO]
            assert client.post(CHAT, json={"messages": late}).status_code == 400
        served.close()


def test_models_that_fill_blanks_answer_one_text(tmp_path: Path) -> None:
    served = serve(glmkit.load(str(write_glm(tmp_path / "glm"))), "glm")
    text = "beijing is the [MASK] of china ."
    with client_of(served) as client:
        expected = served.loaded.chat(text, temperature=0, max_tokens=4).text
        chat = ask(client, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=4)
        assert chat["choices"][0]["message"]["content"] == expected
        filled = ask(client, "/v1/completions", prompt=text, temperature=0, max_tokens=4)
        assert filled["choices"][0]["text"] == expected
        assert ask(client, "/tokenize", text=text)["tokens"] == served.tokenizer.fill_prompt(text)
        for body in ({"tools": TOOLS}, {"response_format": {"type": "json_object"}}):
            assert client.post(CHAT, json={"messages": HELLO, **body}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": [1, 2]}).status_code == 400
        assert ask(client, messages=[{"role": "user", "content": text}], logprobs=True, max_tokens=2)
    served.close()


def test_glm4_calls_in_its_own_form(tmp_path: Path) -> None:
    loaded = glmkit.load(str(write_glm4(tmp_path / "four")))
    tokenizer = loaded.tokenizer
    ids = [
        *tokenizer.encode_text("get_weather\n"),
        *tokenizer.encode_text('{"city": "北京"}'),
        tokenizer.get_command("<|observation|>"),
    ]
    script = Script(ids)
    with client_of(Served(loaded, script, "four")) as client:  # type: ignore[arg-type]
        message = ask(client, tools=TOOLS)["choices"][0]["message"]
        (call,) = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "晴"}
        ask(client, messages=[*HELLO, message, result], tools=TOOLS)
    assert script.prompts[1][: len(script.prompts[0]) + len(ids) - 1] == script.prompts[0] + ids[:-1]


# --- stored completions ---


def test_completions_are_stored_if_asked_for(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> None:
    keys = {"api_keys": (ApiKey.of("first-key-1"), ApiKey.of("second-key-2"))}
    served = scripted(tokenizer, Script(say(tokenizer, "好")))
    with client_of(served, store=tmp_path / "kept", **keys) as client:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("first-key-1", "second-key-2"))
        made = []
        for number in range(3):
            body = {"messages": HELLO, "store": True, "metadata": {"number": str(number)}}
            made.append(client.post(CHAT, json=body, headers=one).json())
        streamed = events(client.post(CHAT, json={"messages": HELLO, "store": True, "stream": True}, headers=one).text)
        client.post(CHAT, json={"messages": HELLO}, headers=one)
        listed = client.get(CHAT, headers=one).json()
        assert {one["id"] for one in listed["data"]} == {one["id"] for one in made} | {streamed[0]["id"]}
        page = client.get(CHAT, headers=one, params={"limit": 3, "order": "desc"}).json()
        assert page["has_more"]
        assert page["last_id"] == page["data"][-1]["id"]
        assert len(page["data"]) == 3
        rest = client.get(CHAT, headers=one, params={"after": page["last_id"], "order": "desc"}).json()
        assert len(rest["data"]) == 1
        assert not rest["has_more"]
        path = f"{CHAT}/{made[0]['id']}"
        assert client.get(path, headers=one).json() == made[0]
        assert made[0]["metadata"] == {"number": "0"}
        assert client.get(path, headers=two).status_code == 404 == client.delete(path, headers=two).status_code
        assert client.get(CHAT, headers=two).json()["data"] == []
        assert client.delete(path, headers=one).json() == {
            "id": made[0]["id"],
            "object": "chat.completion.deleted",
            "deleted": True,
        }
        assert client.get(path, headers=one).status_code == 404 == client.delete(path, headers=one).status_code
        for wrong in ("x", "..%2f..%2fetc", "a" * 200, "%00"):
            assert client.get(f"{CHAT}/{wrong}", headers=one).status_code == 404
        assert client.get(CHAT, headers=one, params={"limit": 0}).status_code == 400
    with client_of(served) as client:
        assert client.get(CHAT).status_code == 400
        assert "--store" in client.get(CHAT).json()["error"]["message"]


# --- the document ---


def test_document_names_every_route_and_its_errors(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    for path in (CHAT, "/v1/completions", "/tokenize", "/"):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schema.removeprefix("#/components/schemas/") in document["components"]["schemas"]
        assert {"200", "4XX", "5XX"} <= set(operation["responses"])
        assert "422" not in operation["responses"]
    assert "text/event-stream" in document["paths"][CHAT]["post"]["responses"]["200"]["content"]
    text = json.dumps(document)
    known = document["components"]["schemas"]
    assert all(part.split('"')[0] in known for part in text.split("#/components/schemas/")[1:])


def test_answers_fit_the_document(api: TestClient) -> None:
    jsonschema = pytest.importorskip("jsonschema_rs")
    document = api.get("/openapi.json").json()

    def check(method: str, path: str, route: str, **arguments: Any) -> None:
        response = api.request(method, path, **arguments)
        responses = document["paths"][route][method.lower()]["responses"]
        told = responses.get(str(response.status_code)) or responses[f"{response.status_code // 100}XX"]
        schema = {**told["content"]["application/json"]["schema"], "components": document["components"]}
        jsonschema.validate(schema, response.json())

    check("GET", "/v1/models", "/v1/models")
    check("GET", "/v1/models/none", "/v1/models/{model_id}")
    check("POST", CHAT, CHAT, json={"messages": HELLO, "logprobs": True, "top_logprobs": 1, "max_tokens": 3})
    check("POST", CHAT, CHAT, json={"messages": HELLO, "tools": TOOLS, "tool_choice": "required"})
    check("POST", CHAT, CHAT, json={"messages": 1})
    check("POST", "/v1/completions", "/v1/completions", json={"prompt": "a", "logprobs": 1, "max_tokens": 3})
    check("POST", "/tokenize", "/tokenize", json={"text": "a"})
    check("POST", "/", "/", json={"prompt": "a"})


def test_schemas_that_take_long_hold_up_only_each_other(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def wait(schema: str) -> str:
        go_on.wait(30)
        return "too hard"

    monkeypatch.setattr("glmkit.serve.structured.try_schema", wait)

    def ask(**more: Any) -> int:
        body = {"model": "glm-nano", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2, **more}
        return api.post("/v1/chat/completions", json=body).status_code

    def hostile(number: int) -> int:
        schema = {"type": "object", "title": str(number)}
        return ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})

    with ThreadPoolExecutor(41) as pool:
        waiting = [pool.submit(hostile, number) for number in range(40)]  # more than asyncio has threads
        while not any(future.running() for future in waiting):
            time.sleep(0.01)
        time.sleep(0.2)
        try:
            assert pool.submit(ask).result(timeout=10) == 200
        finally:
            go_on.set()
        assert {future.result() for future in waiting} <= {400, 429}
