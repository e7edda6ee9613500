"""Measures answers against labels as ChatGLM's scripts do: python examples/evaluate.py [RECORDS] [MODEL] [FOLDER]"""

import sys
import tempfile

import glmkit
from glmkit.data.records import read_records
from glmkit.engine.sampling import SamplingOptions
from glmkit.evaluate.adgen import evaluate_adgen
from glmkit.location import builtin

RECORDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
MODEL = sys.argv[2] if len(sys.argv) > 2 else "glm-nano"
FOLDER = sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp()

model, tokenizer = glmkit.load(MODEL)
scores = evaluate_adgen(
    model,
    tokenizer,
    read_records(builtin("data") / "style_dev.jsonl"),
    options=SamplingOptions(temperature=0),
    limit=RECORDS,
    output_dir=FOLDER,
)
for name in ("predict_rouge-1", "predict_rouge-2", "predict_rouge-l", "predict_bleu-4"):
    print(f"{name:<16} {scores[name]:6.2f}")
print("answers beside labels:", f"{FOLDER}/generated_predictions.txt")
