"""Runs that are killed, at every call of a save and at any moment: resumed, they end with the same bytes.

The cases have the numbers of docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kills import KILLED, Runs

if not hasattr(os, "fork"):
    pytest.skip("no fork on this system", allow_module_level=True)

LORA = {"name": "lora", "lora_dropout": 0.3}
SHORT = {"max_steps": 6}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with Runs() as started:
        yield started


def result(folder: Path) -> bytes:
    """The bytes of what was learnt."""
    (file,) = [*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return file.read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def begun(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died behind its first checkpoint, of step 2."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert runs(folder, settings=SHORT, inside={"call": "loss", "number": 3})["status"] == KILLED
    assert (folder / "latest").read_text() == "step-2\n"
    return folder


@pytest.fixture(scope="module")
def uncut(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nobody disturbs, and the calls of its saves."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    told = runs(folder, settings=SHORT, at_save={"4": {}}, at_publication={})
    assert told["status"] == 0
    return {"folder": folder, "result": result(folder), "losses": losses(folder), **told["calls"]}


def copied(begun: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(begun, folder)
    return folder


def points(calls: list[str], all_of_them: bool) -> list[int]:
    """Numbers of calls: all, or every fourth of those that are not amid a row of equal ones or pairs."""
    padded = ["", "", *calls, "", ""]

    def amid(place: int) -> bool:
        return any(padded[place - gap] == padded[place] == padded[place + gap] for gap in (1, 2))

    if all_of_them:
        return list(range(1, len(calls) + 1))
    return [number for number in range(1, len(calls) + 1) if not amid(number + 1)][::4]


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["save", "publication"])
def test_t04_t05_t06_t07_t43_a_kill_at_any_call(
    tmp_path: Path, runs: Runs, begun: Path, uncut: dict[str, Any], where: str, which: str
) -> None:
    calls = uncut["4" if where == "save" else "publication"]
    # Without these the places that matter are not among them: writing, publishing, the pointer, the rotation.
    assert {"open", "write", "fsync", "rename", "mkdir"} <= set(calls)
    if where == "save":
        assert calls[calls.index("rename") :].count("rename") == 2
        assert {"replace", "unlink", "rmdir"} <= set(calls[calls.index("rename") :])
    for number in points(calls, which == "all"):
        folder = copied(begun, tmp_path / "run")
        order: dict[str, Any] = {"at_publication": {"kill_at": number}}
        if where == "save":
            order = {"at_save": {"4": {"kill_at": number}}}
        assert runs(folder, settings=SHORT, resume=True, **order)["status"] == KILLED, number
        if number % 3 == 0 and not (folder / "step-4").exists():  # T-07: the save that makes up for it is killed too
            assert runs(folder, settings=SHORT, resume=True, **order)["status"] == KILLED, number
        # What the kill left: a good checkpoint, and no half result.
        assert (folder / "latest").read_text() in ("step-2\n", "step-4\n")
        assert not (folder / "model").exists() or result(folder) == uncut["result"]
        told = runs(folder, settings=SHORT, resume=True)
        assert told["status"] == 0, (number, told)
        assert result(folder) == uncut["result"], number
        assert losses(folder) == uncut["losses"], number
        left = {path.name for path in folder.iterdir()}
        assert not [name for name in left if ".tmp-" in name or name.startswith((".trash", ".old"))], number


@pytest.mark.parametrize("call", ["loss", "backward", "step"])
def test_t01_t02_t03_t31_t32_a_kill_inside_a_step(tmp_path: Path, runs: Runs, call: str) -> None:
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 8}
    assert runs(tmp_path / "uncut", settings=settings, method=LORA)["status"] == 0
    # The 19th batch is the third of step 5, step 6 is the short one at the end of a pass (21 records), and the
    # optimizer step is killed when half of the weights have moved.
    died = runs(
        tmp_path / "cut", settings=settings, method=LORA, inside={"call": call, "number": 6 if call == "step" else 19}
    )
    assert died["status"] == KILLED
    assert (tmp_path / "cut" / "latest").read_text() == "step-4\n"
    assert runs(tmp_path / "cut", settings=settings, method=LORA, resume=True, generator=99)["status"] == 0
    assert result(tmp_path / "cut") == result(tmp_path / "uncut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "uncut")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(tmp_path: Path, runs: Runs, kills: int) -> None:
    """Runs with dropout and accumulation, over borders of passes, killed from outside wherever they are."""
    settings = {"max_steps": 16, "gradient_accumulation_steps": 2, "logging_steps": 4, "save_total_limit": 2}
    generator = random.Random(kills)
    expected, seconds = {}, {}
    methods = {"full": {"name": "full"}, "lora": LORA}
    for name, method in methods.items():
        took = []
        for folder in (tmp_path / f"{name}-warm", tmp_path / name):
            started = time.monotonic()
            assert runs(folder, settings=settings, method=method)["status"] == 0
            took.append(time.monotonic() - started)
        seconds[name] = min(took)
        expected[name] = (result(tmp_path / name), losses(tmp_path / name))
    done, number, found_at = 0, 0, []
    while done < kills:
        name = list(methods)[number % 2]
        folder = tmp_path / f"run-{number}"
        number += 1
        ended, attempts = False, 0
        while not ended:
            order: dict[str, Any] = {"settings": settings, "method": methods[name], "generator": done}
            if attempts < 6 and done < kills:
                order["kill_after_seconds"] = generator.uniform(0.02, 1.3 * seconds[name])
            told = runs(folder, resume=(folder / "run.json").exists(), **order)
            assert told["status"] in (0, -9), told
            ended = told["status"] == 0
            attempts += 1
            if not ended:
                done += 1
                latest = folder / "latest"
                found_at.append(latest.read_text().strip() if latest.exists() else "nothing")
        assert (result(folder), losses(folder)) == expected[name], folder
        shutil.rmtree(folder)
    print(f"\n{done} kills in {number} runs, all of which ended with the bytes of the uncut ones")
    for place in sorted(set(found_at), key=lambda text: int(text.partition("-")[2] or 0)):
        print(f"  {found_at.count(place):4d} found {place}")


def test_t08_t10_a_signal_saves_and_leaves_within_one_step(tmp_path: Path, runs: Runs) -> None:
    assert runs(tmp_path / "uncut")["status"] == 0
    for name, step in (("SIGTERM", 5), ("SIGINT", 1)):
        folder = tmp_path / name
        told = runs(folder, signals={str(step): [name]})
        assert told == {"status": 0, "calls": {}, "steps": step, "interrupted": True}
        assert (folder / "latest").read_text() == f"step-{step}\n"
        ended = json.loads((folder / "exit.json").read_text())
        assert (ended["ended"], ended["checkpoint"]) == ("interrupted", f"step-{step}")
        assert runs(folder, resume=True)["status"] == 0
        assert result(folder) == result(tmp_path / "uncut")
        assert json.loads((folder / "exit.json").read_text())["ended"] == "finished"


def test_t09_a_second_signal_leaves_at_once(tmp_path: Path, runs: Runs) -> None:
    assert runs(tmp_path / "uncut")["status"] == 0
    for names, status in ((["SIGTERM", "SIGTERM"], -15), (["SIGINT", "SIGINT"], 130)):
        folder = tmp_path / names[0]
        assert runs(folder, signals={"5": names})["status"] == status
        assert (folder / "latest").read_text() == "step-4\n"
        assert runs(folder, resume=True)["status"] == 0
        assert result(folder) == result(tmp_path / "uncut")


def test_t44_resuming_ten_times_is_running_through(tmp_path: Path, runs: Runs) -> None:
    settings = {"max_steps": 22, "gradient_accumulation_steps": 2}
    assert runs(tmp_path / "uncut", settings=settings, method=LORA)["status"] == 0
    for step in range(2, 22, 2):
        order = {"signals": {str(step): ["SIGTERM"]}, "generator": step, "resume": step > 2}
        assert runs(tmp_path / "cut", settings=settings, method=LORA, **order)["interrupted"]
    assert runs(tmp_path / "cut", settings=settings, method=LORA, resume=True)["status"] == 0
    assert result(tmp_path / "cut") == result(tmp_path / "uncut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "uncut")


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_t15_a_full_disk_at_any_call_of_a_save(
    tmp_path: Path, runs: Runs, begun: Path, uncut: dict[str, Any], which: str
) -> None:
    failed = 0
    numbers = points(uncut["4"], which == "all")
    for number in numbers if which == "all" else numbers[::2]:
        folder = copied(begun, tmp_path / "run")
        told = runs(folder, settings=SHORT, resume=True, at_save={"4": {"fail_at": number, "errno": 28}})
        assert told["status"] in (0, 1), (number, told)  # 0: deleting the old one failed, which is no reason to stop
        ended = json.loads((folder / "exit.json").read_text())
        if told["status"] == 1:
            failed += 1
            assert told["error"] == "TrainingError"
            assert "No space left on device" in told["message"], (number, told)
            left = (folder / "latest").read_text().strip()
            assert f"{left} is left, and whole" in told["message"] or "step-4 is left, and whole" in told["message"]
            assert (ended["ended"], ended["step"]) == ("failed", 4)
            assert "--resume" in ended["cure"]
            told = runs(folder, settings=SHORT, resume=True)
        assert told["status"] == 0, (number, told)
        assert result(folder) == uncut["result"], number
    assert failed > len(numbers) / 6


def test_t15_files_that_may_not_grow(tmp_path: Path, runs: Runs) -> None:
    """A real limit of the system, which also writers that are not Python meet."""
    told = runs(tmp_path / "run", file_bytes=6_000)
    assert (told["status"], told["error"]) == (1, "TrainingError")
    assert "File too large" in told["message"]
    assert "no earlier checkpoint is left" in told["message"]
    assert runs(tmp_path / "run", resume=True)["status"] == 0
    assert runs(tmp_path / "uncut")["status"] == 0
    assert result(tmp_path / "run") == result(tmp_path / "uncut")
