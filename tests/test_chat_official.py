"""The methods of the official classes, through a stand-in for the model and through a tiny real one."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch

import glmkit
import tiny
import tiny_families
from glmkit.chat import official
from glmkit.chat.conversation import reply_to
from glmkit.chat.official import InvalidScoreLogitsProcessor
from glmkit.chat.official_replies import process_response
from glmkit.errors import UsageError
from glmkit.hf import LogitsProcessor, LogitsProcessorList
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.tokenizers import ChatGLMTokenizer
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer

TOOLS = [{"name": "get_weather", "description": "weather", "parameters": {}}]
SYSTEM = {"role": "system", "content": "tools:", "tools": TOOLS}


class Scripted:
    """A model that replies with given ids and keeps what it was called with."""

    def __init__(self, reply_ids: list[int], family: Any = ChatGLM2Config, **config: Any) -> None:
        self.reply_ids = torch.tensor([reply_ids], dtype=torch.int64)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(**config)
        self.called_with: dict[str, Any] = {}
        for name, method in official.MODEL_METHODS[family].items():
            if name != "stream_generate":
                setattr(self, name, MethodType(method, self))

    def generate(self, **arguments: Any) -> torch.Tensor:
        self.called_with = arguments
        return torch.cat((arguments["input_ids"], self.reply_ids), dim=1)

    def stream_generate(self, **arguments: Any) -> Iterator[torch.Tensor]:
        self.called_with = arguments
        for end in range(1, self.reply_ids.shape[1] + 1):
            yield torch.cat((arguments["input_ids"], self.reply_ids[:, :end]), dim=1)


def plain(arguments: dict[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments as JSON has them: tensors as lists, logits processors by class name."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        elif isinstance(value, LogitsProcessorList):
            value = [type(one).__name__ for one in value]
        if name not in leave_out:
            found[name] = value
    return found


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def two(file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(file, generation=2)


@pytest.fixture(scope="module")
def three(file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(file, generation=3)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM4Tokenizer:
    return tiny_families.glm4_tokenizer(tmp_path_factory.mktemp("four") / "tokenizer.model")


@pytest.fixture(scope="module")
def stored(shared: Path) -> Callable[[int], tuple[ChatGLMTokenizer, dict]]:
    @functools.cache
    def load(generation: int) -> tuple[ChatGLMTokenizer, dict]:
        name = "chatglm" if generation == 1 else f"chatglm{generation}"
        fixtures = shared / "conformance" / "tokenizer_chatglm" / name / "fixtures.json"
        results = json.loads(fixtures.read_text(encoding="utf-8"))
        if generation == 1:
            return ChatGLM1Tokenizer(shared / "tokenizers" / "chatglm-6b.ice_text.model"), results
        file = shared / "tokenizers" / "chatglm2-chatglm3.tokenizer.model"
        return ChatGLMTokenizer(file, generation=generation), results

    return load


# --- the stored results of the official classes ---


@pytest.mark.parametrize("generation", [2, 3])
def test_official_chat(stored: Callable, generation: int) -> None:
    tokenizer, results = stored(generation)
    for case in results["chat"]:
        model = Scripted(case["reply_ids"])
        history = copy.deepcopy(case["history"])
        role = {"role": case["role"]} if generation == 3 else {}
        response, new_history = model.chat(tokenizer, case["query"], history, **role)
        assert plain(model.called_with) == case["chat_generate_kwargs"]
        assert as_json(response) == case["response"]
        assert as_json(new_history) == case["new_history"]
        assert history == case["history"]  # unlike the official method, which adds to it
        if generation == 2:
            inputs = model.build_stream_inputs(tokenizer, case["query"], history)
            assert plain(inputs) == case["build_stream_inputs"]


@pytest.mark.parametrize("generation", [2, 3])
def test_official_stream_chat(stored: Callable, generation: int) -> None:
    tokenizer, results = stored(generation)
    streamed = 0
    for case in results["chat"]:
        model = Scripted(case["reply_ids"])
        role = {"role": case["role"]} if generation == 3 else {}
        steps = list(model.stream_chat(tokenizer, case["query"], case["history"], **role))
        inputs = ("input_ids", "attention_mask", "position_ids")
        assert plain(model.called_with)["input_ids"] == case["chat_generate_kwargs"]["input_ids"]
        if generation == 2:
            assert plain(model.called_with, inputs) == case["stream_kwargs_without_inputs"]
        if isinstance(case["stream_responses"], list):  # else the official stream raises in the middle of a tool call
            assert [response for response, _ in steps] == case["stream_responses"]
            streamed += 1
        response, history = steps[-1]
        assert as_json(response) == case["response"]
        assert as_json(history) == case["new_history"]
    assert streamed >= 16


@pytest.mark.parametrize("generation", [2, 3])
def test_official_process_response(stored: Callable, generation: int) -> None:
    _, results = stored(generation)
    for case in results["process_response"]:
        if generation == 2:
            assert process_response(None, case["in"]) == case["out"]
            continue
        before = copy.deepcopy(case["history"])
        response, history = process_response(None, case["in"], case["history"])
        assert case["history"] == before
        if case["new_history"] is None:  # the official method evaluates the text and raises
            assert case["out"]["raises"] == "SyntaxError"
            assert response["parameters"] is None
        else:
            assert as_json(response) == case["out"]
            assert as_json(history) == case["new_history"]


def test_official_chat_of_the_first_generation(stored: Callable) -> None:
    tokenizer, results = stored(1)
    assert len(results["chat"]) >= 16
    for case in results["chat"]:
        model = Scripted(case["reply_ids"], ChatGLMConfig)
        history = [tuple(pair) for pair in case["history"]]
        response, new_history = model.chat(tokenizer, case["query"], history)
        assert plain(model.called_with) == case["chat_generate_kwargs"]
        assert response == case["response"]
        assert as_json(new_history) == case["new_history"]
        assert history == [tuple(pair) for pair in case["history"]]
        steps = list(model.stream_chat(tokenizer, case["query"], history))
        assert plain(model.called_with, ("input_ids",)) == case["stream_kwargs_without_inputs"]
        assert [text for text, _ in steps] == case["stream_responses"]
        assert as_json(steps[-1][1]) == case["new_history"]
    for case in results["process_response"]:
        assert model.process_response(case["in"]) == case["out"]


def test_invalid_scores(shared: Path) -> None:
    import numpy

    arrays = numpy.load(shared / "conformance" / "sampling" / "arrays.npz")
    for kind in ("ok", "nan"):
        given = torch.from_numpy(arrays[f"invalid_score.in_{kind}"])
        before = given.clone()
        made = InvalidScoreLogitsProcessor()(torch.zeros(3, 1, dtype=torch.int64), given)
        assert torch.equal(made, torch.from_numpy(arrays[f"invalid_score.out_{kind}"]))
        assert torch.equal(given, before) or kind == "nan"


def test_invalid_scores_in_any_row() -> None:
    for wrong in (float("nan"), float("inf"), -float("inf")):
        scores = torch.zeros(2, 8)
        scores[1, 3] = wrong
        expected = torch.zeros(2, 8)
        expected[:, 5] = 5e4
        assert torch.equal(InvalidScoreLogitsProcessor()(torch.zeros(2, 1), scores), expected)


def test_official_template_of_generation_4(shared: Path) -> None:
    tokenizer = ChatGLM4Tokenizer(shared / "tokenizers" / "glm4" / "tokenizer.model")
    cases = json.loads((shared / "conformance" / "tokenizer_glm" / "glm4.json").read_text(encoding="utf-8"))["chats"]
    for case in cases:
        ask = functools.partial(tokenizer.apply_chat_template, case["messages"], add_generation_prompt=True)
        assert ask() == case["ids"]
        assert ask(add_special_tokens=False) == case["ids_no_prefix"]
        assert ask(tokenize=False) == case["text_add_generation_prompt"]
        encoded = ask(return_tensors="pt", return_dict=True)
        assert plain(encoded)["input_ids"] == [case["ids"]]
        model = Scripted([tokenizer.eos_token_id])
        last = case["messages"][-1]
        model.chat(tokenizer, last["content"], case["messages"][:-1], last["role"])
        assert plain(model.called_with, ("attention_mask", "position_ids")) == {
            "input_ids": [case["ids"]],
            "max_length": 8192,
            "num_beams": 1,
            "do_sample": True,
            "top_p": 0.8,
            "temperature": 0.8,
            "logits_processor": ["InvalidScoreLogitsProcessor"],
            "eos_token_id": [151329, 151336, 151338],
        }
    rows = [case["messages"] for case in cases]
    batch = tokenizer.apply_chat_template(
        rows, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    for row, mask, case in zip(batch["input_ids"], batch["attention_mask"], cases):
        assert row[mask.bool()].tolist() == case["ids"]
    with pytest.raises(UsageError, match="apply_chat_template: continue_final_message is not supported"):
        tokenizer.apply_chat_template(rows[0], continue_final_message=True)


# --- what the official methods take ---


def test_positional_arguments_of_both_generations(two: ChatGLMTokenizer, three: ChatGLMTokenizer) -> None:
    reply = [*two.encode_text("hello"), 2]
    for tokenizer, before in ((two, ()), (three, ()), (three, ("observation",))):
        model = Scripted(reply)
        _, history = model.chat(tokenizer, "hi", None, *before, 99, 2, False, 0.5, 0.6)
        got = plain(model.called_with, ("input_ids", "attention_mask", "position_ids", "eos_token_id"))
        assert got == {
            "max_length": 99,
            "num_beams": 2,
            "do_sample": False,
            "top_p": 0.5,
            "temperature": 0.6,
            "logits_processor": ["InvalidScoreLogitsProcessor"],
        }
        if tokenizer is three:
            assert history[0] == {"role": before[0] if before else "user", "content": "hi"}
        list(model.stream_chat(tokenizer, "hi", None, *before, None, 99, False, 0.5, 0.6))
        assert model.called_with["max_length"] == 99
        assert model.called_with["temperature"] == 0.6
        assert model.called_with["past_key_values"] is None


def test_arguments_that_do_not_fit(two: ChatGLMTokenizer, three: ChatGLMTokenizer) -> None:
    model = Scripted([2])
    with pytest.raises(UsageError, match="no roles"):
        model.chat(two, "hi", None, "observation")
    with pytest.raises(UsageError, match="twice"):
        model.chat(three, "hi", None, "user", role="user")
    with pytest.raises(UsageError, match="positional"):
        model.chat(three, "hi", None, "user", 1, 2, 3, 4, 5, 6, 7)


def test_signatures_are_chatglm3s(three: ChatGLMTokenizer) -> None:
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(Scripted([2]).chat).parameters.items()
        if parameter.default is not parameter.empty
    }
    sampling = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "logits_processor": None}
    head = {"history": None, "role": "user"}
    assert list(arguments.items()) == list({**head, "max_length": 8192, "num_beams": 1, **sampling}.items())
    names = list(inspect.signature(Scripted([2]).stream_chat).parameters)
    assert names[:6] == ["tokenizer", "query", "history", "role", "past_key_values", "max_length"]
    assert names[-2:] == ["return_past_key_values", "kwargs"]


def test_longer_limit_of_32k(two: ChatGLMTokenizer) -> None:
    for ratio, limit in ((None, 8192), (1, 8192), (50, 32768)):
        model = Scripted([2], rope_ratio=ratio)
        model.chat(two, "hi")
        assert model.called_with["max_length"] == limit


def test_further_arguments_reach_generate(three: ChatGLMTokenizer) -> None:
    class Mine(LogitsProcessor):
        pass

    mine = LogitsProcessorList([Mine()])
    model = Scripted([2])
    model.chat(three, "hi", logits_processor=mine, repetition_penalty=1.1, eos_token_id=7)
    assert plain(model.called_with)["logits_processor"] == ["Mine", "InvalidScoreLogitsProcessor"]
    assert model.called_with["repetition_penalty"] == 1.1
    assert model.called_with["eos_token_id"] == 7
    assert len(mine) == 1  # the caller's list is not changed


@pytest.mark.parametrize("generation", [2, 3])
def test_reply_at_the_length_limit_loses_nothing(generation: int, file: Path) -> None:
    tokenizer = ChatGLMTokenizer(file, generation=generation)
    header = tokenizer.encode_text("\n") if generation == 3 else []
    model = Scripted([*header, *tokenizer.encode_text("I like tea")])
    assert model.chat(tokenizer, "hi")[0] == "I like tea"
    steps = list(model.stream_chat(tokenizer, "hi"))
    assert steps[-1][0] == "I like tea"
    stop = 2 if generation == 2 else tokenizer.get_command("<|user|>")
    beams = Scripted([*header, *tokenizer.encode_text("I like tea"), stop, 0, 0])
    assert beams.chat(tokenizer, "hi")[0] == "I like tea"


def test_padded_vocabulary_decodes_to_nothing(two: ChatGLMTokenizer) -> None:
    model = Scripted([*two.encode_text("hello"), two.vocab_size + 3])
    assert model.chat(two, "hi")[0] == "hello"
    assert [response for response, _ in model.stream_chat(two, "hi")][-1] == "hello"


# --- tools ---


def tool_reply(tokenizer: ChatGLMTokenizer, code: str, name: str = "get_weather") -> list[int]:
    text = tokenizer.encode_text
    return [
        *text("\n"),
        *text("let me see"),
        tokenizer.get_command("<|assistant|>"),
        *text(f"{name}\n"),
        *text(f"```python\n{code}\n```"),
        tokenizer.get_command("<|observation|>"),
    ]


def test_tool_call(three: ChatGLMTokenizer) -> None:
    model = Scripted(tool_reply(three, "tool_call(city='天', n=(1, -2))"))
    response, history = model.chat(three, "hello", [SYSTEM])
    assert response == {"name": "get_weather", "parameters": {"city": "天", "n": (1, -2)}}
    assert [item["role"] for item in history] == ["system", "user", "assistant", "assistant"]
    assert history[2] == {"role": "assistant", "metadata": "", "content": "let me see"}
    response, _ = model.chat(three, "hello")
    assert response == {"name": "get_weather", "content": " ```python\ntool_call(city='天', n=(1, -2))\n```"}


def test_tool_calls_are_never_evaluated(three: ChatGLMTokenizer, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    model = Scripted(tool_reply(three, f"tool_call(x=open({str(canary)!r}, 'w'))"))
    response, _ = model.chat(three, "hello", [SYSTEM])
    assert response == {"name": "get_weather", "parameters": None}
    assert not canary.exists()


def test_tool_call_of_generation_4(four: ChatGLM4Tokenizer) -> None:
    text, name = four.encode_text, four.get_command
    reply = [
        *text("\nlet me see"),
        name("<|assistant|>"),
        *text('get_weather\n{"city": "天"}'),
        name("<|observation|>"),
    ]
    model = Scripted(reply)
    response, history = model.chat(four, "hello", [SYSTEM])
    assert response == {"name": "get_weather", "parameters": {"city": "天"}}
    assert [item["role"] for item in history] == ["system", "user", "assistant", "assistant"]
    assert model.chat(four, "hello")[0] == {"name": "get_weather", "content": '{"city": "天"}'}
    steps = [step for step, _ in model.stream_chat(four, "hello", [SYSTEM])]
    assert steps[-1] == response
    assert [step for step in steps if isinstance(step, str)][-1] == "let me see"
    assert {step["parameters"] is None for step in steps[:-1] if isinstance(step, dict)} == {True}


def test_streams_of_tool_calls_never_raise(three: ChatGLMTokenizer) -> None:
    model = Scripted(tool_reply(three, "tool_call(city='天')"))
    steps = [response for response, _ in model.stream_chat(three, "hello", [SYSTEM])]
    assert steps[-1] == {"name": "get_weather", "parameters": {"city": "天"}}
    texts = [step for step in steps if isinstance(step, str)]
    assert texts[-1] == "let me see"
    assert all("get_" not in text for text in texts)  # the header line is held back until it is complete
    calls = [step for step in steps if isinstance(step, dict)]
    assert all(call["name"] == "get_weather" for call in calls)
    assert calls[0]["parameters"] is None


def test_the_marker_as_text_divides_nothing(three: ChatGLMTokenizer) -> None:
    model = Scripted([*three.encode_text("\n"), *three.encode_text("a <|assistant|>b\nc"), 2])
    response, history = model.chat(three, "hello")
    assert response == "a <|assistant|>b\nc"
    assert len(history) == 2


# --- a real model ---


@pytest.fixture(scope="module", params=[2, 3], ids=["generation2", "generation3"])
def loaded(request: pytest.FixtureRequest, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"), file, generation=request.param)
    return glmkit.load(folder)


def greedy(model: Any, ids: torch.Tensor, steps: int) -> list[int]:
    return model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()


def test_stream_generate_is_generate(loaded: Any) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("hello world", return_tensors="pt")
    ids = inputs["input_ids"]
    expected = greedy(model, ids, 8)
    steps = list(model.stream_generate(**inputs, max_length=ids.shape[1] + 8, do_sample=False, eos_token_id=[]))
    assert [step.shape[1] - ids.shape[1] for step in steps] == list(range(1, 9))
    assert steps[-1][0].tolist() == expected
    padded = tokenizer(["hello world", "I like tea and rice 1 + 2 = 3 hello"], padding=True, return_tensors="pt")
    row = {name: value[:1] for name, value in padded.items()}
    steps = list(model.stream_generate(**row, max_new_tokens=8, do_sample=False, eos_token_id=[]))
    assert steps[-1][0, -8:].tolist() == expected[-8:]


def test_stream_generate_ends(loaded: Any) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("hello world", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    expected = greedy(model, inputs["input_ids"], 8)[length:]
    first = expected.index(expected[2])
    arguments = {"max_new_tokens": 8, "do_sample": False}
    steps = list(model.stream_generate(**inputs, **arguments, eos_token_id=expected[2]))
    assert steps[-1][0, length:].tolist() == expected[: first + 1]  # the stop id is given out
    criteria = lambda ids, scores: torch.tensor([ids.shape[1] >= length + 3])  # noqa: E731
    assert len(list(model.stream_generate(**inputs, **arguments, eos_token_id=[], stopping_criteria=criteria))) == 3
    allowed = list(
        model.stream_generate(**inputs, **arguments, eos_token_id=[], prefix_allowed_tokens_fn=lambda row, ids: [7])
    )
    assert allowed[-1][0, length:].tolist() == [7] * 8
    with pytest.raises(UsageError, match="no room"):
        next(model.stream_generate(**inputs, max_length=length))
    with pytest.raises(UsageError, match="no argument nonsense"):
        next(model.stream_generate(**inputs, nonsense=1))
    with pytest.raises(UsageError, match="one row"):
        next(model.stream_generate(inputs["input_ids"].repeat(2, 1), max_new_tokens=3))


def test_stream_generate_does_what_it_is_told_or_says_so(loaded: Any) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("hello world", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    free = list(model.stream_generate(**inputs, **arguments, eos_token_id=[]))[-1][0, length:].tolist()
    bans = {"bad_words_ids": [[free[0]], free[1:3]], "suppress_tokens": [free[4]]}
    banned = list(model.stream_generate(**inputs, **arguments, **bans, eos_token_id=[]))[-1][0].tolist()
    assert banned == model.generate(**inputs, **arguments, **bans, eos_token_id=None)[0].tolist()
    assert free[0] not in banned[length:]
    for setting in ({"no_repeat_ngram_size": 2}, {"min_new_tokens": 5}, {"typical_p": 0.5}, {"stop_strings": "x"}):
        with pytest.raises(UsageError, match=f"does not do {next(iter(setting))}"):
            next(model.stream_generate(**inputs, **arguments, **setting))
    off = {"no_repeat_ngram_size": 0, "typical_p": 1.0, "min_length": 0}
    assert next(model.stream_generate(**inputs, **arguments, **off)).shape[1] == length + 1


def test_logits_processors_see_all_ids(loaded: Any) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("hello world", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    seen: list[list[int]] = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            forced = torch.full_like(scores, float("nan") if len(seen) == 2 else 0.0)
            forced[:, 9] += 1
            return forced

    processors = LogitsProcessorList([Watch(), InvalidScoreLogitsProcessor()])
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": [], "logits_processor": processors}
    steps = list(model.stream_generate(**inputs, **arguments))
    assert steps[-1][0, length:].tolist() == [9, 5, 9]  # 5 is what the official processor makes of NaN
    assert seen == [steps[-1][0, : length + number].tolist() for number in range(3)]


def test_stream_chat_reuses_the_cache(loaded: Any) -> None:
    """The second turn reads only what is new, and says what it would say after reading all ids at once."""
    model, tokenizer = loaded
    turns: list[tuple[list[int], list[int]]] = []  # what was read, and read and said
    generate = model.stream_generate

    def keep(input_ids: torch.Tensor, **arguments: Any) -> Iterator[Any]:
        for made in generate(input_ids, **arguments):
            turns[len(histories) :] = [(input_ids[0].tolist(), made[0][0].tolist())]
            yield made

    histories: list[Any] = []
    past = None
    model.stream_generate = keep
    try:
        for _ in range(2):
            steps = list(
                model.stream_chat(
                    tokenizer,
                    "hello",
                    histories[-1] if histories else [],
                    past_key_values=past,
                    return_past_key_values=True,
                    do_sample=False,
                    max_new_tokens=6,
                    eos_token_id=[],
                )
            )
            _, history, past = steps[-1]
            histories.append(history)
    finally:
        del model.stream_generate
    (_, first), (read, second) = turns
    assert len(second) - len(read) == 6
    assert len(histories[1]) == 2 * len(histories[0])
    if tokenizer.generation == 2:
        assert tokenizer.decode(read).startswith("\n\n[Round 2]")
    whole = first[:-1] + second  # the last id of a turn is not in the cache
    assert past.get_seq_length() == len(whole) - 1
    with torch.inference_mode():
        logits = model(torch.tensor([whole[:-1]])).logits[0]
    assert logits[-6:].argmax(-1).tolist() == second[-6:]


def test_the_later_turns_of_glm4_repeat_no_prefix(four: ChatGLM4Tokenizer) -> None:
    model = Scripted([*four.encode_text("\nhi"), four.get_command("<|user|>")])
    past = SimpleNamespace(get_seq_length=lambda: 7)
    steps = list(model.stream_chat(four, "hello", [{"role": "user", "content": "x"}], past_key_values=past))
    ids = [*four.build_single_message("user", "", "hello"), four.get_command("<|assistant|>")]
    assert model.called_with["input_ids"].tolist() == [ids]
    assert model.called_with["position_ids"].tolist() == [list(range(7, 7 + len(ids)))]
    assert steps[-1][0] == "hi"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatGLM1Tokenizer]:
    """A small ChatGLM-6B."""
    folder = tiny_families.write_chatglm(tmp_path_factory.mktemp("first"), endless=True)
    model = ChatGLMForCausalLM.from_pretrained(folder).eval()
    return model, ChatGLM1Tokenizer.from_pretrained(folder)


def test_stream_generate_of_the_first_generation(first: tuple[Any, ChatGLM1Tokenizer]) -> None:
    """As officially, the step that ends an answer is not given out: neither a stop id nor the last token of a limit."""
    model, tokenizer = first
    ids = tokenizer("hello world", return_tensors="pt")["input_ids"]
    expected = greedy(model, ids, 8)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    steps = [step[0].tolist() for step in model.stream_generate(ids, **arguments, eos_token_id=[])]
    assert steps == [expected[: ids.shape[1] + number] for number in range(1, 8)]
    third = expected[ids.shape[1] + 2]
    place = expected.index(third, ids.shape[1])
    steps = [step[0].tolist() for step in model.stream_generate(ids, **arguments, eos_token_id=third)]
    assert steps == [expected[: end + 1] for end in range(ids.shape[1], place)]
    padded = tokenizer(["hello world", "I like tea and rice 1 + 2 = 3 hello"], padding=True, return_tensors="pt")
    row = {name: value[:1] for name, value in padded.items()}
    steps = list(model.stream_generate(**row, **arguments, eos_token_id=[]))
    assert steps[-1][0, -7:].tolist() == expected[-8:-1]
    criteria = lambda ids, scores: torch.tensor([ids.shape[1] >= padded["input_ids"].shape[1]])  # noqa: E731
    assert len(list(model.stream_generate(**row, **arguments, eos_token_id=[], stopping_criteria=criteria))) == 0
    with pytest.raises(UsageError, match="both directions"):
        next(model.stream_generate(ids, past_key_values=object()))


def test_processors_of_the_first_generation_see_all_ids(first: tuple[Any, ChatGLM1Tokenizer]) -> None:
    model, tokenizer = first
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]

    class Nine(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert input_ids[0, : ids.shape[1]].tolist() == ids[0].tolist()
            forced = torch.zeros_like(scores)
            forced[:, 9] = 1
            return forced

    arguments = {"max_new_tokens": 4, "do_sample": False, "logits_processor": LogitsProcessorList([Nine()])}
    assert list(model.stream_generate(ids, **arguments))[-1][0, ids.shape[1] :].tolist() == [9, 9, 9]


def test_chat_of_the_first_generation(first: tuple[Any, ChatGLM1Tokenizer]) -> None:
    model, tokenizer = first
    response, history = model.chat(tokenizer, "hello", [("q", "a")], do_sample=False, max_length=60)
    assert history == [("q", "a"), ("hello", response)]
    texts = [text for text, _ in model.stream_chat(tokenizer, "hello", [("q", "a")], do_sample=False, max_length=60)]
    assert len(texts) > 3
    assert response.startswith(texts[-1])
    names = list(inspect.signature(model.chat).parameters)
    assert names[:5] == ["tokenizer", "query", "history", "max_length", "num_beams"]
    room = (
        60 - tokenizer("[Round 0]\n问：q\n答：a\n[Round 1]\n问：hello\n答：", return_tensors="pt")["input_ids"].shape[1]
    )
    assert reply_to(model, tokenizer, "hello", history=[("q", "a")], max_tokens=room).text == response


def test_chat_on_a_real_model(loaded: Any) -> None:
    model, tokenizer = loaded
    torch.manual_seed(0)
    response, history = model.chat(tokenizer, "hello", max_length=40)
    assert isinstance(response, (str, dict))
    assert len(history) == (1 if tokenizer.generation == 2 else 2)
    *_, (last, _) = model.stream_chat(tokenizer, "hello", do_sample=False, max_length=40)
    whole, _ = model.chat(tokenizer, "hello", do_sample=False, max_length=40)
    assert not isinstance(last, str) or whole.startswith(last.rstrip("\ufffd"))


# --- apply_chat_template ---


@pytest.mark.parametrize("generation", [2, 3])
@pytest.mark.parametrize(
    ("argument", "value", "inert"),
    [
        ("continue_final_message", True, False),
        ("chat_template", "{{ messages }}", False),
        ("documents", [{"title": "x", "text": "y"}], ()),
        ("return_assistant_tokens_mask", True, False),
        ("truncation", True, False),
        ("tokenizer_kwargs", {"return_length": True}, {}),
    ],
)
def test_arguments_that_would_change_the_result_are_refused(
    two: ChatGLMTokenizer, three: ChatGLMTokenizer, generation: int, argument: str, value: Any, inert: Any
) -> None:
    tokenizer, messages = {2: two, 3: three}[generation], [{"role": "user", "content": "hi"}]
    with pytest.raises(UsageError, match=f"apply_chat_template: {argument} is not supported"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, **{argument: value})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    others = {argument: inert, "sanitize_control_tokens": True, "enable_thinking": False}
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, **others)["input_ids"] == ids
    with pytest.raises(UsageError, match="without its name"):
        tokenizer.apply_chat_template(messages, None, None, "{{ messages }}")


def test_apply_chat_template(three: ChatGLMTokenizer, two: ChatGLMTokenizer) -> None:
    messages = [{"role": "user", "content": "hello <|assistant|>"}]
    built = three.build_chat_input("hello <|assistant|>")
    encoded = three.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert plain(encoded) == plain(built)
    assert three.apply_chat_template(messages, return_dict=False) == built["input_ids"][0].tolist()[:-1]
    assert three.apply_chat_template(messages, tokenize=False).startswith("[gMASK]sop<|user|>")
    pair = three.apply_chat_template(
        [messages, [{"role": "user", "content": "hi"}]], add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    assert pair["input_ids"].shape == (2, built["input_ids"].shape[1])
    assert pair["attention_mask"][1, 0] == 0
    with_tools = three.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert with_tools[2] == three.get_command("<|system|>")
    prompt = two(two.build_prompt("hello <|assistant|>"))["input_ids"]
    assert two.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
