"""A conversation for people to read: Markdown, and one web page."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal

from glmkit.chat.messages import Message
from glmkit.chat.tools import CODE_TOOLS, TEXT_TOOLS, ToolCallError, parse_json_call, parse_tool_call
from glmkit.chat.transcript import Conversation

Language = Literal["en", "zh"]
DATA_URL = "data:image/png;base64,"
_LABELS: Mapping[Language, Mapping[str, str]] = {
    "en": {
        "system": "System",
        "user": "User",
        "assistant": "Assistant",
        "observation": "Result",
        "call": "Calls",
        "code": "Code",
        "figure": "Figure",
        "none": "Conversation",
    },
    "zh": {
        "system": "系统",
        "user": "用户",
        "assistant": "助手",
        "observation": "结果",
        "call": "调用",
        "code": "代码",
        "figure": "图",
        "none": "对话",
    },
}


def call_of(message: Message) -> dict[str, Any] | None:
    """The arguments of the call that a message is, whichever model wrote it; {"code": …} for code to run.

    Args:
        message: The message.

    Returns:
        None if it is no call, or none that can be read.
    """
    if message.role != "assistant" or not message.metadata:
        return None
    if message.arguments is None and message.metadata in TEXT_TOOLS:
        return {"code": message.content} if message.metadata in CODE_TOOLS.values() else None
    return arguments_of(message)


def arguments_of(message: Message) -> dict[str, Any] | None:
    """The arguments of a call, in whichever format the model wrote them; None if they cannot be read.

    Args:
        message: The call.
    """
    if message.arguments is not None:
        return message.arguments
    for read in (parse_tool_call, parse_json_call):
        try:
            return read(message.content)
        except ToolCallError:
            continue
    return None


def to_markdown(conversation: Conversation, language: Language = "en") -> str:
    """A conversation as Markdown; what was said stands in it as it is.

    Args:
        conversation: The conversation.
        language: Of the labels.
    """
    labels = _LABELS[language]
    lines = [f"# {_one_line(conversation.title) or labels['none']}", "", f"*{_about(conversation)}*", ""]
    for place, message in enumerate(conversation.messages):
        call = call_of(message)
        if call is not None:
            lines += [f"**{labels['call']} {_one_line(message.metadata)}**", "", fenced(*_shown_call(call)), ""]
        elif message.role == "observation":
            lines += [f"**{labels['observation']}**", "", fenced(message.content, ""), ""]
        elif message.content:
            lines += [f"**{labels[message.role]}**", "", message.content, ""]
        for number, image in enumerate(conversation.images.get(place, ()), start=1):
            url = DATA_URL + base64.b64encode(image).decode("ascii")
            lines += [f"![{labels['figure']} {number}]({url})", ""]
    return "\n".join(lines)


def _shown_call(call: Mapping[str, Any]) -> tuple[str, str]:
    """What people see of a call: its code or arguments, and their language."""
    if set(call) == {"code"} and isinstance(call["code"], str):
        lines = call["code"].strip().split("\n")
        bare = lines[1:-1] if len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```" else lines
        return "\n".join(bare), "python"
    return json.dumps(call, ensure_ascii=False, indent=1), "json"


def fenced(text: str, language: str) -> str:
    """A block of code in Markdown that nothing in the text can end.

    Args:
        text: The text.
        language: What it is coloured as.
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _about(conversation: Conversation) -> str:
    began = datetime.fromtimestamp(conversation.created, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"{_one_line(conversation.model)} · {began}"


_STYLE = """
body{max-width:46rem;margin:2rem auto;padding:0 1rem;line-height:1.6;color:#1f2328;background:#fff;
font-family:system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
h1{font-size:1.4rem}.about{color:#59636e}
section{margin:1rem 0;padding:.6rem 1rem;border-radius:.6rem;border:1px solid #d1d9e0}
.user{background:#eef4ff}h2{font-size:.85rem;margin:0 0 .3rem;color:#59636e}
p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
pre{margin:.4rem 0;padding:.6rem;overflow-x:auto;border-radius:.4rem;background:#f6f8fa;white-space:pre-wrap}
img{max-width:100%}summary{cursor:pointer}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}section{border-color:#3d444d}
.user{background:#15233b}pre{background:#161b22}h2,.about{color:#9198a1}}
"""


def to_web_page(conversation: Conversation, language: Language = "en") -> str:
    """A conversation as one file for a browser, with its images in it.

    It reaches nothing outside itself: every text is escaped, and its policy allows the images in it and no more.

    Args:
        conversation: The conversation.
        language: Of the labels.
    """
    labels, title = _LABELS[language], html.escape(_one_line(conversation.title))
    sections = [_section(conversation, place, labels) for place in range(len(conversation.messages))]
    return (
        f'<!doctype html>\n<html lang="{"zh-CN" if language == "zh" else "en"}">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title or labels['none']}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title or labels["none"]}</h1>\n<p class="about">{html.escape(_about(conversation))}</p>\n'
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _section(conversation: Conversation, place: int, labels: Mapping[str, str]) -> str:
    message = conversation.messages[place]
    images = "".join(
        f'<img alt="{labels["figure"]} {number}" src="{DATA_URL}{base64.b64encode(image).decode("ascii")}">'
        for number, image in enumerate(conversation.images.get(place, ()), start=1)
    )
    call = call_of(message)
    if call is not None:
        kind = labels["code" if message.metadata in CODE_TOOLS.values() else "call"]
        shown = f"<pre><code>{html.escape(_shown_call(call)[0])}</code></pre>"
        return (
            f"<section><details><summary>{kind}: {html.escape(message.metadata)}</summary>{shown}</details></section>"
        )
    if message.role in ("observation", "system"):
        if not message.content and not images:
            return ""
        opened = " open" if images else ""
        text = f"<pre>{html.escape(message.content)}</pre>"
        return f"<section><details{opened}><summary>{labels[message.role]}</summary>{text}{images}</details></section>"
    body = "".join(_block(text, fenced) for text, fenced in _divide_fences(message.content))
    return f'<section class="{message.role}"><h2>{labels[message.role]}</h2>{body}{images}</section>'


def _block(text: str, fenced: bool) -> str:
    return f"<pre><code>{html.escape(text)}</code></pre>" if fenced else f"<p>{html.escape(text)}</p>"


def _divide_fences(text: str) -> list[tuple[str, bool]]:
    """A text's parts in order, and whether each stands in a fence."""
    parts: list[tuple[list[str], bool]] = [([], False)]
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            parts.append(([], not parts[-1][1]))
        else:
            parts[-1][0].append(line)
    return [("\n".join(lines).strip("\n"), fenced) for lines, fenced in parts if any(line.strip() for line in lines)]
