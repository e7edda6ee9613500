"""What happens when somebody touches the page. Each function checks whose conversation it is; the page proves nothing.

A turn is started by `send`, `retry`, `edit` ... and belongs to the conversation. `follow` only shows it, so the page
may be closed, reloaded or stopped at any time.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from glmkit.chat.messages import Message
from glmkit.errors import GlmkitError, UsageError
from glmkit.tools.schema import read_definitions
from glmkit.translation import translate
from glmkit.web import page as pages
from glmkit.web.desk import SETTINGS, Desk
from glmkit.web.look import gradio
from glmkit.web.models import gigabytes, label
from glmkit.web.page import Page
from glmkit.web.showing import Showing, Updates, merged
from glmkit.web.talks import Note, Talk
from glmkit.web.texts import LANGUAGES, MODES, Language, Mode, say
from glmkit.web.turns import prompt_messages
from glmkit.web.view import original, prompt_pieces, rows


class Actions:
    """The functions behind the parts of a page.

    Args:
        page: The parts.
        desk: What they work on.
        language: Of a page that asks for none.
    """

    def __init__(self, page: Page, desk: Desk, language: Language) -> None:
        self.page, self.desk, self.language = page, desk, language
        self.show, self.gr = Showing(page, desk), gradio()

    # --- looking ---

    async def load(self, wanted_language: str, wanted_id: str, request: Any) -> Updates:
        """A page was opened or reloaded: it gets the conversation that it had."""
        language = self._language(wanted_language)
        talk = None
        if wanted_id:
            try:
                talk = await self.desk.open(_owner(request), wanted_id)
            except UsageError:
                talk = None
        talk = talk or self.desk.new(_owner(request))
        words = merged(pages.relabel(self.page, language), {self.page.language: self.gr.update(value=language)})
        return merged(words, await self.show.whole(talk, language))

    async def translate(self, language: str, id: str, request: Any) -> Updates:
        """The other language was chosen."""
        chosen = self._language(language)
        talk = await self._talk(id, request)
        return merged(pages.relabel(self.page, chosen), await self.show.whole(talk, chosen))

    async def follow(self, id: str, language: str, request: Any) -> AsyncIterator[Updates]:
        """Shows a conversation as long as an answer is written."""
        try:
            talk = await self._talk(id, request)
        except UsageError:
            return
        async for _ in talk.follow():
            yield self.show.moving(talk, self._language(language))
        yield {
            **self.show.moving(talk, self._language(language)),
            **await self.show.settled(talk, self._language(language)),
        }

    # --- talking ---

    async def send(self, text: str, id: str, language: str, request: Any, controls: tuple[Any, ...]) -> Updates:
        """A question, or what a tool answers."""
        talk = await self._talk(id, request)
        self._apply(talk, controls)
        self._check_ready(talk)
        if talk.pending is not None:
            talk.add("observation", text, Note(by_hand=True))
        else:
            talk.add("user", text)
        return await self._begun(talk, language)

    async def example(self, data: Any, id: str, language: str, request: Any, controls: tuple[Any, ...]) -> Updates:
        """A proposed question was chosen."""
        return await self.send(str(data.value.get("text", "")), id, language, request, controls)

    async def retry(self, id: str, language: str, request: Any, controls: tuple[Any, ...]) -> Updates:
        """The last question is answered again, perhaps by another adapter."""
        talk = await self._talk(id, request)
        self._apply(talk, controls)
        place = talk.last_question
        if place is None:
            raise UsageError("there is no question yet")
        self._check_ready(talk)
        talk.keep(place + 1)
        return await self._begun(talk, language)

    async def undo(self, id: str, language: str, request: Any) -> Updates:
        """The last question goes back into the input, and all that came of it goes."""
        talk = await self._talk(id, request)
        place = talk.last_question
        if place is None:
            raise UsageError("there is no question yet")
        text = talk.messages[place].content
        talk.keep(place)
        await self.desk.save(talk)
        parts = self.show.moving(talk, self._language(language))
        parts[self.page.input] = self.gr.update(value=text)
        return parts

    async def edit(self, data: Any, id: str, language: str, request: Any, controls: tuple[Any, ...]) -> Updates:
        """A message was changed: after a question the answer is made again, an answer just changes."""
        talk = await self._talk(id, request)
        shown = rows(talk, self._language(language))
        index = data.index[0] if isinstance(data.index, (list, tuple)) else data.index
        place = shown[index].place if 0 <= index < len(shown) else -1
        if place < 0:
            return self.show.moving(talk, self._language(language))
        self._apply(talk, controls)
        asked = talk.messages[place].role == "user"
        if asked:
            self._check_ready(talk)
        talk.rewrite(place, original(str(data.value)))
        if not asked:
            await self.desk.save(talk)
            return self.show.moving(talk, self._language(language))
        talk.keep(place + 1)
        return await self._begun(talk, language)

    async def go_on(self, id: str, language: str, request: Any, controls: tuple[Any, ...]) -> Updates:
        """A cut answer goes on."""
        talk = await self._talk(id, request)
        self._apply(talk, controls)
        self.desk.go_on(talk)
        return self.show.moving(talk, self._language(language))

    async def stop(self, id: str, request: Any) -> None:
        """The answer ends where it is."""
        (await self._talk(id, request)).stop()

    async def clear(self, id: str, language: str, request: Any) -> Updates:
        """All messages go; a running answer ends."""
        talk = await self._talk(id, request)
        talk.stop()
        await talk.finished()
        fresh = self.desk.new(talk.owner, talk.mode, talk.model)
        fresh.system, fresh.settings, fresh.definitions = talk.system, dict(talk.settings), talk.definitions
        fresh.offered, fresh.by_hand, fresh.adapter = list(talk.offered), talk.by_hand, talk.adapter
        await self.desk.delete(talk)
        return await self.show.whole(fresh, self._language(language))

    async def decide(self, allowed: bool, always: bool, id: str, request: Any) -> None:
        """A tool may run, or not."""
        (await self._talk(id, request)).decide(allowed, always)

    async def _begun(self, talk: Talk, language: str) -> Updates:
        self.desk.answer(talk)
        await self.desk.save(talk)
        parts = self.show.moving(talk, self._language(language))
        parts[self.page.input] = self.gr.update(value="", submit_btn=False, stop_btn=True)
        return parts

    def _check_ready(self, talk: Talk) -> None:
        """Refuses before anything is changed."""
        if talk.running:
            raise UsageError("another answer is still being written", hint="stop it first")
        self.desk.models.get(talk.model)
        if talk.mode == "code":
            self.desk.interpreters.check()
        if talk.mode == "tools":
            read_definitions(talk.definitions)

    # --- conversations ---

    async def new(self, mode: str, id: str, language: str, request: Any) -> Updates:
        """A new conversation, in the mode of the one before."""
        model = (await self._talk(id, request)).model if id else None
        return await self.show.whole(self.desk.new(_owner(request), _mode(mode), model), self._language(language))

    async def open(self, wanted: str, language: str, request: Any) -> Updates:
        """A conversation was chosen in the list."""
        return await self.show.whole(await self.desk.open(_owner(request), wanted), self._language(language))

    async def change_mode(self, mode: str, id: str, language: str, request: Any) -> Updates:
        """Another mode: an empty conversation takes it, otherwise a new one begins."""
        talk = await self._talk(id, request)
        if talk.messages or talk.running:
            talk = self.desk.new(talk.owner, _mode(mode), talk.model)
        talk.mode = _mode(mode)
        if talk.mode == "tools" and not talk.definitions:
            talk.definitions = ""
        return await self.show.whole(talk, self._language(language))

    async def search(self, text: str, id: str, language: str, request: Any) -> Updates:
        """Something was typed above the list."""
        return await self.show.listing(await self._talk(id, request), self._language(language), text)

    async def rename(self, title: str, id: str, language: str, request: Any) -> Updates:
        """The conversation gets another title."""
        talk = await self._talk(id, request)
        await self.desk.rename(talk, title)
        return await self.show.listing(talk, self._language(language))

    async def delete(self, id: str, language: str, request: Any) -> Updates:
        """The conversation goes, after a second press."""
        talk = await self._talk(id, request)
        await self.desk.delete(talk)
        return await self.show.whole(self.desk.new(talk.owner, talk.mode, talk.model), self._language(language))

    async def take_in(self, file: Any, id: str, language: str, request: Any) -> Updates:
        """A file with conversations was uploaded; they are kept, and the file is not."""
        path, chosen = Path(str(file)), self._language(language)
        try:
            content = await asyncio.to_thread(path.read_bytes)
        finally:
            path.unlink(missing_ok=True)
        try:
            talk = await self.desk.take_in(_owner(request), content)
        except UsageError as error:
            raise UsageError(say(chosen, "import_failed", reason=error.message), hint=error.hint) from None
        self.gr.Info(say(chosen, "imported"))
        return await self.show.whole(talk, chosen)

    # --- settings ---

    async def apply(self, id: str, language: str, request: Any, controls: tuple[Any, ...]) -> Updates:
        """Something on the right was changed."""
        talk = await self._talk(id, request)
        self._apply(talk, controls)
        chosen = self._language(language)
        marks = {
            part: self.gr.update(info=update["info"]) for part, update in self.show.slider_parts(talk, chosen).items()
        }
        return {**marks, self.page.definitions_note: self.show.definitions_note(talk.definitions, chosen)}

    async def reset(self, id: str, language: str, request: Any) -> Updates:
        """The sliders go back to the model's own values."""
        talk = await self._talk(id, request)
        talk.settings = {}
        return self.show.slider_parts(talk, self._language(language))

    async def choose_model(self, name: str, id: str, language: str, request: Any) -> Updates:
        """Another model: at once if it is loaded, else with what it needs and a button."""
        talk, chosen = await self._talk(id, request), self._language(language)
        if self.desk.models.is_loaded(name):
            return self._use_model(talk, name, chosen)
        estimate = await self.desk.models.estimate(name)
        note = translate(estimate.problem, chosen) or say(
            chosen, "model_estimate", need=gigabytes(estimate.need_bytes), free=gigabytes(estimate.free_bytes)
        )
        kind = "glm-note" if estimate.fits and not estimate.problem else "glm-problem"
        return {
            self.page.model_note: f'<p class="{kind}">{html.escape(note)}</p>',
            self.page.load: self.gr.update(visible=True, interactive=estimate.fits),
        }

    async def load_model(self, name: str, id: str, language: str, request: Any) -> AsyncIterator[Updates]:
        """Loads a model and shows how far it is; everybody else goes on."""
        talk, chosen, models = await self._talk(id, request), self._language(language), self.desk.models
        task = asyncio.create_task(models.load(name, self.desk.is_used))
        while not task.done():
            loading = models.loading
            percent = loading.percent if loading is not None and loading.name == name else 0
            note = html.escape(say(chosen, "model_loading", name=label(name), percent=percent))
            yield {
                self.page.model_note: f'<progress max="100" value="{percent}" aria-label="{note}"></progress>'
                f'<p class="glm-note">{note}</p>',
                self.page.load: self.gr.update(interactive=False),
            }
            await asyncio.wait({task}, timeout=0.3)
        try:
            task.result()
        except GlmkitError as error:
            note = html.escape(say(chosen, "model_failed", name=label(name), reason=error.message))
            yield {
                self.page.model_note: f'<p class="glm-problem">{note}</p>',
                self.page.load: self.gr.update(interactive=True),
            }
            return
        yield self._use_model(talk, name, chosen)

    async def show_prompt(self, text: str, id: str, request: Any) -> Updates:
        """The prompt as the model gets it, with what stands in the input."""
        talk = await self._talk(id, request)
        served = self.desk.models.get(talk.model)
        messages = prompt_messages(talk, self.desk.registry, served.tokenizer.generation)
        if text.strip() and not talk.running:
            messages = [
                *messages,
                *talk.messages[len([m for m in messages if m.role != "system"]) :],
                Message("user", text),
            ]
        pieces, ids = await asyncio.to_thread(prompt_pieces, served.tokenizer, messages, served.context_tokens)
        return {
            self.page.prompt: self.gr.update(value=pieces, visible=True),
            self.page.prompt_ids: self.gr.update(value=" ".join(map(str, ids)), visible=True),
        }

    async def reset_kernel(self, id: str, language: str, request: Any) -> Updates:
        """The interpreter of the conversation forgets everything."""
        talk = await self._talk(id, request)
        await self.desk.interpreters.end(talk.id)
        return {self.page.files: self.show.files(talk, self._language(language))}

    # --- small parts ---

    def _apply(self, talk: Talk, controls: tuple[Any, ...]) -> None:
        """Takes over what stands on the right; a slider on the model's own value is one that was not changed."""
        adapter, system, *values, offered, by_hand, definitions = controls
        own = self.show.own_settings(talk)
        talk.adapter, talk.system = adapter or None, str(system or "")
        talk.settings = {
            name: value
            for name, value in zip(SETTINGS, values, strict=True)
            if value is not None and value != own[name]
        }
        talk.offered, talk.by_hand, talk.definitions = list(offered or []), bool(by_hand), str(definitions or "")

    def _use_model(self, talk: Talk, name: str, language: Language) -> Updates:
        if talk.running:
            raise UsageError("another answer is still being written", hint="stop it first")
        talk.model, talk.adapter = name, None
        return {**self.show.model_parts(talk, language), **self.show.slider_parts(talk, language)}

    def _language(self, language: str) -> Language:
        return language if language in LANGUAGES else self.language

    async def _talk(self, id: str, request: Any) -> Talk:
        return await self.desk.open(_owner(request), id)


def _owner(request: Any) -> str:
    """Who asks: the name they signed in with, or nobody where there is no password."""
    return str(getattr(request, "username", None) or "")


def _mode(mode: str) -> Mode:
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}")
    return mode
