"""Names, aliases, folders of models, the hub's cache, and fetching from a small server that speaks the hub's routes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import official
from glmkit.errors import UsageError
from glmkit.families import FAMILIES, find_family
from glmkit.location import DownloadError, builtin, locate
from hub_server import COMMITS, HubRoute, Server, serving


@pytest.fixture(autouse=True)
def nothing_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder of models, an empty cache, and no way to the hub."""
    import huggingface_hub.constants as constants

    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def folder_with_config(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


# --- names ---


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("chatglm3-6b", "chatglm3-6b"), ("THUDM/chatglm3-6b", "chatglm3-6b"), ("zai-org/chatglm3-6b", "chatglm3-6b")),
        *(("ZhipuAI/chatglm3-6b", "chatglm3-6b"), ("glm3_6b", "chatglm3-6b"), ("ChatGLM3-6B", "chatglm3-6b")),
        *(("glm2_6b", "chatglm2-6b"), ("glm2_6b_lora", "chatglm2-6b"), ("thudm/ChatGLM2-6B", "chatglm2-6b")),
        *(("THUDM/chatglm2-6b-32k", "chatglm2-6b-32k"), ("chatglm2-6b-int4", "chatglm2-6b-int4")),
        *(("somebody/chatglm3-6b", None), ("llama", None), ("/models/chatglm3-6b", None), ("", None)),
    ],
)
def test_aliases(name: str, family: str | None) -> None:
    found = find_family(name)
    assert (found.name if found else None) == family


def test_no_name_means_two_models() -> None:
    names = [name for row in FAMILIES for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


def test_a_folder_comes_first_and_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with_config(tmp_path / "chatglm3-6b")
    assert locate("chatglm3-6b") == Path("chatglm3-6b")
    assert locate(tmp_path / "chatglm3-6b") == tmp_path / "chatglm3-6b"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/chatglm3-6b") == tmp_path / "chatglm3-6b"


def test_the_model_of_this_package() -> None:
    folder = builtin("glm-nano")
    if not folder.is_dir():
        pytest.skip("not built yet")
    assert locate("glm-nano") == locate("nano") == folder
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("layout", "typed"),
    [
        ("chatglm3-6b", "chatglm3-6b"),
        ("chatglm3-6b", "glm3_6b"),
        ("chatglm3-6b", "THUDM/chatglm3-6b"),
        ("THUDM/chatglm3-6b", "chatglm3-6b"),
        ("ZhipuAI/chatglm3-6b", "zai-org/chatglm3-6b"),
        ("zai-org--chatglm3-6b", "chatglm3-6b"),
        ("THUDM--chatglm3-6b", "THUDM/chatglm3-6b"),
        ("somebody/own-model", "somebody/own-model"),
        ("somebody--own-model", "somebody/own-model"),
        ("own-model", "own-model"),
    ],
)
def test_glmkit_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, typed: str) -> None:
    folder = folder_with_config(tmp_path / "models" / layout)
    monkeypatch.setenv("GLMKIT_MODELS", str(tmp_path / "models"))
    assert locate(typed) == folder


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm2_6b", "chatglm2-6b-int4"])
def test_a_bare_name_is_never_fetched_silently(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(name)
    family = find_family(name)
    assert family is not None
    assert f"{family.name} is not on this machine" in caught.value.message
    assert family.hub_id in caught.value.message
    assert f"{family.bytes / 1e9:.1f} GB" in caught.value.message
    assert "--yes" in str(caught.value.hint)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("typed", "meant"), [("chatglm3-6", "chatglm3-6b"), ("ChatGLM2_6b", "chatglm2-6b"), ("glm-nan", "glm-nano")]
)
def test_did_you_mean(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(typed)
    assert caught.value.hint == f"did you mean {meant}?"


@pytest.mark.parametrize("typed", ["xyzzy", "/nowhere/at/all", ""])
def test_an_unknown_name_lists_the_known(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(typed)
    assert "chatglm3-6b" in str(caught.value.hint)


def test_order_to_fetch_without_a_network_is_one_error() -> None:
    for name, options in (("somebody/model", {}), ("chatglm3-6b", {"download": True})):
        with pytest.raises(DownloadError, match="cannot fetch") as caught:
            locate(name, **options)  # type: ignore[arg-type]
        assert "HF_HUB_OFFLINE=0" in str(caught.value.hint)
        assert caught.value.exit_code == 1
    with pytest.raises(DownloadError, match="local_files_only"):
        locate("somebody/model", hub={"local_files_only": True})


# --- the hub's cache ---


def cached(cache: Path, repository: str, files: dict[str, str], revision: str = "main") -> Path:
    """Makes an entry of the hub's cache as the client lays it out."""
    entry = cache / f"models--{repository.replace('/', '--')}"
    snapshot = entry / "snapshots" / COMMITS[revision]
    for folder in (snapshot, entry / "blobs", entry / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (entry / "refs" / revision).write_text(COMMITS[revision])
    for name, content in files.items():
        blob = entry / "blobs" / hashlib.sha1(f"{name}{content}".encode()).hexdigest()
        blob.write_text(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


@pytest.mark.parametrize("typed", ["chatglm3-6b", "glm3_6b", "THUDM/chatglm3-6b", "zai-org/chatglm3-6b"])
def test_the_cache_is_used_under_each_organisation(tmp_path: Path, typed: str) -> None:
    snapshot = cached(tmp_path / "cache", "THUDM/chatglm3-6b", {"config.json": "{}", "pytorch_model.bin": ""})
    assert locate(typed) == snapshot
    assert locate(typed, revision=COMMITS["main"]) == snapshot
    assert locate(typed, hub={"local_files_only": True}) == snapshot


def test_another_cache_and_another_revision(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "other", "o/m", {"config.json": "{}", "model.safetensors": ""}, "v1")
    assert locate("o/m", revision="v1", hub={"cache_dir": str(tmp_path / "other")}) == snapshot
    for options in ({"hub": {"cache_dir": str(tmp_path / "other")}}, {"revision": "v1"}):
        with pytest.raises(DownloadError):
            locate("o/m", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({"model.safetensors.index.json": INDEX, "model-1.safetensors": "", "model-2.safetensors": ""}, True),
        ({"model.safetensors.index.json": INDEX, "model-1.safetensors": ""}, False),
        ({"model-1.safetensors": "", "model-2.safetensors": ""}, False),
        ({"pytorch_model.bin.index.json": '{"weight_map": {"a": "x.bin"}}', "x.bin": ""}, True),
        ({}, False),
        ({"model.safetensors.index.json": "broken", "model-1.safetensors": ""}, True),  # the loader says what is wrong
    ],
)
def test_an_interrupted_download_is_taken_up_again(tmp_path: Path, files: dict[str, str], complete: bool) -> None:
    snapshot = cached(tmp_path / "cache", "o/m", {"config.json": "{}"} | files)
    if complete:
        assert locate("o/m") == snapshot
    else:
        with pytest.raises(DownloadError):
            locate("o/m")


# --- fetching ---


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("hub")
    tokenizer = official.train_tokenizer(root / "tokenizer.model")
    folders = {
        "main": official.write_folder(root / "main", tokenizer=tokenizer),
        "v1": official.write_folder(root / "v1", tokenizer=tokenizer, form="bin", seed=1),
    }
    for folder in folders.values():
        (folder / "training_args.json.exe").write_text("x")
        (folder / "README.md").write_text("not needed")
    with serving(HubRoute, "zai-org/chatglm3-6b", folders) as server:
        yield server


# One process, because huggingface_hub reads its environment when it is imported; it prints what it saw.
_SCRIPT = """
import json, os, sys
import glmkit
from glmkit.errors import GlmkitError
from transformers import AutoModelForCausalLM, AutoTokenizer
import huggingface_hub.constants as constants

executed = []
def watch(event, arguments):
    if event == "exec" and "_chatglm" in getattr(arguments[0], "co_filename", ""):
        executed.append(arguments[0].co_filename)
sys.addaudithook(watch)

def total(model):
    return float(sum(parameter.double().abs().sum() for parameter in model.parameters()))

def attempt(call):
    try:
        return call()
    except GlmkitError as error:
        return [type(error).__name__, error.message, error.hint]

found = {}
found["bare"] = attempt(lambda: glmkit.load("chatglm3-6b"))
found["nothing"] = attempt(lambda: glmkit.load("zai-org/no-such-model"))
found["no revision"] = attempt(lambda: glmkit.load("zai-org/chatglm3-6b", revision="v9"))
loaded = glmkit.load("zai-org/chatglm3-6b")
found["path"], found["main"] = str(loaded.path), total(loaded.model)
found["generation"] = loaded.tokenizer.generation
first = glmkit.load("chatglm3-6b", revision="v1", download=True)
found["v1 path"], found["v1"] = str(first.path), total(first.model)
model = AutoModelForCausalLM.from_pretrained("zai-org/chatglm3-6b", revision="v1", trust_remote_code=True)
found["auto v1"] = total(model)
found["auto tokenizer"] = AutoTokenizer.from_pretrained("zai-org/chatglm3-6b", trust_remote_code=True).generation
constants.HF_HUB_OFFLINE = True
found["offline"] = total(glmkit.load("chatglm3-6b").model)
found["offline v1"] = total(glmkit.load("zai-org/chatglm3-6b", revision="v1").model)
found["offline nothing"] = attempt(lambda: glmkit.load("zai-org/chatglm2-6b"))
found["executed"] = executed
print(json.dumps(found))
"""


def test_fetching(hub: Server, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["bare"][0] == "UsageError"
    assert "zai-org/chatglm3-6b, 12.5 GB" in found["bare"][1]
    assert found["nothing"][0] == found["no revision"][0] == "DownloadError"
    assert "zai-org/no-such-model" in found["nothing"][1]
    assert "HF_TOKEN" in found["nothing"][2]

    snapshots = home / "hub" / "models--zai-org--chatglm3-6b" / "snapshots"
    assert Path(found["path"]) == snapshots / COMMITS["main"]
    assert Path(found["v1 path"]) == snapshots / COMMITS["v1"]
    assert found["generation"] == found["auto tokenizer"] == 3
    assert found["main"] == found["offline"] != found["v1"]
    assert found["v1"] == found["auto v1"] == found["offline v1"]
    assert found["offline nothing"][0] == "DownloadError"

    assert found["executed"] == []
    for folder in hub.revisions.values():
        assert not (folder / official.CANARY).exists()
    fetched = {name for commit in (COMMITS["main"], COMMITS["v1"]) for name in os.listdir(snapshots / commit)}
    code = {name for name in fetched if name.endswith(".py")}
    assert code <= {"tokenization_chatglm.py", "modeling_chatglm.py"}  # as text, for signs of what the folder is
    assert not fetched & {"README.md", "training_args.json.exe"}


@pytest.mark.parametrize("name", ["/nope", "./nope", "~/nope", "nope/", "a b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(UsageError, match="no folder and no model is called"):
        locate(name)


def test_a_model_that_is_on_no_hub() -> None:
    with pytest.raises(UsageError, match="glm-130b is not on this machine, and it is not on the hub"):
        locate("glm-130b", download=True)
