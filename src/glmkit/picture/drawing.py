"""The picture of a scene, as a PNG: the matrix of who sees whom, the tokens above it, their positions below it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmkit.errors import MissingDependencyError
from glmkit.picture.scene import Scene
from glmkit.writing import write_bytes_atomic

_BLUE, _GREY, _UNSEEN = "#9ecae8", "#e4e4e4", "#f5f5f5"
_SPAN_COLOURS = ("#f4b678", "#a5d68f", "#cdb2e3", "#f2a0a0", "#dcd27a", "#8fd3cf")
_LEGEND = {
    "A": "part A: all of it sees all of it",
    "B": "part B: seen by what follows",
    "prompt": "prompt: seen by what follows",
    "answer": "answer: seen by what follows",
}
_CELL_INCHES, _LONGEST_LABEL = 0.25, 16
# Fonts with Chinese characters, as systems call them.
_FONTS = """Noto Sans CJK SC,Noto Sans SC,Source Han Sans SC,Source Han Sans CN,WenQuanYi Zen Hei,WenQuanYi Micro Hei,
Droid Sans Fallback,PingFang SC,Hiragino Sans GB,STHeiti,Microsoft YaHei,SimHei,Arial Unicode MS"""


def draw(scene: Scene, path: str | Path) -> tuple[str, ...]:
    """Draws a scene.

    Args:
        scene: The scene.
        path: The PNG to write; it is seen either not at all or whole.

    Returns:
        Tokens that no font of this machine can write; the picture has their ids instead.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "train")
    original = [token for token, _ in scene.original]
    fonts, unwritten = _fonts([*scene.tokens, *original])
    known = dict(zip(scene.tokens, scene.ids))
    shown = {token: _number(token, known.get(token)) if token in unwritten else _cut(token) for token in known}
    size, rows = len(scene.tokens), len(scene.positions)
    left = 0.3 * max(map(len, shown.values())) + 0.8  # cells for the longest label
    above = left + 1.5 + (left + 2.5 if original else 0)
    below = size + rows + 3.3
    right = max(size, len(original), 10, 0.36 * len(scene.title) - left) + 0.5
    sheet = _Sheet(left, above, right, below, fonts)
    sheet.write(0.4 - left, 0.7 - above, scene.title, "left", weight="bold")
    if original:
        top = -left - 1.5
        sheet.cells(top, [[_span_colour(span) if span else _GREY for _, span in scene.original]])
        sheet.write(-0.3, top + 0.5, "text", "right")
        sheet.write_upwards(top - 0.2, [_cut(shown[token]) for token in original])
    colours = [_colour(part, span) for part, span in zip(scene.parts, scene.spans)]
    sheet.cells(0, [[colour if seen else _UNSEEN for colour, seen in zip(colours, row)] for row in scene.visible])
    sheet.write_upwards(-0.2, [shown[token] for token in scene.tokens])
    for row, token in enumerate(scene.tokens):
        sheet.write(-0.3, row + 0.5, shown[token], "right")
    # In the rows of positions a mask token has the colour of the blank it stands for.
    sheet.cells(size + 0.5, [[_span_colour(span) if span else _BLUE for span in scene.spans]] * rows)
    for row, positions in enumerate(scene.positions):
        sheet.write(-0.3, size + 1 + row, f"row {row}" if rows > 1 else "position", "right")
        for column, position in enumerate(positions):
            sheet.write(column + 0.5, size + 1 + row, str(position), "center")
    for number, part in enumerate(dict.fromkeys(scene.parts)):
        sheet.cells(size + rows + 1 + number, [[_colour(part, 1)]])
        sheet.write(1.3, size + rows + 1.5 + number, _LEGEND[part], "left")
    write_bytes_atomic(path, sheet.png())
    return tuple(sorted(unwritten))


class _Sheet:
    """What is drawn on, measured in cells from the upper left corner of the matrix, downwards."""

    def __init__(self, left: float, above: float, right: float, below: float, fonts: list[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._edges, self._fonts = (-left, right, below, -above), fonts
        self._figure = Figure(figsize=((left + right) * _CELL_INCHES, (above + below) * _CELL_INCHES))
        FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.axis("off")

    def cells(self, top: float, rows: Sequence[Sequence[str]]) -> None:
        from matplotlib.colors import to_rgb

        columns, bottom = len(rows[0]), top + len(rows)
        pixels = [[to_rgb(colour) for colour in row] for row in rows]
        self._axes.imshow(pixels, extent=(0, columns, bottom, top), aspect="auto", interpolation="nearest")
        self._axes.hlines([top + row for row in range(len(rows) + 1)], 0, columns, "white", linewidth=0.8)
        self._axes.vlines(range(columns + 1), top, bottom, "white", linewidth=0.8)

    def write(self, column: float, row: float, text: str, across: str, up: str = "center", **how: Any) -> None:
        style: dict[str, Any] = {"family": self._fonts, "fontsize": 8, "ha": across, "va": up, "parse_math": False}
        self._axes.text(column, row, text, **style, **how)  # a dollar in a text is a dollar

    def write_upwards(self, bottom: float, texts: Sequence[str]) -> None:
        for column, text in enumerate(texts):
            self.write(column + 0.5, bottom, text, "center", "bottom", rotation=90)

    def png(self) -> bytes:
        self._axes.axis(self._edges)
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png", dpi=100, pil_kwargs={"optimize": True})
        return buffer.getvalue()


def _colour(part: str, span: int) -> str:
    return {"A": _BLUE, "prompt": _BLUE}.get(part) or _span_colour(span)


def _span_colour(span: int) -> str:
    return _SPAN_COLOURS[(span - 1) % len(_SPAN_COLOURS)]


def _cut(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _number(token: str, known: int | None) -> str:
    return f"#{known}" if known is not None else " ".join(f"U+{ord(character):04X}" for character in token)


def _fonts(texts: Sequence[str]) -> tuple[list[str], set[str]]:
    """The fonts to write with, and the texts that have a character which none of them has."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    wanted = [name for name in _FONTS.replace("\n", "").split(",") if name in installed]
    fonts = ["DejaVu Sans", *wanted[:1]]  # the first comes with matplotlib
    faces = [font_manager.get_font(font_manager.findfont(name)) for name in fonts]
    characters = {character for text in texts for character in text}
    lost = {each for each in characters if not any(face.get_char_index(ord(each)) for face in faces)}
    return fonts, {text for text in texts if lost & set(text)}
