"""Filling blanks: GLM as generate_samples.py does it, GLM-130B as generate.py, and what front ends see of it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glm130b_tiny
import tiny_families
from glmkit.chat.answers import Filled
from glmkit.chat.choices import choose, official_sampling
from glmkit.chat.conversation import reply_to, stream_reply
from glmkit.chat.messages import Message
from glmkit.chat.session import Session
from glmkit.engine.beams import BaseStrategy
from glmkit.engine.decode import CancelToken
from glmkit.engine.filling import fill
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm130b import GLM130BForCausalLM
from glmkit.pipelines import pipeline
from glmkit.terminal import write_answer
from glmkit.terminal_loop import ChatLoop
from glmkit.tokenizers.glm import GLMTokenizer

TEXTS = [
    "Beijing is the [MASK] of [MASK].",
    "[MASK] like tea",
    "[MASK] [MASK] [MASK]",
    "i like",
]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> tuple[GLMForConditionalGeneration, GLMTokenizer]:
    folder = tiny_families.write_glm(tmp_path_factory.mktemp("glm"))
    return GLMForConditionalGeneration.from_pretrained(folder).eval(), tiny_families.glm_tokenizer(folder)


@torch.no_grad()
def as_official(model: Any, tokenizer: GLMTokenizer, text: str, longest: int) -> list[list[int]]:
    """Greedy fillings with mems, step by step: the context once, then every filling behind all that came before."""
    ids = tokenizer.fill_prompt(text)
    count = len(ids)
    positions = torch.stack((torch.arange(count), torch.zeros(count, dtype=torch.int64)))[None]
    mems = model(torch.tensor([ids]), positions, torch.tensor([count])).mems
    fillings = []
    for place in [place for place, token in enumerate(ids) if token in tokenizer.mask_token_ids]:
        token, filling = tokenizer.sop_token_id, []
        for number in range(1, longest + 1):
            output = model(torch.tensor([[token]]), torch.tensor([[[place], [number]]]), torch.tensor([0]), mems=mems)
            mems = output.mems
            token = int(output.logits[0, -1].argmax())
            if token in tokenizer.stop_ids:
                break
            filling.append(token)
        else:  # ours keeps the last token in view, too
            output = model(
                torch.tensor([[token]]), torch.tensor([[[place], [longest + 1]]]), torch.tensor([0]), mems=mems
            )
            mems = output.mems
        fillings.append(filling)
    return fillings


@pytest.mark.parametrize("text", TEXTS)
def test_glm_fills_behind_the_text(glm: tuple[Any, Any], text: str) -> None:
    model, tokenizer = glm
    expected = as_official(model, tokenizer, text, 6)
    reply = reply_to(model, tokenizer, text, temperature=0, max_tokens=6)
    hidden = {*tokenizer.mask_token_ids, tokenizer.sop_token_id}
    shown = [tokenizer.decode_ids([token for token in ids if token not in hidden]).strip() for ids in expected]
    assert list(reply.fillings) == shown
    assert any(shown)
    assert len({*map(tuple, expected)}) == len(expected), "fillings that are all alike would prove little"


class Numbers:
    """A tokenizer whose words are ids, for the stored GLM-130B."""

    generation = 0
    prefix_ids: tuple[int, ...] = ()
    vocab_size = 94
    eos_token_id = 93

    def __init__(self) -> None:
        ids = glm130b_tiny.IDS
        self.stop_ids = frozenset(ids["eos_token_id"])
        self.names = {
            "[MASK]": ids["mask_token_id"],
            "[gMASK]": ids["gmask_token_id"],
            "[sMASK]": ids["smask_token_id"],
        }
        self.mask_token_ids = list(self.names.values())

    def get_command(self, name: str) -> int:
        assert name == "sop"
        return glm130b_tiny.IDS["bos_token_id"]

    def fill_prompt(self, text: str) -> list[int]:
        text = text if "MASK]" in text else text + " [gMASK]"
        return [self.names[word] if word in self.names else int(word) for word in text.split()]

    def decode_ids(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def glm130b() -> tuple[GLM130BForCausalLM, Numbers]:
    return glm130b_tiny.model().eval(), Numbers()


@pytest.mark.parametrize("text", ["5 [MASK] 7 8 [MASK] 9", "5 6 [sMASK] 7", "5 6 7 [gMASK]", "5 6 7"])
def test_glm130b_fills_in_place(glm130b: tuple[Any, Any], text: str) -> None:
    model, tokenizer = glm130b
    reply = reply_to(model, tokenizer, text, temperature=0, max_tokens=7)
    ids = tokenizer.fill_prompt(text)
    for filling in reply.fillings:  # each is what the model says to the text with all earlier ones in their places
        place = next(place for place, token in enumerate(ids) if token in tokenizer.mask_token_ids)
        with torch.no_grad():
            row = [*ids, tokenizer.get_command("sop")]
            said: list[int] = []
            for _ in range(7):
                token = int(model(torch.tensor([row])).logits[0, -1].argmax())
                if token in tokenizer.stop_ids:
                    break
                row.append(token)
                said.append(token)
        said = [token for token in said if token not in {*tokenizer.mask_token_ids, tokenizer.get_command("sop")}]
        assert filling == tokenizer.decode_ids(said)
        ids = [*ids[:place], *said, *ids[place + 1 :]]
    assert reply.text.split() == tokenizer.decode_ids(ids).split()


def test_one_blank_is_what_the_strategies_make_of_it(glm130b: tuple[Any, Any]) -> None:
    model, tokenizer = glm130b
    greedy = BaseStrategy(temperature=0, end_ids=tokenizer.stop_ids)
    (found,) = fill(model, tokenizer, "5 [MASK] 7 8", greedy, max_total_tokens=12)
    assert list(reply_to(model, tokenizer, "5 [MASK] 7 8", temperature=0, max_tokens=7).fillings) == found.blanks


# --- what front ends see ---


class Scripted:
    """A blank-filling model that says given ids."""

    def __init__(self, tokenizer: GLMTokenizer, texts: list[str], context_tokens: int = 64) -> None:
        self.tokenizer, self.device, self.generation_config = tokenizer, torch.device("cpu"), None
        self.config = SimpleNamespace(
            num_hidden_layers=1,
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=context_tokens,
            model_type="glm",
        )
        self.script = [token for text in texts for token in (*tokenizer.encode_text(text), tokenizer.eop_token_id)]
        self.given: list[tuple[list[int], list[list[int]]]] = []

    def input_layout(self, ids: torch.Tensor, pads: torch.Tensor) -> Any:
        return GLMForConditionalGeneration.input_layout(self, ids, pads)  # type: ignore[arg-type]

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, position_ids: torch.Tensor, **_: Any) -> Any:
        self.given.append((input_ids[0].tolist(), position_ids[0].tolist()))
        state = torch.zeros(1, 1, input_ids.shape[1], 4)
        past_key_values.update(state, state, 0)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.script.pop(0)] = 20.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(glm: tuple[Any, GLMTokenizer]) -> GLMTokenizer:
    return glm[1]


def scripted(tokenizer: GLMTokenizer, *texts: str, **options: Any) -> Scripted:
    model = Scripted(tokenizer, list(texts), **options)
    model.config.sop_token_id, model.config.mask_token_ids = tokenizer.sop_token_id, tokenizer.mask_token_ids
    return model


def test_pieces_say_what_was_filled(tokenizer: GLMTokenizer) -> None:
    model = scripted(tokenizer, "capital", "the china")
    replying = stream_reply(model, tokenizer, "Beijing  is the [MASK] of [MASK].", temperature=0)
    pieces = list(replying)
    assert "".join(pieces) == replying.reply.text == "Beijing  is the capital of the china."
    assert [piece for piece in pieces if isinstance(piece, Filled)] == ["capital", "the", " china"]
    reply = replying.reply
    assert reply.fillings == ("capital", "the china")
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("stop", 5)
    assert reply.messages[-1] == Message("assistant", reply.text)
    ids = tokenizer.fill_prompt("Beijing is the [MASK] of [MASK].")
    first, _, second, *_ = model.given
    blanks = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
    assert first == ([*ids, tokenizer.sop_token_id], [[*range(len(ids)), blanks[0]], [0] * len(ids) + [1]])
    capital = tokenizer.encode_text("capital")
    assert second[0] == [*ids, tokenizer.sop_token_id, *capital, tokenizer.sop_token_id]
    assert second[1] == [[*range(len(ids)), blanks[0], blanks[0], blanks[1]], [0] * len(ids) + [1, 2, 1]]
    assert [positions for _, positions in model.given[3:]] == [[[blanks[1]], [2]], [[blanks[1]], [3]]]


def test_a_text_without_a_blank_goes_on(tokenizer: GLMTokenizer) -> None:
    assert reply_to(scripted(tokenizer, "tea"), tokenizer, "I like", temperature=0).text == "I like tea"
    assert reply_to(scripted(tokenizer, "tea"), tokenizer, "I like ", temperature=0).text == "I like tea"
    assert reply_to(scripted(tokenizer, "tea"), tokenizer, "I like [MASK]", temperature=0).text == "I like tea"


def test_limits_stop_texts_and_cancelling(tokenizer: GLMTokenizer) -> None:
    text = "i [MASK] and [MASK]"
    cut = reply_to(scripted(tokenizer, "like tea", "rice"), tokenizer, text, temperature=0, max_tokens=1)
    assert (cut.finish_reason, cut.text) == ("length", "i like and tea")
    stopped = reply_to(scripted(tokenizer, "like tea", "rice"), tokenizer, text, temperature=0, stop="tea")
    assert stopped.fillings[0] == "like"
    cancel = CancelToken()
    replying = stream_reply(scripted(tokenizer, "like tea", "rice"), tokenizer, text, temperature=0, cancel=cancel)
    seen = [next(replying), next(replying)]
    cancel.cancel()
    assert list(replying) == []
    assert (
        (replying.reply.text, replying.reply.finish_reason) == ("".join(seen), "cancelled") == ("i like", "cancelled")
    )
    closed = stream_reply(scripted(tokenizer, "like tea", "rice"), tokenizer, text, temperature=0)
    closed.close()
    assert (closed.reply.text, closed.reply.messages) == ("", (Message("user", text),))


def test_what_is_refused_is_refused_before_the_first_token(tokenizer: GLMTokenizer) -> None:
    model = scripted(tokenizer, "tea", context_tokens=8)
    for messages, message in (
        ([Message("system", "rice"), Message("user", "[MASK]")], "system"),
        ([Message("user", "[MASK]"), Message("assistant", "tea")], "no text"),
        ("[MASK] " + "tea " * 10, "context is 8 tokens"),
        ("tea <|startofpiece|> [MASK]", "starts a filling"),
    ):
        with pytest.raises(UsageError, match=message):
            stream_reply(model, tokenizer, messages)
    with pytest.raises(UsageError, match="system messages and tools"):
        stream_reply(model, tokenizer, "[MASK]", tools=[{"name": "tea"}])
    assert model.given == []


def test_room_is_shared_by_the_blanks(tokenizer: GLMTokenizer) -> None:
    model = scripted(tokenizer, "tea " * 40, context_tokens=16)
    text = "[MASK] and [MASK]"  # [CLS], three ids, eos; a sop for each blank; nine tokens are left
    reply = reply_to(model, tokenizer, text, temperature=0)
    assert [len(filling.split()) for filling in reply.fillings] == [4, 5]
    assert reply.finish_reason == "length"


def test_defaults_are_those_of_the_official_scripts(tokenizer: GLMTokenizer) -> None:
    model = scripted(tokenizer)
    assert official_sampling(model, tokenizer) == SamplingOptions(temperature=0.9, top_k=40)
    model.config.model_type = "glm-130b"
    official = official_sampling(model, tokenizer)
    assert choose(model, official=official).options == SamplingOptions(temperature=1.0, top_p=0.7)


def test_a_seed_repeats_and_differs_between_blanks(glm: tuple[Any, Any]) -> None:
    model, tokenizer = glm
    options = {"temperature": 5.0, "top_k": 0, "max_tokens": 8}
    fillings = [reply_to(model, tokenizer, "[MASK] [MASK]", seed=seed, **options).fillings for seed in (1, 1, 2)]
    assert fillings[0] == fillings[1] != fillings[2]
    assert fillings[0][0] != fillings[0][1]


def test_a_session_reads_the_last_text_only(
    tokenizer: GLMTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scripted(tokenizer, "tea", "rice")
    session = Session(
        SimpleNamespace(model=model, tokenizer=tokenizer, adapter=None), "glm", settings={"temperature": 0}
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("i like [MASK]\n/help\ni like [MASK]\n"))
    assert ChatLoop(session).run() == 0
    printed = capsys.readouterr()
    assert printed.out == "i like tea\ni like rice\n"
    assert "[sMASK]" in printed.err
    assert model.given[0] == model.given[2]
    assert session.last is not None
    assert session.last.fillings == ("rice",)


def test_a_terminal_shows_fillings_underlined(tokenizer: GLMTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Screen())
    write_answer(stream_reply(scripted(tokenizer, "like"), tokenizer, "i [MASK] tea", temperature=0))
    assert sys.stdout.getvalue() == "i \x1b[1;4mlike\x1b[0m tea\n"  # type: ignore[attr-defined]


def test_pipeline_fills(tokenizer: GLMTokenizer) -> None:
    model = scripted(tokenizer, "tea", "rice")
    generate = pipeline(model=model, tokenizer=tokenizer, do_sample=False)
    assert generate(["i like [MASK]"] * 2) == [
        {"text_generation_text": ["i like tea"]},
        {"text_generation_text": ["i like rice"]},
    ]


def test_through_the_loader(tmp_path: Path) -> None:
    import glmkit

    folder = tiny_families.write_glm(tmp_path / "glm")
    loaded = glmkit.load(folder)
    text = "Beijing is the [MASK] of [MASK]."
    reply = loaded.chat(text, max_tokens=5)
    assert len(reply.fillings) == 2
    assert "".join(loaded.stream(text, max_tokens=5)) == reply.text
