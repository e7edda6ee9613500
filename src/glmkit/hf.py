"""The only door to transformers: every symbol the project uses enters here, each for a stated reason.

The official remote code of these models broke with release after release, always at an edge to transformers and never
in the mathematics. So the edges are kept in one place; `tests/test_hf_contract.py` names the one that moved.
"""

from __future__ import annotations

from typing import Any

from transformers import (  # public classes that users' code meets
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    GlmConfig,  # its own layout of GLM-4, which has the model_type of the GLM of 2021
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache  # the caches that models accept
from transformers.generation import (  # what chat() hands to generate
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,  # prefix_allowed_tokens_fn of stream_generate
)
from transformers.masking_utils import create_causal_mask  # masks for every cache kind and attention back end
from transformers.modeling_layers import GradientCheckpointingLayer  # activation checkpointing per block
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,  # base of the outputs that no class of transformers fits
    SequenceClassifierOutputWithPast,
)
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend  # fast tokenizers
from transformers.utils import cached_file  # single files of a hub id, with transformers' cache and offline rules
from transformers.utils import logging as transformers_logging  # its progress bars, which checkpoints would show

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMultipleChoice",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BaseModelOutputWithPast",
    "BatchEncoding",
    "Cache",
    "CacheLayerMixin",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "GenerationConfig",
    "GenerationMixin",
    "GlmConfig",
    "GradientCheckpointingLayer",
    "LogitsProcessor",
    "LogitsProcessorList",
    "ModelOutput",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PrefixConstrainedLogitsProcessor",
    "SequenceClassifierOutputWithPast",
    "TokenizersBackend",
    "cached_file",
    "checkpoint_activations",
    "create_causal_mask",
    "set_generation_config",
    "transformers_logging",
]


def set_generation_config(model: GenerationMixin, values: dict[str, Any] | None) -> None:
    """Gives a model the content of a generation_config.json, if there is one, as transformers' own loader does."""
    if values is not None:
        model.generation_config = GenerationConfig.from_dict(values)


def checkpoint_activations(model: Any) -> None:
    """Lets blocks compute their activations again in the backward pass; the method's name changed in transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
