"""Writes a model for onnxruntime and runs it there without torch: python examples/export_and_run.py [MODEL] [FOLDER]"""

import subprocess
import sys
import tempfile
from pathlib import Path

from glmkit.export.onnx import export

MODEL = sys.argv[1] if len(sys.argv) > 1 else "glm-nano"
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / "onnx"
RUN = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # they are not there, as far as this process knows
import glmkit.runtime
for piece in glmkit.runtime.load(sys.argv[1]).answer("What is the capital of France?", temperature=0):
    print(piece, end="", flush=True)
"""

export(MODEL, FOLDER)
print("size:", sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) // 10**6, "MB")
print(subprocess.run([sys.executable, "-c", RUN, FOLDER], check=True, capture_output=True, text=True).stdout.strip())
