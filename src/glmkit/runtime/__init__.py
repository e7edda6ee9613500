"""Answers from an exported folder, without torch and transformers: numpy, tokenizers, and onnxruntime or openvino.

    import glmkit.runtime

    model = glmkit.runtime.load("folder")
    print("".join(model.answer("你好")))

    folder/runtime/runtime.json -> vocabulary, prompts, layout -> session of the graph -> tokens -> text

What a chat format or a vocabulary is, the folder says: the exporter writes it from the same objects that chat and
training use, and compares the result with them (`glmkit.export.runtime_data`). So nothing here knows a model by name.

    text         ids to text as they arrive         punctuation   full-width marks
    vocabulary   what letters and bytes of a token are            control       marks of blanks in a text
    tokens       text to ids and back
    prompts      messages to ids                    replies       ids to messages
    layout       masks and positions                sampling      scores to a token
    session      onnxruntime or openvino            decoding      the loop
    folder       what is on disk                    answering     all of it together
    blanks       filling the blanks of a text       terminal      `glm run`, `python -m glmkit.runtime`

This package imports nothing else of glmkit but `errors`; tokenizers, engine and chat use some of its modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmkit.runtime.answering import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'glmkit.runtime' has no attribute {name!r}")
    from glmkit.runtime import answering

    return getattr(answering, name)
