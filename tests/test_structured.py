"""Answers in JSON: every tokenizer, every hostile schema."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import glmkit
from glmkit.chat.following import serve
from glmkit.chat.reply import parse_reply
from glmkit.engine.generation import Guide
from glmkit.serve import structured
from glmkit.serve.app import create_app
from glmkit.serve.failures import APIError
from glmkit.serve.shapes import ResponseFormat
from glmkit.serve.structured import MAX_KEPT, SchemaGuide, Structures, try_schema
from glmkit.serve.token_bytes import TokenTable
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from tiny import train_tokenizer
from tiny_families import glm4_tokenizer, train_ice_text

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "minimum": -9, "maximum": 99},
        "name": {"type": "string", "maxLength": 4},
        "list": {"type": "array", "items": {"enum": ["天气", "tea\n", 1.5, None]}, "maxItems": 3},
    },
    "required": ["ok", "n", "name", "list"],
    "additionalProperties": False,
}


def json_schema(schema: Any) -> ResponseFormat:
    return ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


@pytest.fixture(scope="module", params=["one", "two", "three", "four", "nano"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    make: dict[str, Callable[[], Any]] = {
        "one": lambda: ChatGLM1Tokenizer(train_ice_text(folder / "ice_text.model")),
        "two": lambda: ChatGLMTokenizer(train_tokenizer(folder / "tokenizer.model"), generation=2),
        "three": lambda: ChatGLMTokenizer(train_tokenizer(folder / "tokenizer.model"), generation=3),
        "four": lambda: glm4_tokenizer(folder / "tokenizer.model"),
        "nano": lambda: glmkit.load("glm-nano").tokenizer,
    }
    return make[request.param]()


def write(tokenizer: Any, guide: Guide, seed: int, most: int = 3000) -> list[int]:
    """What a model without any sense writes under a guide, up to the id that ends it."""
    chance = random.Random(seed)
    quick = {token for token, data in enumerate(TokenTable(tokenizer).all()) if data and (b'"' in data or b"}" in data)}
    ids: list[int] = []
    while len(ids) < most:
        allowed = guide.allowed()
        assert allowed is not None
        choices = allowed.nonzero()[:, 0].tolist()
        assert choices, "the guide leaves no token"
        stops = [token for token in choices if token in tokenizer.stop_ids]
        ending = [token for token in choices if token in quick] if chance.random() < 0.5 else []
        token = chance.choice(stops or ending or choices)
        ids.append(token)
        if token in tokenizer.stop_ids:
            return ids
        guide.push(token)
    raise AssertionError("the answer does not end")


def test_tokens_are_the_bytes_of_their_texts(tokenizer: Any) -> None:
    table = TokenTable(tokenizer)
    for text in ("hello, 天气 很好。\n  \t你好 👩‍👩‍👧", "a  b", "    x", "\x00é"):
        ids = tokenizer.encode_text(text)
        data = b"".join(map(table.bytes_of, ids))
        assert data.decode().lstrip(" ") == tokenizer.decode_ids(ids).lstrip(" ")
    assert all(data is None for token, data in enumerate(table.all()) if token in tokenizer.stop_ids)


@pytest.mark.parametrize("wanted", [json_schema(SCHEMA), ResponseFormat(type="json_object")], ids=["schema", "object"])
def test_every_answer_fits_its_schema(tokenizer: Any, wanted: ResponseFormat) -> None:
    validator = pytest.importorskip("jsonschema_rs")
    structures = Structures(tokenizer, len(tokenizer) + 20)
    texts = set()
    for seed in range(8):
        guide = structures.guide(wanted, offers_tools=False)
        assert guide is not None
        try:
            ids = write(tokenizer, guide, seed, most=3000 if wanted.json_schema else 60)
        except AssertionError:
            assert wanted.json_schema is None  # an object without a schema may go on for ever
            continue
        if tokenizer.generation in (3, 4):  # the empty header line, as the model was trained to write it
            header = tokenizer.encode_text("\n")
            assert ids[: len(header)] == header
        (message,) = parse_reply(tokenizer, ids).messages
        assert message.metadata == ""
        value = json.loads(message.content)
        validator.validate(SCHEMA if wanted.json_schema else {"type": "object"}, value)
        texts.add(message.content)
    assert len(texts) > (3 if wanted.json_schema else 0)


def test_an_answer_as_the_model_would_write_it_is_allowed(tokenizer: Any) -> None:
    text = json.dumps({"ok": True, "n": 12, "name": "茶", "list": ["天气"]}, ensure_ascii=False)
    header = tokenizer.encode_text("\n") if tokenizer.generation in (3, 4) else []
    guide = Structures(tokenizer, len(tokenizer) + 20).guide(json_schema(SCHEMA), offers_tools=False)
    assert guide is not None
    for token in [*header, *tokenizer.encode_text(text)]:
        allowed = guide.allowed()
        assert allowed is not None
        assert allowed[token], tokenizer.decode_ids([token])
        assert not any(allowed[stop] for stop in tokenizer.stop_ids)  # not whole yet
        guide.push(token)
    allowed = guide.allowed()
    assert allowed is not None
    assert set(allowed.nonzero()[:, 0].tolist()) == set(tokenizer.stop_ids)


def test_a_call_of_a_tool_is_free_where_tools_are_offered(tmp_path: Path) -> None:
    tokenizer = ChatGLMTokenizer(train_tokenizer(tmp_path / "tokenizer.model"), generation=3)
    structures = Structures(tokenizer, len(tokenizer) + 20)

    def guide_behind(header: str) -> SchemaGuide:
        guide = structures.guide(ResponseFormat(type="json_object"), offers_tools=True)
        assert guide is not None
        for token in tokenizer.encode_text(header + "\n"):
            assert guide.allowed() is None
            guide.push(token)
        return guide

    assert guide_behind("get_weather").allowed() is None
    assert guide_behind("").allowed() is not None


def deep(levels: int, make: Callable[[Any], Any]) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = make(schema)
    return schema


def one_key(inner: Any) -> Any:
    return {"type": "object", "properties": {"a": inner}, "required": ["a"]}


HOSTILE: dict[str, tuple[Any, bool | None]] = {
    "recursive": ({"$defs": {"n": one_key({"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"}, None),
    "recursive list": ({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}, True),
    "itself": ({"$ref": "#"}, False),
    "remote": ({"$ref": "http://169.254.169.254/schema.json"}, False),
    "file": ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, False),
    "missing": ({"$ref": "#/$defs/none"}, False),
    "anyOf": ({"anyOf": [{"const": str(number)} for number in range(10_000)]}, False),
    "anyOf objects": ({"anyOf": [one_key({"const": number}) for number in range(900)]}, None),
    "maxItems": ({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}, None),
    "minItems": ({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}, None),
    "maxLength": ({"type": "string", "maxLength": 10**9}, None),
    "minLength": ({"type": "string", "minLength": 10**9}, None),
    "nested quantifiers": ({"type": "string", "pattern": "^(a+)+$"}, True),
    "counted quantifiers": ({"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"}, None),
    "alternatives": ({"type": "string", "pattern": "(a*)*(b|c{1,1000}){1,1000}"}, None),
    "look behind": ({"type": "string", "pattern": "(?<=a)b"}, False),
    "broken pattern": ({"type": "string", "pattern": "(["}, False),
    "long pattern": ({"type": "string", "pattern": "a" * 2000}, False),
    "deep objects": (deep(10_000, one_key), False),
    "deep lists": (deep(90, lambda inner: {"type": "array", "items": inner}), None),
    "many keys": ({"type": "object", "properties": {f"k{number}": {} for number in range(3000)}}, None),
    "multiples": ({"type": "integer", "multipleOf": 7919, "maximum": 10**18}, None),
    "no schema": ({"type": "sting"}, False),
    "not": ({"not": {"type": "string"}}, False),
    "options": ({"x-guidance": {"lenient": True}, "type": "object"}, False),
    "large": ({"description": "x" * 70_000}, False),
}


@pytest.fixture(scope="module")
def structures(tmp_path_factory: pytest.TempPathFactory) -> Structures:
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = ChatGLMTokenizer(train_tokenizer(folder / "tokenizer.model"), generation=3)
    return Structures(tokenizer, len(tokenizer) + 20)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_bounded(structures: Structures, name: str) -> None:
    schema, fits = HOSTILE[name]
    started = time.process_time()
    guide, refusal = None, None
    try:
        guide = structures.guide(json_schema(schema), offers_tools=False)
    except APIError as error:
        refusal = error
    if refusal is not None:
        assert (refusal.status, refusal.code) == (400, "invalid_json_schema")
        assert len(refusal.message) < 500
    assert fits in (None, refusal is None)
    for _ in range(30 if guide is not None else 0):  # every step is bounded too
        assert guide is not None
        allowed = guide.allowed()
        assert allowed is not None
        token = int(allowed.nonzero()[0])
        if token in structures.stop_ids:
            break
        guide.push(token)
    assert time.process_time() - started < 3  # in this process; what the child takes is limited there


def test_a_trial_that_takes_for_ever_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in ("while True: pass", "import os; os.abort()", "print('no JSON')", "x = [0] * 10**10"):
        script = tmp_path / "trial.py"
        script.write_text("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n" + text)
        monkeypatch.setattr(structured, "_TRIAL", script)
        monkeypatch.setattr(structured, "_TRIAL_SECONDS", 0.5)
        problem = try_schema("{}")
        assert problem is not None
        assert "compile" in problem


def test_the_trial_limits_time_and_memory_of_its_process() -> None:
    text = structured._TRIAL.read_text(encoding="utf-8")
    assert text.index("RLIMIT_CPU") < text.index("import llguidance")
    assert "import glmkit" not in text
    assert try_schema(json.dumps(SCHEMA)) is None


def test_verdicts_are_remembered_and_bounded(structures: Structures, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(structured, "try_schema", lambda schema: tried.append(schema))
    for number in range(3 * MAX_KEPT):
        structures.guide(json_schema({"const": number}), offers_tools=False)
        structures.guide(json_schema({"const": number}), offers_tools=False)
    assert len(tried) == 3 * MAX_KEPT
    assert len(structures._verdicts) <= MAX_KEPT


def test_a_trial_that_a_busy_machine_made_slow_is_not_remembered(
    structures: Structures, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = json_schema({"const": "on a busy machine"})
    with monkeypatch.context() as busy:
        busy.setattr(structured, "_TRIAL_SECONDS", 0.0)
        with pytest.raises(APIError, match="too long"):
            structures.guide(wanted, offers_tools=False)
    assert structures.guide(wanted, offers_tools=False) is not None


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from fastapi.testclient import TestClient

    served = serve(glmkit.load("glm-nano"), "glm-nano")
    with TestClient(create_app(served), base_url="http://localhost") as client:
        yield client
    served.close()


def test_a_model_answers_in_the_schema(client: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "北京今天天气怎么样？"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        "seed": 1,
        "n": 2,
        "max_tokens": 400,
    }
    for choice in client.post("/v1/chat/completions", json=body).json()["choices"]:
        assert choice["finish_reason"] == "stop"
        assert set(json.loads(choice["message"]["content"])) == set(SCHEMA["properties"])
    wrong = {**body, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}}
    response = client.post("/v1/chat/completions", json=wrong)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format.json_schema.schema"
