"""The examples: each is short, named in the list, and does what it says on a model that is there."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_families

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ELSEWHERE = {
    "ray_serve.py": "Ray brings a cluster of its own; this project does not install it",
    "streamlit_chat.py": "test_serve_clients.py runs it against a server, with a stand-in for Streamlit's page",
    "text_encoder.py": "test_encode.py runs it and compares its figures",
    "vllm_folder.py": "test_export_vllm.py runs it and compares ids; vLLM itself needs a GPU",
}
HERE = """batch_predict chat code_interpreter evaluate export_and_run fill_blanks finetune_lora
openai_client quantise stream tools""".split()


def run(name: str, *arguments: Any) -> None:
    """Runs an example in this process, as the command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def code_lines(file: Path) -> int:
    """Lines with code: neither blank, nor comment, nor the module's docstring."""
    text = file.read_text(encoding="utf-8")
    first = ast.parse(text).body[0]
    rest = text.splitlines()[first.end_lineno or 0 :]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in rest)


# --- all of them ---


def test_each_example_is_run_somewhere() -> None:
    found = {file.name for file in EXAMPLES.glob("*.py")}
    assert found == {f"{name}.py" for name in HERE} | set(ELSEWHERE)
    for name in ELSEWHERE.keys() - {"ray_serve.py"}:
        tests = {file.name: file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py")}
        assert any(name in text for file, text in tests.items() if file != Path(__file__).name), name


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short_and_says_how_it_is_started(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) or ""
    assert f"examples/{file.name}" in said or f"examples.{file.stem}" in said
    assert code_lines(file) < (50 if file.name == "vllm_folder.py" else 40)
    if file.stem in HERE:
        assert len(text.splitlines()) < 40


def test_the_list_names_each_example() -> None:
    for language in ("README.md", "README.zh-CN.md"):
        rows = re.findall(r"^\| `(\w+\.py)` \|", (EXAMPLES / language).read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(rows) == sorted(file.name for file in EXAMPLES.glob("*.py"))


# --- what they do ---


def test_a_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    run("chat")
    said = capsys.readouterr().out
    assert "The capital of France is Paris." in said
    assert said.rstrip().endswith("6 messages")


def test_a_stream_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    run("stream")
    whole, stopped, cut, cancelled = capsys.readouterr().out.splitlines()
    assert whole == "The capital of France is Paris."
    assert stopped.startswith("[stop, ")
    assert (cut, cancelled) == ("The capital of", "[cancelled]")


def test_a_tool(capsys: pytest.CaptureFixture[str]) -> None:
    run("tools")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[call get_weather {'city': 'Rome'}]"
    assert lines[1] == '[observation {"weather": "cloudy", "temperature": 18}]'
    assert lines[2] == "It is cloudy in Rome today, 18 degrees."


def test_the_code_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    from glmkit.interpreter.measure import measure
    from glmkit.interpreter.sandbox import Level

    if measure(Level.FULL).level < Level.REDUCED:
        pytest.skip("no sandbox can be made here")
    run("code_interpreter")
    said = capsys.readouterr().out
    assert "sum(range(1, n + 1))" in said
    assert "[5050]" in said


def test_the_clients(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    import glmkit
    from glmkit.chat.following import serve
    from glmkit.serve.settings import ApiKey, Settings
    from test_serve_clients import KEY, Live

    served = serve(glmkit.load("glm-nano"), "glm-nano")
    live = Live(served, Settings(api_keys=(ApiKey.of(KEY),)))
    monkeypatch.setenv("GLMKIT_URL", live.url + "/v1")
    monkeypatch.setenv("GLMKIT_API_KEY", KEY)
    try:
        run("openai_client")
    finally:
        live.close()
        served.close()
    whole, streamed, made = capsys.readouterr().out.splitlines()[-3:]
    assert whole.startswith("The capital of France is Paris. ")
    assert streamed == "The capital of France is Paris."
    assert made in {f"as JSON: {{'city': '{city}'}}" for city in ("Berlin", "Paris", "Rome")}


def test_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("finetune_lora", tmp_path / "lora", 1)
    said = capsys.readouterr().out
    assert "1 steps, loss " in said
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()


def test_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("evaluate", 3, "glm-nano", tmp_path)
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines()[:4])
    assert 0 < float(figures["predict_bleu-4"]) < float(figures["predict_rouge-1"]) < 100
    assert len((tmp_path / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()) == 3


def test_quantising(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("quantise", "glm-nano", tmp_path)
    before, after = (line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[-2:])
    assert float(after[0]) < 0.6 * float(before[0])
    assert before[2] == after[2] == "The capital of France is Paris."


@pytest.mark.slow  # tracing the network takes 20 seconds
def test_exporting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    run("export_and_run", "glm-nano", tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == "The capital of France is Paris."


def test_filling_blanks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_families.write_glm(tmp_path / "glm-large")
    run("fill_blanks", folder, "hello [MASK] world")
    text, fillings = capsys.readouterr().out.splitlines()[-2:]
    (filling,) = ast.literal_eval(fillings)
    assert filling
    assert filling.strip() in text
    assert "[MASK]" not in text


def test_many_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked = ["What is the capital of France?", "What is the capital of Italy?"]
    questions.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked), encoding="utf-8")
    run("batch_predict", questions, answers)
    found = [json.loads(line)["predict"] for line in answers.read_text(encoding="utf-8").splitlines()]
    assert found == ["The capital of France is Paris.", "The capital of Italy is Rome."]
    assert f"2 answers in {answers}" in capsys.readouterr().out
