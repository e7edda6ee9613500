"""What the parts of the page show of a conversation, as updates for gradio."""

from __future__ import annotations

import asyncio
import html
from typing import Any
from urllib.parse import quote

from glmkit.chat.choices import choose, official_sampling
from glmkit.chat.interchange import MEDIA_TYPES
from glmkit.errors import UsageError
from glmkit.tools.schema import read_definitions
from glmkit.translation import translate
from glmkit.web import page as pages
from glmkit.web.desk import SETTINGS, Desk
from glmkit.web.look import gradio
from glmkit.web.models import adapter_names, gigabytes, label
from glmkit.web.page import Page
from glmkit.web.talks import Talk
from glmkit.web.texts import MODES, Language, say
from glmkit.web.view import meter, pretty, rows

Updates = dict[Any, Any]
_LISTED = 200  # conversations in the list


def merged(first: Updates, second: Updates) -> Updates:
    """Both updates together: of a part that is in both, the words of the first and the state of the second.

    Args:
        first: Updates.
        second: Updates; what is in both counts as it is here.
    """
    both = dict(first)
    for part, update in second.items():
        earlier = both.get(part)
        both[part] = {**earlier, **update} if isinstance(earlier, dict) and isinstance(update, dict) else update
    return both


class Showing:
    """Updates for the parts of a page.

    Args:
        page: The parts.
        desk: What is shown.
    """

    def __init__(self, page: Page, desk: Desk) -> None:
        self.page, self.desk, self.gr = page, desk, gradio()

    def moving(self, talk: Talk, language: Language) -> Updates:
        """What changes while an answer is written."""
        page, gr, asking = self.page, self.gr, talk.asking
        question = ""
        if asking is not None:
            question = say(
                language, "approve", name=asking.name, arguments="\n\n```json\n" + pretty(asking.arguments) + "\n```\n"
            )
        return {
            page.chat: gr.update(value=[row.shown for row in rows(talk, language)]),
            page.asking: gr.update(visible=asking is not None),
            page.question: question,
            page.input: gr.update(submit_btn=not talk.running, stop_btn=talk.running),
            page.go_on: gr.update(visible=talk.cut),
            page.meter: meter(talk.context, language),
        }

    async def settled(self, talk: Talk, language: Language) -> Updates:
        """What changes when an answer is there."""
        page, gr = self.page, self.gr
        said = say(language, "failed", reason=talk.problem) if talk.problem else say(language, "answered")
        return {
            page.announce: f'<div role="status" aria-live="polite">{html.escape(said)}</div>',
            page.input: gr.update(
                submit_btn=True,
                stop_btn=False,
                placeholder=self._placeholder(talk, language),
                interactive=self._usable(talk),
            ),
            page.files: self.files(talk, language),
            **await self.listing(talk, language),
        }

    async def whole(self, talk: Talk, language: Language) -> Updates:
        """Everything that depends on the conversation."""
        page, gr = self.page, self.gr
        problem = say(language, "code_off", reason=self.desk.interpreters.reason) if not self._usable(talk) else ""
        return {
            page.talk_id: talk.id,
            page.wanted_talk: talk.id,
            page.mode: gr.update(value=talk.mode, choices=[(say(language, f"mode_{mode}"), mode) for mode in MODES]),
            page.chat: gr.update(
                value=[row.shown for row in rows(talk, language)],
                placeholder=pages.greeting(language, talk.mode, problem),
                examples=[] if problem else pages.examples(language, talk.mode),
            ),
            page.asking: gr.update(visible=talk.asking is not None),
            page.go_on: gr.update(visible=talk.cut),
            page.meter: meter(talk.context, language),
            page.banner: self._banner(talk, language),
            page.input: gr.update(
                submit_btn=not talk.running,
                stop_btn=talk.running,
                placeholder=self._placeholder(talk, language),
                interactive=self._usable(talk),
            ),
            page.name: gr.update(value=talk.title),
            page.delete_sure: gr.update(visible=False),
            page.exports: self._exports(talk, language),
            page.system: gr.update(value=talk.system),
            page.tools_box: gr.update(visible=talk.mode == "tools"),
            page.offered: gr.update(choices=self._tool_choices(), value=talk.offered),
            page.by_hand: gr.update(value=talk.by_hand),
            page.definitions: gr.update(value=talk.definitions),
            page.definitions_note: self.definitions_note(talk.definitions, language),
            page.code_box: gr.update(visible=talk.mode == "code"),
            page.isolation: self._isolation(language),
            page.files: self.files(talk, language),
            page.prompt: gr.update(visible=False),
            page.prompt_ids: gr.update(visible=False),
            **self.model_parts(talk, language),
            **self.slider_parts(talk, language),
            **await self.listing(talk, language),
        }

    async def listing(self, talk: Talk, language: Language, text: str = "") -> Updates:
        """The list of conversations."""
        entries = (await asyncio.to_thread(self.desk.entries, talk.owner, text))[:_LISTED]
        choices = [(entry.title or say(language, "untitled"), entry.id) for entry in entries]
        chosen = talk.id if any(id == talk.id for _, id in choices) else None
        return {
            self.page.history: self.gr.update(choices=choices, value=chosen),
            self.page.name: self.gr.update(value=talk.title),
        }

    def slider_parts(self, talk: Talk, language: Language) -> Updates:
        """The sliders: where they stand, what the model's own values are, and which were changed."""
        own = self.own_settings(talk)
        changed: Updates = {}
        for slider, name in zip(self.page.sliders, SETTINGS, strict=True):
            value = talk.settings.get(name, own[name])
            key = "changed" if name in talk.settings else "default"
            update = {"value": value, "info": say(language, key, value=f"{own[name]:g}")}
            if name == "max_new_tokens":
                update["maximum"] = own[name]
            changed[slider] = self.gr.update(**update)
        return changed

    def model_parts(self, talk: Talk, language: Language) -> Updates:
        """Model and adapter."""
        page, gr, models = self.page, self.gr, self.desk.models
        loaded = models.is_loaded(talk.model)
        adapters = adapter_names(models.get(talk.model)) if loaded else ()
        note = say(language, "model_loaded") if loaded else ""
        return {
            page.model: gr.update(choices=[(label(name), name) for name in models.names], value=talk.model),
            page.model_note: f'<p class="glm-note">{note}</p>',
            page.load: gr.update(visible=not loaded),
            page.adapter: gr.update(
                visible=bool(adapters),
                choices=[(say(language, "adapter_base"), ""), *((name, name) for name in adapters)],
                value=talk.adapter or "",
            ),
        }

    # --- small parts ---

    def own_settings(self, talk: Talk) -> dict[str, Any]:
        """The values that the model answers with if nobody says otherwise."""
        if not self.desk.models.is_loaded(talk.model):
            return {"max_new_tokens": 1024, "top_p": 0.8, "temperature": 0.8, "repetition_penalty": 1.0}
        served = self.desk.models.get(talk.model)
        choices = choose(served.model, official=official_sampling(served.model, served.tokenizer))
        own = {name: getattr(choices.options, name) for name in SETTINGS if name != "max_new_tokens"}
        return {"max_new_tokens": choices.max_new_tokens or served.context_tokens, **own}

    def _usable(self, talk: Talk) -> bool:
        return talk.mode != "code" or self.desk.interpreters.available

    def _placeholder(self, talk: Talk, language: Language) -> str:
        if talk.pending is not None:
            return say(language, "placeholder_observation", name=talk.pending)
        return say(language, f"placeholder_{talk.mode}")

    def _tool_choices(self) -> list[tuple[str, str]]:
        return [
            (tool.name if tool.name in self.desk.safe else f"{tool.name} ⚠", tool.name) for tool in self.desk.registry
        ]

    def definitions_note(self, text: str, language: Language) -> str:
        try:
            names = [schema["name"] for schema in read_definitions(text)]
        except UsageError as error:
            return f'<p class="glm-problem">{html.escape(translate(error.message, language))}</p>'
        known = say(language, "definitions_good", count=len(names), names=", ".join(names))
        note = known if names else say(language, "definitions_none")
        return f'<p class="glm-note">{html.escape(note)} · {say(language, "definitions_hint")}</p>'

    def _isolation(self, language: Language) -> str:
        isolation = self.desk.interpreters.isolation
        if isolation is None:
            return f'<p class="glm-problem">{html.escape(self.desk.interpreters.reason)}</p>'
        kind = "glm-note" if isolation.safe else "glm-problem"
        return (
            f'<p class="{kind}"><b>{say(language, "isolation")}</b> · {html.escape(isolation.sentences[language])}</p>'
        )

    def _banner(self, talk: Talk, language: Language) -> Any:
        isolation = self.desk.interpreters.isolation
        unsafe = talk.mode == "code" and isolation is not None and not isolation.safe
        text = f'<div class="glm-unsafe" role="alert">{say(language, "unsafe")}</div>'
        return self.gr.update(value=text if unsafe else "", visible=unsafe)

    def files(self, talk: Talk, language: Language) -> str:
        found = self.desk.interpreters.of(talk.id).files() if talk.mode == "code" and self._usable(talk) else []
        if not found:
            return f'<p class="glm-note">{say(language, "files_none")}</p>'
        lines = "".join(
            f'<li><a href="/files/{talk.id}/{quote(file.name, safe="")}" download>{html.escape(file.name)}</a> '
            f"<span>{gigabytes(file.size_bytes)}</span></li>"
            for file in found
        )
        return f'<p class="glm-note">{say(language, "files")}</p><ul class="glm-files">{lines}</ul>'

    def _exports(self, talk: Talk, language: Language) -> str:
        links = " ".join(
            f'<a href="/export/{talk.id}.{form}?language={language}" download>{say(language, f"export_{form}")}</a>'
            for form in MEDIA_TYPES
        )
        return f'<div class="glm-exports"><span>{say(language, "export")}</span> {links}</div>'
