"""The table of models: names, sizes, limits, licence. Rows, and the look-up by any of a model's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One released model.

    Args:
        name: Canonical name, also the name of its folder under GLMKIT_MODELS.
        hub_id: Repository on the hub.
        aliases: Other names people type: older organisations, MindFormers' names.
        generation: 2 or 3, the chat format.
        bytes: Size of the download, weights and tokenizer.
        context_tokens: Longest context it was trained for.
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
    chat: bool = True
    tools: bool = False
    licence: str = "model licence of the repository; commercial use after registration"


_GB = 10**9

FAMILIES: tuple[Family, ...] = (
    Family("glm-nano", "", ("nano",), 3, 16 * 10**6, 1_024, tools=True, licence="Apache-2.0, comes with this package"),
    Family("chatglm2-6b", "zai-org/chatglm2-6b", ("glm2_6b", "glm2_6b_lora", "chatglm2"), 2, int(12.5 * _GB), 8_192),
    Family("chatglm2-6b-int4", "zai-org/chatglm2-6b-int4", (), 2, int(3.9 * _GB), 8_192),
    Family("chatglm2-6b-32k", "zai-org/chatglm2-6b-32k", ("glm2_6b_32k",), 2, int(12.5 * _GB), 32_768),
    Family("chatglm3-6b", "zai-org/chatglm3-6b", ("glm3_6b", "chatglm3"), 3, int(12.5 * _GB), 8_192, tools=True),
    Family("chatglm3-6b-base", "zai-org/chatglm3-6b-base", (), 3, int(12.5 * _GB), 32_768, chat=False),
    Family("chatglm3-6b-32k", "zai-org/chatglm3-6b-32k", (), 3, int(12.5 * _GB), 32_768),
    Family("chatglm3-6b-128k", "zai-org/chatglm3-6b-128k", (), 3, int(12.5 * _GB), 131_072),
)
ORGANISATIONS = ("zai-org", "THUDM", "ZhipuAI")  # today's, the former one, and ModelScope's


def find_family(name: str) -> Family | None:
    """The row for a canonical name, an alias, or `organisation/name` of any of the organisations; None if none fits."""
    wanted = name.strip().lower()
    organisation, _, rest = wanted.rpartition("/")
    if organisation and organisation not in {known.lower() for known in ORGANISATIONS}:
        return None
    return next((row for row in FAMILIES if rest in (row.name, *row.aliases)), None)
