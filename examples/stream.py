"""An answer piece by piece, which may be stopped: python examples/stream.py [MODEL]"""

import sys

import glmkit
from glmkit.engine.decode import CancelToken

loaded = glmkit.load(sys.argv[1] if len(sys.argv) > 1 else "glm-nano")

answer = loaded.stream("What is the capital of France?", temperature=0)
for piece in answer:  # text that is certain: never half a character
    print(piece, end="", flush=True)
print(f"\n[{answer.reply.finish_reason}, {answer.reply.timings.tokens_per_second:.0f} tokens a second]")

cancel = CancelToken()
answer = loaded.stream("What is the capital of France?", temperature=0, cancel=cancel)
for number, piece in enumerate(answer):
    print(piece, end="", flush=True)
    if number == 2:
        cancel.cancel()  # from anywhere, also another thread; nothing is computed after the next token
print(f"\n[{answer.reply.finish_reason}]")
