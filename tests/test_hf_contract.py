"""Every transformers symbol that hf.py brings in, and what the project relies on about it.

When a release of transformers breaks something here, a test fails with a sentence that names what moved. Read the
failing facts before the failing mathematics.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from glmkit import hf

DOOR = Path(hf.__file__)
Fact = tuple[str, Callable[[], bool]]


def takes(function: Callable[..., Any], *positional: str, **by_name: object) -> bool:
    """Whether a function begins with these parameters in this order, and takes the named ones."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    names = [name for name in parameters if name != "self"]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return names[: len(positional)] == list(positional) and all(name in parameters or open_ended for name in by_name)


def has_methods(owner: type, *names: str) -> bool:
    return all(callable(getattr(owner, name, None)) for name in names)


def has_fields(output: Any, *names: str) -> bool:
    return set(names) <= {field.name for field in fields(output)}


def output_fact(output: Any, *names: str) -> list[Fact]:
    return [
        (f"a dataclass with the fields {', '.join(names)}", lambda: has_fields(output, *names)),
        (
            "to_tuple() leaving out what is None",
            lambda: output(**{names[0]: torch.ones(1)}).to_tuple() == (torch.ones(1),),
        ),
    ]


def auto_fact(auto: Any) -> list[Fact]:
    return [
        ("register(config_class, model_class)", lambda: takes(auto.register, "config_class", "model_class")),
        ("from_pretrained(name, ...)", lambda: has_methods(auto, "from_pretrained")),
    ]


def a_small_mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask for two tokens after nothing, with the eager back end, which always makes one unless it may skip."""
    config = hf.PreTrainedConfig()
    config._attn_implementation = "sdpa"
    return hf.create_causal_mask(config, torch.zeros(1, 2, 4), None, None, **kwargs)


def _an_output() -> Any:
    """A subclass of ModelOutput as the models declare theirs, with one field set."""
    fields_of_it = {"__annotations__": {"a": Any, "b": Any}, "a": None, "b": None}
    return dataclass(type("Output", (hf.ModelOutput,), fields_of_it))(b=2)


FACTS: dict[str, list[Fact]] = {
    "AutoConfig": [
        ("register(model_type, config)", lambda: takes(hf.AutoConfig.register, "model_type", "config")),
        ("from_pretrained(name, ...)", lambda: has_methods(hf.AutoConfig, "from_pretrained")),
    ],
    "AutoModel": auto_fact(hf.AutoModel),
    "AutoModelForCausalLM": auto_fact(hf.AutoModelForCausalLM),
    "AutoModelForMultipleChoice": auto_fact(hf.AutoModelForMultipleChoice),
    "AutoModelForSeq2SeqLM": auto_fact(hf.AutoModelForSeq2SeqLM),
    "AutoModelForSequenceClassification": auto_fact(hf.AutoModelForSequenceClassification),
    "AutoTokenizer": [
        (
            "register(config_class, tokenizer_class=..., exist_ok=...)",
            lambda: takes(hf.AutoTokenizer.register, "config_class", tokenizer_class=0, exist_ok=0),
        ),
    ],
    "BaseModelOutputWithPast": output_fact(
        hf.BaseModelOutputWithPast, "last_hidden_state", "past_key_values", "hidden_states"
    ),
    "CausalLMOutputWithPast": output_fact(
        hf.CausalLMOutputWithPast, "loss", "logits", "past_key_values", "hidden_states"
    ),
    "GlmConfig": [
        ('model_type is "glm", the one that the GLM of 2021 has too', lambda: hf.GlmConfig.model_type == "glm"),
        ("from_dict(values)", lambda: hf.GlmConfig.from_dict({"num_hidden_layers": 3}).num_hidden_layers == 3),
    ],
    "ModelOutput": [
        ("a base for dataclasses of optional fields that leaves out what is None", lambda: [*_an_output()] == ["b"]),
        ("to_tuple()", lambda: _an_output().to_tuple() == (2,)),
    ],
    "SequenceClassifierOutputWithPast": output_fact(
        hf.SequenceClassifierOutputWithPast, "loss", "logits", "past_key_values", "hidden_states"
    ),
    "BatchEncoding": [
        (
            "BatchEncoding(data, encoding, tensor_type=, prepend_batch_axis=)",
            lambda: takes(hf.BatchEncoding, "data", "encoding", tensor_type=0, prepend_batch_axis=0),
        ),
    ],
    "Cache": [
        ("Cache(layers=[...])", lambda: takes(hf.Cache, "layers")),
        (
            "update(key_states, value_states, layer_idx)",
            lambda: takes(hf.Cache.update, "key_states", "value_states", "layer_idx"),
        ),
        ("get_seq_length() of the first layer", lambda: hf.DynamicCache().get_seq_length() == 0),
        (
            "get_mask_sizes(query_length, layer_idx) with the number of keys first",
            lambda: (
                takes(hf.Cache.get_mask_sizes, "query_length", "layer_idx")
                and hf.DynamicCache().get_mask_sizes(3, 0)[0] == 3
            ),
        ),
        (
            "methods crop, reset, reorder_cache, batch_select_indices and batch_repeat_interleave that ask every layer",
            lambda: has_methods(
                hf.Cache, "crop", "reset", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"
            ),
        ),
    ],
    "CacheLayerMixin": [
        (
            "the abstract methods update, lazy_initialization, get_seq_length, get_mask_sizes, get_max_length",
            lambda: (
                hf.CacheLayerMixin.__abstractmethods__
                == {"update", "lazy_initialization", "get_seq_length", "get_mask_sizes", "get_max_length"}
            ),
        ),
        (
            "update(key_states, value_states, ...)",
            lambda: takes(hf.CacheLayerMixin.update, "key_states", "value_states"),
        ),
        (
            "lazy_initialization(key_states, value_states)",
            lambda: takes(hf.CacheLayerMixin.lazy_initialization, "key_states", "value_states"),
        ),
        ("get_mask_sizes(query_length)", lambda: takes(hf.CacheLayerMixin.get_mask_sizes, "query_length")),
    ],
    "DynamicCache": [
        ("a Cache, made by DynamicCache(config=...)", lambda: takes(hf.DynamicCache, config=0)),
        ("subclass of Cache", lambda: issubclass(hf.DynamicCache, hf.Cache)),
    ],
    "GenerationConfig": [
        ("to_dict() with the names of all its fields", lambda: "max_new_tokens" in hf.GenerationConfig().to_dict()),
        ("from_pretrained(folder)", lambda: has_methods(hf.GenerationConfig, "from_pretrained")),
    ],
    "GenerationMixin": [
        (
            "generate(inputs, generation_config=, logits_processor=, stopping_criteria=, streamer=, ...)",
            lambda: takes(
                hf.GenerationMixin.generate,
                "inputs",
                generation_config=0,
                logits_processor=0,
                stopping_criteria=0,
                streamer=0,
            ),
        ),
        (
            "prepare_inputs_for_generation(input_ids, past_key_values=, attention_mask=, ...) before every token",
            lambda: takes(
                hf.GenerationMixin.prepare_inputs_for_generation, "input_ids", past_key_values=0, attention_mask=0
            ),
        ),
    ],
    "GradientCheckpointingLayer": [
        ("a torch module", lambda: issubclass(hf.GradientCheckpointingLayer, torch.nn.Module)),
        (
            "an attribute gradient_checkpointing, False",
            lambda: hf.GradientCheckpointingLayer.gradient_checkpointing is False,
        ),
    ],
    "LogitsProcessor": [
        ("called with (input_ids, scores)", lambda: takes(hf.LogitsProcessor.__call__, "input_ids", "scores")),
    ],
    "LogitsProcessorList": [("a list", lambda: issubclass(hf.LogitsProcessorList, list))],
    "PreTrainedConfig": [
        ("a dataclass whose subclasses become dataclasses", lambda: bool(fields(hf.PreTrainedConfig))),  # type: ignore[arg-type]
        ("from_dict(config_dict, ...)", lambda: takes(hf.PreTrainedConfig.from_dict, "config_dict")),
        (
            "from_pretrained(name, return_unused_kwargs=)",
            lambda: takes(hf.PreTrainedConfig.from_pretrained, "pretrained_model_name_or_path", return_unused_kwargs=0),
        ),
        ("to_diff_dict()", lambda: has_methods(hf.PreTrainedConfig, "to_diff_dict")),
        ("a class attribute attribute_map", lambda: isinstance(hf.PreTrainedConfig.attribute_map, dict)),
        ("_attn_implementation", lambda: hasattr(hf.PreTrainedConfig(), "_attn_implementation")),
    ],
    "PreTrainedModel": [
        (
            "from_pretrained(name, ..., config=)",
            lambda: takes(hf.PreTrainedModel.from_pretrained, "pretrained_model_name_or_path", config=0),
        ),
        ("a class method, so that ours can hand over", lambda: inspect.ismethod(hf.PreTrainedModel.from_pretrained)),
        (
            "methods post_init, save_pretrained, gradient_checkpointing_enable",
            lambda: has_methods(hf.PreTrainedModel, "post_init", "save_pretrained", "gradient_checkpointing_enable"),
        ),
        (
            "save_pretrained(save_directory, is_main_process, state_dict, ...)",
            lambda: takes(hf.PreTrainedModel.save_pretrained, "save_directory", "is_main_process", "state_dict"),
        ),
        ("the hook _init_weights(module)", lambda: takes(hf.PreTrainedModel._init_weights, "module")),
        (
            "hooks for the embeddings",
            lambda: has_methods(
                hf.PreTrainedModel,
                "get_input_embeddings",
                "set_input_embeddings",
                "get_output_embeddings",
                "set_output_embeddings",
            ),
        ),
    ],
    "PrefixConstrainedLogitsProcessor": [
        (
            "PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, num_beams)",
            lambda: takes(hf.PrefixConstrainedLogitsProcessor.__init__, "prefix_allowed_tokens_fn", "num_beams"),
        ),
    ],
    "TokenizersBackend": [
        ("made from tokenizer_object=", lambda: takes(hf.TokenizersBackend.__init__, tokenizer_object=0)),
        ("called with (text, text_pair, ...)", lambda: takes(hf.TokenizersBackend.__call__, "text", "text_pair")),
        ("encode(text, text_pair, ...)", lambda: takes(hf.TokenizersBackend.encode, "text", "text_pair")),
        ("pad(encoded_inputs, ...)", lambda: takes(hf.TokenizersBackend.pad, "encoded_inputs")),
        (
            "decode(token_ids, skip_special_tokens)",
            lambda: takes(hf.TokenizersBackend.decode, "token_ids", "skip_special_tokens"),
        ),
        (
            "batch_decode(sequences, skip_special_tokens)",
            lambda: takes(hf.TokenizersBackend.batch_decode, "sequences", "skip_special_tokens"),
        ),
        (
            "save_vocabulary(save_directory, filename_prefix)",
            lambda: takes(hf.TokenizersBackend.save_vocabulary, "save_directory", "filename_prefix"),
        ),
        (
            "save_pretrained(save_directory, ...)",
            lambda: takes(hf.TokenizersBackend.save_pretrained, "save_directory"),
        ),
        (
            "from_pretrained(name, ...)",
            lambda: takes(hf.TokenizersBackend.from_pretrained, "pretrained_model_name_or_path"),
        ),
        ("add_tokens(new_tokens)", lambda: takes(hf.TokenizersBackend.add_tokens, "new_tokens")),
    ],
    "cached_file": [
        (
            "cached_file(path_or_repo_id, filename, ...) with the hub's options",
            lambda: takes(hf.cached_file, "path_or_repo_id", "filename", revision=0, token=0, local_files_only=0),
        ),
    ],
    "create_causal_mask": [
        (
            "create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, ..., allow_is_causal_skip=)",
            lambda: takes(
                hf.create_causal_mask,
                "config",
                "inputs_embeds",
                "attention_mask",
                "past_key_values",
                allow_is_causal_skip=0,
            ),
        ),
        ("None where plain causality is enough", lambda: a_small_mask() is None),
        (
            "a (1, 1, T, S) mask, True where visible, if it may not skip",
            lambda: a_small_mask(allow_is_causal_skip=False).tolist() == [[[[True, False], [True, True]]]],  # type: ignore[union-attr]
        ),
    ],
    "transformers_logging": [
        ("is_progress_bar_enabled()", lambda: takes(hf.transformers_logging.is_progress_bar_enabled)),
        ("disable_progress_bar()", lambda: takes(hf.transformers_logging.disable_progress_bar)),
        ("enable_progress_bar()", lambda: takes(hf.transformers_logging.enable_progress_bar)),
    ],
}


def imported_symbols() -> set[str]:
    tree = ast.parse(DOOR.read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
        for alias in node.names
    }


def test_every_symbol_has_its_facts() -> None:
    assert imported_symbols() == set(FACTS)


def test_the_door_exports_what_it_imports() -> None:
    assert imported_symbols() <= set(hf.__all__)


@pytest.mark.parametrize(
    ("symbol", "expected", "holds"),
    [(symbol, expected, holds) for symbol, facts in FACTS.items() for expected, holds in facts],
    ids=[f"{symbol}-{number}" for symbol, facts in FACTS.items() for number, _ in enumerate(facts)],
)
def test_transformers_keeps_its_side(symbol: str, expected: str, holds: Callable[[], bool]) -> None:
    try:
        kept, reason = holds(), ""
    except Exception as error:
        kept, reason = False, f" ({type(error).__name__}: {error})"
    if not kept:
        pytest.fail(
            f"transformers {transformers.__version__} changed {symbol}: expected {expected}{reason}", pytrace=False
        )


def test_our_classes_override_no_private_hook() -> None:
    """Private methods of transformers come and go; `_init_weights` is the one it asks model classes to write."""
    from glmkit.engine.cache import BufferCache, BufferLayer
    from glmkit.models.chatglm import ChatGLMForCausalLM, ChatGLMModel
    from glmkit.models.chatglm2 import ChatGLM2ForCausalLM, ChatGLM2ForSequenceClassification, ChatGLM2Model
    from glmkit.models.chatglm2_config import ChatGLM2Config
    from glmkit.models.chatglm_config import ChatGLMConfig
    from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer

    ours = (
        BufferCache,
        BufferLayer,
        ChatGLM2Config,
        ChatGLM2ForCausalLM,
        ChatGLM2ForSequenceClassification,
        ChatGLM2Model,
        ChatGLMConfig,
        ChatGLMForCausalLM,
        ChatGLMModel,
        ChatGLMTokenizer,
    )
    overridden = set()
    for cls in ours:
        own = [base for base in cls.__mro__ if base.__module__.startswith("glmkit")]
        foreign = [base for base in cls.__mro__ if base.__module__.startswith("transformers")]
        for base in own:
            overridden |= {
                f"{base.__name__}.{name}"
                for name, value in vars(base).items()
                if callable(value) and name.startswith("_") and not name.startswith("__")
                if any(name in vars(other) for other in foreign)
            }
    assert overridden <= {"ChatGLM2PreTrainedModel._init_weights", "ChatGLMPreTrainedModel._init_weights"}
