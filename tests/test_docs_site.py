"""The documentation site: both languages say the same, every page is in the navigation, the reference is complete."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from glmkit.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load("reference")


def pages(ending: str) -> dict[str, Path]:
    """Written pages by their English name."""
    found = {}
    for path in sorted(DOCS.rglob("*.md")):
        name = path.relative_to(DOCS).as_posix()
        if name.startswith(tuple(f"{made}/" for made in reference.MADE)) or name.endswith(".part.md"):
            continue
        if name.endswith(".zh.md") == (ending == ".zh.md"):
            found[name.removesuffix(ending) + ".md"] = path
    return found


ENGLISH, CHINESE = pages(".md"), pages(".zh.md")


# --- two languages ---


def test_every_page_has_both_languages() -> None:
    assert set(CHINESE) == set(ENGLISH)


def shape(text: str) -> dict[str, object]:
    """What the two editions of a page have in common."""
    prose = FENCE.sub("", text)
    return {
        "code blocks": FENCE.findall(text),
        "lines of indented blocks": len(re.findall(r"^    \S", prose, re.MULTILINE)),
        "levels of headings": re.findall(r"^#+(?= )", prose, re.MULTILINE),
        "links": Counter(re.findall(r"\]\(([^)\s]+)\)", prose)),
        "tables": [line.replace("\\|", "").count("|") for line in prose.splitlines() if line.startswith("|")],
        "folded parts": prose.count("<details"),
    }


@pytest.mark.parametrize("name", sorted(set(ENGLISH) & set(CHINESE)))
def test_both_editions_of_a_page_have_the_same_shape(name: str) -> None:
    english, chinese = (shape(paths[name].read_text(encoding="utf-8")) for paths in (ENGLISH, CHINESE))
    for what in english:
        assert english[what] == chinese[what], f"{name}: {what} differ"


def test_a_chinese_edition_is_chinese() -> None:
    for name, path in CHINESE.items():
        prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", FENCE.sub("", path.read_text(encoding="utf-8")))
        assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 0.1 * len(prose), name


# --- navigation and links ---


def navigation(entries: list[object]) -> list[str]:
    found = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += navigation(value) if isinstance(value, list) else [str(value)]
    return found


def settings() -> dict[str, object]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_stands_in_the_navigation_once() -> None:
    listed = Counter(navigation(settings()["nav"]))
    assert {name: count for name, count in listed.items() if count > 1} == {}
    made = {f"project/{name}" for name in reference.PROJECT} | {"reference/command.md", "reference/python.md"}
    assert set(listed) == set(ENGLISH) | made


def test_names_of_the_navigation_are_translated() -> None:
    def names(entries: list[object]) -> list[str]:
        found = []
        for entry in entries:
            if isinstance(entry, dict):
                name, value = next(iter(entry.items()))
                found += [name, *(names(value) if isinstance(value, list) else [])]
        return found

    [translation] = [plugin["i18n"] for plugin in settings()["plugins"] if isinstance(plugin, dict)]
    chinese = next(one for one in translation["languages"] if one["locale"] == "zh")["nav_translations"]
    assert set(names(settings()["nav"])) == set(chinese)


@pytest.mark.parametrize("name", sorted(ENGLISH))
def test_links_lead_to_pages_and_headings(name: str) -> None:
    pytest.importorskip("markdown")
    for path in (ENGLISH[name], CHINESE.get(name)):
        if path is None:
            continue
        for target, anchor in re.findall(
            r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", FENCE.sub("", path.read_text("utf-8"))
        ):
            goal = (path.parent / target).resolve() if target else ENGLISH[name]
            assert goal.exists(), f"{path.name}: {target}"
            if anchor:
                assert anchor in reference.addresses_of(goal.read_text(encoding="utf-8")), f"{path.name}: #{anchor}"


def test_links_that_leave_the_pages_are_mended() -> None:
    mended = reference.mended_links
    assert mended("[a](../ARCHITECTURE.md#x)", "results.md") == "[a](project/ARCHITECTURE.md#x)"
    assert mended("[a](../../nano/REPORT.md)", "models/glm.md") == "[a](../project/nano/REPORT.md)"
    assert mended("[a](docs/data.md#b)", "project/ARCHITECTURE.md") == "[a](../data.md#b)"
    assert mended("[LICENSE](LICENSE)", "project/CONTRIBUTING.md") == "`LICENSE`"
    assert mended("```\n[a](../x.py)\n```", "results.md") == "```\n[a](../x.py)\n```"


def test_chinese_headings_have_the_english_addresses() -> None:
    pytest.importorskip("markdown")
    english, chinese = "# A\n## `glm` run\n```\n# no\n```\n## A\n", "# 甲\n## 乙\n```\n# no\n```\n## 丙\n"
    assert reference.addresses_of(english) == ["a", "glm-run", "a_1"]
    marked = reference.with_addresses(chinese, english)
    assert marked == "# 甲 {#a}\n## 乙 {#glm-run}\n```\n# no\n```\n## 丙 {#a_1}\n"


# --- what is made from the sources ---


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_reference_of_the_command_names_every_verb_and_flag(language: str) -> None:
    from glmkit.verbs import command
    from glmkit.verbs.app import SECTIONS

    page, whole = reference.command_page(language), command()
    for name in [name for names in SECTIONS.values() for name in names]:
        verb = whole.commands[name]
        part = page.split(f"\n## glm {name}\n")[1].split("\n## ")[0]
        for one in getattr(verb, "commands", {name: verb}).values():
            flags = [flag for option in one.params if not option.hidden for flag in option.opts if flag[0] == "-"]
            assert [flag for flag in flags if flag not in part and flag != "--help"] == [], name


def test_the_reference_of_the_package_has_its_public_names() -> None:
    import glmkit

    page = reference.python_page("en")
    for name in set(glmkit.__all__) - {"__version__"}:
        assert f"\n## glmkit.{name}\n" in page
    names = set(re.findall(r"\]\(package/(\w+)\.md\)", page))
    assert names == {path.stem for path in reference.parts()}
    assert {"loading", "engine", "chat"} < names
    loading = reference.package_page(ROOT / "src" / "glmkit" / "loading.py")
    assert "### load\n" in loading
    assert "**Raises**" in loading


def test_docstrings_become_lists() -> None:
    text = "Does it.\n\nArgs:\n    name: What it is,\n        and more.\n\nReturns:\n    A number.\n"
    lines = "\n".join(reference.described(text))
    assert "**Args**\n\n- `name`: What it is,\n  and more." in lines
    assert "**Returns**\n\nA number." in lines


def test_every_family_has_its_licence_on_the_page() -> None:
    found = {}
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", ENGLISH["licences.md"].read_text("utf-8"), re.MULTILINE
    )
    for family, _, weights, commercial in rows[1:]:
        first, *endings = family.split(", ")
        names = [first, *(first.split(",")[0] + ending for ending in endings if ending.startswith("-"))]
        for row in FAMILIES:
            if row.name in [name.lower() for name in names] or (
                first.startswith("GLM (2021)") and row.architecture == "glm"
            ):
                found[row.name] = weights, commercial
    assert set(found) == {row.name for row in FAMILIES}
    for row in FAMILIES:
        weights, commercial = found[row.name]
        free = row.licence.startswith(("MIT", "Apache"))
        assert free == (commercial == "yes") == weights.startswith(("MIT", "Apache")), row.name
        assert ("registration" in commercial) == ("registration" in row.licence), row.name


# --- the whole ---


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocs_static_i18n")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    assert "WARNING" not in built.stderr
    for page in ("index.html", "start.html", "zh/start.html", "reference/command.html", "zh/reference/command.html"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?(https?:[^\s\">]+)", text)
        fetched += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*href=\"?(https?:[^\s\">]+)", text
        )
        assert fetched == [], page
