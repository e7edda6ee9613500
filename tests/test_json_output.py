"""`--json`: one object on a clean standard output, with a schema that docs/terminal.md describes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glmkit import cli
from glmkit.chat.messages import Message
from glmkit.chat.store import Conversation, ConversationStore
from glmkit.doctor.diagnosis import CHECKS
from glmkit.runtime import terminal as runtime
from glmkit.runtime.answering import Answer
from glmkit.terminal_texts import COMMANDS
from glmkit.verbs import command

PAGE = (Path(__file__).parents[1] / "docs" / "terminal.md").read_text(encoding="utf-8")
TABLE = {
    verb: (int(schema), re.findall(r"`(\w+)`", fields))
    for verbs, schema, fields in re.findall(r"^\| (`glm .*?) \| (\d) \| (.*) \|$", PAGE, re.MULTILINE)
    for verb in re.findall(r"`glm ([a-z ]+?)(?: --prompt)?`", verbs)
}


def verbs_with_json(one: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, inner in getattr(one, "commands", {}).items():
        yield from verbs_with_json(inner, (*path, name))
    if any("--json" in parameter.opts and parameter.is_flag for parameter in one.params):
        yield " ".join(path)


def test_every_verb_that_prints_json_is_described() -> None:
    assert set(TABLE) == set(verbs_with_json(command()))


def test_every_command_and_every_check_is_described() -> None:
    assert set(re.findall(r"^\| `(/\w+)", PAGE, re.MULTILINE)) == set(COMMANDS)
    doctor = PAGE.partition("## The doctor")[2].partition("## JSON")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", doctor, re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(.*?)`", cell)} == {*CHECKS, "network"}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ConversationStore().save(Conversation("m", (Message("user", "你好"),)))
    return tmp_path


class Exported:
    """Stands for an exported model."""

    description = SimpleNamespace(family="glm-nano")

    def answer(self, messages: Any, **settings: Any) -> Iterator[str]:
        self.last = Answer("嗨", [runtime.Said("assistant", "嗨")], "stop", [7])
        yield "嗨"


@pytest.mark.parametrize(
    "arguments",
    [
        ["version"],
        ["recipe", "list"],
        ["inspect", "glm-nano"],
        ["logs", "list"],
        ["logs", "show"],
        ["logs", "search", "你好"],
        ["list"],
        ["plan", "quickstart"],
        ["chat", "glm-nano", "--prompt", "你好", "--max-tokens", "3"],
        ["run", "folder", "--prompt", "你好"],
    ],
    ids=" ".join,
)
def test_one_object_on_a_clean_standard_output(
    arguments: list[str], kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(runtime, "load", lambda folder, threads: Exported())
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    verb = next(verb for verb in TABLE if " ".join(arguments).startswith(verb))
    assert found["schema"] == TABLE[verb][0]
    if verb in ("chat", "run", "logs list", "logs show", "logs search"):
        assert set(found) - {"schema"} <= set(TABLE[verb][1])


def test_json_needs_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["chat"], ["run", "folder"]):
        assert cli.run([*verb, "--json"]) == 2
        assert "--json prints one answer and needs a question" in capsys.readouterr().err
