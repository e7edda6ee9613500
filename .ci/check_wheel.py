"""Builds the wheel and checks that everything the package needs at run time is inside, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
BUILTIN_LIMIT_BYTES = 16_000_000
REQUIRED = ["glmkit/py.typed", "glmkit/recipes/nano.yaml", "glmkit/recipes/deepspeed_zero2.json"]
REQUIRED += ["glmkit/kernels/source/glmkit.cpp", "glmkit/kernels/source/linear.h"]
if (SOURCE / "glmkit" / "builtin" / "glm-nano").exists():
    REQUIRED += [f"glmkit/builtin/glm-nano/{name}" for name in ("config.json", "model.safetensors", "tokenizer.model")]


def expected_names() -> set[str]:
    """Every file of the source folder that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return {str(Path(name).relative_to("src")) for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def wheel_names(folder: str) -> set[str]:
    """Builds the wheel into `folder` and lists its files, metadata aside."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)], check=True
    )
    (wheel,) = Path(folder).glob("glmkit-*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def main() -> int:
    """Prints every problem; returns their number as the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        inside = wheel_names(folder)
    expected = expected_names()
    problems = [f"missing from the wheel: {name}" for name in sorted(expected - inside)]
    problems += [f"not in the source folder: {name}" for name in sorted(inside - expected)]
    problems += [f"required, and not there: {name}" for name in REQUIRED if name not in inside]
    builtin = sum(path.stat().st_size for path in (SOURCE / "glmkit" / "builtin").rglob("*") if path.is_file())
    if builtin > BUILTIN_LIMIT_BYTES:
        problems.append(f"the built-in models have {builtin:,} bytes, at most {BUILTIN_LIMIT_BYTES:,} are allowed")
    print("\n".join(problems) or f"{len(inside)} files, all there; built-in models {builtin / 1e6:.1f} MB")
    return min(len(problems), 1)


if __name__ == "__main__":
    sys.exit(main())
