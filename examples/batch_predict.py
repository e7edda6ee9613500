"""Answers a file of questions, many at once: python examples/batch_predict.py [QUESTIONS] [ANSWERS] [MODEL]

What was cut, by Ctrl-C or by a power failure, goes on where it stopped when it is called again.
"""

import json
import sys
import tempfile
from pathlib import Path

import glmkit
from glmkit.evaluate.predict import predict
from glmkit.evaluate.tasks import Settings

folder = Path(tempfile.mkdtemp())
QUESTIONS = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "questions.jsonl"
ANSWERS = Path(sys.argv[2]) if len(sys.argv) > 2 else folder / "answers.jsonl"
MODEL = sys.argv[3] if len(sys.argv) > 3 else "glm-nano"
if len(sys.argv) < 2:
    asked = ("What is the capital of France?", "What is the capital of Italy?", "7加8等于多少？")
    QUESTIONS.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked), encoding="utf-8")

done = predict(glmkit.load(MODEL), QUESTIONS, ANSWERS, Settings(batch_size=16, max_new_tokens=64))
for line in ANSWERS.read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    print(row["prompt"], "->", row["predict"])
print(done.answered, "answers in", ANSWERS)
