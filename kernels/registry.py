# SPDX-License-Identifier: Apache-2.0
"""Kernel cases, kernels, and the choice between them.

A `Case` says *what* must be computed (op, its attributes, activation dtype, and the number of rows when it is known
at compile time). A `Kernel` says *how*: it either refuses a case in words or returns a destination-passing TVM
PrimFunc for it. `select` asks the kernels of a target from fast to slow and keeps every refusal, so that a user
always learns why a slower kernel (or none) was taken.

Each kernel module exposes ``KERNELS``, a tuple ordered from fast to slow, and has no other import-time effect; the
modules are imported on the first `select`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.target import Target

Scalar = int | float | bool | str

KERNEL_MODULES: Mapping[str, tuple[str, ...]] = {
    "cpu": (
        "gptq_compile.kernels.cpu.int8_linear",
        "gptq_compile.kernels.cpu.int16_linear",
        "gptq_compile.kernels.cpu.quant_linear",
        "gptq_compile.kernels.cpu.linear",
        "gptq_compile.kernels.cpu.cache",
        "gptq_compile.kernels.cpu.decode_attention",
        "gptq_compile.kernels.cpu.prefill_attention",
        "gptq_compile.kernels.cpu.norms",
        "gptq_compile.kernels.cpu.rotary",
        "gptq_compile.kernels.cpu.gated",
        "gptq_compile.kernels.cpu.sampling",
        "gptq_compile.kernels.cpu.experts",
        "gptq_compile.kernels.cpu.quant_experts",
        "gptq_compile.kernels.cpu.topk",
    ),
    "cuda": (
        "gptq_compile.kernels.cuda.quant_linear",
        "gptq_compile.kernels.cuda.linear",
        "gptq_compile.kernels.cuda.decode_attention",
        "gptq_compile.kernels.cuda.prefill_attention",
        "gptq_compile.kernels.cuda.attention",
        "gptq_compile.kernels.cuda.norms",
        "gptq_compile.kernels.cuda.rotary",
        "gptq_compile.kernels.cuda.gated",
        "gptq_compile.kernels.cuda.sampling",
        "gptq_compile.kernels.cuda.experts",
        "gptq_compile.kernels.cuda.quant_experts",
        "gptq_compile.kernels.cuda.topk",
    ),
}


@dataclass(frozen=True)
class Case:
    """One thing to compute.

    Attributes:
        op: name of the operation, for example ``"quant_linear"``.
        attrs: sorted (name, value) pairs; give a mapping to `Case.make`.
        dtype: activation dtype, ``"float32"`` or ``"float16"``.
        rows: static number of rows (tokens), or None when it is symbolic.
    """

    op: str
    attrs: tuple[tuple[str, Scalar], ...]
    dtype: str
    rows: int | None = None

    @staticmethod
    def make(op: str, dtype: str, rows: int | None = None, **attrs: Scalar) -> Case:
        """Builds a case; equal attributes give equal, hashable cases whatever their order."""
        return Case(op, tuple(sorted(attrs.items())), dtype, rows)

    def __getitem__(self, name: str) -> Any:
        """Returns attribute `name`; raises KeyError when the case does not have it."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(f"Case {self} has no attribute {name!r}.")

    def get(self, name: str, default: Any = None) -> Any:
        """Returns attribute `name`, or `default`."""
        return next((value for key, value in self.attrs if key == name), default)

    def with_attrs(self, **attrs: Scalar) -> Case:
        """The case with more attributes, or other values of those it has."""
        return Case.make(self.op, self.dtype, self.rows, **{**dict(self.attrs), **attrs})

    def __str__(self) -> str:
        attrs = ", ".join(f"{key}={value}" for key, value in self.attrs)
        rows = "symbolic" if self.rows is None else self.rows
        return f"{self.op}({attrs}; {self.dtype}, rows={rows})"


@dataclass(frozen=True)
class Refusal:
    """Why a kernel does not implement a case: one sentence."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    Attributes:
        name: unique, for example ``"cpu.quant_linear.lanes"``.
        op: the op it implements.
        accepts: ``(case, target) -> Refusal | None``; only asked for cases of `op`.
        build: ``(case, target) -> tvm PrimFunc`` (inputs..., outputs last), already scheduled.
    """

    name: str
    op: str
    accepts: Callable[[Case, Target], Refusal | None]
    build: Callable[[Case, Target], Any]

    def can_implement(self, case: Case, target: Target) -> Refusal | None:
        """Returns None when the kernel implements `case`, else the reason in words."""
        if case.op != self.op:
            return Refusal(f"implements {self.op}, not {case.op}")
        return self.accepts(case, target)

    def prim_func(self, case: Case, target: Target) -> Any:
        """Returns the PrimFunc, marked ``tirx.is_scheduled`` so that default schedules leave it alone."""
        func = self.build(case, target)
        return func.with_attr({"tirx.is_scheduled": True, "tirx.noalias": True})


@dataclass(frozen=True)
class Selection:
    """The kernel taken and the (kernel name, reason) of every faster one that refused."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...]


@functools.cache
def kernels_for(kind: str) -> tuple[Kernel, ...]:
    """Returns the kernels of a target kind, fast to slow within each op.

    Raises:
        NoKernelError: if no kernels exist for that kind.
    """
    if kind not in KERNEL_MODULES:
        raise NoKernelError(f"There are no kernels for target {kind!r}. Use one of {', '.join(KERNEL_MODULES)}.")
    found: list[Kernel] = []
    for name in KERNEL_MODULES[kind]:
        found.extend(importlib.import_module(name).KERNELS)
    names = [kernel.name for kernel in found]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"Kernel names must be unique, but {', '.join(duplicates)} appear more than once.")
    return tuple(found)


def select(case: Case, target: Target, kernels: tuple[Kernel, ...] | None = None) -> Selection:
    """Picks the fastest kernel that implements `case`.

    Args:
        case: what to compute.
        target: for which machine.
        kernels: candidates, fast to slow; by default those of ``target.kind``.

    Raises:
        NoKernelError: if every kernel of the op refuses; the message lists each one's reason.
    """
    refused: list[tuple[str, str]] = []
    candidates = kernels_for(target.kind) if kernels is None else kernels
    for kernel in candidates:
        if kernel.op != case.op:
            continue
        refusal = kernel.can_implement(case, target)
        if refusal is None:
            return Selection(kernel, tuple(refused))
        refused.append((kernel.name, refusal.reason))
    if not refused:
        known = ", ".join(sorted({kernel.op for kernel in candidates})) or "none"
        raise NoKernelError(f"No kernel of target {target} implements {case.op!r}. Known ops: {known}.")
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused)
    raise NoKernelError(f"No kernel of target {target} implements {case}:{reasons}", tuple(refused))
