"""The tokenizer as two OpenVINO models, for `openvino_genai.LLMPipeline`: of ChatGLM2, ChatGLM3 and GLM-4.

Their chat formats go along in Jinja, whose text is read with the names of control ids in it. So a user who writes such
a name writes the id: where texts come from strangers, `glm run` is the safe way, whose prompts are made of ids. `sop`
and `eop` of ChatGLM2 and ChatGLM3 are called `<sop>` and `<eop>`, or "philosophy" would have a control id inside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from glmkit import hf
from glmkit.errors import MissingDependencyError
from glmkit.export.gguf_vocabulary import TEMPLATES
from glmkit.runtime.session import load_openvino
from glmkit.tokenizers import ChatGLM4Tokenizer, ChatGLMTokenizer
from glmkit.writing import write_text_atomic

_NAMES = {"sop": "<sop>", "eop": "<eop>"}


def save_tokenizer(folder: Path, tokenizer: Any) -> bool:
    """Writes openvino_tokenizer.xml, openvino_detokenizer.xml and chat_template.jinja.

    Args:
        folder: The folder that is being written.
        tokenizer: The model's tokenizer, or None.

    Returns:
        Whether they were written: not for a tokenizer of another family.

    Raises:
        MissingDependencyError: openvino-tokenizers is not installed.
    """
    if not isinstance(tokenizer, (ChatGLMTokenizer, ChatGLM4Tokenizer)):
        return False
    openvino = load_openvino()
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        raise MissingDependencyError("openvino-tokenizers", "export") from error
    template = TEMPLATES[tokenizer.generation]
    models = convert_tokenizer(fast_tokenizer(tokenizer), with_detokenizer=True, skip_special_tokens=True)
    for model, name in zip(models, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        model.set_rt_info(template, "chat_template")
        openvino.save_model(model, folder / name, compress_to_fp16=False)
    write_text_atomic(folder / "chat_template.jinja", template)
    return True


def fast_tokenizer(tokenizer: Any) -> hf.TokenizersBackend:
    """A tokenizer of the general kind, which finds control ids by their names in a text.

    Args:
        tokenizer: Of ChatGLM2, ChatGLM3 or GLM-4.
    """
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    if isinstance(tokenizer, ChatGLMTokenizer):
        control = dict(tokenizer.tokenizer.special_tokens)
        vocabulary = table["model"]["vocab"]
        for old, new in _NAMES.items():
            vocabulary[new] = vocabulary.pop(old)
        table = json.loads(json.dumps(table).replace('"sop"', '"<sop>"'))  # in the post-processor, too
        table["added_tokens"] = [_added(_NAMES.get(name, name), index) for name, index in control.items()]
        end, padding = "</s>", "<unk>"
    else:
        end = padding = "<|endoftext|>"
    made = Tokenizer.from_str(json.dumps(table))
    return hf.TokenizersBackend(tokenizer_object=made, eos_token=end, pad_token=padding, padding_side="left")


def _added(name: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": name, **flags}
