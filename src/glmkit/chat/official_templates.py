"""`apply_chat_template` of the tokenizer classes. No text in a conversation becomes a control id.

Source: transformers for the generations whose official tokenizers leave it to a template; tokenization_chatglm.py of
GLM-4-9B for its own method (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmkit.chat.blocks import Blocks
from glmkit.chat.messages import to_messages
from glmkit.chat.templates import chat_format
from glmkit.errors import UsageError
from glmkit.hf import BatchEncoding


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
        *args: Refused: what transformers has there is given by name.
        add_generation_prompt: Must hold in generations 1 and 2; in generation 3 whether the assistant id ends the ids.
        tokenize: False gives the decoded text, to look at; it cannot be encoded back.
        return_tensors: "pt" or "np".
        return_dict: Whether masks and positions come too.
        padding: Whether several conversations are padded, on the left.
        **kwargs: Refused where transformers would give something else for them (`continue_final_message`, `truncation`,
            ...), else not used.

    Returns:
        Ids, or a mapping with input_ids, attention_mask and position_ids, or text.

    Raises:
        UsageError: A message or tool of no known form, or an argument that is not done here.
    """
    _refuse_foreign({"an argument behind tools without its name": any(value is not None for value in args), **kwargs})
    if padding == "max_length" and kwargs.get("max_length"):
        raise UsageError("apply_chat_template: padding to max_length is not supported", hint="use padding=True")
    many = _is_many(conversation)
    rows = [_row(self, one, tools, add_generation_prompt) for one in (conversation if many else [conversation])]
    if not tokenize:
        texts = [self.decode(row) for row in rows]
        return texts if many else texts[0]
    data = self.pad({"input_ids": rows}, padding=padding)
    if not many and return_tensors is None:
        data = {key: value[0] for key, value in data.items()}
    encoded = BatchEncoding(dict(data), tensor_type=return_tensors)
    return encoded if return_dict else encoded["input_ids"]


def apply_chat_template_of_glm4(
    self: Any,
    conversation: Sequence[Any],
    add_generation_prompt: Any = False,
    tokenize: bool = True,
    padding: bool | str = False,
    truncation: bool = False,
    max_length: int | None = None,
    return_tensors: str | None = None,
    return_dict: bool = False,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    add_special_tokens: bool = True,
    *,
    tools: Any = None,
    **kwargs: Any,
) -> Any:
    """Builds the ids of one GLM-4 conversation or several.

    Args:
        self: The tokenizer.
        conversation: Messages as mappings with role and content, where needed metadata, and tools in a system message;
            a list of such conversations; or an object with `messages`.
        add_generation_prompt: Whether the assistant id ends the ids.
        tokenize: False gives the text, to look at; it cannot be encoded back.
        padding: Whether several conversations are padded, on the left.
        truncation: Whether ids are cut to `max_length`, at their end.
        max_length: Most ids of a conversation, with `truncation`; the length to pad to, with padding="max_length".
        return_tensors: "pt" or "np".
        return_dict: Whether masks and positions come too.
        tokenizer_kwargs: Not used.
        add_special_tokens: Whether [gMASK] and <sop> stand in front.
        tools: Tools for a system message in front, if the conversation has none. What stands in front of them is
            the tokenizer's `tools_preamble` if it has one, see `glmkit.chat.tools.GLM4_PREAMBLES`.
        **kwargs: Refused where transformers would give something else for them (`continue_final_message`, ...), else
            not used.

    Returns:
        Ids (of one conversation a plain list, where the official method has it in another list), or a mapping with
        input_ids, attention_mask and position_ids, or text.

    Raises:
        UsageError: A message or tool of no known form, or an argument that is not done here.
    """
    _refuse_foreign(kwargs)
    if isinstance(add_generation_prompt, (list, tuple, Mapping)):  # the order of transformers
        tools, add_generation_prompt = add_generation_prompt, False
    many = _is_many(conversation)
    rows = []
    for one in conversation if many else [conversation]:
        ids = _row(self, one, tools, bool(add_generation_prompt))
        ids = ids if add_special_tokens else ids[len(self.prefix_ids) :]
        rows.append(ids[:max_length] if truncation else ids)
    if not tokenize:
        texts = [self.decode_ids(row) for row in rows]
        return texts if many else texts[0]
    limit = {"max_length": max_length} if padding == "max_length" else {}
    data = self.pad({"input_ids": rows}, padding=padding, **limit)
    if not many and return_tensors is None:
        data = {key: value[0] for key, value in data.items()}
    encoded = BatchEncoding(dict(data), tensor_type=return_tensors)
    return encoded if return_dict else encoded["input_ids"]


_FOREIGN = (  # arguments of transformers that change the ids or add something to them
    "an argument behind tools without its name",
    "chat_template",
    "continue_final_message",
    "documents",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "truncation",
)


def _refuse_foreign(arguments: Mapping[str, Any]) -> None:
    wrong = [name for name in _FOREIGN if arguments.get(name)]
    if wrong:
        raise UsageError(f"apply_chat_template: {', '.join(wrong)} is not supported", hint="leave it out")


def _is_many(conversation: Any) -> bool:
    """Whether it is a list of conversations."""
    if not isinstance(conversation, Sequence) or not conversation:
        return False
    return not isinstance(conversation[0], Mapping) and not hasattr(conversation[0], "role")


def _row(tokenizer: Any, conversation: Any, tools: Any, add_generation_prompt: bool) -> list[int]:
    messages = to_messages(list(getattr(conversation, "messages", conversation)))
    if tools:
        messages = to_messages([{"role": "system", "content": "", "tools": tools}, *messages])
    form = chat_format(tokenizer)
    ids = form.prompt_ids(tokenizer, messages)
    return ids if add_generation_prompt or not isinstance(form, Blocks) else ids[:-1]
