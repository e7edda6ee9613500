"""What runs exported folders without torch: the same prompts, layouts, texts and rules as the rest of the package."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import glm_words
import tiny
import tiny_families
from glmkit.chat.messages import Message
from glmkit.chat.reply import parse_reply
from glmkit.chat.templates import prompt_ids
from glmkit.engine.layout import layout_for
from glmkit.errors import CheckpointError, ContextLengthError, GenerationError, OutputError, UsageError
from glmkit.export.runtime_data import random_conversation, random_text, write_runtime_data
from glmkit.loading import Loaded, load
from glmkit.runtime import terminal
from glmkit.runtime.answering import Model
from glmkit.runtime.folder import FILE, FOLDER, read_description
from glmkit.runtime.prompts import Said
from glmkit.runtime.sampling import Sampling, choose
from glmkit.runtime.terminal import main
from glmkit.tokenizers import load_tokenizer
from glmkit.tokenizers.glm import GLMChineseTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer

CHATS = ("generation 1", "generation 2", "generation 3", "generation 4")
FAMILIES = (*CHATS, "glm")
GRAPH = {"engine": "onnx", "file": "model.onnx"}


class ScriptedSession:
    """A graph that answers row r with the ids of `scripts[r]`, and keeps what it was given."""

    def __init__(self, vocabulary: int, scripts: Sequence[Sequence[int]]) -> None:
        self.vocabulary, self.scripts = vocabulary, [list(one) for one in scripts]
        self.given: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        self.read: list[list[int]] = []
        self.places: list[int] = []

    def start(self, rows: int) -> None:
        self.read, self.places = [[] for _ in range(rows)], list(range(rows))

    def run(self, ids: NDArray[Any], mask: NDArray[Any], positions: NDArray[Any]) -> NDArray[np.float32]:
        self.given.append((ids.shape, mask.shape, positions.shape))
        scores = np.zeros((len(ids), self.vocabulary), np.float32)
        for row, place in enumerate(self.places):
            self.read[place] += ids[row].tolist()
            at = len(self.read[place]) - self.width
            if at >= 0:
                scores[row, self.scripts[place][at]] = 20
        return scores

    width = 0

    def select(self, rows: Sequence[int]) -> None:
        self.places = [self.places[row] for row in rows]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("models")
    file = tiny.train_tokenizer(folder / "tokenizer.model")
    made = {
        "generation 1": tiny_families.write_chatglm(folder / "1"),
        "generation 2": tiny.write_model(folder / "2", file, generation=2),
        "generation 3": tiny.write_model(folder / "3", file, generation=3),
        "generation 4": tiny_families.write_glm4(folder / "4"),
        "glm": tiny_families.write_glm(folder / "glm"),
    }
    return {name: load(str(path)) for name, path in made.items()}


@pytest.fixture(scope="module")
def open_model(
    loaded: dict[str, Loaded], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Model, ScriptedSession]]:
    """Opens the runtime's model of a family with a session that answers what it is told."""
    folders = {}
    for name, one in loaded.items():
        folders[name] = tmp_path_factory.mktemp("exported")
        write_runtime_data(
            folders[name], one.model.config, one.tokenizer, GRAPH, generation_config={"do_sample": False}
        )

    def opened(name: str, *scripts: Sequence[int]) -> tuple[Model, ScriptedSession]:
        session = ScriptedSession(loaded[name].model.config.vocab_size, scripts)
        return Model(read_description(folders[name]), session), session

    return opened


# --- prompts ---


@pytest.mark.parametrize("family", CHATS)
def test_prompts_are_those_of_the_templates(
    family: str, loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    model, _ = open_model(family)
    source = random.Random(11)
    lengths = set()
    for _ in range(120):
        said = random_conversation(source, tools=family in CHATS[2:])
        expected = prompt_ids(loaded[family].tokenizer, [Message(*one) for one in said])
        assert model.prompt_ids(said) == expected, said
        lengths.add(len(expected))
    assert len(lengths) > 50


@pytest.mark.parametrize("family", CHATS)
def test_no_text_becomes_a_control_id(
    family: str, loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    tokenizer, (model, _) = loaded[family].tokenizer, open_model(family)
    control = {name: index for name, index in tokenizer.commands.items() if name not in ("<unk>", "<pad>")}
    plain = [index for index in model.prompt_ids("x") if index in control.values()]
    written = "".join(f"{name} <|{name}|> " for name in control)
    found = [index for index in model.prompt_ids(written) if index in control.values()]
    assert found == plain


@pytest.mark.parametrize("family", CHATS[:2])
def test_orders_without_a_form_are_refused(
    family: str, open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    model, _ = open_model(family)
    for said in ([], [Said("assistant", "a")], [Said("user", "a"), Said("user", "b")], [Said("user", "a", "tool")]):
        with pytest.raises(UsageError):
            model.prompt_ids(said)


def test_texts_with_blanks_are_read_as_the_tokenizer_reads_them(
    loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    tokenizer, (model, _) = loaded["glm"].tokenizer, open_model("glm")
    source = random.Random(5)
    for text in ["i like [MASK]", "tea", *(random_text(source) + " [MASK] " + random_text(source) for _ in range(100))]:
        assert model.prompt_ids(text) == [*tokenizer.fill_prompt(text), tokenizer.sop_token_id]


@pytest.mark.parametrize("style", ["hf", "original"])
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "chinese"])
def test_every_vocabulary_of_glm_is_carried(kind: str, style: str, loaded: dict[str, Loaded], tmp_path: Path) -> None:
    files = tmp_path / "files"
    tokenizer: Any
    if kind == "chinese":
        tokenizer = GLMChineseTokenizer(glm_words.chinese_files(files) / "cog-pretrain.model", style=style)
    else:
        glm_words.byte_files(files, roberta=kind == "roberta")
        of_bytes = GLMRobertaTokenizer if kind == "roberta" else GLMGPT2Tokenizer
        tokenizer = of_bytes(files / "vocab.json", files / "merges.txt", style=style)
    write_runtime_data(tmp_path, loaded["glm"].model.config, tokenizer, GRAPH)  # compares 60 texts both ways


@pytest.mark.slow  # the files have 65,000 to 151,000 tokens
@pytest.mark.parametrize(
    "name", ["chatglm-6b.ice_text.model", "chatglm2-chatglm3.tokenizer.model", "glm4/tokenizer.model"]
)
def test_official_vocabularies_are_carried(name: str, loaded: dict[str, Loaded], shared: Path, tmp_path: Path) -> None:
    path = shared / "tokenizers" / name
    if not path.is_file():
        pytest.skip(f"no {name}")
    (tmp_path / path.name.removeprefix("chatglm-6b.").removeprefix("chatglm2-chatglm3.")).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"generation": 3}) if "chatglm2" in name else "{}")
    (tmp_path / "out").mkdir()
    write_runtime_data(tmp_path / "out", loaded["generation 3"].model.config, load_tokenizer(tmp_path), GRAPH)


def test_another_prompt_is_not_written(
    loaded: dict[str, Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmkit.export.runtime_data.prompt_ids", lambda *_: [1, 2, 3])
    with pytest.raises(OutputError, match="another prompt"):
        write_runtime_data(tmp_path, loaded["generation 3"].model.config, loaded["generation 3"].tokenizer, GRAPH)


# --- layouts ---


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_positions_are_those_of_the_engine(
    family: str, loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    one, (model, _) = loaded[family], open_model(family)
    texts = ["i like [MASK]", "tea and [MASK] rice [MASK]", "[MASK]"] if family == "glm" else ["a", "hello world", "1"]
    prompts = [model.prompt_ids(text) for text in texts]
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    pads = np.array([width - len(prompt) for prompt in prompts])
    ours = model.layout(ids, pads)
    theirs = layout_for(one.model, torch.tensor(ids), torch.tensor(pads))
    for step in range(4):
        start, end = (0, width) if not step else (width + step - 1, width + step)
        given = theirs.prompt(0, width) if not step else theirs.step()
        mask, positions = ours.columns(start, end)
        assert positions.tolist() == given["position_ids"].tolist()
        seen = given["attention_mask"]
        if family == "generation 1":
            seen = ~seen.bool()  # its masks say what is blocked
        assert mask.tolist() == seen.long().tolist()
        if step == 1:
            ours.select([2, 0])
            theirs.select([2, 0])


# --- the loop ---


def _say(one: Loaded, text: str, metadata: str = "") -> list[int]:
    return tiny.say(one.tokenizer, text, metadata)


def test_an_answer_arrives_in_whole_characters(
    loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    text = "你好 🙂, 龘 tea"  # signs that the vocabulary has only as bytes
    model, session = open_model("generation 3", _say(loaded["generation 3"], text))
    session.width = len(model.prompt_ids("x"))
    pieces = list(model.answer("x"))
    assert "".join(pieces) == text == model.last.text
    assert len(pieces) > 4
    assert not any("\ufffd" in piece for piece in pieces)
    assert (model.last.finish_reason, model.last.messages) == ("stop", [Said("assistant", text)])


def test_a_call_of_a_tool_keeps_its_header(
    loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    one = loaded["generation 3"]
    first, call = one.tokenizer.encode_text("\n"), "```python\ntool_call(city='北京')\n```"
    script = [*first, *one.tokenizer.encode_text("tea"), one.tokenizer.get_command("<|assistant|>")]
    script += tiny.say(one.tokenizer, call, "get_weather", "<|observation|>")
    model, session = open_model("generation 3", script)
    session.width = len(model.prompt_ids("x"))
    assert "".join(model.answer("x")) == f"tea\nget_weather\n{call}"
    expected = parse_reply(one.tokenizer, script[:-1]).messages
    assert [tuple(said) for said in model.last.messages] == [(m.role, m.content, m.metadata) for m in expected]
    assert model.last.messages[1].metadata == "get_weather"


def test_stop_texts_and_limits_end_an_answer(
    loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    model, session = open_model("generation 2", _say(loaded["generation 2"], "I like tea and rice"))
    session.width = len(model.prompt_ids("x"))
    assert "".join(model.answer("x", stop=["tea", "and"])) == "I like "
    assert model.last.finish_reason == "stop"
    list(model.answer("x", max_new_tokens=2))
    assert (model.last.finish_reason, len(model.last.token_ids)) == ("length", 2)


def test_long_prompts_are_read_in_parts_and_old_turns_left_out(
    loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    one = loaded["generation 4"]
    model, session = open_model("generation 4", [one.tokenizer.eos_token_id])
    talk = [Said("user", "a" * 300), Said("assistant", "b" * 300), Said("user", "c" * 600)]
    kept = model.prompt_ids(talk[2:])
    session.width = len(kept)
    list(model.answer(talk, max_new_tokens=100))
    assert model.last.dropped_turns == 1
    assert [ids[1] for ids, _, _ in session.given] == [512, len(kept) - 512]
    assert session.read == [kept]
    with pytest.raises(ContextLengthError):
        list(model.answer("a" * 1100))
    with pytest.raises(UsageError, match="temprature"):
        list(model.answer("a", temprature=1.0))


def test_ctrl_c_keeps_what_was_said_and_the_conversation_goes_on(
    loaded: dict[str, Loaded],
    open_model: Callable[..., tuple[Model, ScriptedSession]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ChatGLM2 takes user and assistant in turn: a question without its answer would end the conversation."""
    model, session = open_model("generation 2", _say(loaded["generation 2"], "I like tea and rice"))
    session.width = len(model.prompt_ids("x"))
    talk = terminal._Conversation(model, [], {})
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "_ctrl_c", lambda: nullcontext([True]))  # it came with the first piece
        talk._take("x")
    cut = talk.messages[-1].content
    assert talk.messages == [Said("user", "x"), Said("assistant", cut)]
    assert "I like tea and rice".startswith(cut)
    assert 0 < len(cut) < 19
    session.width = len(model.prompt_ids([*talk.messages, Said("user", "y")]))
    talk._take("y")
    assert [said.role for said in talk.messages] == ["user", "assistant"] * 2
    assert capsys.readouterr().out == f"{cut}\nI like tea and rice\n"


def test_rows_that_end_leave_the_batch(
    loaded: dict[str, Loaded], open_model: Callable[..., tuple[Model, ScriptedSession]]
) -> None:
    end = loaded["generation 2"].tokenizer.eos_token_id
    model, session = open_model("generation 2", [5, end], [6, 7, 8, end], [9, 9, 9, 9])
    prompts = [model.prompt_ids(text) for text in ("x", "hello world", "1 + 2 = 3")]
    session.width = max(map(len, prompts))
    assert model.generate(prompts, max_new_tokens=4) == [[5], [6, 7, 8], [9, 9, 9, 9]]
    assert [ids[0] for ids, _, _ in session.given] == [3, 3, 2, 2]
    assert model.generate([]) == []


def test_blanks_are_filled_in_place(open_model: Callable[..., tuple[Model, ScriptedSession]]) -> None:
    model, session = open_model("glm")
    words = {model.tokens.decode([index]): index for index in range(30)}
    eop = max(model.stop_ids)
    text = "beijing is [MASK] of [MASK]."
    session.scripts = [[words["the"], words["capital"], eop]]
    ids = model.prompt_ids(text)
    session.width = len(ids)
    pieces = model.answer(text, temperature=0.0)
    shown = [next(pieces), next(pieces), next(pieces)]
    assert "".join(shown) == "beijing is the capital"
    session.scripts, session.width = [[words["china"], eop]], len(ids) + 3  # the first filling stays behind the text
    assert "".join(pieces) == " of china."
    assert model.last.text == "beijing is the capital of china."
    assert session.given[-1][1:] == ((1, 1, 1, len(ids) + 4), (1, 2, 1))


# --- sampling ---


def test_chances_are_those_that_the_rules_leave() -> None:
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    source = random.Random(0)

    def shares(**rules: float) -> list[float]:
        drawn = [choose(scores, Sampling(**rules), [], source) for _ in range(4000)]  # type: ignore[arg-type]
        return [round(drawn.count(token) / len(drawn), 3) for token in range(4)]

    def close(found: list[float], expected: list[float]) -> bool:
        return all(abs(one - other) < 0.025 for one, other in zip(found, expected))

    assert close(shares(), [0.4, 0.3, 0.2, 0.1])
    assert close(shares(top_k=2), [4 / 7, 3 / 7, 0, 0])
    assert close(shares(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0])
    assert close(shares(min_p=0.6), [4 / 7, 3 / 7, 0, 0])
    assert close(shares(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_a_seed_repeats_and_rows_differ() -> None:
    scores = np.zeros(1000, np.float32)

    def drawn(seed: int | None, row: int) -> list[int]:
        sampling = Sampling(seed=seed)
        generator = sampling.generator(row)
        return [choose(scores, sampling, [], generator) for _ in range(8)]

    assert drawn(1, 0) == drawn(1, 0) != drawn(2, 0)
    assert drawn(1, 0) != drawn(1, 1) == drawn(1, 1)


def test_penalties_and_broken_scores() -> None:
    scores = np.array([3.0, 2.0, -1.0], np.float32)
    assert choose(scores, Sampling(temperature=0, repetition_penalty=2.0), [0], random.Random()) == 1
    assert scores.tolist() == [3.0, 2.0, -1.0]
    with pytest.raises(GenerationError, match="finite"):
        choose(np.array([np.nan, 1.0], np.float32), Sampling(), [], random.Random())
    for wrong in ({"top_p": 1.5}, {"temperature": -1.0}, {"repetition_penalty": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(UsageError):
            Sampling(**wrong)  # type: ignore[arg-type]


# --- folders, and machines without torch ---


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "there is no"), ("{", "no JSON"), ('{"schema": 9}', "schema 9"), ('{"schema": 1}', "lacks tokens")],
)
def test_damaged_folders_are_refused(
    content: str | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FOLDER).mkdir()
    if content is not None:
        (tmp_path / FOLDER / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=problem):
        read_description(tmp_path)
    assert main([str(tmp_path), "--prompt", "x"]) == 1
    assert problem in capsys.readouterr().err


_WITHOUT = """
import sys
for name in ("torch", "transformers", "safetensors", "pydantic", "typer"):
    sys.modules[name] = None
{code}
assert not {{"torch", "transformers"}} & {{name for name, one in sys.modules.items() if one is not None}}
"""


@pytest.fixture
def described(loaded: dict[str, Loaded], tmp_path: Path) -> Path:
    one = loaded["generation 3"]
    write_runtime_data(tmp_path, one.model.config, one.tokenizer, GRAPH, generation_config={"do_sample": False})
    return tmp_path


def test_it_runs_where_torch_is_not_installed(described: Path) -> None:
    code = f"""
import numpy, glmkit, glmkit.runtime
from glmkit.runtime.answering import Model
from glmkit.runtime.folder import read_description
class Session:
    def start(self, rows): pass
    def run(self, ids, mask, positions): return numpy.eye(1000, dtype="f")[[2]]
model = Model(read_description({str(described)!r}), Session())
assert "".join(model.answer("你好")) == "" and model.last.finish_reason == "stop"
print(model.prompt_ids("你好"))
"""
    done = subprocess.run([sys.executable, "-c", _WITHOUT.format(code=code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[" in done.stdout


def test_the_program_imports_no_torch_where_there_is_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "glmkit.runtime", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "runtime/runtime.json" in done.stderr
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "numpy" in imported
    assert not {"torch", "transformers"} & imported
