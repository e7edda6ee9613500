"""What clients send and get: OpenAI's current shapes, the old ones, and what is added here, each field by its name.

Strict: a number is no text and no boolean a number, so that a slip is an error and not another answer. Fields that are
not listed are ignored, and named in the response's header `x-ignored-fields`. Fields that would change the answer and
cannot be obeyed are listed in REFUSED.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_TOKENS = 2**31 - 1
MAX_CHOICES = 16
MAX_PROMPTS = 64  # of one request for completions; all its answers together are no more
MAX_STOPS = 16
MAX_MESSAGES = 10_000
MAX_BIASES = 1_024
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_CHARACTERS = 1_000
MAX_METADATA = 16

REFUSED: dict[str, str] = {
    "audio": "this model has no voice",
    "prediction": "predicted output is not offered",
    "web_search_options": "there is no search on the web",
    "reasoning_effort": "these models have no separate reasoning",
    "verbosity": "these models have no such setting",
    "suffix": "text is not inserted in front of a suffix",
    "best_of": "send n and choose yourself",
    "prompt_logprobs": "log-probabilities are given for the answer only",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "chat_template": "the model's own format is used",
    "chat_template_kwargs": "the model's own format is used",
}
"""Fields of other servers that change the answer and are not obeyed here, and why; null is no request for them."""


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)


class Shape(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class TextPart(Shape):
    """A part of a content."""

    type: Literal["text"]
    text: str


class CalledFunction(Shape):
    """A function and its arguments, as the text of a JSON object."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str = "{}"


class CalledTool(Shape):
    """A call, with the id that its result names."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | list[TextPart]
Name = Annotated[str, Field(max_length=128)]


class SystemMessage(Shape):
    """What the model is told before everything else."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(Shape):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Shape):
    """What the model said: a content, or calls, or both."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS)] | None = None
    function_call: CalledFunction | None = None


class ToolMessage(Shape):
    """What a tool answered to a call of the message in front."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128)]


class FunctionMessage(Shape):
    """The old form of what a tool answered."""

    role: Literal["function"]
    content: Content
    name: Name | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")
]


class Function(Shape):
    """A function that the model may call; further fields are shown to the model too."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FunctionTool(Shape):
    """A function in OpenAI's wrapper."""

    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    """The one function that must be called."""

    name: Annotated[str, Field(min_length=1, max_length=128)]


class NamedTool(Shape):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Shape):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class JSONSchema(Shape):
    """The schema of an answer."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Shape):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class Sampling(Shape):
    """What chat and completions have in common; None is the model's own setting."""

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=MAX_BIASES)
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS, description="extension: 0 is off"), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, description="extension")] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, description="extension: 1 is off")] | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: list[FunctionTool | Function] | dict[str, dict[str, Any]] | None = Field(
        None,
        max_length=MAX_TOOLS,
        description="OpenAI's form; or, as ChatGLM3's server took them, functions without the wrapper or a mapping "
        "from names: answers then have function_call",
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    metadata: Annotated[Metadata, Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    modalities: list[Literal["text"]] | None = None


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS), WHOLE]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    echo: bool | None = None


class TokenizeRequest(Shape):
    """POST /tokenize: a text, or messages."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["text"], "properties": {"text": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: Annotated[str, Field(max_length=256)] | None = None
    text: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[FunctionTool | Function] | dict[str, dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    add_special_tokens: bool = Field(True, description="whether a text gets the ids that models read around it")


class LegacyRequest(Shape):
    """POST /, the form of api.py of ChatGLM-6B and ChatGLM2-6B; a number that is zero or missing is the default."""

    prompt: str
    history: (
        Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(max_length=MAX_MESSAGES)] | None
    ) = None
    max_length: Annotated[int, Field(ge=0, le=MAX_TOKENS), WHOLE] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None


# --- answers ---


class CachedTokens(Shape):
    """Tokens of the prompt that had been read before."""

    cached_tokens: int


class Usage(Shape):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(Shape):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape):
    """The tokens of a content."""

    content: list[TokenLogprob] | None
    refusal: None = None


class Answer(Shape):
    """A message of the assistant; in a stream, a piece of it."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[CalledTool] | None = None
    function_call: CalledFunction | None = None
    malformed_tool_call: str | None = Field(None, description="extension: why what looks like a call of a tool is none")


FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class ChatChoice(Shape):
    """One of the answers."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Shape):
    """The response to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"] = "default"
    metadata: Metadata | None = None
    dropped_turns: int | None = Field(None, description="extension: oldest turns that did not fit into the context")


class CompletionLogprobs(Shape):
    """The tokens of a text, in the form of completions."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Shape):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Shape):
    """The response to POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class Model(Shape):
    """A base or an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_length: int = Field(description="extension: tokens that prompt and answer may have together")
    root: str = Field(description="extension: the model that an adapter belongs to; itself for a base")
    parent: str | None = None


class ModelList(Shape):
    """The response to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(Shape):
    """The response to POST /tokenize."""

    tokens: list[int]
    count: int
    context_length: int
    prompt: str = Field(description="what the model reads, control tokens by name")


class LegacyAnswer(Shape):
    """The response to POST /."""

    response: str
    history: list[list[str]]
    status: Literal[200] = 200
    time: str


class Deleted(Shape):
    """The response to DELETE /v1/chat/completions/{id}."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: bool = True


class StoredList(Shape):
    """The response to GET /v1/chat/completions."""

    object: Literal["list"] = "list"
    data: list[ChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool
