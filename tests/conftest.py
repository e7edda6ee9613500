"""Fixtures for the whole suite."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmkit.fresh import in_new_process


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """Token ids that tests make are kept in a folder of their own; native code, which takes long, from run to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cache = getattr(pytestconfig, "cache", None)  # the same for all workers; missing with -p no:cacheprovider
        patch.setenv("GLMKIT_CACHE", str(cache.mkdir("glmkit") if cache else tmp_path_factory.mktemp("kernels")))
        patch.setenv("GLMKIT_LANG", "en")  # whatever the machine speaks
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference results, official tokenizers and data, which lies beside a checkout if at all."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared/")
    return folder


@pytest.fixture(autouse=True)
def _results_are_not_opened_again(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process for each tiny run would cost seconds; the tests marked `new_process` have one."""
    if request.node.get_closest_marker("new_process") is None:
        monkeypatch.setattr("glmkit.train.reopened.compare_result", lambda *_: "not compared in this test")
    else:
        monkeypatch.setattr("glmkit.export.proof.in_new_process", in_new_process)


@pytest.fixture(scope="session", autouse=True)
def _results_are_compared_here() -> Iterator[None]:
    """The same for conversions, also those of fixtures that many tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmkit.export.proof.in_new_process", _in_this_process)
        yield


def _in_this_process(function: str, arguments: dict[str, Any], **_: Any) -> Any:
    """What a written checkpoint is compared by, without the seconds that a new process takes."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**json.loads(json.dumps(arguments)))
