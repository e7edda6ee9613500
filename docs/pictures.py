"""Draws the pictures of "GLM in one evening" from the models themselves: python docs/pictures.py [FOLDER]

Each function is a picture, called what its file is called. What it draws is computed where it stands, with fixed seeds,
by glm-nano or by the code that all models share. A picture is an SVG with rounded numbers, so that drawing it again
gives the same file.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

import glmkit
from glmkit.chat.messages import Message
from glmkit.chat.templates import conversation_ids, prompt_ids
from glmkit.data.blank_infilling import BlankIds, BlankMaker
from glmkit.data.corpus import Row
from glmkit.data.mixtures import Mixture
from glmkit.data.records import read_records
from glmkit.engine.sampling import SamplingOptions, warp
from glmkit.location import builtin
from glmkit.models.layers import rotary_angles, rotate_pairs
from glmkit.picture.scene import describe
from glmkit.quant.linear import unpack_nibbles
from glmkit.quant.search import quantize_groups
from glmkit.train.blocks import MethodBlock
from glmkit.train.lora import LoraMethod

INK, GREY, PALE, BLUE = "#24292f", "#8c959f", "#eef1f4", "#4b8bd4"
COLOURS = ("#9ecae8", "#f4b678", "#a5d68f", "#cdb2e3", "#f2a0a0", "#dcd27a", "#8fd3cf")
COLOURS_OF_GROUPS = ("#2f6fb5", "#c7651a")
ROLES = {"<|system|>": "#dcd27a", "<|user|>": "#9ecae8", "<|assistant|>": "#a5d68f", "<|observation|>": "#f4b678"}


class Sheet:
    """An SVG in the making, on white so that it can be read on a dark page too.

    Args:
        width: In pixels.
        height: In pixels.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []
        self.cells: dict[str, list[str]] = {}  # colour -> squares; one path for each colour makes small files

    def box(self, x: float, y: float, width: float, height: float, colour: str, **more: str) -> None:
        """A rectangle; `more` are attributes of SVG."""
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        self.parts.append(f'<rect {place} fill="{colour}"{extra}/>')

    def cell(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A rectangle of a large field of them; fields lie below everything else."""
        corner, size = f"M{_n(x)} {_n(y)}", f"h{_n(width)}v{_n(height)}h{_n(-width)}z"
        self.cells.setdefault(colour, []).append(corner + size)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.5) -> None:
        """A line through points."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{colour}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: object,
        *,
        size: float = 12,
        anchor: str = "start",
        colour: str = INK,
        turn: int = 0,
    ) -> None:
        """A line of text; anchor is start, middle or end."""
        turned = f' transform="rotate({turn} {_n(x)} {_n(y)})"' if turn else ""
        where = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}" fill="{colour}"{turned}'
        self.parts.append(f"<text {where}>{escape(str(text))}</text>")

    def svg(self) -> str:
        """The file."""
        size = f'width="{_n(self.width)}" height="{_n(self.height)}" viewBox="0 0 {_n(self.width)} {_n(self.height)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
        ground = f'<rect width="{_n(self.width)}" height="{_n(self.height)}" rx="8" fill="#ffffff"/>'
        fields = [f'<path fill="{colour}" d="{"".join(squares)}"/>' for colour, squares in self.cells.items()]
        return "\n".join([head, ground, *fields, *self.parts, "</svg>"]) + "\n"


def _n(value: float) -> str:
    """A number without the places that differ from machine to machine."""
    return f"{float(value):.1f}".removesuffix(".0")


def _shade(share: float, colour: str = BLUE) -> str:
    """A colour between white (0) and itself (1), in 32 steps."""
    share = round(max(0.0, min(1.0, float(share))) * 32) / 32
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in parts)


@cache
def nano() -> tuple[Any, Any]:
    """The built-in model in float32, computed by torch."""
    model, tokenizer = glmkit.load("glm-nano", dtype="float32", kernels="torch")
    return model, tokenizer


def _shown(token: int) -> str:
    """A token as it is written on a picture."""
    text = str(nano()[1].convert_ids_to_tokens(token)) or "</s>"
    return {"<0x0A>": "↵"}.get(text, text)


def _width_of(text: str) -> float:
    """About how wide a text of size 12 is."""
    return sum(12.5 if ord(character) > 0x2E80 else 7.2 for character in text)


def tokens() -> Sheet:
    """Two sentences in boxes, with their ids."""
    tokenizer = nano()[1]
    sheet = Sheet(640, 176)
    for row, text in enumerate(("The weather in Paris is nice today.", "今天巴黎天气很好。")):
        ids = tokenizer.encode_text(text)
        y = 16 + 80 * row
        sheet.text(16, y + 8, f"{text}   {len(text.encode())} bytes, {len(ids)} tokens", colour=GREY)
        x = 16.0
        for number, token in enumerate(ids):
            width = max(34.0, _width_of(_shown(token)) + 10)
            sheet.box(x, y + 18, width, 24, COLOURS[number % len(COLOURS)], rx="4")
            sheet.text(x + width / 2, y + 35, _shown(token), anchor="middle")
            sheet.text(x + width / 2, y + 57, token, size=11, anchor="middle", colour=GREY)
            x += width + 4
    return sheet


def blanks() -> Sheet:
    """A text, what is cut out of it, parts A and B, and both rows of positions."""
    names = ["eos", "[CLS]", "[MASK]", "[sMASK]", "[gMASK]", "sop", "eop"]
    names += "the quick brown fox jumps over a lazy dog and then walks home in the evening sun".split()
    ids = [1, *range(7, len(names))]
    maker = BlankMaker(BlankIds(*range(7)), Mixture(bert_prob=1.0, bert_ratio=0.3), lambda token: False, 64)
    (sample,) = maker.make([Row(ids, [1] * len(ids))], random.Random(4))
    spans = {place: 1 + number for number, place in enumerate(dict.fromkeys(sample.positions[sample.sep :]))}
    span_of = {}  # token -> its span
    for place in range(sample.sep, len(sample.targets)):
        span_of[sample.targets[place]] = spans[sample.positions[place]]
    cell = 37.4
    sheet = Sheet(16 + 58 + cell * max(len(ids), len(sample.input_ids)), 216)

    def row(y: float, label: str, cells: Sequence[tuple[str, str]]) -> None:
        sheet.text(12, y + 16, label, size=11, colour=GREY)
        for column, (text, colour) in enumerate(cells):
            sheet.box(70 + cell * column, y, cell - 2, 24, colour, rx="3")
            sheet.text(70 + cell * (column + 0.5) - 1, y + 16, text, size=9, anchor="middle")

    row(16, "text", [(names[token], COLOURS[span_of[token]] if token in span_of else PALE) for token in ids])
    both = []
    for place, token in enumerate(sample.input_ids):
        span = spans.get(sample.positions[place], 0) if place >= sample.sep or names[token] == "[MASK]" else 0
        both.append((names[token], COLOURS[span] if span else PALE))
    sheet.text(70, 70, "part A: every token sees all of it", size=11, colour=GREY)
    sheet.text(70 + cell * sample.sep, 70, "part B: sees part A and what stands before it", size=11, colour=GREY)
    row(78, "input", both)
    row(108, "row 0", [(str(number), both[place][1]) for place, number in enumerate(sample.positions)])
    row(138, "row 1", [(str(number), both[place][1]) for place, number in enumerate(sample.block_positions)])
    targets = [("" if place < sample.sep else names[token]) for place, token in enumerate(sample.targets)]
    row(178, "target", [(text, both[place][1] if text else "#ffffff") for place, text in enumerate(targets)])
    return sheet


def masks() -> Sheet:
    """Who sees whom in GLM, ChatGLM-6B and glm-nano."""
    scenes = [
        ("GLM: a text with two blanks", describe("glm-large", "abcdefghijkl", seed=23)),
        ("ChatGLM-6B: a question", describe("chatglm-6b", "Hello?")),
        ("glm-nano: a question", describe("glm-nano", "Who are you?")),
    ]
    sheet, left, of_part = Sheet(688, 280), 16.0, (BLUE, "#e08a3c", "#5aa04a")
    for title, scene in scenes:
        size = len(scene.tokens)
        cell = 200 / size
        sheet.text(left, 26, title, size=13)
        for row, seen in enumerate(scene.visible):
            for column, sees in enumerate(seen):
                colour = of_part[scene.spans[column] if scene.parts[column] in ("B", "answer") else 0]
                colour = colour if sees else PALE
                sheet.cell(left + cell * column, 40 + cell * row, cell - 1, cell - 1, colour)
        share = sum(map(sum, scene.visible)) / size**2
        sheet.text(left, 262, f"{size} tokens, {share:.0%} of the cells are seen", size=11, colour=GREY)
        left += 226
    return sheet


def positions() -> Sheet:
    """Rows of positions of GLM, ChatGLM-6B and glm-nano, drawn as heights."""
    scenes = [
        ("GLM: a [MASK] b", describe("glm-large", "a [MASK] b")),
        ("ChatGLM-6B: Hello?", describe("chatglm-6b", "Hello?")),
        ("glm-nano: Who are you?", describe("glm-nano", "Who are you?")),
    ]
    sheet, left = Sheet(688, 240), 16.0
    for title, scene in scenes:
        size = len(scene.tokens)
        cell = 206 / size
        sheet.text(left, 26, title, size=13)
        for number, row in enumerate(scene.positions):
            colour = (BLUE, "#e08a3c")[number]
            for column, position in enumerate(row):
                x, y = left + cell * (column + 0.5), 190 - 10.5 * position
                sheet.dot(x, y, colour, 3.5)
                sheet.text(x, 212 + 16 * number, position, size=8.5, anchor="middle", colour=colour)
        answer = next((c for c, part in enumerate(scene.parts) if part in ("B", "answer")), size)
        sheet.line([(left + cell * answer, 36), (left + cell * answer, 198)], GREY, 0.8)
        left += 226
    for number, colour in enumerate((BLUE, "#e08a3c")):
        sheet.dot(476, 56 + 16 * number, colour)
        sheet.text(484, 60 + 16 * number, f"row {number}", size=11)
    return sheet


def rotary() -> Sheet:
    """Cosines of glm-nano's angles by position and channel, and the score of a query and a key over their distance."""
    cos, _ = rotary_angles(torch.arange(128)[None], 16, 10_000)
    sheet = Sheet(688, 250)
    sheet.text(16, 24, "cosines: positions 0 to 126 down, 32 channels across", size=12)
    for row in range(64):
        for channel in range(32):
            value = float(cos[0, 2 * row, channel // 2]) if channel < 16 else 1.0
            sheet.cell(16 + 10 * channel, 34 + 3 * row, 9.5, 3, _shade((value + 1) / 2))
    sheet.text(16, 242, "turned", size=11, colour=GREY)
    sheet.text(176, 242, "not turned", size=11, colour=GREY)
    torch.manual_seed(0)
    vector = torch.randn(32)
    vector[16:] = 0
    distances = torch.arange(0, 200)
    turned = rotate_pairs(vector.expand(1, 200, 1, 32), *rotary_angles(distances[None], 16, 10_000))[0, :, 0]
    scores = (turned @ vector / (vector @ vector)).tolist()
    sheet.text(370, 24, "score of a vector with itself, over the distance", size=12)
    sheet.line([(370, 140), (670, 140)], GREY, 0.7)
    sheet.line([(370 + 1.5 * place, 140 - 95 * score) for place, score in enumerate(scores)], BLUE)
    return sheet


def _attention_weights(ids: list[int], layer: int) -> torch.Tensor:
    """What the heads of a layer look at, (H, T, T): the weights of `attend_eagerly`, kept."""
    model, _ = nano()
    module = model.transformer.encoder.layers[layer].self_attention
    found: dict[str, torch.Tensor] = {}
    original = module.attend

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        found["weights"] = scores.masked_fill(future, float("-inf")).softmax(-1)[0]
        answer: torch.Tensor = original(q, k, v, mask)
        return answer

    module.attend = attend
    try:
        with torch.no_grad():
            model(torch.tensor([ids]))
    finally:
        module.attend = original
    return found["weights"]


def groups() -> Sheet:
    """The six heads of one layer of glm-nano on a sentence; three share their keys."""
    ids = prompt_ids(nano()[1], [Message("user", "What is the capital of France?")])
    weights = _attention_weights(ids, 1)
    size, cell = len(ids), 9.4
    sheet = Sheet(688, 372)
    for head in range(6):
        left, top = 120 + 190 * (head % 3), 32 + 172 * (head // 3)
        sheet.text(left, top - 6, f"head {head + 1}", size=11)
        for row in range(size):
            for column in range(row + 1):
                shade = _shade(float(weights[head, row, column]) ** 0.6, COLOURS_OF_GROUPS[head // 3])
                sheet.cell(left + cell * column, top + cell * row, cell - 0.6, cell - 0.6, shade)
            if head % 3 == 0:
                sheet.text(left - 6, top + cell * row + 7, _shown(ids[row]), size=8, anchor="end", colour=GREY)
    for group in range(2):
        sheet.text(16, 112 + 172 * group, f"group {group + 1}", size=12, turn=-90, anchor="middle")
    sheet.text(120, 366, "dark: looked at much; a row is a token that looks; layer 2 of 6", size=11, colour=GREY)
    return sheet


def block() -> Sheet:
    """The logit lens: what glm-nano would say after each block, for each token of an answer."""
    model, tokenizer = nano()
    prompt = prompt_ids(tokenizer, [Message("user", "What is the capital of France?")])
    answer = tokenizer.build_single_message("assistant", "", "The capital of France is Paris.")[1:]
    with torch.no_grad():
        states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
    sheet = Sheet(688, 262)
    first, wide = len(prompt) + 1, 600 / (len(answer) - 1)
    for number, state in enumerate(states):
        with torch.no_grad():
            said = model.logits(model.transformer.encoder.final_layernorm(state[0, first:])).softmax(-1)
        y = 208 - 32 * number
        sheet.text(12, y + 18, f"block {number}" if number else "embedding", size=11, colour=GREY)
        for column, chances in enumerate(said):
            share, token = chances.max(-1)
            sheet.box(78 + wide * column, y, wide - 2, 30, _shade(0.05 + 0.75 * float(share)), rx="3")
            sheet.text(78 + wide * (column + 0.5) - 1, y + 19, _shown(int(token)), size=10, anchor="middle")
    for column, token in enumerate(answer[1:]):
        sheet.text(78 + wide * (column + 0.5), 254, _shown(token), size=10, anchor="middle", colour=GREY)
    sheet.text(12, 254, "token read", size=11, colour=GREY)
    return sheet


def steps_of_answer() -> tuple[int, int]:
    """Tokens of a prompt, and of the answer that glm-nano gives to it."""
    loaded = glmkit.load("glm-nano", dtype="float32", kernels="torch")
    usage = loaded.chat("What is the capital of France?", temperature=0).usage
    return usage.prompt_tokens, usage.completion_tokens


def cache_of_keys() -> Sheet:
    """Which tokens go through the model in each step, without a cache and with one."""
    prompt, answer = steps_of_answer()
    sheet, cell = Sheet(688, 240), 9.8
    for number, title in enumerate(("without a cache", "with a cache")):
        left, total = 24 + 336 * number, 0
        for step in range(answer):
            for column in range(prompt + step):
                computed = number == 0 or step == 0 or column == prompt + step - 1
                total += computed
                colour = (BLUE if column < prompt else "#e08a3c") if computed else PALE
                sheet.cell(left + cell * column, 40 + cell * step, cell - 1, cell - 1, colour)
        sheet.text(left, 26, f"{title}: {total} tokens through the model", size=13)
    sheet.text(
        24,
        222,
        f"a row is a step, a column a token; blue: the prompt of {prompt}, orange: the answer",
        size=11,
        colour=GREY,
    )
    return sheet


def sampling() -> Sheet:
    """The likeliest first tokens of a text about a skirt, under four settings."""
    model, tokenizer = nano()
    ids = prompt_ids(tokenizer, [Message("user", "类型#裙*颜色#蓝色*风格#清新*材质#雪纺*裙长#长裙")])
    ids += tokenizer.build_single_message("assistant", "", "")[1:]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[:, -1]
    best = logits[0].topk(10).indices.tolist()
    settings = (
        ("temperature 1", 1.0, 1.0),
        ("temperature 0.5", 0.5, 1.0),
        ("temperature 2", 2.0, 1.0),
        ("top-p 0.8", 1.0, 0.8),
    )
    sheet = Sheet(688, 262)
    for row, token in enumerate(best):
        sheet.text(96, 56 + 20 * row, _shown(token), size=11, anchor="end")
    for column, (title, temperature, top_p) in enumerate(settings):
        p = warp(logits, SamplingOptions(temperature=temperature, top_p=top_p)).softmax(-1)[0]
        left = 106 + 146 * column
        sheet.text(left, 28, title, size=13)
        for row, token in enumerate(best):
            share = float(p[token])
            sheet.box(left, 44 + 20 * row, max(0.5, 160 * share), 15, BLUE if share else PALE)
            sheet.text(
                left + max(0.5, 160 * share) + 4,
                56 + 20 * row,
                f"{share:.0%}" if share else "out",
                size=10,
                colour=GREY,
            )
        rest = max(0.0, 1 - sum(float(p[token]) for token in best))
        sheet.text(left, 254, f"all others: {rest:.0%}", size=11, colour=GREY)
    return sheet


def chat() -> Sheet:
    """A conversation with a tool, token by token; what is learnt is underlined."""
    tokenizer = nano()[1]
    messages = [
        Message("user", "How warm is Rome?"),
        Message("assistant", "", "get_weather", arguments={"city": "Rome"}),
        Message("observation", '{"temperature": 20}'),
        Message("assistant", "It is 20 degrees."),
    ]
    ids, learnt = conversation_ids(tokenizer, messages)
    sheet = Sheet(688, 262)
    x, y, colour = 16.0, 20.0, PALE
    for token, learns in zip(ids, learnt):
        text = _shown(token)
        colour = ROLES.get(text, colour)
        width = max(16.0, _width_of(text) * 0.92 + 8)
        if x + width > 676 or (text in ROLES and x > 16):
            x, y = 16.0, y + 34
        sheet.box(x, y, width, 22, colour, rx="4")
        if learns:
            sheet.box(x, y + 24, width, 3, INK)
        sheet.text(x + width / 2, y + 15, text, size=11, anchor="middle")
        x += width + 3
    sheet.height = y + 42
    return sheet


def quantisation() -> Sheet:
    """One group of 32 weights of glm-nano, its sixteen steps, and where each weight goes."""
    weight = nano()[0].transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.data[:1, :32]
    codes, scale = quantize_groups(weight)
    step = float(scale[0, 0])
    chosen = unpack_nibbles(codes)[0].tolist()
    values = weight[0].tolist()
    reach = max(abs(step) * 8, *map(abs, values)) * 1.02
    sheet = Sheet(688, 300)

    def height(value: float) -> float:
        return 145 - 125 * value / reach

    for code in range(-8, 8):
        sheet.line([(60, height(code * step)), (640, height(code * step))], "#d0d7de", 0.8)
        sheet.text(52, height(code * step) + 4, code, size=10, anchor="end", colour=GREY)
    for column, (value, code) in enumerate(zip(values, chosen)):
        x = 72 + 18 * column
        sheet.line([(x, height(value)), (x, height(code * step))], "#e08a3c", 2)
        sheet.dot(x, height(code * step), "#e08a3c", 2.2)
        sheet.dot(x, height(value), BLUE, 3.2)
    error = sum((value - code * step) ** 2 for value, code in zip(values, chosen)) ** 0.5 / float(weight.norm())
    note = f"blue: the weight; orange: its step. Scale {step:.4f}, error of the group {error:.1%}"
    sheet.text(60, 290, note, size=11, colour=GREY)
    return sheet


def adapters() -> Sheet:
    """A layer of glm-nano with LoRA's two matrices, and a prefix in front of a prompt, true to scale."""
    model, tokenizer = nano()
    layer = model.transformer.encoder.layers[0].self_attention.query_key_value
    rows, columns, rank = layer.out_features, layer.in_features, 8
    sheet, unit = Sheet(688, 260), 0.55
    high, wide, thin = rows * unit, columns * unit, rank * unit
    sheet.text(24, 28, f"LoRA: W ({rows} × {columns}) and B A of rank {rank}", size=13)
    sheet.box(24, 44, wide, high, PALE, stroke=GREY)
    sheet.text(24 + wide / 2, 44 + high / 2, "W", anchor="middle", size=16, colour=GREY)
    sheet.text(24 + wide + 16, 44 + high / 2, "+", size=18)
    sheet.box(24 + wide + 40, 44, thin, high, "#e08a3c")
    sheet.text(24 + wide + 42, 60 + high, "B", anchor="middle")
    sheet.box(24 + wide + 54, 44, wide, thin, "#e08a3c")
    sheet.text(24 + 1.5 * wide + 54, 64 + thin, "A", anchor="middle")
    share = rank * (rows + columns) / (rows * columns)
    sheet.text(
        24,
        250,
        f"{rank * (rows + columns):,} numbers learn beside {rows * columns:,} ({share:.0%})",
        size=11,
        colour=GREY,
    )
    prompt = prompt_ids(tokenizer, [Message("user", "Who are you?")])
    sheet.text(360, 28, "P-Tuning: 16 columns in front of every layer", size=13)
    for row in range(model.config.num_layers):
        for column in range(16 + len(prompt)):
            colour = "#e08a3c" if column < 16 else _shade(0.35)
            sheet.cell(360 + 11.5 * column, 44 + 24 * row, 10, 20, colour)
    for column, token in enumerate(prompt):
        sheet.text(369 + 11.5 * (16 + column), 200, _shown(token), size=8, turn=-60, anchor="end", colour=GREY)
    return sheet


def training() -> Sheet:
    """The loss of twelve steps of LoRA on a style that glm-nano has not learnt: the run of the page."""
    torch.manual_seed(0)
    records = read_records(builtin("data") / "style_train.jsonl")
    loaded = glmkit.load("glm-nano", dtype="float32", kernels="torch")
    tokenizer, layers = loaded.tokenizer, ["query_key_value", "dense_4h_to_h", "output_layer"]
    method = LoraMethod(MethodBlock(name="lora", lora_dropout=0.0, target_modules=layers))
    model: Any = method.prepare(loaded.model).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=4e-3)
    losses = []
    for step in range(12):
        parts = []
        for record in records[4 * step : 4 * step + 4]:
            ids, learnt = conversation_ids(tokenizer, record.messages)
            labels = [token if learns else -100 for token, learns in zip(ids, learnt)]
            parts.append(model.label_loss(torch.tensor([ids]), torch.tensor([labels])))
        loss = torch.stack([part for part, _ in parts]).sum() / sum(count for _, count in parts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    sheet = Sheet(688, 260)
    places = [(70 + 52 * step, 220 - 17 * loss) for step, loss in enumerate(losses)]
    for loss in range(0, 13, 3):
        sheet.line([(60, 220 - 17 * loss), (660, 220 - 17 * loss)], "#d0d7de", 0.8)
        sheet.text(50, 224 - 17 * loss, loss, size=11, anchor="end", colour=GREY)
    guess = 220 - 17 * float(torch.tensor(float(model.config.vocab_size)).log())
    sheet.line([(60, guess), (660, guess)], "#e08a3c", 1)
    sheet.text(660, guess - 5, "every token alike: log 6,144", size=11, anchor="end", colour="#c7651a")
    sheet.line(places, BLUE, 2)
    for step, ((x, y), loss) in enumerate(zip(places, losses)):
        sheet.dot(x, y, BLUE)
        sheet.text(x, y - 8, f"{loss:.1f}", size=10, anchor="middle")
        sheet.text(x, 240, step + 1, size=11, anchor="middle", colour=GREY)
    return sheet


PICTURES: dict[str, Callable[[], Sheet]] = {
    "tokens": tokens,
    "blanks": blanks,
    "masks": masks,
    "positions": positions,
    "rotary": rotary,
    "groups": groups,
    "block": block,
    "cache": cache_of_keys,
    "sampling": sampling,
    "chat": chat,
    "quantisation": quantisation,
    "adapters": adapters,
    "training": training,
}


def main(folder: Path) -> None:
    """Draws all pictures.

    Args:
        folder: Where to.
    """
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "evening")
