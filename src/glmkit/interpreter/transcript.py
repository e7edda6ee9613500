"""From what a kernel publishes to what the model and the user see: bounded text and checked pictures.

Everything that comes in is untrusted. Text is cut while it arrives, so its size never matters; pictures are PNG files
rebuilt from the chunks a picture needs; HTML, SVG, LaTeX and scripts are left out.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
import sysconfig
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmkit.interpreter.wire import Received

MAX_IMAGE_BYTES = 4 << 20
MAX_IMAGE_SIDE_PIXELS = 4096
MAX_IMAGES = 8

_HALF_CHARACTERS = 1 << 15
"""What is kept of a long text: this much of its beginning and as much of its end."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""What a picture is made of. All other chunks are left out: they hold text, colour profiles, animations."""

_OWN_FRAMES = ("  File <string>:", "  File ipykernel/", "  File IPython/")

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Output:
    """What a run of code gave.

    Args:
        text: What it printed and its last value, or its error; bounded, without escape codes.
        images: The pictures it showed, PNG files with sides of at most 4,096 pixels.
        failed: Whether it raised an error, was stopped, or the kernel died.
        seconds: How long it took.
    """

    text: str
    images: tuple[bytes, ...]
    failed: bool
    seconds: float


class Transcript:
    """Collects what one run publishes."""

    def __init__(self) -> None:
        self.failed = False
        self.images: list[bytes] = []
        self._head = ""
        self._tail = ""
        self._cut_characters = 0
        self._fresh_line = True
        self._refused: dict[str, int] = {}

    def take(self, message: Received) -> None:
        """Takes a message; what is not output, or not as Jupyter describes it, is ignored.

        Args:
            message: What the kernel has published.
        """
        content = message.content
        if message.kind == "stream":
            self._write(content.get("text"))
        elif message.kind in ("execute_result", "display_data"):
            data = content.get("data")
            if isinstance(data, dict):
                self._show(data)
        elif message.kind == "error":
            self._fail(content)
        elif message.kind == "clear_output":
            self._head = self._tail = ""
            self._cut_characters, self._fresh_line = 0, True

    def refuse(self, what: str) -> None:
        """Notes something that is left out.

        Args:
            what: The reason; equal ones are counted.
        """
        self._refused[what] = self._refused.get(what, 0) + 1

    def text(self) -> str:
        """What the run printed, cleaned."""
        if self._cut_characters:
            cut = f"\n[… {self._cut_characters:,} characters left out …]\n"
            text = clean_text(self._head) + cut + clean_text(self._tail)
        else:
            text = clean_text(self._head + self._tail)
        notes = [f"[{number} × {what}]" if number > 1 else f"[{what}]" for what, number in self._refused.items()]
        return "\n".join(part for part in (text.rstrip(), *notes) if part)

    def _write(self, text: Any) -> None:
        if not isinstance(text, str) or not text:
            return
        room = _HALF_CHARACTERS - len(self._head)
        self._head += text[:room]
        if len(text) > room:
            tail = self._tail + text[room:]
            self._cut_characters += max(0, len(tail) - _HALF_CHARACTERS)
            self._tail = tail[-_HALF_CHARACTERS:]
        self._fresh_line = text.endswith("\n")

    def _write_block(self, text: Any) -> None:
        if isinstance(text, str) and text:
            self._write(("" if self._fresh_line else "\n") + text + "\n")

    def _show(self, data: Mapping[str, Any]) -> None:
        picture = data.get("image/png")
        if picture is None:
            self._write_block(data.get("text/plain"))
            return
        if len(self.images) >= MAX_IMAGES:
            self.refuse(f"picture left out: only the first {MAX_IMAGES} are shown")
            return
        image = read_image(picture)
        if image is None:
            self.refuse(
                f"picture left out: not a PNG of at most {MAX_IMAGE_SIDE_PIXELS:,} pixels a side "
                f"and {MAX_IMAGE_BYTES >> 20} MB"
            )
            return
        self.images.append(image)

    def _fail(self, content: Mapping[str, Any]) -> None:
        self.failed = True
        lines = content.get("traceback")
        if isinstance(lines, list) and lines:
            text = "\n".join(str(line).rstrip("\n") for line in lines[:1000])
            if len(text) > 2 * _HALF_CHARACTERS:  # shortening takes a time that grows with the text
                text = f"{text[:_HALF_CHARACTERS]}\n{text[-_HALF_CHARACTERS:]}"
            self._write_block(shorten_traceback(text))
        else:
            self._write_block(f"{content.get('ename')}: {content.get('evalue')}")


def clean_text(text: str) -> str:
    """Text as a terminal would show it in the end.

    Args:
        text: With escape codes, carriage returns and whatever else a program prints.

    Returns:
        Without them; a line that was written over shows what was written last. Always valid Unicode.
    """
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _CONTROLS.sub("", text).encode("utf-8", "replace").decode("utf-8")


def shorten_traceback(traceback: str) -> str:
    """A traceback as its reader needs it: a model sees about 1,000 characters of what its code gave.

    Args:
        traceback: As IPython's mode `Plain` writes it.

    Returns:
        Its lines without the folders of this installation. Of frames outside the code that was run, only the innermost
        one before each end is kept.
    """
    paths = sysconfig.get_paths()
    for name in ("purelib", "platlib", "stdlib", "platstdlib"):
        traceback = traceback.replace(paths[name] + "/", "")
    shown: list[str] = []
    inner: list[str] = []  # the frame of a library that was read last
    in_library = False
    for line in traceback.split("\n"):
        if line.startswith("  File ") and not line.startswith(_OWN_FRAMES):
            in_library, inner = True, [line]
        elif line.startswith("  ") and line[2:3] != " ":
            in_library, inner = line.startswith("  File "), []
        if not line.startswith("  "):
            shown += [*inner, line]
            in_library, inner = False, []
        elif not in_library:
            shown.append(line)
        elif inner and line != inner[0]:
            inner.append(line)
    return "\n".join(shown)


def read_image(data: object) -> bytes | None:
    """Checks a picture without decoding it.

    Args:
        data: Base64 text, as Jupyter sends a picture.

    Returns:
        A PNG file with the same pixels and nothing else in it; None if it is not one, or too large.
    """
    if not isinstance(data, str) or len(data) > MAX_IMAGE_BYTES * 3 // 2:
        return None
    try:
        return _rebuild_png(base64.b64decode(data.replace("\n", ""), validate=True))
    except (ValueError, binascii.Error, struct.error):
        return None


def _rebuild_png(data: bytes) -> bytes | None:
    """The file again with only the chunks of `_CHUNKS`; raises struct.error or ValueError if it is broken."""
    if len(data) > MAX_IMAGE_BYTES or not data.startswith(_SIGNATURE):
        return None
    kept, position = [_SIGNATURE], len(_SIGNATURE)
    names: list[bytes] = []
    while not names or names[-1] != b"IEND":
        size, name = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + size + 12]
        if len(chunk) != size + 12 or struct.unpack(">I", chunk[-4:])[0] != zlib.crc32(chunk[4:-4]):
            return None
        position += len(chunk)
        if name in _CHUNKS:
            names.append(name)
            kept.append(chunk)
    width, height = struct.unpack(">II", data[16:24])
    fits = 0 < width <= MAX_IMAGE_SIDE_PIXELS and 0 < height <= MAX_IMAGE_SIDE_PIXELS
    return b"".join(kept) if fits and names[0] == b"IHDR" and names.count(b"IHDR") == 1 and b"IDAT" in names else None
