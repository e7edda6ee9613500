"""The native code: compiled on first use into the user's cache, tried in a process of its own, then loaded.

    level() / library() / status()      what a process uses; decided once, at the first call, never at import
        wanted_levels                   the CPU's levels, the fastest first, or the one that GLMKIT_KERNELS names
        build                           the library in the cache (cache.py), or a new one: compiled, tried, remembered

The library has no torch in it: torch's headers would bind it to one release and make it compile for minutes. Whatever
goes wrong leaves the work to torch, with the reason in `status()`; only a level that the user named is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from glmkit.errors import KernelsError
from glmkit.kernels.cache import Record, cache_folder, cannot_write, checksum, read_record, remember, turn
from glmkit.kernels.levels import TORCH, VARIABLE, compiler_flags, cpu_features, wanted_levels

ABI = 2
"""What `glm_abi()` of the library must return: the number of the interface that Python code expects."""
SOURCE = Path(__file__).parent / "source" / "glmkit.cpp"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno")
_OPENMP = "-fopenmp"
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_COMPILE_SECONDS = 300.0
_TRIAL_SECONDS = 60.0

logger = logging.getLogger("glmkit")


class _TooSlowError(KernelsError):
    """Other levels would take as long."""


@dataclass(frozen=True)
class Status:
    """What this process uses for products with quantised weights, and why.

    Args:
        level: "amx", "avx512", "avx2", "portable", or "torch" for no native code.
        why: One line: what decided, and what went wrong with better levels.
        hint: What would make it better, if anything would.
        path: The library, None without one.
        features: Those of the CPU that some level uses.
        compiler: First line of the compiler's version; None if there was none.
        openmp: Whether the library can use several threads.
        threads: How many it is given, as many as torch uses.
    """

    level: str
    why: str
    hint: str | None
    path: Path | None
    features: tuple[str, ...]
    compiler: str | None
    openmp: bool
    threads: int


@dataclass(frozen=True)
class _Choice:
    level: str
    why: str
    hint: str | None = None
    path: Path | None = None
    library: ctypes.CDLL | None = None
    record: Record | None = None


# --- what a process uses ---


def level() -> str:
    """The level in use; the first call may compile it.

    Returns:
        "amx", "avx512", "avx2", "portable", or "torch" if there is no native code.

    Raises:
        UsageError: `GLMKIT_KERNELS` is no level, or one that this CPU cannot run.
        KernelsError: The level that it names cannot be built.
    """
    return _choose().level


def library() -> ctypes.CDLL | None:
    """The loaded library, None if the level is "torch". It raises what `level` raises."""
    return _choose().library


def status() -> Status:
    """What is in use and why. It raises what `level` raises."""
    choice = _choose()
    record = choice.record
    found = find_compiler()
    return Status(
        level=choice.level,
        why=choice.why,
        hint=choice.hint,
        path=choice.path,
        features=tuple(sorted(cpu_features())),
        compiler=record.compiler if record else found[1] if found else None,
        openmp=record.openmp if record else False,
        threads=torch.get_num_threads(),
    )


@lru_cache(maxsize=1)
def _choose() -> _Choice:
    """Takes the first level that works; `_choose.cache_clear()` forgets it."""
    levels, named = wanted_levels()
    if not levels:
        return _Choice(TORCH, f"{VARIABLE}={TORCH}", hint=f"unset {VARIABLE}")
    problems: dict[str, list[str]] = {}
    hint = None
    for candidate in levels:
        try:
            path, record = _prepare(candidate)
            loaded = _open(path)
        except KernelsError as error:
            if named:
                raise KernelsError(f"{VARIABLE}={candidate}: {error.message}", hint=error.hint) from error
            problems.setdefault(error.message, []).append(candidate)
            hint = hint or error.hint
            if isinstance(error, _TooSlowError):
                break
            continue
        why = f"{VARIABLE}={candidate}" if named else "the best this CPU can run"
        return _Choice(candidate, _told(problems) or why, hint, path, loaded, record)
    logger.info("no native kernels, torch computes: %s", _told(problems))
    return _Choice(TORCH, _told(problems), hint)


def _told(problems: dict[str, list[str]]) -> str:
    """Every problem once, with the levels that had it."""
    return "; ".join(f"{', '.join(levels)}: {message}" for message, levels in problems.items())


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library into this process. torch is there already, so both use the one libgomp and its threads."""
    try:
        loaded = ctypes.CDLL(str(path))
        found = int(loaded.glm_abi())
    except (OSError, AttributeError) as error:
        raise KernelsError(f"{path.name} cannot be loaded: {error}", hint=f"delete {path}") from error
    if found != ABI:
        raise KernelsError(f"{path.name} has interface {found}, expected {ABI}", hint=f"delete {path}")
    return loaded


# --- from sources to a library that was tried ---


def build(level: str) -> Path:
    """Finds the library of a level, or compiles and tries it.

    Args:
        level: One of `glmkit.kernels.levels.LEVELS` that this CPU can run.

    Returns:
        The library, which has passed the trial on this machine.

    Raises:
        KernelsError: No compiler, no folder to write in, or a library that fails the trial.
    """
    return _prepare(level)[0]


def _prepare(level: str) -> tuple[Path, Record]:
    if platform.system() == "Windows":
        raise KernelsError(
            "there is no native code for Windows", hint="torch computes instead, more slowly; WSL has native code"
        )
    folder, compiler = cache_folder(), find_compiler()
    flags = [*_FLAGS, *compiler_flags(level)]
    stem = f"glm-{level}-{_sources_digest(flags)}"
    if compiler is None:  # one that another machine with a compiler left here is as good
        kept = [path for path in sorted(folder.glob(f"{stem}-*{_SUFFIX}")) if read_record(path) is not None]
        path = kept[0] if kept else folder / f"{stem}{_SUFFIX}"
    else:
        path = folder / f"{stem}-{hashlib.sha256(compiler[1].encode()).hexdigest()[:8]}{_SUFFIX}"
    record = read_record(path)
    if record is None or record.machine != _machine():
        with turn(path, _COMPILE_SECONDS + _TRIAL_SECONDS):
            record = read_record(path)  # another process may have been faster
            if record is None:
                record = _compile(path, compiler, flags)
            if record.machine != _machine():
                record = replace(record, machine=_machine(), problem=try_library(path))
                remember(path, record)
    if record.problem:
        raise KernelsError(f"the library does not work here: {record.problem}", hint=f"delete {path} to try it again")
    return path, record


def find_compiler() -> tuple[list[str], str] | None:
    """The first compiler of $CXX, c++, g++ and clang++ that says its version.

    Returns:
        Its command and the first line of its version; None if there is none.
    """
    for command in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if not command or shutil.which(command[0]) is None:
            continue
        try:
            asked = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if asked.stdout.strip():
            return command, asked.stdout.strip().splitlines()[0]
    return None


def _sources_digest(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join((*flags, _OPENMP, platform.machine())).encode())
    for path in sorted(SOURCE.parent.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(path: Path, compiler: tuple[list[str], str] | None, flags: Sequence[str]) -> Record:
    """Compiles beside `path` and renames; without OpenMP where the compiler has none."""
    if compiler is None:
        raise KernelsError("there is no C++ compiler", hint="apt install g++, or CXX=COMPILER; then glm doctor")
    command, version = compiler
    logger.warning("compiling the native kernels once, which takes some seconds: with %s, to %s", version, path)
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=_SUFFIX, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        problem = ""
        for openmp in (True, False):
            problem = _run_compiler([*command, *flags, *([_OPENMP] if openmp else []), "-o", name, str(SOURCE)])
            if not problem:
                break
        if problem:
            raise KernelsError(f"{command[0]} cannot compile it: {problem}", hint="CXX=COMPILER names another one")
        os.chmod(name, 0o755)  # not writable by others, whatever the umask
        record = Record(checksum(Path(name)), version, openmp)
        os.replace(name, path)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
    if not openmp:
        logger.info("%s has no OpenMP: the native kernels use one thread", command[0])
    return record


def _run_compiler(command: list[str]) -> str:
    """Runs it.

    Returns:
        What it complains about first; empty if it succeeded.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,  # the driver's own children end with it
    )
    try:
        _, told = process.communicate(timeout=_COMPILE_SECONDS)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _TooSlowError(f"{command[0]} took more than {_COMPILE_SECONDS:.0f} s") from error
        raise
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in told.decode(errors="replace").splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
    return first[:300]


def try_library(path: Path) -> str | None:
    """Multiplies with a library in a child process: an instruction that the CPU lacks must not end this one.

    Args:
        path: The library.

    Returns:
        What is wrong with it; None if its products are right.
    """
    runtime = Path(torch.__file__).parent / "lib" / "libgomp.so.1"  # the one it will meet in this process
    command = [sys.executable, "-I", str(Path(__file__).with_name("trial.py")), str(path), str(ABI)]
    if runtime.is_file():
        command.append(str(runtime))
    try:
        tried = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"its trial took more than {_TRIAL_SECONDS:.0f} s"
    except OSError as error:
        return f"its trial cannot start: {error.strerror}"
    if tried.returncode == 0:
        return None
    if tried.returncode < 0:
        return f"its trial was ended by {signal.Signals(-tried.returncode).name}"
    return (tried.stderr.strip().splitlines() or ["its trial failed without a word"])[-1][:300]


@lru_cache(maxsize=1)
def _machine() -> str:
    """What the verdict of a trial holds for: a home folder may serve machines with other CPUs and kernels."""
    return f"{platform.node()} {platform.release()} {' '.join(sorted(cpu_features()))}"
