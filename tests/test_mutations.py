"""Small valid folders, damaged ten thousand times in CI and two million times in the full run: no crash, no hang.

What is done is in `mutations.py`; a number in a failure is done again, alone, by `python tests/mutations.py --only N`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutations
from mutations import Case, Target


def _check(result: dict[str, object], count: int) -> None:
    assert result["findings"] == []
    figures = result["figures"]
    assert isinstance(figures, dict)
    assert figures["loaded"] + figures["refused"] == count
    # Damage that never shows, or that never leaves anything whole, would test nothing.
    assert count // 10 < figures["loaded"] < count // 2
    for mutator in ("flip", "cut", "splice", "edit_json", "edit_header", "edit_protobuf", "edit_zip", "edit_record"):
        assert figures[f"refused by {mutator}"] > count // 300, mutator


def test_ten_thousand() -> None:
    _check(mutations.run_cases(0, 10_000), 10_000)


@pytest.mark.slow
def test_two_million(request: pytest.FixtureRequest) -> None:
    """Prints its figures while it runs; GLMKIT_MUTATIONS is another number than two million."""
    count = int(os.environ.get("GLMKIT_MUTATIONS", "2000000"))

    def show(result: dict[str, object]) -> None:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(result.get("next"), {name: one for name, one in result["figures"].items() if " " not in name})  # type: ignore[attr-defined]

    result = mutations.run_cases(10_000, count, show)
    print(json.dumps(result, indent=1))
    _check(result, count)


def test_a_crash_and_a_hang_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise silence would prove nothing: a child dies at 3, stands still at 5, and the others are done."""
    program = tmp_path / "mutations.py"
    source = Path(mutations.__file__).read_text(encoding="utf-8")
    source = re.sub(r"    targets = make_targets\(.*\n", "    targets = []\n", source, count=1)
    attack = "        if number == 3: os.kill(os.getpid(), 11)\n        if number == 5: time.sleep(1000)\n"
    begin = source.index("        case = Case.choose(number, targets, originals)\n        try:")
    end = source.index("        except BaseException as error:  # whatever")
    source = (
        source[:begin] + attack + '        case = None\n        try:\n            result = "refused"\n' + source[end:]
    )
    source = re.sub(r'        figures\[f"\{result\} (by|in) .*\n', "", source)
    program.write_text(source, encoding="utf-8")
    monkeypatch.setattr(mutations, "__file__", str(program))
    monkeypatch.setattr(mutations, "HANG_SECONDS", 2.0)
    result = mutations.run_cases(0, 8)
    crash, hang = result["findings"]
    assert crash.startswith("3: crashed with SIGSEGV")
    assert hang.startswith("5: hung")
    assert result["figures"]["crashed"] == result["figures"]["hung"] == 1


def test_a_number_is_always_the_same_case(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, 2.5, "x"], "b": {"c": null}}')
    target = Target("one", tmp_path, ("config.json",), str)
    originals = {tmp_path / "config.json": (tmp_path / "config.json").read_bytes()}
    first = [Case.choose(number, [target], originals) for number in range(200)]
    assert first == [Case.choose(number, [target], originals) for number in range(200)]
    assert len({case.content for case in first}) > 100


def test_one_case_by_its_number() -> None:
    command = [sys.executable, mutations.__file__, "--only", "17"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] in ("loaded", "refused")
