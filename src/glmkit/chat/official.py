"""The methods of the official model classes that scripts call, with their signatures, defaults and return values.

They are plain functions; `glmkit.registration` joins those in MODEL_METHODS to the model class and those in
TOKENIZER_METHODS to the tokenizer class. One function serves ChatGLM2 and ChatGLM3; the tokenizer says which it is.

What differs from the official code, on purpose: the caller's history and logits processors are not changed; a reply
that ends at the length limit keeps its last token; tool calls are read as literals and never evaluated, and one that is
not complete (or is other code) has the parameters None instead of raising; ids that the model's vocabulary is padded
with decode to nothing in both generations.

Source: modeling_chatglm.py of the official checkpoints (behaviour, not code).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glmkit.chat.messages import to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.chat.tools import ToolCallError, parse_tool_call
from glmkit.engine.cache import new_cache
from glmkit.engine.decode import stream
from glmkit.engine.sampling import SamplingOptions
from glmkit.errors import UsageError
from glmkit.hf import BatchEncoding, Cache, LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

MODEL_METHODS = ("chat", "stream_chat", "stream_generate", "process_response", "build_inputs", "build_stream_inputs")
TOKENIZER_METHODS = ("apply_chat_template",)
_SAMPLING: dict[str, Any] = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "logits_processor": None}
_CHAT = {"role": "user", "max_length": None, "num_beams": 1, **_SAMPLING}
_STREAM_CHAT = {
    "role": "user",
    "past_key_values": None,
    "max_length": None,
    **_SAMPLING,
    "return_past_key_values": False,
}
# Settings of a generation configuration that change what generate gives and that a stream does not have.
_NOT_STREAMED = (
    *("min_length", "min_new_tokens", "max_time", "stop_strings", "no_repeat_ngram_size", "sequence_bias"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups"),
    *("constraints", "force_words_ids", "watermarking_config", "token_healing", "encoder_no_repeat_ngram_size"),
)
_NOT_STREAMED_UNLESS_1 = ("typical_p", "encoder_repetition_penalty", "guidance_scale", "num_return_sequences")
_HIDDEN_TOP_K = 50  # the default of generate, which the official chat never turns off


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Makes id 5 certain in every row if a score anywhere is NaN or infinite, as the official class does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Checks the scores.

        Args:
            input_ids: (B, T), not looked at.
            scores: (B, V), any floating dtype.

        Returns:
            (B, V): the scores, or 0 everywhere and 5e4 at id 5.
        """
        if torch.isfinite(scores).all():
            return scores
        scores = torch.zeros_like(scores)
        scores[..., 5] = 5e4
        return scores


# --- chat ---


@torch.inference_mode()
def chat(
    self: Any, tokenizer: Any, query: str, history: Sequence[Any] | None = None, *args: Any, **kwargs: Any
) -> tuple[Any, list[Any]]:
    """Answers a question.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: The question, or in generation 3 what `role` says.
        history: Generation 2: (question, answer) pairs. Generation 3: messages as mappings.
        *args: In this order: role="user" (generation 3 only), max_length=8192 (prompt and answer; 32768 for
            ChatGLM2-6B-32K), num_beams=1, do_sample=True, top_p=0.8, temperature=0.8, logits_processor=None.
        **kwargs: The same by name, and further arguments of `generate`, whose top_k of 50 is active.

    Returns:
        The answer and the new history. In generation 3 the answer is a text; or {"name", "parameters"} for a tool call
        when the first message of the history has tools, and {"name", "content"} when it has none.

    Raises:
        UsageError: Arguments that the generation does not have.
    """
    options = _bind(self, tokenizer, _CHAT, args, kwargs)
    role = options.pop("role")
    options["logits_processor"] = _processors(options["logits_processor"])
    history = list(history or [])
    if tokenizer.generation == 2:
        inputs = build_inputs(self, tokenizer, query, history=history)
        stops = tokenizer.stop_ids
    else:
        inputs = tokenizer.build_chat_input(query, history=history, role=role).to(self.device)
        options.setdefault("eos_token_id", _stop_list(tokenizer))
        stops = frozenset(_as_list(options["eos_token_id"]))
    outputs = self.generate(**inputs, **options)
    ids = _until_stop(outputs.tolist()[0][inputs["input_ids"].shape[1] :], stops)
    if tokenizer.generation == 2:
        response = process_response(self, decode_reply(tokenizer, ids))
        return response, [*history, (query, response)]
    history.append({"role": role, "content": query})
    return _process_parts(_parts(tokenizer, ids), history)


def stream_chat(
    self: Any, tokenizer: Any, query: str, history: Sequence[Any] | None = None, *args: Any, **kwargs: Any
) -> Iterator[tuple[Any, ...]]:
    """Answers a question step by step.

    Args:
        self: The model.
        tokenizer: Its tokenizer.
        query: See `chat`.
        history: See `chat`.
        *args: In this order: role="user" (generation 3 only), past_key_values=None, max_length=8192, do_sample=True,
            top_p=0.8, temperature=0.8, logits_processor=None, return_past_key_values=False. With past_key_values of the
            turn before, only the new message is read.
        **kwargs: The same by name, and further arguments of `stream_generate`.

    Yields:
        The answer so far, the history with it, and the cache if asked for. Half a character is never given out.

    Raises:
        UsageError: Arguments that the generation does not have.
    """
    options = _bind(self, tokenizer, _STREAM_CHAT, args, kwargs)
    role, past, returns_past = (options[name] for name in ("role", "past_key_values", "return_past_key_values"))
    del options["role"]
    options["logits_processor"] = _processors(options["logits_processor"])
    history = list(history or [])
    stops = tokenizer.stop_ids
    if tokenizer.generation == 2:
        whole = past is None and not returns_past
        inputs = (build_inputs if whole else build_stream_inputs)(self, tokenizer, query, history=history)
    else:
        inputs = tokenizer.build_chat_input(query, history=history if past is None else None, role=role)
        inputs = inputs.to(self.device)
        options.setdefault("eos_token_id", _stop_list(tokenizer))
        stops = frozenset(_as_list(options["eos_token_id"]))
    if past is not None:
        inputs["position_ids"] = inputs["position_ids"] + past.get_seq_length()
    start = inputs["input_ids"].shape[1]
    ids: list[int] = []
    for outputs in self.stream_generate(**inputs, **options):
        if returns_past:
            outputs, past = outputs
        ids = outputs.tolist()[0][start:]
        # ChatGLM3 shows each token one step late, so that the stop id is never among them.
        found = _response(tokenizer, query, ids if tokenizer.generation == 2 else ids[:-1], history, role, partial=True)
        if found is not None:
            yield (*found, past) if returns_past else found
    if tokenizer.generation == 3 and ids and ids[-1] not in stops:
        found = _response(tokenizer, query, ids, history, role, partial=False)
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


def process_response(self: Any, output: str, history: Sequence[Any] | None = None) -> Any:
    """Turns generated text into an answer.

    Args:
        self: The model.
        output: The text, in generation 3 with header lines and "<|assistant|>" between messages.
        history: Generation 3: the messages so far.

    Returns:
        Generation 2 (no history): the answer. Generation 3: the answer, see `chat`, and the history with it.
    """
    if history is None:
        return output.strip().replace("[[训练时间]]", "2023年")
    return _process_parts(output.split("<|assistant|>"), history)


# --- inputs of generation 2 ---


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


# --- generation ---


def stream_generate(
    self: Any,
    input_ids: Tensor,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    return_past_key_values: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """Generates one answer and gives out all ids after every step.

    Args:
        self: The model.
        input_ids: (1, T) int64; with past_key_values, what follows the cache.
        generation_config: Defaults; None: the model's own.
        logits_processor: Applied to the logits before the rules of the configuration.
        stopping_criteria: Called with (ids, None) after each token.
        prefix_allowed_tokens_fn: Gives the ids that may follow.
        return_past_key_values: Whether the cache is given out too. It is one object that grows, and holds all ids but
            the last one given out.
        **kwargs: `past_key_values`, `attention_mask`, and values of the generation configuration (max_length counts
            `input_ids` and the answer).

    Yields:
        (1, T + n) ids, the stop id among them, or a pair of them and the cache.

    Raises:
        UsageError: More than one row, beams, no room for an answer, or an argument that does not exist or has no
            effect on a stream.
    """
    past, mask = kwargs.pop("past_key_values", None), kwargs.pop("attention_mask", None)
    kwargs.pop("position_ids", None)  # the model counts on from the cache itself
    config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
    unknown = config.update(**kwargs)
    if unknown:
        raise UsageError(f"stream_generate has no argument {', '.join(unknown)}")
    _refuse_not_streamed(config)
    if input_ids.shape[0] != 1 or (config.num_beams or 1) != 1:
        raise UsageError(
            f"{input_ids.shape[0]} rows and {config.num_beams or 1} beams: a stream is one row without beams",
            hint="use generate, or glmkit.engine.decode.generate_batch",
        )
    if past is not None and not isinstance(past, Cache):
        raise UsageError(f"past_key_values is a {type(past).__name__}; expected the cache of an earlier stream")
    new_tokens = _room(config, input_ids.shape[1])
    prompt = input_ids[0] if mask is None else input_ids[0][mask[0, -input_ids.shape[1] :].bool()]
    processors = LogitsProcessorList(logits_processor or [])
    if prefix_allowed_tokens_fn is not None:
        processors.append(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, 1))
    if past is None and return_past_key_values:
        past = new_cache(self, 1, input_ids.shape[1] + min(new_tokens, 1024))
    model = _Processed(self, processors, len(prompt)) if processors else self
    stops = _as_list(self.config.eos_token_id if config.eos_token_id is None else config.eos_token_id)
    steps = stream(model, prompt.tolist(), _sampling(config), stop_ids=stops, max_new_tokens=new_tokens, cache=past)
    for step in steps:
        input_ids = torch.cat((input_ids, input_ids.new_tensor([[step.token_id]])), dim=1)
        yield (input_ids, past) if return_past_key_values else input_ids
        if stopping_criteria is not None and bool(torch.as_tensor(stopping_criteria(input_ids, None)).all()):
            return


class _Processed:
    """A model whose last logits go through logits processors, for the engine.

    Args:
        model: The language model.
        processors: What to apply.
        prompt_tokens: Length of the prompt; chunks of it before its end give no token and are not processed.
    """

    def __init__(self, model: Any, processors: LogitsProcessorList, prompt_tokens: int) -> None:
        self.model, self.processors, self.prompt_tokens = model, processors, prompt_tokens
        self.config, self.device = model.config, model.device
        self.ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, **kwargs)
        self.ids = input_ids if self.ids is None else torch.cat((self.ids, input_ids), dim=1)
        if self.ids.shape[1] >= self.prompt_tokens:
            output.logits = self.processors(self.ids, output.logits[:, -1].float())[:, None]
        return output


def _refuse_not_streamed(config: Any) -> None:
    """Refuses settings that would be ignored silently."""
    found = [name for name in _NOT_STREAMED if getattr(config, name, None)]
    found += [name for name in _NOT_STREAMED_UNLESS_1 if getattr(config, name, None) not in (None, 0, 1)]
    if found:
        given = ", ".join(f"{name}={getattr(config, name)!r}" for name in found)
        raise UsageError(f"stream_generate does not do {given}", hint="use generate, or leave it out")


def _banned(config: Any) -> tuple[tuple[int, ...], ...]:
    """Words and tokens that must not be written; as in generate, a stop id is not banned as a word."""
    stops = [[stop] for stop in _as_list(config.eos_token_id)]
    words = [list(word) for word in config.bad_words_ids or [] if list(word) not in stops]
    return tuple(map(tuple, words + [[token] for token in _as_list(config.suppress_tokens)]))


def _sampling(config: Any) -> SamplingOptions:
    """The engine's options for a generation configuration, with generate's own defaults."""

    def given(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    penalty, banned = float(given("repetition_penalty", 1.0)), _banned(config)
    if not given("do_sample", False):
        return SamplingOptions(temperature=0.0, repetition_penalty=penalty, banned_ids=banned)
    return SamplingOptions(
        temperature=float(given("temperature", 1.0)),
        top_k=int(given("top_k", _HIDDEN_TOP_K)),
        top_p=float(given("top_p", 1.0)),
        min_p=float(given("min_p", 0.0)),
        repetition_penalty=penalty,
        banned_ids=banned,
    )


def _room(config: Any, prompt_tokens: int) -> int:
    """How many tokens the answer may have."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    max_length = 20 if config.max_length is None else config.max_length  # generate's default
    if max_length <= prompt_tokens:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens and max_length={max_length} counts prompt and answer: no room",
            hint="raise max_length, or shorten the history",
        )
    return max_length - prompt_tokens


# --- apply_chat_template ---


def apply_chat_template(
    self: Any,
    conversation: Sequence[Any],
    tools: Any = None,
    *args: Any,
    add_generation_prompt: bool = False,
    tokenize: bool = True,
    return_tensors: str | None = None,
    return_dict: bool = True,
    padding: bool | str = False,
    **kwargs: Any,
) -> Any:
    """Builds the ids of one conversation or several; no text in them becomes a control id.

    Args:
        self: The tokenizer.
        conversation: Messages as mappings with role and content, or a list of such conversations.
        tools: Tools for a system message in front, if the conversation has none.
        *args: Not used.
        add_generation_prompt: Must hold in generation 2; in generation 3 whether the assistant id ends the ids.
        tokenize: False gives the decoded text, to look at; it cannot be encoded back.
        return_tensors: "pt" or "np".
        return_dict: Whether masks and positions come too.
        padding: Whether several conversations are padded, on the left.
        **kwargs: Not used.

    Returns:
        Ids, or a mapping with input_ids, attention_mask and position_ids, or text.
    """
    many = bool(conversation) and not isinstance(conversation[0], Mapping) and not hasattr(conversation[0], "role")
    rows = [
        _template_row(self, one, tools, add_generation_prompt) for one in (conversation if many else [conversation])
    ]
    if not tokenize:
        texts = [self.decode(row) for row in rows]
        return texts if many else texts[0]
    data = self.pad({"input_ids": rows}, padding=padding)
    if not many and return_tensors is None:
        data = {key: value[0] for key, value in data.items()}
    encoded = BatchEncoding(dict(data), tensor_type=return_tensors)
    return encoded if return_dict else encoded["input_ids"]


def _template_row(tokenizer: Any, conversation: Any, tools: Any, add_generation_prompt: bool) -> list[int]:
    messages = to_messages(list(getattr(conversation, "messages", conversation)))
    if tools:
        messages = to_messages([{"role": "system", "content": "", "tools": tools}, *messages])
    ids = prompt_ids(tokenizer, messages)
    return ids if add_generation_prompt or tokenizer.generation == 2 else ids[:-1]


# --- shared parts ---


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
    if tokenizer.generation == 2 and options["role"] != "user":
        raise UsageError(f"role={options['role']!r}: ChatGLM2 has no roles", hint="use ChatGLM3")
    if options["max_length"] is None:
        rope_ratio = getattr(getattr(model, "config", None), "rope_ratio", None) or 1
        options["max_length"] = 32768 if tokenizer.generation == 2 and rope_ratio > 1 else 8192
    return options


def _processors(given: Any) -> LogitsProcessorList:
    return LogitsProcessorList([*(given or []), InvalidScoreLogitsProcessor()])


def _stop_list(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, (list, tuple, Tensor)) else [int(value)]


def decode_reply(tokenizer: Any, ids: Sequence[int]) -> str:
    """Turns generated ids into text.

    Args:
        tokenizer: The model's tokenizer.
        ids: What the model wrote; ids that its vocabulary is padded with decode to nothing.

    Returns:
        The text.
    """
    return tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])


def _until_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    """The ids in front of the first stop id (beams end in padding behind it)."""
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)


def _response(
    tokenizer: Any, query: str, ids: list[int], history: list[Any], role: str, *, partial: bool
) -> tuple[Any, list[Any]] | None:
    """Answer and history for the ids so far, or None when there is nothing to show."""
    text = decode_reply(tokenizer, ids)
    if not text or text.endswith("\ufffd"):
        return None
    if tokenizer.generation == 2:
        response = process_response(None, text)
        return response, [*history, (query, response)]
    parts = _parts(tokenizer, ids)
    if partial and len(parts) > 1 and "\n" not in parts[-1]:
        parts.pop()  # the header line behind an assistant id is not complete
    return _process_parts(parts, [*history, {"role": role, "content": query}])


def _parts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each message of a reply, divided by the assistant id and not by its name in the text."""
    assistant = tokenizer.get_command("<|assistant|>")
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == assistant:
            parts.append([token])
        else:
            parts[-1].append(token)
    # Decoded with the id in front, a later message keeps its leading blank, as in the text of the whole.
    return [tokenizer.decode(part).removeprefix("<|assistant|>" if number else "") for number, part in enumerate(parts)]


def _process_parts(parts: Sequence[str], before: Sequence[Any]) -> tuple[Any, list[Any]]:
    history = copy.deepcopy(list(before))
    response: Any = ""
    for part in parts:
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        if not metadata.strip():
            content = content.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            response = content.replace("[[训练时间]]", "2023年")
            continue
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        response = {"name": metadata.strip()}
        if history[0]["role"] == "system" and "tools" in history[0]:
            response["parameters"] = _parameters(content)
        else:
            response["content"] = content
    return response, history


def _parameters(content: str) -> dict[str, Any] | None:
    """The arguments of a call, or None if it is not complete or no call."""
    try:
        return parse_tool_call(content)
    except ToolCallError:
        return None
