# SPDX-License-Identifier: Apache-2.0
"""A program in sequence form becomes an ONNX graph with a key/value cache: what every rule of the lowering shares.

The program's tokens are ``[1, n, ...]`` and only attention lets them see each other. Here ``n`` is all tokens of a
batch in a row, ``batch_size * sequence_length``; attention alone takes them apart again. So a graph that was traced
with one sequence serves any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gptq_compile.errors import PassError
from gptq_compile.onnx.builder import GraphBuilder, element_type
from gptq_compile.onnx.grid import Product
from gptq_compile.onnx.matmulnbits import MatMulNBits
from gptq_compile.passes.common import Node, is_node, is_tensor
from gptq_compile.passes.program import Program, module_path, where

aten = torch.ops.aten
ops = torch.ops.gptq_compile

TOKENS = "tokens"
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64, torch.int64: np.int64,
    torch.int32: np.int32, torch.uint8: np.uint8, torch.int8: np.int8, torch.bool: np.bool_,
}  # fmt: skip

Rule = Callable[["Lowering", Any, SimpleNamespace], Any]
RULES: dict[Any, Rule] = {}
"""Op -> the function that adds its nodes; filled by :func:`rule`."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a function for ops: ``f(lowering, node, arguments by name) -> name or names of the result``."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


class Lowering:
    """One run over a program's graph.

    Attributes:
        b: the ONNX graph. ``layers``: of each attention so far, ``(kv_heads, head_dim, v_head_dim)``.
        product: what multiplies by a quantized matrix. ``divided``: slices that are outputs of such products.
        shared_buffer: whether past and present may be one buffer, which generate loops use.
    """

    def __init__(self, program: Program, product: Product | None = None) -> None:
        self.program = program
        self.product = product or MatMulNBits()
        self.b = GraphBuilder(program.info.name)
        self.layers: list[tuple[int, int, int]] = []
        self.heads: list[int] = []
        self.shared_buffer = True
        self.divided: dict[Node, str] = {}
        self._values: dict[Node, Any] = {}
        self._shared: dict[Any, str] = {}

    def run(self) -> GraphBuilder:
        """Lowers every node.

        Raises:
            PassError: an op has no rule; names it, the module and the way out.
        """
        import gptq_compile.onnx.aten_rules
        import gptq_compile.onnx.dialect_rules  # noqa: F401

        program, b = self.program, self.b
        select: Node = program.output
        if select.target is not aten.index_select.default or select.args[1] != 1:
            raise PassError("The program's output is not a selection of rows of the logits, so it has another form.")
        logits, rows = select.args[0], select.args[2]
        if list(rows.users) != [select]:
            raise PassError("The program uses the rows of the logits for more than selecting them.")
        for node in program.inputs:
            if node is not rows and node.users:
                b.input(node.name, NUMPY[node.meta["val"].dtype], (BATCH, SEQUENCE))
        b.input("attention_mask", np.int64, (BATCH, TOTAL))
        for node in program.inputs:
            if node is not rows and node.users:
                self._values[node] = b.node("Reshape", [node.name, b.ints(1, -1)])
        for node in program.graph.nodes:
            if node.op == "call_function" and node is not select and is_value(node):
                self._lower(node)
        self._logits(logits)
        return b

    def _lower(self, node: Node) -> None:
        function = RULES.get(node.target)
        if function is None:
            raise PassError(
                f"{where(node)} has no form in ONNX here, so this model cannot be exported; `gptq-compile MODEL` can "
                "still compile it."
            )
        self.b.scope = module_path(node).replace(".", "/")
        made = function(self, node, arguments(node))
        self._values[node] = made
        if is_tensor(node) and isinstance(made, str):
            self.b.value(made, NUMPY[node.meta["val"].dtype], self.shape(node))

    def _logits(self, node: Node) -> None:
        b = self.b
        b.scope = ""
        flat = self.cast(self.value(node), node.meta["val"].dtype, torch.float32)
        b.node("Reshape", [flat, self.batched(-1)], ["logits"])
        b.output("logits", np.float32, (BATCH, SEQUENCE, int(node.meta["val"].shape[-1])))
        for i, (heads, *dims) in enumerate(self.layers):
            for kind, dim in zip(("key", "value"), dims, strict=True):
                b.output(f"present.{i}.{kind}", np.float32, (BATCH, heads, TOTAL, dim))

    def shape(self, node: Node) -> tuple[int | str, ...]:
        """Shape of a node, with a name for the tokens."""
        return tuple(d if isinstance(d, int) else TOKENS for d in node.meta["val"].shape)

    def fixed_shape(self, node: Node, open_dim: int) -> list[int]:
        """Shape of a node with ``open_dim`` (-1 or 1) for the number of tokens.

        Raises:
            PassError: more than one dimension depends on the tokens.
        """
        dims = self.shape(node)
        if sum(d == TOKENS for d in dims) > 1:
            raise PassError(f"{where(node)} has a shape with several dimensions that depend on the number of tokens.")
        return [d if isinstance(d, int) else open_dim for d in dims]

    def value(self, node: Any) -> str:
        """The ONNX value of a node; a parameter becomes a weight when it is first used."""
        if node in self._values:
            return self._values[node]
        if is_node(node) and "param" in node.meta:
            name = node.meta["param"]
            params = self.program.params
            dtype = NUMPY[params.dtype(name)]
            return self.b.weight(name, params.shape(name), dtype, functools.partial(_array, params.get, name))
        raise PassError(f"{where(node)} has no value in the ONNX graph; its op is not one of those that make tensors.")

    def values(self, node: Node) -> Any:
        """All values of a node with several results."""
        return self._values[node]

    def operand(self, value: Any, dtype: torch.dtype) -> str:
        """A tensor or number as an operand of type ``dtype``."""
        if is_node(value):
            return self.cast(self.value(value), value.meta["val"].dtype, dtype)
        return self.b.constant(value, NUMPY[dtype])

    def cast(self, name: str, have: torch.dtype, want: torch.dtype) -> str:
        return name if have == want else self.b.node("Cast", [name], to=element_type(NUMPY[want]))

    def reshape(self, name: str, *dims: int) -> str:
        return self.b.node("Reshape", [name, self.b.ints(*dims)])

    def slice(self, name: str, start: int, stop: int, step: int, axis: int) -> str:
        b = self.b
        return b.node("Slice", [name, b.ints(start), b.ints(stop), b.ints(axis), b.ints(step)])

    @property
    def batch_and_length(self) -> str:
        """int64 ``[2]``: batch size and sequence length."""
        return self.once("batch_and_length", lambda: self.b.node("Shape", ["input_ids"]))

    def batched(self, *rest: int) -> str:
        """The shape ``[batch_size, sequence_length, *rest]`` as a value."""
        return self.once(
            ("batched", *rest), lambda: self.b.node("Concat", [self.batch_and_length, self.b.ints(*rest)], axis=0)
        )

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """A value that several nodes share, made when the first asks for it."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @property
    def total_length(self) -> str:
        """int64 ``[1]``: tokens of a sequence, those of the cache included."""
        return self.once("total_length", lambda: self.b.node("Shape", ["attention_mask"], start=1, end=2))


def is_value(node: Node) -> bool:
    """Whether a call makes tensors (and no sizes, which live on in the shapes of fake values)."""
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, tuple, list))


def arguments(node: Node) -> SimpleNamespace:
    """The arguments of a call by the names of its schema, defaults filled in; ``args`` where there is no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return SimpleNamespace(args=node.args)
    filled = {}
    for i, argument in enumerate(schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        filled[argument.name] = given
    return SimpleNamespace(**filled)


def _array(read: Callable[[str], torch.Tensor], name: str) -> Any:
    return read(name).detach().cpu().contiguous().numpy()
