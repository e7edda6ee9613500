"""Conversations in forms that others read: Markdown, JSON with OpenAI's messages, a web page; and JSON read back.

    ours                                     OpenAI's
    system message with tools                system message; "tools" beside the messages
    call of a tool, observation              assistant with tool_calls, tool
    code to run, what it printed and drew    a call of "interpreter" or "python" with {"code": …}, tool with image parts

What is read may come from anybody: it is bounded and checked, gets an id of its own, and nothing in it is run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from glmkit.chat.messages import Message
from glmkit.chat.printing import DATA_URL, Language, call_of, to_markdown, to_web_page
from glmkit.chat.store import MAX_IMAGE_BYTES
from glmkit.chat.tools import CODE_TOOLS, MAX_DEPTH, ToolCallError, depth_of, documented_tools, parse_json_call
from glmkit.chat.transcript import MAX_TITLE_CHARACTERS, Conversation, Mode, parse_conversation, read_image
from glmkit.errors import UsageError

Form = Literal["md", "json", "html"]
MEDIA_TYPES: Mapping[str, str] = {"md": "text/markdown", "json": "application/json", "html": "text/html"}
MAX_IMPORT_CHARACTERS = 32 * 2**20
MAX_MESSAGES = 10_000


def export(conversation: Conversation, form: Form, language: Language = "en") -> str:
    """Writes a conversation in a form that others read.

    Args:
        conversation: The conversation.
        form: "md" (Markdown), "json" (OpenAI's messages) or "html" (one web page, with its images in it).
        language: Of the labels.

    Raises:
        UsageError: There is no such form.
    """
    if form == "json":
        return json.dumps(_openai_form(conversation), ensure_ascii=False, indent=1) + "\n"
    if form == "md":
        return to_markdown(conversation, language)
    if form == "html":
        return to_web_page(conversation, language)
    raise UsageError(f"no form {form!r}; expected one of {', '.join(get_args(Form))}")


# --- OpenAI's messages ---


def _openai_form(conversation: Conversation) -> dict[str, Any]:
    written: list[dict[str, Any]] = []
    tools: list[Any] = []
    pending = ""  # id of the call whose result comes next
    for place, message in enumerate(conversation.messages):
        if message.tools is not None:
            tools += _wrapped(message.tools)
        call = call_of(message)
        if call is not None:
            pending = f"call_{place}"
            function = {"name": message.metadata, "arguments": json.dumps(call, ensure_ascii=False)}
            calls = [{"id": pending, "type": "function", "function": function}]
            written.append({"role": "assistant", "content": None, "tool_calls": calls})
        elif message.role == "observation":
            content = _with_images(message.content, conversation.images.get(place, ()))
            written.append({"role": "tool", "tool_call_id": pending, "content": content})
        elif message.content or message.role != "system":
            header = f"{message.metadata}\n" if message.metadata else ""
            written.append({"role": message.role, "content": header + message.content})
    return {
        "title": conversation.title,
        "model": conversation.model,
        "mode": conversation.mode,
        "created": conversation.created,
        "messages": written,
        **({"tools": tools} if tools else {}),
    }


def _wrapped(tools: list[Any] | dict[str, Any]) -> list[Any]:
    items = list(tools.values()) if isinstance(tools, dict) else tools
    plain = [tool for tool in documented_tools(items) if not (isinstance(tool, dict) and tool.get("type") == "python")]
    return [{"type": "function", "function": tool} for tool in plain]


def _with_images(text: str, images: tuple[bytes, ...]) -> Any:
    if not images:
        return text
    urls = [DATA_URL + base64.b64encode(image).decode("ascii") for image in images]
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


# --- reading ---


def import_conversation(text: str) -> Conversation:
    """Reads a conversation that somebody has.

    Args:
        text: JSON: what `export` wrote; a file of the store; {"messages": […]} or a list, of OpenAI's messages or ours.

    Returns:
        The conversation, with an id of its own.

    Raises:
        UsageError: It is something else, too long or too deep; the message says what and where.
    """
    if len(text) > MAX_IMPORT_CHARACTERS:
        raise UsageError(f"the file has {len(text):,} characters, expected at most {MAX_IMPORT_CHARACTERS:,}")
    try:
        content = json.loads(text.encode("utf-8", "replace").decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the file is no JSON: {str(error) or type(error).__name__:.100}") from error
    if isinstance(content, dict) and "schema" in content:
        try:
            kept = parse_conversation(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"the file is no conversation: {error!s:.200}") from error
        return Conversation(kept.model, kept.messages, title=kept.title, mode=kept.mode, images=kept.images)
    if isinstance(content, list):
        content = {"messages": content}
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise UsageError("the file has no list of messages", hint='expected {"messages": [{"role": …, "content": …}]}')
    return _Reading(content).conversation()


class _Reading:
    """A conversation while it is read.

    Args:
        content: The file's content, with its messages.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._messages: list[Message] = []
        self._images: dict[int, tuple[bytes, ...]] = {}
        self._image_bytes = 0
        self._waiting: list[tuple[str, Message]] = []  # calls without a result so far, with their ids

    def conversation(self) -> Conversation:
        """Reads all of it."""
        given = self._content["messages"]
        if len(given) > MAX_MESSAGES:
            raise UsageError(f"the file has {len(given):,} messages, expected at most {MAX_MESSAGES:,}")
        for number, item in enumerate(given, start=1):
            self._read(item, f"message {number}")
        self._messages += [call for _, call in self._waiting]
        self._take_tools(self._content.get("tools"))
        title, model, mode = (self._content.get(name) or "" for name in ("title", "model", "mode"))
        if not isinstance(title, str) or not isinstance(model, str):
            raise UsageError("title or model is no text")
        return Conversation(
            model=_text(str(model)[:1000]),
            messages=tuple(self._messages),
            title=" ".join(_text(title).split())[:MAX_TITLE_CHARACTERS],
            mode=cast(Mode, mode) if mode in get_args(Mode) else self._mode(),
            images=self._images,
        )

    def _mode(self) -> Mode:
        if any(message.metadata in CODE_TOOLS.values() for message in self._messages):
            return "code"
        return "tools" if any(one.metadata or one.tools for one in self._messages) else "chat"

    def _read(self, item: Any, place: str) -> None:
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise UsageError(f"{place} is {str(item)[:80]}; expected an object with role and content")
        said: str = item["role"]
        role = {"developer": "system", "function": "observation", "tool": "observation"}.get(said, said)
        if role not in ("system", "user", "assistant", "observation"):
            raise UsageError(f"{place} has the role {role[:40]!r}; expected system, user, assistant or tool")
        text, images = self._parts(item.get("content"), place)
        if role == "observation":
            self._answer(item.get("tool_call_id"))
            self._add(Message("observation", text), images)
            return
        if self._waiting:
            raise UsageError(f"{place} comes before the result of the call of {self._waiting[0][1].metadata}")
        metadata = item.get("metadata") or ""
        if role != "assistant":
            tools = item.get("tools")
            self._add(Message(role, text), images)
            self._take_tools(tools)
            return
        calls = self._calls(item, place)
        if text or metadata or not calls:
            if not isinstance(metadata, str):
                raise UsageError(f"{place}: metadata is no text")
            arguments = self._plain(item["arguments"], place) if item.get("arguments") is not None else None
            self._add(Message("assistant", text, _text(metadata), arguments=arguments), images)
        self._waiting = calls

    def _add(self, message: Message, images: tuple[bytes, ...] = ()) -> None:
        if images:
            self._images[len(self._messages)] = images
        self._messages.append(message)

    def _answer(self, id: Any) -> None:
        """Puts the call in front of its result: by its id, else the first that waits."""
        place = next((place for place, (known, _) in enumerate(self._waiting) if known and known == id), 0)
        if self._waiting:
            self._add(self._waiting.pop(place)[1])

    def _calls(self, item: Mapping[str, Any], place: str) -> list[tuple[str, Message]]:
        given = item.get("tool_calls") or []
        if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
            raise UsageError(f"{place}: tool_calls is no list of objects")
        found = [(str(call.get("id") or ""), call.get("function")) for call in given]
        if item.get("function_call") is not None:
            found.append(("", item["function_call"]))
        return [(id, self._call(function, place)) for id, function in found]

    def _call(self, function: Any, place: str) -> Message:
        called: Mapping[str, Any] = function if isinstance(function, dict) else {}
        name, arguments = called.get("name"), called.get("arguments")
        if not isinstance(name, str) or not name or len(name) > 128 or "\n" in name:
            raise UsageError(f"{place}: a call names no tool")
        if isinstance(arguments, str):
            try:
                arguments = parse_json_call(_text(arguments) or "{}")
            except ToolCallError as error:
                raise UsageError(f"{place}: {error.message}") from error
        arguments = self._plain(arguments, place)
        code = arguments.get("code")
        if name in CODE_TOOLS.values() and isinstance(code, str):
            return Message("assistant", _text(code), name)
        return Message("assistant", "", _text(name), arguments=arguments)

    def _plain(self, arguments: Any, place: str) -> dict[str, Any]:
        if not isinstance(arguments, dict):
            raise UsageError(f"{place}: the arguments of a call are no object")
        if depth_of(arguments) > MAX_DEPTH:
            raise UsageError(f"{place}: the arguments of a call are nested deeper than {MAX_DEPTH} levels")
        return arguments

    def _take_tools(self, tools: Any) -> None:
        """Gives tools to the system message, which is made if there is none."""
        if not tools:
            return
        if not isinstance(tools, (list, dict)) or depth_of(tools) > MAX_DEPTH + 4:
            raise UsageError("the tools are neither a list nor an object, or nested too deep")
        if not self._messages or self._messages[0].role != "system":
            self._messages.insert(0, Message("system", ""))
            self._images = {place + 1: images for place, images in self._images.items()}
        known = documented_tools(tools)
        plain = list(known) if not isinstance(known, Mapping) else dict(known)
        self._messages[0] = Message("system", self._messages[0].content, tools=plain)

    def _parts(self, content: Any, place: str) -> tuple[str, tuple[bytes, ...]]:
        """Text and images of a content: text, nothing, or a list of parts."""
        if content is None or isinstance(content, str):
            return _text(content or ""), ()
        texts, images = [], []
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
                texts.append(_text(part["text"]))
            elif isinstance(part, dict) and kind == "image_url" and isinstance(part.get("image_url"), dict):
                images.append(self._image(part["image_url"].get("url"), place))
            else:
                raise UsageError(f"{place}: a part of the content is {str(part)[:80]}; expected text or an image")
        return "".join(texts), tuple(images)

    def _image(self, url: Any, place: str) -> bytes:
        if not isinstance(url, str) or not url.startswith(DATA_URL):  # others would have to be fetched
            raise UsageError(f"{place}: an image is no PNG in the file itself")
        try:
            image = read_image(url[len(DATA_URL) :])
        except ValueError as error:
            raise UsageError(f"{place}: {error}") from error
        self._image_bytes += len(image)
        if self._image_bytes > MAX_IMAGE_BYTES:
            raise UsageError(f"the images have more than {MAX_IMAGE_BYTES:,} bytes")
        return image


def _text(text: str) -> str:
    """Text that can be written and has ids: half a pair of surrogates becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
