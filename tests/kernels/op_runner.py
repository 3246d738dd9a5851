# SPDX-License-Identifier: Apache-2.0
"""Runs an `OpCase` through the registry: on the CPU for real, for CUDA under the emulator or only through nvcc."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gptq_compile.kernels import toolchain
from gptq_compile.kernels.registry import Kernel, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from tests.gpu.op_case import OpCase, mismatch
from tests.kernels import cuda_ops_emulator

CPU = Target.parse("cpu")
CUDA = Target.parse("cuda:sm_80,sm_90")
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not installed")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def kernels(kind: str) -> tuple[Kernel, ...]:
    """Returns the kernels of the modules tested here, for ``"cpu"`` or ``"cuda"``."""
    attention = {"cpu": ("cache", "decode_attention", "prefill_attention"), "cuda": ("attention",)}[kind]
    modules = (*attention, "norms", "rotary", "gated", "experts", "quant_experts", "topk", "sampling")
    found = (importlib.import_module(f"gptq_compile.kernels.{kind}.{name}").KERNELS for name in modules)
    return tuple(kernel for group in found for kernel in group)


def kernel_name(op_case: OpCase, target: Target) -> str:
    """Returns the name of the kernel that the registry takes."""
    return select(op_case.case, target, kernels(target.kind)).kernel.name


def prim_func(op_case: OpCase, target: Target):
    """Returns the PrimFunc of the kernel that the registry takes."""
    return select(op_case.case, target, kernels(target.kind)).kernel.prim_func(op_case.case, target)


def check_cpu(op_case: OpCase, most: int = 257) -> None:
    """Compiles the case once and compares it with float64 for every one of its sizes up to `most`."""
    library = tvm.compile(prim_func(op_case, CPU), target=CPU.tvm())
    for n in (size for size in op_case.sizes if size <= most):
        arguments = op_case.make_inputs(np.random.default_rng(n), n)
        tensors = [tvm.runtime.tensor(argument) for argument in arguments]
        library[op_case.case.op](*tensors)
        wrong = mismatch(op_case, arguments, [tensor.numpy() for tensor in tensors])
        assert wrong is None, f"{op_case.name}, n={n}: {wrong}"


def check_emulated(op_case: OpCase, n: int, folder: Path) -> None:
    """Runs the CUDA source on the CPU and compares it with float64."""
    arguments = op_case.make_inputs(np.random.default_rng(n), n)
    results = [argument.copy() for argument in arguments]
    cuda_ops_emulator.run(prim_func(op_case, CUDA), CUDA, results, folder)
    wrong = mismatch(op_case, arguments, results)
    assert wrong is None, f"{op_case.name}, n={n}: {wrong}"


def check_nvcc(op_cases: list[OpCase], folder: Path) -> None:
    """Compiles the CUDA source of all cases, in one program, to machine code for sm_80 and sm_90."""
    nvcc = toolchain.require_nvcc(CUDA.archs)
    bodies, header = [], ""
    for i, op_case in enumerate(op_cases):
        source = cuda_ops_emulator.cuda_source(prim_func(op_case, CUDA), CUDA)
        start = source.index('extern "C" __global__')
        header = max(header, source[:start], key=len)
        # Kernels are extern "C": two cases of one op need two names.
        bodies.append(source[start:].replace(f"{op_case.case.op}_kernel", f"{op_case.case.op}_kernel_case{i}"))
    code = folder / "kernels.cu"
    code.write_text(header + "".join(bodies))
    archs = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in CUDA.archs]
    flags = ["-std=c++17", "--use_fast_math", "-w", "-Xptxas=-v", "-fatbin", "-o", str(folder / "kernels.fatbin")]
    done = subprocess.run([str(nvcc.path), *flags, *archs, str(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # ptxas may spill a few bytes to keep occupancy; a kernel that outgrew the registers spills hundreds.
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert spilled and max(spilled) <= 64, f"registers spill: {spilled} bytes"
