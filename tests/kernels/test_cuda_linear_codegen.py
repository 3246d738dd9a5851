# SPDX-License-Identifier: Apache-2.0
"""CUDA quant_linear and linear: the generated source, run by an emulator, against float64; and through nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from gptq_compile.kernels.cuda import linear, mma_linear, quant_linear, warp
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.script import Function, local, script, store
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping

CUDA = Target.parse("cuda:sm_80,sm_90")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def _quant_case(bits, group, k, n, rows, dtype="float16") -> Case:
    return Case.make(
        "quant_linear", dtype, rows, in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=n % 2 == 1, has_bias=k % 4 == 0,
    )  # fmt: skip


def _run_quant(case: Case, rows: int, folder: Path) -> tuple[float, str]:
    """Returns mean|difference| / mean|reference| and the kernel's name."""
    rng = np.random.default_rng(rows)
    n, k, bits = case["out_features"], case["in_features"], case["bits"]
    grouping = Grouping.of(bits, k, case["group_size"])
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / 100).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if case["has_zeros"] else None
    zero = (zeros if zeros is not None else np.full(scales.shape, 1 << (bits - 1))).astype(np.float64)
    x = rng.normal(size=(rows, k)).astype(case.dtype)
    bias = rng.normal(size=n).astype(case.dtype)
    group = np.arange(k) // grouping.group_size
    reference = x.astype(np.float64) @ (scales.astype(np.float64)[:, group] * (codes - zero[:, group])).T
    reference += bias.astype(np.float64) if case["has_bias"] else 0
    out = np.full((rows, n), np.nan, case.dtype)
    kernel = select(case, CUDA, quant_linear.KERNELS).kernel
    tensors = {"x": x, "bias": bias, "out": out, **layout_for(case, CUDA).pack(case, codes, scales, zeros)}
    cuda_emulator.run(kernel.prim_func(case, CUDA), CUDA, tensors, rows, folder)
    return float(np.abs(out - reference).mean() / np.abs(reference).mean()), kernel.name


@needs_gxx
@pytest.mark.parametrize(
    ("bits", "group", "k", "n", "rows", "static", "kernel"),
    [
        (2, 32, 160, 37, 3, True, "decode_mma"),
        (3, 32, 2080, 16, 1, True, "decode_mma"),
        (3, -1, 75, 21, 2, True, "decode_mma"),
        (4, 64, 1088, 18, 8, True, "decode_mma"),
        (8, 40, 130, 19, 5, True, "decode_mma"),
        (2, 16, 130, 19, 17, False, "tiles_mma"),
        (3, 64, 200, 5, 67, False, "tiles_mma"),
        (8, 24, 72, 33, 9, True, "tiles_mma"),
        pytest.param(4, 128, 256, 2065, 1, False, "tiles_mma", marks=pytest.mark.slow),
        (3, 7, 50, 5, 6, False, "plain"),
    ],
)
def test_quant_linear_matches_float64(bits, group, k, n, rows, static, kernel, tmp_path):
    case = _quant_case(bits, group, k, n, rows if static else None)
    error, name = _run_quant(case, rows, tmp_path)
    assert name == f"cuda.quant_linear.{kernel}"
    assert error < 1e-3


@needs_gxx
def test_float32_activations_take_the_plain_kernel(tmp_path):
    error, name = _run_quant(_quant_case(4, 100, 130, 9, 2, "float32"), 2, tmp_path)
    assert name == "cuda.quant_linear.plain"
    assert error < 1e-6


@needs_gxx
@pytest.mark.parametrize(
    ("k", "n", "rows", "static", "kernel"),
    [(136, 35, 3, True, "decode_mma"), (136, 20, 66, False, "tiles_mma"), (45, 33, 5, False, "plain")],
)
def test_linear_matches_float64(k, n, rows, static, kernel, tmp_path):
    rng = np.random.default_rng(k)
    case = Case.make(
        "linear", "float16", rows if static else None, in_features=k, out_features=n, has_bias=True, out_dtype="float32"
    )
    x, w = rng.normal(size=(rows, k)).astype(np.float16), rng.normal(size=(n, k)).astype(np.float16)
    bias, out = rng.normal(size=n).astype(np.float16), np.full((rows, n), np.nan, np.float32)
    picked = select(case, CUDA, linear.KERNELS).kernel
    assert picked.name == f"cuda.linear.{kernel}"
    cuda_emulator.run(picked.prim_func(case, CUDA), CUDA, {"x": x, "w": w, "bias": bias, "out": out}, rows, tmp_path)
    reference = x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64)
    assert np.abs(out - reference).mean() / np.abs(reference).mean() < 1e-5


@needs_gxx
@pytest.mark.parametrize("whole", (True, False))
def test_registers_filled_by_a_function_keep_their_size(whole, tmp_path):
    # Named by one element, the array is cut off after it. nvcc then dropped code; the emulator has to notice.
    with Function("copy") as f:
        x, out = f.tensor("x", (4,), "uint32"), f.tensor("out", (1,), "uint32")
        with script().launch_thread("blockIdx.x", 1), script().launch_thread("threadIdx.x", 32):
            words = local(4, "uint32")
            target = warp.private_address(words) if whole else warp.address(words, 0)
            warp.load_words(4, target, warp.address(x, 0))
            store(out, (0,), words[1])
    tensors = {"x": np.arange(5, 9, dtype=np.uint32), "out": np.zeros(1, np.uint32)}
    if whole:
        cuda_emulator.run(f.result(), CUDA, tensors, 1, tmp_path)
        assert tensors["out"] == 6
    else:
        with pytest.raises(AssertionError, match="declared extent"):
            cuda_emulator.run(f.result(), CUDA, tensors, 1, tmp_path)


def test_staged_activations_keep_their_padding():
    case = _quant_case(4, 32, 128, 16, None)
    func = select(case, CUDA, quant_linear.KERNELS).kernel.prim_func(case, CUDA)
    words = int(re.search(r"__shared__ alignas\(\d+\) uint \w+\[(\d+)\]", cuda_emulator.cuda_source(func, CUDA))[1])
    used = mma_linear.TILE_CODES // 2
    assert words == mma_linear.TILE_TOKENS * (used + 8) - 8  # nothing follows the last row


@needs_nvcc
def test_nvcc_makes_machine_code_without_spills(tmp_path):
    case = _quant_case(3, 128, 4096, 4096, 1)
    func = select(case, CUDA, quant_linear.KERNELS).kernel.prim_func(case, CUDA)
    assert _spill_free(cuda_emulator.cuda_source(func, CUDA), 90, tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_nvcc_makes_tiles_without_spills(bits, arch, tmp_path):
    case = _quant_case(bits, 32, 4096, 4096, None)
    func = select(case, CUDA, quant_linear.KERNELS).kernel.prim_func(case, CUDA)
    assert _spill_free(cuda_emulator.cuda_source(func, CUDA), arch, tmp_path)


def _spill_free(source: str, arch: int, folder: Path) -> bool:
    (folder / "kernel.cu").write_text(source)
    command = ["nvcc", "-std=c++17", "-w", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
    done = subprocess.run(
        [*command, "-o", str(folder / "kernel.cubin"), str(folder / "kernel.cu")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return "0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_refusals_are_words():
    case = _quant_case(4, 20, 100, 8, 1)
    reasons = dict(select(case, CUDA, quant_linear.KERNELS).refused)
    assert reasons == {
        "cuda.quant_linear.decode_mma": "needs groups of whole units of 8 codes, not 20",
        "cuda.quant_linear.tiles_mma": "needs groups of whole units of 8 codes, not 20",
    }
    reasons = dict(select(_quant_case(4, 32, 64, 8, 9), CUDA, quant_linear.KERNELS).refused)
    assert reasons == {"cuda.quant_linear.decode_mma": "is for 1 to 8 rows known at compile time, not 9"}
