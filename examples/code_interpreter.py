"""A model that writes Python and sees what it prints: python examples/code_interpreter.py [MODEL] ["QUESTION"]

The code runs in a sandbox without network, with files of its own. What the sandbox holds is measured first.
"""

import asyncio
import sys

import glmkit
from glmkit.chat.following import serve
from glmkit.chat.messages import Message
from glmkit.interpreter.kernels import Kernels
from glmkit.interpreter.sandbox import Level
from glmkit.tools.loop import CallEnded, Text, take_turn

MODEL = sys.argv[1] if len(sys.argv) > 1 else "glm-nano"
QUESTION = sys.argv[2] if len(sys.argv) > 2 else "用Python计算1到100的和"


async def main() -> None:
    kernels = await Kernels.open(Level.REDUCED)  # the least that is good enough; FULL is tried first
    served = serve(glmkit.load(MODEL), "model")
    turn = take_turn(served, [Message("user", QUESTION)], interpreter=kernels.of("me"), temperature=0)
    async for event in turn:
        if isinstance(event, Text):  # the code too, as the model writes it
            print(event.text, end="", flush=True)
        elif isinstance(event, CallEnded):
            print(f"\n[{event.observation}]")
    served.close()
    await kernels.close()


asyncio.run(main())
