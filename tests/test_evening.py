"""The reading companion: its pieces of source exist, its numbers are those of the code, its pictures are current."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
EVENING = ROOT / "docs" / "evening"
PAGES = sorted(page for page in EVENING.glob("*.md") if not page.name.endswith(".zh.md"))
SHOWN = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which MkDocs loads by its path too."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- pieces of source ---


@pytest.mark.parametrize("page", sorted(EVENING.glob("*.md")), ids=lambda page: page.stem)
def test_every_stop_shows_source_that_exists(page: Path, hooks: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    anchors = hooks.ANCHOR.findall(text)
    built = hooks.on_page_markdown(text)
    assert built.count('title="src/glmkit/') == len(anchors)
    assert "::" not in re.sub(r"^```.*?^```$", "", built, flags=re.MULTILINE | re.DOTALL)  # none is misspelt
    assert anchors or page.name.startswith("index")
    for file, _, link in anchors:  # where Markdown is read as it is, the line is a link to the file
        assert (page.parent / link).resolve() == ROOT / "src" / "glmkit" / file


def test_a_piece_is_the_text_of_the_file(hooks: ModuleType) -> None:
    lines = (ROOT / "src/glmkit/models/layers.py").read_text(encoding="utf-8").splitlines()
    code, first = hooks.piece("models/layers.py", "RMSNorm.forward")
    assert [line.removeprefix("    ") for line in lines[first - 1 :]][: len(code.splitlines())] == code.splitlines()
    assert code.startswith("def forward(self, x: Tensor) -> Tensor:")
    assert code.endswith("return (self.weight * y).to(x.dtype)")
    decorated, _ = hooks.piece("engine/batch.py", "Batch.advance")
    assert decorated.startswith("@torch.inference_mode()\ndef advance(")
    assert hooks.piece("models/layers.py", "ATTENTION")[0] == 'ATTENTION = {"sdpa": attend, "eager": attend_eagerly}'


@pytest.mark.parametrize(
    ("anchor", "missing"),
    [
        ("models/layers.py::rotate_triples", "has no rotate_triples"),
        ("models/layers.py::RMSNorm.backward", "has no backward"),
        ("models/layer.py::RMSNorm", "there is no file src/glmkit/models/layer.py"),
    ],
)
def test_an_anchor_that_is_gone_stops_the_build(anchor: str, missing: str, hooks: ModuleType) -> None:
    with pytest.raises(hooks.AnchorError, match=re.escape(missing)):
        hooks.on_page_markdown(f"text\n\n[`{anchor}`](../../src/glmkit/models/layers.py)\n")


def test_lines_of_chinese_are_joined_and_nothing_else(hooks: ModuleType) -> None:
    page = (
        "# 标题\n\n第一行，\n第二行 GLM\n第三行\n\n- 一\n  二\n- 三\n\n| 甲 |\n|---|\n\n```text\n一\n二\n```\n\n末行\n"
    )
    expected = page.replace("，\n第", "，第").replace("- 一\n  二", "- 一二")
    assert hooks.on_page_markdown(page) == expected


@pages
def test_files_that_a_page_names_exist(page: Path) -> None:
    for language in (page, page.with_name(f"{page.stem}.zh.md")):
        named = re.findall(r"`([\w/]+\.py)`", language.read_text(encoding="utf-8"))
        assert [file for file in named if not (ROOT / "src" / "glmkit" / file).is_file()] == []


# --- numbers ---


def about_the_same(found: str, expected: str) -> bool:
    """Whether texts are equal, but for numbers whose last place another machine may round in another way."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return False
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(expected)):
        places = len(other.partition(".")[2])
        whole = places == 0 and "%" not in expected
        if abs(float(one) - float(other)) > (0 if whole else 1.01 * 10**-places):
            return False
    return True


@pages
def test_the_numbers_of_a_page_are_those_of_the_code(page: Path) -> None:
    shown = SHOWN.findall(page.read_text(encoding="utf-8"))
    assert len(shown) == 1
    for code, expected in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), {"__name__": "page"})
        assert about_the_same(printed.getvalue(), expected), printed.getvalue()


def test_numbers_are_compared_by_their_last_place() -> None:
    assert about_the_same("loss 2.8, 376 tokens", "loss 2.9, 376 tokens")
    assert not about_the_same("loss 2.7, 376 tokens", "loss 2.9, 376 tokens")
    assert not about_the_same("loss 2.9, 377 tokens", "loss 2.9, 376 tokens")
    assert not about_the_same("says 'Paris'", "says 'Rome'")


# --- pictures ---


def test_every_picture_is_small_and_stands_on_a_page_in_both_languages() -> None:
    pictures = {picture.name for picture in EVENING.glob("*.svg")}
    assert len(pictures) == len(PAGES) - 1
    for suffix in (".md", ".zh.md"):
        texts = [page.with_name(page.stem + suffix).read_text(encoding="utf-8") for page in PAGES]
        assert {name for text in texts for name in re.findall(r"!\[[^]]+\]\(([\w.]+)\)", text)} == pictures
    for name in pictures:
        assert (EVENING / name).stat().st_size < 60_000
        assert ElementTree.parse(EVENING / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.slow
def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "pictures.py", tmp_path], check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [picture.name for picture in drawn] == sorted(picture.name for picture in EVENING.glob("*.svg"))
    for picture in drawn:
        found, expected = (path.read_text(encoding="utf-8") for path in (picture, EVENING / picture.name))
        assert NUMBER.sub("#", found) == NUMBER.sub("#", expected), picture.name  # colours of shades included
        pairs = zip(NUMBER.findall(found), NUMBER.findall(expected))
        assert max(abs(float(one) - float(other)) for one, other in pairs) <= 1, picture.name
