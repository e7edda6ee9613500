"""Compiles one grammar in a process of its own, which may be killed or die of it: run by `structured.py`, by its path.

    stdin   JSON: {"schema": …, "options": …, "limits": …}
    stdout  JSON: {"problem": null or what is wrong}

It imports nothing of glmkit, so that it starts in a tenth of a second, and ends itself after two seconds of CPU time.
Every byte is a token here: the grammar is what is tried, and the first steps of an answer.
"""

from __future__ import annotations

import json
import resource
import sys

_CPU_SECONDS = 2
_MEMORY_BYTES = 512 * 2**20
_STEPS = 64
_END = 256


class _Bytes:
    """A tokenizer whose tokens are the bytes."""

    tokens = [*(bytes([byte]) for byte in range(_END)), b"<end>"]  # noqa: RUF012
    special_token_ids = [_END]  # noqa: RUF012
    eos_token_id, bos_token_id = _END, None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def main() -> None:
    """Reads a grammar from stdin and says what is wrong with it."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llguidance

    asked = json.load(sys.stdin.buffer)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), eos_token=[_END], slices=[])
    grammar = llguidance.LLMatcher.grammar_from_json_schema(asked["schema"], overrides=asked["options"])
    limits = llguidance.LLParserLimits(**asked["limits"])
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    for _ in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(_END + 1) if mask[token // 8] >> token % 8 & 1]
        if not allowed or not matcher.consume_token(allowed[len(allowed) // 2]):
            break
    empty = matcher.is_stopped() and not matcher.is_accepting()
    problem = matcher.get_error() or ("no answer could fit it" if empty else None)
    json.dump({"problem": problem}, sys.stdout)


if __name__ == "__main__":
    main()
