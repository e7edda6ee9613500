"""The models that clients can name: every base, and every adapter as a model of its own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from glmkit.chat.following import Served
from glmkit.engine.scheduler import BatchEngine
from glmkit.errors import UsageError
from glmkit.kernels.build import level
from glmkit.serve.failures import APIError
from glmkit.serve.shapes import Model
from glmkit.serve.structured import Structures
from glmkit.serve.token_bytes import TokenTable

_SCHEMA_THREADS = 2  # for requests with a schema; the first of them makes the table of tokens too
LONGEST_TOKEN_CHARACTERS = 128  # only runs of blanks have longer tokens
_SAMPLED_NUMBERS = 16  # of each tensor


@dataclass(frozen=True)
class Target:
    """What answers a request.

    Args:
        served: The model.
        adapter: Its adapter; None for the base.
        name: What clients call it.
        parts: What all requests to the model share.
    """

    served: Served
    adapter: str | None
    name: str
    parts: Parts

    @property
    def engine(self) -> BatchEngine:
        """What runs it."""
        return self.served.engine

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.served.tokenizer

    @property
    def generation(self) -> int:
        """1 to 4; 0 for models that fill blanks."""
        generation: int = self.served.tokenizer.generation
        return generation

    def check_length(self, text: str, param: str) -> None:
        """Refuses a text that cannot fit into the context, before it is made into tokens.

        Args:
            text: The text.
            param: The field that has it.

        Raises:
            APIError: 400: it is longer than so many tokens can be.
        """
        most = LONGEST_TOKEN_CHARACTERS * self.served.context_tokens
        if len(text) > most:
            raise APIError(
                400,
                f"{param}: {len(text):,} characters; the model's context is {self.served.context_tokens:,} tokens",
                param=param,
                code="context_length_exceeded",
            )

    def check_bias(self, bias: Mapping[str, float] | None) -> None:
        """Refuses a bias for tokens that the model does not have.

        Args:
            bias: The request's logit_bias.

        Raises:
            APIError: 400: a token id is not in the vocabulary.
        """
        size = self.served.model.config.vocab_size
        if any(int(token) >= size for token in bias or ()):
            raise APIError(
                400, f"logit_bias: a token id is not below {size}, the vocabulary's size", param="logit_bias"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Changes with software, weights and what computes them; while it stays, a seed gives the same answer."""
        return "fp_" + hashlib.sha256(f"{self.parts.digest} {self.name}".encode()).hexdigest()[:10]


class Parts:
    """What is made once for a model, most of it when it is first needed.

    Args:
        served: The model.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self.digest = _digest(served.model)
        # Of their own, because a hostile schema takes seconds and all other requests share the loop's threads.
        self.schema_threads = ThreadPoolExecutor(_SCHEMA_THREADS, "schemas")

    @cached_property
    def tokens(self) -> TokenTable:
        """The bytes of its tokens."""
        return TokenTable(self._served.tokenizer)

    @cached_property
    def structures(self) -> Structures:
        """Its grammars."""
        return Structures(self._served.tokenizer, self._served.model.config.vocab_size)


class Catalogue:
    """All models of a server; the first is the one that requests without a name get.

    Args:
        served: One model, or several by name.

    Raises:
        UsageError: Two are called the same, or there is none.
    """

    def __init__(self, served: Served | Mapping[str, Served]) -> None:
        self.served = {served.name: served} if isinstance(served, Served) else dict(served)
        self._created = int(time.time())
        self._targets: dict[str, Target] = {}
        for name, one in self.served.items():
            parts = Parts(one)
            for adapter in (None, *one.adapters):
                target = Target(one, adapter, adapter or name, parts)
                if target.name in self._targets:
                    raise UsageError(
                        f"two models would be called {target.name!r}", hint="give the adapter another name: NAME=FOLDER"
                    )
                self._targets[target.name] = target
        if not self._targets:
            raise UsageError("there is no model to serve")

    def find(self, name: str | None) -> Target:
        """The model of a name.

        Args:
            name: What the client asks for; None is the first.

        Raises:
            APIError: 404: there is none.
        """
        if name is None:
            return next(iter(self._targets.values()))
        if name not in self._targets:
            raise APIError(
                404,
                f"the model {name[:100]!r} does not exist here; GET /v1/models lists those that do",
                "invalid_request_error",
                param="model",
                code="model_not_found",
            )
        return self._targets[name]

    def describe(self) -> list[Model]:
        """All of them, for /v1/models."""
        return [self.describe_one(target) for target in self._targets.values()]

    def describe_one(self, target: Target) -> Model:
        """One of them.

        Args:
            target: It.
        """
        base = next(name for name, served in self.served.items() if served is target.served)
        return Model(
            id=target.name,
            created=self._created,
            owned_by="glmkit",
            context_length=target.served.context_tokens,
            root=base,
            parent=None if target.adapter is None else base,
        )


def _digest(model: Any) -> str:
    """SHA-256 of what answers depend on beside the request; of each tensor its form and first numbers."""
    software = f"{version('glmkit')} {torch.__version__} {level()} {torch.get_num_threads()}\n"
    found = hashlib.sha256(software.encode())
    if isinstance(model, nn.Module):
        found.update(repr(getattr(model, "config", None)).encode())
        adapters = getattr(model, "glm_adapters", None)
        beside = () if adapters is None else adapters.named_parameters()
        for name, tensor in (*model.named_parameters(), *model.named_buffers(), *beside):
            found.update(f"{name} {tensor.dtype} {tensor.device.type} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().reshape(-1)[:_SAMPLED_NUMBERS].cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
