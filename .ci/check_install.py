"""Installs what would be released into an empty environment and uses it as a stranger would, outside the checkout.

    python .ci/check_install.py [--wheel-only]

The sdist is made; the wheel is built from it and must hold the files of the wheel of the checkout. Then that wheel is
installed, and `glm` answers, lists, measures and plans: with a compiler, and without one on a PATH that has none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "你好"

# A verb's arguments, and what must be on its standard output. None of them may touch a network.
COMMANDS: list[tuple[list[str], str]] = [
    ([], "glm quickstart"),
    (["--version"], "glmkit "),
    (["chat", "--prompt", QUESTION, "--max-tokens", "24", "--temperature", "0", "--plain"], ""),
    (["chat", "--prompt", QUESTION, "--max-tokens", "24", "--temperature", "0", "--json"], '"text"'),
    (["inspect", "chatglm3-6b"], "chatglm3-6b"),
    (["recipe", "list"], "adgen_lora"),
    (["recipe", "explain", "learning_rate"], "learning_rate"),
    (["plan", "chatglm3-6b"], "GB"),
    (["list"], "glm-nano"),
    (["where", "glm-nano"], "glm-nano"),
    (["completion", "bash"], "complete"),
    (
        ["bench", "glm-nano", "--scheme", "int4", "--context", "", "--prompt", "16", "--tokens", "4", "--repeats", "1"],
        "tok",
    ),
    (["doctor", "--json"], '"schema"'),
]


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Runs a command and returns its standard output; its standard error is shown if it fails."""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    # A machine may have faults of its own: the doctor says so with 1, and that is an answer.
    if done.returncode not in ((0, 1) if "doctor" in command else (0,)):
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(scratch: Path) -> Path:
    """Makes the sdist and, from it, the wheel.

    Returns:
        The wheel.
    """
    tools = scratch / "tools"
    venv.create(tools, with_pip=True)
    python = str(tools / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", "build"], scratch)
    run([python, "-m", "build", "--sdist", "--outdir", str(scratch / "sdist"), str(ROOT)], scratch)
    (archive,) = (scratch / "sdist").glob("glmkit-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
        packed.extractall(scratch / "unpacked", filter="data")
    wanted = ("README.md", "README.zh-CN.md", "LICENSE", "CITATION.cff", "SECURITY.md", "CHANGELOG.md", "test.sh")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise SystemExit(f"missing from {archive.name}: {', '.join(missing)}")
    (source,) = (scratch / "unpacked").iterdir()
    for place, origin in (("from_sdist", source), ("from_tree", ROOT)):
        run([python, "-m", "build", "--wheel", "--outdir", str(scratch / place), str(origin)], scratch)
    (wheel,), (other,) = ((scratch / place).glob("*.whl") for place in ("from_sdist", "from_tree"))
    held, expected = (set(ZipFile(path).namelist()) for path in (wheel, other))
    if held != expected:
        raise SystemExit(f"the wheel of the sdist differs from that of the checkout: {sorted(held ^ expected)[:20]}")
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB; {wheel.name}: {len(held)} files")
    return wheel


def install(wheel: Path, scratch: Path) -> Path:
    """Installs the wheel, without extras, into an environment of its own and returns the environment's folder."""
    place = scratch / "empty"
    venv.create(place, with_pip=True)
    run([str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel)], scratch)
    return place


def use(place: Path, scratch: Path, path: str) -> dict[str, str]:
    """Runs every command with a PATH and returns what each printed."""
    home = scratch / f"home{len(path)}"
    home.mkdir()
    environment = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    printed = {}
    for arguments, expected in COMMANDS:
        text = run([str(place / "bin" / "glm"), *arguments], home, environment)
        if expected not in text:
            raise SystemExit(f"glm {' '.join(arguments)}: {expected!r} is not in\n{text}")
        printed[" ".join(arguments)] = text
    return printed


def main() -> int:
    """Prints what was seen; an exit status other than 0 means that something is missing."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel = build(scratch)
        if "--wheel-only" in sys.argv:
            return 0
        place = install(wheel, scratch)
        python = str(place / "bin" / "python")
        where = "import glmkit, pathlib; print(p := pathlib.Path(glmkit.__file__), p.with_name('py.typed').is_file())"
        seen = run([python, "-c", where], scratch)
        if str(place) not in seen or "True" not in seen:
            raise SystemExit(f"the package of the environment is not the one that is used, or has no py.typed: {seen}")
        own = str(place / "bin")
        bare = scratch / "bare"
        bare.mkdir()
        with_compiler = use(place, scratch, f"{own}:{os.environ['PATH']}")
        without = use(place, scratch, f"{own}:{bare}")
        key = next(name for name in with_compiler if name.startswith("chat") and name.endswith("--plain"))
        if with_compiler[key] != without[key]:
            raise SystemExit(f"another answer without a compiler:\n{with_compiler[key]}\n{without[key]}")
        print(f"{len(COMMANDS)} commands, twice; glm chat: {without[key].strip()!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
