"""Fetching models from small servers that speak the routes of the hub and of ModelScope, and what goes wrong."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from glmkit import downloads
from glmkit.downloads import DownloadError, fetch, prepare
from glmkit.downloads.files import RemoteFile, choose_needed
from glmkit.downloads.progress import Progress
from glmkit.downloads.transfer import Origin, check_redirect, have
from glmkit.errors import UsageError
from glmkit.location import locate
from hub_server import COMMITS, HubRoute, ModelScopeRoute, Server, serving

_WEIGHTS = bytes(range(256)) * 400  # 102,400 bytes
_FILES = {
    "config.json": b'{"model_type": "chatglm"}',
    "tokenizer.model": b"t" * 3_000,
    "tokenization_chatglm.py": b"raise SystemExit('never run')",
    "model.safetensors": _WEIGHTS,
    "pytorch_model.bin": b"b" * 5_000,  # the same weights in the other form
    "README.md": b"not needed",
    "other.py": b"not needed",
    ".gitattributes": b"not needed",
}
_NEEDED = {"config.json", "tokenizer.model", "tokenization_chatglm.py", "model.safetensors"}
_BYTES = sum(len(_FILES[name]) for name in _NEEDED)


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, no folder of models, and no waiting between attempts."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope-home"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    for name in ("GLMKIT_MODELS", "GLMKIT_SOURCE", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("glmkit.downloads.transfer._WAIT_SECONDS", (0.0,) * 4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import huggingface_hub.constants as constants

    folders = {
        "main": _folder(tmp_path / "main", _FILES),
        "v1": _folder(tmp_path / "v1", _FILES | {"config.json": b"{}"}),
    }
    with serving(HubRoute, "zai-org/chatglm3-6b", folders) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("modelscope_hub")
    with serving(ModelScopeRoute, "ZhipuAI/chatglm3-6b", {"master": _folder(tmp_path / "master", _FILES)}) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def _pull(**options: object) -> Path:
    return fetch(prepare("zai-org/chatglm3-6b", **options))  # type: ignore[arg-type]


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


# --- the hub ---


def test_needed_files_of_one_commit_as_the_client_keeps_them(hub: Server, tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    plan = prepare("zai-org/chatglm3-6b")
    assert (plan.source, plan.commit, plan.size_bytes, plan.missing_bytes) == ("hub", COMMITS["main"], _BYTES, _BYTES)
    told: list[int] = []
    folder = fetch(plan, tell=told.append)
    assert _content(folder) == {name: _FILES[name] for name in _NEEDED}
    assert sum(told) == _BYTES
    # The client finds it, offline too, and reckons with the same blobs.
    assert snapshot_download("zai-org/chatglm3-6b", local_files_only=True) == str(folder)
    cached = scan_cache_dir(tmp_path / "hub")
    assert not cached.warnings
    assert cached.size_on_disk == _BYTES
    assert locate("chatglm3-6b") == folder
    # The second commit shares all but its own config with the first.
    second = prepare("zai-org/chatglm3-6b", revision="v1")
    assert second.missing_bytes == 2
    assert fetch(second) != folder
    assert locate("chatglm3-6b", revision="v1").name == COMMITS["v1"]


def test_every_request_names_the_commit(hub: Server) -> None:
    """The branch may move while files come; they are all asked for by the commit that was listed (W-75)."""
    _pull()
    asked = [line for line in hub.asked if "/resolve/" in line or "/tree/" in line]
    assert len(asked) == len(_NEEDED) + 1
    assert all(COMMITS["main"] in line for line in asked)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_cut_connection_goes_on_where_it_broke(hub: Server, ignores_ranges: bool) -> None:
    hub.faults.cut_at["model.safetensors"] = [40_000, 90_000]
    hub.faults.ignores_ranges = ignores_ranges
    assert _content(_pull())["model.safetensors"] == _WEIGHTS
    begins = [begin for name, begin in hub.ranges if name == "model.safetensors"]
    assert begins == ([0, 0, 0] if ignores_ranges else [0, 40_000, 90_000])


def test_after_ctrl_c_a_connection_that_hangs_is_not_tried_again(tmp_path: Path) -> None:
    tried: list[int] = []

    class Hanging(Origin):
        def opened(self, from_byte: int) -> AbstractContextManager[tuple[Iterator[bytes], int]]:
            tried.append(from_byte)
            raise ValueError("the read operation timed out")

    file, part = RemoteFile("model.safetensors", 9, sha256="0" * 64), tmp_path / "part"
    with pytest.raises(DownloadError, match="stopped"):
        have(file, tmp_path / "final", part, Hanging("http://x", {}), tell=lambda count: None, stop=lambda: bool(tried))
    assert tried == [0]


def test_a_second_attempt_goes_on_too(hub: Server) -> None:
    hub.faults.cut_at["model.safetensors"] = [30_000] * 6
    with pytest.raises(DownloadError, match=r"model.safetensors: .* at 30,000 of 102,400 bytes, 5 times") as caught:
        _pull()
    assert caught.value.hint == "the same command goes on where this one stopped"
    hub.faults.cut_at.clear()
    hub.ranges.clear()
    plan = prepare("zai-org/chatglm3-6b")
    assert plan.missing_bytes == len(_WEIGHTS) - 30_000
    assert _content(fetch(plan))["model.safetensors"] == _WEIGHTS
    assert hub.ranges == [("model.safetensors", 30_000)]


def test_a_damaged_file_is_fetched_again_and_named_if_that_does_not_help(hub: Server) -> None:
    hub.faults.damaged["model.safetensors"] = 1
    assert _content(_pull())["model.safetensors"] == _WEIGHTS
    assert [name for name, _ in hub.ranges].count("model.safetensors") == 2
    hub.faults.damaged["config.json"] = 2
    with pytest.raises(DownloadError, match=r"config.json arrived damaged twice: its SHA is \w{12}…, expected \w{12}…"):
        _pull(revision="v1")


def test_a_file_that_was_damaged_on_disk_is_replaced(hub: Server) -> None:
    folder = _pull()
    (folder / "model.safetensors").write_bytes(bytes([1]) + _WEIGHTS[1:])
    hub.ranges.clear()
    assert _content(_pull())["model.safetensors"] == _WEIGHTS
    assert hub.ranges == [("model.safetensors", 0)]


def test_a_part_of_something_else_is_thrown_away(hub: Server, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--zai-org--chatglm3-6b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(_WEIGHTS).hexdigest()}.incomplete").write_bytes(b"x" * 50_000)
    assert _content(_pull())["model.safetensors"] == _WEIGHTS
    assert [begin for name, begin in hub.ranges if name == "model.safetensors"] == [50_000, 0]


def test_no_room_is_said_before_anything_is_fetched(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match=r"not enough room in .*: 0.0 GB are to be fetched, 0.0 GB are free"):
        _pull()
    assert hub.ranges == []


def test_a_disk_that_refuses_more_keeps_the_part(hub: Server) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(DownloadError, match=r"cannot write .*: File too large"):
            _pull()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < prepare("zai-org/chatglm3-6b").missing_bytes <= len(_WEIGHTS) - 60_000
    assert _content(_pull())["model.safetensors"] == _WEIGHTS


@pytest.mark.parametrize(
    ("status", "says", "hint"),
    [
        ((404, "RepoNotFound"), "there is no such repository, or it is private", "HF_TOKEN"),
        ((401, "GatedRepo"), "access to it has to be asked for", "accept its licence on http"),
        ((403, "GatedRepo"), "access to it has to be asked for", "hf auth login"),
        ((404, "RevisionNotFound"), "it has no revision main", "/tree/main"),
    ],
)
def test_what_the_hub_refuses(hub: Server, status: tuple[int, str], says: str, hint: str) -> None:
    hub.faults.status[""] = status
    with pytest.raises(DownloadError, match=says) as caught:
        _pull()
    assert hint in str(caught.value.hint)


def test_without_a_way_to_the_hub_the_other_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:9 cannot be reached") as caught:
        _pull()
    assert "--source modelscope" in str(caught.value.hint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids it"):
        _pull()


def test_a_file_that_the_server_does_not_give(hub: Server) -> None:
    hub.faults.status["model.safetensors"] = (403, "Forbidden")
    with pytest.raises(DownloadError, match="answered 403"):
        _pull()
    hub.faults.status["model.safetensors"] = (503, "Busy")
    with pytest.raises(DownloadError, match=r"model.safetensors: .* answered 503 .* 5 times"):
        _pull()


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub: Server) -> None:
    options = {"token": "hf_secret"}
    fetch(prepare("zai-org/chatglm3-6b", options=options), options=options)
    sent = {path.split("/")[1]: token for path, token in hub.tokens if "model.safetensors" in path}
    assert sent == {"zai-org": "Bearer hf_secret", "storage": None}


@pytest.mark.parametrize(
    ("address", "target", "reason"),
    [
        ("https://hub.example/f", "file:///etc/passwd", "only http and https"),
        ("https://hub.example/f", "ftp://hub.example/f", "only http and https"),
        ("https://hub.example/f", "http://hub.example/f", "give up encryption"),
        ("http://127.0.0.1/f", "http://169.254.169.254/latest/meta-data", "link-local"),
        ("http://127.0.0.1/f", "http://[fe80::1]/f", "link-local"),
        ("http://127.0.0.1/f", "http://0.0.0.0/f", "link-local"),
        ("http://8.8.8.8/f", "http://127.0.0.1:8000/f", "this machine or its network"),
        ("http://8.8.8.8/f", "http://192.168.1.1/f", "this machine or its network"),
        ("http://8.8.8.8/f", "http://localhost/f", "this machine or its network"),
        ("http://8.8.8.8/f", "http://[::ffff:127.0.0.1]/f", "this machine or its network"),
        ("http://8.8.8.8/f", "http://[::ffff:169.254.169.254]/f", "link-local"),
        ("http://8.8.8.8/f", "http://2130706433/f", "this machine or its network"),  # 127.0.0.1 as one number
        ("https://8.8.8.8/f", "https://8.8.4.4/f", None),
        ("http://127.0.0.1/f", "http://localhost/f", None),
        ("http://192.168.1.1/f", "http://192.168.1.2/f", None),  # a mirror in the house
    ],
)
def test_where_a_redirect_may_lead(address: str, target: str, reason: str | None) -> None:
    if reason is None:
        check_redirect(address, target)
    else:
        with pytest.raises(DownloadError, match=reason):
            check_redirect(address, target)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://169.254.169.254/latest/meta-data/"])
def test_a_server_cannot_point_a_download_elsewhere(hub: Server, tmp_path: Path, target: str) -> None:
    hub.faults.redirect["model.safetensors"] = target
    with pytest.raises(DownloadError, match="redirects to"):
        _pull()
    assert not any(b"root:" in path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file())


@pytest.mark.parametrize("told", ["../../../main", "a" * 39, ""])
@pytest.mark.parametrize("of", ["commit", "content"])
def test_ids_of_a_listing_that_are_none_never_become_paths(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, of: str
) -> None:
    before = _content(tmp_path / "main")
    if of == "commit":
        monkeypatch.setitem(COMMITS, "main", told)
        monkeypatch.setattr(HubRoute, "revision", lambda self, name: (told, tmp_path / "main"))
    else:
        tree = HubRoute.tree
        monkeypatch.setattr(HubRoute, "tree", lambda *of: [entry | {"oid": told} for entry in tree(*of)])
    with pytest.raises(DownloadError, match="which is no commit and no hash"):
        _pull()
    assert _content(tmp_path / "main") == before
    assert not (tmp_path / "hub").exists()


# --- folders and names ---


def test_a_folder_of_the_users(hub: Server, tmp_path: Path) -> None:
    folder = _pull(to=tmp_path / "mine")
    assert _content(folder) == {name: _FILES[name] for name in _NEEDED}
    assert json.loads((folder / ".glmkit-origin.json").read_text())["revision"] == COMMITS["main"]
    assert not (tmp_path / "hub").exists()
    (folder / "config.json").unlink()
    assert _content(_pull(to=folder)) == {name: _FILES[name] for name in _NEEDED}
    with pytest.raises(
        DownloadError, match="is not empty, and what it holds is not zai-org/chatglm3-6b at bbbbbbbbbbbb"
    ):
        _pull(to=folder, revision="v1")
    other = tmp_path / "other"
    _folder(other, {"config.json": b"somebody's"})
    with pytest.raises(DownloadError, match="is not empty"):
        _pull(to=other)
    assert _content(other) == {"config.json": b"somebody's"}


def test_names_that_could_leave_the_folder_are_not_asked_for() -> None:
    names = ["model.safetensors", "../x.json", "/etc/x.json", "a/x.json", "a\\x.json", ".x.json", "x.json", "~x.json"]
    chosen = choose_needed("o/m", [RemoteFile(name, 1, sha256="0") for name in names])
    assert {file.name for file in chosen} == {"model.safetensors", "x.json"}
    with pytest.raises(DownloadError, match="o/m has no weights"):
        choose_needed("o/m", [RemoteFile("config.json", 1)])


def test_the_source_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert downloads.choose_source() == downloads.choose_source("auto") == "hub"
    monkeypatch.setenv("GLMKIT_SOURCE", "modelscope")
    assert downloads.choose_source() == "modelscope"
    assert downloads.choose_source("hub") == "hub"
    monkeypatch.setenv("GLMKIT_SOURCE", "baidu")
    with pytest.raises(UsageError, match="GLMKIT_SOURCE baidu"):
        downloads.choose_source()


def test_two_at_once_fetch_it_once(hub: Server) -> None:
    plan = prepare("zai-org/chatglm3-6b")
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: fetch(plan, tell=lambda _: None), range(3)))
    assert _content(folders[0]) == {name: _FILES[name] for name in _NEEDED}
    assert sorted(name for name, _ in hub.ranges) == sorted(_NEEDED)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    now = [100.0]
    monkeypatch.setattr("glmkit.downloads.progress.time.monotonic", lambda: now[0])
    for stream, lines in ((_Terminal(), 60), (io.StringIO(), 6)):
        progress = Progress("o/m", 6 * 10**9, stream)
        progress.tell(3 * 10**9)  # was there before
        for _ in range(60):
            now[0] += 1
            progress.tell(10**7)
        assert stream.getvalue().count("o/m: ") == lines
        assert stream.getvalue().endswith(
            "o/m: 3.60 of 6.00 GB (60%), 10.0 MB/s, 4 min left" + ("\n" if lines == 6 else "")
        )
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    silent = _Terminal()
    progress = Progress("o/m", 10, silent)
    now[0] += 60
    progress.tell(10)
    progress.finish()
    assert silent.getvalue() == ""


# --- ModelScope ---


def test_modelscope(modelscope: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = prepare("zai-org/chatglm3-6b", source="modelscope")
    assert (plan.repository, plan.size_bytes, plan.missing_bytes) == ("ZhipuAI/chatglm3-6b", _BYTES, _BYTES)
    told: list[int] = []
    folder = fetch(plan, tell=told.append)
    assert folder == tmp_path / "modelscope" / "models" / "ZhipuAI--chatglm3-6b" / "snapshots" / "master"
    assert _content(folder) == {name: _FILES[name] for name in _NEEDED}
    assert sum(told) == _BYTES
    assert locate("chatglm3-6b") == folder
    assert prepare("zai-org/chatglm3-6b", source="modelscope").missing_bytes == 0
    monkeypatch.setenv("GLMKIT_SOURCE", "modelscope")
    (folder / "model.safetensors").unlink()
    assert locate("chatglm3-6b", download=True) == folder  # --yes of the other verbs


def test_modelscope_resumes_and_checks(modelscope: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    modelscope.faults.cut_at["model.safetensors"] = [40_000]
    modelscope.faults.damaged["tokenizer.model"] = 1
    folder = _pull(source="modelscope")
    assert _content(folder) == {name: _FILES[name] for name in _NEEDED}
    assert ("model.safetensors", 40_000) in modelscope.ranges
    (folder / "model.safetensors").write_bytes(bytes([1]) + _WEIGHTS[1:])
    assert _content(_pull(source="modelscope"))["model.safetensors"] == _WEIGHTS
    assert capfd.readouterr() == ("", "")  # no bars of the library
    mine = _pull(source="modelscope", to=tmp_path / "mine")
    assert _content(mine) == {name: _FILES[name] for name in _NEEDED}


def test_what_modelscope_refuses(modelscope: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="cannot fetch ZhipuAI/no-such-model from ModelScope"):
        fetch(prepare("zai-org/no-such-model", source="modelscope"))
    modelscope.faults.damaged["config.json"] = 99
    with pytest.raises(DownloadError, match=r"config.json arrived damaged"):
        _pull(source="modelscope")
    modelscope.faults.status[""] = (403, "")
    with pytest.raises(DownloadError) as caught:
        _pull(source="modelscope")
    assert "MODELSCOPE_API_TOKEN" in str(caught.value.hint)


def test_without_modelscopes_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ImportError, match="modelscope-hub") as caught:
        prepare("zai-org/chatglm3-6b", source="modelscope")
    assert caught.value.hint == 'pip install "glmkit[modelscope]"'  # type: ignore[attr-defined]


def test_the_old_layout_of_modelscopes_cache_is_found(tmp_path: Path) -> None:
    old = tmp_path / "modelscope" / "hub" / "models" / "ZhipuAI" / "chatglm3-6b"
    old.parent.mkdir(parents=True)
    _folder(old, {"config.json": b"{}", "model.safetensors": b""})
    assert locate("chatglm3-6b") == old
