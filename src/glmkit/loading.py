"""From a name or folder to a model that is ready to use: the only loader.

The gate (`checkpoint.open_folder`) has checked every file before anything is allocated; the config says which network
it is; `weights.load_model` fills it.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmkit import hf
from glmkit.adapters import Adapters, Lora, Prefix, is_adapter_name, open_adapter, read_adapter
from glmkit.checkpoint import Folder, open_folder
from glmkit.devices import accelerators, choose_device
from glmkit.errors import ConfigError, TokenizerError, UsageError
from glmkit.families import Family, find_family
from glmkit.location import locate
from glmkit.models.architectures import CONFIGS, config_class
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.quant.bitsandbytes import BITS, bitsandbytes
from glmkit.quant.linear import pack_large_model, pack_model
from glmkit.quant.schemes import scheme_of
from glmkit.registration import LANGUAGE_MODELS, register
from glmkit.runtime.exported import refuse
from glmkit.shards import is_model_parallel, open_model_parallel
from glmkit.tokenizers import has_tokenizer, load_tokenizer
from glmkit.weights import Devices, check_model, load_model, read_generation

logger = logging.getLogger("glmkit")

_QUANTIZE: dict[str, int | str] = {
    "int8": "int8",
    "int4": "int4",
    "official-int8": 8,
    "official-int4": 4,
    "bnb-int8": "bnb-int8",
    "bnb-nf4": "bnb-nf4",
}
KERNELS = ("auto", "native", "torch")
"""What `load` takes for kernels."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "half": torch.float16}
# What a class adds to a released checkpoint, to be trained: prefix encoder and classification heads.
_UNTRAINED = ("transformer.prefix_encoder.", "glm.prefix_encoder.", "classifier_head.", "dense.", "out_proj.")
_GLM130B_TOKENS = {
    "mask_token_id": "[MASK]",
    "gmask_token_id": "[gMASK]",
    "smask_token_id": "[sMASK]",
    "bos_token_id": "sop",
}
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
        adapter: The adapter's folder, if any; of several their names and folders.
        adapters: The adapters in the model, and which of them is active; None without any.
    """

    model: Any
    tokenizer: Any | None
    family: Family | None
    config: CheckedConfig
    path: Path
    adapter: Path | dict[str, Path] | None = None
    adapters: Adapters | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def chat(self, messages: Any, **options: Any) -> Any:
        """Answers a question or a list of messages; see `glmkit.chat.conversation.reply_to`.

        Args:
            messages: The question or messages.
            **options: How to answer; and `adapter`, the name of one for this answer, None for the base.
        """
        from glmkit.chat.conversation import reply_to

        return reply_to(self._asked(options), self._tokenizer(), messages, **options)

    def stream(self, messages: Any, **options: Any) -> Any:
        """Like `chat`, piece by piece; see `glmkit.chat.conversation.stream_reply`."""
        from glmkit.chat.conversation import stream_reply

        return stream_reply(self._asked(options), self._tokenizer(), messages, **options)

    def use(self, adapter: str | None) -> None:
        """Chooses the adapter of everything that does not name one, `model.chat` and `model.generate` among them.

        Args:
            adapter: Its name; None for the base.

        Raises:
            UsageError: There is no such adapter.
        """
        if adapter is not None or self.adapters is not None:
            self._with_adapters().choose(adapter)

    def with_adapter(self, adapter: str | None) -> Any:
        """The model as it is with one adapter, for `stream_reply` and the engine.

        Args:
            adapter: Its name; None for the base.

        Raises:
            UsageError: There is no such adapter.
        """
        if adapter is None and self.adapters is None:
            return self.model
        return self._with_adapters().view(adapter)

    def _asked(self, options: dict[str, Any]) -> Any:
        """The model for one answer, which keeps its adapter even if another is chosen while it is written."""
        chosen = None if self.adapters is None else self.adapters.current
        return self.with_adapter(options.pop("adapter", chosen))

    def _with_adapters(self) -> Adapters:
        if self.adapters is None:
            raise UsageError(
                "this model was loaded without adapters",
                hint='glm chat BASE --adapter NAME=FOLDER; in Python glmkit.load(BASE, adapter={"NAME": FOLDER})',
            )
        return self.adapters

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError(
                f"{self.path} has no tokenizer, so text cannot be read or written",
                hint="copy the tokenizer's files from the checkpoint's original repository",
            )
        return self.tokenizer


def load(
    path: str | Path,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    dtype: str | torch.dtype = "auto",
    device: Any = "auto",
    quantize: str | None = None,
    *,
    kernels: str = "auto",
    config: Mapping[str, Any] | None = None,
    adapter_config: Mapping[str, Any] | None = None,
    family: str | None = None,
    revision: str | None = None,
    download: bool = False,
    **others: Any,
) -> Loaded:
    """Loads a model and its tokenizer.

    Args:
        path: A folder, a family name ("chatglm3-6b", looked up under GLMKIT_MODELS and in the hub cache), or a hub id.
        adapter: A LoRA folder (PEFT, ChatGLM-Tuning) or a P-Tuning v2 checkpoint; which one it is, and its sizes, are
            read from it. Several by name, {"ads": folder, "poet": folder}, to be chosen for each request; the first
            is active until `use` or a request names another.
        dtype: "auto", "float32", "bfloat16", "float16" or a torch dtype. "auto" is the checkpoint's own; on a CPU
            float16, which CPUs compute slowly, becomes float32 below 1 GB of weights and bfloat16 above.
        device: "auto" (the accelerator if there is one, else the CPU), "cpu", "cuda:1", "npu" …; several devices
            (["cuda:0", "cuda:1"]), "balanced" for all accelerators, or a table of modules to devices: whole blocks on
            each.
        quantize: None; "int8" or "int4", our formats with searched scales; "official-int8" or "official-int4",
            row-wise; "bnb-int8" or "bnb-nf4" of bitsandbytes, if it is installed. Done while loading.
        kernels: What multiplies quantised weights on a CPU. "auto": native code, where there is any and the model
            computes in 16 bit; it rounds activations to int8 in groups of 32, so that float32, which means exact, stays
            with torch, but for our formats without a dtype. "native": also in float32. "torch": never, as training
            wants it.
        config: Fields of config.json that the folder does not have. The original model-parallel checkpoints have none
            and do not say the number of heads, which is known for released sizes only: {"num_attention_heads": 16}.
        adapter_config: Fields of adapter_config.json that an adapter's folder does not have: {"lora_alpha": 16}.
        family: Overrules the folder's own signs, e.g. "chatglm2-6b-32k" for a folder that does not say what it is.
        revision: Branch, tag or commit if the model comes from the hub.
        download: Whether a bare family name may be fetched.
        **others: Names of these arguments from other tools (torch_dtype, adapter_path, load_in_4bit …).

    Returns:
        A `Loaded`.

    Raises:
        UsageError: An unknown name or argument, or kernels="native" where there are none.
        CheckpointError: A damaged or foreign folder, with everything that is wrong with it.
        ConfigError: A config that asks for what is not computed.
    """
    arguments = _accept_synonyms({"adapter": adapter, "dtype": dtype, "device": device, "quantize": quantize}, others)
    adapter, dtype, device, quantize = (arguments[name] for name in ("adapter", "dtype", "device", "quantize"))
    if kernels not in KERNELS:
        raise UsageError(f"kernels={kernels!r}", hint=", ".join(KERNELS))
    register()
    row = choose_family(path, family)
    location = locate(path, download=download, revision=revision)
    bits = _bits(quantize)
    with ExitStack() as opened:
        folder = opened.enter_context(open_model(location, config))
        checked = read_config(folder, row, overrule=family is not None)
        row = row or find_family(str(folder.config.get("_name_or_path", "")))
        checked._name_or_path = str(location)  # where PEFT and others look for the base, as after from_pretrained
        paths = name_adapters(adapter)
        extras = {name: opened.enter_context(open_adapter(path, adapter_config)) for name, path in paths.items()}
        learnt = _read_adapters(extras, LANGUAGE_MODELS[type(checked)], checked, folder)
        target = choose_devices(device)
        tokenizer = read_tokenizer(folder, checked)
        model = load_model(
            folder,
            LANGUAGE_MODELS[type(checked)],
            checked,
            choose_dtype(dtype, folder, _first(target)),
            target,
            quantize=bits,
        )
        # Who names float32 wants exact products; who names no dtype wants what is fast, and our formats round more.
        pack_model(model, kernels, any_dtype=dtype == "auto" and scheme_of(model.config) is not None)
        own = Adapters(model) if paths else None
        if own is not None:
            for name, one in learnt.items():
                own.add(name, one)
            own.choose(own.names[0])
    given = paths if isinstance(adapter, Mapping) else next(iter(paths.values()), None)
    return Loaded(model, tokenizer, row, model.config, location, given, own)


def name_adapters(adapter: str | Path | Mapping[str, str | Path] | None) -> dict[str, Path]:
    """Names and folders of the adapters that were asked for.

    Args:
        adapter: See `load`; a single folder is called by its own name.
    """
    if adapter is None:
        return {}
    if isinstance(adapter, Mapping):
        if not adapter:
            raise UsageError("adapter={} names no adapter", hint="leave it out, or give {name: folder}")
        return {name: Path(folder).expanduser() for name, folder in adapter.items()}
    path = Path(adapter).expanduser()
    name = re.sub(r"\s", "-", path.absolute().name)
    return {name if is_adapter_name(name) else "adapter": path}


def _read_adapters(
    opened: Mapping[str, Folder], cls: Any, config: CheckedConfig, base: Folder
) -> dict[str, Lora | Prefix]:
    """Finds out what the folders hold, and whether it fits, before the first weight is read."""
    if not opened:
        return {}
    with torch.device("meta"):
        model = cls(config)
    return {name: read_adapter(folder, model, base) for name, folder in opened.items()}


def open_model(location: Path, config: Mapping[str, Any] | None = None) -> Folder:
    """Opens a model's folder: one with a config.json, or one of the original model-parallel shards.

    Args:
        location: The folder.
        config: Fields that complete its config.json.

    Raises:
        UsageError: It is an exported model.
        CheckpointError: Everything that is wrong with it.
    """
    if is_model_parallel(location):
        return open_model_parallel(location, config=config)
    refuse(location)
    folder = open_folder(location)
    folder.config = {**folder.config, **(config or {})}
    return folder


def read_config(folder: Folder, family: Family | None = None, *, overrule: bool = False) -> CheckedConfig:
    """The folder's config, completed by what `family` says or the text of its old code shows.

    Args:
        folder: The opened checkpoint.
        family: What it is known to be.
        overrule: Whether `family` also replaces what the folder says of itself.

    Raises:
        ConfigError: A field is refused, or it stays open what `rope_ratio` means.
    """
    values = dict(folder.config)
    chosen = config_class(values)
    if family is not None and CONFIGS[family.architecture] is not chosen:
        raise ConfigError(
            f"{folder.path} holds the network of {chosen.__name__.removesuffix('Config')}, not of {family.name}",
            hint="leave out family=, or give the folder that belongs to it",
        )
    if family is not None and chosen is ChatGLM2Config:
        meaning = "position" if family.generation == 2 else "base"
        for field, value in (("generation", family.generation), ("rope_ratio_applies_to", meaning)):
            if overrule or values.get(field) is None:
                values[field] = value
    config: CheckedConfig = chosen.from_dict(values)
    _decide_rope(config, folder)
    config.check()
    scheme_of(config)  # refuses formats that are not read
    return config


def _decide_rope(config: CheckedConfig, folder: Folder) -> None:
    """ChatGLM2 and later: what the folder's own old code does with rope_ratio, read as text and never run."""
    if not isinstance(config, ChatGLM2Config) or config.rope_ratio_applies_to is not None:
        return
    code = folder.read_text("modeling_chatglm.py") or ""
    divides = "/ rope_ratio" in code or "/ self.rope_ratio" in code
    multiplies = "* rope_ratio" in code or "* self.rope_ratio" in code
    config.rope_ratio_applies_to = None if divides == multiplies else "position" if divides else "base"


def choose_devices(device: Any) -> torch.device | Devices:
    """One device, or what `weights.load_model` takes for several.

    Args:
        device: See `load`. transformers' words for several devices ("balanced", "sequential") mean all accelerators.

    Raises:
        UsageError: There is no such device.
    """
    if isinstance(device, (Mapping, list, tuple)) and not device:
        raise UsageError(f"device={device!r} names no device", hint="auto, cpu, cuda:0, or several of them")
    if isinstance(device, Mapping):
        places = {name: choose_device(place) for name, place in device.items()}
        return next(iter(places.values())) if len(set(places.values())) == 1 else places
    if isinstance(device, (list, tuple)):
        return [choose_device(place) for place in device] if len(device) > 1 else choose_device(*device)
    if device in ("balanced", "balanced_low_0", "sequential"):
        return "auto" if len(accelerators()) > 1 else choose_device("auto")
    return choose_device(device)


def _first(device: torch.device | Devices) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if isinstance(device, str):
        return choose_device("auto")
    return torch.device(next(iter(device.values() if isinstance(device, Mapping) else device)))


def choose_dtype(dtype: str | torch.dtype | None, folder: Folder, device: torch.device) -> torch.dtype:
    """The dtype meant by "auto", None or a name; see `load`.

    Args:
        dtype: "auto" or None for the checkpoint's own, else a name or a torch dtype.
        folder: The opened checkpoint.
        device: Where the model computes: a CPU computes float16 slowly.

    Returns:
        The dtype of the weights.

    Raises:
        UsageError: There is no such dtype, or it is none for weights.
    """
    if dtype is not None and dtype != "auto":
        chosen = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise UsageError(f"dtype={dtype!r}", hint="auto, float32, bfloat16 or float16")
        return chosen
    own = [
        info.dtype
        for name, info in folder.tensors.items()
        if info.dtype in _DTYPES.values() and not name.endswith(".weight_scale")  # ours are always float16
    ]
    stored = max(set(own), key=own.count) if own else torch.float32
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32 if folder.nbytes < _SMALL_BYTES else torch.bfloat16
    return stored


def read_tokenizer(folder: Folder, config: CheckedConfig) -> Any:
    """The folder's tokenizer, read before the weights because it is so much quicker.

    Args:
        folder: The opened checkpoint.
        config: Its config, which learns from the tokenizer what it does not say itself: generation, control tokens.

    Returns:
        The tokenizer, None if the folder has none.

    Raises:
        TokenizerError: It is damaged, or it cannot be told which it is.
        ConfigError: GLM-130B: config and tokenizer have different vocabularies.
    """
    if not has_tokenizer(folder.path):
        logger.warning("%s has no tokenizer: the model is loaded without one", folder.path)
        return None
    try:
        tokenizer = load_tokenizer(folder.path, config)
    except TokenizerError as error:
        if error.hint and "generation=" in error.hint:  # what the tokenizer's own door calls it
            error.hint = "say which one it is: family='chatglm2-6b' or family='chatglm3-6b'"
        raise
    if isinstance(config, ChatGLM2Config):
        config.generation = tokenizer.generation
    if isinstance(config, GLMConfig):  # the official config names no token
        config.sop_token_id, config.mask_token_ids = tokenizer.sop_token_id, list(tokenizer.mask_token_ids)
    if isinstance(config, GLM130BConfig):
        _take_token_ids(config, folder, tokenizer)
    return tokenizer


def _take_token_ids(config: GLM130BConfig, folder: Folder, tokenizer: Any) -> None:
    """GLM-130B: the release has no config.json to name its control tokens; where there is one, it must agree."""
    ids = {field: tokenizer.get_command(command) for field, command in _GLM130B_TOKENS.items()}
    ends = [tokenizer.get_command("eop"), tokenizer.get_command("eos")]
    said = folder.read_object("config.json") or {}
    wrong = [
        f"{field} is {said[field]}, not {token}" for field, token in ids.items() if said.get(field, token) != token
    ]
    if wrong:
        raise ConfigError(
            f"{folder.path}: config.json and tokenizer have different vocabularies: " + "; ".join(wrong),
            hint="check that all files of the folder belong to one release",
        )
    for field, value in {**ids, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}.items():
        if field not in said:
            setattr(config, field, value)


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
            known = [*arguments, "config", "adapter_config", "family", "revision", "download", *_SYNONYMS]
            close = difflib.get_close_matches(name, known, n=1)
            meant = _SYNONYMS.get(close[0], close[0]) if close else None
            raise UsageError(f"load() has no argument {name!r}", hint=f"did you mean {meant}?" if meant else None)
    return arguments


def _bits(quantize: str | None) -> int | str | None:
    if quantize is None:
        return None
    if quantize not in _QUANTIZE:
        raise UsageError(f"quantize={quantize!r}", hint=f"None, {', '.join(_QUANTIZE)}")
    if quantize in BITS:
        bitsandbytes()  # whether it is there should not cost minutes of loading
    return _QUANTIZE[quantize]


def choose_family(path: str | Path, family: str | None = None) -> Family | None:
    """The released model that a name means; a folder is what it says inside, whatever it is called.

    Args:
        path: A folder or name.
        family: A name that overrules it.

    Returns:
        Its row, None for a folder or a name of no known model.

    Raises:
        UsageError: `family` is no known model.
    """
    if family is None:
        return None if Path(path).expanduser().is_dir() else find_family(str(path))
    row = find_family(family)
    if row is None:
        raise UsageError(f"family={family!r} is no known model", hint="see glmkit.families.FAMILIES")
    return row


def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` of our classes: the gate checks the folder, then transformers loads it.

    Quantised folders, in the official format or ours, it does not hand over, because transformers does not know them.
    `device` and `empty_init` are accepted because the official classes take them, and `trust_remote_code` stays
    here: with it transformers would run python files that lie beside the weights.

    Args:
        cls: The class to make; the folder's config must be for it.
        pretrained_model_name_or_path: A folder, a hub id, or the name of a family that is on this machine.
        *args: As in transformers.
        **kwargs: As in transformers; fields of the config too.

    Returns:
        The model.

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
            chosen = config_class(folder.config)
            if chosen is not cls.config_class:
                raise ConfigError(
                    f"{location} has a config for {chosen.__name__}, not for {cls.__name__}",
                    hint="glmkit.load, or transformers' Auto classes, choose the class themselves",
                )
            config, kwargs = chosen.from_dict(folder.config, return_unused_kwargs=True, **kwargs)
        _decide_rope(config, folder)
        config.check()
        if getattr(config, "quantization_bit", 0) or scheme_of(config) is not None:
            model = _load_quantised(folder, cls, config, kwargs)
        else:
            with torch.device("meta"):
                probe = cls(config)
            check_model(folder, probe, new=_UNTRAINED)
            read_generation(folder)
            model = hf.PreTrainedModel.from_pretrained.__func__(cls, str(location), *args, config=config, **kwargs)
            if getattr(config, "pre_seq_len", None):  # transformers' loader makes every parameter trainable
                model.base_model.freeze_all_but_prefix()
    return model if device is None else model.to(device)


def _load_quantised(folder: Folder, cls: Any, config: CheckedConfig, kwargs: dict[str, Any]) -> Any:
    """Loads a checkpoint in a format of quant/, with the arguments of transformers that matter for it."""
    if kwargs.get("quantization_config") is not None:
        raise UsageError(
            "the checkpoint is already quantised to "
            + getattr(scheme_of(config), "name", f"{config.quantization_bit} bits"),
            hint="leave out quantization_config, or load the unquantised checkpoint",
        )
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
    model = load_model(folder, cls, config, choose_dtype(dtype, folder, target), target)
    pack_large_model(model)
    return model


__all__ = [
    "Loaded",
    "choose_devices",
    "choose_dtype",
    "choose_family",
    "from_pretrained",
    "load",
    "name_adapters",
    "open_model",
    "read_config",
    "read_tokenizer",
]
