"""The ChatGLM2 network as the native code sees it: the structures of source/decoder.h, and its functions.

Who fills the structures keeps what their addresses point to (engine/native.py).
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

from glmkit.kernels.build import library
from glmkit.kernels.linear import Weight

FINE, NO_MEMORY, MASK_OF_OTHER_SHAPE, NO_SUCH_TOKEN, NO_SUCH_POSITION = range(5)
"""What a function returns; unless it is FINE it has changed nothing."""

MOST_TOKENS = 31
"""Rows times tokens of `glm_decode`: more go to other products, whose results differ in the last places."""

MOST_FLOAT_TOKENS = 128
"""The same for float weights, whose products are the same for any number: so many do not fill the cache of a core."""


class Block(ctypes.Structure):
    """One block's weights."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("query_key_value", Weight),
        ("dense", Weight),
        ("up", Weight),
        ("down", Weight),
    )


class Decoder(ctypes.Structure):
    """All weights and sizes."""

    _fields_ = (
        ("layers", c_int32),
        ("hidden", c_int32),
        ("inner", c_int32),
        ("heads", c_int32),
        ("groups", c_int32),
        ("width", c_int32),
        ("rotated", c_int32),
        ("vocabulary", c_int32),
        ("table_dtype", c_int32),
        ("eps", c_float),
        ("bytes", c_int64),
        ("table", c_void_p),
        ("final_norm", c_void_p),
        ("blocks", ctypes.POINTER(Block)),
        ("output", Weight),
    )


class CacheLayer(ctypes.Structure):
    """Where one layer's keys and values are; rows and groups lie so many numbers apart."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("row", c_int64), ("group", c_int64))


class OwnRow(ctypes.Structure):
    """A row with a cache of its own: its layers, and how many tokens are in it."""

    _fields_ = (("cache", c_void_p), ("filled", c_int64))


class Step(ctypes.Structure):
    """What a call is to do."""

    _fields_ = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("filled", c_int32),
        ("cache_dtype", c_int32),
        ("keep", c_int32),
        ("angles", c_int32),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("mask", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("cache", ctypes.POINTER(CacheLayer)),
        ("own_rows", c_void_p),  # of OwnRow
        ("hidden", c_void_p),
        ("queries", c_void_p),
        ("context", c_void_p),
        ("logits", c_void_p),
    )


_declared: ctypes.CDLL | None = None


def functions() -> ctypes.CDLL | None:
    """The library, whose functions know their arguments; None if there is no native code.

    Raises:
        KernelsError: The level that the user named does not work.
    """
    global _declared
    loaded = library()
    if loaded is not None and loaded is not _declared:
        for whole in (loaded.glm_decode, loaded.glm_embed, loaded.glm_logits):
            whole.argtypes = [c_void_p, c_void_p, ctypes.c_int]
        for half in (loaded.glm_before_attention, loaded.glm_after_attention):
            half.argtypes = [c_void_p, c_void_p, ctypes.c_int, ctypes.c_int]
        _declared = loaded
    return loaded
