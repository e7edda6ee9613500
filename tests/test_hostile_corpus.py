"""Every hostile folder of `hostile_cases.py` through every door: refused by name or loaded, quickly, and nothing else.

In CI each folder goes through one door, and each number of the list through all of its doors, under `python -O`.
`-m slow` takes every folder through every door, with and without assertions.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import hostile_cases
from hostile_cases import Case

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "src" / "glmkit"
SECONDS = 1.0  # of the process itself
BYTES = 64 << 20
# Numbers of the list that no folder can have: what they are tested by instead stands in docs/reliability.md.
ELSEWHERE = {"W-39", "W-75", "W-76"}


def _order(cases: Iterable[Case], *, every: bool) -> list[tuple[str, str]]:
    """Which case goes through which door: all of them, or each through one and each number through all."""
    seen: set[tuple[str, str]] = set()
    orders = []
    for case in cases:
        for place, door in enumerate(case.doors):
            first = (case.number, door) not in seen
            if door in ("inspect", "chat"):  # a command takes a tenth of a second to read its own flags
                first = first and case.number in _BY_COMMAND
            # The same pickles in an adapter's folder meet the same gate: one of each number is enough.
            again = place > 0 or (door == "adapter" and case.number in _PICKLES)
            if every or first or not again:
                orders.append((case.name, door))
            seen.add((case.number, door))
    return orders


_PICKLES = {f"W-{number}" for number in range(41, 53)}
_BY_COMMAND = {
    f"W-{number:02d}" for number in (1, 8, 11, 22, 23, 27, 30, 41, 49, 53, 55, 60, 61, 64, 67, 68, 69, 70, 73)
}


def _run(orders: list[tuple[str, str]], *flags: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *flags, str(TESTS / "hostile_run.py")],
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
        cwd=TESTS,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} after {results[-1:]}: {done.stderr[-2000:]}"
    assert len(results) == len(orders)
    return results


def _wrong(case: Case, result: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words."""
    found = []
    expected = "loaded" if case.says is None else "refused"
    message = result["message"]
    if result["result"] != expected:
        found.append(f"{result['result']}, expected {expected}")
    elif case.says and case.says not in message:
        found.append(f"does not say {case.says!r}")
    if len(message) > 12_000 or any(not (letter.isprintable() or letter == "\n") for letter in message):
        found.append(f"a message of {len(message)} characters, or with control characters")
    if result["events"]:
        found.append(f"did {result['events'][:5]}")
    if result["canary"]:
        found.append("ran code of the folder")
    if touched := sorted(set(case.untouched) & set(result["opened"])):
        found.append(f"opened {touched}")
    if result["bytes"] is not None and result["bytes"] > BYTES:
        found.append(f"took {result['bytes'] >> 20} MB")
    return [f"{case.name} by {result['door']}: {what} ({message[:200]!r})" for what in found]


def _judge(orders: list[tuple[str, str]], *flags: str) -> None:
    cases = {case.name: case for case in hostile_cases.all_cases()}
    results = _run(orders, *flags)
    # A machine that does other things makes anything slow once, nothing twice.
    slow = [(one["case"], one["door"]) for one in results if one["seconds"] > SECONDS]
    again = _run(slow, *flags) if slow else []
    problems = [problem for one in results for problem in _wrong(cases[one["case"]], one)]
    problems += [f"{one['case']} by {one['door']}: {one['seconds']:.1f} s" for one in again if one["seconds"] > SECONDS]
    assert not problems, "\n".join(problems)


def test_the_corpus() -> None:
    """Under `python -O`, so that nothing that keeps a folder out is an assertion."""
    _judge(_order(hostile_cases.all_cases(), every=False), "-O")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-O",)])
def test_the_whole_corpus(flags: tuple[str, ...]) -> None:
    _judge(_order(hostile_cases.all_cases(), every=True), *flags)


def test_every_number_has_a_folder() -> None:
    numbers = {case.number for case in hostile_cases.all_cases()} | ELSEWHERE
    assert numbers == {f"W-{number:02d}" for number in range(1, 77)}


def test_the_watch_sees_an_attack(tmp_path: Path) -> None:
    """Otherwise the silence above would prove nothing: each of these must be told."""
    program = f"""
import os, pathlib, sys
sys.path.insert(0, {str(TESTS)!r})
from hostile_run import Watch, own_places
folder = pathlib.Path({str(tmp_path)!r}) / "folder"
folder.mkdir()
(folder / "evil.py").write_text("x = 1")
(folder.parent / "secret").write_text("")
watch = Watch(own_places())
with watch.watching(folder, ()):
    open(folder.parent / "secret").close()
    os.system("true")
    import socket; socket.socket().close()
    exec(compile("y = 'CANARY'", str(folder / "evil.py"), "exec"))
    open(folder / "evil.py").close()
print(*watch.events, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    for sign in ("open ", "secret", "os.system", "socket.", "exec ", "open evil.py", "compile of the checkpoint"):
        assert sign in done.stdout, f"{sign} is missing in {done.stdout} {done.stderr}"


def test_a_hostile_folder_by_the_command_itself(tmp_path: Path) -> None:
    """In a process of its own: exit code 1, an error and a hint, no traceback, no canary."""
    folder, canary = tmp_path / "folder", tmp_path / "canary"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    (folder / "pytorch_model.bin").write_bytes(hostile_cases.trap(canary))
    code = "import glmkit_command; glmkit_command.main()"
    environment = {**os.environ, "GLMKIT_LANG": "en", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, "inspect", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert "asks to run posix.mkdir" in done.stderr
    assert "error:" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not canary.exists()


# What is nowhere in the sources ---------------------------------------------------------------------------------------


def _calls() -> Iterable[tuple[Path, str]]:
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func)


def test_no_archive_is_unpacked_and_no_pickle_loaded() -> None:
    """W-73 and W-74; and the loaders that run what they read."""
    never = re.compile(
        r"extractall|unpack_archive|tarfile\.|pickle\.loads?$|torch\.load$|joblib|yaml\.(unsafe|full)_load$"
    )
    assert [f"{path.relative_to(SOURCES)}: {call}" for path, call in _calls() if never.search(call)] == []


def test_no_template_of_a_checkpoint_is_rendered() -> None:
    """W-69 to W-71: the package has no template engine."""
    engine = re.compile(r"^\s*(?:import|from) jinja2|render_jinja_template|compile_jinja_template", re.MULTILINE)
    found = [path for path in SOURCES.rglob("*.py") if engine.search(path.read_text(encoding="utf-8"))]
    assert found == []
