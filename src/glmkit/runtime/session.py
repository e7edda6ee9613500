"""A graph that computes steps and remembers: by onnxruntime, with the past as tensors, or by openvino, with a state.

Letters: `B` rows, `T` new tokens, `S` all tokens so far, `P` prefix columns, `V` vocabulary rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glmkit.errors import MissingDependencyError, OutputError, UsageError

PREFIX_FILE = "prefix.npy"  # of P-Tuning: (past tensors, K, P, D) float32


class Session(Protocol):
    """What the decode loop needs of a graph."""

    def start(self, rows: int) -> None:
        """Forgets everything and begins with so many rows."""
        ...

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads ids (B, T) behind what was read before; returns the logits of the last column, (B, V)."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some rows, by their place."""
        ...


class OnnxSession:
    """A graph in ONNX: past in, present out. On a CPU the present is handed back as it is, without a copy.

    Args:
        path: The .onnx file.
        prefix: (past tensors, K, P, D) that every row begins with, or None.
        threads: How many compute; None: as many as onnxruntime thinks fit.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        OutputError: It cannot open the file.
    """

    def __init__(self, path: Path, prefix: NDArray[np.float32] | None = None, threads: int | None = None) -> None:
        try:
            onnxruntime: Any = import_module("onnxruntime")
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", "export") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # classes of its own for every cause
            raise OutputError(f"onnxruntime cannot open {path}: {error}", hint="export the model again") from error
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = self._session.get_inputs()[3:]
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._prefix = prefix
        self._past: list[Any] = []

    def start(self, rows: int) -> None:
        """Forgets everything and begins with so many rows."""
        empty = [
            np.zeros((rows, int(one.shape[1]), 0, int(one.shape[3])), np.float32)
            if self._prefix is None
            else np.repeat(self._prefix[number][None], rows, 0)
            for number, one in enumerate(self._inputs)
        ]
        self._past = [self._value(one) for one in empty]

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads ids (B, T) behind what was read before; returns the logits of the last column, (B, V)."""
        named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given = {name: self._value(np.ascontiguousarray(value)) for name, value in named.items()}
        given |= {one.name: value for one, value in zip(self._inputs, self._past)}
        logits, *self._past = self._session.run_with_ort_values(self._outputs, given)
        scores: NDArray[np.float32] = logits.numpy()[:, -1]
        return scores

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some rows, by their place."""
        self._past = [self._value(np.ascontiguousarray(one.numpy()[list(rows)])) for one in self._past]


class OpenVINOSession:
    """A graph in OpenVINO's IR with the past as its state.

    Args:
        path: The .xml file.
        threads: How many compute; None: as many as openvino thinks fit.

    Raises:
        MissingDependencyError: openvino is not installed.
        OutputError: It cannot open the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino = load_openvino()
        # Otherwise a CPU takes bfloat16 where it has it, a cache of int8, and int8 inputs for quantised weights.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise OutputError(f"openvino cannot open {path}: {error}", hint="export the model again") from error
        self._request = compiled.create_infer_request()
        self._names = {name for one in compiled.inputs for name in one.get_names()}
        self._rows = np.zeros(0, np.int32)

    def start(self, rows: int) -> None:
        """Forgets everything and begins with so many rows."""
        self._request.reset_state()
        self._rows = np.arange(rows, dtype=np.int32)

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads ids (B, T) behind what was read before; returns the logits of the last column, (B, V)."""
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given["beam_idx"] = self._rows  # which rows of the state belong to those of this step
        self._request.infer({name: np.ascontiguousarray(one) for name, one in given.items() if name in self._names})
        self._rows = np.arange(len(ids), dtype=np.int32)
        scores: NDArray[np.float32] = self._request.get_tensor("logits").data[:, -1].copy()
        return scores

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some rows, by their place."""
        self._rows = self._rows[list(rows)]


def load_openvino() -> Any:
    """Imports openvino without the package that tells its makers of each use.

    Returns:
        The module.

    Raises:
        MissingDependencyError: openvino is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module("openvino")
    except ImportError as error:
        raise MissingDependencyError("openvino", "export") from error


def open_session(folder: Path, graph: dict[str, Any], threads: int | None = None) -> Session:
    """Opens the graph of an exported folder.

    Args:
        folder: The folder.
        graph: What runtime.json says: `engine`, "onnx" or "openvino", and `file`.
        threads: How many compute; None: as many as the engine thinks fit.

    Raises:
        UsageError: There is no such engine, or no thread to compute.
        MissingDependencyError: It is not installed.
        OutputError: It cannot open the file.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads}: expected at least 1")
    path = folder / graph["file"]
    if graph["engine"] == "openvino":
        return OpenVINOSession(path, threads)
    if graph["engine"] != "onnx":
        raise UsageError(f"there is no engine {graph['engine']!r:.80}; expected onnx or openvino")
    prefix = folder / "runtime" / PREFIX_FILE
    return OnnxSession(path, np.load(prefix, allow_pickle=False) if prefix.is_file() else None, threads)
