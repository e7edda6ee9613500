"""A GLM fills the blanks of a text: python examples/fill_blanks.py MODEL ["TEXT"]

MODEL is an original GLM or a GLM-130B: a folder, glm-large, glm-10b, glm-large-chinese … glm-nano is none: it chats.
"""

import sys

import glmkit

MODEL = sys.argv[1] if len(sys.argv) > 1 else "glm-large"
TEXT = sys.argv[2] if len(sys.argv) > 2 else "Ng is an adjunct professor at [MASK] (formerly associate professor)."

reply = glmkit.load(MODEL).chat(TEXT, temperature=0, max_new_tokens=16)
print(reply.text)  # the whole text with its blanks filled
print(reply.fillings)  # what each blank got
