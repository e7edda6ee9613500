"""ChatGLM3 as the text encoder of a picture model: python examples/text_encoder.py [MODEL [int8|int4 [TEXT ...]]]

Shapes, equality with the full model, what int8 or int4 changes. docs/text-encoder.md has the way into diffusers.
"""

import sys

import torch

import glmkit

MODEL = sys.argv[1] if len(sys.argv) > 1 else "glm-nano"
SCHEME = sys.argv[2] if len(sys.argv) > 2 else "int8"
TEXTS = sys.argv[3:] or ["一张猫的照片，微距，变焦，高质量，电影", "a photo of a cat"]
EXACT = {"dtype": "float32", "kernels": "torch"}


def away(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{(found - expected).norm() / expected.norm():.1e}"  # relative to the size of what is expected


encoder = glmkit.load_encoder(MODEL, **EXACT)
words = glmkit.encode(encoder, TEXTS)
print("states[-2]           ", tuple(words.states[-2].shape), " (texts, places, hidden size)")
print("pooled               ", tuple(words.pooled.shape))
print("tokens of each text  ", words.attention_mask.sum(1).tolist())

full = glmkit.load(MODEL, **EXACT)
inputs = full.tokenizer(TEXTS, padding="max_length", max_length=256, truncation=True, return_tensors="pt")
with torch.no_grad():
    states = full.model(**inputs.to(full.device), output_hidden_states=True).hidden_states
print("from the full model  ", away(words.states[-2], states[-2]), away(words.pooled, states[-1][:, -1]))

small = glmkit.load_encoder(MODEL, quantize=SCHEME, **EXACT)
found = glmkit.encode(small, TEXTS)
print(f"{SCHEME:<21}", away(found.states[-2], words.states[-2]), away(found.pooled, words.pooled))
for name, one in (("full model", full), ("encoder", encoder), (SCHEME, small)):
    print(f"bytes, {name:<14}", f"{sum(part.nbytes for part in one.model.parameters()):,}")
