"""glmkit: one native, fast, readable toolkit for the GLM lineage.

    import glmkit
    model, tokenizer = glmkit.load("path/to/chatglm3-6b")
    response, history = model.chat(tokenizer, "你好")

Importing the package registers its classes with transformers, whichever was imported first, so that `AutoModel`,
`AutoTokenizer` and the others load official folders without running their code. Only the command, which must start
fast, puts registration off until a verb needs it. Where torch or transformers is missing, there is nothing to register
with: `glmkit.runtime` runs exported models there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from glmkit.chat.conversation import Reply
    from glmkit.encoding import encode, load_encoder
    from glmkit.loading import Loaded, load
    from glmkit.pipelines import pipeline
    from glmkit.trainer import Trainer

__all__ = ["Loaded", "Reply", "Trainer", "__version__", "encode", "load", "load_encoder", "pipeline"]

_WHERE = {
    "Loaded": "glmkit.loading",
    "Reply": "glmkit.chat.conversation",
    "Trainer": "glmkit.trainer",
    "encode": "glmkit.encoding",
    "load": "glmkit.loading",
    "load_encoder": "glmkit.encoding",
    "pipeline": "glmkit.pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'glmkit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def _is_light() -> bool:
    """Whether registration is left out: for the command, for the runtime as a program, and where there is no torch."""
    if "glmkit_command" in sys.modules or ("-m", "glmkit.runtime") in pairwise(sys.orig_argv):
        return True
    return find_spec("torch") is None or find_spec("transformers") is None


if not _is_light():
    from glmkit.registration import register

    register()
