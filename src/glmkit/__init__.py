"""glmkit: one native, fast, readable toolkit for the GLM lineage.

    import glmkit
    model, tokenizer = glmkit.load("path/to/chatglm3-6b")
    response, history = model.chat(tokenizer, "你好")

Importing the package registers its classes with transformers, whichever was imported first, so that `AutoModel`,
`AutoTokenizer` and the others load official folders without running their code. Only the command, which must start
fast, puts registration off until a verb needs it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from glmkit.chat.conversation import Reply
    from glmkit.loading import Loaded, load
    from glmkit.pipelines import pipeline
    from glmkit.trainer import Trainer

__all__ = ["Loaded", "Reply", "Trainer", "__version__", "load", "pipeline"]

_WHERE = {
    "Loaded": "glmkit.loading",
    "Reply": "glmkit.chat.conversation",
    "Trainer": "glmkit.trainer",
    "load": "glmkit.loading",
    "pipeline": "glmkit.pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'glmkit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


if "glmkit_command" not in sys.modules:
    from glmkit.registration import register

    register()
