"""`pipeline(task="text_generation", model=…)`: a thin door in the form that MindFormers users know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmkit.chat.choices import choose, is_setting, official_sampling
from glmkit.chat.context import fit_context
from glmkit.chat.conversation import reply_to
from glmkit.chat.messages import to_messages
from glmkit.chat.reply import parse_reply
from glmkit.chat.templates import chat_format
from glmkit.engine.decode import generate_batch
from glmkit.errors import UsageError
from glmkit.loading import Loaded, load

_RESULT = "text_generation_text"
_ROUND = "[Round "  # how a prompt begins that `tokenizer.build_prompt` made


def pipeline(
    task: str = "text_generation",
    model: str | Path | Loaded | Any = "glm-nano",
    tokenizer: Any = None,
    max_length: int = 2048,
    batch_size: int = 1,
    **options: Any,
) -> TextGenerationPipeline:
    """Makes a function from text to generated text.

    Args:
        task: "text_generation"; "text-generation" is understood too.
        model: A folder, a name such as "chatglm2-6b" or "glm2_6b" (never fetched silently), a hub id, what
            `glmkit.load` returned, or a model with its tokenizer.
        tokenizer: The tokenizer, if `model` is a model.
        max_length: Most tokens of prompt and answer together.
        batch_size: Texts answered together.
        **options: Arguments of `glmkit.load` (adapter, dtype, device, quantize, ...) and sampling settings (do_sample,
            top_k, top_p, temperature, repetition_penalty, seed, max_new_tokens).

    Returns:
        The function.

    Raises:
        UsageError: Unknown task, model or option.
    """
    if task.replace("-", "_") != "text_generation":
        raise UsageError(f"there is no task {task!r}", hint="did you mean 'text_generation'?")
    settings = {name: options.pop(name) for name in list(options) if is_setting(name)}
    if isinstance(model, str | Path):
        model = load(model, **options)
    elif options:
        raise UsageError(f"{', '.join(options)}: only for a model that is loaded by name or folder")
    chats = True
    if isinstance(model, Loaded):
        chats = model.family is None or model.family.chat
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if tokenizer is None:
        raise UsageError("a model that is no name or folder needs tokenizer=")
    return TextGenerationPipeline(model, tokenizer, max_length, batch_size, settings, chats=chats)


class TextGenerationPipeline:
    """Answers a text or several.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_length: Most tokens of prompt and answer together.
        batch_size: Texts answered together.
        settings: Sampling settings by name.
        chats: Whether texts are questions; False for base models, which continue them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int = 2048,
        batch_size: int = 1,
        settings: dict[str, Any] | None = None,
        *,
        chats: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.chats = model, tokenizer, chats
        self.max_length, self.batch_size, self.settings = max_length, batch_size, settings or {}
        self._official = official_sampling(model, tokenizer)
        choose(
            model, sampling=self.settings, official=self._official
        )  # a mistake should show here, not at the first question

    def __call__(self, inputs: str | Sequence[str], **settings: Any) -> list[dict[str, list[str]]]:
        """Answers.

        Args:
            inputs: A text or several. For a chat model it is a question, unless `tokenizer.build_prompt` has made a
                prompt of it already.
            **settings: Sampling settings and max_length, for this call.

        Returns:
            One dictionary for each text: {"text_generation_text": [answer]}.

        Raises:
            UsageError: An unknown setting, or a text that leaves no room for an answer.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        context = min(settings.pop("max_length", self.max_length), self.model.config.max_position_embeddings)
        choices = choose(self.model, sampling=self.settings | settings, official=self._official)
        if self.tokenizer.generation == 0:  # every blank is another prompt
            given = {"options": choices.options, "max_new_tokens": choices.max_new_tokens, "stop": choices.stop}
            return [{_RESULT: [reply_to(self.model, self.tokenizer, text, **given).text]} for text in texts]
        prompts = [self._prompt(text, context) for text in texts]
        rooms = [min(context - len(prompt), choices.max_new_tokens or context) for prompt in prompts]
        answers = generate_batch(
            self.model,
            prompts,
            choices.options,
            stop_ids=self.tokenizer.stop_ids,
            max_new_tokens=max(rooms, default=1),
            batch_size=self.batch_size,
        )
        return [{_RESULT: [self._text(ids[:room], choices.stop)]} for ids, room in zip(answers, rooms)]

    def _prompt(self, text: str, context: int) -> list[int]:
        if self.chats and not (self.tokenizer.generation == 2 and text.startswith(_ROUND)):
            return fit_context(self.tokenizer, to_messages(text), context, 0)[0]
        ids = chat_format(self.tokenizer).text_ids(self.tokenizer, text)
        if len(ids) >= context:
            raise UsageError(
                f"the text has {len(ids):,} tokens; prompt and answer together may have {context:,}",
                hint="shorten the text, or raise max_length as far as the model's context allows",
            )
        return ids

    def _text(self, ids: list[int], stop: Sequence[str]) -> str:
        if self.chats:
            messages = parse_reply(self.tokenizer, ids).messages
            text = "\n".join(f"{one.metadata}\n{one.content}".strip() for one in messages)
        else:
            text = self.tokenizer.decode_ids(ids)
        return text[: min((text.find(word) for word in stop if word in text), default=len(text))]
