"""A traced step as a graph in ONNX whose constants lie in a file beside it, written one after the other.

    weight          in the graph                                       stored
    float           MatMul, Gather, Mul                                float32, matrices transposed for MatMul
    int8, int4      MatMulNBits of onnxruntime, which unpacks blocks   uint8 (rows, blocks, bytes), float32 scales
    int8 table      Gather, then (code - 128) * scale                  the same tensor as the output layer's, if tied

Letters: `N` rows of a weight, its outputs; `K` columns.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmkit.errors import MissingDependencyError, OutputError
from glmkit.export.constants import Packed
from glmkit.export.graph import Traced
from glmkit.quant.linear import unpack_nibbles

_DOMAIN = "com.microsoft"
_ROW_BLOCK = 128  # columns of a block where a whole row shares a scale
_ALIGNED_BYTES = 4096  # so that the file can be mapped into memory
_EXACT = 1  # accuracy level of MatMulNBits: inputs stay float32


def import_onnx() -> Any:
    """Imports what makes graphs in ONNX.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it, and says so late
    except ImportError as error:
        raise MissingDependencyError("onnx", "export") from error
    return onnx


def draw(traced: Traced) -> Any:
    """Turns a traced step into a model in ONNX with our names.

    Args:
        traced: The step.

    Returns:
        An `onnx.ModelProto` whose weights are inputs still.
    """
    import_onnx()
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        logger.setLevel(logging.ERROR)  # that torchvision is not installed
        try:
            program = torch.onnx.export(traced.program, (), dynamo=True, verbose=False)
        finally:
            logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    graph = model.graph
    old = [one.name for one in (*graph.input, *graph.output)]
    new = [*traced.input_names, *traced.output_names]
    names = dict(zip(old, new, strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.ClearField("metadata_props")  # where in our sources it comes from: paths of this machine
        node.ClearField("doc_string")
    for one in (model, graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        one.ClearField("metadata_props")
    return model


@dataclass
class Constants:
    """Puts weights into a model in ONNX.

    Args:
        model: From `draw`.
        file: Where their numbers go, opened for writing.
        location: Its name.

    Attributes:
        users: Name of a value -> the nodes that take it.
    """

    model: Any
    file: BinaryIO
    location: str
    users: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def put(self, name: str, weight: Tensor | Packed) -> None:
        """Makes an input a constant.

        Args:
            name: The input.
            weight: Its numbers.

        Raises:
            OutputError: A quantised weight is used for something else than products and rows.
        """
        place = next(at for at, one in enumerate(self.model.graph.input) if one.name == name)
        del self.model.graph.input[place]
        if isinstance(weight, Packed):
            self._put_packed(name, weight)
        else:
            self._put_float(name, weight)

    def finish(self) -> None:
        """Brings the nodes that were added into an order in which each comes after what it needs."""
        graph = self.model.graph
        known = {one.name for one in (*graph.input, *graph.initializer)} | {""}
        waiting, ordered = list(graph.node), []
        while waiting:
            ready = [node for node in waiting if known.issuperset(node.input)]
            if not ready:
                raise OutputError(f"the graph has nodes that never run, such as {waiting[0].op_type}")
            known.update(name for node in ready for name in node.output)
            ordered += ready
            done = {id(node) for node in ready}
            waiting = [node for node in waiting if id(node) not in done]
        copies = [type(node).FromString(node.SerializeToString()) for node in ordered]
        del graph.node[:]
        graph.node.extend(copies)
        self.model.opset_import.add(domain=_DOMAIN, version=1)

    def _put_float(self, name: str, weight: Tensor) -> None:
        users = self.users[name]
        numbers = weight.float().numpy()
        if all(node.op_type == "Transpose" for node in users):
            numbers = np.ascontiguousarray(numbers.T)
            for node in users:
                self._replace(node.output[0], name)
                self._remove(node)
        self._store(name, numbers)

    def _put_packed(self, name: str, weight: Packed) -> None:
        block, rows, columns = _block_columns(weight), len(weight.weight), weight.weight.shape[1] * 8 // weight.bits
        codes, scales = _in_blocks(weight, block)
        self._store(name, codes)
        self._store(f"{name}_scale", scales)
        for node in list(self.users[name]):
            if node.op_type == "Gather" and weight.bits == 8:
                self._gather(name, node, columns, block)
            elif node.op_type == "Transpose":
                for product in list(self.users[node.output[0]]):
                    self._multiply(name, product, weight.bits, rows, columns, block)
                self._remove(node)
            else:
                raise OutputError(f"{name} is quantised and used by {node.op_type}; expected products and rows")

    def _multiply(self, name: str, product: Any, bits: int, rows: int, columns: int, block: int) -> None:
        if product.op_type != "MatMul":
            raise OutputError(f"{name} is quantised and used by {product.op_type}; expected a product")
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": _EXACT}
        inputs = [product.input[0], name, f"{name}_scale"]
        self._add("MatMulNBits", inputs, product.output[0], domain=_DOMAIN, **attributes)
        self._remove(product)

    def _gather(self, name: str, node: Any, columns: int, block: int) -> None:
        ids, out = node.input[1], node.output[0]
        self._remove(node)
        self._add("Gather", [name, ids], f"{out}/codes", axis=0)
        self._add("Gather", [f"{name}_scale", ids], f"{out}/scale", axis=0)
        self._add("Cast", [f"{out}/codes"], f"{out}/numbers", to=import_onnx().TensorProto.FLOAT)
        self._small(f"{out}/zero", np.float32(128))
        self._small(f"{out}/last", np.array([-1], np.int64))
        self._small(f"{out}/shape", np.array([0, 0, -1], np.int64))
        self._small(f"{out}/columns", np.array([columns], np.int64))
        self._small(f"{out}/start", np.array([0], np.int64))
        self._add("Sub", [f"{out}/numbers", f"{out}/zero"], f"{out}/signed")
        self._add("Unsqueeze", [f"{out}/scale", f"{out}/last"], f"{out}/scales")
        self._add("Mul", [f"{out}/signed", f"{out}/scales"], f"{out}/blocks")
        self._add("Reshape", [f"{out}/blocks", f"{out}/shape"], f"{out}/padded")
        self._add("Slice", [f"{out}/padded", f"{out}/start", f"{out}/columns", f"{out}/last"], out)

    def _add(self, kind: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> None:
        node = import_onnx().helper.make_node(kind, inputs, [output], domain=domain or None, **attributes)
        self.model.graph.node.append(node)

    def _remove(self, node: Any) -> None:
        nodes = self.model.graph.node
        del nodes[next(at for at, one in enumerate(nodes) if one.output[:] == node.output[:])]

    def _replace(self, old: str, new: str) -> None:
        for node in self.users.get(old, []):
            node.input[:] = [new if name == old else name for name in node.input]

    def _small(self, name: str, numbers: NDArray[Any] | np.float32) -> None:
        self.model.graph.initializer.append(import_onnx().numpy_helper.from_array(np.asarray(numbers), name))

    def _store(self, name: str, numbers: NDArray[Any]) -> None:
        onnx = import_onnx()
        self.file.write(b"\0" * (-self.file.tell() % _ALIGNED_BYTES))
        offset = self.file.tell()
        self.file.write(np.ascontiguousarray(numbers).data)
        tensor = onnx.TensorProto(name=name, dims=numbers.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(numbers.dtype)
        for key, value in (("location", self.location), ("offset", offset), ("length", numbers.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.model.graph.initializer.append(tensor)


def _block_columns(weight: Packed) -> int:
    """How many columns share a scale in the graph."""
    if weight.scale.ndim == 1:
        return _ROW_BLOCK
    return weight.weight.shape[1] * 8 // weight.bits // weight.scale.shape[1]


def _in_blocks(weight: Packed, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (N, blocks, bytes of a block) and scales (N, blocks), as MatMulNBits takes them."""
    rows = len(weight.weight)
    columns = weight.weight.shape[1] * 8 // weight.bits
    blocks = -(-columns // block)
    middle = 1 << (weight.bits - 1)
    codes = np.full((rows, blocks * block), middle, np.uint8)
    for start, part in _row_parts(weight):
        codes[start : start + len(part), :columns] = (part.to(torch.int16) + middle).to(torch.uint8).numpy()
    if weight.bits == 4:  # the even column in the low half of a byte
        codes = np.bitwise_or(codes[:, 0::2], np.left_shift(codes[:, 1::2], 4))
    scale = weight.scale.float()
    scales = scale[:, None].expand(rows, blocks) if scale.ndim == 1 else scale
    return codes.reshape(rows, blocks, -1), np.ascontiguousarray(scales.numpy())


def _row_parts(weight: Packed) -> Iterator[tuple[int, Tensor]]:
    """The codes of some rows at a time, -8 to 7 or -128 to 127."""
    for start in range(0, len(weight.weight), 4096):
        part = weight.weight[start : start + 4096]
        yield start, unpack_nibbles(part) if weight.bits == 4 else part


def external_file(path: Path) -> Path:
    """Where the constants of a graph lie: beside it."""
    return path.with_name(path.name + ".data")
