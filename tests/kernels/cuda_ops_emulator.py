# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA source of a PrimFunc with one or several kernels on the CPU, over fibers (see `cuda_emulator.h`).

Unlike `cuda_emulator.run`, every symbolic dimension is bound from the arrays, kernels of one PrimFunc run in order,
and global workspaces between them are allocated here.
"""

from __future__ import annotations

import ctypes
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from tests.kernels.cuda_emulator import compile_cpp

_CALLBACK = "tvm_callback_cuda_compile"
_WORKSPACE_BYTES = 8 << 20


def cuda_source(func: Any, target: Target) -> str:
    """Returns the CUDA C++ that TVM generates for a PrimFunc; nothing is compiled."""
    found: list[str] = []

    def capture(code: str) -> bytes:
        found.append(code)
        return b"not compiled"

    previous = tvm.get_global_func(_CALLBACK, allow_missing=True)
    tvm.register_global_func(_CALLBACK, capture, override=True)
    try:
        with target.tvm():
            tvm.tirx.build(func, target=target.tvm())
    finally:
        if previous is not None:
            tvm.register_global_func(_CALLBACK, previous, override=True)
    return found[0]


def dimensions(func: Any, arrays: Sequence[np.ndarray]) -> dict[str, int]:
    """Returns name -> value of every symbolic dimension, taken from the arrays passed for the parameters."""
    dims: dict[str, int] = {}
    for param, array in zip(func.params, arrays, strict=True):
        assert len(param.shape) == array.ndim
        for dim, size in zip(param.shape, array.shape, strict=True):
            if isinstance(dim, tvm.tirx.Var):
                assert dims.setdefault(dim.name, size) == size
            else:
                assert int(dim) == size
    return dims


def launches(func: Any, dims: dict[str, int]) -> list[dict[str, int]]:
    """Returns the thread extents (tag -> number) of each kernel of a PrimFunc, in order."""
    found: list[dict[str, int]] = []
    scope = {"T": types.SimpleNamespace(int32=int, int64=int, Cast=lambda dtype, value: value), **dims}

    def visit(loop: Any) -> None:
        if loop.thread_binding is not None:
            tag = loop.thread_binding.thread_tag
            if tag == "blockIdx.x":
                found.append({})
            found[-1][tag] = int(eval(str(loop.extent), scope))

    tvm_ffi.structural_walk(func.body, (tvm.tirx.For, visit), order="pre")
    return found


def run(func: Any, target: Target, arrays: Sequence[np.ndarray], folder: Path) -> None:
    """Calls a PrimFunc's kernels on arrays given in the order of its parameters; outputs are written in place."""
    source = cuda_source(func, target)
    dims = dimensions(func, arrays)
    named = {param.name: array for param, array in zip(func.params, arrays, strict=True)}
    kernels = re.findall(r'^extern "C" __global__ void [^\n]*\) \{\n.*?^}\n', source, re.DOTALL | re.MULTILINE)
    extents = launches(func, dims)
    assert len(kernels) == len(extents)
    workspaces: dict[str, np.ndarray] = {}
    values: list[int] = []
    calls = ""
    for number, (kernel, extent) in enumerate(zip(kernels, extents, strict=True)):
        name, parameters = re.search(r"(\w+)\(([^()]*)\) \{\n", kernel).groups()  # type: ignore[union-attr]
        arguments = []
        for parameter in parameters.split(","):
            kind, parameter_name = parameter.replace("__restrict__", "").rsplit(None, 1)
            if kind.strip().endswith("*"):
                key = parameter_name.removesuffix("_ptr")
                array = named.get(key)
                if array is None:
                    array = workspaces.setdefault(key, np.full(_WORKSPACE_BYTES, 0xFF, np.uint8))
                values.append(array.ctypes.data)
            else:
                values.append(dims[parameter_name])
            arguments.append(f"({kind}) (int64_t) emu_arguments[{len(values) - 1}]")
        grid = f"{{{extent['blockIdx.x']}, {extent.get('blockIdx.y', 1)}, 1}}"
        calls += f"static void emu_call_{number}() {{ {name}({', '.join(arguments)}); }}\n"
        kernels[number] += f"// launch\n#define EMU_LAUNCH_{number} emu_launch({grid}, {extent['threadIdx.x']}, "
        kernels[number] += f"emu_call_{number})\n"
    body = "".join(kernels)
    body = re.sub(r"__shared__ alignas\((\d+)\) (\w+)", r"alignas(\1) static \2", body)
    entry = "".join(f"EMU_LAUNCH_{number}; " for number in range(len(kernels)))
    text = (
        '#include "cuda_ops_emulator.h"\n' + body + "static void** emu_arguments;\n" + calls
        + f'extern "C" void emu_run(void** arguments) {{ emu_arguments = arguments; {entry} }}\n'
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    code, library = folder / "kernel.cpp", folder / "kernel.so"
    code.write_text(text)
    compile_cpp(code, library, "cuda_ops_emulator.h")
    ctypes.CDLL(str(library)).emu_run((ctypes.c_void_p * len(values))(*values))
