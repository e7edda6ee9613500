"""The command: what it prints where, its exit codes, and that every mistake is answered with a cure."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import glmkit
import tiny
from glmkit import cli
from glmkit.errors import UsageError
from glmkit.verbs import command
from glmkit.verbs.app import SECTIONS
from glmkit.verbs.printing import in_units

VERBS = tuple(name for names in SECTIONS.values() for name in names)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer_file = tiny.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return str(tiny.write_model(tmp_path_factory.mktemp("cli") / "model", tokenizer_file, endless=True))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def glm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# --- without a verb ---


def test_the_start_page_names_the_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = glm(capsys)
    assert (code, err) == (0, "")
    for step in ("glm quickstart", "glm chat", "glm inspect", "glm finetune", "12.5 GB"):
        assert step in out
    assert len(out.splitlines()) <= 10


def test_every_verb_stands_in_one_section_of_the_help() -> None:
    assert sorted(VERBS) == sorted(name for name, verb in command().commands.items() if not verb.hidden)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert glm(capsys, "--version") == (0, f"glmkit {glmkit.__version__}\n", "")
    code, out, _ = glm(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert f"  {verb} " in out
        assert glm(capsys, verb, "-h")[0] == 0
    assert glm(capsys, "help")[1] == out
    code, out, _ = glm(capsys, "version", "--json")
    assert json.loads(out)["glmkit"] == glmkit.__version__


@pytest.mark.parametrize("arguments", [[], ["--version"], ["--help"], ["chat", "--help"], ["chta"]])
def test_starting_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import glmkit_command, sys\n"
        f"sys.argv = ['glm', *{arguments!r}]\n"
        "try:\n    glmkit_command.main()\n"
        "except SystemExit:\n    pass\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split("\n")[-2].split())
    heavy = {"torch", "transformers", "tokenizers", "huggingface_hub", "prompt_toolkit", "yaml"}
    assert loaded & heavy == set()
    if arguments in ([], ["--version"]):
        assert "typer" not in loaded


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["caht"], "there is no verb 'caht'", "did you mean glm chat?"),
        (["train"], "there is no verb 'train'", "did you mean glm finetune?"),
        (["chatglm3-6b"], "there is no verb 'chatglm3-6b'", "did you mean glm chat chatglm3-6b?"),
        (
            ["zzz"],
            "there is no verb 'zzz'",
            f"known verbs: {', '.join(VERBS)}",
        ),
        (["chat", "--temprature", "1"], "no such option: --temprature", "did you mean --temperature?"),
        (["chat", "--top-k", "many"], "invalid value for '--top-k'", "glm chat --help lists what there is"),
        (
            ["chat", "chatglm3-6c", "-p", "x"],
            "no folder and no model is called 'chatglm3-6c'",
            "did you mean chatglm3-6b?",
        ),
        (["chat", "chatglm3-6b", "-p", "x"], "chatglm3-6b is not on this machine", "--yes"),
        (["chat", "-p", " "], "the question is empty", "--prompt"),
        (["chat", "--json"], "--json prints one answer", "--prompt"),
        (["chat", "-c", "-p", "x"], "no earlier conversation", "without --continue"),
        (["inspect"], "missing argument 'MODEL'", "glm inspect --help"),
        (["inspect", "chatglm3-6b", "--batch", "0"], "--batch 0: expected 1 or more", None),
        (["finetune"], "which recipe?", "adgen_lora"),
        (["finetune", "adgen_lroa"], "there is no recipe 'adgen_lroa'", "did you mean adgen_lora?"),
        (["finetune", "adgen_lora.yml"], "there is no recipe", "did you mean adgen_lora?"),
        (["finetune", "adgen_lora", "learning_rat=1", "--dry-run"], "learning_rat", None),
        (["evaluate", "adgn"], "there is no task 'adgn'", "did you mean glm evaluate adgen?"),
        (["evaluate", "adgen", "--data", "none.json"], "none.json", None),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: str,
    hint: str | None,
) -> None:
    pipe_in(monkeypatch, b"")
    code, out, err = glm(capsys, *arguments)
    assert out == ""
    assert err.startswith("error: ")
    assert error in err
    assert "Traceback" not in err
    if hint is not None:
        assert hint in err.split("\nhint: ")[1]
    assert code == (1 if "none.json" in arguments else 2)


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "caht"], ["caht", "--debug"]):
        code, _, err = glm(capsys, *arguments)
        assert code == 2
        assert "Traceback" in err
        assert "\nerror: there is no verb 'caht'\nhint: did you mean glm chat?\n" in err


@pytest.mark.parametrize(
    ("raised", "code", "error", "hint"),
    [
        (UsageError("bad", hint="good"), 2, "bad", "good"),
        (KeyError("x"), 1, "unexpected KeyError: 'x'", "--debug"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "the package torch, which is not", "glm run"),
        (MemoryError(), 1, "out of memory", "--quantize"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory", "--quantize"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied: /x", "--debug"),
    ],
)
def test_any_failure_is_an_error_with_a_hint(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    code: int,
    error: str,
    hint: str,
) -> None:
    def fail(_: Any) -> int:
        raise raised

    monkeypatch.setattr(cli, "_dispatch", fail)
    found, out, err = glm(capsys, "chat")
    assert (found, out) == (code, "")
    first, second = err.splitlines()
    assert error in first.removeprefix("error: ")
    assert hint in second.removeprefix("hint: ")


def test_ctrl_c_is_130_and_a_reader_that_left_is_quiet(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert cli.run([]) == 130
    command = f"{sys.executable} -c 'import glmkit_command as c; c.main()' --help | true"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_colours_on_a_terminal_only_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.paint("x", "1", Terminal()) == "\x1b[1mx\x1b[0m"
    assert cli.paint("x", "1", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.paint("x", "1", Terminal()) == "x"


# --- one question ---


def test_the_answer_alone_is_on_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    pipe_in(monkeypatch, b"")
    code, out, err = glm(capsys, "chat", model, "-p", "hello", "--max-tokens", "8", "-v")
    assert code == 0
    expected = glmkit.load(model).chat("hello", max_tokens=8).text
    assert out == expected + "\n"
    assert "[cut at the longest length allowed]" in err
    assert "8 tokens" in err
    assert not (tmp_path / "state").exists()  # one question leaves nothing behind


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    pipe_in(monkeypatch, b"")
    code, out, _ = glm(
        capsys, "chat", model, "-p", "hello", "--json", "--max-new-tokens=8", "--temp", "1", "--seed", "5", "-s", "rice"
    )
    found = json.loads(out)
    assert code == 0
    assert list(found) == [
        "schema", "model", "adapter", "text", "tool_call", "malformed", "finish_reason", "dropped_turns", "seed",
        "usage", "timings",
    ]  # fmt: skip
    reply = glmkit.load(model).chat("hello", system="rice", temperature=1, seed=5, max_tokens=8)
    assert (found["schema"], found["model"], found["text"], found["seed"]) == (1, model, reply.text, 5)
    assert found["finish_reason"] == "length"
    tokens = reply.usage.prompt_tokens
    assert found["usage"] == {"prompt_tokens": tokens, "completion_tokens": 8, "total_tokens": tokens + 8}
    assert set(found["timings"]) == {"prefill_seconds", "decode_seconds", "tokens_per_second"}


@pytest.mark.parametrize(
    ("prompt", "content", "question"),
    [("hello", b"", "hello"), ("-", b"tea\nrice\n", "tea\nrice"), ("hello", "茶\n".encode(), "hello\n\n茶")],
)
def test_questions_from_pipes(monkeypatch: pytest.MonkeyPatch, prompt: str, content: bytes, question: str) -> None:
    from glmkit.terminal import read_question

    pipe_in(monkeypatch, content)
    assert read_question(prompt) == question


def test_what_is_no_pipe_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from glmkit.terminal import read_question

    ours, theirs = socket.socketpair()  # open, and nobody will ever write
    with ours, theirs, ours.makefile("r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_question("hello") == "hello"
    reading, writing = os.pipe()
    os.write(writing, b"tea")
    os.close(writing)
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_question("hello") == "hello\n\ntea"


def test_a_pipe_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from glmkit.terminal import read_question

    pipe_in(monkeypatch, "茶".encode("gb18030"))
    with pytest.raises(UsageError, match="not UTF-8") as found:
        read_question("-")
    assert "iconv" in (found.value.hint or "")


def test_a_base_model_gets_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    pipe_in(monkeypatch, b"")
    code, _, err = glm(capsys, "chat", model, "-p", "hello", "--max-tokens", "1", "--family", "chatglm3-6b-base")
    assert code == 0
    assert "base model" in err


def test_continue_with_one_question(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    pipe_in(monkeypatch, b"hello\n")
    assert glm(capsys, "chat", model, "--max-tokens", "4", "--system", "rice")[0] == 0  # the loop, with lines piped in
    pipe_in(monkeypatch, b"")
    code, out, _ = glm(capsys, "chat", "-c", "-p", "tea", "--json")
    found = json.loads(out)
    loaded = glmkit.load(model)
    first = loaded.chat("hello", system="rice", max_tokens=4)
    second = loaded.chat([*first.messages, {"role": "user", "content": "tea"}], max_tokens=4)
    assert (code, found["model"], found["text"]) == (0, model, second.text)
    assert found["usage"]["prompt_tokens"] == second.usage.prompt_tokens


# --- other verbs ---


def test_inspect(capsys: pytest.CaptureFixture[str], model: str) -> None:
    code, out, _ = glm(capsys, "inspect", model, "--context", "1000")
    assert code == 0
    assert "memory for 1,000 tokens x 1" in out
    assert "float16" in out
    assert "query_key_value" not in out
    assert "query_key_value" in glm(capsys, "inspect", model, "--tensors")[1]
    found = json.loads(glm(capsys, "inspect", "chatglm3-6b", "--json")[1])
    assert found["parameters"] == 6_243_584_000
    assert "tensors" not in found


def test_finetune_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = glm(capsys, "finetune", "adgen_lora", "train.learning_rate=0.5", "--dry-run")
    assert (code, err) == (0, "")
    assert "learning_rate: 0.5" in out


def test_evaluate_writes_what_the_official_scripts_write(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    pytest.importorskip("jieba")
    rows = [{"content": "上衣", "summary": "上衣 显瘦"}, {"content": "棉", "summary": "棉"}]
    data = tmp_path / "dev.json"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    arguments = ["evaluate", "adgen", "-m", model, "--data", str(data), "--max-tokens", "4", "-o", "results"]
    code, out, _ = glm(capsys, *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["schema"], found["task"], found["results"]["predict_samples"]) == (1, "adgen", 2)
    assert json.loads((tmp_path / "results" / "predict_results.json").read_text()) == found["results"]
    lines = (tmp_path / "results" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["labels"] for line in lines] == ["上衣 显瘦", "棉"]
    code, out, err = glm(capsys, *arguments[:-1], "others", "--limit", "1")
    assert code == 0
    assert "rouge-l" in out
    assert "others" in err


def test_sizes_for_people() -> None:
    assert [in_units(size) for size in (12, 1500, 16_000_000, 12_500_000_000)] == [
        "12 B", "1.5 kB", "16.0 MB", "12.5 GB",
    ]  # fmt: skip
