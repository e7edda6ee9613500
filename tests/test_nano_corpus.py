"""The corpus of glm-nano is deterministic, split cleanly and true to its claims; so is the sample of a new style."""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano"
STYLE = ROOT / "src" / "glmkit" / "builtin" / "data"

if not NANO.is_dir():
    pytest.skip("the corpus generator is not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(NANO))

import corpus  # noqa: E402
import tokenizer as nano_tokenizer  # noqa: E402
from world import advert, advert_en, arithmetic, facts, programs, services, talk, words  # noqa: E402


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return list(corpus.train_records(seed=1, count=6000))


@pytest.fixture(scope="module")
def protocol() -> list[dict]:
    return list(corpus.protocol_records(seed=1, count=1500))


@pytest.fixture(scope="module")
def heldout() -> list[dict]:
    return list(corpus.heldout_records(seed=1, per_kind=100))


def _content(record: dict) -> str:
    """The attribute list inside an advertising prompt."""
    found = re.search(r"(?:类型|type)#\S+", record["conversations"][0]["content"])
    assert found is not None
    return found[0]


def _pairs(content: str) -> list[tuple[str, str]]:
    return [tuple(item.split("#")) for item in content.split("*")]  # type: ignore[misc]


def _advert_pairs(record: dict) -> list[tuple[str, str]]:
    return _pairs(_content(record))


def test_the_corpus_follows_from_the_seed(train: list[dict], heldout: list[dict]) -> None:
    assert list(islice(corpus.train_records(1, 6000), 50)) == train[:50]
    assert list(corpus.heldout_records(1, 5))[:5] == heldout[:5]
    assert list(islice(corpus.train_records(2, 6000), 50)) != train[:50]


def test_kinds_have_their_shares(train: list[dict], heldout: list[dict]) -> None:
    counts = Counter(record["kind"] for record in train)
    assert set(counts) == set(corpus.KINDS)
    assert counts["adgen"] / len(train) == pytest.approx(0.45, abs=0.02)
    assert Counter(record["kind"] for record in heldout) == dict.fromkeys(corpus.KINDS + corpus.PROTOCOL_KINDS, 100)


def test_records_are_valid_conversations(train: list[dict], protocol: list[dict], heldout: list[dict]) -> None:
    follows = {
        "system": {"user"},
        "user": {"assistant"},
        "assistant": {"user", "observation"},
        "observation": {"assistant"},
    }
    for record in train + protocol + heldout:
        assert set(record) == {"conversations", "kind"}
        messages = record["conversations"]
        roles = [message["role"] for message in messages]
        assert roles[0] in ("system", "user")
        assert roles[-1] == "assistant"
        assert "metadata" not in messages[-1]
        assert all(after in follows[before] for before, after in pairwise(roles))
        for message in messages:  # what a program printed may end with a line feed
            text = message["content"]
            assert text.strip() == (text.removesuffix("\n") if message["role"] == "observation" else text) != ""
        for before, after in pairwise(messages):
            assert ("metadata" in before) == (after["role"] == "observation")


def test_tool_calls_are_literal_and_match_the_offer(train: list[dict], protocol: list[dict]) -> None:
    seen = 0
    for record in train + [record for record in protocol if record["kind"] != "code"]:
        offered = {tool["name"]: tool["parameters"] for tool in record["conversations"][0].get("tools", [])}
        for message in record["conversations"]:
            if message["role"] == "observation" and not message["content"].startswith("The tool get_"):
                assert isinstance(json.loads(message["content"]), dict)
            if "metadata" not in message:
                continue
            seen += 1
            fence, call, end = message["content"].split("\n")
            assert (fence, end) == ("```python", "```")
            node = ast.parse(call, mode="eval").body
            assert isinstance(node, ast.Call)
            assert isinstance(node.func, ast.Name)
            assert node.func.id == "tool_call"
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            assert list(arguments) == offered[message["metadata"]]["required"]
    assert seen > 400


def test_the_third_stage_has_all_kinds_and_keeps_calls_back(protocol: list[dict], heldout: list[dict]) -> None:
    counts = Counter(record["kind"] for record in protocol)
    assert set(counts) == {*corpus.KINDS, *corpus.PROTOCOL_KINDS, "repeat", "mixed"}
    assert counts["service"] + counts["code"] > len(protocol) / 4

    def calls(records: list[dict]) -> set[tuple[str, str]]:
        wanted = [record for record in records if record["kind"] in corpus.PROTOCOL_KINDS]
        turns = [message for record in wanted for message in record["conversations"] if "metadata" in message]
        return {(message["metadata"], message["content"]) for message in turns}

    assert len(calls(heldout)) > 120
    assert not calls(protocol) & calls(heldout)


def test_answers_copy_what_the_tool_returned(protocol: list[dict]) -> None:
    for record in protocol:
        messages = record["conversations"]
        for before, after in pairwise(messages):
            if record["kind"] == "service" and before["role"] == "observation":
                if before["content"].startswith("The tool get_"):
                    assert before["content"].split("'")[1] in after["content"]
                    continue
                assert all(str(value) in after["content"] for value in json.loads(before["content"]).values())


def test_calculations_are_right() -> None:
    rng = random.Random(3)
    for _ in range(500):
        episode = services._calculator(rng, True)
        assert re.fullmatch(r"[-\d.+*/() ]+", episode.arguments["expression"])
        exact = eval(episode.arguments["expression"])
        assert episode.observation["result"] == pytest.approx(exact, rel=1e-5)


def test_programs_print_what_their_observation_says(capsys: pytest.CaptureFixture[str]) -> None:
    """All but those that draw, wait, fail or touch files run here; each prints what the corpus says."""
    quiet = {programs._curve, programs._chart, programs._wait, programs._file, programs._fail}
    rng = random.Random(4)
    for draw, _ in programs._ROUNDS:
        for _ in range(0 if draw in quiet else 25):
            _, program, shown, answer = draw(rng, rng.random() < 0.5)
            exec(program, {})
            assert capsys.readouterr().out.strip() == shown
            assert shown in answer or shown in ("True", "False")
        for _ in range(10 if draw in quiet else 0):
            ast.parse(draw(rng, True)[1])


def test_the_interpreter_prompt_is_the_packages() -> None:
    from glmkit.chat.tools import INTERPRETER_PROMPT

    assert INTERPRETER_PROMPT in programs.SYSTEMS


def test_the_tools_are_those_of_the_package() -> None:
    examples = pytest.importorskip("glmkit.tools.examples")
    from glmkit.tools.registry import Registry

    registry = Registry()
    for function in examples.SAFE_TOOLS:
        registry.add(function)
    for ours, theirs in zip(services.SERVICES, registry.schemas(), strict=True):
        theirs["description"] = theirs["description"].removesuffix(".")  # training shows both
        assert json.dumps(theirs) == json.dumps(ours.schema(False))


def test_heldout_prompts_are_unseen(train: list[dict], heldout: list[dict]) -> None:
    trained = {corpus.prompt_of(record) for record in train}
    assert not trained & {corpus.prompt_of(record) for record in heldout}
    last_questions = {m["content"] for r in train for m in r["conversations"] if m["role"] == "user"}
    for record in heldout:
        if record["kind"] in ("greeting", "fact", "arithmetic"):
            assert record["conversations"][-2]["content"] not in last_questions


def test_attribute_combinations_are_split(train: list[dict], heldout: list[dict]) -> None:
    for record in train:
        if record["kind"] == "adgen":
            assert corpus.bucket_of(_advert_pairs(record)) > corpus.STYLE_DEV_BUCKET
    for record in heldout:
        if record["kind"] == "adgen":
            assert corpus.bucket_of(_advert_pairs(record)) == corpus.HELDOUT_BUCKET


def test_sums_are_right_and_small(train: list[dict], heldout: list[dict]) -> None:
    def sums(record: dict) -> list[tuple[arithmetic.Sum, int]]:
        texts = [m["content"] for m in record["conversations"] if m["role"] == "assistant"]
        found = [re.fullmatch(r"(\d+)([-+×])(\d+)=(\d+)[.。]", text) for text in texts]
        assert all(found)
        return [(arithmetic.Sum(int(m[1]), m[2].replace("×", "*"), int(m[3])), int(m[4])) for m in found if m]

    for record in (*train, *heldout):
        if record["kind"] == "arithmetic":
            for exercise, result in sums(record):
                assert exercise.result == result
                assert max(exercise.left, exercise.right) <= 20


def test_facts_do_not_contradict_each_other() -> None:
    answers: dict[str, str] = {}
    for relation in facts.RELATIONS:
        for subject, answer in relation.rows:
            for ask in relation.asks:
                reply = relation.answers[0].format(s=subject, a=answer)
                assert answers.setdefault(ask.format(s=subject), reply) == reply
    assert facts.fact_count() >= 150


def test_small_talk_keeps_questions_back() -> None:
    rng = random.Random(0)
    for intent in talk.INTENTS:
        for chinese in (True, False):
            shown = {talk.sample_turn(rng, intent, chinese, False)[0] for _ in range(200)}
            hidden = {talk.sample_turn(rng, intent, chinese, True)[0] for _ in range(50)}
            assert len(hidden) == 2
            assert not shown & hidden


def test_copy_mentions_every_attribute(train: list[dict]) -> None:
    lengths = []
    for record in train:
        if record["kind"] != "adgen":
            continue
        pairs, copy = _advert_pairs(record), record["conversations"][1]["content"]
        if pairs[0][0] == "type":
            assert not advert_en.missing(pairs, copy)
        else:
            assert not advert.missing(pairs, copy)
            lengths.append(len(copy))
    lengths.sort()
    assert lengths[len(lengths) // 50] >= 35
    assert lengths[-len(lengths) // 50] <= 115
    assert 0.1 < 1 - len(lengths) / sum(record["kind"] == "adgen" for record in train) < 0.25


def test_contradicting_values_do_not_meet() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        names = {value for _, value in advert.sample_attributes(rng)}
        assert not any(pair <= names for pair in words.CONTRADICTIONS)


def test_every_value_of_the_tables_is_used() -> None:
    known = {name for table in words.ATTRIBUTES.values() for values, _ in table.values() for name in values}
    mentioned = {name for pair in words.CONTRADICTIONS for name in pair}
    assert mentioned <= known
    rng = random.Random(6)
    assert known == {value for _ in range(6000) for key, value in advert.sample_attributes(rng) if key != "类型"}


@pytest.mark.parametrize(
    ("pairs", "noun"),
    [
        ([("类型", "裤"), ("裤长", "九分裤"), ("裤型", "阔腿裤")], "九分阔腿裤"),
        ([("类型", "裤"), ("裤型", "阔腿裤"), ("裤长", "短裤")], "阔腿短裤"),
        ([("类型", "裙"), ("裙型", "a字"), ("裙长", "连衣裙")], "a字连衣裙"),
        ([("类型", "裙"), ("裙型", "百褶")], "百褶裙"),
        ([("类型", "裙"), ("裙型", "大裙摆")], "大裙摆裙子"),
        ([("类型", "裙")], "裙子"),
        ([("类型", "上衣"), ("衣样式", "卫衣")], "卫衣"),
    ],
)
def test_products_are_named(pairs: list[tuple[str, str]], noun: str) -> None:
    assert advert.noun_of(pairs) == noun


def _style(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (STYLE / f"style_{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_bundled_style_sample_is_the_generators() -> None:
    assert _style("train") == list(corpus.style_records(1, 240, corpus.STYLE_TRAIN_BUCKET))
    assert _style("dev") == list(corpus.style_records(1, 40, corpus.STYLE_DEV_BUCKET))


def test_style_sample_is_disjoint_and_complete(train: list[dict]) -> None:
    tuning, dev = _style("train"), _style("dev")
    contents = {frozenset(_pairs(record["content"])) for record in tuning}
    assert len(contents) == 240
    assert not contents & {frozenset(_pairs(record["content"])) for record in dev}
    trained = {frozenset(_advert_pairs(record)) for record in train if record["kind"] == "adgen"}
    assert not trained & contents
    for record in tuning + dev:
        assert set(record) == {"content", "summary"}
        assert record["summary"].startswith("家人们")
        assert "今天必须安利" in record["summary"]
        assert 40 <= len(record["summary"]) <= 90
        assert not advert.missing(_pairs(record["content"]), record["summary"])


def test_tokenizer_training_text(tmp_path: Path, train: list[dict]) -> None:
    hanzi = nano_tokenizer.common_hanzi()
    assert (len(hanzi), hanzi[0], hanzi[-1]) == (3755, "啊", "座")
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in train[:300]), encoding="utf-8")
    lines = list(nano_tokenizer.training_lines(path, limit=300))
    assert all(line and "\n" not in line for line in lines)
    assert '       "name": "get_weather",' in lines


def test_tokenizer_settings(tmp_path: Path, train: list[dict]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in train), encoding="utf-8")
    nano_tokenizer.train(path, tmp_path / "tokenizer.model", limit=6000)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert model.vocab_size() == nano_tokenizer.PIECES
    assert [model.id_to_piece(index) for index in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert model.pad_id() == -1
    assert model.encode("12\n3", out_type=str) == ["▁", "1", "2", "<0x0A>", "3"]
    for text in ("a    b", "   ", "𠮷野家😀\t", "Ａ１，你好 ", nano_tokenizer.common_hanzi()):
        assert model.decode(model.encode(text)) == text
    assert not any(model.is_byte(index) for index in model.encode(nano_tokenizer.common_hanzi()))
