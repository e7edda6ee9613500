"""Every text of an error that the sources can raise, found by reading them, and the page and checks made from it.

    python scripts/error_catalogue.py [--missing] [AREA ...]    the templates as JSON, for translators
    python scripts/error_catalogue.py --write                   docs/troubleshooting.md and its Chinese edition

A template is a text with `{}` where a value stands. What flows into a message or a hint is followed through variables,
conditional expressions, functions that return it and parameters that carry it, within what their names say. Texts that
stand inside another one ("fragments") count from two words on.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "glmkit"
TRANSLATIONS = PACKAGE / "translations"
# Where the message stands in the call of a class; 0 for those not named here. None: what is in errors.py itself.
_MESSAGE_AT = {"CheckpointError": 1, "APIError": 1, "MissingDependencyError": None}
_PLAIN_ERRORS = ("APIError", "FileRefused", "StepFailedError")
_CAUSES = ("ValueError", "TypeError")  # raised inside, and quoted in a message
_OWN_TABLES = ("say", "translate", "describe", "labelled")  # functions that give texts in both languages
_CARRIERS = ("hint", "why", "reason", "cure", "problem")  # fields of small records that texts travel in
_MOST_ALTERNATIVES = 24
# What models are told or asked, and files that are written; no errors.
_OTHER_TEXTS = (
    "evaluate/gsm8k.py",
    "train/card.py",
    "quickstart.py",
    "chat/printing.py",
    "data/preview.py",
    "data/lengths.py",
    "evaluate/comparison.py",
)
_FOR_MODELS = (
    "Answer the following questions as best as you can. You have access to the following tools:",
    "What is the capital of France?",
)


@dataclass
class Template:
    """One text.

    Args:
        text: With `{}` for each value.
        kind: "message", "hint" or "fragment".
        error: Name of the class it is raised as; "" for fragments.
        places: Where it stands, as (path below src/glmkit, line).
    """

    text: str
    kind: str
    error: str
    places: set[tuple[str, int]] = field(default_factory=set)

    @property
    def areas(self) -> set[str]:
        """First parts of the paths, without .py."""
        return {path.partition("/")[0].removesuffix(".py") for path, _ in self.places}


@dataclass(frozen=True)
class _Scope:
    """Where an expression stands."""

    module: str
    function: ast.FunctionDef | ast.AsyncFunctionDef | None
    owner: ast.ClassDef | None


class Sources:
    """The package, parsed; `templates` is what was found."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self.templates: dict[tuple[str, str], Template] = {}
        self._trees = {
            path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(package.rglob("*.py"))
        }
        self._scopes: dict[ast.AST, _Scope] = {}
        self._functions: dict[str, list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, _Scope]]] = defaultdict(list)
        self._calls: dict[str, list[ast.Call]] = defaultdict(list)
        self._constants: dict[tuple[str, str], ast.expr] = {}
        self._shared_constants: dict[str, list[ast.expr]] = defaultdict(list)
        self._carried: dict[str, list[ast.expr]] = defaultdict(list)
        self.cures: dict[str, set[str]] = defaultdict(set)
        self._seen: set[tuple[int, str, str]] = set()
        self._known: dict[int, set[str]] = {}
        self._errors = set(_PLAIN_ERRORS)
        for module, tree in self._trees.items():
            self._index(tree, _Scope(module, None, None))
        self._find_error_classes()
        for name in self._errors:
            for call in self._calls[name]:
                self._take_error(call, name)
        for call in self._calls["translate"]:
            self._take(call.args[0], "fragment", "")
        for name in ("ok", "warn", "fail"):  # what glm doctor says
            for call in self._calls[name]:
                if self._scopes[call].module.startswith("doctor/"):
                    for said in call.args[:2]:
                        self._take(said, "fragment", "")
        for name in _CAUSES:
            for call in self._calls[name]:
                if call.args:
                    self._take(call.args[0], "fragment", "")
        for call in self._calls["super().__init__"]:
            owner = self._scopes[call].owner
            if owner is not None and owner.name in self._errors and call.args:
                self._take(call.args[0], "message", owner.name)
                self._take_keywords(call, owner.name)

    # --- reading ---

    def _index(self, node: ast.AST, scope: _Scope) -> None:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = _Scope(scope.module, child, scope.owner)
                self._functions[child.name].append((child, inner))
            elif isinstance(child, ast.ClassDef):
                inner = _Scope(scope.module, None, child)
            self._scopes[child] = inner
            if isinstance(child, ast.Call):
                self._calls[_called(child)].append(child)
                for keyword in child.keywords:
                    if keyword.arg in _CARRIERS:
                        self._carried[keyword.arg].append(keyword.value)
            elif isinstance(child, ast.Assign | ast.AnnAssign) and scope.function is None and child.value is not None:
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        self._constants[scope.module, target.id] = child.value
                        self._shared_constants[target.id].append(child.value)
            self._index(child, inner)

    def _find_error_classes(self) -> None:
        classes = [node for tree in self._trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        self._errors.add("GlmkitError")
        grown = 0
        while grown != len(self._errors):
            grown = len(self._errors)
            for one in classes:
                if any(isinstance(base, ast.Name) and base.id in self._errors for base in one.bases):
                    self._errors.add(one.name)

    def _take_error(self, call: ast.Call, name: str) -> None:
        place = _MESSAGE_AT.get(name, 0)
        if place is not None and len(call.args) > place:
            self._take(call.args[place], "message", name)
            hints = [text for keyword in call.keywords if keyword.arg == "hint" for text in self._near(keyword.value)]
            for message in self._near(call.args[place]):
                self.cures[message].update(hints)
        self._take_keywords(call, name)

    def _take_keywords(self, call: ast.Call, name: str) -> None:
        for keyword in call.keywords:
            if keyword.arg in ("message", "problems"):
                self._take(keyword.value, "message", name)
            elif keyword.arg == "hint":
                self._take(keyword.value, "hint", name)

    def _take(self, expression: ast.expr, kind: str, error: str) -> None:
        """Notes the templates of an expression; what they hold inside is noted on the way."""
        mark = (id(expression), kind, error)
        if mark in self._seen:
            return
        self._seen.add(mark)
        scope = self._scopes[expression]
        for text in self._texts(expression, kind, error):
            text = text.strip()
            if not (_is_said(text) if kind != "fragment" else _is_fragment(text)):
                continue
            if kind == "fragment" and scope.module in _OTHER_TEXTS:
                continue
            found = self.templates.setdefault((text, kind), Template(text, kind, error))
            found.places.add((scope.module, expression.lineno))

    # --- from an expression to its texts ---

    def _texts(self, node: ast.expr, kind: str, error: str) -> set[str]:
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else set()
        if isinstance(node, ast.JoinedStr):
            return self._joined(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = [self._alternatives(side, kind, error) for side in (node.left, node.right)]
            if _is_list(node.left) or _is_list(node.right):
                return sides[0] | sides[1]
            return {left + right for left, right in product(*sides)}
        if isinstance(node, ast.IfExp):
            return self._passed_on((node.body, node.orelse), kind, error)
        if isinstance(node, ast.BoolOp):
            return self._passed_on(node.values, kind, error)
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return self._passed_on(node.elts, kind, error)
        if isinstance(node, ast.Dict):
            return self._passed_on(node.values, kind, error)
        if isinstance(node, ast.Starred | ast.Subscript | ast.NamedExpr | ast.Await):
            return self._passed_on((node.value,), kind, error)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            return self._passed_on((node.elt,), kind, error)
        if isinstance(node, ast.Name):
            return self._named(node, kind, error)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, kind, error)
        return self._returned(node, kind, error) if isinstance(node, ast.Call) else set()

    def _near(self, node: ast.expr, depth: int = 3) -> set[str]:
        """The texts of an expression where it stands, to tell which cure belongs to which message."""
        scope, found = self._scopes[node], set()
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            return {text.strip() for text in self._texts(node, "fragment", "")}
        inside: Sequence[ast.expr] = ()
        if isinstance(node, ast.IfExp):
            inside = (node.body, node.orelse)
        elif isinstance(node, ast.List | ast.Tuple):
            inside = node.elts
        elif isinstance(node, ast.ListComp):
            inside = (node.elt,)
        elif isinstance(node, ast.Name) and scope.function is not None and node.id not in _parameters(scope.function):
            constant = self._constants.get((scope.module, node.id))
            inside = [*_values_of(node.id, scope.function), *([constant] if constant is not None else [])]
        for one in inside if depth else ():
            found |= self._near(one, depth - 1)
        return found

    def _passed_on(self, nodes: Sequence[ast.expr], kind: str, error: str) -> set[str]:
        """What stands elsewhere is noted with the place where it stands."""
        for node in nodes:
            self._take(node, kind, error)
        return set()

    def _alternatives(self, node: ast.expr, kind: str, error: str) -> set[str]:
        """The texts of one side of a sum; `{}` where they are not known."""
        if isinstance(node, ast.Constant | ast.JoinedStr):
            return self._texts(node, kind, error) or {"{}"}
        if isinstance(node, ast.BinOp):
            return self._texts(node, kind, error) or {"{}"}
        if isinstance(node, ast.IfExp):
            both = self._alternatives(node.body, kind, error) | self._alternatives(node.orelse, kind, error)
            return set(sorted(both)[:_MOST_ALTERNATIVES])
        self._take(node, "fragment", error)
        return {"{}"}

    def _joined(self, node: ast.JoinedStr) -> set[str]:
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                text += "{}"
                if part.conversion == -1 and part.format_spec is None:
                    self._take(part.value, "fragment", "")
        return {text}

    def _named(self, node: ast.Name, kind: str, error: str) -> set[str]:
        scope = self._scopes[node]
        if scope.function is not None:
            values = list(_values_of(node.id, scope.function))
            if values:
                return self._passed_on(values, kind, error)
            if node.id in _parameters(scope.function):
                self._take_arguments(scope, node.id, kind, error)
                return set()
        value = self._constants.get((scope.module, node.id))
        if value is None and node.id.isupper():
            return self._passed_on(self._shared_constants[node.id], kind, error)
        return self._passed_on([value], kind, error) if value is not None else set()

    def _take_arguments(self, scope: _Scope, name: str, kind: str, error: str) -> None:
        """Every call of a function passes on what stands for one of its parameters."""
        function = scope.function
        assert function is not None
        parameters = _parameters(function)
        place = parameters.index(name)
        if parameters[0] in ("self", "cls"):
            place -= 1
        default = _default_of(function, name)
        if default is not None:
            self._take(default, kind, error)
        called = scope.owner.name if function.name == "__init__" and scope.owner else function.name
        for call in self._calls[called]:
            if not function.name.startswith("_") or self._scopes[call].module == scope.module:
                given = [keyword.value for keyword in call.keywords if keyword.arg == name]
                positional = [*call.args[place : place + 1]] if not given else []
                for value in (*given, *positional):
                    self._take(value, kind, error)

    def _attribute(self, node: ast.Attribute, kind: str, error: str) -> set[str]:
        scope = self._scopes[node]
        if isinstance(node.value, ast.Name) and node.value.id == "self" and scope.owner is not None:
            own = [value for one in ast.walk(scope.owner) for value in _attribute_values(one, node.attr)]
            return self._passed_on(own, kind, error)
        if node.attr in _CARRIERS:
            return self._passed_on(self._carried[node.attr], kind, error)
        return set()

    def _returned(self, node: ast.Call, kind: str, error: str) -> set[str]:
        name = _called(node)
        if name in _OWN_TABLES:
            return set()
        if name in ("list", "sorted", "tuple", "dedent") and node.args:
            return self._passed_on(node.args[:1], kind, error)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "join" and node.args:
            self._take(node.args[0], "fragment", error)
            return set()
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "strip", "replace", "removesuffix"):
            return self._passed_on((node.func.value, *node.args[1:]), kind, error)
        module = self._scopes[node].module
        found = self._functions[name]
        near = [one for one in found if one[1].module == module] or (found if not name.startswith("_") else [])
        for function, _ in near[:3]:
            for inner in ast.walk(function):
                match inner:
                    case ast.Return(value=ast.expr() as value) | ast.Yield(value=ast.expr() as value):
                        if self._scopes[inner].function is function:
                            self._take(value, kind, error)
        return set()


# --- small questions about syntax ---


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Name):
        return call.func.id
    if isinstance(call.func, ast.Attribute):
        inner = call.func.value
        if call.func.attr == "__init__" and isinstance(inner, ast.Call) and _called(inner) == "super":
            return "super().__init__"
        return call.func.attr
    return ""


def _is_list(node: ast.expr) -> bool:
    return isinstance(node, ast.List | ast.ListComp)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    of = function.args
    return [one.arg for one in (*of.posonlyargs, *of.args, *of.kwonlyargs)]


def _default_of(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> ast.expr | None:
    of = function.args
    both = [*of.posonlyargs, *of.args]
    with_defaults = dict(zip((one.arg for one in both[len(both) - len(of.defaults) :]), of.defaults))
    with_defaults |= {one.arg: value for one, value in zip(of.kwonlyargs, of.kw_defaults) if value is not None}
    return with_defaults.get(name)


def _values_of(name: str, function: ast.AST) -> Iterator[ast.expr]:
    """Everything a local variable is set to, extended by or looped over."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if name in _names(target):
                    yield node.value
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
            if name in _names(node.target):
                yield node.value
        elif isinstance(node, ast.NamedExpr) and node.target.id == name:
            yield node.value
        elif isinstance(node, ast.For | ast.comprehension) and name in _names(node.target):
            yield node.iter
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if isinstance(of, ast.Name) and of.id == name and node.func.attr in ("append", "extend", "add"):
                yield from node.args


def _attribute_values(node: ast.AST, name: str) -> Iterator[ast.expr]:
    """What is assigned or appended to `self.name` in this statement."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Attribute) and target.attr == name for target in targets):
            yield node.value
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=filled), attr="append" | "extend")) if filled == name:
            yield from node.args


def _names(target: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _is_said(text: str) -> bool:
    """Whether there is anything to translate: English words outside values, not a setting or a line to copy."""
    words = text.replace("{}", " ")
    if (
        text in _FOR_MODELS
        or text.startswith(("<", "|", "```", "import ", "from "))
        or len(text.split()) == 1
        or re.search(r"[\u3000-\u9fff]|\n +\S.*\n +\S", text)
    ):
        return False
    if re.fullmatch(r"(glm|pip|rm|git|chmod)( \S+){1,2}", text):
        return False
    return re.search(r"(?<![\w.=/-])[a-z]{2,}(?![\w=/(-]|\.\w)", words) is not None


def _is_fragment(text: str) -> bool:
    return _is_said(text) and len(text.split()) > 1 and len(text) < 400


# --- the catalogue ---


def read_catalogue() -> dict[str, dict[str, str]]:
    """Area -> English template -> Chinese template."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(TRANSLATIONS.glob("*.json"))}


def interface_texts() -> set[str]:
    """What the help of the command says: of verbs, of their arguments and flags, and the titles."""
    from glmkit.verbs import command
    from glmkit.verbs.app import SECTIONS

    def inside(one: Any) -> Iterator[str]:
        yield one.help or ""
        yield from (getattr(parameter, "help", None) or "" for parameter in one.params)
        for inner in getattr(one, "commands", {}).values():
            yield from inside(inner)

    return {text for text in (*inside(command()), *SECTIONS) if text}


def missing_interface_texts() -> set[str]:
    """Those that the Chinese help would show in English."""
    known = read_catalogue()["interface"]
    return {text for text in interface_texts() if text not in known}


# --- the page ---

_PAGES = {"en": ROOT / "docs" / "troubleshooting.md", "zh": ROOT / "docs" / "troubleshooting.zh.md"}
# Title in both languages, and the areas below it; what stands nowhere is in the last group.
_GROUPS = (
    ("The command", "命令", ("cli", "verbs", "terminal", "terminal_loop", "completion", "line_editor", "translation")),
    ("Getting models", "获取模型", ("location", "downloads", "inventory")),
    ("Loading", "加载", ("checkpoint", "pickles", "weights", "loading", "shards", "models", "placement", "devices")),
    ("Tokenizers", "分词器", ("tokenizers",)),
    ("Chatting and generating", "对话与生成", ("chat", "engine", "encoding", "pipelines", "runtime")),
    ("Adapters and quantisation", "适配器与量化", ("adapters", "quant", "kernels", "parallel")),
    ("Data", "数据", ("data",)),
    ("Training", "训练", ("train", "trainer")),
    ("Evaluation", "评测", ("evaluate", "bench", "inspection", "picture")),
    ("Conversion and export", "转换与导出", ("export", "writing")),
    ("Server", "服务", ("serve",)),
    ("Web app, tools and code interpreter", "网页、工具与代码解释器", ("web", "tools", "interpreter")),
    ("Other", "其他", ()),
)
_HEADS = {
    "en": (
        "# Every error and its cure\n\n<!-- made by: python scripts/error_catalogue.py --write -->\n\n"
        "All messages that glmkit itself gives, from the same catalogue that the command, the server and the web app\n"
        "use. `…` stands for a value. Search this page for a few words of what you see. `--debug` behind a command\n"
        "shows where an error happened. What other programs say is in [the top 25 pains](pains.md).\n"
        "`GLMKIT_LANG=zh` or a Chinese locale gives the messages in Chinese, `GLMKIT_LANG=en` in English.\n",
        "| message | cure |",
    ),
    "zh": (
        "# 全部错误及其解决办法\n\n<!-- made by: python scripts/error_catalogue.py --write -->\n\n"
        "glmkit 自身给出的全部信息，与命令、服务和网页使用同一份目录。\n"
        "`…` 代表一个值。请在本页搜索所见信息中的几个词。"
        "在命令后加 `--debug` 可显示出错的位置。其他程序的报错见[二十五个常见问题](pains.md)。\n"
        "`GLMKIT_LANG=zh` 或中文语言环境使信息以中文显示，`GLMKIT_LANG=en` 以英文显示。\n",
        "| 信息 | 解决办法 |",
    ),
}


def page(language: str, sources: Sources) -> str:
    """The page of all errors.

    Args:
        language: "en" or "zh".
        sources: What was found in the sources.
    """
    known = {key: value for texts in read_catalogue().values() for key, value in texts.items()}
    rows: dict[str, list[str]] = defaultdict(list)
    for one in sorted(sources.templates.values(), key=lambda one: one.text.lower()):
        is_cure = (one.text, "hint") in sources.templates and one.text not in sources.cures
        if one.kind != "message" or is_cure or one.error in ("StepFailedError", "WireError"):
            continue
        area = min(one.areas)
        title = next((title for title, _, areas in _GROUPS if area in areas), _GROUPS[-1][0])
        cures = sorted(text for text in sources.cures.get(one.text, ()) if text and text.strip("{}"))
        english = f"`{_cell(one.text)}`"
        if language == "zh":
            said = f"{_cell(_in_order(known.get(one.text, one.text)))}<br>{english}"
            cures = [_in_order(known.get(text, text)) for text in cures]
        rows[title].append(f"| {english if language == 'en' else said} | {'<br>'.join(map(_cell, cures))} |")
    parts = [_HEADS[language][0]]
    for title, chinese, _ in _GROUPS:
        if rows[title]:
            heads = f"{_HEADS[language][1]}\n|---|---|"
            parts.append(f"## {title if language == 'en' else chinese}\n\n{heads}\n" + "\n".join(rows[title]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """A text in a table of Markdown."""
    for mark, instead in (("{}", "…"), ("\n", " "), ("|", "\\|"), ("`", "'"), ("<", "‹"), (">", "›"), ("*", "∗")):
        text = text.replace(mark, instead)
    return text.replace("‹br›", "<br>")


def _in_order(text: str) -> str:
    return re.sub(r"\{\d+\}", "{}", text)


def main() -> None:
    """Prints templates, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        sources = Sources()
        for language, path in _PAGES.items():
            path.write_text(page(language, sources), encoding="utf-8")
        return
    known = {key for area in read_catalogue().values() for key in area}
    listed: dict[str, list[str]] = defaultdict(list)
    if not arguments.areas or "interface" in arguments.areas:
        listed["interface"] = sorted(missing_interface_texts() if arguments.missing else interface_texts())
    for one in Sources().templates.values():
        area = min(one.areas)
        is_asked = not arguments.areas or area in arguments.areas
        if is_asked and not (arguments.missing and one.text in known) and one.text not in listed[area]:
            listed[area].append(one.text)
    json.dump({area: sorted(texts) for area, texts in sorted(listed.items())}, sys.stdout, ensure_ascii=False, indent=1)
    print()


if __name__ == "__main__":
    main()
