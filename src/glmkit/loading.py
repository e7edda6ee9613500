"""From a name or folder to a model that is ready to use: the only loader.

The gate (`checkpoint.open_folder`) has checked every file before anything is allocated; then the model is built without
memory, and the tensors are read one at a time straight into their dtype, device and, if asked for, quantised form.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmkit import adapters, hf
from glmkit.checkpoint import Folder, check_tensors, open_folder
from glmkit.errors import CheckpointError, TokenizerError, UsageError
from glmkit.families import Family, find_family
from glmkit.location import locate
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM, ChatGLM2PreTrainedModel
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.quant.official import OfficialQuantizedLinear, is_quantised_layer, quantize_model, quantize_rows
from glmkit.registration import register
from glmkit.tokenizers.chatglm2 import ChatGLMTokenizer

logger = logging.getLogger("glmkit")

_QUANTIZE = {"official-int8": 8, "official-int4": 4}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "half": torch.float16}
_SMALL_BYTES = 10**9  # below it a CPU computes float16 checkpoints in float32

# Names that people type from other tools, and ours.
_SYNONYMS = {
    "torch_dtype": "dtype",
    "adapter_path": "adapter",
    "adapter_name_or_path": "adapter",
    "lora": "adapter",
    "lora_path": "adapter",
    "peft_model_id": "adapter",
    "ptuning_checkpoint": "adapter",
    "device_map": "device",
    "quantization": "quantize",
}


@dataclass(frozen=True)
class Loaded:
    """A model with everything that belongs to it; it unpacks as `model, tokenizer`.

    Args:
        model: The language model, in eval mode.
        tokenizer: Its tokenizer, which also knows its chat format; None if the folder has none.
        family: Its row of the families table, None for a model of no known name.
        config: Its config.
        path: The folder it was loaded from.
        adapter: The adapter's folder, if any.
    """

    model: ChatGLM2ForCausalLM
    tokenizer: ChatGLMTokenizer | None
    family: Family | None
    config: ChatGLM2Config
    path: Path
    adapter: Path | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def chat(self, messages: Any, **options: Any) -> Any:
        """Answers a question or a list of messages; see `glmkit.chat.conversation.reply_to`."""
        from glmkit.chat.conversation import reply_to

        return reply_to(self.model, self._tokenizer(), messages, **options)

    def stream(self, messages: Any, **options: Any) -> Any:
        """Like `chat`, piece by piece; see `glmkit.chat.conversation.stream_reply`."""
        from glmkit.chat.conversation import stream_reply

        return stream_reply(self.model, self._tokenizer(), messages, **options)

    def _tokenizer(self) -> ChatGLMTokenizer:
        if self.tokenizer is None:
            raise UsageError(
                f"{self.path} has no tokenizer.model, so text cannot be read or written",
                hint="copy tokenizer.model from the checkpoint's original repository",
            )
        return self.tokenizer


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str | None = None,
    *,
    family: str | None = None,
    revision: str | None = None,
    download: bool = False,
    **others: Any,
) -> Loaded:
    """Loads a model and its tokenizer.

    Args:
        path: A folder, a family name ("chatglm3-6b", looked up under GLMKIT_MODELS and in the hub cache), or a hub id.
        adapter: A LoRA folder (PEFT) or a P-Tuning v2 checkpoint; which one it is, and its sizes, are read from it.
        dtype: "auto", "float32", "bfloat16", "float16" or a torch dtype. "auto" is the checkpoint's own; on a CPU
            float16, which CPUs compute slowly, becomes float32 below 1 GB of weights and bfloat16 above.
        device: "auto" (the accelerator if there is one, else the CPU), "cpu", "cuda:1", "npu" …
        quantize: None, "official-int8" or "official-int4" (row-wise, done while loading).
        family: Overrules the folder's own signs, e.g. "chatglm2-6b-32k" for a folder that does not say what it is.
        revision: Branch, tag or commit if the model comes from the hub.
        download: Whether a bare family name may be fetched.
        **others: Names of these arguments from other tools (torch_dtype, adapter_path, load_in_4bit …).

    Returns:
        A `Loaded`.

    Raises:
        UsageError: An unknown name or argument.
        CheckpointError: A damaged or foreign folder, with everything that is wrong with it.
        ConfigError: A config that asks for what is not computed.
    """
    arguments = _accept_synonyms({"adapter": adapter, "dtype": dtype, "device": device, "quantize": quantize}, others)
    adapter, dtype, device, quantize = (arguments[name] for name in ("adapter", "dtype", "device", "quantize"))
    register()
    # A folder is what it says inside, whatever it is called; a name means a model.
    row = _family_argument(family) or (None if Path(path).expanduser().is_dir() else find_family(str(path)))
    location = locate(path, download=download, revision=revision)
    bits = _bits(quantize)
    with ExitStack() as opened:
        folder = opened.enter_context(open_folder(location))
        config = read_config(folder, row, overrule=family is not None)
        row = row or find_family(str(folder.config.get("_name_or_path", "")))
        config._name_or_path = str(location)  # where PEFT and others look for the base, as after from_pretrained
        extra = opened.enter_context(adapters.open_adapter(Path(adapter))) if adapter is not None else None
        prefix = extra if extra is not None and adapters.is_prefix(extra) else None
        if prefix is not None:
            adapters.size_prefix(config, prefix)
        elif extra is not None and (bits or config.quantization_bit):
            raise UsageError(
                "a LoRA adapter cannot be put on a model in the official quantised format",
                hint="load both without quantize, or merge the adapter first and quantise the merged model",
            )
        target = choose_device(device)
        tokenizer = _load_tokenizer(folder, config)
        model = load_model(
            folder,
            ChatGLM2ForCausalLM,
            config,
            choose_dtype(dtype, folder, target),
            target,
            quantize=bits,
            prefix=prefix,
        )
        if extra is not None and prefix is None:
            adapters.add_lora(model, extra)
    return Loaded(model, tokenizer, row, config, location, None if adapter is None else Path(adapter))


def load_model(
    folder: Folder,
    cls: type[ChatGLM2PreTrainedModel],
    config: ChatGLM2Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize: int | None = None,
    prefix: Folder | None = None,
) -> Any:
    """Builds the model on the meta device and fills it, one tensor in memory at a time.

    Args:
        folder: The opened checkpoint.
        cls: Which model class.
        config: Its config.
        dtype: Floating dtype of the result (quantised weights and their scales keep theirs).
        device: Where the tensors go.
        quantize: 4 or 8 to quantise each block's linears as they are read.
        prefix: An opened P-Tuning checkpoint whose tensors complete the folder's.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, all of them.
    """
    stored_bits = config.quantization_bit or 0
    if stored_bits and quantize not in (None, stored_bits):
        raise UsageError(
            f"the checkpoint is already quantised to {stored_bits} bits, so it cannot become {quantize} bits",
            hint="leave out quantize, or load the unquantised checkpoint",
        )
    with torch.device("meta"):
        model = cls(config)
        if stored_bits:
            quantize_model(model, stored_bits)
    check_model(folder, model, also_in=prefix)
    if prefix is not None:
        check_tensors(prefix, {n: tuple(t.shape) for n, t in model.state_dict().items() if ".prefix_encoder." in n})
    bits = quantize if quantize != stored_bits else None
    for source in (folder, prefix) if prefix is not None else (folder,):
        for name, tensor in source.read([name for name in source.tensors if not _is_ignored(name)]):
            _place(model, name, tensor, dtype, device, bits)
    if bits:
        model.config.quantization_bit = bits
    hf.set_generation_config(model, folder.read_object("generation_config.json"))
    return model.eval()


def check_model(folder: Folder, model: nn.Module, *, also_in: Folder | None = None, new: tuple[str, ...] = ()) -> None:
    """Compares a folder's tensors with a model's, names and shapes, before anything is read.

    Args:
        folder: The opened checkpoint.
        model: The model, best on the meta device.
        also_in: A second folder whose tensors may complete it.
        new: Beginnings of names that may be missing, because they start untrained.

    Raises:
        CheckpointError: Naming every tensor in question.
    """
    state = model.state_dict()
    elsewhere = also_in.tensors if also_in is not None else {}
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if name not in elsewhere and (name in folder.tensors or not name.startswith(new))
    }
    if folder.has("adapter_config.json"):
        raise CheckpointError(
            str(folder.path),
            ["adapter_config.json lies beside the weights, so it is open whether the adapter shall be used"],
            hint="move the adapter's files into a folder of their own and give it as adapter=",
        )
    prefixes = [name for name in folder.tensors if ".prefix_encoder." in name]
    if prefixes and len(prefixes) == len(folder.tensors):
        raise CheckpointError(
            str(folder.path),
            ["it holds a P-Tuning prefix only, not a whole model"],
            hint="glmkit.load(BASE, adapter=THIS_FOLDER)",
        )
    strange = [
        f"tensor {name} is {str(info.dtype).removeprefix('torch.')}, expected "
        + ("a floating-point type" if state[name].is_floating_point() else "int8, as config.json says quantization_bit")
        for name, info in folder.tensors.items()
        if name in state and info.dtype.is_floating_point != state[name].is_floating_point()
    ]
    try:
        check_tensors(folder, expected, ignore=_is_ignored)
    except CheckpointError as error:
        raise CheckpointError(error.folder, [*error.problems, *strange], hint=error.hint) from None
    if strange:
        hint = "a quantised checkpoint needs its quantization_bit in config.json, another one must not have it"
        raise CheckpointError(str(folder.path), strange, hint=hint)


def read_config(folder: Folder, family: Family | None = None, *, overrule: bool = False) -> ChatGLM2Config:
    """The folder's config, completed by what `family` says or the text of its old code shows.

    Args:
        folder: The opened checkpoint.
        family: What it is known to be.
        overrule: Whether `family` also replaces what the folder says of itself.

    Raises:
        ConfigError: A field is refused, or it stays open what `rope_ratio` means.
    """
    values = dict(folder.config)
    if family is not None:
        meaning = "position" if family.generation == 2 else "base"
        for field, value in (("generation", family.generation), ("rope_ratio_applies_to", meaning)):
            if overrule or values.get(field) is None:
                values[field] = value
    config: ChatGLM2Config = ChatGLM2Config.from_dict(values)
    if config.rope_ratio_applies_to is None:
        config.rope_ratio_applies_to = _rope_sign(folder)
    config.check()
    return config


def choose_device(device: str | int | torch.device) -> torch.device:
    """The device meant by "auto" or a name.

    Raises:
        UsageError: There is no such device.
    """
    if isinstance(device, torch.device):
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device={device!r} is no device", hint="auto, cpu, cuda, cuda:1, npu, mlu, mps") from error
    if chosen.type not in ("cpu", "meta") and (accelerator is None or accelerator.type != chosen.type):
        found = accelerator.type if accelerator else "no accelerator"
        raise UsageError(f"device={device!r}: this machine has {found}", hint="use device='auto' or 'cpu'")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, folder: Folder, device: torch.device) -> torch.dtype:
    """The dtype meant by "auto", None or a name; see `load`.

    Raises:
        UsageError: There is no such dtype, or it is none for weights.
    """
    if dtype is not None and dtype != "auto":
        chosen = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise UsageError(f"dtype={dtype!r}", hint="auto, float32, bfloat16 or float16")
        return chosen
    own = [info.dtype for info in folder.tensors.values() if info.dtype in _DTYPES.values()]
    stored = max(set(own), key=own.count) if own else torch.float32
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32 if folder.nbytes < _SMALL_BYTES else torch.bfloat16
    return stored


def _load_tokenizer(folder: Folder, config: ChatGLM2Config) -> ChatGLMTokenizer | None:
    """The folder's tokenizer, read before the weights because it is so much quicker; None if there is none."""
    if not (folder.path / "tokenizer.model").exists():
        logger.warning("%s has no tokenizer.model: the model is loaded without a tokenizer", folder.path)
        return None
    try:
        tokenizer = ChatGLMTokenizer.from_pretrained(str(folder.path), generation=config.generation)
    except TokenizerError as error:
        if error.hint and "generation=" in error.hint:  # what the tokenizer's own door calls it
            error.hint = "say which one it is: family='chatglm2-6b' or family='chatglm3-6b'"
        raise
    config.generation = tokenizer.generation
    return tokenizer


def _accept_synonyms(arguments: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    for name, value in others.items():
        if name in ("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "empty_init"):
            continue  # never needed here
        if name in ("load_in_4bit", "load_in_8bit", "quantization_bit"):
            bits = value if name == "quantization_bit" else (int(name[8]) if value else None)
            arguments["quantize"] = f"official-int{bits}" if bits else None
        elif name in _SYNONYMS:
            arguments[_SYNONYMS[name]] = value
        else:
            known = [*arguments, "family", "revision", "download", *_SYNONYMS]
            close = difflib.get_close_matches(name, known, n=1)
            meant = _SYNONYMS.get(close[0], close[0]) if close else None
            raise UsageError(f"load() has no argument {name!r}", hint=f"did you mean {meant}?" if meant else None)
    return arguments


def _bits(quantize: str | None) -> int | None:
    if quantize is None:
        return None
    if quantize in ("int8", "int4"):
        raise UsageError(
            f"quantize={quantize!r}: our own formats are not in this version", hint=f"use 'official-{quantize}'"
        )
    if quantize not in _QUANTIZE:
        raise UsageError(f"quantize={quantize!r}", hint="None, 'official-int8' or 'official-int4'")
    return _QUANTIZE[quantize]


def _family_argument(name: str | None) -> Family | None:
    if name is None:
        return None
    row = find_family(name)
    if row is None:
        raise UsageError(f"family={name!r} is no known model", hint="see glmkit.families.FAMILIES")
    return row


def _rope_sign(folder: Folder) -> str | None:
    """What the folder's own old code does with rope_ratio, read as text and never run."""
    code = folder.read_text("modeling_chatglm.py") or ""
    divides = "/ rope_ratio" in code or "/ self.rope_ratio" in code
    multiplies = "* rope_ratio" in code or "* self.rope_ratio" in code
    return None if divides == multiplies else "position" if divides else "base"


def _is_ignored(name: str) -> bool:
    return name.endswith("rotary_pos_emb.inv_freq")  # a constant that old checkpoints store


def _place(
    model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, bits: int | None
) -> None:
    """Puts one tensor into the model, in its final form."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if bits and leaf == "weight" and isinstance(module, nn.Linear) and is_quantised_layer(owner):
        weight, scale = quantize_rows(tensor.to(device), bits)
        model.set_submodule(owner, OfficialQuantizedLinear(weight, scale, module.bias, bits))
        return
    if isinstance(module, OfficialQuantizedLinear) and leaf == "weight_scale":
        module.scale_dtype = tensor.dtype
    elif tensor.is_floating_point():
        tensor = tensor.to(dtype)
    trained = module._parameters[leaf].requires_grad  # type: ignore[union-attr]
    module._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=trained)


def from_pretrained(
    cls: type[ChatGLM2PreTrainedModel], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """`from_pretrained` of our classes: the gate checks the folder, then transformers loads it.

    One kind of folder it does not hand over: those in the official quantised format, which transformers does not
    know. `device` and `empty_init` are accepted because the official classes take them, and `trust_remote_code` stays
    here: with it transformers would run python files that lie beside the weights.

    Raises:
        CheckpointError: Everything that is wrong with the folder.
        ConfigError: A config that asks for what is not computed.
        UsageError: Files that the gate does not know (variant, gguf_file), or a device that is not there.
    """
    for foreign in ("variant", "gguf_file"):
        if kwargs.pop(foreign, None) is not None:
            raise UsageError(f"{foreign}: only the official files are loaded", hint=f"leave out {foreign}")
    for remote in ("trust_remote_code", "code_revision"):
        kwargs.pop(remote, None)
    hub = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if kwargs.get(key) is not None}
    location = locate(pretrained_model_name_or_path, revision=kwargs.get("revision"), hub=hub)
    location = location / (kwargs.pop("subfolder", None) or "")
    kwargs.pop("empty_init", None)
    if kwargs.get("use_safetensors") is False:  # what the gate has checked must be what is loaded
        kwargs.pop("use_safetensors")
    device = kwargs.pop("device", None)
    device = None if device is None else choose_device(device)
    with open_folder(location) as folder:
        config = kwargs.pop("config", None)
        if config is None:
            config, kwargs = cls.config_class.from_dict(folder.config, return_unused_kwargs=True, **kwargs)
        if config.rope_ratio_applies_to is None:
            config.rope_ratio_applies_to = _rope_sign(folder)
        config.check()
        if config.quantization_bit:
            model = _load_quantised(folder, cls, config, kwargs)
        else:
            with torch.device("meta"):
                probe = cls(config)
            check_model(folder, probe, new=("transformer.prefix_encoder.", "classifier_head."))
            model = hf.PreTrainedModel.from_pretrained.__func__(cls, str(location), *args, config=config, **kwargs)
            if config.pre_seq_len:  # transformers' loader makes every parameter trainable
                model.transformer.freeze_all_but_prefix()
    return model if device is None else model.to(device)


def _load_quantised(
    folder: Folder, cls: type[ChatGLM2PreTrainedModel], config: ChatGLM2Config, kwargs: dict[str, Any]
) -> Any:
    """Loads a checkpoint in the official quantised format, with the arguments of transformers that matter for it."""
    if kwargs.get("attn_implementation"):
        config._attn_implementation = kwargs["attn_implementation"]
    place = kwargs.get("device_map") or "cpu"
    places = set(place.values()) if isinstance(place, dict) else {place}
    if len(places) != 1:
        raise UsageError("device_map: a quantised checkpoint goes to one device", hint='device_map="auto" or "cuda:0"')
    place = places.pop()
    target = choose_device("auto" if place in ("balanced", "balanced_low_0", "sequential") else place)
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float16
    return load_model(folder, cls, config, choose_dtype(dtype, folder, target), target)


__all__ = [
    "Loaded",
    "choose_device",
    "choose_dtype",
    "from_pretrained",
    "load",
    "load_model",
    "read_config",
]
