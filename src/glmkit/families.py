"""The table of models: names, sizes, limits, licence. Rows, and the look-up by any of a model's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One released model.

    Args:
        name: Canonical name, also the name of its folder under GLMKIT_MODELS.
        hub_id: Repository on the hub; "" for a model that is not there.
        aliases: Other names people type: older organisations, MindFormers' names.
        generation: 1 to 4, the chat format; 0 for models that fill blanks instead of chatting (GLM, GLM-130B).
        bytes: Size of the download, weights and tokenizer.
        context_tokens: Longest context it was trained for.
        architecture: Which network: "chatglm", "chatglm2", "glm" or "glm-130b".
        sizes: Fields of its config.json that differ from the defaults of that network's config class.
        chat: Whether it was trained to chat; False for base models.
        tools: Whether it was trained to call tools.
        licence: What its weights may be used for.
    """

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    generation: int
    bytes: int
    context_tokens: int
    architecture: str = "chatglm2"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = True
    tools: bool = False
    licence: str = "model licence of the repository; commercial use after registration"


_GB = 10**9
_MIT = "MIT (code and weights of the GLM repository)"
_GLM130B = "GLM-130B model licence: research; commercial use on application"
_INT4, _INT8 = {"quantization_bit": 4}, {"quantization_bit": 8}
_LONG3 = {"seq_length": 32_768, "rope_ratio": 50, "rope_ratio_applies_to": "base"}
_GLM4 = {
    "num_layers": 40,
    "padded_vocab_size": 151_552,
    "layernorm_epsilon": 1.5625e-07,
    "seq_length": 131_072,
    "rope_ratio": 500,
    "rope_ratio_applies_to": "base",
    "eos_token_id": [151_329, 151_336, 151_338],
    "pad_token_id": 151_329,
}
_GLM4_BASE = _GLM4 | {"seq_length": 8_192, "rope_ratio": 1}
_GLM4_1M = _GLM4 | {"seq_length": 1_048_576, "rope_ratio": 10_000, "multi_query_group_num": 4}


def _glm(name: str, layers: int, hidden: int, positions: int, vocabulary: int, parameters: float, hub: bool) -> Family:
    """A row of the original GLM: every size has heads of 64 channels and files in float16."""
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "max_sequence_length": positions,
        "vocab_size": vocabulary,
    }
    hub_id = f"zai-org/{name}" if hub else ""
    return Family(name, hub_id, (), 0, int(2 * parameters), positions, "glm", sizes, chat=False, licence=_MIT)


FAMILIES: tuple[Family, ...] = (
    Family("glm-nano", "", ("nano",), 3, 16 * 10**6, 1_024, tools=True, licence="Apache-2.0, comes with this package"),
    Family("chatglm-6b", "zai-org/chatglm-6b", ("glm_6b", "glm_6b_chat", "glm_6b_lora", "glm_6b_lora_chat", "chatglm"),
           1, int(13.7 * _GB), 2_048, "chatglm"),
    Family("chatglm-6b-int8", "zai-org/chatglm-6b-int8", (), 1, int(8.4 * _GB), 2_048, "chatglm", _INT8),
    Family("chatglm-6b-int4", "zai-org/chatglm-6b-int4", (), 1, int(4.1 * _GB), 2_048, "chatglm", _INT4),
    Family("chatglm-6b-int4-qe", "zai-org/chatglm-6b-int4-qe", (), 1, int(3.4 * _GB), 2_048, "chatglm",
           _INT4 | {"quantization_embeddings": True}),
    Family("chatglm2-6b", "zai-org/chatglm2-6b", ("glm2_6b", "glm2_6b_lora", "chatglm2"), 2, int(12.5 * _GB), 8_192),
    Family("chatglm2-6b-int4", "zai-org/chatglm2-6b-int4", (), 2, int(3.9 * _GB), 8_192, sizes=_INT4),
    Family("chatglm2-6b-32k", "zai-org/chatglm2-6b-32k", ("glm2_6b_32k",), 2, int(12.5 * _GB), 32_768,
           sizes={"seq_length": 32_768, "rope_ratio": 16, "rope_ratio_applies_to": "position"}),
    Family("codegeex2-6b", "zai-org/codegeex2-6b", ("codegeex2",), 2, int(12.5 * _GB), 8_192, chat=False),
    Family("chatglm3-6b", "zai-org/chatglm3-6b", ("glm3_6b", "chatglm3"), 3, int(12.5 * _GB), 8_192, tools=True),
    Family("chatglm3-6b-base", "zai-org/chatglm3-6b-base", (), 3, int(12.5 * _GB), 32_768, chat=False),
    Family("chatglm3-6b-32k", "zai-org/chatglm3-6b-32k", (), 3, int(12.5 * _GB), 32_768, sizes=_LONG3),
    Family("chatglm3-6b-128k", "zai-org/chatglm3-6b-128k", (), 3, int(12.5 * _GB), 131_072,
           sizes=_LONG3 | {"seq_length": 131_072, "rope_ratio": 500}),
    Family("glm-4-9b-chat", "zai-org/glm-4-9b-chat", ("glm4_9b", "glm4"), 4, int(18.8 * _GB), 131_072,
           sizes=_GLM4, tools=True),
    Family("glm-4-9b-chat-1m", "zai-org/glm-4-9b-chat-1m", (), 4, int(19.0 * _GB), 1_048_576,
           sizes=_GLM4_1M, tools=True),
    Family("glm-4-9b", "zai-org/glm-4-9b", (), 4, int(18.8 * _GB), 8_192, sizes=_GLM4_BASE, chat=False),
    Family("codegeex4-all-9b", "zai-org/codegeex4-all-9b", ("codegeex4",), 4, int(18.8 * _GB), 131_072, sizes=_GLM4),
    _glm("glm-base", 12, 768, 512, 30_592, 110e6, hub=False),
    _glm("glm-large", 24, 1024, 512, 30_592, 335e6, hub=False),
    _glm("glm-doc", 24, 1024, 512, 30_592, 335e6, hub=False),
    _glm("glm-410m", 30, 1024, 512, 30_592, 410e6, hub=False),
    _glm("glm-515m", 30, 1152, 512, 30_592, 515e6, hub=True),
    _glm("glm-roberta-large", 24, 1024, 512, 50_304, 355e6, hub=True),
    _glm("glm-2b", 36, 2048, 1024, 50_304, 1.92e9, hub=True),
    _glm("glm-10b", 48, 4096, 1024, 50_304, 9.88e9, hub=True),
    _glm("glm-large-chinese", 24, 1024, 1024, 50_048, 355e6, hub=True),
    _glm("glm-10b-chinese", 48, 4096, 1024, 50_048, 9.88e9, hub=True),
    Family("glm-130b", "", ("glm130b",), 0, 260 * _GB, 2_048, "glm-130b", chat=False, licence=_GLM130B),
)  # fmt: skip
ORGANISATIONS = ("zai-org", "THUDM", "ZhipuAI", "BAAI")  # today's, the former one, ModelScope's, the original GLM's


def find_family(name: str) -> Family | None:
    """Looks a released model up by any of its names.

    Args:
        name: A canonical name, an alias, or `organisation/name` with any of `ORGANISATIONS`; upper case is the same.

    Returns:
        Its row; None if none fits.
    """
    wanted = name.strip().lower()
    organisation, _, rest = wanted.rpartition("/")
    if organisation and organisation not in {known.lower() for known in ORGANISATIONS}:
        return None
    return next((row for row in FAMILIES if rest in (row.name, *row.aliases)), None)
