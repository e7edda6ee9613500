"""Errors as people see them: each really caused through the command, in English and in Chinese.

UPDATE_SNAPSHOTS=1 pytest tests/test_error_snapshots.py     writes fixtures/error_snapshots.json anew; read the diff
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from glmkit import cli

SNAPSHOTS = Path(__file__).parent / "fixtures" / "error_snapshots.json"
UPDATE = bool(os.environ.get("UPDATE_SNAPSHOTS"))
PROSE = re.compile(r"[a-z]{2,}(?: [a-z]{2,}){3,}")

# Name -> arguments. Words in capitals are folders and files of `place`.
CASES = {
    "unknown verb": "caht",
    "verb of another tool": "sft",
    "model as a verb": "chatglm3-6b",
    "verb that resembles nothing": "zzz",
    "verb behind a verb": "recipe sho",
    "verb behind a verb is missing": "recipe",
    "unknown flag with a neighbour": "chat --temprature 1",
    "unknown flag without one": "chat --foo",
    "flag without its value": "chat --temperature",
    "flag that is no number": "chat --top-k many",
    "missing argument": "inspect",
    "one argument too many": "chat a b",
    "unknown model": "chat chatglm3-6c -p x",
    "model that is not here": "chat chatglm3-6b -p x",
    "empty question": "chat -p",
    "JSON without a question": "chat --json",
    "no conversation to continue": "chat -c -p x",
    "batch of nothing": "inspect chatglm3-6b --batch 0",
    "which recipe": "finetune",
    "unknown recipe": "finetune adgen_lroa",
    "unknown setting": "finetune adgen_lora train.learning_rat=1 --dry-run",
    "setting that is no number": "finetune adgen_lora train.learning_rate=fast --dry-run",
    "recipe that is no YAML": "finetune BAD_YAML",
    "recipe that is missing": "finetune adgen_lora.yml",
    "unknown task": "evaluate adgn",
    "evaluation data that is missing": "evaluate adgen --data none.json",
    "folder that is empty": "inspect EMPTY",
    "file for a folder": "inspect FILE",
    "config that is no JSON": "inspect BAD_CONFIG",
    "config of a neighbour": "inspect LLAMA",
    "config with an unknown value": "inspect ODD",
    "weights that are missing": "inspect NO_WEIGHTS",
    "git-lfs pointer": "inspect POINTER",
    "weights that are cut short": "inspect CUT",
    "program for weights": "inspect PICKLE",
    "output that exists": "convert MODEL MODEL --to official",
    "unknown form": "convert MODEL out --to pytorch",
    "unknown export": "export MODEL out --to coreml",
    "unknown quantisation": "quantize MODEL out --scheme int3",
    "folder that is no export": "run MODEL -p x",
    "adapter that is missing": "merge MODEL none out",
    "file to predict from that is missing": "predict MODEL --input none.jsonl --output out.jsonl",
    "data of an unknown form": "data convert nonsense DATA out.jsonl",
    "rank table that is none": "cluster check FILE",
    "checkpoint that is none": "checkpoint transform EMPTY out",
    "public server without a key": "serve MODEL --host 0.0.0.0",
    "port that does not exist": "serve MODEL --port 99999",
    "key file that is missing": "serve MODEL --api-key-file none.txt",
    "public page without a password": "web MODEL --host 0.0.0.0",
    "run that is missing": "watch none",
    "unknown device": "chat MODEL -p x --device gpu",
    "unknown dtype": "chat MODEL -p x --dtype float17",
    "unknown family": "chat MODEL -p x --family chatglm9",
    "two adapters of one name": "serve MODEL -a a=EMPTY -a a=EMPTY",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the cases are about."""
    place = tmp_path_factory.mktemp("errors")
    tokenizer = tiny.train_tokenizer(place / "tokenizer.model")
    model = tiny.write_model(place / "MODEL", tokenizer)

    def copy(name: str, change: Callable[[Path], object]) -> None:
        change(Path(shutil.copytree(model, place / name)))

    def configure(folder: Path, **changes: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    def weights(folder: Path) -> Path:
        return next(folder.glob("*.safetensors"))

    (place / "EMPTY").mkdir()
    (place / "FILE").write_text("text\n")
    (place / "BAD_YAML").write_text("train: [1\n")
    (place / "DATA").write_text('{"a": 1}\n')
    copy("BAD_CONFIG", lambda folder: (folder / "config.json").write_text("{"))
    copy("LLAMA", lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'))
    copy("ODD", lambda folder: configure(folder, rmsnorm=False))
    copy("NO_WEIGHTS", lambda folder: weights(folder).unlink())
    copy("POINTER", lambda folder: weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid x\n"))
    copy("CUT", lambda folder: os.truncate(weights(folder), 2000))

    def make_program(folder: Path) -> None:
        weights(folder).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")

    copy("PICKLE", make_program)
    return place


@pytest.fixture(scope="module")
def snapshots() -> dict[str, dict[str, object]]:
    return json.loads(SNAPSHOTS.read_text(encoding="utf-8")) if SNAPSHOTS.exists() else {}


def cause(
    name: str, place: Path, spoken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Causes an error; what was printed comes with paths and sizes of this machine taken out."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    monkeypatch.setenv("HF_HOME", str(place / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GLMKIT_LANG", spoken)
    monkeypatch.setenv("COLUMNS", "100")
    for variable in ("GLMKIT_MODELS", "GLMKIT_API_KEY", "GLMKIT_WEB_PASSWORD", "GLMKIT_SOURCE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    arguments = CASES[name].split()
    code = cli.run([*arguments, " "] if name == "empty question" else arguments)
    printed = capsys.readouterr()
    assert printed.out == "", "errors belong on stderr"
    return code, printed.err.replace(str(place), "PLACE").rstrip("\n")


@pytest.mark.parametrize("name", CASES)
def test_an_error_and_its_cure(
    name: str,
    place: Path,
    snapshots: dict[str, dict[str, object]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, english = cause(name, place, "en", capsys, monkeypatch)
    same_code, chinese = cause(name, place, "zh", capsys, monkeypatch)
    assert code == same_code
    assert code in (1, 2)
    for text, labels in ((english, ("error: ", "\nhint: ")), (chinese, ("错误：", "\n提示："))):
        assert text.startswith(labels[0]), text
        assert "Traceback" not in text
        assert labels[1] in text, "every error of a user has a cure"
    left = PROSE.search(re.sub(r"glm [^；，。：]*|'[^']*'|\([^)]*\)", "", chinese))
    assert left is None, f"English left: {left and left[0]}"
    seen = {"arguments": CASES[name], "exit": code, "en": english.splitlines(), "zh": chinese.splitlines()}
    if UPDATE:
        snapshots[name] = seen
        SNAPSHOTS.write_text(json.dumps(snapshots, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    assert snapshots.get(name) == seen


def test_there_are_enough_and_none_is_left_over(snapshots: dict[str, dict[str, object]]) -> None:
    assert set(snapshots) == set(CASES)
    assert len(CASES) >= 40
    assert {snapshots[name]["exit"] for name in CASES} == {1, 2}


def test_debug_shows_the_traceback_in_both_languages(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for spoken, label in (("en", "error: "), ("zh", "错误：")):
        monkeypatch.setenv("GLMKIT_LANG", spoken)
        assert cli.run(["caht", "--debug"]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert f"\n{label}" in err
