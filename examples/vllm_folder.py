"""Completes a folder in transformers' own layout so that vLLM's chat API can serve it.

    glm convert models/chatglm3-6b models/chatglm3-6b-hf --to native
    python examples/vllm_folder.py models/chatglm3-6b models/chatglm3-6b-hf
    vllm serve models/chatglm3-6b-hf

vLLM turns a conversation into text with a chat template and then reads control tokens out of that text. The tokenizer
of a converted folder reads none, so that nobody can forge a role by typing <|assistant|>. This adds three things: the
control tokens, the template, and the ids that end an answer. From then on text that users type can be a control token,
as in every model that is served by templates; all other ids are those of `glm serve`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from glmkit.tokenizers import load_tokenizer

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# Generation -> control tokens in front of a conversation, its template.
_BLOCKS = (
    "{start}{{% for message in messages %}}<|{{{{ message['role'].replace('tool', 'observation') }}}}|>\n{blank}"
    "{{{{ message['content'] }}}}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
_ROUNDS = (
    "[gMASK]sop{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '' if loop.first else '\n\n' }}[Round {{ loop.index0 // 2 + 1 }}]\n\n问：{{ message['content'] }}\n\n答："
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
_FORMS = {
    2: (("[gMASK]", "sop"), _ROUNDS),
    3: (("[gMASK]", "sop", *_ROLES), _BLOCKS.format(start="[gMASK]sop", blank=" ")),
    4: (("[gMASK]", "<sop>", *_ROLES), _BLOCKS.format(start="[gMASK]<sop>", blank="")),
}


def complete(source: Path, native: Path) -> None:
    """Adds control tokens, chat template and stop ids to a converted folder.

    Args:
        source: The folder it was converted from.
        native: The converted folder, which is changed.
    """
    ours = load_tokenizer(source)
    controls, template = _FORMS[ours.generation]
    theirs = PreTrainedTokenizerFast.from_pretrained(native)
    wanted = {token: ours.convert_tokens_to_ids(token) for token in controls}
    theirs.add_special_tokens({"additional_special_tokens": list(controls)})
    moved = [token for token, number in wanted.items() if theirs.convert_tokens_to_ids(token) != number]
    if moved:
        raise SystemExit(f"these tokens would get other ids: {', '.join(moved)}")
    theirs.chat_template = template
    theirs.save_pretrained(native)
    path = native / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(generation | {"eos_token_id": sorted(ours.stop_ids)}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    complete(Path(sys.argv[1]), Path(sys.argv[2]))
