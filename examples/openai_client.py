"""OpenAI's client against `glm serve`: python examples/openai_client.py

Start the server first: glm serve glm-nano. GLMKIT_URL and GLMKIT_API_KEY say where it is, and with which key.
"""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("GLMKIT_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("GLMKIT_API_KEY", "none"),
)
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is the capital of France?"}]

whole = client.chat.completions.create(model=model, messages=question, temperature=0)
print(whole.choices[0].message.content, whole.usage.total_tokens, "tokens")

for chunk in client.chat.completions.create(model=model, messages=question, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
print()

cities = {"city": {"enum": ["Berlin", "Paris", "Rome"]}}
schema = {"type": "object", "properties": cities, "required": ["city"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
made = client.chat.completions.create(model=model, messages=question, temperature=0, response_format=form)
print("as JSON:", json.loads(made.choices[0].message.content))  # the form is certain, the content is the model's
