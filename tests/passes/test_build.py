# SPDX-License-Identifier: Apache-2.0
"""A built library runs without TVM's compiler and holds machine code for every architecture asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gptq_compile.errors import BuildError, OutputError
from gptq_compile.kernels import toolchain
from gptq_compile.kernels.runtime_libs import copy_runtime_libraries
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import I, R, T, tvm
from gptq_compile.passes import build as build_module
from gptq_compile.passes.build import build, gencode_flags, relax_passes
from gptq_compile.passes.default_schedule import is_scheduled

WIDTH = 256
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not installed")


@I.ir_module
class Sample:
    """One in-place kernel, and elementwise and reduction operators no kernel exists for."""

    @T.prim_func(private=True, s_tir=True)
    def add_rows(rows: T.handle, cache: T.handle):
        n = T.int64()
        X = T.match_buffer(rows, (n, 256), "float32")
        C = T.match_buffer(cache, (16, 256), "float32")
        for i, j in T.grid(n, 256):
            with T.sblock("append"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = C[vi, vj] + X[vi, vj]

    @R.function
    def main(
        x: R.Tensor(("n", 256), "float32"),
        pair: R.Tuple(R.Tensor((256,), "float32"), R.Tensor((16, 256), "float32")),
    ) -> R.Tuple(R.Tensor(("n",), "float32"), R.Tensor(("n", 256), "float32"), R.Tensor((16, 256), "float32")):
        R.func_attr({"tir_var_upper_bound": {"n": 16}})
        cls = Sample
        with R.dataflow():
            weight = pair[0]
            cache = pair[1]
            scaled = R.multiply(x, weight)
            normed = R.nn.rms_norm(scaled, weight, axes=-1)
            mean = R.mean(R.add(normed, x), axis=-1)
            kept = R.call_tir_inplace(
                cls.add_rows, (scaled, cache), inplace_indices=1, out_ty=R.Tensor((16, 256), "float32")
            )
            R.output(mean, normed, kept)
        return (mean, normed, kept)


RUN = textwrap.dedent(
    """
    import ctypes, json, sys
    sys.modules["torch"] = None  # tvm_ffi imports torch when it can
    import numpy as np, tvm_ffi

    folder = sys.argv[1]
    ctypes.CDLL(folder + "/lib/libtvm_runtime.so", mode=ctypes.RTLD_GLOBAL)
    library = tvm_ffi.load_module(folder + "/model.so")
    vm = library["vm_load_executable"]()
    vm["vm_initialization"](1, 0, 2)
    data = np.load(folder + "/in.npz")
    # np.load may return arrays at any address; TVM's code may use aligned loads.
    empty = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    def tensor(array):
        made = empty(tvm_ffi.Shape(array.shape), tvm_ffi.dtype(str(array.dtype)), tvm_ffi.device("cpu", 0), None)
        np.from_dlpack(made)[...] = array
        return made
    cache = tensor(data["cache"])
    out = vm["main"](tensor(data["x"]), tvm_ffi.convert((tensor(data["w"]), cache)))
    mean, normed, kept = (np.from_dlpack(t) for t in out)
    np.savez(folder + "/out.npz", mean=mean, normed=normed, kept=kept, cache=np.from_dlpack(cache))
    maps = open("/proc/self/maps").read()
    print(json.dumps({"modules": sorted(m for m in sys.modules if m.split(".")[0] in ("tvm", "torch") and sys.modules[m]),
                      "mapped": sorted({l.split()[-1] for l in maps.splitlines() if "libtvm" in l})}))
    """
)


def test_cpu_library_runs_without_the_compiler(tmp_path: Path) -> None:
    target = Target.parse("cpu")
    info = build(Sample, target, tmp_path / "model.so")
    assert info.size == (tmp_path / "model.so").stat().st_size > 0
    assert info.archs == ("x86-64-v3",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.so"], "scratch files were left"
    copy_runtime_libraries(target, tmp_path / "lib")

    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, WIDTH)).astype(np.float32)
    w = rng.standard_normal(WIDTH).astype(np.float32)
    cache = rng.standard_normal((16, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, w=w, cache=cache)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TVM_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["modules"] == []
    assert not [path for path in seen["mapped"] if "libtvm_compiler" in path]
    assert str(tmp_path / "lib" / "libtvm_runtime.so") in seen["mapped"]

    scaled = x.astype(np.float64) * w
    normed = scaled / np.sqrt((scaled**2).mean(-1, keepdims=True) + 1e-5) * w
    cache64 = cache.astype(np.float64)
    cache64[:5] += scaled
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["normed"], normed, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(out["mean"], (normed + x).mean(-1), rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(out["kept"], cache64, rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(out["cache"], out["kept"], err_msg="the cache was copied, not changed in place")
