"""Drafts by looking back: what followed the last words when they stood in the text before is likely to follow again.

    text      ... def area ( width , height ) : return width * height ... def area ( width
                  ^^^^^^^^^^^^^^^^                                         ^^^^^^^^^^^^^^^^
                  a place with the same end   -> draft: , height ) : return

Code that is edited, quotations, tables and summaries are full of such places. The draft goes through the model together
with the last token, so one call can settle many tokens; what the model would not have said is thrown away.

Source: Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023 (arXiv:2211.17192) for drafts in general. Different
here: a draft is compared with the very token that the sampler draws, so seeds and distributions stay what they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_PLACES = 8  # of those with the same last two tokens, the most recent are compared
_LONGEST_MATCH = 16  # tokens; two places that are equal so far back are equally good
_FIRST_DRAFT = 4


class Lookup:
    """Proposes how a text goes on, from the text itself.

    The length of drafts follows their luck: it doubles when a whole draft was right and halves when it was not, so a
    text that repeats nothing is hardly slowed down by chance hits.

    Args:
        text: Ids of everything so far.
        most: Most tokens of a draft.
        stop_ids: Ids that end an answer. They are not drafted: nothing comes after them.
    """

    def __init__(self, text: Sequence[int], most: int, stop_ids: Collection[int] = ()) -> None:
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self._most, self._stop_ids = most, stop_ids
        self._length = min(most, _FIRST_DRAFT)
        self._text: list[int] = []
        self._ends: dict[tuple[int, int], list[int]] = {}  # last two tokens -> places of the second, but for the end
        for token in text:
            self.push(token)

    def push(self, token: int) -> None:
        """Takes the next token of the text.

        Args:
            token: Its id.
        """
        text = self._text
        if len(text) > 1:  # the pair at the end is listed when something follows it, so it never finds itself
            self._ends.setdefault((text[-2], text[-1]), []).append(len(text) - 1)
        text.append(token)

    def propose(self, room: int) -> list[int]:
        """Drafts what may come next: what followed the most recent of the places with the longest equal end.

        Args:
            room: Most tokens that can be used.

        Returns:
            Ids; none where the last two tokens never stood together before.
        """
        text, count = self._text, min(self._length, room)
        places = self._ends.get((text[-2], text[-1])) if len(text) > 1 and count > 0 else None
        if not places:
            return []
        place = max(reversed(places[-_PLACES:]), key=self._equal_tokens)
        draft = text[place + 1 : place + 1 + count]
        period = len(text) - 1 - place
        while len(draft) < count:  # the place is so near that its continuation is the draft itself
            draft.append(draft[-period])
        ends = next((at for at, token in enumerate(draft) if token in self._stop_ids), count)
        return draft[:ends]

    def judge(self, drafted: int, accepted: int) -> None:
        """Learns what became of a draft.

        Args:
            drafted: Its tokens.
            accepted: How many of them came true.
        """
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        self._length = min(self._most, 2 * self._length) if accepted == drafted else max(1, self._length // 2)

    def _equal_tokens(self, place: int) -> int:
        """How many tokens up to a place are those at the end of the text."""
        text, end = self._text, len(self._text) - 1
        most = min(_LONGEST_MATCH, place + 1)
        return next((back for back in range(2, most) if text[place - back] != text[end - back]), most)
