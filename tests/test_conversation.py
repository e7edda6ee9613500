"""Answers for every front end: text, tools, limits, the context, cancelling, settings, and the copy on disk."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glmkit
import tiny
import tiny_families
from glmkit.chat.choices import OFFICIAL_SAMPLING, choose, official_sampling
from glmkit.chat.context import fit_context, reserve_tokens
from glmkit.chat.conversation import Reply, reply_to, stream_reply
from glmkit.chat.messages import Message
from glmkit.chat.prompt_cache import PromptCache
from glmkit.chat.session import Session
from glmkit.chat.store import ConversationStore
from glmkit.chat.templates import prompt_ids
from glmkit.engine.decode import CancelToken
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import OutputError, UsageError
from glmkit.pipelines import pipeline
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer

TOOLS = [{"name": "get_weather", "description": "weather", "parameters": {}}]
CALL = "```python\ntool_call(city='天')\n```"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(tokenizer_file, generation=3)


@pytest.fixture(scope="module")
def tokenizer_2(tokenizer_file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(tokenizer_file, generation=2)


@pytest.fixture(scope="module")
def tokenizer_1(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM1Tokenizer:
    return ChatGLM1Tokenizer(tiny_families.train_ice_text(tmp_path_factory.mktemp("one") / "ice_text.model"))


@pytest.fixture(scope="module")
def tokenizer_4(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM4Tokenizer:
    return tiny_families.glm4_tokenizer(tmp_path_factory.mktemp("four") / "tokenizer.model")


@pytest.fixture(scope="module")
def loaded(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"), tokenizer_file, endless=True)
    return glmkit.load(folder)


def answer(tokenizer: ChatGLMTokenizer, ids: list[int], messages: Any = "hello", **options: Any) -> tuple[Reply, str]:
    """The reply of a scripted model, and the sum of its pieces."""
    replying = stream_reply(tiny.ScriptedModel(tokenizer, ids), tokenizer, messages, temperature=0, **options)
    pieces = "".join(replying)
    return replying.reply, pieces


# --- what is answered ---


@pytest.mark.parametrize("generation", [2, 3])
def test_text(tokenizer: ChatGLMTokenizer, tokenizer_2: ChatGLMTokenizer, generation: int) -> None:
    used = tokenizer if generation == 3 else tokenizer_2
    script = tiny.say(used, "你好，今天天气很好。")
    reply, pieces = answer(used, script)
    assert reply.text == pieces == "你好，今天天气很好。"
    assert reply.messages == (Message("user", "hello"), Message("assistant", "你好，今天天气很好。"))
    assert (reply.finish_reason, reply.tool_call, reply.malformed, reply.dropped_turns) == ("stop", None, None, 0)
    assert reply.usage.prompt_tokens == len(prompt_ids(used, [Message("user", "hello")]))
    assert reply.usage.completion_tokens == len(script)
    assert reply.timings.prefill_seconds > 0
    assert str(reply) == reply.text


def test_full_width_marks_of_generation_1(tokenizer_1: ChatGLM1Tokenizer) -> None:
    script = [*tokenizer_1.encode_text("你好,hello! 好?"), tokenizer_1.eos_token_id]
    reply, pieces = answer(tokenizer_1, script, "hello", system="rice ")
    assert reply.text == pieces == "你好，hello! 好？"
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("stop", len(script))
    assert reply.messages[-1] == Message("assistant", "你好，hello! 好？")
    with pytest.raises(UsageError, match="ChatGLM-6B has no form for tools"):
        answer(tokenizer_1, script, tools=TOOLS)


def test_tools_of_generation_4(tokenizer_4: ChatGLM4Tokenizer) -> None:
    text, name = tokenizer_4.encode_text, tokenizer_4.get_command
    call = [*text('get_weather\n{"city": "天"}'), name("<|observation|>")]
    reply, pieces = answer(tokenizer_4, [*text("\n看看"), name("<|assistant|>"), *call], tools=TOOLS)
    assert reply.text == pieces == "看看"
    assert reply.finish_reason == "tool_calls"
    assert reply.tool_call is not None
    assert (reply.tool_call.name, reply.tool_call.arguments) == ("get_weather", {"city": "天"})
    follow = [*reply.messages, Message("observation", "25")]
    model = tiny.ScriptedModel(tokenizer_4, [*text("\n25"), name("<|user|>")])
    assert reply_to(model, tokenizer_4, follow, temperature=0).text == "25"
    assert model.given[0] == prompt_ids(tokenizer_4, follow)
    wrong, pieces = answer(tokenizer_4, [*text("get_weather\n{city"), name("<|observation|>")], tools=TOOLS)
    assert wrong.text == pieces == "get_weather\n{city"
    assert "no JSON" in (wrong.malformed or "")
    after_a_tool = [Message("user", "q"), Message("assistant", "1", "python"), Message("observation", "1")]
    code, _ = answer(tokenizer_4, [*text("python\nprint(1)"), name("<|observation|>")], after_a_tool)
    assert (code.text, code.tool_call, code.malformed) == ("print(1)", None, None)
    assert code.messages[-1] == Message("assistant", "print(1)", "python")


def test_the_context_of_generations_1_and_4(tokenizer_1: ChatGLM1Tokenizer, tokenizer_4: ChatGLM4Tokenizer) -> None:
    for used in (tokenizer_1, tokenizer_4):
        talk = turns(6)
        lengths = [len(prompt_ids(used, [talk[0], *talk[1 + 2 * dropped :]])) for dropped in range(7)]
        for dropped in (0, 3, 6):
            assert fit_context(used, talk, lengths[dropped] + 10, 10)[1] == dropped


def test_a_session_of_every_generation(
    tokenizer_1: ChatGLM1Tokenizer, tokenizer_4: ChatGLM4Tokenizer, state: Path
) -> None:
    for used, end in ((tokenizer_1, tokenizer_1.eos_token_id), (tokenizer_4, tokenizer_4.get_command("<|user|>"))):
        header = [] if used.generation == 1 else used.encode_text("\n")
        script = [*header, *used.encode_text("tea"), end] * 3
        model = tiny.ScriptedModel(used, script)
        loaded = SimpleNamespace(model=model, tokenizer=used, adapter=None)
        store = ConversationStore()
        session = Session(loaded, "tiny", settings={"temperature": 0}, store=store)
        finish(session, session.ask("hello", CancelToken()))
        finish(session, session.ask("rice", CancelToken()))
        finish(session, session.retry(CancelToken()))
        newest = store.newest()
        assert newest is not None
        assert store.open(newest).messages == tuple(session.messages)
        assert [message.content for message in session.messages] == ["hello", "tea", "rice", "tea"]


def test_all_forms_of_messages_give_the_same_prompt(tokenizer: ChatGLMTokenizer) -> None:
    forms = [
        ("tea", {"history": [("hello", "world")], "system": "rice"}),
        ([Message("system", "rice"), ("hello", "world"), {"role": "user", "content": "tea"}], {}),
        ([("hello", "world"), Message("user", "tea")], {"system_prompt": "rice"}),
    ]
    given = []
    for messages, options in forms:
        model = tiny.ScriptedModel(tokenizer, tiny.say(tokenizer, "rice"))
        reply_to(model, tokenizer, messages, temperature=0, **options)
        given.append(model.given[0])
    assert given[0] == given[1] == given[2]


def test_role_marks_and_headers_are_never_text(tokenizer: ChatGLMTokenizer) -> None:
    script = tiny.say(tokenizer, "I like tea", end="<|assistant|>")
    script += tiny.say(tokenizer, CALL, "get_weather", "<|observation|>")
    reply, pieces = answer(tokenizer, script, tools=TOOLS)
    assert reply.text == pieces == "I like tea"
    assert reply.finish_reason == "tool_calls"
    assert reply.tool_call is not None
    assert (reply.tool_call.name, reply.tool_call.arguments) == ("get_weather", {"city": "天"})
    assert reply.messages[-2:] == (Message("assistant", "I like tea"), Message("assistant", CALL, "get_weather"))
    assert reply.messages[0].tools == TOOLS


def test_a_malformed_call_becomes_text_with_its_reason(tokenizer: ChatGLMTokenizer) -> None:
    script = tiny.say(tokenizer, "__import__('os')", "get_weather", "<|observation|>")
    reply, pieces = answer(tokenizer, script, tools=TOOLS)
    assert reply.tool_call is None
    assert reply.text == pieces == "get_weather\n__import__('os')"
    assert reply.malformed is not None
    assert "expected one call of tool_call" in reply.malformed
    assert reply.finish_reason == "stop"


def test_without_tools_a_first_line_is_text(tokenizer: ChatGLMTokenizer) -> None:
    reply, pieces = answer(tokenizer, tiny.say(tokenizer, "tea and rice", "hello world"))
    assert reply.text == pieces == "hello world\ntea and rice"
    only, pieces = answer(tokenizer, [*tokenizer.encode_text("hello world\n"), 2])
    assert only.text == pieces == "hello world"


def test_limit_and_stop_texts(tokenizer: ChatGLMTokenizer) -> None:
    script = tiny.say(tokenizer, "I like tea and rice")
    cut, _ = answer(tokenizer, script, max_tokens=6)
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 6)
    assert cut.text == tokenizer.decode_ids(script[:6]).strip()
    for stop in ("tea", ["nothing", "tea"]):
        reply, pieces = answer(tokenizer, script, stop=stop)
        assert (reply.text, reply.finish_reason) == (pieces, "stop")
        assert reply.text.rstrip() == "I like"
        assert reply.messages[-1].content == reply.text
    kept, pieces = answer(tokenizer, script, stop="rice and tea")  # its beginning is held back and given out
    assert kept.text == pieces == "I like tea and rice"


# --- ending early ---


def test_cancel_takes_effect_before_the_next_token(tokenizer: ChatGLMTokenizer) -> None:
    script = tiny.say(tokenizer, "I like tea and rice")
    model = tiny.ScriptedModel(tokenizer, script)
    cancel = CancelToken()
    replying = stream_reply(model, tokenizer, "hello", temperature=0, cancel=cancel)
    first = next(replying)
    calls = len(model.given)
    cancel.cancel()
    assert list(replying) == []
    assert len(model.given) == calls
    assert replying.reply.finish_reason == "cancelled"
    assert replying.reply.text == first
    assert replying.reply.messages[-1] == Message("assistant", first)


def test_close_keeps_what_is_there(tokenizer: ChatGLMTokenizer) -> None:
    model = tiny.ScriptedModel(tokenizer, tiny.say(tokenizer, "I like tea and rice"))
    with stream_reply(model, tokenizer, "hello", temperature=0) as replying:
        first = next(replying)
        with pytest.raises(UsageError, match="still being written"):
            _ = replying.reply
    assert replying.reply.text == first
    assert replying.reply.finish_reason == "cancelled"
    assert list(replying) == []


def test_cancelled_before_the_first_word_leaves_no_empty_answer(tokenizer: ChatGLMTokenizer) -> None:
    cancel = CancelToken()
    cancel.cancel()
    reply, _ = answer(tokenizer, [], cancel=cancel)
    assert reply.messages == (Message("user", "hello"),)
    assert reply.usage.completion_tokens == 0


# --- the context ---


def turns(count: int) -> list[Message]:
    talk = [Message("system", "rice")]
    for number in range(count):
        talk += [Message("user", f"hello {number}"), Message("assistant", f"tea {number}")]
    return [*talk, Message("user", "how are you?")]


def test_the_oldest_whole_turns_go_first_and_exactly_as_many_as_needed(tokenizer: ChatGLMTokenizer) -> None:
    talk = turns(5)
    lengths = [len(prompt_ids(tokenizer, [talk[0], *talk[1 + 2 * dropped :]])) for dropped in range(6)]
    for dropped, length in enumerate(lengths):
        ids, left_out = fit_context(tokenizer, talk, length + 10, 10)
        assert left_out == dropped
        assert ids == prompt_ids(tokenizer, [talk[0], *talk[1 + 2 * dropped :]])
        if dropped < 5:
            assert fit_context(tokenizer, talk, length + 9, 10)[1] == dropped + 1


def test_a_turn_with_tools_goes_whole(tokenizer: ChatGLMTokenizer) -> None:
    tool_turn = [
        Message("user", "hello"),
        Message("assistant", CALL, "get_weather"),
        Message("observation", "rice"),
        Message("assistant", "tea"),
    ]
    last = [Message("user", "how are you?"), Message("assistant", CALL, "get_weather"), Message("observation", "tea")]
    system = Message("system", "", tools=TOOLS)
    expected = prompt_ids(tokenizer, [system, *last])
    ids, dropped = fit_context(tokenizer, [system, *tool_turn, *last], len(expected) + 1, 0)
    assert (ids, dropped) == (expected, 1)


def test_the_last_turn_may_use_the_reserve_but_not_all(tokenizer: ChatGLMTokenizer) -> None:
    question = [Message("user", "how are you?")]
    length = len(prompt_ids(tokenizer, question))
    assert fit_context(tokenizer, question, length + 1, 100)[1] == 0
    with pytest.raises(UsageError, match=f"{length} tokens.*context is {length} tokens") as found:
        fit_context(tokenizer, question, length, 0)
    assert "shorten" in (found.value.hint or "")


def test_reserve() -> None:
    assert reserve_tokens(8192, None) == 1024
    assert reserve_tokens(1024, None) == 256
    assert reserve_tokens(8192, 2000) == 2000
    assert reserve_tokens(1024, 2000) == 512


def test_the_reply_counts_dropped_turns_and_keeps_all_messages(tokenizer: ChatGLMTokenizer) -> None:
    talk = turns(20)
    model = tiny.ScriptedModel(tokenizer, tiny.say(tokenizer, "tea"), context_tokens=200)
    reply = reply_to(model, tokenizer, talk, temperature=0)
    assert 0 < reply.dropped_turns < 20
    assert reply.messages == (*talk, Message("assistant", "tea"))
    assert model.given[0] == prompt_ids(tokenizer, [talk[0], *talk[1 + 2 * reply.dropped_turns :]])
    assert reply.usage.prompt_tokens == len(model.given[0]) <= 150


def test_nothing_to_answer(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(UsageError, match="no message to answer"):
        answer(tokenizer, [], [Message("system", "rice")])


# --- reading only what is new ---


def test_a_prompt_cache_changes_nothing_but_the_work(loaded: Any) -> None:
    reuse = PromptCache()
    talk: list[Message] = []
    for question in ("hello", "how are you?", "I like tea"):
        talk.append(Message("user", question))
        plain = loaded.chat(talk, max_tokens=12)
        cached = loaded.chat(talk, max_tokens=12, reuse=reuse)
        assert cached.text == plain.text
        assert cached.usage.prompt_tokens == plain.usage.prompt_tokens
        assert cached.usage.completion_tokens == plain.usage.completion_tokens
        assert (cached.usage.cached_tokens > 0) == (len(talk) > 1)
        talk = list(plain.messages)


def test_a_prompt_cache_is_read_as_far_as_it_is_the_same(tokenizer: ChatGLMTokenizer) -> None:
    reuse = PromptCache()
    first = tiny.say(tokenizer, "tea")
    reply = reply_to(tiny.ScriptedModel(tokenizer, first), tokenizer, "hello", temperature=0, reuse=reuse)
    model = tiny.ScriptedModel(tokenizer, tiny.say(tokenizer, "rice"))
    talk = [*reply.messages, Message("user", "how are you?")]
    reply_to(model, tokenizer, talk, temperature=0, reuse=reuse)
    whole = prompt_ids(tokenizer, talk)
    assert whole[-len(model.given[0]) :] == model.given[0]
    assert len(whole) - len(model.given[0]) == len(prompt_ids(tokenizer, talk[:1])) + len(first) - 1
    model = tiny.ScriptedModel(tokenizer, tiny.say(tokenizer, "rice"))
    reply_to(model, tokenizer, talk, temperature=0, reuse=reuse, repetition_penalty=1.1)
    assert model.given[0] == whole


# --- settings ---


def model_with(**config: Any) -> SimpleNamespace:
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    return SimpleNamespace(generation_config=SimpleNamespace(**(dict.fromkeys(names) | config)))


def test_default_settings() -> None:
    assert SamplingOptions(temperature=0.8, top_p=0.8, top_k=50) == OFFICIAL_SAMPLING
    assert choose(model_with()).options == OFFICIAL_SAMPLING
    assert not choose(model_with(do_sample=False)).options.do_sample
    assert choose(model_with(do_sample=True, temperature=0.5)).options == SamplingOptions(temperature=0.5, top_k=50)
    assert choose(model_with(top_p=0.7, top_k=0)).options == SamplingOptions(top_p=0.7)
    assert choose(model_with(max_new_tokens=9)).max_new_tokens == 9


def test_default_settings_of_each_generation() -> None:
    by_generation = {
        generation: official_sampling(None, SimpleNamespace(generation=generation)) for generation in (1, 2, 3, 4)
    }
    assert by_generation[1] == SamplingOptions(temperature=0.95, top_p=0.7, top_k=50)
    assert by_generation[2] == by_generation[3] == by_generation[4] == OFFICIAL_SAMPLING
    assert choose(model_with(), official=by_generation[1]).options == by_generation[1]
    greedy = choose(model_with(do_sample=False), official=by_generation[1], sampling={"do_sample": True})
    assert greedy.options == by_generation[1]


def test_settings_overrule_by_any_name() -> None:
    greedy = model_with(do_sample=False)
    assert choose(greedy, sampling={"temp": 0.5}).options == replace(OFFICIAL_SAMPLING, temperature=0.5)
    assert choose(greedy, sampling={"do_sample": True}).options == OFFICIAL_SAMPLING
    assert choose(model_with(), sampling={"do_sample": False}).options.temperature == 0
    assert choose(model_with(), sampling={"top_k": None}).options.top_k == 50
    assert choose(model_with(), sampling={"repeat_penalty": 1.2}).options.repetition_penalty == 1.2
    for name in ("max_tokens", "max_new_tokens", "max_completion_tokens", "max_output_tokens"):
        assert choose(model_with(), sampling={name: 7}).max_new_tokens == 7
    own = SamplingOptions(temperature=0.3)
    assert choose(model_with(do_sample=False), own).options == own


@pytest.mark.parametrize(
    ("sampling", "hint"), [({"temprature": 1}, "temperature"), ({"max_token": 1}, "max_tokens"), ({"xyz": 1}, "known:")]
)
def test_unknown_settings(sampling: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError, match="there is no setting") as found:
        choose(model_with(), sampling=sampling)
    assert hint in (found.value.hint or "")


@pytest.mark.parametrize("bad", [0, -1, 1.5, "5", True])
def test_bad_limits(bad: Any) -> None:
    with pytest.raises(UsageError, match="max_new_tokens"):
        choose(model_with(), sampling={"max_tokens": bad})


def test_a_seed_makes_answers_repeatable(loaded: Any) -> None:
    texts = {loaded.chat("hello", temperature=1.0, top_k=0, seed=3, max_tokens=10).text for _ in range(3)}
    assert len(texts) == 1
    others = {loaded.chat("hello", temperature=1.0, top_k=0, seed=seed, max_tokens=10).text for seed in range(5)}
    assert len(others) > 1


# --- a session and its transcript ---


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "glmkit"


def finish(session: Session, replying: Any) -> Reply:
    for _ in replying:
        pass
    return session.finish(replying)


def test_a_session_is_on_disk_after_every_message(loaded: Any, state: Path) -> None:
    store = ConversationStore()
    session = Session(loaded, "tiny", settings={"max_new_tokens": 4}, store=store)
    replying = session.ask("hello", CancelToken())
    newest = store.newest()
    assert newest is not None
    assert store.open(newest).messages == (Message("user", "hello"),)  # a kill now loses the answer only
    reply = finish(session, replying)
    kept = store.open(newest)
    assert (kept.messages, kept.settings, kept.title) == (reply.messages, {"max_new_tokens": 4}, "hello")
    path = state / "conversations" / f"{newest}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_what_a_session_can_do(loaded: Any) -> None:
    session = Session(loaded, "tiny", settings={"max_new_tokens": 4})
    session.set_system("rice")
    finish(session, session.ask("hello", CancelToken()))
    first = session.messages
    finish(session, session.ask("tea", CancelToken()))
    assert [message.role for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    finish(session, session.retry(CancelToken()))
    assert len(session.messages) == 5
    session.undo()
    assert session.messages == first
    session.set_system(None)
    assert session.messages[0].role == "user"
    session.set("temperature", 0.5)
    assert session.effective()["temperature"] == 0.5
    with pytest.raises(UsageError, match="temperature"):
        session.set("temperature", -1)
    assert session.settings["temperature"] == 0.5
    session.set("temperature", None)
    assert session.effective()["temperature"] == 0
    session.clear()
    assert session.messages == []
    with pytest.raises(UsageError, match="no question"):
        session.undo()


def test_an_unanswered_question_is_replaced_and_a_too_long_one_not_kept(loaded: Any) -> None:
    session = Session(loaded, "tiny", settings={"max_new_tokens": 2}, messages=[Message("user", "lost")])
    finish(session, session.ask("hello", CancelToken()))
    assert session.messages[0].content == "hello"
    before = session.messages
    with pytest.raises(UsageError, match="tokens"):
        session.ask("tea " * 300, CancelToken())
    assert session.messages == before


def test_a_full_disk_ends_the_writing_and_not_the_talk(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    store = ConversationStore(tmp_path / "file")
    session = Session(loaded, "tiny", settings={"max_new_tokens": 2}, store=store, warn=told.append)
    finish(session, session.ask("hello", CancelToken()))
    assert len(told) == 1
    assert "not being saved" in told[0]
    with pytest.raises(OutputError, match="cannot write"):
        store.save(session.conversation())


def test_a_session_goes_on_with_a_conversation_and_begins_another(loaded: Any, state: Path) -> None:
    store = ConversationStore()
    first = Session(loaded, "tiny", settings={"max_new_tokens": 2}, store=store)
    finish(first, first.ask("hello", CancelToken()))
    newest = store.newest()
    assert newest is not None
    store.rename(newest, "tea")
    second = Session(loaded, "tiny", settings={"max_new_tokens": 2}, store=store, earlier=store.open(newest))
    assert second.messages == first.messages
    finish(second, second.ask("rice", CancelToken()))
    assert [(entry.id, entry.title, entry.count) for entry in store.list().entries] == [(newest, "tea", 4)]
    second.clear()
    finish(second, second.ask("how are you?", CancelToken()))
    assert {entry.title for entry in store.list().entries} == {"tea", "how are you?"}


# --- MindFormers' door ---


def test_pipeline(loaded: Any) -> None:
    generate = pipeline(task="text_generation", model=loaded, max_length=60, batch_size=2)
    expected = [
        loaded.chat(text, max_tokens=60 - len(prompt_ids(loaded.tokenizer, [Message("user", text)]))).text
        for text in ("hello", "how are you?")
    ]
    assert generate("hello") == [{"text_generation_text": [expected[0]]}]
    both = generate(["hello", "how are you?"])
    assert [one["text_generation_text"] for one in both] == [[text] for text in expected]
    three = loaded.chat("hello", max_tokens=3).text
    assert generate("hello", max_new_tokens=3) == [{"text_generation_text": [three]}]
    assert pipeline(model=loaded.model, tokenizer=loaded.tokenizer, max_length=60)("hello") == generate("hello")


def test_pipeline_takes_a_prompt_that_is_one_already(tokenizer_2: ChatGLMTokenizer) -> None:
    given = []
    for text in ("hello", tokenizer_2.build_prompt("hello")):
        model = tiny.ScriptedModel(tokenizer_2, tiny.say(tokenizer_2, "tea"))
        assert pipeline(model=model, tokenizer=tokenizer_2)(text) == [{"text_generation_text": ["tea"]}]
        given.append(model.given[0])
    assert given[0] == given[1]


def test_pipeline_refuses_what_it_does_not_know(loaded: Any) -> None:
    with pytest.raises(UsageError, match="no task 'translation'") as found:
        pipeline("translation", model=loaded)
    assert "text_generation" in (found.value.hint or "")
    with pytest.raises(UsageError) as found:
        pipeline(model="glm2_6c")
    assert "glm2_6b" in (found.value.hint or "")
    with pytest.raises(UsageError, match="no setting 'temprature'"):
        pipeline(model=loaded, temprature=1)
    with pytest.raises(UsageError, match="60"):
        pipeline(model=loaded, max_length=60)("tea " * 100)
    with pytest.raises(UsageError, match="device"):
        pipeline(model=loaded, device="cpu")
    with pytest.raises(UsageError, match="not on this machine"):
        pipeline(model="glm2_6b")


def test_load_gives_both_methods(loaded: Any) -> None:
    with torch.no_grad():
        assert "".join(loaded.stream("hello", max_tokens=5)) == loaded.chat("hello", max_tokens=5).text


@pytest.mark.parametrize("write", [tiny_families.write_chatglm, tiny_families.write_glm4, tiny_families.write_glm])
def test_every_family_answers_through_the_loader(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    other = glmkit.load(folder)
    reply = other.chat("hello [MASK] world", max_tokens=6)
    assert reply.usage.completion_tokens >= 1
    assert "".join(other.stream("hello [MASK] world", max_tokens=6)) == reply.text
    assert reply.messages[0] == Message("user", "hello [MASK] world")
    (shown,) = pipeline(model=other, max_length=60)("hello", max_new_tokens=3)
    assert shown["text_generation_text"] == [other.chat("hello", max_tokens=3).text]
