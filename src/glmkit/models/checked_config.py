"""What all configs have in common: a config.json is checked field by field, and nothing in it is ignored.

A field that changes the result and has a value that is not computed is refused by its name; a field without numerical
role may have any value; a field nobody knows is refused too, because ignoring it could change every answer silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from glmkit import hf
from glmkit.errors import ConfigError
from glmkit.pickles import printable

# Fields of transformers and of tools around it that change nothing in the network.
_INERT = set(
    """_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    auto_map bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype eos_token_id
    finetuning_task id2label interleaved_qkv is_decoder is_encoder_decoder label2id model_type name_or_path num_labels
    output_attentions output_hidden_states pad_token_id prefix problem_type pruned_heads
    return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype
    torchscript transformers_version use_bfloat16 use_cache""".split()
)

_MAX_LABELS = 100_000
_SHOWN_PROBLEMS, _SHOWN_CHARACTERS = 20, 400
_CURES = {
    "quantization_config": "load the checkpoint that is not quantised, with quantize='int8' or 'int4' if it shall be;"
    " glm quantize writes that as a folder"
}


class CheckedConfig(hf.PreTrainedConfig):
    """Base of the configs. A family's class lists its fields and, in the class variables, what is refused.

    Class variables:
        sizes: Field -> the largest number that is believed. A file that says more is damaged or hostile, and would
            exhaust the memory; less than 1 is refused too.
        only_value: Field -> the released value, where a field has a numerical role but one implemented value.
        if_absent: Field -> what the official class assumes when config.json leaves it out, if that is not the default
            here.
        dropped_if_none: Fields that are not written when they are None.
        cures: Field -> what to do when it is refused.
        first_architecture: What config.json calls a plain checkpoint.
    """

    sizes: ClassVar[dict[str, int]] = {}
    only_value: ClassVar[dict[str, Any]] = {}
    if_absent: ClassVar[dict[str, Any]] = {}
    dropped_if_none: ClassVar[tuple[str, ...]] = ()
    cures: ClassVar[dict[str, str]] = {}
    first_architecture: ClassVar[str] = ""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the content of a config.json; see the class for what is refused.

        Raises:
            ConfigError: Naming every field in question at once.
        """
        values = dict(config_dict)
        values.pop("auto_map", None)  # names of python files, which are never run
        problems = [*_orders(values), *unreadable(values)]
        problems += [*_unknown_fields(cls, values), *_contradictions(cls, values)]
        for foreign, official in cls.attribute_map.items():
            value = values.pop(foreign, None)
            if value is not None:
                values.setdefault(official, value)
        for field, absent in cls.if_absent.items():
            values.setdefault(field, absent)
        problems += cls.complete(values)
        cls.refuse([*problems, *cls.problems(values)])
        return super().from_dict(values, **kwargs)

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        """Fills in, in place, what other fields say. Returns what speaks against the config, in words."""
        return []

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """Every field whose value cannot be computed with, in words; a family's class adds its own."""
        found = []
        for name, largest in cls.sizes.items():
            value = values.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
                found.append(f"{name}={value!r}: expected a whole number from 1 to {largest:,}")
        for name, only in cls.only_value.items():
            if name in values and values[name] != only:
                found.append(f"unsupported: {name}={values[name]!r} (all released checkpoints have {only!r})")
        return found

    def check(self) -> None:
        """Refuses what the network does not compute.

        Raises:
            ConfigError: Naming every field in question at once.
        """
        self.refuse(self.problems({name: getattr(self, name) for name in self.__dataclass_fields__}))

    @classmethod
    def refuse(cls, problems: list[str]) -> None:
        """Raises a ConfigError that lists the problems, if there are any."""
        if problems:
            known = {**_CURES, **cls.cures}
            cures = [cure for field, cure in known.items() if any(field in problem for problem in problems)]
            problems = list(dict.fromkeys(problems))
            shown = [printable(problem, _SHOWN_CHARACTERS) for problem in problems[:_SHOWN_PROBLEMS]]
            more = [f"… and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
            raise ConfigError(
                "this config cannot be loaded:\n" + "\n".join(f"  - {problem}" for problem in [*shown, *more]),
                hint=cures[0] if cures else "compare config.json with the one of the official repository",
            )

    def architectures_to_write(self, architectures: list[str]) -> list[str]:
        """The official name of what is saved, for the classes in `architectures`."""
        return architectures or [self.first_architecture]

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json gets: the official `architectures`, and no `auto_map` to files that are not there."""
        values = super().to_diff_dict()
        values.pop("auto_map", None)
        for name in self.dropped_if_none:
            if values.get(name) is None:
                values.pop(name, None)
        if "dtype" in values:  # the name that the official code's transformers reads; today's reads it too
            values["torch_dtype"] = values.pop("dtype")
        values["architectures"] = self.architectures_to_write(values.get("architectures") or [])
        return values


def is_positive(value: Any) -> bool:
    """Whether a value is a believable number above zero."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < 1e9


def prefix_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with the fields of P-Tuning and of the official quantised format, which several families share."""
    found = []
    bits = values.get("quantization_bit")
    if bits is not None and (not isinstance(bits, int) or bits not in (0, 4, 8)):
        found.append(f"quantization_bit={bits!r:.80}: expected 4 or 8, or 0 for none")
    length = values.get("pre_seq_len")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= 65_536):
        found.append(f"pre_seq_len={length!r}: expected a whole number from 1 to 65,536, or null")
    return found


def foreign_ids(values: dict[str, Any], fields: Mapping[str, Any], rows: Any) -> list[str]:
    """Token ids that lie outside the vocabulary, or are no ids; in words.

    Args:
        values: The config.
        fields: Names of the fields -> their defaults, which are never refused: they are those of the release, and
            stand in every config that does not name its own.
        rows: Size of the vocabulary.
    """
    found = []
    for name, default in fields.items():
        given = values.get(name)
        for token in given if isinstance(given, (list, tuple)) else [given]:
            if token is None or given == default:
                continue
            if type(token) is not int:
                found.append(f"{name}={token!r:.80}: expected a token id")
            elif token < 0 or (isinstance(rows, int) and token >= rows):
                found.append(f"{name}={token} lies outside the vocabulary of {rows:,}")
    return found


def _orders(values: dict[str, Any]) -> list[str]:
    """Fields that would make transformers fetch code or quantise; a file may not order that, a caller may."""
    back_end = values.pop("attn_implementation", None)
    problems = []
    if back_end not in (None, "sdpa", "eager"):
        problems.append(f"unsupported: attn_implementation={back_end!r} (expected 'sdpa' or 'eager')")
    format_ = values.pop("quantization_config", None)
    if isinstance(format_, dict) and format_.get("quant_method") == "glmkit":
        values["quantization_config"] = format_  # `glmkit.quant.schemes` reads it
    elif format_ is not None:
        method = format_.get("quant_method") if isinstance(format_, dict) else format_
        problems.append(f"unsupported: quantization_config of the format {method!r:.80}")
    return problems


def unreadable(values: Mapping[str, Any]) -> list[str]:
    """Fields that transformers takes apart before anybody checks them: a table is made for every label.

    Args:
        values: The content of a config.json.

    Returns:
        What is wrong with them, in words.
    """
    problems = []
    labels, names = values.get("num_labels"), values.get("id2label")
    if labels is not None and (type(labels) is not int or not 0 < labels <= _MAX_LABELS):
        problems.append(f"num_labels={labels!r:.80}: expected a whole number from 1 to {_MAX_LABELS:,}")
    if names is not None and not (isinstance(names, dict) and all(str(key).isdecimal() for key in names)):
        problems.append(f"id2label={names!r:.80}: expected an object of numbers to names")
    padding = values.get("pad_token_id")
    if padding is not None and type(padding) is not int:
        problems.append(f"pad_token_id={padding!r:.80}: expected a token id")
    named = values.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        problems.append(f"architectures={values['architectures']!r:.80}: expected a list of names")
    for field in ("dtype", "torch_dtype"):
        dtype = values.get(field)
        meant = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(meant, torch.dtype):
            problems.append(f"{field}={dtype!r:.80}: expected a name such as 'float16'")
    return problems


def _unknown_fields(cls: type[CheckedConfig], values: dict[str, Any]) -> list[str]:
    # Of transformers' own fields only inert ones: a file that brought `attribute_map` would rename those checked here.
    known = set(cls.__dataclass_fields__) - set(hf.PreTrainedConfig.__dataclass_fields__)
    known |= set(cls.attribute_map) | _INERT
    known |= {"quantization_config", *hf.GenerationConfig().to_dict()}
    return [
        f"unknown field {name:.80}={value!r:.80}: nobody knows whether it changes the result"
        for name, value in values.items()
        if name not in known and value is not None
    ]


def _contradictions(cls: type[CheckedConfig], values: dict[str, Any]) -> list[str]:
    """transformers' names may stand beside the official ones, but must not contradict them."""
    return [
        f"{name}={values[name]!r} contradicts {official}={values[official]!r}"
        for name, official in cls.attribute_map.items()
        if name in values and official in values and values[name] != values[official]
    ]
