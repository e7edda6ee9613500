"""Answers in JSON: response_format json_object and json_schema, by letting the model write only what fits.

    schema -> checks of size here -> trial in a child process -> grammar of llguidance -> Guide: which tokens may follow

Schemas come from clients. The child may be killed and may die (`schema_trial.py`); the limits that it tried hold for
the engine's process too, and every step has a limit of its own there.

What a model writes in front of the content is not part of the JSON: the empty header line of ChatGLM3 and GLM-4, and
the blank that SentencePiece puts in front of a text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmkit.chat.templates import chat_format
from glmkit.errors import GenerationError, MissingDependencyError, UsageError
from glmkit.serve.failures import APIError
from glmkit.serve.shapes import ResponseFormat
from glmkit.serve.token_bytes import TokenTable

MAX_SCHEMA_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 100
MAX_SCHEMA_VALUES = 4_000  # objects, lists, texts and numbers in a schema, at any depth
MAX_PATTERN_CHARACTERS = 1_000
MAX_KEPT = 64  # verdicts on schemas that are remembered
_TRIAL_SECONDS = 10.0  # by the clock; the child has 2 of CPU time
_TOO_SLOW = "it takes too long to compile"
_TRIAL = Path(__file__).with_name("schema_trial.py")
_OPTIONS = {"whitespace_pattern": r"\n?[ ]{0,20}", "whitespace_flexible": True, "lenient": False}
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_SCHEMA = "response_format.json_schema.schema"


class Structures:
    """The grammars of one tokenizer: compiles schemas into guides, and remembers which ones were fine.

    Args:
        tokenizer: The model's tokenizer.
        vocabulary_size: Rows of the model's logits.

    Raises:
        MissingDependencyError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError("llguidance", "serve") from error
        self._library = llguidance
        self.stop_ids = frozenset(tokenizer.stop_ids)
        self._format = chat_format(tokenizer)
        self._header = tokenizer.encode_text("\n") if self._format.divider else []
        self._vocabulary_size = vocabulary_size
        self._table = TokenTable(tokenizer).all()[:vocabulary_size]
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._table, tokenizer)), eos_token=sorted(self.stop_ids)
        )
        self._verdicts: OrderedDict[str, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, wanted: ResponseFormat, offers_tools: bool) -> SchemaGuide | None:
        """Makes the guide of one answer. It may take a second: not for the event loop.

        Args:
            wanted: What the client asks for.
            offers_tools: Whether the answer may be a call of a tool instead.

        Returns:
            The guide; None for plain text.

        Raises:
            APIError: 400: the schema is too large, too hard, or says what cannot be obeyed.
        """
        if wanted.type == "text":
            return None
        schema = _schema_of(wanted)
        text = _checked_text(schema)
        problem = self._verdict(text)
        if problem is None:
            matcher = self._compile(text)
            problem = matcher.get_error() or None
        if problem is not None:
            raise APIError(400, f"{_SCHEMA}: {_brief(problem)}", param=_SCHEMA, code="invalid_json_schema")
        return SchemaGuide(matcher, self._table, self._vocabulary_size, self._header, offers_tools)

    def _compile(self, schema: str) -> Any:
        grammar = json.loads(self._library.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS))
        if self._format.dummy_prefix:
            grammar = _behind_blank(grammar)
        limits = self._library.LLParserLimits(**_LIMITS)
        return self._library.LLMatcher(self._tokenizer, json.dumps(grammar), log_level=0, limits=limits)

    def _verdict(self, schema: str) -> str | None:
        with self._lock:
            if schema in self._verdicts:
                self._verdicts.move_to_end(schema)
                return self._verdicts[schema]
        problem = try_schema(schema)
        if problem == _TOO_SLOW:  # by the clock: perhaps other processes took the time
            return problem
        with self._lock:
            self._verdicts[schema] = problem
            while len(self._verdicts) > MAX_KEPT:
                self._verdicts.popitem(last=False)
        return problem


class _Vocabulary:
    """A tokenizer in the form that llguidance takes."""

    def __init__(self, table: list[bytes | None], tokenizer: Any) -> None:
        self.tokens = [data or b"<%d>" % token for token, data in enumerate(table)]
        self.special_token_ids = [token for token, data in enumerate(table) if data is None]
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids), None
        self._encode = tokenizer.encode_text
        self._front = self._encode("\n")  # behind a line end no blank is put in front of a text

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar leaves no choice about, as the model would write them."""
        if not isinstance(text, str):
            raise TypeError("expected text")
        ids: list[int] = self._encode("\n" + text)
        return ids[len(self._front) :] if ids[: len(self._front)] == self._front else []


class SchemaGuide:
    """Which tokens of one answer fit a grammar; a `Guide` of the engine.

    Args:
        matcher: The grammar, at its beginning.
        table: The bytes of every token.
        vocabulary_size: Rows of the model's logits.
        header: Ids of the empty header line, in front of the content.
        free_header: Whether another header may be written, which makes it a call of a tool; that is free then.
    """

    def __init__(
        self, matcher: Any, table: list[bytes | None], vocabulary_size: int, header: list[int], free_header: bool
    ) -> None:
        self._matcher, self._table, self._vocabulary_size = matcher, table, vocabulary_size
        self._header, self._free_header = list(header), free_header
        self._line: bytes | None = b"" if header else None  # the header so far; None: it is complete
        self._is_call = False

    def allowed(self) -> Tensor | None:
        """Which tokens may come next.

        Returns:
            (V,) bool on the CPU; None: all.

        Raises:
            UsageError: The grammar has become too hard to compute.
        """
        if self._is_call or (self._line is not None and self._free_header):
            return None
        mask = torch.zeros(self._vocabulary_size, dtype=torch.bool)
        if self._line is not None:
            mask[self._header[0]] = True
            return mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise UsageError(
                f"the answer cannot go on in its schema: {_brief(self._matcher.get_error())}",
                hint="take away what is hard to compute: multipleOf, counted patterns, hundreds of properties",
            )
        fitting = np.unpackbits(bits, bitorder="little")[: self._vocabulary_size].astype(bool)
        mask[: len(fitting)] = torch.from_numpy(fitting)
        return mask

    def push(self, token_id: int) -> None:
        """Takes a token that was chosen.

        Args:
            token_id: It.

        Raises:
            GenerationError: It does not fit.
        """
        if self._is_call:
            return
        if self._line is None:
            if not self._matcher.consume_token(token_id):
                raise GenerationError(f"the answer left its schema: {_brief(self._matcher.get_error())}")
            return
        self._line += (self._table[token_id] if token_id < len(self._table) else None) or b""
        self._header = self._header[1:]
        if b"\n" in self._line:
            self._is_call, self._line = bool(self._line.strip()), None


def try_schema(schema: str) -> str | None:
    """Compiles a schema in a child process.

    Args:
        schema: Its JSON.

    Returns:
        What is wrong with it; None: nothing.
    """
    asked = json.dumps({"schema": schema, "options": _OPTIONS, "limits": _LIMITS})
    try:
        child = subprocess.run(
            [sys.executable, "-I", str(_TRIAL)],
            input=asked.encode(),
            capture_output=True,
            timeout=_TRIAL_SECONDS,
            check=False,
            env={"RAYON_NUM_THREADS": "1"},
        )
        problem: str | None = json.loads(child.stdout)["problem"]
    except subprocess.TimeoutExpired:
        return _TOO_SLOW
    except (ValueError, KeyError, TypeError):
        return "it takes too much time or memory to compile, or is no schema"
    return problem


def _schema_of(wanted: ResponseFormat) -> Mapping[str, Any]:
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise APIError(
            400,
            "response_format.json_schema: json_schema is missing",
            param="response_format.json_schema",
        )
    return wanted.json_schema.schema_ or {}


def _checked_text(schema: Mapping[str, Any]) -> str:
    """The schema as JSON; refuses what no client means, before anything compiles it."""
    level: list[Any] = [schema]
    count = depth = 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise _too_large(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        count += len(level)
        if count > MAX_SCHEMA_VALUES:
            raise _too_large(f"it has more than {MAX_SCHEMA_VALUES} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                _check_keywords(value)
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise _too_large(f"it has {len(text)} characters, at most {MAX_SCHEMA_CHARACTERS} are taken")
    return text


def _check_keywords(value: Mapping[str, Any]) -> None:
    reference = value.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise _too_large("a $ref leads outside the schema; nothing is fetched")
    for name in ("pattern", "const"):
        if isinstance(value.get(name), str) and len(value[name]) > MAX_PATTERN_CHARACTERS:
            raise _too_large(f"a {name} is longer than {MAX_PATTERN_CHARACTERS} characters")
    if isinstance(value.get("x-guidance"), dict):
        raise _too_large("x-guidance is not taken")


def _too_large(problem: str) -> APIError:
    return APIError(400, f"{_SCHEMA}: {problem}", param=_SCHEMA, code="invalid_json_schema")


def _behind_blank(grammar: dict[str, Any]) -> dict[str, Any]:
    """A grammar with an optional blank in front, which is SentencePiece's."""
    (inner,) = grammar["grammars"]
    front = {"name": "answer", "lark_grammar": "start: / ?/ content\ncontent: @json"}
    return {"grammars": [front, {**inner, "name": "json"}]}


def _brief(problem: str) -> str:
    return problem.split("\n<state>")[0].replace("<non-verbose/>", "").replace("\n", " ").strip()[:300]
