# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA source that TVM generates for a PrimFunc on the CPU, so that numerics are tested without a GPU.

The source is compiled by g++ after `cuda_emulator.h`, in which threads are fibers and warp-wide instructions are
barriers; the one piece of inline assembly, mma.sync, is replaced by its definition.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

_CALLBACK = "tvm_callback_cuda_compile"
_ASSEMBLY = re.compile(r"asm volatile\(\s*\"mma\.sync\.aligned\.m16n8k16.*?\);", re.DOTALL)


def cuda_source(func: Any, target: Target) -> str:
    """Returns the CUDA C++ TVM generates for a PrimFunc; nothing is compiled."""
    found: list[str] = []

    def capture(code: str) -> bytes:
        found.append(code)
        return b"not compiled"

    previous = tvm.get_global_func(_CALLBACK, allow_missing=True)
    tvm.register_global_func(_CALLBACK, capture, override=True)
    try:
        tvm_target = target.tvm()
        with tvm_target:
            tvm.tirx.build(func, target=tvm_target)
    finally:
        if previous is not None:
            tvm.register_global_func(_CALLBACK, previous, override=True)
    return found[0]


def _extents(func: Any, rows: int) -> dict[str, int]:
    """Returns thread tag -> extent, with every symbolic dimension set to `rows`."""
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            found[node.node.thread_tag] = node.value

    tvm_ffi.structural_walk(func.body, (tvm.tirx.AttrStmt, visit), order="post")
    dims = {str(dim): rows for tensor in func.params for dim in tensor.shape if isinstance(dim, tvm.tirx.Var)}
    printed = types.SimpleNamespace(int32=int, int64=int, Cast=lambda dtype, value: value)
    return {tag: int(eval(str(value), {"T": printed, **dims})) for tag, value in found.items()}


def run(func: Any, target: Target, tensors: dict[str, np.ndarray], rows: int, folder: Path) -> None:
    """Runs a PrimFunc's kernel on arrays named like its parameters; outputs are written in place."""
    source = cuda_source(func, target)
    helpers = "".join(re.findall(r"^__device__ __forceinline__ .*?^}\n", source, re.DOTALL | re.MULTILINE))
    kernel = source[source.rindex('extern "C" __global__') :]
    kernel = re.sub(r"__shared__ alignas\((\d+)\) (\w+)", r"alignas(\1) static \2", kernel)
    text = _ASSEMBLY.sub("emu_mma(d, a0, a1, a2, a3, b0, b1);", helpers + kernel)
    assert "asm" not in text
    name, parameters = re.search(r"(\w+_kernel)\(([^)]*)\)", kernel).groups()
    arguments, values = [], []
    for i, parameter in enumerate(parameters.split(",")):
        kind, parameter_name = parameter.replace("__restrict__", "").rsplit(None, 1)
        if kind.strip().endswith("*"):
            arguments.append(f"({kind}) emu_arguments[{i}]")
            values.append(tensors[parameter_name.removesuffix("_ptr")].ctypes.data)
        else:
            arguments.append(f"({kind}) (int64_t) emu_arguments[{i}]")
            values.append(rows)
    extent = _extents(func, rows)
    entry = f"""
static void** emu_arguments;
static void emu_call() {{ {name}({", ".join(arguments)}); }}
extern "C" void emu_run(void** arguments) {{
  emu_arguments = arguments;
  emu_launch({{{extent["blockIdx.x"]}, {extent.get("blockIdx.y", 1)}, 1}}, {extent["threadIdx.x"]}, emu_call);
}}
"""
    folder.mkdir(parents=True, exist_ok=True)
    code, library = folder / "kernel.cpp", folder / "kernel.so"
    code.write_text('#include "cuda_emulator.h"\n' + text + entry)
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        f"-I{Path(__file__).parent}",
        "-fno-strict-aliasing",
    ]
    subprocess.run([*command, "-o", str(library), str(code)], check=True)
    emulator = ctypes.CDLL(str(library))
    emulator.emu_run((ctypes.c_void_p * len(values))(*values))
