"""The compiled rules of a SentencePiece normaliser, checked before native code follows them.

    4 bytes      size of the trie in bytes
    the trie     units of 4 bytes: which character leads where, and at the end of a rule the place of its text
    the texts    what is written instead, each with a zero byte behind it

The library walks the trie without looking whether a step leaves it; older versions read foreign memory then. A step
goes from a unit to another one of a block of 256, so a trie is safe if the block of every unit lies inside it.

Source: the layout of Darts-clone's double arrays (bits 0-7 label, 8 has a leaf, 9 wide, 10-30 offset, 31 is a leaf).
"""

from __future__ import annotations

import struct

import numpy as np

_BLOCK_UNITS = 256
MAX_RULES_BYTES = 4 * 2**20  # those of nmt_nfkc have 240,007
MAX_TEXT_BYTES = 256  # the longest text of nmt_nfkc has 33: one character that becomes a greeting


def problem_of_rules(rules: bytes) -> str | None:
    """Says what is wrong with the rules of a normaliser.

    Args:
        rules: `precompiled_charsmap` of a SentencePiece file; empty for no rules.

    Returns:
        The first problem as the end of a sentence, or None.
    """
    if not rules:
        return None
    if len(rules) > MAX_RULES_BYTES:
        return f"the normaliser's rules have {len(rules)} bytes, at most {MAX_RULES_BYTES} expected"
    trie_bytes = struct.unpack("<I", rules[:4])[0] if len(rules) >= 4 else 0
    if not trie_bytes or trie_bytes % (4 * _BLOCK_UNITS) or 4 + trie_bytes >= len(rules):
        return "the normaliser's rules are broken: the trie has no size that fits"
    units = np.frombuffer(rules, "<u4", trie_bytes // 4, 4).astype(np.int64)
    texts = np.frombuffer(rules, np.uint8, offset=4 + trie_bytes)
    places = np.arange(len(units))
    leaf = units >> 31 == 1
    wide = (units >> 9) & 1
    offsets = (units >> 10) << (8 * wide)  # of leaves it is looked at below
    if np.any(((places ^ offsets) | (_BLOCK_UNITS - 1))[~leaf] >= len(units)):
        return "the normaliser's rules are broken: a step leads out of the trie"
    ends = np.flatnonzero(texts == 0)
    if not len(ends) or ends[-1] != len(texts) - 1 or np.any((units[leaf] & 0x7FFFFFFF) >= len(texts)):
        return "the normaliser's rules are broken: a rule has no text"
    if np.diff(ends, prepend=-1).max() > MAX_TEXT_BYTES + 1:
        return f"the normaliser writes more than {MAX_TEXT_BYTES} bytes for a character"
    return None


__all__ = ["MAX_RULES_BYTES", "MAX_TEXT_BYTES", "problem_of_rules"]
