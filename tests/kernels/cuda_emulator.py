# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA source that TVM generates for a PrimFunc on the CPU, so that numerics are tested without a GPU.

The source is compiled by g++ after `cuda_emulator.h`, in which threads are fibers and warp-wide instructions are
barriers; inline assembly is replaced by its definition: mma.sync, and blocks of helpers such as `tile_source.PTX`.
Arrays in registers and shared memory become checked ones (`emu_array`), since a CPU forgives what nvcc takes as
undefined.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

_CALLBACK = "tvm_callback_cuda_compile"
_GXX = ("g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing")
_LOCAL_ARRAY = re.compile(r"^( *)(__shared__ )?alignas\(\d+\) (\w+) (\w+)\[(\d+)\];$", re.MULTILINE)
_REGISTER_PARAMETER = re.compile(r"\b((?:const )?(?:unsigned|float))\* (\w+)(?=[,)])")
_TILES = re.compile(r"^#ifndef GQ_PTX.*?(?=^extern \"C\")", re.DOTALL | re.MULTILINE)
_PTX = re.compile(r"^#ifndef GQ_(?:PTX|LAUNCH|CLUSTER|SENDING|HOPPER|BARRIERS).*?^#endif\n", re.DOTALL | re.MULTILINE)
_CLUSTER_RANK = re.compile(
    r"^__forceinline__ __device__ unsigned int tvm_builtin_cluster\w+\(\).*?^}\n", re.DOTALL | re.M
)
_DYNAMIC_ARRAY = re.compile(r"^ *extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];$", re.MULTILINE)
_DYNAMIC_BYTES = re.compile(r'alloc_buffer\(\((\d+),\), "uint8", scope="shared.dyn"\)')
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


def _dimensions(func: Any, tensors: dict[str, np.ndarray], rows: int) -> dict[str, int]:
    """Returns name -> value of every symbolic dimension: `rows` where it has no name of its own, else its tensor's."""
    found: dict[str, int] = {}
    for tensor in func.params:
        for dim, size in zip(tensor.shape, tensors[tensor.name.removesuffix("_ptr")].shape, strict=True):
            if isinstance(dim, tvm.tirx.Var):
                found[str(dim)] = rows if dim.name in ("", "v") else size
    return found


def _extents(func: Any, dims: dict[str, int]) -> dict[str, int]:
    """Returns thread tag -> extent."""
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            found[node.node.thread_tag] = node.value

    tvm_ffi.structural_walk(func.body, (tvm.tirx.AttrStmt, visit), order="post")
    printed = types.SimpleNamespace(int32=int, int64=int, Cast=lambda dtype, value: value)
    return {tag: int(eval(str(value), {"T": printed, **dims})) for tag, value in found.items()}


def _checked_array(declaration: re.Match[str]) -> str:
    """Returns the checked counterpart of an array declaration."""
    indent, shared, dtype, name, size = declaration.groups()
    return f"{indent}{'static emu_shared' if shared else 'emu_array'}<{dtype}, {size}> {name};"


def compile_cpp(code: Path, library: Path, header: str, *flags: str) -> None:
    """Compiles a source whose first line includes a header of this folder."""
    folder = _precompiled(header, flags)
    command = [*_GXX, *flags, f"-I{folder.name}", f"-I{Path(__file__).parent}", "-o", str(library), str(code)]
    subprocess.run(command, check=True)


@functools.cache
def _precompiled(header: str, flags: tuple[str, ...]) -> tempfile.TemporaryDirectory[str]:
    """A folder with the header in the form that g++ reads fastest: most of a source is the header."""
    folder = tempfile.TemporaryDirectory(prefix="cuda-emulator-")
    source = Path(__file__).with_name(header)
    command = [*_GXX, *flags, "-x", "c++-header", "-o", f"{folder.name}/{header}.gch", str(source)]
    subprocess.run(command, check=True)
    return folder


def run(func: Any, target: Target, tensors: dict[str, np.ndarray], rows: int, folder: Path) -> None:
    """Runs a PrimFunc's kernel on arrays named like its parameters; outputs are written in place."""
    source = cuda_source(func, target)
    source = _CLUSTER_RANK.sub("", source)  # TVM's own, for an index that the kernels do not use
    tiles = "".join(_PTX.sub("", text) for text in _TILES.findall(source))
    source = _TILES.sub("", source)
    helpers = "".join(re.findall(r"^__device__ __forceinline__ .*?^}\n", source, re.DOTALL | re.MULTILINE))
    kernel = source[source.rindex('extern "C" __global__') :]
    kernel = _LOCAL_ARRAY.sub(_checked_array, kernel)
    dims = _dimensions(func, tensors, rows)
    extent = _extents(func, dims)
    cluster = extent.get("clusterCtaIdx.x", 1)
    dynamic = _DYNAMIC_BYTES.search(func.script())
    if dynamic:
        # One stretch for each block of a cluster, with the same place within the 1,024 bytes that kernels align to.
        size = -(-int(dynamic[1]) // 1024) * 1024
        array = rf"static emu_shared<\1, {size * cluster}> \2_array; emu_dynamic_bytes = {size};"
        array += rf" auto* \2 = \2_array.values + {size} * emu_rank();"
        kernel = _DYNAMIC_ARRAY.sub(array, kernel)
    assert "__shared__" not in kernel and "alignas" not in kernel
    helpers = _REGISTER_PARAMETER.sub(r"emu_span<\1> \2", helpers)
    text = tiles + _ASSEMBLY.sub("emu_mma(d, a0, a1, a2, a3, b0, b1);", helpers + kernel)
    assert "asm" not in text
    name, parameters = re.search(r"(\w+_kernel)\(([^)]*)\)", kernel).groups()
    arguments, values, sizes = [], [], []
    for i, parameter in enumerate(parameters.split(",")):
        kind, parameter_name = parameter.replace("__restrict__", "").rsplit(None, 1)
        if kind.strip().endswith("*"):
            arguments.append(f"({kind}) emu_arguments[{i}]")
            tensor = tensors[parameter_name.removesuffix("_ptr")]
            values.append(tensor.ctypes.data)
            sizes.append(tensor.nbytes)
        else:
            arguments.append(f"({kind}) (int64_t) emu_arguments[{i}]")
            values.append(dims.get(parameter_name, rows))
            sizes.append(0)
    entry = f"""
static void** emu_arguments;
static void emu_call() {{ {name}({", ".join(arguments)}); }}
extern "C" const char* emu_run(void** arguments, const size_t* sizes) {{
  emu_arguments = arguments;
  for (int i = 0; i < {len(values)}; ++i) emu_tensors.push_back({{(const char*) arguments[i], sizes[i]}});
  emu_launch({{{extent["blockIdx.x"]}, {extent.get("blockIdx.y", 1)}, 1}}, {extent["threadIdx.x"]}, emu_call,
             {cluster});
  return emu_failure;
}}
"""
    folder.mkdir(parents=True, exist_ok=True)
    code, library = folder / "kernel.cpp", folder / "kernel.so"
    code.write_text('#include "cuda_emulator.h"\n' + text + entry)
    # A shift by 32 is 0 on a GPU and a shift by 0 here: stop instead. Nor is there anything beyond a register array.
    compile_cpp(code, library, "cuda_emulator.h", "-fsanitize=shift,bounds", "-fsanitize-undefined-trap-on-error")
    emulator = ctypes.CDLL(str(library))
    emulator.emu_run.restype = ctypes.c_char_p
    failure = emulator.emu_run((ctypes.c_void_p * len(values))(*values), (ctypes.c_size_t * len(sizes))(*sizes))
    assert failure is None, f"The emulator of {code} stopped trusting the kernel: {failure.decode()}."
