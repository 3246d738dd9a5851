# SPDX-License-Identifier: Apache-2.0
"""Builds the library of operators of one model: kernels for its linears, and the C file that ONNX Runtime talks to.

It needs the C compiler that links compiled models too, and the headers that apache-tvm-ffi comes with. What it makes
depends on nothing but the C library.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gptq_compile.errors import BuildError
from gptq_compile.kernels.layouts import grouping_of
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.toolchain import require_cc

log = logging.getLogger(__name__)
_SOURCES = ("ops.c", "ort_abi.h")
_EXPORTS = "{ global: RegisterCustomOps; local: *; };\n"  # two models' libraries in one process share no names


def build_library(cases: Iterable[Case], target: Target, out: Path) -> None:
    """Compiles kernels for the cases and links them into a library for ``register_custom_ops_library``.

    Args:
        cases: ``quant_linear`` cases with any number of rows; each gets a kernel for one row besides.
        target: which CPUs.
        out: the library's path.

    Raises:
        BuildError: there is no C compiler, or it or TVM fails.
    """
    cc = require_cc()
    cases = tuple(cases)
    with tempfile.TemporaryDirectory(prefix="gptq-compile-ops-") as name:
        folder = Path(name)
        for source in _SOURCES:
            shutil.copyfile(Path(__file__).with_name(source), folder / source)
        (folder / "cases.inc").write_text("".join(_line(i, case) for i, case in enumerate(cases)))
        (folder / "exports.map").write_text(_EXPORTS)
        _compile_kernels(cases, target, folder / "kernels.o")
        command = [str(cc), "-std=gnu11", "-O2", "-Wall", "-shared", "-fPIC", *_includes(), "-o", str(out)]
        command += ["ops.c", "kernels.o", "-Wl,--version-script=exports.map", "-lm", "-pthread"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise BuildError(
            f"The library of ONNX operators could not be built; {cc} says: {done.stderr.strip()[-2000:]}\n"
            f"The command was: {' '.join(command)}"
        )
    log.debug("built %s with kernels for %d linears: %d bytes", out, len(cases), out.stat().st_size)


def _line(number: int, case: Case) -> str:
    """The entry of a case in the C file's table."""
    grouping = grouping_of(case)
    values = [case[name] for name in ("in_features", "out_features", "bits", "group_size")]
    values += [int(case["has_zeros"]), int(case["has_bias"]), grouping.row_words, grouping.groups]
    return f"CASE({number}, {', '.join(map(str, values))})\n"


def _compile_kernels(cases: tuple[Case, ...], target: Target, out: Path) -> None:
    from gptq_compile.kernels.tvm_env import tvm

    functions = {}
    for i, case in enumerate(cases):
        for rows, suffix in ((1, "one"), (None, "any")):
            static = Case(case.op, case.attrs, case.dtype, rows)
            symbol = f"quant_linear_{i}_{suffix}"
            kernel = select(static, target).kernel
            functions[symbol] = kernel.prim_func(static, target).with_attr("global_symbol", symbol)
            log.debug("%s: %s", static, kernel.name)
    try:
        built = tvm.compile(tvm.IRModule(functions), target.tvm())
        built.mod.write_to_file(str(out), "o")
    except Exception as error:  # TVM raises whatever its C++ threw
        raise BuildError(f"TVM could not compile the kernels of the ONNX operators: {str(error)[-2000:]}") from error


def _includes() -> list[str]:
    from tvm_ffi import libinfo

    return [f"-I{libinfo.find_include_path()}", f"-I{libinfo.find_dlpack_include_path()}"]
