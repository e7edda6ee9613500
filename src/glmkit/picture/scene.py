"""Who sees whom, and where every token stands: the numbers of a picture, and the same in lines of text.

    tokens     x1  [MASK]  x4    sop  y1  y2
    x1          #    #      #     .   .   .        a row is a token that looks, a column one that is looked at
    [MASK]      #    #      #     .   .   .
    x4          #    #      #     .   .   .        part A sees all of itself
    sop         #    #      #     #   .   .
    y1          #    #      #     #   #   .        part B sees part A and what stands behind it
    y2          #    #      #     #   #   #
    row 0       0    1      2     1   1   1
    row 1       0    0      0     1   2   3

`describe` finds out, without weights: the ids come from the model's own tokenizer and prompt, masks and positions from
the code that the network is fed with. A model that is not on this machine is drawn from
its released sizes, with every character as a token.

The original GLM has two pictures: a text with a mask token is a prompt; in a text without one spans are cut out, as in
pre-training.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glmkit.chat.messages import Message
from glmkit.chat.templates import chat_format, prompt_ids
from glmkit.data.blank_infilling import BlankIds, BlankMaker, reconstruct
from glmkit.data.corpus import Row
from glmkit.data.mixtures import MIXTURES, Mixture
from glmkit.engine.layout import layout_for
from glmkit.errors import TokenizerError, UsageError
from glmkit.families import Family, find_family
from glmkit.inspection import released_config
from glmkit.loading import open_model, read_config, read_tokenizer
from glmkit.location import DownloadError, locate
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.models.prefix_lm import PrefixLayout, visible
from glmkit.registration import LANGUAGE_MODELS

MOST_TOKENS = 64
_BLANK = re.compile(r"\[[gs]?MASK\]|<mask>")


@dataclass(frozen=True)
class Scene:
    """All numbers of a picture; lists over the tokens have the same length S.

    Attributes:
        title: What is shown.
        tokens: What is written on each token.
        ids: Its id; None where it is not known.
        parts: "A" (read in both directions) or "B" (written); of causal models "prompt" or "answer".
        spans: Which blank a token belongs to: 1, 2 … in the order of part B, answers to 1; 0 for none.
        positions: One or two rows of positions.
        visible: For every token that looks, for every token: whether it is seen.
        original: Of pre-training: (token, span) of the text before spans were cut out.
    """

    title: str
    tokens: tuple[str, ...]
    ids: tuple[int | None, ...]
    parts: tuple[str, ...]
    spans: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    visible: tuple[tuple[bool, ...], ...]
    original: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class _Subject:
    """A model without weights."""

    title: str
    config: CheckedConfig
    tokenizer: Any
    chats: bool


def describe(name: str, text: str, *, answer_tokens: int = 4, seed: int = 0) -> Scene:
    """Finds out masks and positions of a text.

    Args:
        name: A folder, family name or hub id. Nothing is fetched.
        text: A question for models that chat; a text with mask tokens for those that fill blanks. For the original GLM
            also a text without one.
        answer_tokens: Tokens of an answer, y1 y2 …, that stand behind a prompt.
        seed: Chooses the spans that are cut out.

    Returns:
        The scene.

    Raises:
        UsageError: An unknown name, no text, or a text with too many tokens.
        CheckpointError, ConfigError, TokenizerError: The folder cannot be read.
    """
    if not text.strip():
        raise UsageError("the text is empty", hint='--text "What is the capital of France?"')
    subject = _open(name)
    if isinstance(subject.config, GLMConfig) and not _BLANK.search(text):
        return _pretraining(subject, text, seed)
    return _prompt(subject, text, answer_tokens)


def _open(name: str) -> _Subject:
    family = find_family(name)
    try:
        location = locate(name, hub={"local_files_only": True})
    except (UsageError, DownloadError):
        if family is None:
            raise
        config = released_config(family)
        title = f"{name} (not on this machine: every character is a token)"
        return _Subject(title, config, _characters(config, family), family.chat)
    with open_model(location) as folder:
        config = read_config(folder, family)
        tokenizer = read_tokenizer(folder, config)
        family = family or find_family(str(folder.config.get("_name_or_path", "")))
    chats = family is None or family.chat
    if tokenizer is not None:
        return _Subject(name, config, tokenizer, chats)
    title = f"{name} (without a tokenizer: every character is a token)"
    return _Subject(title, config, _characters(config, family), chats)


# --- a prompt and its answer ---


def _prompt(subject: _Subject, text: str, answer_tokens: int) -> Scene:
    tokenizer, config = subject.tokenizer, subject.config
    if tokenizer.generation == 0:
        ids = [*tokenizer.fill_prompt(text), tokenizer.get_command("sop")]
    elif subject.chats:
        ids = prompt_ids(tokenizer, [Message("user", text)])
    else:
        ids = chat_format(tokenizer).text_ids(tokenizer, text)
    prompt, size = len(ids), len(ids) + answer_tokens
    _refuse_many(size, f"of them {answer_tokens} for an answer")
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(config)](config)
    layout = layout_for(model, torch.tensor([ids]), torch.zeros(1, dtype=torch.int64))
    calls = [layout.prompt(0, prompt), *(layout.step() for _ in range(answer_tokens))]
    answer = tuple(f"y{number}" for number in range(1, answer_tokens + 1))
    if not isinstance(layout, PrefixLayout):
        return Scene(
            title=subject.title,
            tokens=_labels(tokenizer, ids) + answer,
            ids=_known(tokenizer, ids) + (None,) * answer_tokens,
            parts=("prompt",) * prompt + ("answer",) * answer_tokens,
            spans=(0,) * prompt + (1,) * answer_tokens,
            positions=(tuple(range(size)),),
            visible=tuple(tuple(column <= row for column in range(size)) for row in range(size)),
        )
    rows = []
    for row in (row for call in calls for row in call["attention_mask"][0, 0].tolist()):
        seen = [bool(value) != layout.blocked for value in row]
        rows.append(tuple(seen + [False] * (size - len(seen))))
    positions = torch.cat([call["position_ids"] for call in calls], dim=-1).view(-1, size)  # (1 or 2, S)
    start, mask = int(layout.context[0]), int(layout.mask[0])
    return Scene(
        title=subject.title,
        tokens=_labels(tokenizer, ids) + answer,
        ids=_known(tokenizer, ids) + (None,) * answer_tokens,
        parts=("A",) * start + ("B",) * (size - start),
        spans=tuple(int(column == mask or column >= start) for column in range(size)),
        positions=tuple(map(tuple, positions.tolist())),
        visible=tuple(rows),
    )


def _refuse_many(tokens: int, more: str) -> None:
    if tokens > MOST_TOKENS:
        raise UsageError(
            f"the picture would have {tokens} tokens ({more}): expected at most {MOST_TOKENS}",
            hint="give a shorter --text",
        )


# --- pre-training ---


def _pretraining(subject: _Subject, text: str, seed: int) -> Scene:
    """Short spans, the kind that all sizes were trained with, are cut out of `ENC text eos`."""
    tokenizer = subject.tokenizer
    names = {"eos": "eos", "enc": "ENC", "mask": "MASK", "smask": "MASK", "gmask": "MASK", "sop": "sop", "eop": "eop"}
    commands = BlankIds(**{field: tokenizer.get_command(command) for field, command in names.items()})
    encoded = tokenizer.encode_text(text)
    _refuse_many(len(encoded), "before spans are cut out")
    row = Row([commands.enc, *encoded, commands.eos], [0] + [1] * (len(encoded) + 1))
    # 15 % of a very short row is less than a token: then one span is cut out all the same.
    enough = int(MIXTURES["token"].bert_ratio * len(row.ids))
    mixture = MIXTURES["token"] if enough else Mixture(bert_prob=1.0, single_span_prob=1.0)
    maker, generator = BlankMaker(commands, mixture, lambda token: False, MOST_TOKENS), random.Random(seed)
    drawn = (sample for _ in range(100) for sample in maker.make([row], generator))
    sample = next(drawn, None)
    if sample is None:
        raise UsageError(
            f"no span fits into a text of {len(encoded)} tokens",
            hint="give a longer --text, or one with [MASK] in it",
        )
    ids, size = sample.input_ids, len(sample.input_ids)
    _refuse_many(size, "both parts together")
    assert reconstruct(sample) == row.ids
    spans = [0] * size
    blanks: dict[int, int] = {}  # column of a mask token to its number
    for column in range(sample.sep, size):
        spans[column] = blanks.setdefault(sample.positions[column], len(blanks) + 1)
    for blank, span in blanks.items():
        spans[blank] = span
    columns = torch.arange(size)
    seen = visible(columns, columns, torch.tensor([sample.sep]), torch.tensor([0]))
    return Scene(
        title=f"{subject.title}: a text of pre-training",
        tokens=_labels(tokenizer, ids),
        ids=_known(tokenizer, ids),
        parts=("A",) * sample.sep + ("B",) * (size - sample.sep),
        spans=tuple(spans),
        positions=(tuple(sample.positions), tuple(sample.block_positions)),
        visible=tuple(map(tuple, seen[0, 0].tolist())),
        original=tuple(zip(_labels(tokenizer, row.ids), _original_spans(sample, spans))),
    )


def _original_spans(sample: Any, spans: Sequence[int]) -> list[int]:
    """The span of every token of the row; a span of n tokens has n + 1 columns in part B, with its sop."""
    found: list[int] = []
    for span in spans[: sample.sep]:
        found += [span] * (spans[sample.sep :].count(span) - 1 if span else 1)
    return found


# --- what is written on a token ---


def _labels(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(_label(tokenizer, token) for token in ids)


def _label(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.decode_ids([token])
    if not text:  # a control token, or the blank in front of words
        piece = getattr(tokenizer, "convert_ids_to_tokens", lambda token: "")(token)
        text = str(piece) or _nameless(tokenizer, token)
    elif "\ufffd" in text:  # a part of a character
        text = f"#{token}"
    return text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")


def _nameless(tokenizer: Any, token: int) -> str:
    """The tokenizers of ChatGLM2, as the official one, and of GLM-130B have no words for their control tokens."""
    for name in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "eos"):
        with contextlib.suppress(TokenizerError):
            if tokenizer.get_command(name) == token:
                return name
    return f"#{token}"


def _known(tokenizer: Any, ids: Sequence[int]) -> tuple[int | None, ...]:
    return tuple(None if token >= _MADE_UP else token for token in ids)


# --- a model that is not here ---

_MADE_UP = 1 << 24  # ids from here on belong to no vocabulary


def _characters(config: CheckedConfig, family: Family | None) -> _Characters:
    generation = getattr(config, "generation", None) or (family.generation if family else 2)
    if isinstance(config, (GLMConfig, GLM130BConfig)):
        generation = 0
    tokens = _Characters(config, 1 if isinstance(config, ChatGLMConfig) else generation)
    if isinstance(config, GLMConfig):  # which names no token itself; loading takes them from the tokenizer too
        config.sop_token_id, config.mask_token_ids = tokens.get_command("sop"), tokens.mask_token_ids
    return tokens


class _Characters:
    """Stands for the tokenizer of a model that is not on this machine: every character is a token.

    Control tokens have the ids that the config names, else made-up ones.

    Args:
        config: The model's config.
        generation: 0 for models that fill blanks, else that of the chat format.
    """

    def __init__(self, config: CheckedConfig, generation: int) -> None:
        self.generation = generation
        self._encloses = isinstance(config, GLMConfig)
        fields = {"MASK": "mask_token_id", "gMASK": "gmask_token_id", "sMASK": "smask_token_id", "sop": "bos_token_id"}
        ids = {} if self._encloses else {name: getattr(config, field, None) for name, field in fields.items()}
        self._commands = {name: token for name, token in ids.items() if isinstance(token, int)}

    def get_command(self, name: str) -> int:
        name = name.strip("[]<>").replace("CLS", "ENC")
        free = next(token for token in range(_MADE_UP) if token not in self._commands.values())
        return self._commands.setdefault(name, free)

    @property
    def mask_token_ids(self) -> list[int]:
        return [self.get_command(name) for name in ("MASK", "gMASK", "sMASK")]

    @property
    def prefix_ids(self) -> list[int]:
        return [self.get_command("gMASK"), self.get_command("sop")]

    def encode_text(self, text: str) -> list[int]:
        return [_MADE_UP + ord(character) for character in text]

    def build_inputs_with_special_tokens(self, ids: list[int]) -> list[int]:
        return [*ids, *self.prefix_ids] if self.generation == 1 else [*self.prefix_ids, *ids]

    def build_single_message(self, role: str, metadata: str, content: str) -> list[int]:
        return [self.get_command(f"<|{role}|>"), *self.encode_text(f"{metadata}\n{content}")]

    def fill_prompt(self, text: str) -> list[int]:
        if not _BLANK.search(text):
            text += "[gMASK]"
        ids = [self.get_command("ENC")] if self._encloses else []
        for part in re.split(rf"({_BLANK.pattern})", text):
            ids += [self.get_command(part)] if _BLANK.fullmatch(part) else self.encode_text(part)
        ends = text.endswith("[gMASK]") or (not self._encloses and text.endswith("MASK]"))
        return ids if ends else [*ids, self.get_command("eos")]

    def decode_ids(self, ids: Sequence[int]) -> str:
        return "".join(chr(token - _MADE_UP) for token in ids if 0 <= token - _MADE_UP < 0x110000)

    def convert_ids_to_tokens(self, token: int) -> str:
        name = next(name for name, known in self._commands.items() if known == token)
        shown = {"ENC": "[CLS]", "sop": "<sop>", "eop": "<eop>", "eos": "<eos>"}
        return shown.get(name) or (f"<{name}>" if name.startswith("|") else f"[{name}]")


# --- in lines ---


def as_text(scene: Scene) -> str:
    """The scene in lines: a token each, with its number, id, part, positions and what it sees (#).

    Args:
        scene: The scene.
    """
    rows = [["", "id", "part", *(f"row {number}" for number in range(len(scene.positions)))]]
    for column, known in enumerate(scene.ids):
        blank = f" {scene.spans[column]}" if scene.spans[column] and scene.parts[column] in "AB" else ""
        places = [str(row[column]) for row in scene.positions]
        rows.append([str(column), "-" if known is None else str(known), scene.parts[column] + blank, *places])
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    sees = ["sees", *("".join(".#"[seen] for seen in row) for row in scene.visible)]
    lines = [scene.title]
    if scene.original:
        lines.append("text: " + " ".join(f"[{span}:{token}]" if span else token for token, span in scene.original))
    for cells, dots, token in zip(rows, sees, ["token", *scene.tokens]):
        columns = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        lines.append(f"{columns}  {dots.ljust(len(scene.tokens))}  {token}")
    return "\n".join(lines)
