# SPDX-License-Identifier: Apache-2.0
"""``GraphBuilder``: an ONNX graph that grows node by node, and whose weights stay on disk until they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference

from gptq_compile import __version__
from gptq_compile.artifact.files import create

OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
DATA_ALIGNMENT = 4096  # ONNX Runtime maps external tensors that start on a page
_INLINE = 1024  # bytes up to which a tensor lies in the model itself, where shape inference sees it

Dim = int | str


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class GraphBuilder:
    """Collects nodes, constants, weights and their types; :meth:`write` makes the files.

    A Reshape of what was only reshaped reads what that read, and one to the shape that is there is none. What no output
    depends on is not written.

    Args:
        name: of the graph.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._values: dict[str, onnx.ValueInfoProto] = {}
        self._weights: dict[str, _Weight] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names: dict[str, int] = {}
        self._reshaped: dict[str, str] = {}
        self._vectors: dict[str, tuple[int, ...]] = {}
        self.domains = {"": OPSET, MICROSOFT: 1}
        self.scope = ""

    def unique(self, base: str) -> str:
        """A name that no node or value has."""
        count = self._names.get(base, 0)
        self._names[base] = count + 1
        return base if count == 0 else self.unique(f"{base}_{count}")

    def node(
        self, op: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, *, domain: str = "", **attrs: Any
    ) -> Any:
        """Adds a node; the empty string stands for an input that is left out.

        Returns:
            The name of its output, or a tuple of names if there are several.
        """
        label = self.unique(f"{self.scope}/{op}" if self.scope else op)
        names = [self.unique(f"{label}_out{i}") for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        attrs = {key: value for key, value in attrs.items() if value is not None}
        if op == "Reshape":
            if 0 not in self._vectors.get(inputs[1], ()):  # a zero copies a size of its input
                inputs = [self._reshaped.get(inputs[0], inputs[0]), inputs[1]]
            if isinstance(outputs, int) and self._has_shape(*inputs):
                return inputs[0]
            self._reshaped[names[0]] = inputs[0]
        self._nodes.append(helper.make_node(op, list(inputs), names, name=label, domain=domain, **attrs))
        return names[0] if len(names) == 1 else tuple(names)

    def _has_shape(self, name: str, shape: str) -> bool:
        """Whether a value was stated to have the shape that is the constant ``shape``."""
        value, wanted = self._values.get(name), self._vectors.get(shape)
        if value is None or wanted is None or wanted.count(-1) > 1:
            return False
        dims = value.type.tensor_type.shape.dim
        return len(dims) == len(wanted) and all(
            d.dim_value == w if d.HasField("dim_value") else w == -1 for d, w in zip(dims, wanted, strict=True)
        )

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant; equal ones are one."""
        array = np.asarray(value, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.unique("constant")
            self._constants[key] = name
            self.weight(name, array.shape, array.dtype, lambda: array)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        name = self.constant(list(values), np.int64)
        self._vectors[name] = values
        return name

    def weight(self, name: str, shape: Sequence[int], dtype: Any, load: Callable[[], NDArray[Any]]) -> str:
        """Registers a tensor that ``load`` makes when it is written; the same name twice is one tensor."""
        if name not in self._weights:
            self._names.setdefault(name, 1)
            self._weights[name] = _Weight(name, tuple(int(d) for d in shape), np.dtype(dtype), load)
        return name

    def value(self, name: str, dtype: Any, shape: Sequence[Dim]) -> None:
        """States type and shape of a value, which ONNX cannot infer through operators of other domains."""
        self._values[name] = tensor_type(name, dtype, shape)

    def input(self, name: str, dtype: Any, shape: Sequence[Dim]) -> str:
        self._names.setdefault(name, 1)
        self.inputs.append(tensor_type(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Sequence[Dim]) -> str:
        self.outputs.append(tensor_type(name, dtype, shape))
        return name

    def _needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that the outputs depend on, in order, and the names of all values of theirs."""
        used, kept = {o.name for o in self.outputs}, []
        for node in reversed(self._nodes):
            if used.intersection(node.output):
                used.update(node.input, node.output)
                kept.append(node)
        return kept[::-1], used

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(w.nbytes for w in self._weights.values())

    def write(self, model: Path, data: Path, metadata: Mapping[str, str], doc: str) -> None:
        """Writes the model and, beside it, one file with all tensors that are not small.

        The written model has passed ``onnx.checker`` with strict shape inference.

        Args:
            model: file of the graph. ``data``: file of the weights, in the same folder.
            metadata: the model's ``metadata_props``. ``doc``: its ``doc_string``.
        """
        nodes, used = self._needed()
        tensors = []
        with create(data) as f:
            for weight in (w for w in self._weights.values() if w.name in used):
                array = np.asarray(weight.load(), weight.dtype, order="C")
                if array.shape != weight.shape:
                    raise AssertionError(f"{weight.name} has shape {array.shape}, not {weight.shape}")
                tensor = TensorProto(name=weight.name, dims=weight.shape, data_type=element_type(weight.dtype))
                if array.nbytes <= _INLINE:
                    tensor.raw_data = array.tobytes()
                else:
                    f.write(bytes(-f.tell() % DATA_ALIGNMENT))
                    place = {"location": data.name, "offset": str(f.tell()), "length": str(array.nbytes)}
                    for key, value in place.items():
                        tensor.external_data.add(key=key, value=value)
                    tensor.data_location = TensorProto.EXTERNAL
                    f.write(array.reshape(-1).view(np.uint8).data)
                tensors.append(tensor)
        graph = helper.make_graph(
            nodes, self.name, self.inputs, self.outputs, tensors,
            value_info=[value for name, value in self._values.items() if name in used],
        )  # fmt: skip
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, doc_string=doc)
        proto.producer_name, proto.producer_version = "gptq-compile", __version__
        helper.set_model_props(proto, dict(metadata))
        proto = shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        with create(model) as f:
            f.write(proto.SerializeToString())
        onnx.checker.check_model(str(model), full_check=True)


def element_type(dtype: Any) -> int:
    """ONNX's number for a numpy type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def tensor_type(name: str, dtype: Any, shape: Sequence[Dim]) -> onnx.ValueInfoProto:
    """A value's type; text in a shape names a dimension that is not fixed."""
    return helper.make_tensor_value_info(name, element_type(dtype), list(shape))
