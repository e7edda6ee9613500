"""README.md beside a result: what it is, what it comes from, how good it is, and how to load it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from glmkit.families import find_family
from glmkit.train.arguments import RunRecipe

_MEASURED = ("eval_loss", "bleu", "rouge", "accuracy")


def card(recipe: RunRecipe, method: str, metrics: Sequence[Mapping[str, Any]], folder_name: str) -> str:
    """Describe a result in the form that hubs read.

    Args:
        recipe: What was asked for.
        method: What learnt, in words.
        metrics: Lines of metrics.jsonl.
        folder_name: "adapter" or "model".

    Returns:
        The text of README.md.
    """
    settings = recipe.model_dump(mode="json")
    path = settings["model"].get("path")
    # A path of this machine says nothing to others; a name or hub id does.
    base = path if path and not Path(path).is_absolute() and not Path(path).exists() else Path(path or "").name
    family = find_family(base) if base else None
    last: dict[str, float] = {}
    for line in metrics:
        last |= {key: value for key, value in line.items() if key.startswith(_MEASURED)}
    head: dict[str, Any] = {"language": ["zh", "en"], "pipeline_tag": "text-generation", "tags": ["glmkit", "glm"]}
    if base:
        head["base_model"] = family.hub_id if family and family.hub_id else base
        head["base_model_relation"] = "adapter" if folder_name == "adapter" else "finetune"
    if settings["method"]["name"] == "lora":
        head["library_name"] = "peft"
    if last:
        results = [{"type": name, "name": name, "value": round(value, 6)} for name, value in last.items()]
        task = {"type": "text-generation"}
        data = {"name": Path(str(settings.get("data", {}).get("eval_file"))).name, "type": "custom"}
        head["model-index"] = [{"name": folder_name, "results": [{"task": task, "dataset": data, "metrics": results}]}]
    written = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in last.items()) or "| nothing was measured | |"
    loading = (
        f'glmkit.load("{base}", adapter="this folder")' if folder_name == "adapter" else 'glmkit.load("this folder")'
    )
    licence = f"\nThe base model's licence holds for it too: {family.licence}.\n" if family else ""
    train = settings["train"]
    return f"""---
{written}---

# {"Adapter for " + (base or "a GLM model") if folder_name == "adapter" else "A tuned " + (base or "GLM model")}

{method}. Trained by glmkit {importlib.metadata.version("glmkit")}: learning rate {train["learning_rate"]:g},
{train["lr_scheduler_type"]}, seed {train["seed"]}. All settings are in config.resolved.yaml of the run's folder.
{licence}
```python
import glmkit

glm = glmkit.load{loading.removeprefix("glmkit.load")}
print(glm.chat("你好").text)
```

| measured on held-out records | |
|---|---|
{measured}
"""
