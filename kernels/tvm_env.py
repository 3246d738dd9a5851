# SPDX-License-Identifier: Apache-2.0
"""The one place that imports TVM's compiler.

Before ``import tvm`` it makes ``libcuda.so.1`` (a stub where there is no driver) and ``libcudart.so.13`` loadable,
because TVM loads its CUDA side once, while it is imported, and is silent when that fails. Importing torch, which
tvm_ffi does when it is installed, is most of the time this import takes.
"""

from __future__ import annotations

import sys

from gptq_compile.errors import BuildError
from gptq_compile.kernels.toolchain import load_cudart, load_driver

_cuda_refusal = load_driver() or load_cudart()

# TVM replaces the interpreter's excepthook by one that also terminates every child process of the caller.
_excepthook = sys.excepthook

import tvm  # noqa: E402
from tvm import relax  # noqa: E402
from tvm.base import _LOADED_LIBS  # noqa: E402
from tvm.script import ir as I  # noqa: E402
from tvm.script import relax as R  # noqa: E402
from tvm.script import tirx as T  # noqa: E402

sys.excepthook = _excepthook

__all__ = ["I", "R", "T", "relax", "require_cuda_codegen", "tvm"]


def require_cuda_codegen() -> None:
    """Checks that TVM in this process can turn CUDA source into machine code.

    Raises:
        BuildError: if TVM's CUDA side is not loaded; it would silently package source text instead.
    """
    if "tvm_runtime_cuda" in _LOADED_LIBS:
        return
    reason = _cuda_refusal or (
        "TVM did not load libtvm_runtime_cuda.so. Import gptq_compile before tvm, and check that the installed "
        "apache-tvm wheel has CUDA support."
    )
    raise BuildError(f"CUDA code cannot be generated in this process. {reason}")
