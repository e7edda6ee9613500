"""What MkDocs adds to the pages of docs/: the reference, made from parser and sources, and the project's own files.

It is made anew for each build and never committed, so nothing of it can be out of date. Links between pages are mended
on the way: what a page calls `../ARCHITECTURE.md` is `project/ARCHITECTURE.md` on the site, and a Chinese heading has
the address of the English one, so that one link serves both languages.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SOURCES = ROOT / "src" / "glmkit"
# Files outside docs/ that pages point to; on the site they stand under project/.
PROJECT = (
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "nano/README.md",
    "nano/REPORT.md",
)
MADE = ("reference", "project")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source", "Sources", "Example", "Note")
LANGUAGES = ("en", "zh")
FENCE = re.compile(r"^ *(```|~~~)")
WORDS = {
    "en": {
        "command": "The command",
        "command_text": "Every verb with its arguments and flags, made from the parser, as `glm VERB --help`.",
        "python": "Python",
        "python_text": "What `import glmkit` offers, made from the sources.",
        "name": "argument",
        "meaning": "meaning",
        "default": "default",
        "settings": "Settings, each also as `--name value` or `section.name=value`:",
        "whole": "The whole package",
    },
    "zh": {
        "command": "命令",
        "command_text": "每个子命令及其参数与选项，由解析器自动生成；`glm VERB --help` 显示同样的内容。",
        "python": "Python 接口",
        "python_text": "`import glmkit` 提供的全部名称，由源代码自动生成；说明文字为英文。",
        "name": "参数",
        "meaning": "含义",
        "default": "默认值",
        "settings": "设置项，也可写成 `--name value` 或 `section.name=value`：",
        "whole": "整个包",
    },
}


def on_config(config: Any, **_: Any) -> Any:
    """Called by MkDocs before it looks at docs/; writes what is made here into two folders that git does not see."""
    wanted = {place: text.encode() for place, text in pages().items()}
    for name in PROJECT:
        for path in (ROOT / name, *_pictures(ROOT / name)):
            wanted[f"project/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    for folder in MADE:
        wanted[f"{folder}/.gitignore"] = b"*\n"
        for path in (DOCS / folder).rglob("*"):
            if path.is_file() and path.relative_to(DOCS).as_posix() not in wanted:
                path.unlink()
    for place, data in wanted.items():
        path = DOCS / place
        if not path.is_file() or path.read_bytes() != data:  # `mkdocs serve` watches the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page; mends its links, and the addresses of Chinese headings."""
    place = page.file.src_uri
    if place.endswith(".zh.md") and (DOCS / place).is_file():
        english = (DOCS / (place.removesuffix(".zh.md") + ".md")).read_text(encoding="utf-8")
        markdown = with_addresses(markdown, english)
    return mended_links(markdown, place)


# --- links and addresses ---


def mended_links(markdown: str, place: str) -> str:
    """Points links that leave docs/ to where their file stands on the site.

    Args:
        markdown: Text of a page.
        place: Its path on the site, with slashes: "serving.md", "project/nano/README.md".

    Returns:
        The text. A link to a file that is not on the site becomes the file's name in code letters.
    """
    inside = place.startswith("project/")
    folder = posixpath.dirname(place.removeprefix("project/") if inside else f"docs/{place}")

    def mend(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PROJECT or (inside and path.endswith((".png", ".svg"))):
            goal = f"project/{path}"
        elif path.startswith("docs/"):
            goal = path.removeprefix("docs/")
            if not inside:
                return found[0]
        elif path in ("README.md", "README.zh-CN.md"):
            goal, anchor = "index.md", ""
        else:
            name = text.strip("`")
            return f"`{path}`" if name == posixpath.basename(path) else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(place) or '.')}{anchor})"

    return _outside_fences(markdown, lambda line: re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", mend, line))


def with_addresses(markdown: str, english: str) -> str:
    """Gives the headings of a translated page the addresses of the original's.

    Args:
        markdown: The translation, with the same headings in the same order.
        english: The original.

    Returns:
        The translation with `{#address}` behind each heading.
    """
    addresses = iter(addresses_of(english))

    def mark(line: str) -> str:
        heading = re.match(r"#{1,6} ", line)
        address = next(addresses, None) if heading else None
        return f"{line} {{#{address}}}" if address and "{#" not in line else line

    return _outside_fences(markdown, mark)


def addresses_of(markdown: str) -> list[str]:
    """The addresses that MkDocs gives the headings of a page.

    Args:
        markdown: The page.

    Returns:
        One for each heading, in order.
    """
    from markdown.extensions.toc import slugify, unique

    taken: set[str] = set()
    found: list[str] = []

    def note(line: str) -> str:
        if heading := re.match(r"#{1,6} +(.+?)[ #]*$", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            found.append(unique(slugify(re.sub(r"[`*]", "", text), "-"), taken))
        return line

    _outside_fences(markdown, note)
    return found


def _outside_fences(markdown: str, change: Any) -> str:
    """Changes the lines of a page that are not part of a block of code."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        elif not fence:
            line = change(line)
        lines.append(line)
    return "\n".join(lines)


def _pictures(page: Path) -> list[Path]:
    names = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    return [path for name in names if (path := (page.parent / name).resolve()).is_file()]


# --- the reference ---


def pages() -> dict[str, str]:
    """All generated pages: their place on the site, and their text."""
    made: dict[str, str] = {}
    for language in LANGUAGES:
        ending = ".md" if language == "en" else f".{language}.md"
        made[f"reference/command{ending}"] = command_page(language)
        made[f"reference/python{ending}"] = python_page(language)
    for part in parts():  # in English only: docstrings are
        made[f"reference/package/{part.stem}.md"] = package_page(part)
    return made


def command_page(language: str) -> str:
    """Writes the page of the command from its parser.

    Args:
        language: "en" or "zh".

    Returns:
        Markdown with a section for each verb.
    """
    from glmkit.verbs import command
    from glmkit.verbs.app import SECTIONS as GROUPS

    words, whole = WORDS[language], command()
    lines = [f"# {words['command']}", "", words["command_text"], ""]
    for names in GROUPS.values():
        for name in names:
            lines += _verb(f"glm {name}", whole.commands[name], language, 2)
    return "\n".join(lines) + "\n"


def _verb(call: str, verb: Any, language: str, level: int) -> Iterator[str]:
    from glmkit.translation import translate

    words = WORDS[language]
    yield from (f"{'#' * level} {call}", "", translate(verb.help or "", language), "")
    inner = getattr(verb, "commands", {})
    for name, one in inner.items():
        yield from _verb(f"{call} {name}", one, language, level + 1)
    if inner:
        return
    rows = [row for one in verb.params if (row := _row(one, language))]
    if rows:
        yield from (f"| {words['name']} | {words['meaning']} | {words['default']} |", "|---|---|---|", *rows, "")
    if hasattr(verb, "_kind"):
        from glmkit.train.flags import settings_help

        yield from (words["settings"], "", "```text", settings_help(verb._kind()), "```", "")


def _row(parameter: Any, language: str) -> str | None:
    """One argument or flag as a row of a table; nothing for those that the help hides."""
    from glmkit.translation import translate

    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return None
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if not getattr(parameter, "is_flag", False):
            name += f" {parameter.metavar or parameter.name.upper()}"
    default = parameter.default
    shown = "" if default in (None, False, [], (), "") or callable(default) else f"`{default}`"
    meaning = translate(getattr(parameter, "help", None) or "", language).replace("|", "\\|")
    return f"| `{name}` | {meaning} | {shown} |".replace("`|`", "`\\|`")


def python_page(language: str) -> str:
    """Writes the page of what `import glmkit` offers.

    Args:
        language: "en" or "zh".

    Returns:
        Markdown with a section for each name, and a list of the parts of the package.
    """
    words = WORDS[language]
    lines = [f"# {words['python']}", "", words["python_text"], ""]
    for name, module in _offered().items():
        lines += _definition(_defined(name, module), 2, "glmkit.")
    lines += [f"## {words['whole']}", ""]
    for part in parts():
        lines.append(f"- [`glmkit.{part.stem}`](package/{part.stem}.md): {_first_line(_module(part))}")
    return "\n".join(lines) + "\n"


def package_page(part: Path) -> str:
    """Writes the page of one module or package of glmkit: its public classes and functions.

    Args:
        part: A file or folder in src/glmkit.

    Returns:
        Markdown.
    """
    lines = ["---", "search: {exclude: true}", "---", "", f"# glmkit.{part.stem}", "", _first_line(_module(part)), ""]
    for path in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = ".".join(("glmkit", *path.relative_to(SOURCES).with_suffix("").parts)).removesuffix(".__init__")
        body = [line for node in tree.body for line in _definition(node, 3, "")]
        if body:
            lines += [f"## {name}", "", *([] if path == part else [_first_line(tree), ""]), *body]
    return "\n".join(lines) + "\n"


def parts() -> list[Path]:
    """The modules and packages of glmkit, in the order of the alphabet."""
    found = [path for path in SOURCES.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return sorted(path for path in found if not path.name.startswith("_"))


def _offered() -> dict[str, str]:
    """What `glmkit.__init__` names, and the module that has it."""
    tree = ast.parse((SOURCES / "__init__.py").read_text(encoding="utf-8"))
    table = next(
        one for one in tree.body if isinstance(one, ast.Assign) and getattr(one.targets[0], "id", "") == "_WHERE"
    )
    return dict(ast.literal_eval(table.value))


def _defined(name: str, module: str) -> ast.stmt:
    """Where a name is defined, through the modules that only import it."""
    path = SOURCES.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if getattr(node, "name", "") == name:
            return node
        if isinstance(node, ast.ImportFrom) and any(one.name == name for one in node.names):
            return _defined(name, str(node.module))
    raise LookupError(f"{module} has no {name}")


def _module(part: Path) -> ast.Module:
    file = part / "__init__.py" if part.is_dir() else part
    return ast.parse(file.read_text(encoding="utf-8"))


def _first_line(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")


def _definition(node: ast.stmt, level: int, prefix: str) -> Iterator[str]:
    """A public class or function with its signature and docstring; a class with its public methods."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
        return
    yield from (f"{'#' * level} {prefix}{node.name}", "")
    if not isinstance(node, ast.ClassDef):
        yield from ("```python", _signature(node), "```", "")
    yield from described(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if ast.get_docstring(inner) if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) else False:
                yield from _definition(inner, min(level + 1, 6), f"{prefix}{node.name}.")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{word} {node.name}({ast.unparse(node.args)}){result}"
    return whole if len(whole) <= 100 else whole.replace("(", "(\n    ", 1).replace(", *, ", ",\n    *,\n    ")


def described(docstring: str) -> Iterator[str]:
    """Turns a docstring in Google's style into Markdown: sections as lists, the rest as it is.

    Args:
        docstring: Without indentation.

    Yields:
        Lines.
    """
    section = ""
    for line in docstring.splitlines():
        head = re.fullmatch(r"(\w+):", line)
        if head and head[1] in SECTIONS:
            section = head[1]
            yield from ("", f"**{section}**", "")
        elif section and (item := re.match(r"    (\*{0,2}[\w., *]+): (.+)", line)) and section != "Source":
            yield f"- `{item[1]}`: {item[2]}"
        elif section and line.startswith("    "):
            yield f"  {line.strip()}" if line.startswith("        ") else line.strip()
        else:
            section = "" if line and not line.startswith(" ") else section
            yield line
    yield ""
