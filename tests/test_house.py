"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "glmkit"
MODULES = sorted(PACKAGE.rglob("*.py"))
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DOCUMENTS = [*READMES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)


def tracked_files() -> list[Path]:
    """What git tracks or would track; outside a checkout, for instance in a source distribution, nothing."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    paths = (ROOT / name for name in listed.stdout.splitlines()) if listed.returncode == 0 else ()
    return [path for path in paths if path.is_file()]


def blocks(path: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(path.read_text(encoding="utf-8")) if language in languages]


# --- the command starts fast ---


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["chat", "--help"], ["nonsense"], []])
def test_the_command_starts_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['glm', *{arguments!r}]\n"
        "import glmkit_command\n"
        "try:\n"
        "    glmkit_command.main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'peft', 'jieba', 'matplotlib'} & set(sys.modules)\n"
        "print('imported', sorted(heavy))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines()[-1:] == ["imported []"], run.stdout + run.stderr


# --- the documents ---


def test_tests_that_documents_name_are_there() -> None:
    """A table of cases is worth what its tests are: a file or test that is renamed must be renamed here too."""
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    names = set(re.findall(r"^\s*(?:async )?def (test_\w+)", "\n".join(tests.values()), re.MULTILINE))
    for document in DOCUMENTS:
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", document.read_text(encoding="utf-8")):
            assert name in tests or name in names, f"{document.name} names {name}"


# --- the source ---


def test_only_hf_imports_transformers() -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "transformers" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers")
    }
    assert importers == {"hf.py"}


def test_what_hf_brings_in_is_used() -> None:
    exported = ast.literal_eval(
        re.search(r"__all__ = (\[.*?\])", (PACKAGE / "hf.py").read_text(), re.DOTALL)[1]  # type: ignore[index]
    )
    rest = "\n".join(path.read_text(encoding="utf-8") for path in MODULES if path.name != "hf.py")
    assert [name for name in exported if not re.search(rf"\b{name}\b", rest)] == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_is_a_drawer_for_odds_and_ends(path: Path) -> None:
    parts = set(path.relative_to(PACKAGE).with_suffix("").parts)
    assert not parts & {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [] if ast.get_docstring(tree) or not tree.body else ["the module itself"]
    bare += [
        f"{node.name} (line {node.lineno})"
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


# --- what must not be in tracked files ---


def test_no_machine_paths_and_no_registry_hosts() -> None:
    patterns = {
        "a path of one machine": r"(^|[^A-Za-z0-9_.])/(work|root|home|farm|opt/wheels)/[A-Za-z0-9_.]",
        "a package registry": r"(?i)pypi\.org|pythonhosted\.org|deb\.debian\.org|registry\.npmjs\.org",
    }
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            found += [f"{path}:{number}: {what}" for what, pattern in patterns.items() if re.search(pattern, line)]
    assert found == []


def test_no_large_files() -> None:
    """The built-in model is the largest thing here; it may have 16 MB."""
    assert [str(path) for path in tracked_files() if path.stat().st_size > 16_000_000] == []


# --- the README ---


def test_the_two_readmes_have_the_same_shape() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    levels = [re.findall(r"^#+(?= )", BLOCK.sub("", text), re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    tables = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (english, chinese)]
    assert tables[0] == tables[1]


def test_the_readme_opens_with_two_commands_that_exist() -> None:
    first = blocks(READMES[0], "sh")[0].split()
    assert first == ["./demo.sh", "./test.sh"]
    for command in first:
        assert os.access(ROOT / command, os.X_OK), f"{command} is not executable"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_python_blocks_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", BLOCK.sub("", text))
    assert [link for link in links if not (path.parent / link).exists()] == []
    for code in blocks(path, "python"):
        compile(code, path.name, "exec")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_exist(path: Path) -> None:
    from glmkit.train.flags import settings_from_flags
    from glmkit.verbs import command
    from glmkit.verbs.app import RecipeVerb

    parser = command()
    for code in blocks(path, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if "|" in words:
                words = words[words.index("|") + 1 :]
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words[:1] != ["glm"] or len(words) < 2:
                continue
            verb, words = parser, words[1:]
            while hasattr(verb, "commands") and words:
                assert words[0] in verb.commands, line
                verb, words = verb.commands[words[0]], words[1:]
            flags = {"--help", *(flag for option in verb.params for flag in option.opts)}
            unknown = [word for word in words if word.startswith("-") and word.split("=")[0] not in flags]
            if isinstance(verb, RecipeVerb):  # whose flags are the settings of its recipes, too
                settings_from_flags(words, dict.fromkeys(flags, False), verb._kind())
            else:
                assert unknown == [], line
