"""A model that says what a script says, token by token, through the same following, loop and page as a real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import glmkit
from glmkit.chat.following import Served
from glmkit.chat.messages import Message
from glmkit.chat.templates import answer_ids
from glmkit.engine.decode import NO_TOKEN, CancelToken, Step
from glmkit.engine.generation import Generation

Script = Callable[[str], Message]  # from the prompt's text to what is said


class ScriptedEngine:
    """Stands in for a `BatchEngine`.

    Args:
        tokenizer: Of the model it pretends to be.
        script: What it says.
        seconds: Between two tokens.
    """

    def __init__(self, tokenizer: Any, script: Script, seconds: float) -> None:
        self.tokenizer, self.script, self.seconds = tokenizer, script, seconds
        self.prompts: list[list[int]] = []
        self.owners: list[str] = []
        self.written = 0

    def stream(
        self, prompt_ids: Any, options: Any, *, max_new_tokens: int, cancel: CancelToken | None = None, **others: Any
    ) -> Generation:
        self.prompts.append(list(prompt_ids))
        self.owners.append(others.get("owner", ""))
        said = self.script(self.tokenizer.decode_ids(list(prompt_ids)))
        ids = answer_ids(self.tokenizer, said, last=False)
        stop = self.tokenizer.get_command("<|observation|>") if said.metadata else self.tokenizer.eos_token_id
        generation = Generation(cancel or CancelToken(), lambda: None)
        threading.Thread(target=self._write, args=(generation, ids, stop, max_new_tokens), daemon=True).start()
        return generation

    def _write(self, generation: Generation, ids: list[int], stop: int, limit: int) -> None:
        for number, token in enumerate([*ids, stop], start=1):
            time.sleep(self.seconds)
            if generation.cancelled:
                generation.put(Step(NO_TOKEN, 0.0, "cancelled"))
                return
            self.written += 1
            reason = "stop" if token == stop and number > len(ids) else "length" if number == limit else None
            generation.put(Step(token, -0.1, reason))
            if reason:
                return

    def check_room(self, places: int = 1) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def scripted(script: Script, seconds: float = 0.0, name: str = "glm-nano") -> Served:
    """A model that follows a script, with everything else of glm-nano.

    Args:
        script: What it says to a prompt's text.
        seconds: Between two tokens.
        name: What people call it.
    """
    loaded = glmkit.load("glm-nano")
    return Served(loaded, ScriptedEngine(loaded.tokenizer, script, seconds), name)  # type: ignore[arg-type]
