# SPDX-License-Identifier: Apache-2.0
"""Builds every kernel of the case tables into one library, on a machine that needs no GPU.

Run from the repository root::

    PYTHONPATH=. python tests/gpu/build_kernels.py OUT [--target cuda:sm_90] [--only SUBSTRING]...

OUT receives ``kernels.so``, ``kernels.json`` (check name -> function, kernel, target) and the libraries that
`check_kernels` loads.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from cases import BuiltFor, all_cases, symbols

from gptq_compile.kernels.registry import kernels_for, select
from gptq_compile.kernels.runtime_libs import copy_runtime_libraries
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import R, relax, tvm
from gptq_compile.passes.build import build

logger = logging.getLogger("build_kernels")


def _module(target: Target, only: list[str]) -> tuple[object, dict[str, dict[str, str]]]:
    """Returns the module of all PrimFuncs and, per check, its function and kernel."""
    BuiltFor.target = target
    cases = [case for case in all_cases() if not only or any(part in case.name for part in only)]
    names = symbols(cases)
    functions: dict[str, object] = {}
    table: dict[str, dict[str, str]] = {}
    kernels: dict[str, str] = {}
    for case in cases:
        symbol = names[case.name]
        if symbol not in functions:
            if case.kernel is None:
                kernel = select(case.case, target).kernel
            else:
                kernel = next(k for k in kernels_for(target.kind) if k.name == case.kernel)
            func = kernel.prim_func(case.case, target).with_attr("global_symbol", symbol)
            functions[symbol], kernels[symbol] = func, kernel.name
        table[case.name] = {"function": symbol, "kernel": kernels[symbol], "target": str(target)}
    builder = relax.BlockBuilder()
    x = relax.Var("x", R.Tensor((1,), "float32"))
    with builder.function("unused", [x]):
        builder.emit_func_output(x)
    module = builder.get()
    for symbol, func in functions.items():
        module[tvm.ir.GlobalVar(symbol)] = func
    return module, table


def main() -> None:
    """Parses the command line and builds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--only", action="append", default=[], help="build only checks with this in their name")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = Target.parse(arguments.target)
    module, table = _module(target, arguments.only)
    info = build(module, target, arguments.out / "kernels.so")
    copy_runtime_libraries(target, arguments.out / "lib")
    (arguments.out / "kernels.json").write_text(json.dumps(table, indent=1) + "\n")
    functions = len({entry["function"] for entry in table.values()})
    logger.info("%d checks of %d kernels, %.1f MB, %s", len(table), functions, info.size / 1e6, info.archs)


if __name__ == "__main__":
    main()
