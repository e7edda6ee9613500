"""Building the native code: what is kept, what is trusted, and that every failure leaves the work to torch."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glmkit.errors import KernelsError, UsageError
from glmkit.kernels import build, levels
from glmkit.kernels.build import find_compiler
from glmkit.kernels.cache import read_record

AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
AMX = AVX512 | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
TRY_LIBRARY = build.try_library
ANSWERS = f'extern "C" int glm_abi() {{ return {build.ABI}; }}\n'
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that has not decided yet, with an empty cache, a CPU without extras, and a library that is quick."""
    monkeypatch.setenv("GLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GLMKIT_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    write_source(monkeypatch, tmp_path, ANSWERS)
    have_features(monkeypatch, frozenset())
    monkeypatch.setattr(build, "try_library", lambda path: None)
    build._choose.cache_clear()
    yield
    build._choose.cache_clear()


def write_source(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    source = folder / "source" / "glmkit.cpp"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", source)


def have_features(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    for module in (build, levels):
        monkeypatch.setattr(module, "cpu_features", lambda: features)
    build._machine.cache_clear()


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def counted_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, before: str = "") -> Callable[[], int]:
    """Puts a compiler in front of the real one that counts what it compiles."""
    real, log = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"), folder / "compiled"
    script = program(
        folder / "counted", f'case "$1" in --version) ;; *) echo x >> {log}; {before} ;; esac; exec {real} "$@"'
    )
    monkeypatch.setenv("CXX", str(script))
    return lambda: len(log.read_text().split()) if log.exists() else 0


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.delenv("CXX", raising=False)


def again() -> build.Status:
    build._choose.cache_clear()
    return build.status()


def libraries(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "kernels").glob("*.so"))


# --- levels ---


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (AMX, ("amx", "avx512", "avx2", "portable")),
        (AMX - {"amx_int8"}, ("avx512", "avx2", "portable")),
        (AMX - {"avx512_bf16"}, ("avx512", "avx2", "portable")),
        (AVX512, ("avx512", "avx2", "portable")),
        (AVX512 - {"avx512_vnni"}, ("avx2", "portable")),
        (AVX2 - {"fma"}, ("portable",)),
        (frozenset(), ("portable",)),
    ],
)
def test_levels_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: frozenset[str], expected: tuple[str, ...]
) -> None:
    monkeypatch.undo()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor : 0\nmodel name\t: X\nflags\t\t: fpu sse2 {' '.join(sorted(features))} xsave\n\n" * 2
    )
    monkeypatch.setattr(levels, "_CPUINFO", cpuinfo)
    for machine, found in (("x86_64", expected), ("AMD64", expected), ("aarch64", ("portable",))):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        levels.cpu_features.cache_clear()
        assert levels.possible_levels() == found
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(levels, "_CPUINFO", tmp_path / "none")
    levels.cpu_features.cache_clear()
    assert levels.possible_levels() == ("portable",)
    monkeypatch.undo()
    levels.cpu_features.cache_clear()


def test_flags_ask_for_what_the_level_has_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    have_features(monkeypatch, AMX)
    assert levels.compiler_flags("portable") == []
    assert levels.compiler_flags("avx2") == ["-mavx2", "-mfma", "-mf16c"]
    assert "-mavx512bf16" in levels.compiler_flags("avx512")
    assert levels.compiler_flags("amx")[-3:] == ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
    have_features(monkeypatch, AVX512)
    assert "-mavx512bf16" not in levels.compiler_flags("avx512")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("avx3", "expected one of amx, avx512, avx2, portable, torch"),
        ("auto", "expected one of"),
        ("avx512", "this CPU has no avx512_vnni, avx512bw, avx512dq, avx512f, avx512vl"),
    ],
)
def test_a_wrong_level_says_what_is_possible(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    have_features(monkeypatch, AVX2)
    monkeypatch.setenv("GLMKIT_KERNELS", value)
    for call in (build.level, build.library, build.status):
        with pytest.raises(UsageError, match=message) as raised:
            call()
        assert "this CPU can run avx2, portable, torch" in str(raised.value)


def test_torch_means_no_native_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLMKIT_KERNELS", "torch")
    status = build.status()
    assert (status.level, status.path, status.why) == ("torch", None, "GLMKIT_KERNELS=torch")
    assert build.library() is None
    assert not (tmp_path / "cache").exists()


# --- a library that is built once ---


@needs_compiler
def test_a_library_is_built_tried_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled, tried = counted_compiler(monkeypatch, tmp_path), []
    monkeypatch.setattr(build, "try_library", lambda path: tried.append(path))
    status = build.status()
    assert (status.level, status.why, status.hint) == ("portable", "the best this CPU can run", None)
    assert status.path is not None
    assert status.path.parent == tmp_path / "cache" / "kernels"
    assert (compiled(), tried) == (1, [status.path])
    library = build.library()
    assert library is not None
    assert library.glm_abi() == build.ABI
    assert again().path == status.path
    assert build.build("portable") == status.path
    assert (compiled(), len(tried)) == (1, 1)
    assert {path.suffix for path in status.path.parent.iterdir()} == {".so", ".json", ".lock"}
    assert status.path.stat().st_mode & 0o022 == 0


@needs_compiler
def test_other_sources_flags_or_compilers_are_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {build.build("portable").name}
    (tmp_path / "source" / "linear.h").write_text("// more")
    names.add(build.build("portable").name)
    have_features(monkeypatch, AVX2)
    names.add(build.build("avx2").name)
    real = find_compiler()
    assert real is not None
    monkeypatch.setattr(build, "find_compiler", lambda: (real[0], "c++ 99"))
    names.add(build.build("portable").name)
    assert len(names) == len(libraries(tmp_path)) == 4


@needs_compiler
@pytest.mark.parametrize("spoil", ["library", "record", "no record", "other library"])
def test_a_file_that_is_not_as_it_was_written_is_built_again_and_never_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: str
) -> None:
    compiled = counted_compiler(monkeypatch, tmp_path)
    path = build.build("portable")
    whole = path.read_bytes()
    if spoil == "library":
        path.write_bytes(whole[: len(whole) // 2])  # loading it would end the process with SIGBUS
    elif spoil == "other library":
        path.write_bytes(whole + b"x")
    elif spoil == "record":
        path.with_suffix(".json").write_text('{"sha256": ')
    else:
        path.with_suffix(".json").unlink()
    assert read_record(path) is None
    assert again().path == path
    assert compiled() == 2
    assert read_record(path) is not None


@needs_compiler
def test_another_machine_tries_the_library_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, tried = build.build("portable"), []
    record = json.loads(path.with_suffix(".json").read_text())
    record["machine"] = "another"
    path.with_suffix(".json").write_text(json.dumps(record))
    monkeypatch.setattr(build, "try_library", lambda path: tried.append(path))
    assert again().level == "portable"
    assert tried == [path]


@needs_compiler
def test_a_kept_library_needs_no_compiler_and_no_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build.build("portable")
    no_compiler(monkeypatch, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").mkdir()  # cannot be opened, whoever runs this
    status = again()
    assert (status.level, status.path) == ("portable", path)
    assert status.compiler is not None
    have_features(monkeypatch, AVX2)  # another machine: it is tried again, and that cannot be remembered
    monkeypatch.setenv("GLMKIT_KERNELS", "portable")
    assert again().path == path


@needs_compiler
def test_two_processes_build_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = counted_compiler(monkeypatch, tmp_path, before="sleep 1")
    code = (
        "import sys, pathlib\nsys.modules['glmkit_command'] = sys\n"  # without registration, which takes seconds
        "from glmkit.kernels import build\n"
        f"build.SOURCE = pathlib.Path({str(build.SOURCE)!r})\n"
        "build.try_library = lambda path: None\n"
        "print(build.level(), build.status().path)\n"
    )
    environment = {**os.environ, "GLMKIT_KERNELS": "portable"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    (name,) = libraries(tmp_path)
    assert answers == {f"portable {tmp_path / 'cache' / 'kernels' / name}\n"}
    assert compiled() == 1


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['glmkit_command'] = sys\n"  # without registration, which takes seconds
        "import glmkit.kernels.linear, glmkit.kernels.build\n"
        "assert glmkit.kernels.build._choose.cache_info().currsize == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not (tmp_path / "cache").exists()


# --- what goes wrong ---


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    have_features(monkeypatch, AVX2)
    no_compiler(monkeypatch, tmp_path)
    with caplog.at_level(logging.INFO, "glmkit"):
        assert [build.level() for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == [
        "no native kernels, torch computes: avx2, portable: there is no C++ compiler"
    ]
    status = build.status()
    assert (status.why, status.compiler) == ("avx2, portable: there is no C++ compiler", None)
    assert status.hint is not None
    assert "apt install g++" in status.hint
    monkeypatch.setenv("GLMKIT_KERNELS", "avx2")
    with pytest.raises(KernelsError, match=r"GLMKIT_KERNELS=avx2: there is no C\+\+ compiler"):
        again()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "if [ \"$1\" = --version ]; then echo broken 1.0; exit 0; fi; echo 'a.cpp:3: error: odd' >&2; exit 1"
    monkeypatch.setenv("CXX", str(program(tmp_path / "broken", script)))
    status = build.status()
    assert status.level == "torch"
    assert status.why.endswith("broken cannot compile it: a.cpp:3: error: odd")
    assert status.compiler == "broken 1.0"
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".lock"]


@needs_compiler
def test_a_compiler_that_says_no_version_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for command in (str(program(tmp_path / "silent", "exit 1")), str(tmp_path / "missing"), ""):
        monkeypatch.setenv("CXX", command)
        found = find_compiler()
        assert found is not None
        assert found[0][0] in ("c++", "g++", "clang++")


@needs_compiler
def test_flags_in_cxx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_source(monkeypatch, tmp_path, 'extern "C" int glm_abi() { return GIVEN; }\n')
    real = find_compiler()
    assert real is not None
    monkeypatch.setenv("CXX", f"{real[0][0]} -DGIVEN={build.ABI}")
    assert build.level() == "portable"


@needs_compiler
def test_a_compiler_without_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = 'for a in "$@"; do if [ "$a" = -fopenmp ]; then echo "error: unsupported option" >&2; exit 1; fi; done'
    compiled = counted_compiler(monkeypatch, tmp_path, before=before)
    status = build.status()
    assert (status.level, status.openmp, compiled()) == ("portable", False, 2)
    assert again().openmp is False


def test_a_compiler_that_hangs_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have_features(monkeypatch, AVX512)
    pid = tmp_path / "pid"
    script = f'if [ "$1" = --version ]; then echo slow; exit 0; fi; sleep 100 & echo $! > {pid}; wait'
    monkeypatch.setenv("CXX", str(program(tmp_path / "slow", script)))
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 0.5)
    start = time.monotonic()
    status = build.status()
    assert time.monotonic() - start < 5  # one level is enough: the others would take as long
    assert (status.level, status.why) == ("torch", f"avx512: {tmp_path}/slow took more than 0 s")
    child = Path(f"/proc/{pid.read_text().strip()}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the compiler's child is still there")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLMKIT_CACHE", str(tmp_path / "file" / "cache"))
    status = build.status()
    assert (status.level, status.why) == (
        "torch", f"portable: cannot write in {tmp_path}/file/cache: Not a directory"
    )  # fmt: skip
    assert status.hint == "GLMKIT_CACHE=FOLDER names another"


@needs_compiler
def test_a_folder_that_takes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert "No space left on device" in build.status().why


def test_a_folder_in_which_others_may_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert build.status().why == f"portable: {folder} may be written by others (mode 777)"
    folder.chmod(0o775)
    assert "mode 775" in again().why
    folder.chmod(0o755)
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        assert "belongs to user 12345" in again().why
        os.chown(folder, 0, 0)
    if find_compiler() is not None:
        assert again().level == "portable"


@needs_compiler
def test_a_library_that_others_may_write_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = counted_compiler(monkeypatch, tmp_path)
    path = build.build("portable")
    path.chmod(0o777)
    assert read_record(path) is None
    build.build("portable")
    assert compiled() == 2
    assert path.stat().st_mode & 0o777 == 0o755


@needs_compiler
def test_a_umask_that_lets_the_group_write(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        assert build.level() == "portable"
    finally:
        os.umask(before)


def test_windows_has_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert build.status().why == "portable: there is no native code for Windows"


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [
        ("cache/own", "/base", "WORK/cache/own/kernels"),
        (None, "WORK/base", "WORK/base/glmkit/kernels"),
        (None, "relative", "WORK/home/.cache/glmkit/kernels"),
        ("", None, "WORK/home/.cache/glmkit/kernels"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str | None, base: str | None, expected: str
) -> None:
    from glmkit.kernels.cache import cache_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in (("GLMKIT_CACHE", own), ("XDG_CACHE_HOME", base)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value.replace("WORK", str(tmp_path)))
    assert str(cache_folder()) == expected.replace("WORK", str(tmp_path))


# --- the trial ---


TRIAL = """
#include <cstring>
extern "C" int glm_abi() { ABI }
extern "C" int glm_tiles() { return 0; }
extern "C" void glm_pack(int kind, int n, int k, const void* a, void* b, int) { std::memcpy(b, a, n * k / 2); }
extern "C" void glm_unpack(int kind, int n, int k, const void* a, void* b, int) { std::memcpy(b, a, n * k / 2); }
extern "C" int glm_linear(const void*, const void*, void*, int, int, int) { return FAILED; }
"""


@needs_compiler
@pytest.mark.parametrize(
    ("abi", "failed", "problem"),
    [
        ("__builtin_trap(); return 0;", "0", "its trial was ended by SIG"),
        ("for (volatile int i = 0;;) i = 1;", "0", "its trial took more than 2 s"),
        ("return 7;", "0", f"its interface is 7, expected {build.ABI}"),
        (f"return {build.ABI};", "0", "wrong product: kind 1, vector 0 of 1, row 0"),
        (f"return {build.ABI};", "1", "it has no memory"),
    ],
)
def test_a_library_that_fails_its_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abi: str, failed: str, problem: str
) -> None:
    """The child dies of what it does, this process lives; the next level is taken, and the verdict is remembered."""
    have_features(monkeypatch, AVX2)
    source = TRIAL.replace("ABI", abi).replace("FAILED", failed)
    write_source(monkeypatch, tmp_path, f"#ifdef __AVX2__\n{source}#else\n{ANSWERS}#endif\n")
    tried: list[str] = []

    def try_library(path: Path) -> str | None:
        tried.append(path.name.split("-")[1])
        return TRY_LIBRARY(path) if tried[-1] == "avx2" else None

    monkeypatch.setattr(build, "try_library", try_library)
    monkeypatch.setattr(build, "_TRIAL_SECONDS", 2.0)
    for _ in range(2):
        status = again()
        assert status.level == "portable"
        assert status.why.startswith("avx2: the library does not work here: ")
        assert problem in status.why
        assert status.hint is not None
        assert status.hint.startswith("delete ")
    assert tried == ["avx2", "portable"]
    monkeypatch.setenv("GLMKIT_KERNELS", "avx2")
    with pytest.raises(KernelsError, match="does not work here"):
        again()


@needs_compiler
def test_a_library_that_cannot_be_loaded_after_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_source(monkeypatch, tmp_path, 'extern "C" int other() { return 1; }\n')
    assert "cannot be loaded: " in build.status().why
    write_source(monkeypatch, tmp_path, 'extern "C" int glm_abi() { return 7; }\n')
    assert f"has interface 7, expected {build.ABI}" in again().why
