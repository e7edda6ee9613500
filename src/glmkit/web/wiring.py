"""Which part of the page calls which action. All of it is the page's own: none can be called by name from outside."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from glmkit.errors import GlmkitError
from glmkit.translation import Language, describe
from glmkit.web.actions import Actions
from glmkit.web.look import gradio
from glmkit.web.texts import LANGUAGES

logger = logging.getLogger("glmkit")
# The page remembers its conversation for a reload (each tab its own) and its language for ever.
_READ_MEMORY = """() => [
  localStorage.getItem('glm-language') || navigator.language.slice(0, 2), sessionStorage.getItem('glm-talk') || '',
]"""
_KEEP_TALK = "(id) => { sessionStorage.setItem('glm-talk', id); }"
_KEEP_LANGUAGE = (
    "(language) => { localStorage.setItem('glm-language', language); document.documentElement.lang = language; }"
)


class Wiring:
    """Connects a page to its actions.

    Args:
        actions: The actions, which know the page.
    """

    def __init__(self, actions: Actions) -> None:
        self.actions, self.page, self.gr = actions, actions.page, gradio()
        page = self.page
        self._moving = [page.chat, page.asking, page.question, page.input, page.go_on, page.meter]
        self._listing = [page.history, page.name]
        self._settled = [*self._moving, page.announce, page.files, *self._listing]
        self._all = [
            value for name, value in vars(page).items() if name not in ("blocks", "search", "upload", "wanted_language")
        ]

    def connect(self) -> None:
        """Connects everything."""
        with self.page.blocks:
            self._connect_page()
            self._connect_talk()
            self._connect_conversations()
            self._connect_settings()

    # --- parts ---

    def _connect_page(self) -> None:
        page, actions = self.page, self.actions
        loaded = page.blocks.load(
            self._plain(actions.load),
            [page.wanted_language, page.wanted_talk],
            [*self._all, page.search, page.upload],
            js=_READ_MEMORY,
            **self._quick,
        )
        self._then_keep(loaded)
        self._then_follow(loaded)
        translated = page.language.input(
            self._plain(actions.translate),
            [page.language, page.talk_id],
            [*self._all, page.search, page.upload],
            **self._quick,
        )
        translated.then(None, [page.language], None, js=_KEEP_LANGUAGE)

    def _connect_talk(self) -> None:
        page, actions = self.page, self.actions
        here = [page.talk_id, page.language]
        self._starts(page.input.submit, actions.send, [page.input, *here])
        self._starts(page.chat.example_select, actions.example, here, self.gr.SelectData)
        self._starts(page.chat.retry, actions.retry, here)
        self._starts(page.chat.edit, actions.edit, here, self.gr.EditData)
        self._starts(page.go_on.click, actions.go_on, here)
        page.input.stop(self._plain(actions.stop), [page.talk_id], None, **self._quick)
        page.chat.undo(self._plain(actions.undo), here, self._moving, **self._quick)
        cleared = page.chat.clear(self._plain(actions.clear), here, self._all, **self._quick)
        self._then_keep(cleared)
        for button, allowed, always in (
            (page.once, True, False),
            (page.always, True, True),
            (page.refuse, False, False),
        ):
            button.click(self._plain(_decision(actions, allowed, always)), [page.talk_id], None, **self._quick)

    def _connect_conversations(self) -> None:
        page, actions = self.page, self.actions
        here = [page.talk_id, page.language]
        for event, action, inputs in (
            (page.new.click, actions.new, [page.mode, *here]),
            (page.history.input, actions.open, [page.history, page.language]),
            (page.mode.input, actions.change_mode, [page.mode, *here]),
            (page.delete_sure.click, actions.delete, here),
        ):
            changed = event(self._plain(action), inputs, self._all, **self._quick)
            self._then_keep(changed)
            self._then_follow(changed)
        page.search.change(
            self._plain(actions.search), [page.search, *here], self._listing, trigger_mode="always_last", **self._quick
        )
        self.gr.on(
            [page.rename.click, page.name.submit],
            self._plain(actions.rename),
            [page.name, *here],
            self._listing,
            **self._quick,
        )
        show = self.gr.update
        page.delete.click(lambda: show(visible=True), None, page.delete_sure, **self._quick)
        page.upload.upload(self._plain(actions.take_in), [page.upload, *here], self._all, **self._quick)

    def _connect_settings(self) -> None:
        page, actions = self.page, self.actions
        here = [page.talk_id, page.language]
        events = [slider.release for slider in page.sliders] + [slider.input for slider in page.sliders]
        events += [page.system.blur, page.offered.input, page.by_hand.input, page.definitions.blur, page.adapter.input]
        self.gr.on(
            events,
            self._with_controls(actions.apply),
            [*here, *page.controls],
            [*page.sliders, page.definitions_note],
            trigger_mode="always_last",
            **self._quick,
        )
        page.reset.click(self._plain(actions.reset), here, page.sliders, **self._quick)
        model_parts = [page.model, page.model_note, page.load, page.adapter, *page.sliders]
        page.model.input(self._plain(actions.choose_model), [page.model, *here], model_parts, **self._quick)
        page.load.click(self._flowing(actions.load_model), [page.model, *here], model_parts, **self._quick)
        page.prompt_show.click(
            self._plain(actions.show_prompt), [page.input, page.talk_id], [page.prompt, page.prompt_ids], **self._quick
        )
        page.reset_kernel.click(self._plain(actions.reset_kernel), here, [page.files], **self._quick)

    # --- how ---

    @property
    def _quick(self) -> dict[str, Any]:
        """As many at once as there are people: nothing here waits for the model, which has a queue of its own."""
        return {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

    def _starts(self, event: Any, action: Any, inputs: Sequence[Any], data: Any = None) -> None:
        """An event that begins an answer, which is followed then."""
        started = event(
            self._with_controls(action, len(inputs), data), [*inputs, *self.page.controls], self._settled, **self._quick
        )
        self._then_follow(started)

    def _then_follow(self, event: Any) -> None:
        event.then(
            self._flowing(self.actions.follow),
            [self.page.talk_id, self.page.language],
            self._settled,
            **self._quick,
        )

    def _then_keep(self, event: Any) -> None:
        event.then(None, [self.page.wanted_talk], None, js=_KEEP_TALK)

    def _plain(self, action: Any) -> Any:
        async def call(request: Any, *values: Any) -> Any:
            return await self._guarded(lambda: action(*values, request), values)

        call.__annotations__ = {"request": self.gr.Request}
        return call

    def _with_controls(self, action: Any, given: int = 2, data: Any = None) -> Any:
        async def call(request: Any, *values: Any) -> Any:
            return await self._guarded(lambda: action(*values[:given], request, values[given:]), values)

        async def call_with_data(data: Any, request: Any, *values: Any) -> Any:
            return await self._guarded(lambda: action(data, *values[:given], request, values[given:]), values)

        call.__annotations__ = {"request": self.gr.Request}
        call_with_data.__annotations__ = {"data": data, "request": self.gr.Request}
        return call if data is None else call_with_data

    def _flowing(self, action: Any) -> Any:
        async def call(request: Any, *values: Any) -> AsyncIterator[Any]:
            try:
                async for updates in action(*values, request):
                    yield updates
            except GlmkitError as error:
                self.gr.Warning(describe(error, self._language(values))[0])
                yield {self.page.announce: self.gr.skip()}

        call.__annotations__ = {"request": self.gr.Request}
        return call

    def _language(self, values: Sequence[Any]) -> Language:
        """The language of the page that sent these values; nearly all events carry it."""
        return next((value for value in values if value in LANGUAGES), self.actions.language)

    async def _guarded(self, work: Callable[[], Any], values: Sequence[Any]) -> Any:
        """What an action gives; what the user can cure is shown, all else gets a number and goes to the log."""
        try:
            updates = await work()
        except GlmkitError as error:
            message, hint = describe(error, self._language(values))
            self.gr.Warning(message if hint is None else f"{message} ({hint})")
            return self.gr.skip()
        except Exception:
            number = secrets.token_hex(4)
            logger.exception("the page failed (%s)", number)
            self.gr.Warning(f"error {number}")
            return self.gr.skip()
        return self.gr.skip() if updates is None else updates


def _decision(actions: Actions, allowed: bool, always: bool) -> Any:
    async def decide(id: str, request: Any) -> None:
        await actions.decide(allowed, always, id, request)

    return decide
