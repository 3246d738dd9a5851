# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels that `build_kernels` built against float64 references; needs numpy and tvm_ffi, no TVM, no torch.

Run from the repository root, where the GPU is::

    PYTHONPATH=. python tests/gpu/check_kernels.py OUT [--device cuda] [--only SUBSTRING] [--seed N] [--benchmark]

Prints one line per check and exits with the number of failures (at most 99). The harness itself
can be tried without a GPU: build ``--target cpu --only linear_`` and check with ``--device cpu``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi
from cases import Arguments, BuiltFor, KernelCase, all_cases

from gptq_compile.kernels.target import Target

LIBRARIES = ("libcudart.so.13", "libtvm_runtime.so", "libtvm_runtime_cuda.so")


class Device:
    """Arrays on a device through the runtime's C interface."""

    def __init__(self, kind: str, libraries: Path) -> None:
        for name in LIBRARIES:
            if (libraries / name).exists():
                ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
        self.device = tvm_ffi.device(kind, 0)
        self._empty = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._sync = tvm_ffi.get_global_func("runtime.Device_StreamSync")

    def put(self, array: np.ndarray) -> Any:
        """Copies an array to the device."""
        result = self._empty(tvm_ffi.Shape(array.shape), tvm_ffi.dtype(str(array.dtype)), self.device, None)
        self._copy(tvm_ffi.from_dlpack(np.ascontiguousarray(array)), result)
        return result

    def get(self, tensor: Any, like: np.ndarray) -> np.ndarray:
        """Copies a tensor back."""
        result = np.empty_like(like)
        self._copy(tensor, tvm_ffi.from_dlpack(result))
        self.synchronize()
        return result

    def synchronize(self) -> None:
        """Waits for everything launched so far."""
        self._sync(self.device, 0)


def _run(case: KernelCase, function: Any, device: Device, seed: int) -> tuple[bool, str]:
    """Runs one check."""
    before = case.make_inputs(np.random.default_rng(seed))
    tensors = [device.put(array) for array in before]
    function(*tensors)
    device.synchronize()
    after: Arguments = [device.get(tensor, array) for tensor, array in zip(tensors, before, strict=True)]
    return case.check(before, after)


def _time(case: KernelCase, function: Any, device: Device) -> str:
    """Returns microseconds per call and GB/s of the arguments, cycling through copies larger than the caches."""
    arrays = case.make_inputs(np.random.default_rng(0))
    size = sum(array.nbytes for array in arrays)
    copies = [[device.put(array) for array in arrays] for _ in range(max(2, min(64, (256 << 20) // size)))]
    for tensors in copies:
        function(*tensors)
    device.synchronize()
    repeats = 10
    start = time.perf_counter()
    for _ in range(repeats):
        for tensors in copies:
            function(*tensors)
    device.synchronize()
    seconds = (time.perf_counter() - start) / (repeats * len(copies))
    return f"{seconds * 1e6:.1f} us, {size / seconds / 1e9:.0f} GB/s"


def main() -> int:
    """Parses the command line and checks; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what build_kernels wrote")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="run only checks whose name contains this")
    parser.add_argument("--seed", type=int, default=None, help="inputs; random when not given")
    parser.add_argument("--benchmark", action="store_true", help="also time each call (includes launch overhead)")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    device = Device(arguments.device, arguments.folder / "lib")
    library = tvm_ffi.load_module(str(arguments.folder / "kernels.so"))
    table = json.loads((arguments.folder / "kernels.json").read_text())
    BuiltFor.target = Target.parse(next(iter(table.values()))["target"])
    failures = 0
    ran = 0
    for case in all_cases():
        if arguments.only not in case.name or case.name not in table:
            continue
        entry = table[case.name]
        function = library.get_function(entry["function"], query_imports=True)
        try:
            passed, said = _run(case, function, device, seed + ran)
        except Exception as error:  # one broken kernel must not hide the others
            passed, said = False, f"{type(error).__name__}: {str(error).splitlines()[-1]}"
        if arguments.benchmark and passed:
            said += f", {_time(case, function, device)}"
        ran += 1
        failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {case.name} [{entry['kernel']}] {said}", flush=True)
    print(f"{ran} checks, {failures} failed, seed {seed}")
    return min(failures, 99) if ran else 99


if __name__ == "__main__":
    sys.exit(main())
