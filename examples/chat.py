"""A conversation: python examples/chat.py [MODEL]

MODEL is a folder, a name such as chatglm3-6b, or a hub id; without it glm-nano, which is in the package.
"""

import sys

import glmkit

loaded = glmkit.load(sys.argv[1] if len(sys.argv) > 1 else "glm-nano")
messages = []
for question in ("你好，你是谁？", "What is the capital of France?", "谢谢"):
    reply = loaded.chat(question, history=messages, temperature=0)
    print(f"> {question}\n{reply.text}")
    messages = reply.messages  # question and answer; the next question goes on from here
print(f"{reply.usage.prompt_tokens} tokens read, {reply.usage.completion_tokens} written, {len(messages)} messages")
