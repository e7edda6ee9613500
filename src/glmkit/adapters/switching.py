"""Several adapters in one model, and which of them answers: the base is in memory once, and a switch copies nothing.

    LoRA      every adapted layer adds (B A x) * scale of the active adapter to what it gives
    P-Tuning  the active prefix stands at its official place in the network while the network runs

Which one is active is decided for each call of the model, so requests may take turns in any order, also from several
threads: `with adapters.active("ads"):` holds for the calls inside it, in its own thread or task only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit.adapters.formats import Lora, Prefix
from glmkit.errors import UsageError

_NO_NAMES = ("base", "none", "off")  # what people call the state without an adapter
_CHOSEN = object()  # no adapter was asked for: the one that was chosen for all


class LoraMatrices(nn.Module):
    """The matrices of one adapter beside one layer; they compute in their own dtype.

    Args:
        a: (rank, in), float32.
        b: (out, rank), float32.
        scale: What the product is multiplied by.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """(..., in) and (..., out) -> (..., out) in the dtype of `output`."""
        change = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (output + change * self.scale).to(output.dtype)


class LoraBeside(nn.Module):
    """The matrices of all adapters beside one layer of any kind; a hook of the layer, which itself stays as it is.

    Args:
        adapters: Who knows which adapter is active.
    """

    def __init__(self, adapters: Adapters) -> None:
        super().__init__()
        self._adapters = adapters
        self._places: dict[str, int] = {}
        self.matrices = nn.ModuleList()

    def add(self, name: str, matrices: LoraMatrices) -> None:
        """Takes in an adapter's matrices."""
        self._places[name] = len(self.matrices)
        self.matrices.append(matrices)

    def after(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What the layer gives with the active adapter."""
        name = self._adapters.current
        place = None if name is None else self._places.get(name)
        return output if place is None else self.matrices[place](inputs[0], output)


@dataclass(frozen=True)
class _Mounted:
    """A prefix encoder at its place, and what the configs say of it."""

    encoder: nn.Module | None
    pre_seq_len: int | None
    prefix_projection: bool


class Adapters:
    """The adapters of one model, and the one place that knows which is active.

    Args:
        model: The base model; what it was made with, a prefix of its own included, is the state without an adapter.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        model.glm_adapters = self  # for whoever has the model alone
        self.folders: dict[str, Path] = {}
        self.chosen: str | None = None
        self._asked: ContextVar[Any] = ContextVar("adapter", default=_CHOSEN)
        self._network: Any = getattr(model, model.base_model_prefix)
        self._beside: dict[str, LoraBeside] = {}  # by the layer's name
        self._prefixes: dict[str, _Mounted] = {}
        self._base: _Mounted | None = None  # known once there is a prefix beside it
        self._lock = threading.RLock()  # one network, one place for a prefix

    # --- which one ---

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were added."""
        return tuple(self.folders)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The numbers of all adapters, by their place; they are none of the model's own."""
        prefixes = {name: mounted.encoder for name, mounted in self._prefixes.items() if mounted.encoder is not None}
        for place, module in (*self._beside.items(), *prefixes.items()):
            yield from module.named_parameters(place)

    @property
    def current(self) -> str | None:
        """The adapter that the next call of the model uses; None is the base."""
        asked = self._asked.get()
        return self.chosen if asked is _CHOSEN else asked

    def choose(self, name: str | None) -> None:
        """Sets the adapter of all calls that ask for none.

        Args:
            name: Its name; None for the base.

        Raises:
            UsageError: There is no such adapter.
        """
        self._check(name)
        with self._lock:
            self.chosen = name
            if self._base is not None:
                self._mount(name)

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Lets the calls of the model inside the block use one adapter. Not around a `yield`: it would leak out.

        Args:
            name: Its name; None for the base.

        Raises:
            UsageError: There is no such adapter.
        """
        self._check(name)
        token = self._asked.set(name)
        try:
            yield
        finally:
            self._asked.reset(token)

    def view(self, name: str | None) -> ModelView:
        """The model as it is with one adapter, for `stream_reply` and the engine.

        Args:
            name: Its name; None for the base.

        Raises:
            UsageError: There is no such adapter.
        """
        self._check(name)
        return ModelView(self, name)

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self.folders:
            raise UsageError(
                f"there is no adapter {name!r}", hint=f"loaded are: {', '.join(self.names)}; None is the base"
            )

    # --- adding ---

    def add(self, name: str, learnt: Lora | Prefix) -> None:
        """Puts an adapter into the model, in float32; it is not chosen by that.

        Args:
            name: What it is called.
            learnt: What `read_adapter` returned.

        Raises:
            UsageError: The name is taken, or none to be told apart from others.
        """
        if not is_adapter_name(name):
            raise UsageError(f"an adapter cannot be called {name!r:.120}", hint="give it a short name without spaces")
        if name in self.folders:
            raise UsageError(f"two adapters are called {name!r}", hint="give each a name of its own: NAME=FOLDER")
        self.model.requires_grad_(False)  # whoever goes on training trains what was learnt
        if isinstance(learnt, Lora):
            self._add_lora(name, learnt)
        else:
            self._add_prefix(name, learnt)
        self.folders[name] = learnt.folder.path

    def _add_lora(self, name: str, lora: Lora) -> None:
        for path, a, b, scale in lora.read():
            device = self.model.get_submodule(path).weight.device
            beside = self._beside.setdefault(path, LoraBeside(self))
            beside.add(name, LoraMatrices(a.to(device), b.to(device), scale))
        self.attach()

    def attach(self) -> None:
        """Puts the matrices beside their layers, once more where a layer was replaced, as quantising does."""
        for path, beside in self._beside.items():
            layer = self.model.get_submodule(path)
            if getattr(layer, "lora", None) is not beside:
                layer.lora = beside
                layer.register_forward_hook(beside.after)

    def _add_prefix(self, name: str, prefix: Prefix) -> None:
        with torch.device("meta"):
            made = type(self.model)(prefix.config)
        encoder = getattr(made, made.base_model_prefix).prefix_encoder
        start = f"{made.base_model_prefix}.prefix_encoder."
        tensors = {own.removeprefix(start): tensor.float() for own, tensor in prefix.read()}
        encoder.load_state_dict(tensors, assign=True)
        if encoder.trans is not None:
            # Its two layers give the same for every prompt, and are larger than the model's own: run once, and left.
            with torch.inference_mode(False), torch.no_grad():
                rows = encoder.trans(encoder.embedding.weight)
            encoder.embedding.weight, encoder.trans = nn.Parameter(rows), None
        encoder.to(self._network.device).eval()
        if self._base is None:
            own = getattr(self._network, "prefix_encoder", None)
            config = self.model.config
            self._base = _Mounted(own, config.pre_seq_len, config.prefix_projection)
            self._network.register_forward_pre_hook(self._before)
            self._network.register_forward_hook(self._after, always_call=True)
        self._prefixes[name] = _Mounted(encoder, prefix.config.pre_seq_len, False)

    # --- prefixes ---

    def _before(self, network: nn.Module, inputs: Any) -> None:
        self._lock.acquire()
        self._mount(self.current)

    def _after(self, network: nn.Module, inputs: Any, output: Any) -> None:
        self._mount(self.chosen)
        self._lock.release()

    def _mount(self, name: str | None) -> None:
        wanted = self._base if name is None else self._prefixes.get(name, self._base)
        assert wanted is not None
        if wanted.encoder is getattr(self._network, "prefix_encoder", None):
            return
        if wanted.encoder is None:
            del self._network.prefix_encoder
        else:
            self._network.prefix_encoder = wanted.encoder.to(self._network.device)
        for config in (self.model.config, self._network.config):
            config.pre_seq_len, config.prefix_projection = wanted.pre_seq_len, wanted.prefix_projection


class ModelView:
    """A model as it is with one adapter: calls use it, everything else is the model's own.

    Args:
        adapters: The model's adapters.
        adapter: The name of one; None for the base.
    """

    def __init__(self, adapters: Adapters, adapter: str | None) -> None:
        self._adapters, self.adapter = adapters, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._adapters.active(self.adapter):
            return self._adapters.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapters.model, name)


def is_adapter_name(name: Any) -> bool:
    """Whether an adapter may be called so: a short text without spaces that does not stand for the base.

    Args:
        name: The name.
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= 100
        and name.isprintable()
        and " " not in name
        and name not in _NO_NAMES
    )


def adapter_of(model: Any) -> str | None:
    """The adapter that the next call of a model uses; None for the base, and for a model that has none.

    Args:
        model: A model or a `ModelView`.
    """
    if isinstance(model, ModelView):
        return model.adapter
    adapters = getattr(model, "glm_adapters", None)
    return adapters.current if isinstance(adapters, Adapters) else None


__all__ = ["Adapters", "LoraBeside", "LoraMatrices", "ModelView", "adapter_of", "is_adapter_name"]
