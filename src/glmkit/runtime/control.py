"""Control tokens that are written in a text: the blanks of `[MASK]`, and what ends or begins a part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A control token.

    Args:
        name: Its name in the training repository, such as "ENC" for [CLS].
        token: How it is written.
        index: Its id.
        parsed: Whether a text that has it written in it means the token.
        eats: Which blanks beside it are dropped: "", "left" or "both".
    """

    name: str
    token: str
    index: int
    parsed: bool = True
    eats: str = ""


class Control:
    """All control tokens of a tokenizer.

    Args:
        commands: The tokens. Several may share an id; decoded, the last of them counts.
        aliases: Other ways to write one of them: what is written, and the name of the token.

    Attributes:
        aliases: As given.
        token_of: How each id is written.
    """

    def __init__(self, commands: tuple[Command, ...], aliases: Mapping[str, str]) -> None:
        self._commands = commands
        self._by_name = {command.name: command for command in commands}
        self._by_token = {command.token: command for command in commands if command.parsed}
        self.aliases = dict(aliases)
        self._by_token |= {token: self._by_name[name] for token, name in aliases.items()}
        self.token_of = {command.index: command.token for command in commands}
        longest_first = sorted(self._by_token, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Command:
        return self._by_name[name]

    def split(self, text: str) -> list[str | int]:
        """Cuts a text at its control tokens.

        Args:
            text: Any text.

        Returns:
            Ids for the tokens and strings, none of them empty, for what is between.
        """
        parts = self._pattern.split(text)  # text, token, text, token, ..., text
        for place in range(1, len(parts), 2):
            eats = self._by_token[parts[place]].eats
            if eats:
                parts[place - 1] = parts[place - 1].rstrip()
            if eats == "both":
                parts[place + 1] = parts[place + 1].lstrip()
        found = [self._by_token[part].index if place % 2 else part for place, part in enumerate(parts)]
        return [part for part in found if part != ""]
