"""What MkDocs does to a page before it is built: a line that names a piece of the source becomes that piece.

    [`models/layers.py::rotate_pairs`](../../src/glmkit/models/layers.py)

Such a line is a link where Markdown is read as it is. On the site the function stands there, cut out of the file that
runs, with its line numbers. A name that is gone stops the build.

And lines of Chinese are joined: the end of a line would be a blank between two characters, which Chinese does not have.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent.parent / "src" / "glmkit"
ANCHOR = re.compile(r"^\[`([\w/]+\.py)::([\w.]+)`\]\((\S+)\)$", re.MULTILINE)

_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_CHINESE = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
_BROKEN = re.compile(rf"(?<={_CHINESE})\n *(?={_CHINESE})")


class AnchorError(LookupError):
    """A page names a piece of the source that is not there."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page.

    Args:
        markdown: The page.
        **_: The page's object, config and files, which are not needed.

    Returns:
        The page with the pieces in place of their names, and its lines of Chinese joined.

    Raises:
        AnchorError: One of them does not exist.
    """
    joined, end = [], 0
    for fence in _FENCE.finditer(markdown):
        joined += [_BROKEN.sub("", markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    text = "".join([*joined, _BROKEN.sub("", markdown[end:])])
    return ANCHOR.sub(lambda found: _block(found[1], found[2]), text)


def piece(file: str, name: str) -> tuple[str, int]:
    """Cuts a function, a class, a method or a constant out of a source file.

    Args:
        file: Path under src/glmkit.
        name: `function`, `Class`, `Class.method` or `CONSTANT`.

    Returns:
        Its text without the indentation of its first line, decorators included, and the number of that line.

    Raises:
        AnchorError: There is no such file, or no such name in it.
    """
    path = SOURCES / file
    if not path.is_file():
        raise AnchorError(f"{file}::{name}: there is no file src/glmkit/{file}")
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        found = [child for child in getattr(node, "body", []) if part in _names(child)]
        if not found:
            raise AnchorError(f"{file}::{name}: src/glmkit/{file} has no {part}")
        node = found[-1]
    assert isinstance(node, ast.stmt)
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines), first


def _names(node: ast.AST) -> list[str]:
    """What a statement gives a name to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _block(file: str, name: str) -> str:
    code, first = piece(file, name)
    return f'```python title="src/glmkit/{file}: {name}" linenums="{first}"\n{code}\n```'
