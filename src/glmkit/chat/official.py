"""The methods of the official classes that scripts call, with their signatures, defaults and return values.

They are plain functions. MODEL_METHODS and TOKENIZER_METHODS say which class gets which, under which name;
`glmkit.registration` joins them. One function serves ChatGLM2, ChatGLM3 and GLM-4, which have one model class; the
tokenizer says which it is.

What differs from the official code, on purpose: the caller's history and logits processors are not changed; a reply
that ends at the length limit keeps its last token; tool calls are never evaluated, see `official_replies`.

Source: modeling_chatglm.py of the official checkpoints (behaviour, not code).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from glmkit.chat import official_chatglm
from glmkit.chat.blocks import Blocks
from glmkit.chat.official_replies import (
    decode_reply,
    process_parts,
    process_response,
    process_response_of_chatglm,
    reply_parts,
    response_so_far,
)
from glmkit.chat.official_stream import (
    InvalidScoreLogitsProcessor,
    as_list,
    stream_generate,
    stream_generate_of_chatglm,
    with_invalid_score_processor,
)
from glmkit.chat.official_templates import apply_chat_template, apply_chat_template_of_glm4
from glmkit.chat.templates import chat_format
from glmkit.errors import UsageError
from glmkit.hf import BatchEncoding
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.tokenizers.chatglm import ChatGLM1Tokenizer
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer
from glmkit.tokenizers.glm4 import ChatGLM4Tokenizer

__all__ = ["MODEL_METHODS", "TOKENIZER_METHODS", "InvalidScoreLogitsProcessor", "decode_reply"]

_SAMPLING: dict[str, Any] = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "logits_processor": None}
_CHAT = {"role": "user", "max_length": None, "num_beams": 1, **_SAMPLING}
_STREAM_CHAT = {
    "role": "user",
    "past_key_values": None,
    "max_length": None,
    **_SAMPLING,
    "return_past_key_values": False,
}


# --- chat ---


@torch.inference_mode()
def chat(
    self: Any, tokenizer: Any, query: str, history: Sequence[Any] | None = None, *args: Any, **kwargs: Any
) -> tuple[Any, list[Any]]:
    """Answers a question.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: The question, or in generations 3 and 4 what `role` says.
        history: Generation 2: (question, answer) pairs. Generations 3 and 4: messages as mappings.
        *args: In this order: role="user" (generations 3 and 4 only), max_length=8192 (prompt and answer; 32768 for
            ChatGLM2-6B-32K), num_beams=1, do_sample=True, top_p=0.8, temperature=0.8, logits_processor=None.
        **kwargs: The same by name, and further arguments of `generate`, whose top_k of 50 is active.

    Returns:
        The answer and the new history. In generations 3 and 4 the answer is a text; or {"name", "parameters"} for a
        tool call when the first message of the history has tools, and {"name", "content"} when it has none.

    Raises:
        UsageError: Arguments that the generation does not have.
    """
    options = _bind(self, tokenizer, _CHAT, args, kwargs)
    role = options.pop("role")
    options["logits_processor"] = with_invalid_score_processor(options["logits_processor"])
    history = list(history or [])
    inputs, stops = _inputs(self, tokenizer, query, history, role, options)
    outputs = self.generate(**inputs, **options)
    ids = _until_stop(outputs.tolist()[0][inputs["input_ids"].shape[1] :], stops)
    if not _has_roles(tokenizer):
        response = process_response(self, decode_reply(tokenizer, ids))
        return response, [*history, (query, response)]
    history.append({"role": role, "content": query})
    return process_parts(reply_parts(tokenizer, ids), history)


def stream_chat(
    self: Any, tokenizer: Any, query: str, history: Sequence[Any] | None = None, *args: Any, **kwargs: Any
) -> Iterator[tuple[Any, ...]]:
    """Answers a question step by step.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: See `chat`.
        history: See `chat`.
        *args: In this order: role="user" (generations 3 and 4 only), past_key_values=None, max_length=8192,
            do_sample=True, top_p=0.8, temperature=0.8, logits_processor=None, return_past_key_values=False. With
            past_key_values of the turn before, only the new message is read.
        **kwargs: The same by name, and further arguments of `stream_generate`.

    Yields:
        The answer so far, the history with it, and the cache if asked for. Half a character is never given out.

    Raises:
        UsageError: Arguments that the generation does not have.
    """
    options = _bind(self, tokenizer, _STREAM_CHAT, args, kwargs)
    role, past, returns_past = (options[name] for name in ("role", "past_key_values", "return_past_key_values"))
    del options["role"]
    options["logits_processor"] = with_invalid_score_processor(options["logits_processor"])
    history = list(history or [])
    inputs, stops = _inputs(self, tokenizer, query, history, role, options)
    if past is not None:
        inputs["position_ids"] = inputs["position_ids"] + past.get_seq_length()
    start, shows_late = inputs["input_ids"].shape[1], _has_roles(tokenizer)
    ids: list[int] = []
    for outputs in self.stream_generate(**inputs, **options):
        if returns_past:
            outputs, past = outputs
        ids = outputs.tolist()[0][start:]
        # Models with roles show each token one step late, so that the stop id is never among them.
        found = response_so_far(tokenizer, query, ids[:-1] if shows_late else ids, history, role, partial=True)
        if found is not None:
            yield (*found, past) if returns_past else found
    if shows_late and ids and ids[-1] not in stops:
        found = response_so_far(tokenizer, query, ids, history, role, partial=False)
        if found is not None:
            yield (*found, past) if returns_past else found


def _show_signature(function: Any, defaults: Mapping[str, Any]) -> None:
    """Lets `inspect` show ChatGLM3's arguments, while calls may also use ChatGLM2's order of them."""
    one = inspect.Parameter
    plain = [one(name, one.POSITIONAL_OR_KEYWORD) for name in ("self", "tokenizer", "query")]
    named = {"history": None, **defaults, "max_length": 8192}
    plain += [one(name, one.POSITIONAL_OR_KEYWORD, default=value) for name, value in named.items()]
    function.__signature__ = inspect.Signature([*plain, one("kwargs", one.VAR_KEYWORD)])


_show_signature(chat, _CHAT)
_show_signature(stream_chat, _STREAM_CHAT)


# --- inputs ---


def _has_roles(tokenizer: Any) -> bool:
    return isinstance(chat_format(tokenizer), Blocks)


def _inputs(
    model: Any, tokenizer: Any, query: str, history: Sequence[Any], role: str, options: dict[str, Any]
) -> tuple[BatchEncoding, frozenset[int]]:
    """What the model reads, and the ids that end its answer, which in generations 3 and 4 are also put into options."""
    past, returns_past = options.get("past_key_values"), options.get("return_past_key_values", False)
    if not _has_roles(tokenizer):
        whole = past is None and not returns_past
        build = build_inputs if whole else build_stream_inputs
        return build(model, tokenizer, query, history=history), tokenizer.stop_ids
    if tokenizer.generation == 3:
        inputs = tokenizer.build_chat_input(query, history=history if past is None else None, role=role)
    else:
        earlier = [] if past is not None else list(history)
        inputs = apply_chat_template_of_glm4(
            tokenizer,
            [*earlier, {"role": role, "content": query}],
            add_generation_prompt=True,
            add_special_tokens=past is None,  # unlike ChatGLM3, which repeats them
            return_tensors="pt",
            return_dict=True,
        )
    roles = [tokenizer.get_command(f"<|{name}|>") for name in ("user", "observation")]
    options.setdefault("eos_token_id", [tokenizer.eos_token_id, *roles])
    return inputs.to(model.device), frozenset(as_list(options["eos_token_id"]))


def _until_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    """The ids in front of the first stop id (beams end in padding behind it)."""
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)


def build_inputs(
    self: Any, tokenizer: Any, query: str, history: Sequence[Sequence[str]] | None = None
) -> BatchEncoding:
    """Builds the input of a ChatGLM2 conversation.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: The question.
        history: Earlier (question, answer) pairs.

    Returns:
        input_ids, attention_mask, position_ids (1, T) on the model's device.
    """
    return tokenizer([tokenizer.build_prompt(query, history=history)], return_tensors="pt").to(self.device)


def build_stream_inputs(
    self: Any, tokenizer: Any, query: str, history: Sequence[Sequence[str]] | None = None
) -> BatchEncoding:
    """Builds what follows the cache of earlier ChatGLM2 rounds.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: The question.
        history: Earlier rounds, all in the cache; without them the whole input is built.

    Returns:
        input_ids, attention_mask, position_ids (1, T), counted from 0, on the model's device.
    """
    if not history:
        return build_inputs(self, tokenizer, query)
    # A round in the middle of a text has no dummy prefix, so the first id goes.
    ids = tokenizer.encode_text(f"\n\n[Round {len(history) + 1}]\n\n问：{query}\n\n答：")[1:]
    data = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "position_ids": [list(range(len(ids)))]}
    return BatchEncoding(data, tensor_type="pt").to(self.device)


def _bind(
    model: Any, tokenizer: Any, defaults: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Puts positional arguments to the names of the generation that the caller's script was written for."""
    names = list(defaults)
    if args and not isinstance(args[0], str):
        names.remove("role")  # ChatGLM2's order
    if len(args) > len(names):
        raise UsageError(f"{len(args)} positional arguments behind history; expected at most {len(names)}")
    placed = dict(zip(names, args))
    twice = placed.keys() & kwargs.keys()
    if twice:
        raise UsageError(f"given twice, by position and by name: {', '.join(sorted(twice))}")
    options = {**defaults, **placed, **kwargs}
    if not _has_roles(tokenizer) and options["role"] != "user":
        raise UsageError(f"role={options['role']!r}: ChatGLM2 has no roles", hint="use ChatGLM3")
    if options["max_length"] is None:
        rope_ratio = getattr(getattr(model, "config", None), "rope_ratio", None) or 1
        options["max_length"] = 32768 if not _has_roles(tokenizer) and rope_ratio > 1 else 8192
    return options


# --- what is joined to which class ---

MODEL_METHODS: dict[type[CheckedConfig], dict[str, Callable[..., Any]]] = {
    ChatGLMConfig: {
        "chat": official_chatglm.chat,
        "stream_chat": official_chatglm.stream_chat,
        "stream_generate": stream_generate_of_chatglm,
        "process_response": process_response_of_chatglm,
    },
    ChatGLM2Config: {
        "chat": chat,
        "stream_chat": stream_chat,
        "stream_generate": stream_generate,
        "process_response": process_response,
        "build_inputs": build_inputs,
        "build_stream_inputs": build_stream_inputs,
    },
}
"""Config class -> name -> method of the class that writes text."""

TOKENIZER_METHODS: dict[Any, dict[str, Callable[..., Any]]] = {
    ChatGLM1Tokenizer: {"apply_chat_template": apply_chat_template},
    ChatGLMTokenizer: {"apply_chat_template": apply_chat_template},
    ChatGLM4Tokenizer: {"apply_chat_template": apply_chat_template_of_glm4},
}
"""Tokenizer class -> name -> method."""
