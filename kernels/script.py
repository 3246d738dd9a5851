# SPDX-License-Identifier: Apache-2.0
"""Programmatic TIR: PrimFuncs written as Python that emits statements.

TVMScript is parsed, so a kernel whose body depends on a table of bit fields would need a template per bit width.
With TVM's script builder a Python loop emits the unrolled statements, and constants fold here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from gptq_compile.kernels.tvm_env import tvm

Expr = Any


class Function:
    """A PrimFunc under construction.

    Use as a context manager; statements emitted inside become the body, `result` returns the PrimFunc after it::

        with Function("scale") as f:
            x = f.tensor("x", (f.symbol("m"), 8), "float32")
            ...
        func = f.result()
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack = contextlib.ExitStack()
        self._builder = tvm.script.ir_builder.IRBuilder()

    def __enter__(self) -> Function:
        ir = script()
        self._stack.enter_context(self._builder)
        self._stack.enter_context(ir.prim_func(s_tir=True))
        ir.func_name(self._name)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def symbol(self, name: str = "") -> Expr:
        """Returns a symbolic int64 dimension."""
        return tvm.tirx.Var(name, "int64") if name else script().int64()

    def tensor(self, name: str, shape: Sequence[Expr], dtype: str) -> Any:
        """Adds a tensor parameter; parameters keep the order of these calls."""
        ir = script()
        return ir.arg(name, ir.buffer(tuple(shape), dtype))

    def result(self) -> Any:
        """Returns the finished PrimFunc."""
        return self._builder.get()


def script() -> Any:
    """Returns TVM's statement builder (``T`` without the parser)."""
    return tvm.tirx.script.builder


def store(buffer: Any, indices: Sequence[Expr], value: Expr) -> None:
    """Emits ``buffer[indices] = value``."""
    script().buffer_store(buffer, value, list(indices))


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emits ``if condition:`` around the statements of the block."""
    ir = script()
    with ir.If(condition), ir.Then():
        yield


def local(size: int, dtype: str = "float32") -> Any:
    """Emits a small private array of a GPU thread, which the code generator keeps in registers."""
    return script().alloc_buffer((size,), dtype, scope="local")


def on_stack(size: int, dtype: str = "float32") -> Any:
    """Emits a small array of a CPU thread (below 1 kB), which the code generator keeps in registers or on the stack.

    Arrays of scope "local" would be asked of the runtime and given back for every pass of the loop around them.
    """
    return script().alloc_buffer((size,), dtype)
