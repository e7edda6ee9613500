"""Writes a model in int4 and compares: python examples/quantise.py [MODEL] [FOLDER]"""

import sys
import tempfile
from pathlib import Path

import glmkit
from glmkit.export.quantized import quantize

MODEL = sys.argv[1] if len(sys.argv) > 1 else "glm-nano"
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / "int4"
QUESTION = "What is the capital of France?"

quantize(MODEL, FOLDER, "int4")  # tensor by tensor: it never needs the memory of the whole model
for name in (MODEL, FOLDER):
    loaded = glmkit.load(name)
    megabytes = sum(tensor.nbytes for tensor in loaded.model.state_dict().values()) / 1e6
    print(f"{megabytes:6.1f} MB   {loaded.chat(QUESTION, temperature=0).text}")
