"""Tunes a model with LoRA and talks to the result: python examples/finetune_lora.py [FOLDER] [STEPS]

The recipe is that of `glm quickstart`, glm-nano and 240 records of the package, for fewer steps. For your own model and
data change the three overrides: model.path=chatglm3-6b data.train_file=train.jsonl output.dir=out.
"""

import sys
import tempfile

import glmkit
from glmkit.location import builtin
from glmkit.train.run import finetune

FOLDER = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp() + "/lora"
STEPS = sys.argv[2] if len(sys.argv) > 2 else "60"
QUESTION = "类型#裙*颜色#蓝色*风格#清新*材质#雪纺*裙长#长裙"

print("before:", glmkit.load("glm-nano").chat(QUESTION, temperature=0).text)
data = builtin("data") / "style_train.jsonl"
result = finetune(
    "quickstart",
    [f"data.train_file={data}", f"output.dir={FOLDER}", f"train.max_steps={STEPS}"],
)
print(f"{result.steps} steps, loss {result.loss:.2f}; loss curve and report in {result.output_dir}")
print("after:", glmkit.load("glm-nano", adapter=result.result_dir).chat(QUESTION, temperature=0).text)
