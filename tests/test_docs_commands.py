"""Every command and every Python block of the documentation is run, on small models that stand under the pages' names.

What cannot be run here has its reason in `REASONS`, and what takes its place: a look at its flags or at its files.
Commands of one page are run in its order in one folder, so that a later one finds what an earlier one made.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import docs_world
import glmkit
from glmkit import cli, verbs
from glmkit.engine.decode import generate_batch, stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.evaluate.catalogue import TASKS
from glmkit.train.arguments import VERBS, load_recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MADE = ("reference", "project")  # by docs/reference.py, for the site only
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if path.relative_to(DOCS).parts[0] not in MADE and not path.name.endswith((".zh.md", ".part.md"))
]
BLOCK = re.compile(r"^(?P<in> *)```(?P<kind>sh|bash|python)\n(?P<code>.*?)^(?P=in)```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *kinds: str) -> list[str]:
    """The code of a page's blocks of some kinds."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [re.sub(f"^{one['in']}", "", one["code"], flags=re.MULTILINE) for one in found if one["kind"] in kinds]


def commands(page: Path) -> list[str]:
    """The commands of a page's blocks, without comments, continued lines in one."""
    found = []
    for code in blocks(page, "sh", "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = re.sub(r"\s+#.*$|^#.*$", "", line).strip()
            if words:
                found.append(re.sub(r"\s+", " ", words) if "'" not in words else words)
    return found


of_a_page = pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.relative_to(DOCS).as_posix()
)


# --- what is not run, and why ---


def flags_exist(line: str) -> None:
    """Its verb and its flags are those of the parser."""
    words = shlex.split(line, comments=True)
    while re.match(r"\w+=", words[0]):
        del words[0]
    if words[0] in ("torchrun", "python"):
        words = words[words.index("-m") + 1 :]
        if words[0] != "glmkit":
            return
    verb, words = verbs.command(), words[1:]
    while hasattr(verb, "commands") and words:
        assert words[0] in verb.commands, line
        verb, words = verb.commands[words[0]], words[1:]
    if hasattr(verb, "_kind"):  # every setting is a flag
        dry_run(line)
        return
    flags = {flag for parameter in verb.params for flag in parameter.opts}
    assert [word for word in words if word.startswith("-") and word.split("=")[0] not in flags] == [], line


def dry_run(line: str) -> None:
    """The same in one process, checked and not begun."""
    words = shlex.split(line, comments=True)
    words = words[words.index("glmkit") + 1 :] if words[0] == "torchrun" else words[1:]
    kept = [word for word in words if word != "--resume"]
    if "predict" not in kept:
        assert cli.run([*kept, "--dry-run"]) == 0, line


def files_exist(line: str) -> None:
    """The program and the tests that it names are in this project, and its flags stand in its source."""
    names = re.findall(r"(?<!\S)(?:\./)?((?:bench|examples|nano|tests)/\S+\.(?:py|sh)|test\.sh|demo\.sh)", line)
    assert names, line
    for name in names:
        assert (ROOT / name).is_file(), name
    if names[0].startswith(("bench/", "examples/", "nano/")) and names[0].endswith(".py"):
        source = (ROOT / names[0]).read_text(encoding="utf-8")
        assert [flag for flag in re.findall(r"(?<!\S)(--[\w-]+)", line) if flag not in source] == [], line


@dataclass(frozen=True)
class Reason:
    """Why commands of one kind are not run.

    Args:
        pattern: What they begin with.
        why: What would be needed.
        instead: What is looked at in place of running them.
    """

    pattern: str
    why: str
    instead: Callable[[str], None] | None = None


REASONS = (
    Reason(r"glm (serve|web) ", "listens until it is stopped: test_start_page_in_a_shell", flags_exist),
    Reason(r"glm (pull|rm) ", "fetches, or takes away what was fetched: tests/test_downloads.py", flags_exist),
    Reason(r"(eval .*)?glm completion |eval ", "is for the shell that reads it: tests/test_completion.py"),
    Reason(r"glm watch ", "waits for a run that goes on: test_a_run_is_watched_from_its_first_step", flags_exist),
    Reason(r"glm bench ", "measures for minutes: tests/test_bench.py", flags_exist),
    Reason(r"glm quickstart$", "takes a minute: test_quickstart", flags_exist),
    Reason(r"glm cluster ", "reads the addresses of Ascend devices: tests/test_cluster.py", flags_exist),
    Reason(r"glm checkpoint ", "reads what several processes wrote: tests/test_distributed.py", flags_exist),
    Reason(r'common="', "a variable of the shell"),
    Reason(r"glm finetune \S+ \$common", "the settings are a variable of the shell"),
    Reason(r"glm (finetune tools\.yaml|evaluate \w+ --model (full|tools)/model)", "of hours: docs/results.md"),
    Reason(r"glm evaluate adgen --model glm-nano --adapter (lora|ptuning)/adapter", "of hours: docs/results.md"),
    Reason(r"glm evaluate cloze .*name: tnews", "needs the released vocabulary: tests/test_evaluate_text.py", dry_run),
    Reason(r"glm convert models/glm-130b models/glm-130b-one", "needs the released vocabulary: tests/test_convert.py"),
    Reason(r"torchrun ", "starts several processes: tests/test_distributed.py, tests/test_parallel.py", flags_exist),
    Reason(r"(first=|srun )", "needs a cluster with SLURM"),
    Reason(r"(pip|python3 -m venv) ", "installs: .ci/run does it"),
    Reason(r"(curl|openssl|vllm|export) ", "another program"),
    Reason(r"python (bench|examples|nano)/", "measures for minutes, or needs another program", files_exist),
    Reason(r"(\./test\.sh|pytest) ", "is the tests themselves", files_exist),
)  # fmt: skip
# What takes seconds to half a minute, and is run in full only.
TAKES_LONG = r"glm (export|run|plan chatglm-6b) |python -m glmkit\.runtime"
# Python blocks that cannot run here, by a piece of theirs.
PYTHON_REASONS = {
    'device="cuda")': "needs a GPU",
    'OpenAI(base_url="http://127.0.0.1:8000/v1"': "needs a server: test_start_page_in_a_shell",
    "langchain": "needs a server: tests/test_serve_clients.py",
    "openvino_genai": "reads the export in front of it: tests/test_export_openvino.py",
    "glmkit.runtime.load": "reads the export in front of it: tests/test_export_openvino.py",
    "KolorsPipeline": "needs diffusers and the weights of Kolors: tests/test_encode.py",
    "Level.FULL": "needs a machine on which full isolation holds: tests/test_sandbox.py",
}


def reason_of(line: str) -> Reason | None:
    """Why a command is not run; None if it is."""
    command = re.sub(r"^([A-Z_]+=('[^']*'|\S*) )*", "", line)
    return next((one for one in REASONS if re.match(one.pattern, command)), None)


# --- running ---

# What pages take for granted: made before their first command.
BEFORE = {
    "quantisation.md": ["glm quantize chatglm3-6b models/chatglm3-6b-int4 --scheme int4"],
    "checkpoints.md": ["glm convert models/glm-10b models/blocklm-own --to shards --degree 2"],
    "adapters.md": ["glm quantize chatglm2-6b models/chatglm2-6b-int4 --scheme int4"],
    "conversion.md": ["glm convert models/glm-10b models/blocklm-own --to shards --degree 2"],
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("docs") / "models"
    docs_world.write_models(folder)
    return folder


@pytest.fixture
def world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and data, in which commands are run."""
    import huggingface_hub.constants as constants

    shutil.copytree(models, tmp_path / "models")
    docs_world.write_files(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.setenv("GLMKIT_MODELS", "models")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


NO_RUN = {"--resume", "--dry-run", "--preview", "--help", "--schema"}  # or none that begins anew


def run(line: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs one command in this process, with as little work as shows that it works.

    Args:
        line: As on the page.
        whole: Train really, not only check the recipe.
        monkeypatch: For its standard input and environment.

    Returns:
        The exit code.
    """
    given, _, line = line.rpartition(" | ")
    words = shlex.split(line, comments=True)
    while re.match(r"\w+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if words[0] != "glm":
        return subprocess.run(words, timeout=60).returncode
    words = words[1:]
    text = "你好\n/quit\n"
    if given:
        text = subprocess.run(["bash", "-ec", given], capture_output=True, text=True, check=True, timeout=60).stdout
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    prepare(words)
    if (
        whole
        and words[0] in ("finetune", "pretrain")
        and not {"--resume", "--dry-run", "--preview", "--help", "--schema"} & set(words)
    ):
        make_room(words)
    code = cli.run([*words, *less(words, whole)])
    return 0 if words[0] == "doctor" and code == 1 else code  # 1: something is wrong with this machine


def less(words: list[str], whole: bool) -> list[str]:
    """Settings behind a command that make it small."""
    verb, first = words[0], words[1] if len(words) > 1 else ""
    if {"--dry-run", "--help", "--preview", "compare"} & set(words):
        return []
    if verb in ("finetune", "pretrain"):
        steps = ["train.max_steps=1", "train.warmup_ratio=0", "train.per_device_train_batch_size=1"]
        if any(word.startswith("method.num_layer_trainable=") for word in words):
            steps.append("method.num_layer_trainable=2")  # of four
        if words[1] == "glm_seq2seq":
            steps += ["data.max_source_length=64", "data.max_target_length=32"]  # of the 256 that the model reads
        return [*steps, "train.gradient_accumulation_steps=1"] if whole else ["--dry-run"]
    if verb == "evaluate" and first not in TASKS and not first.endswith(".yaml"):
        return ["--dry-run"]  # recipes; tests/test_recipes.py runs them
    if verb == "data":
        return ["--overwrite"] if first == "convert" else []
    limit = ["--limit", "2"] if verb == "evaluate" and "--limit" not in words else []
    writes = verb in ("chat", "predict") or first in ("adgen", "tools", "gsm8k")
    return [*limit, "--max-tokens", "4"] if writes and "--max-tokens" not in words else limit


def make_room(words: list[str]) -> None:
    """Removes the run of an earlier line, where a page shows several ways to begin the same one."""
    kind = next(kind for kind, verb in VERBS.items() if verb == words[0])
    recipe: Any = load_recipe(words[1], [word for word in words[2:] if re.match(r"output\.dir=", word)], kind)
    shutil.rmtree(recipe.output.dir, ignore_errors=True)


def prepare(words: list[str]) -> None:
    """Makes the adapters and result folders that a command reads and no earlier command of the page has made."""
    if words[:2] == ["evaluate", "compare"]:
        for folder in [word for word in words[2:4] if not Path(word).exists()]:
            made = ["evaluate", "adgen", "--data", "dev.json", "--model", "chatglm3-6b", "-o", folder]
            assert cli.run([*made, "--limit", "3", "--max-tokens", "4"]) == 0
    given = [words[n + 1].rpartition("=")[2] for n, word in enumerate(words) if word in ("--adapter", "-a")]
    given += [word.partition("=")[2] for word in words if word.startswith("model.adapter=") and "null" not in word]
    given += words[2:3] if words[0] == "merge" else []
    named = [words[words.index(flag) + 1] for flag in ("--model", "-m") if flag in words]
    base = (
        named or [word.partition("=")[2] for word in words if word.startswith("model.path=")] or words[1:2] or [""]
    )[0]
    for folder in given:
        if not Path(folder).exists():
            place = Path("models") / Path(base).name
            docs_world.write_adapter(Path(folder), place if place.is_dir() else Path(base))


def run_page(page: Path, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for line in [*BEFORE.get(page.name, ()), *commands(page)]:
        why = reason_of(line)
        if not whole and re.match(TAKES_LONG, line):
            flags_exist(line)
            continue
        if why is not None:
            if why.instead is not None:
                why.instead(line)
            continue
        with monkeypatch.context() as patch:
            code = run(line, whole, patch)
        assert code == 0, f"{page.name}: {line}\n{capsys.readouterr().err[-2000:]}"
        capsys.readouterr()


@of_a_page
def test_commands_of_a_page_run(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(page, False, monkeypatch, capsys)


@pytest.mark.slow
@of_a_page
def test_commands_of_a_page_do_what_they_say(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(page, True, monkeypatch, capsys)


# --- Python ---


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.parent.name != "evening"],  # tests/test_evening.py
    ids=lambda page: page.relative_to(DOCS).as_posix(),
)
def test_python_blocks_of_a_page_run(page: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in BEFORE.get(page.name, ()):
        assert cli.run(shlex.split(line)[1:]) == 0
    docs_world.write_adapter(Path("out/ads/adapter"), Path("models/chatglm3-6b"))
    docs_world.write_adapter(Path("out/poet/checkpoint-3000"), Path("models/chatglm3-6b"))
    docs_world.write_adapter(Path("output/adgen_lora/adapter"), Path("models/chatglm2-6b"))
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self.float())
    names = taken_for_granted()
    for code in blocks(page, "python"):
        if not any(piece in code for piece in PYTHON_REASONS):
            exec(compile(re.sub(r'"THUDM/([\w-]+)"', r'"models/\1"', code), page.name, "exec"), names)


def taken_for_granted() -> dict[str, Any]:
    """Names that pages use and do not make: a model, a prompt, and how tokens are chosen."""
    loaded = glmkit.load("chatglm3-6b", dtype="float32")
    ids = loaded.tokenizer.build_chat_input("tea")["input_ids"][0].tolist()
    return {
        "__name__": "__main__",
        "glmkit": glmkit,
        "loaded": loaded,
        "model": loaded.model,
        "tokenizer": loaded.tokenizer,
        "ids": ids,
        "prompt_ids": ids,
        "prompts": [ids, ids[:-1]],
        "options": SamplingOptions(),
        "stops": loaded.tokenizer.stop_ids,
        "stream": stream,
        "generate_batch": generate_batch,
    }


def test_every_reason_is_still_needed() -> None:
    code = [code for page in PAGES for code in blocks(page, "python")]
    assert [piece for piece in PYTHON_REASONS if not any(piece in one for one in code)] == []
    lines = [line for page in PAGES for line in commands(page)]
    assert [one.pattern for one in REASONS if not any(reason_of(line) is one for line in lines)] == []


# --- the first page, as a reader follows it ---


@pytest.mark.slow
def test_start_page_in_a_shell(tmp_path: Path) -> None:
    """The rehearsal in a real shell: glm-nano is tuned, served, asked by curl and OpenAI's client; and how long."""
    pytest.importorskip("openai")
    pytest.importorskip("peft")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    _, rehearsal, asking, *_ = blocks(DOCS / "start.md", "sh")
    [client] = blocks(DOCS / "start.md", "python")
    (tmp_path / "src").symlink_to(ROOT / "src")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    *lines, serving = rehearsal.strip().splitlines()
    began = time.monotonic()
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, env=environment, check=True, timeout=1500)
    seconds = time.monotonic() - began
    command = shlex.split(serving, comments=True)
    server = subprocess.Popen([*command, "--port", port], cwd=tmp_path, env=environment)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as ready:
                if ready.status == 200:
                    break
            time.sleep(0.5)
        asked = ["bash", "-ec", asking.replace("8000", port)]
        answer = json.loads(subprocess.run(asked, env=environment, capture_output=True, check=True, timeout=300).stdout)
        text = answer["choices"][0]["message"]["content"]
        said = subprocess.run([sys.executable, "-c", client.replace("8000", port)], capture_output=True, text=True)
    finally:
        server.terminate()
        server.wait(60)
    assert "家人们" in text, text  # how every record of the style begins
    assert "家人们" in said.stdout, said.stderr
    print(f"from the first answer to the tuned adapter: {seconds:.0f} s")
