"""What is on this machine, and the verbs that fetch, list, find and remove models."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmkit import inventory
from glmkit.cli import run
from glmkit.errors import OutputError
from glmkit.families import find_family
from hub_server import COMMITS, HubRoute, Server, serving

_WEIGHTS = b"w" * 60_000


@pytest.fixture(autouse=True)
def this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("GLMKIT_SOURCE", raising=False)
    monkeypatch.delenv("GLMKIT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import huggingface_hub.constants as constants

    folders = {}
    for branch in ("main", "v1"):  # the same weights, another config
        folders[branch] = tmp_path / f"served-{branch}"
        folders[branch].mkdir()
        (folders[branch] / "model.safetensors").write_bytes(_WEIGHTS)
        (folders[branch] / "config.json").write_text(json.dumps({"model_type": "chatglm", "branch": branch}))
    with serving(HubRoute, "zai-org/chatglm3-6b", folders) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def _folder(path: Path, config: dict[str, object], weights: int = 1_000) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"w" * weights)
    return path


def _listed() -> dict[tuple[str, str], inventory.StoredModel]:
    return {(model.name, model.place): model for model in inventory.stored_models()}


# --- what is there ---


def test_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Server) -> None:
    models = tmp_path / "models"
    monkeypatch.setenv("GLMKIT_MODELS", str(models))
    _folder(models / "chatglm2-6b", {"model_type": "chatglm"})
    _folder(models / "THUDM--chatglm-6b-int4", {"model_type": "chatglm", "quantization_bit": 4})
    _folder(models / "somebody" / "tuned", {"model_type": "chatglm", "quantization_config": {"scheme": "int8"}})
    _folder(
        tmp_path / "modelscope" / "models" / "ZhipuAI--glm-4-9b-chat" / "snapshots" / "master",
        {"model_type": "chatglm"},
    )
    _folder(tmp_path / "modelscope" / "hub" / "models" / "ZhipuAI" / "chatglm2-6b-int4", {"quantization_bit": 4})
    _folder(tmp_path / "hub" / "models--o--llama" / "snapshots" / ("d" * 40), {"model_type": "llama"})
    _folder(tmp_path / "hub" / "models--o--mine" / "snapshots" / ("e" * 40), {"model_type": "chatglm"})
    assert run(["pull", "chatglm3-6b"]) == 0

    found = _listed()
    assert {(name, place, model.family, model.quantised) for (name, place), model in found.items()} == {
        ("glm-nano", "package", "glm-nano", None),
        ("chatglm2-6b", "folder", "chatglm2-6b", None),
        ("THUDM--chatglm-6b-int4", "folder", "chatglm-6b-int4", "int4"),
        ("somebody/tuned", "folder", None, "int8"),
        ("chatglm3-6b", "hub", "chatglm3-6b", None),
        ("o/mine", "hub", None, None),
        ("glm-4-9b-chat", "modelscope", "glm-4-9b-chat", None),
        ("chatglm2-6b-int4", "modelscope", "chatglm2-6b-int4", "int4"),
    }
    assert all(model.complete for model in found.values())
    assert found["chatglm3-6b", "hub"].size_bytes == len(_WEIGHTS) + len('{"model_type": "chatglm", "branch": "main"}')
    # What the list calls a model is what the other verbs take.
    from glmkit.location import locate

    for model in found.values():
        if model.place != "package":
            assert Path(locate(model.name)).resolve() == model.path.resolve()


def test_a_broken_config_does_not_stop_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLMKIT_MODELS", str(tmp_path / "models"))
    for name, text in (("a", "{"), ("b", "[]"), ("c", "[" * 100_000), ("d", "\udcff")):
        folder = _folder(tmp_path / "models" / name, {})
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    indexes = ('{"weight_map":' * 100_000, json.dumps({"weight_map": {"w": "x" * 300}}), "\udcff")
    for name, text in zip("efg", indexes):
        scheme = {"quant_method": "\x1b]0;x\x07" + "y" * 5_000}
        folder = _folder(tmp_path / "models" / name, {"quantization_config": scheme})
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    piped = _folder(tmp_path / "models" / "h", {})
    (piped / "config.json").unlink()
    os.mkfifo(piped / "config.json")
    (piped / "latest").touch()
    found = {name: model for (name, place), model in _listed().items() if place == "folder"}
    assert set(found) == set("abcdefgh")
    assert {found[name].quantised for name in "efg"} == {"unknown"}
    assert run(["where", "x\x1b]0;y\x07"]) == 2  # whatever an error repeats
    assert "\x1b" not in capsys.readouterr().err


def test_an_interrupted_download_is_partial(hub: Server) -> None:
    hub.faults.cut_at["model.safetensors"] = [20_000] * 5
    import glmkit.downloads.transfer as transfer

    waits, transfer._WAIT_SECONDS = transfer._WAIT_SECONDS, (0.0,) * 4
    try:
        assert run(["pull", "chatglm3-6b"]) == 1
    finally:
        transfer._WAIT_SECONDS = waits
    model = _listed()["chatglm3-6b", "hub"]
    assert not model.complete
    assert 20_000 < model.size_bytes < 21_000
    assert [path.stat().st_size for path in inventory.partial_files()] == [20_000]
    assert run(["where", "chatglm3-6b"]) == 2
    assert inventory.remove([model]) == model.size_bytes
    assert inventory.stored_models()[1:] == []


# --- the verbs ---


def test_from_nothing_to_a_folder(hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["where", "chatglm3-6b"]) == 2
    assert "glm pull chatglm3-6b" in capsys.readouterr().err
    assert run(["pull", "chatglm3-6b"]) == 0
    said = capsys.readouterr()
    folder = tmp_path / "hub" / "models--zai-org--chatglm3-6b" / "snapshots" / COMMITS["main"]
    assert said.out == f"{folder}\n"  # nothing else, for scripts
    assert "2 files, 60.0 kB, 60.0 kB to fetch" in said.err
    assert "memory to chat: about 400.1 MB, 400.0 MB as int8" in said.err
    assert "licence: model licence of the repository" in said.err
    assert "checked: 2 files are whole" in said.err
    assert run(["where", "chatglm3-6b"]) == run(["where", "THUDM/chatglm3-6b"]) == 0
    assert capsys.readouterr().out == f"{folder}\n" * 2
    hub.ranges.clear()
    assert run(["pull", "chatglm3-6b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["path"], told["fetched_bytes"]) == (1, str(folder), 0)
    assert hub.ranges == []
    assert run(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed["models"]] == ["glm-nano", "chatglm3-6b"]
    assert run(["list"]) == 0
    assert "chatglm3-6b  zai-org/chatglm3-6b  plain    complete  hub aaaaaaaa  60.0 kB" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chatglm4-6b", "glm-130b", "./nowhere"])
def test_names_that_cannot_be_fetched(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", name]) == 2
    assert "hint:" in capsys.readouterr().err


def test_what_is_here_is_not_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "glm-nano"]) == 0
    assert "builtin" in capsys.readouterr().out
    assert run(["pull", "glm-nano", "--to", "here"]) == 2  # nothing would be there
    assert "hint: to copy it: cp -r " in capsys.readouterr().err
    _folder(tmp_path / "mine", {})
    assert run(["pull", "mine"]) == 2
    assert "hint: glm chat mine" in capsys.readouterr().err


# --- removing ---


def test_removing_one_revision_keeps_the_blobs_of_the_other(hub: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "chatglm3-6b"]) == run(["pull", "chatglm3-6b", "--revision", "v1"]) == 0
    capsys.readouterr()
    assert run(["rm", "chatglm3-6b", "--revision", "bbbb", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] < 200  # the config; the weights belong to both
    left = [model for model in inventory.stored_models() if model.place == "hub"]
    assert [model.revision for model in left] == [COMMITS["main"]]
    assert (left[0].path / "model.safetensors").read_bytes() == _WEIGHTS
    assert run(["rm", "chatglm3-6b", "--yes"]) == 0
    assert "freed 60.1 kB" in capsys.readouterr().out
    assert inventory.find_stored("chatglm3-6b") == []


def test_removing_from_modelscopes_cache(tmp_path: Path) -> None:
    cache = tmp_path / "modelscope"
    new = cache / "models" / "ZhipuAI--glm-4-9b-chat"
    for revision in ("master", "v2"):
        _folder(new / "snapshots" / revision, {})
    old = _folder(cache / "models" / "ZhipuAI" / "glm-4-9b", {})
    assert run(["rm", "glm-4-9b-chat", "--revision", "v2", "--yes"]) == 0
    assert [path.name for path in (new / "snapshots").iterdir()] == ["master"]
    assert run(["rm", "ZhipuAI/glm-4-9b-chat", "--yes"]) == 0
    assert not new.exists()
    assert old.exists()
    assert run(["rm", "glm-4-9b", "--yes"]) == 0
    assert not old.exists()


def test_what_is_not_in_a_cache_is_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLMKIT_MODELS", str(tmp_path / "models"))
    kept = [_folder(tmp_path / "models" / "chatglm3-6b", {}), _folder(tmp_path / "mine", {})]
    for name, code in (("chatglm3-6b", 1), ("mine", 2), (str(kept[0]), 2), ("glm-nano", 1), ("glm-4-9b", 2), ("..", 2)):
        assert run(["rm", name, "--yes"]) == code, name
    assert all((folder / "model.safetensors").is_file() for folder in kept)
    with pytest.raises(OutputError, match="comes with this package") as caught:
        inventory.remove(inventory.find_stored("glm-nano"))
    assert "rm -r" not in str(caught.value.hint)
    capsys.readouterr()


def test_a_link_in_the_cache_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    mine = _folder(tmp_path / "mine" / "snapshots" / "master", {})
    (tmp_path / "modelscope" / "models").mkdir(parents=True)
    (tmp_path / "modelscope" / "models" / "ZhipuAI--chatglm3-6b").symlink_to(tmp_path / "mine")
    hub = tmp_path / "hub" / "models--zai-org--chatglm2-6b"
    hub.parent.mkdir()
    hub.symlink_to(tmp_path / "mine")
    for name in ("chatglm3-6b", "chatglm2-6b"):
        assert run(["rm", name, "--yes"]) == 0
        assert inventory.find_stored(name) == []
        assert (mine / "model.safetensors").is_file()


def test_a_revision_is_removed_and_not_what_its_links_point_to(tmp_path: Path) -> None:
    mine = _folder(tmp_path / "mine", {})
    (tmp_path / "disk").mkdir()
    (tmp_path / "hub").symlink_to(tmp_path / "disk")  # a cache on another disk
    entry = tmp_path / "hub" / "models--zai-org--chatglm3-6b"
    (entry / "blobs").mkdir(parents=True)
    (entry / "blobs" / "1").write_text("{}")
    (entry / "blobs" / "2").write_text("own weights")
    targets = {"a": "../../blobs/2", "b": str(mine / "model.safetensors"), "c": "../../blobs/gone"}
    for commit, target in targets.items():
        snapshot = entry / "snapshots" / (commit * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").symlink_to("../../blobs/1")
        (snapshot / "model.safetensors").symlink_to(target)
    (entry / "snapshots" / ("d" * 40)).symlink_to(mine)
    for commit in "dcb":
        assert run(["rm", "chatglm3-6b", "--revision", commit, "--yes"]) == 0
    assert [model.revision for model in inventory.find_stored("chatglm3-6b")] == ["a" * 40]
    assert (entry / "snapshots" / ("a" * 40) / "model.safetensors").read_text() == "own weights"
    assert {path.name for path in mine.iterdir()} == {"config.json", "model.safetensors"}
    assert run(["rm", "chatglm3-6b", "--yes"]) == 0
    assert not entry.exists()


def test_without_a_terminal_and_without_yes_nothing_is_removed(
    hub: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pull", "chatglm3-6b"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run(["rm", "chatglm3-6b"]) == 2
    assert "hint: --yes removes it without asking" in capsys.readouterr().err
    assert len(inventory.find_stored("chatglm3-6b")) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"HF_HOME": "/a/$USER"},
        {"XDG_CACHE_HOME": "/b"},
        {"HF_HUB_CACHE": "~/c", "HF_HOME": "/a"},
        {"HUGGINGFACE_HUB_CACHE": "/d", "XDG_CACHE_HOME": "/b"},
    ],
)
def test_the_cache_is_where_the_client_has_it(settings: dict[str, str]) -> None:
    environment = {"HOME": "/nobody", "USER": "somebody", "PATH": os.environ["PATH"]} | settings
    program = """import glmkit_command, sys
from glmkit.downloads import hub
ours = hub.cache_folder()
assert "huggingface_hub" not in sys.modules
import huggingface_hub.constants as constants
print(ours, constants.HF_HUB_CACHE, hub.cache_folder())"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1, done.stdout


@pytest.mark.parametrize(
    ("typed", "code", "left"), [("\n", 1, 1), ("n\n", 1, 1), ("", 1, 1), ("y\n", 0, 0), ("是\n", 0, 0)]
)
def test_the_question(
    hub: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, code: int, left: int
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert run(["pull", "chatglm3-6b"]) == 0
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert run(["rm", "chatglm3-6b"]) == code
    assert "zai-org/chatglm3-6b aaaaaaaaaaaa: 60.0 kB" in capsys.readouterr().err
    assert len(inventory.find_stored("chatglm3-6b")) == left


def test_what_the_next_command_is(
    hub: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that does not fit as it is, is loaded in a smaller format."""
    monkeypatch.setattr("glmkit.verbs.storage._weights_bytes", lambda plan: 12_500_000_000)
    for free, flag in ((24, ""), (8, " --quantize int8"), (6, " --quantize int4"), (2, "")):
        monkeypatch.setattr("glmkit.machine.free_memory_bytes", lambda free=free: free * 10**9)
        assert run(["pull", "chatglm3-6b"]) == 0
        assert capsys.readouterr().err.endswith(f"next: glm chat chatglm3-6b{flag}\n")


# --- what fits ---


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_the_estimate_is_a_little_above_what_is_computed(name: str) -> None:
    from glmkit.inspection import inspect

    row = find_family(name)
    assert row is not None
    computed = inspect(name, context_tokens=2_048)["memory_bytes"]
    for scheme in (None, "int8", "int4"):
        ratio = inventory.estimate_memory(row.bytes, scheme) / computed[scheme or "float16"]["total"]
        assert 0.94 < ratio < 1.25, (scheme, ratio)


def test_the_best_format_that_fits() -> None:
    chosen = [inventory.choose_scheme(12_500_000_000, int(free * 1e9)) for free in (24, 8, 6, 4)]
    assert chosen == ["", "int8", "int4", None]
    assert inventory.choose_scheme(12_500_000_000, None) == ""


@pytest.mark.parametrize(("free", "command"), [(24, "glm pull chatglm3-6b"), (4, "glm pull chatglm-6b-int4")])
def test_the_next_step_fits_this_machine(free: int, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "free_memory_bytes", lambda: free * 10**9)
    assert inventory.next_step()[0] == command


def test_the_next_step_where_free_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "free_memory_bytes", lambda: None)
    assert inventory.next_step() == (
        "glm pull chatglm3-6b", "fetch a real model: 12.5 GB, needs 12.9 GB of memory",
    )  # fmt: skip


def test_the_next_step_with_a_model_on_this_machine(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["pull", "chatglm3-6b"]) == 0
    assert inventory.next_step()[0] == "glm chat chatglm3-6b"


# --- a killed process ---


def test_a_killed_download_goes_on_where_it_was(hub: Server, tmp_path: Path) -> None:
    hub.faults.stall_at["model.safetensors"] = 40_000
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", "from glmkit_command import main; main()", "pull", "chatglm3-6b"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == 40_000 for path in inventory.partial_files()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.faults.stall_at.clear()
    hub.ranges.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert hub.ranges[-1] == ("model.safetensors", 40_000)
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == _WEIGHTS
    assert inventory.partial_files() == []
