"""What was learnt beside a model: LoRA matrices and P-Tuning v2 prefixes, from folder to running model.

formats.py     what a folder holds, whoever wrote it, and where each of its tensors belongs
switching.py   several of them in one model, chosen for each request
"""

from __future__ import annotations

from glmkit.adapters.formats import Lora, LoraLayer, Prefix, open_adapter, read_adapter
from glmkit.adapters.switching import Adapters, ModelView, adapter_of, is_adapter_name

__all__ = [
    "Adapters",
    "Lora",
    "LoraLayer",
    "ModelView",
    "Prefix",
    "adapter_of",
    "is_adapter_name",
    "open_adapter",
    "read_adapter",
]
