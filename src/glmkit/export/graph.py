"""One step of a model as a graph: what every export to another runtime starts from.

    input_ids, attention_mask, position_ids, past, weights  ->  logits, present

One graph reads prompts and continues them: a prompt comes with an empty past. The weights are inputs, too. So a network
of six billion parameters is traced without one of them in memory, and whoever exports puts constants, float or
compressed, where these inputs were, one after the other (`glmkit.export.constants` reads them).

    families                        attention_mask               position_ids
    ChatGLM2, ChatGLM3, GLM-4       (B, S) 1 = token             (B, T)
    ChatGLM-6B, GLM                 (B, 1, T, S) 1 = is seen     (B, 2, T)
    GLM-130B                        (B, 1, T, S) 1 = is seen     (B, T)

All of these are int64. A prefix of P-Tuning is the beginning of the past: what stands in front of the first token, and
in no mask, since everybody sees it.

Letters: `B` batch, `T` new tokens, `S` all tokens so far, `P` prefix columns, `K` key/value heads, `D` head width,
`V` vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit.engine.layout import layout_for
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.models.prefix_lm import PrefixLayout
from glmkit.registration import LANGUAGE_MODELS

INPUTS = ("input_ids", "attention_mask", "position_ids")
_BATCH, _TOKENS, _PAST = 2, 5, 7  # of the sample; any other sizes do


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Args:
        path: The new folder or file.
        bytes: Its size.
        notes: What the user should know, in sentences.
        difference: How far its logits are from the source's in float32, relative to their size; None: not compared.
    """

    path: str
    bytes: int
    notes: list[str] = field(default_factory=list)
    difference: float | None = None


@dataclass(frozen=True)
class Inputs:
    """Which form the inputs of a model's graph have.

    Args:
        layers: Number of layers; past and present have two tensors for each, keys before values.
        heads: Key/value heads, `K`.
        width: Head width, `D`.
        vocabulary: Columns of the logits, `V`.
        causal: Whether attention_mask is (B, S); else it is (B, 1, T, S).
        position_rows: 2 for position_ids (B, 2, T), 1 for (B, T).
        prefix_tokens: Columns that the past has before the first token, `P`.
    """

    layers: int
    heads: int
    width: int
    vocabulary: int
    causal: bool
    position_rows: int
    prefix_tokens: int

    @property
    def past_names(self) -> list[str]:
        """Names of the past's tensors, (B, K, P + tokens, D) each."""
        return [f"past.{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]

    @property
    def present_names(self) -> list[str]:
        """Names of the tensors that are the past of the next step."""
        return [f"present.{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]


def inputs_of(config: CheckedConfig) -> Inputs:
    """The form of the inputs of a model's graph.

    Args:
        config: The model's config.
    """
    heads, width = config.num_attention_heads, getattr(config, "head_dim", 0)
    if isinstance(config, ChatGLM2Config):
        heads, width = config.multi_query_group_num, config.kv_channels
    two = isinstance(config, GLMConfig) or (isinstance(config, ChatGLMConfig) and config.position_encoding_2d)
    return Inputs(
        layers=config.num_layers,
        heads=heads,
        width=width,
        vocabulary=config.padded_vocab_size if isinstance(config, ChatGLM2Config) else config.vocab_size,
        causal=isinstance(config, ChatGLM2Config),
        position_rows=2 if two else 1,
        prefix_tokens=getattr(config, "pre_seq_len", None) or 0,
    )


class Step(nn.Module):
    """A language model as a function of plain tensors.

    Args:
        model: Of any family, with float layers, in eval mode; its attention is replaced by one without branches, so it
            should be used for nothing else; without a prefix, which is in the past.
        inputs: The form of the inputs.
        last_only: Whether logits are made for the last column alone. All prompts of a batch end there.
    """

    def __init__(self, model: Any, inputs: Inputs, *, last_only: bool = False) -> None:
        super().__init__()
        self.model, self.inputs, self.last_only = model, inputs, last_only
        for module in model.modules():
            if hasattr(module, "attend"):
                module.attend = attend

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Computes the next step.

        Args:
            input_ids: (B, T) int64, with padding on the left.
            attention_mask: See the module, like position_ids.
            position_ids: Of padding, any.
            past: Two tensors for each layer, (B, K, P + S - T, D).

        Returns:
            logits (B, T, V), or (B, 1, V) with `last_only`; then as many tensors as the past, (B, K, P + S, D).
        """
        cache = _Past(past)
        seen = self.seen(attention_mask, input_ids.shape[1], past[0].shape[2])
        hidden, logits = _RUN[type(self.model.config)](self.model, input_ids, seen, position_ids, cache)
        return (logits(hidden[:, -1:] if self.last_only else hidden), *cache.present)

    def seen(self, attention_mask: Tensor, tokens: int, past: int) -> Tensor:
        """Who sees whom, (B, 1, T, P + S) bool; a row of padding sees something, so that its softmax is not empty."""
        if self.inputs.causal:
            rows = torch.arange(past, past + tokens, device=attention_mask.device)  # the prefix counted
            columns = torch.arange(past + tokens, device=attention_mask.device)
            everybody = F.pad(attention_mask, (self.inputs.prefix_tokens, 0), value=1)
            seen = (columns <= rows[:, None]) & (everybody[:, None, None] != 0)
            return seen | (columns == rows[:, None])
        seen = F.pad(attention_mask, (self.inputs.prefix_tokens, 0), value=1) != 0
        return seen | ~seen.any(-1, keepdim=True)


class _Past:
    """What the blocks take for a cache: it appends to what is given."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past, self.present = past, list(past)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        for place, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.present[place] = torch.cat((self.past[place], new), dim=2)
        return self.present[2 * layer], self.present[2 * layer + 1]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """`glmkit.models.layers.attend` for any number of tokens in one form, which runtimes know as attention.

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D).
        v: Like k.
        mask: (B, 1, T, S) bool.
        dropout: 0, since nothing is trained here.

    Returns:
        (B, T, H, D).
    """
    B, H, _, D = q.shape
    K = k.shape[1]
    if H != K:
        k, v = (one.unsqueeze(2).expand(B, K, H // K, -1, D).reshape(B, H, -1, D) for one in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


Hidden = tuple[Tensor, Callable[[Tensor], Tensor]]  # normed hidden states (B, T, C), and what makes logits of them


def _chatglm2(model: Any, ids: Tensor, seen: Tensor, positions: Tensor, cache: _Past) -> Hidden:
    network = model.transformer
    x = network.embedding.word_embeddings(ids)
    rotary = network.rotary(positions, x.dtype)
    for block in network.encoder.layers:
        x = block(x, seen, rotary, cache, None)
    return network.encoder.final_layernorm(x), model.logits


def _chatglm(model: Any, ids: Tensor, seen: Tensor, positions: Tensor, cache: _Past) -> Hidden:
    network = model.transformer
    x = network.word_embeddings(ids)
    rotary = network.rotary(positions, x.dtype)
    for block in network.layers:
        x = block(x, (seen, None), rotary, cache, None)
    return network.final_layernorm(x), model.logits


def _glm130b(model: Any, ids: Tensor, seen: Tensor, positions: Tensor, cache: _Past) -> Hidden:
    network = model.transformer
    x = network.word_embeddings(ids)
    rotary = network.rotary(positions, x.dtype)
    for block in network.layers:
        x = block(x, (seen, None), rotary, cache)
    return network.final_layernorm(x), model.logits


def _glm(model: Any, ids: Tensor, seen: Tensor, positions: Tensor, cache: _Past) -> Hidden:
    network = model.glm
    prefixes = [None] * len(network.transformer.layers)
    x, _ = network.transformer(network.word_embeddings(ids), positions, (seen, None), None, cache, prefixes, False)
    return x, network.logits


_RUN = {ChatGLM2Config: _chatglm2, ChatGLMConfig: _chatglm, GLM130BConfig: _glm130b, GLMConfig: _glm}


@dataclass(frozen=True)
class Traced:
    """A step as a program.

    Args:
        program: Of torch.export, on the meta device. Its inputs in this order: input_ids, attention_mask, position_ids,
            the past's tensors, the weights. Its outputs: logits, the present's tensors.
        inputs: The form of its inputs.
        weights: Name of a weight in the checkpoint -> its shape, in the order of the inputs.
    """

    program: torch.export.ExportedProgram
    inputs: Inputs
    weights: dict[str, tuple[int, ...]]

    @property
    def input_names(self) -> list[str]:
        """Names of all inputs, in their order."""
        return [*INPUTS, *self.inputs.past_names, *self.weights]

    @property
    def output_names(self) -> list[str]:
        """Names of all outputs, in their order."""
        return ["logits", *self.inputs.present_names]


class _WithWeights(nn.Module):
    """A step whose weights are inputs."""

    def __init__(self, step: Step, names: Sequence[str]) -> None:
        super().__init__()
        self.run: Any = lambda weights, inputs: torch.func.functional_call(step, dict(zip(names, weights)), inputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """As in `Step`."""
        found: tuple[Tensor, ...] = self.run(weights, (input_ids, attention_mask, position_ids, past))
        return found


def skeleton(config: CheckedConfig) -> Any:
    """The float32 model of a config on the meta device, without a prefix and whatever it is quantised to.

    Args:
        config: The model's config.
    """
    left_out = ("quantization_bit", "quantization_config", "pre_seq_len", "prefix_projection", "dtype", "torch_dtype")
    plain = type(config).from_dict({name: value for name, value in config.to_dict().items() if name not in left_out})
    with torch.device("meta"):
        model = LANGUAGE_MODELS[type(config)](plain).float().eval()
    for copy, table in dict(getattr(model, "_tied_weights_keys", None) or {}).items():
        owner, _, leaf = copy.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(table)
    return model


def trace(config: CheckedConfig, *, last_only: bool = False) -> Traced:
    """Traces one step of the model that a config means, without its weights.

    Args:
        config: The model's config.
        last_only: Whether logits are made for the last column alone.

    Returns:
        The program, with rows, new tokens and earlier tokens left open.
    """
    inputs = inputs_of(config)
    step = Step(skeleton(config), inputs, last_only=last_only)
    weights = {name.removeprefix("model."): one for name, one in step.named_parameters()}
    B, T, S = _BATCH, _TOKENS, _TOKENS + _PAST
    auto = torch.export.Dim.AUTO
    mask = (B, S) if inputs.causal else (B, 1, T, S)
    positions = (B, 2, T) if inputs.position_rows == 2 else (B, T)
    sample = [torch.ones(shape, dtype=torch.int64, device="meta") for shape in ((B, T), mask, positions)]
    shape = (B, inputs.heads, inputs.prefix_tokens + _PAST, inputs.width)
    cache = [torch.zeros(shape, device="meta") for _ in inputs.past_names]
    open_sizes = [
        {0: auto, 1: auto},
        {0: auto, 1: auto} if inputs.causal else {0: auto, 2: auto, 3: auto},
        {0: auto, len(positions) - 1: auto},
        [{0: auto, 2: auto} for _ in cache],
        [None for _ in weights],
    ]
    with torch.no_grad():
        program = torch.export.export(
            _WithWeights(step, [f"model.{name}" for name in weights]),
            (*sample, cache, [one.detach() for one in weights.values()]),
            dynamic_shapes=open_sizes,
        )
    return Traced(program, inputs, {name: tuple(one.shape) for name, one in weights.items()})


def inputs_at(model: Any, ids: Tensor, pads: Tensor, start: int, end: int) -> dict[str, Tensor]:
    """What a graph is fed with for some columns of a batch.

    Args:
        model: The language model, which knows its layout.
        ids: (B, S) int64, padded on the left, with the prompts in front; of prompts read in both directions sop must be
            among them.
        pads: Columns of padding of each row, (B,) int64.
        start: First column.
        end: Column behind the last.

    Returns:
        input_ids, attention_mask and position_ids, all int64.
    """
    layout = layout_for(model, ids, pads)
    if isinstance(layout, PrefixLayout):
        made = layout.prompt(start, end)
        blocked = made["attention_mask"].bool()
        mask, positions = (~blocked if layout.blocked else blocked), made["position_ids"]
    else:
        columns = torch.arange(end, device=ids.device)
        mask, positions = columns >= pads[:, None], (columns[start:] - pads[:, None]).clamp(min=0)
    return {"input_ids": ids[:, start:end], "attention_mask": mask.long(), "position_ids": positions}
