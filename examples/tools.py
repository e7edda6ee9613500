"""A function that the model may call: python examples/tools.py [MODEL]

The model sees name, description and parameters. It writes a call as text; the call is read, checked against the types,
and made here. What comes back is told to the model, which goes on.
"""

import asyncio
import sys
from typing import Annotated

import glmkit
from glmkit.chat.following import serve
from glmkit.chat.messages import Message
from glmkit.tools.loop import CallEnded, CallStarted, Text, take_turn
from glmkit.tools.registry import Registry

registry = Registry()  # empty: nothing may be called that you do not add


@registry.tool
def get_weather(city: Annotated[str, "city name"]) -> dict[str, str | int]:
    """Get the current weather of a city."""
    return {"weather": "cloudy", "temperature": len(city) + 14}


async def ask(question: str) -> None:
    served = serve(glmkit.load(sys.argv[1] if len(sys.argv) > 1 else "glm-nano"), "model")
    async for event in take_turn(served, [Message("user", question)], registry=registry, temperature=0):
        if isinstance(event, CallStarted):
            print(f"[call {event.name} {event.arguments}]")
        elif isinstance(event, CallEnded):
            print(f"[observation {event.observation}]")
        elif isinstance(event, Text):
            print(event.text, end="", flush=True)
    served.close()


asyncio.run(ask("What is the weather like in Rome?"))
