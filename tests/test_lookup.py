"""Drafts from the text itself: the same tokens with fewer calls of the model, and nothing left behind in the cache."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glmkit
import tiny
import tiny_families
from glmkit import hf
from glmkit.chat import conversation
from glmkit.chat.choices import choose
from glmkit.chat.conversation import reply_to
from glmkit.chat.session import Session
from glmkit.chat.templates import prompt_ids
from glmkit.engine import CancelToken, SamplingOptions, new_cache, stream
from glmkit.engine.layout import CausalLayout
from glmkit.engine.lookup import Lookup
from glmkit.errors import GenerationError, UsageError
from glmkit.models.chatglm import ChatGLMForCausalLM
from glmkit.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig

GREEDY = SamplingOptions(temperature=0)
SEEDED = SamplingOptions(temperature=0.2, top_k=20, top_p=0.9, seed=3)
VOCABULARY = 120

# --- what is proposed ------------------------------------------------------------------------------------------------


def drafts(text: str, most: int = 4, room: int = 99) -> str:
    return "".join(map(chr, Lookup([ord(letter) for letter in text], most).propose(room)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("ab", ""),
        ("abcdefg", ""),
        ("abcdef-ab", "cdef"),
        ("xabc1-yabc2-xab", "c1-y"),  # the longer match wins over the later one
        ("abc1-abc2-ab", "c2-a"),  # the later one of equals
        ("a-b-a", ""),  # one token is too little
        ("zabab", "abab"),  # a period goes on as it was
        ("aaa", "aaaa"),
    ],
)
def test_a_draft_is_what_followed_the_longest_equal_end(text: str, expected: str) -> None:
    assert drafts(text) == expected


def test_a_draft_is_no_longer_than_there_is_room_and_stops_before_a_stop_id() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert Lookup(text, 4).propose(2) == [3, 4]
    assert Lookup(text, 4).propose(0) == []
    assert Lookup(text, 1).propose(9) == [3]
    assert Lookup(text, 4, {5}).propose(9) == [3, 4]
    assert Lookup(text, 4, {3}).propose(9) == []


def test_the_length_follows_the_luck() -> None:
    lookup = Lookup([*range(50), 0, 1], 16)
    lengths = []
    for right in (True, True, True, False, False, False, False, False, True):
        draft = lookup.propose(99)
        lengths.append(len(draft))
        lookup.judge(len(draft), len(draft) if right else 0)
    assert lengths == [4, 8, 16, 16, 8, 4, 2, 1, 1]
    assert (lookup.drafted_tokens, lookup.accepted_tokens) == (sum(lengths), 4 + 8 + 16 + 1)


@pytest.mark.parametrize("alphabet", [2, 5, 40])
def test_it_finds_what_a_search_through_the_whole_text_finds(alphabet: int) -> None:
    """Against a plain search; among more than eight places the eight most recent ones count."""
    numbers = torch.randint(0, alphabet, (300,), generator=torch.Generator().manual_seed(alphabet)).tolist()
    lookup, text = Lookup([], 3), []
    for token in numbers:
        lookup.push(token)
        text.append(token)
        places = [end for end in range(1, len(text) - 1) if text[end - 1 : end + 1] == text[-2:]][-8:]
        expected = []
        if places:

            def equal(end: int) -> int:
                return sum(
                    1 for _ in itertools.takewhile(lambda n: text[end - n] == text[-1 - n], range(min(16, end + 1)))
                )

            longest = max(map(equal, places))
            end = max(place for place in places if equal(place) == longest)
            expected = (text[end + 1 :] * 3)[:3]
        assert lookup.propose(9) == expected


def test_a_step_costs_microseconds_in_a_long_text() -> None:
    numbers = torch.randint(0, 30, (33_000,), generator=torch.Generator().manual_seed(0)).tolist()
    lookup = Lookup(numbers[:32_000], 8)
    started = time.process_time()
    for token in numbers[32_000:]:
        lookup.push(token)
        lookup.propose(8)
    assert (time.process_time() - started) / 1000 < 200e-6  # about 8; a search through 32,000 tokens takes 1,000


# --- models ----------------------------------------------------------------------------------------------------------


def _lively(model: Any) -> Any:
    """Weights so large that an answer is not one token for ever, also where the embedding is the output layer too."""
    with torch.no_grad():
        tied = model.config.tie_word_embeddings
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 if tied and "embedding" not in name else 0.2)
    return model.eval()


def _chatglm2(**changes: Any) -> Any:
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "ffn_hidden_size": 48,
        "padded_vocab_size": VOCABULARY,
        "seq_length": 256,
        "add_qkv_bias": True,
    }
    return ChatGLM2ForCausalLM(ChatGLM2Config(**{**sizes, **changes}))


def _chatglm(**changes: Any) -> Any:
    sizes = {
        "num_layers": 2,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "inner_hidden_size": 64,
        "num_attention_heads": 4,
        "max_sequence_length": 256,
        "mask_token_id": 110,
        "gmask_token_id": 111,
        "bos_token_id": 112,
        "eos_token_id": 113,
        "pad_token_id": 3,
    }
    return ChatGLMForCausalLM(ChatGLMConfig(**{**sizes, **changes}))


def _glm() -> Any:
    sizes = {"num_layers": 2, "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
    marks = {"max_sequence_length": 256, "output_predict": True, "sop_token_id": 112, "mask_token_ids": [110, 111]}
    return GLMForConditionalGeneration(GLMConfig(**sizes, **marks))


def _glm130b() -> Any:
    sizes = {"num_layers": 2, "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
    marks = {"mask_token_id": 110, "gmask_token_id": 111, "bos_token_id": 112, "max_sequence_length": 256}
    return GLM130BForCausalLM(GLM130BConfig(**sizes, **marks))


FAMILIES: dict[str, Any] = {
    "chatglm2": _chatglm2,
    "glm-4": lambda: _chatglm2(rope_ratio=500, rope_ratio_applies_to="base", generation=4),
    "p-tuned": lambda: _chatglm2(pre_seq_len=3),
    "chatglm": _chatglm,
    "chatglm, one row": lambda: _chatglm(position_encoding_2d=False),
    "glm": _glm,
    "glm-130b": _glm130b,
}
_BLANKS = ("chatglm", "chatglm, one row", "glm", "glm-130b")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, list[list[int]]]:
    """A model of each family, and prompts for it: without repetition, with one, and one that is a single period."""
    torch.manual_seed(0)
    model = _lively(FAMILIES[request.param]())
    numbers = torch.randperm(100, generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [numbers[:20], [*numbers[:12], *numbers[30:34], *numbers[:12], *numbers[:5]], numbers[:3] * 8]
    if request.param in _BLANKS:
        prompts = [[*ids, mask, 112] for ids in prompts for mask in (110, 111)]
    return model, prompts


def told(model: Any, ids: list[int], options: SamplingOptions = GREEDY, **more: Any) -> tuple[list[int], Any]:
    """The tokens of an answer, and its usage."""
    given = {"stop_ids": (), "max_new_tokens": 32, **more}
    steps = list(stream(model, ids, options, **given))
    return [step.token_id for step in steps], steps[-1].usage


OPTIONS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "penalty": dataclasses.replace(SEEDED, repetition_penalty=1.1, banned_ids=((7,), (3, 4))),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_answer_is_the_one_without_drafts(family: tuple[Any, list[list[int]]], kind: str) -> None:
    model, prompts = family
    drafted = accepted = 0
    said: set[int] = set()
    for ids, most in zip(prompts, (8, 1, 8, 3, 8, 8)):
        plain, _ = told(model, ids, OPTIONS[kind])
        cache = new_cache(model, 1, 32)
        tokens, usage = told(model, ids, OPTIONS[kind], lookup_tokens=most, cache=cache)
        assert tokens == plain
        said.update(plain)
        assert cache.get_seq_length() == len(ids) + len(tokens) - 1
        assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}
        drafted += usage.drafted_tokens
        accepted += usage.accepted_tokens
    assert drafted > 0
    assert len(said) > 8
    if kind in ("greedy", "seeded"):
        assert 0 < accepted < drafted, "both ways out of a comparison are seen"


def test_what_is_left_in_the_cache_is_what_single_steps_leave(family: tuple[Any, list[list[int]]]) -> None:
    model, prompts = family
    caches = []
    for most in (0, 8):
        caches.append(new_cache(model, 1, 200))
        told(model, prompts[-1], lookup_tokens=most, cache=caches[-1])
    for mine, theirs in zip(caches[1].layers, caches[0].layers):
        filled = theirs.filled_tokens
        torch.testing.assert_close(mine.keys[:, :, :filled], theirs.keys[:, :, :filled], rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.values[:, :, :filled], theirs.values[:, :, :filled], rtol=0, atol=1e-4)


def test_layouts_can_be_wound_back(family: tuple[Any, list[list[int]]]) -> None:
    model, prompts = family
    rows = [prompts[0], [0, 0, *prompts[0][2:]]]
    ids, pads = torch.tensor(rows), torch.tensor([0, 2])
    makes = [lambda: CausalLayout(ids.shape[1], pads)]
    if hasattr(model, "input_layout"):
        makes = [lambda: model.input_layout(ids, pads)]
    for make in makes:
        one, many = make(), make()
        for tokens, back in ((1, 0), (5, 3), (1, 1), (4, 4), (3, 0)):
            got = many.step(tokens)
            singles = [one.step() for _ in range(tokens)]
            positions = torch.cat([single["position_ids"] for single in singles], dim=-1)
            assert torch.equal(got["position_ids"], positions)
            for place, single in enumerate(singles):
                mask, width = single["attention_mask"], single["attention_mask"].shape[-1]
                seen = got["attention_mask"] if mask.ndim == 2 else got["attention_mask"][:, :, place : place + 1]
                assert torch.equal(seen[..., :width], mask)
            one.rewind(back)
            many.rewind(back)
        many.select([1])
        one.select([1])
        after, expected = many.step(2), one.step(2)
        assert all(torch.equal(after[name], expected[name]) for name in expected)


# --- a model whose logits are a table --------------------------------------------------------------------------------


class Table:
    """A model whose logits depend on the last token; it sees what a real model would see through its cache."""

    def __init__(self, table: torch.Tensor, context: int | None = None) -> None:
        self.table, self.device = table, torch.device("cpu")
        self.config = SimpleNamespace(num_hidden_layers=2, vocab_size=len(table))
        if context is not None:
            self.config.max_position_embeddings = context
        self.calls: list[int] = []  # tokens of each
        self.widest = 0
        self.before = lambda: None

    def __call__(self, input_ids: torch.Tensor, *, past_key_values: Any, logits_to_keep: int, **_: Any) -> Any:
        self.calls.append(input_ids.shape[1])
        states = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(states, states, 0)
        self.before()
        past_key_values.update(states, states, 1)
        self.widest = max(self.widest, keys.shape[2])
        ids = keys[:, 0, -input_ids.shape[1] :, 0].long()
        return SimpleNamespace(logits=self.table[ids][:, -logits_to_keep:])


def saying(*text: int, size: int = 32) -> torch.Tensor:
    """After each token of the text the next one is certain."""
    table = torch.zeros(size, size)
    for now, then in itertools.pairwise(text):
        table[now, then] = 50.0
    return table


def test_copying_takes_less_than_half_of_the_calls() -> None:
    text = list(range(3, 31))
    model = Table(saying(*text))
    tokens, _ = told(model, [*text, 3, 4], max_new_tokens=26)
    assert tokens == text[2:]
    plain, model.calls = model.calls, []
    again, usage = told(model, [*text, 3, 4], max_new_tokens=26, lookup_tokens=8)
    assert again == tokens
    assert len(plain) == 26
    assert len(model.calls) == 26 - usage.accepted_tokens == 5
    assert model.calls == [30, 5, 9, 9, 2]
    assert usage.completion_tokens == 26


def test_a_text_that_repeats_nothing_is_computed_as_without() -> None:
    model = Table(saying(*range(3, 31)))
    _, usage = told(model, [3], max_new_tokens=20, lookup_tokens=8)
    assert model.calls == [1] * 20
    assert (usage.drafted_tokens, usage.accepted_tokens) == (0, 0)


def test_wrong_drafts_become_short() -> None:
    """The pairs were there before, but what follows them now is always something else."""
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    model = Table(torch.zeros(32, 32))
    model.table[:, 6] = 1.0  # 6 6 6 ... would be drafted right; the sampler draws from 32 nearly equal tokens
    _, usage = told(model, text * 4, SamplingOptions(seed=0), max_new_tokens=200, lookup_tokens=8)
    assert usage.drafted_tokens < 1.3 * 200, "about one token a step, where there is a pair at all"


@pytest.mark.parametrize("limit", range(1, 14))
def test_a_limit_inside_a_draft(limit: int) -> None:
    text = list(range(3, 31))
    model = Table(saying(*text))
    cache = new_cache(model, 1, 8)
    steps = list(stream(model, [*text, 3, 4], GREEDY, stop_ids=(), max_new_tokens=limit, lookup_tokens=8, cache=cache))
    assert [step.token_id for step in steps] == text[2 : 2 + limit]
    assert [step.finish_reason for step in steps] == [None] * (limit - 1) + ["length"]
    assert steps[-1].usage.completion_tokens == limit
    assert cache.get_seq_length() == 30 + limit - 1


@pytest.mark.parametrize("stop", range(5, 16))
def test_a_stop_id_inside_a_draft(stop: int) -> None:
    text = list(range(3, 31))
    model = Table(saying(*text))
    cache = new_cache(model, 1, 8)
    given = {"stop_ids": {stop}, "max_new_tokens": 99, "cache": cache}
    steps = list(stream(model, [*text, 3, 4], GREEDY, **given, lookup_tokens=8))
    assert [step.token_id for step in steps] == list(range(5, stop + 1))
    assert steps[-1].finish_reason == "stop"
    assert not steps[-1].is_text
    assert cache.get_seq_length() == 30 + len(steps) - 1
    assert len(model.calls) == 1 + len(steps) - 1 - steps[-1].usage.accepted_tokens


def test_the_end_of_the_context_inside_a_draft() -> None:
    text = list(range(3, 31))
    model = Table(saying(*text), context=40)
    tokens, _ = told(model, [*text, 3, 4], max_new_tokens=99, lookup_tokens=8)
    assert tokens == text[2:12]
    assert model.widest <= 40


def test_cancel_and_close_inside_a_draft_leave_a_cache_that_can_be_continued() -> None:
    text = list(range(3, 31))
    for end in ("cancel", "close"):
        for count in range(1, 12):
            model, cancel = Table(saying(*text)), CancelToken()
            cache = new_cache(model, 1, 8)
            given = {"stop_ids": (), "max_new_tokens": 26, "cache": cache, "lookup_tokens": 8}
            steps = stream(model, [*text, 3, 4], GREEDY, cancel=cancel, **given)
            tokens = [next(steps).token_id for _ in range(count)]
            if end == "cancel":
                cancel.cancel()
                last = next(steps)
                assert (last.finish_reason, last.usage.completion_tokens) == ("cancelled", count)
            else:
                steps.close()
            assert tokens == text[2 : 2 + count]
            assert cache.get_seq_length() == 30 + count - 1
            held = cache.layers[1].keys[0, 0, : 30 + count - 1, 0].tolist()
            assert held == [*text, 3, 4, *tokens[:-1]]
            more, _ = told(model, tokens[-1:], max_new_tokens=5, cache=cache)
            assert more == text[2 + count : 7 + count]


def test_a_call_that_fails_halfway_leaves_the_cache_of_before() -> None:
    text = list(range(3, 31))
    model = Table(saying(*text))

    def fail() -> None:
        if len(model.calls) == 3:
            raise RuntimeError("no memory")

    model.before = fail
    cache = new_cache(model, 1, 8)
    steps = stream(model, [*text, 3, 4], GREEDY, stop_ids=(), max_new_tokens=26, cache=cache, lookup_tokens=8)
    tokens = []
    with pytest.raises(RuntimeError, match="no memory"):
        tokens.extend(step.token_id for step in steps)
    assert [layer.get_seq_length() for layer in cache.layers] == [30 + 1 + 5 - 1] * 2


def test_an_error_names_the_step_of_its_token() -> None:
    text = list(range(3, 31))
    table = saying(*text)
    table[9, :] = math.nan
    for most in (0, 8):
        given = {"stop_ids": (), "max_new_tokens": 26, "lookup_tokens": most}
        steps = stream(Table(table), [*text, 3, 4], GREEDY, **given)
        said = []
        with pytest.raises(GenerationError, match="row 0 at step 5"):
            said.extend(step.token_id for step in steps)
    assert next(steps, None) is None


def test_further_text_can_be_looked_at() -> None:
    text = list(range(3, 31))
    model = Table(saying(*text))
    tokens, usage = told(model, [3, 4], max_new_tokens=26, lookup_tokens=8, lookup_ids=text)
    assert tokens == text[2:]
    assert usage.accepted_tokens > 18
    assert usage.prompt_tokens == 2


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "8"])
def test_a_wrong_number_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="lookup_tokens"):
        stream(Table(saying(3, 4)), [3], GREEDY, stop_ids=(), max_new_tokens=3, lookup_tokens=wrong)


def test_a_cache_that_cannot_forget_is_refused() -> None:
    torch.manual_seed(0)
    model = _chatglm2()
    cache = hf.DynamicCache(config=model.config)
    with pytest.raises(UsageError, match="DynamicCache"):
        stream(model, [3], GREEDY, stop_ids=(), max_new_tokens=3, lookup_tokens=4, cache=cache)


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.3, "seed": 5}])
def test_a_conversation_is_the_same_and_drafts_come_from_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    tokenizer = tiny.train_tokenizer(tmp_path / "tokenizer.model")
    loaded = glmkit.load(tiny.write_model(tmp_path / "model", tokenizer, endless=True), dtype="float32")
    _lively(loaded.model)
    given = []

    def remember(model: Any, prompt_ids: Any, options: Any, **more: Any) -> Any:
        given.append((list(more["lookup_ids"]), list(prompt_ids), more["lookup_tokens"]))
        return stream(model, prompt_ids, options, **more)

    monkeypatch.setattr(conversation, "stream", remember)
    said = []
    for most in (0, 6):
        session = Session(loaded, "tiny", settings={"max_new_tokens": 30, "lookup_tokens": most, **sampling})
        for question in ("hello world, how are you?", "I like tea and rice"):
            replying = session.ask(question, CancelToken())
            for _ in replying:
                pass
            session.finish(replying)
        said.append([message.content for message in session.messages])
        assert session.effective()["lookup_tokens"] == most
    assert said[0] == said[1]
    assert [most for _, _, most in given] == [0, 0, 6, 6]
    cached, new, _ = given[3]
    assert len(cached) > 10, "the first question is in the cache already"
    assert [*cached, *new] == prompt_ids(loaded.tokenizer, session.messages[:3])


def test_blanks_are_filled_alike(tmp_path: Path) -> None:
    folder = tiny_families.write_glm(tmp_path / "glm")
    model = GLMForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = tiny_families.glm_tokenizer(folder)
    for text in ("Beijing is the [MASK] of [MASK].", "i like tea and rice , i like [MASK] and [MASK]"):
        replies = [
            reply_to(model, tokenizer, text, temperature=0, max_new_tokens=14, lookup_tokens=most) for most in (0, 5)
        ]
        assert replies[0].fillings == replies[1].fillings
        assert replies[0].text == replies[1].text


def test_the_setting_is_known_and_checked() -> None:
    model = SimpleNamespace(generation_config=None)
    assert choose(model).lookup_tokens == 0
    assert choose(model, sampling={"prompt_lookup_num_tokens": 8}).lookup_tokens == 8
    for wrong in (-1, 2.5, True):
        with pytest.raises(UsageError, match="lookup_tokens"):
            choose(model, sampling={"lookup_tokens": wrong})


# --- chance ----------------------------------------------------------------------------------------------------------


def test_tokens_come_with_their_own_probability() -> None:
    """20,000 tokens of a model that looks at the last one only, against the rows of its table."""
    size, count = 5, 20_000
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(5))
    tokens, usage = told(
        Table(table), [0], SamplingOptions(temperature=0.8, seed=1), max_new_tokens=count, lookup_tokens=8
    )
    assert usage.accepted_tokens > count / 5, "very many come from drafts"
    assert usage.drafted_tokens - usage.accepted_tokens > count / 8, "and many where a draft was wrong"
    pairs = torch.bincount(torch.tensor([a * size + b for a, b in itertools.pairwise([0, *tokens])]), minlength=size**2)

    def chi_square(counts: torch.Tensor) -> float:
        expected = counts.sum(1, keepdim=True) * (table / 0.8).softmax(-1)
        return float(((counts - expected).square() / expected).sum())

    # 20 degrees of freedom: 59 is exceeded once in 10^5 times
    counts = pairs.view(size, size).double()
    assert chi_square(counts) < 59
    counts[:, counts.sum(0).argmax()] *= 1.15
    assert chi_square(counts) > 59, "the test would see one token come 15 % too often"


def test_every_token_takes_one_random_number() -> None:
    """So the numbers behind an accepted or rejected draft are those of single steps."""
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    for seed in range(100):
        options = SamplingOptions(seed=seed)
        plain, _ = told(Table(table), [0, 1, 2, 0, 1], options, max_new_tokens=12)
        assert told(Table(table), [0, 1, 2, 0, 1], options, max_new_tokens=12, lookup_tokens=4)[0] == plain
