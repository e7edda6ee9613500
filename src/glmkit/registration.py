"""Where models, tokenizers and what users expect as their methods come together, and are made known to transformers.

After `import glmkit` the Auto classes find our classes for official folders, with and without `trust_remote_code`, and
no python file of a checkpoint is run.
"""

from __future__ import annotations

from typing import Any, ClassVar

from glmkit import hf, tokenizers
from glmkit.chat import official
from glmkit.models.architectures import config_class, is_native_layout
from glmkit.models.chatglm import ChatGLMForCausalLM, ChatGLMPreTrainedModel
from glmkit.models.chatglm2 import (
    ChatGLM2ForCausalLM,
    ChatGLM2ForSequenceClassification,
    ChatGLM2PreTrainedModel,
)
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.models.chatglm_config import ChatGLMConfig
from glmkit.models.checked_config import CheckedConfig
from glmkit.models.glm import GLMForConditionalGeneration, GLMForMultipleChoice, GLMForSequenceClassification
from glmkit.models.glm130b import GLM130BForCausalLM, GLM130BPreTrainedModel
from glmkit.models.glm130b_config import GLM130BConfig
from glmkit.models.glm_config import GLMConfig
from glmkit.models.glm_network import GLMModel, GLMPreTrainedModel
from glmkit.quant.linear import pack_large_model
from glmkit.quant.official import quantize_model

# Config class -> the class that writes text. Every other class of a family hangs on the Auto classes below.
LANGUAGE_MODELS: dict[type[CheckedConfig], Any] = {
    ChatGLMConfig: ChatGLMForCausalLM,
    ChatGLM2Config: ChatGLM2ForCausalLM,
    GLMConfig: GLMForConditionalGeneration,
    GLM130BConfig: GLM130BForCausalLM,
}
_BASES = (ChatGLMPreTrainedModel, ChatGLM2PreTrainedModel, GLMPreTrainedModel, GLM130BPreTrainedModel)
_registered = False


class _AnyConfig(hf.PreTrainedConfig):
    """Stands for all configs of one model_type; what it reads becomes a config of the class that the fields ask for."""

    def __new__(cls, **values: Any) -> Any:
        return cls.from_dict({"model_type": cls.model_type, **values})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the content of a config.json.

        Returns:
            One of our configs, or transformers' own GlmConfig for its own layout.

        Raises:
            ConfigError: A field is refused, or it is the config of a neighbouring model.
        """
        chosen = hf.GlmConfig if is_native_layout(config_dict) else config_class(config_dict)
        return chosen.from_dict(config_dict, **kwargs)


class _AnyChatGLM(_AnyConfig):
    model_type: ClassVar[str] = "chatglm"


class _AnyGLM(_AnyConfig):
    model_type: ClassVar[str] = "glm"


def register() -> None:
    """Makes the classes known to transformers and joins the users' methods to them. Calling it again does nothing."""
    global _registered
    if _registered:
        return
    _join_methods()
    for config in (_AnyChatGLM, _AnyGLM, GLM130BConfig):
        hf.AutoConfig.register(config.model_type, config, exist_ok=True)
    writers = (hf.AutoModel, hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM)
    for config, model in LANGUAGE_MODELS.items():
        for auto in writers:
            auto.register(config, model, exist_ok=True)
    # The official code of the original GLM maps AutoModel to the network with the logits, which is GLMModel.
    hf.AutoModel.register(GLMConfig, GLMModel, exist_ok=True)
    hf.AutoModelForMultipleChoice.register(GLMConfig, GLMForMultipleChoice, exist_ok=True)
    classifiers = hf.AutoModelForSequenceClassification
    classifiers.register(ChatGLM2Config, ChatGLM2ForSequenceClassification, exist_ok=True)
    classifiers.register(GLMConfig, GLMForSequenceClassification, exist_ok=True)
    tokenizers.register()
    _registered = True


def _join_methods() -> None:
    for config, methods in official.MODEL_METHODS.items():
        for name, method in methods.items():
            setattr(LANGUAGE_MODELS[config], name, method)
    for tokenizer, methods in official.TOKENIZER_METHODS.items():
        for name, method in methods.items():
            setattr(tokenizer, name, method)
    for base in _BASES:
        base.quantize = _quantize
        base.from_pretrained = classmethod(_from_pretrained)


def _quantize(self: Any, bits: int, quantize_embeddings: bool = False, *_: Any, **__: Any) -> Any:
    """`model.quantize(4)` or `(8)`: the official row-wise format. Further official arguments are moot."""
    first = isinstance(self, ChatGLMPreTrainedModel)  # the second argument of the later ones names a device
    quantised = quantize_model(self, bits, embeddings=bool(quantize_embeddings) if first else False)
    pack_large_model(quantised)
    if getattr(self, "glm_adapters", None) is not None:
        self.glm_adapters.attach()  # the layers are others now
    return quantised


def _from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    from glmkit.loading import from_pretrained

    return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
