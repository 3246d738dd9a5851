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

from gptq_compile.kernels.cuda import (
    linear,
    mma_linear,
    pipeline_choice,
    pipeline_linear,
    quant_linear,
    resident,
    stationary,
    stream,
    tile_linear,
    warp,
    wgmma,
    wgmma_choice,
    wgmma_linear,
)
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.script import Function, local, script, store
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping
from tests.kernels.op_runner import needs_gxx

CUDA = Target.parse("cuda:sm_80,sm_90")
HOPPER = Target.parse("cuda:sm_90a")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def _quant_case(bits, group, k, n, rows, dtype="float16") -> Case:
    return Case.make(
        "quant_linear", dtype, rows, in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=n % 2 == 1, has_bias=k % 4 == 0,
    )  # fmt: skip


def _run_quant(
    case: Case, rows: int, folder: Path, target: Target = CUDA, plan: wgmma.Plan | None = None
) -> tuple[float, str]:
    """Returns mean|difference| / mean|reference| and the kernel's name, which is wgmma where there is a plan."""
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
    kernel = select(case, target, quant_linear.KERNELS).kernel
    tensors = {"x": x, "bias": bias, "out": out, **layout_for(case, target).pack(case, codes, scales, zeros)}
    if kernel.name.endswith(".pipeline") and case.rows is None:
        # Several kernels otherwise: the emulator runs one.
        config = pipeline_choice.best(tile_linear.shape_of(case), rows, target.archs, False, False)
        func = pipeline_linear.build(case, target, [(None, config)])
    else:
        func = wgmma_linear.build(case, target, plan) if plan else kernel.prim_func(case, target)
    cuda_emulator.run(func, target, tensors, rows, folder)
    return float(np.abs(out - reference).mean() / np.abs(reference).mean()), kernel.name


@needs_gxx
@pytest.mark.parametrize(
    ("bits", "group", "k", "n", "rows", "static", "kernel"),
    [
        (2, 16, 160, 37, 3, True, "decode_mma"),
        (3, -1, 75, 21, 2, True, "decode_mma"),
        (8, 40, 130, 19, 5, True, "decode_mma"),
        (2, 16, 130, 19, 17, False, "tiles_mma"),
        (8, 24, 72, 33, 9, True, "tiles_mma"),
        pytest.param(4, 8, 256, 2065, 1, False, "tiles_mma", marks=pytest.mark.slow),
        (3, 7, 50, 5, 6, False, "plain"),
        (4, 128, 256, 37, 1, True, "stream"),
        (4, 64, 1088, 18, 8, True, "stationary"),
        (3, 32, 160, 37, 9, True, "stationary"),
        (2, 96, 264, 33, 16, True, "stationary"),
        (8, -1, 136, 19, 5, True, "stationary"),
        (4, 128, 576, 40, 17, True, "pipeline"),
        (3, 32, 160, 37, 70, False, "pipeline"),
        (2, 64, 200, 21, 1, False, "pipeline"),
        (8, -1, 136, 19, 5, False, "pipeline"),
        pytest.param(4, 128, 256, 2065, 3, False, "pipeline", marks=pytest.mark.slow),
    ],
)
def test_quant_linear_matches_float64(bits, group, k, n, rows, static, kernel, tmp_path):
    case = _quant_case(bits, group, k, n, rows if static else None)
    error, name = _run_quant(case, rows, tmp_path)
    assert name == f"cuda.quant_linear.{kernel}"
    assert error < 1e-3


@needs_gxx
@pytest.mark.parametrize(
    ("bits", "group", "k", "n", "rows", "kernel"),
    [
        (4, 128, 256, 40, 17, "wgmma"),
        (3, 32, 160, 37, 33, "wgmma"),
        (2, 96, 264, 33, 16, "stationary"),
        (8, -1, 136, 19, 4, "stream"),
        (3, 32, 328, 37, 7, "stationary"),
        pytest.param(4, 256, 584, 297, 40, "wgmma", marks=pytest.mark.slow),
        pytest.param(8, -1, 136, 19, 64, "wgmma", marks=pytest.mark.slow),
        pytest.param(4, 64, 328, 139, 140, "wgmma", marks=pytest.mark.slow),
    ],
)
def test_hopper_kernels_match_float64(bits, group, k, n, rows, kernel, tmp_path):
    error, name = _run_quant(_quant_case(bits, group, k, n, rows), rows, tmp_path, HOPPER)
    assert name == f"cuda.quant_linear.{kernel}"
    assert error < 1e-3


@needs_gxx
@pytest.mark.parametrize(
    "config",
    [
        wgmma.Config(2, 1, 16, 3, 3, 3),
        wgmma.Config(1, 2, 8, 3, 3),
        pytest.param(wgmma.Config(2, 2, 32, 4, 4, 2), marks=pytest.mark.slow),
        pytest.param(wgmma.Config(3, 1, 128, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_hopper_divisions_match_float64(config, tmp_path):
    # Several tiles of tokens, blocks of a cluster without the same share of K, rows of no tile, groups inside a unit.
    case = _quant_case(4, 64, 1096, 203, None)
    error, _ = _run_quant(case, 41, tmp_path, HOPPER, [(None, config)])
    assert error < 1e-3


@needs_gxx
@pytest.mark.parametrize(
    ("bits", "group", "rows", "config"),
    [
        (2, 64, 1, stream.Config(4, 1, 2, 4, 2)),
        (3, 32, 3, stream.Config(4, 1, 2, 3, 1)),
        (3, 96, 1, stream.Config(2, 2, 1, 4, 2)),
        (3, 128, 1, stream.Config(2, 1, 1, 3, 4)),
        (2, 32, 2, stream.Config(2, 1, 2, 3, 4)),
        (4, 128, 2, stream.Config(8, 2, 2, 3, 1)),
        (4, 32, 10, stream.Config(8, 1, 1, 4, 2)),
        (8, -1, 1, stream.Config(4, 1, 1, 3, 2)),
    ],
)
def test_a_block_takes_tile_after_tile(bits, group, rows, config, tmp_path, monkeypatch):
    # One block for 19 tiles: several side by side, several rounds, an odd tile at the end, and half a turn of K.
    monkeypatch.setattr(stream, "BLOCKS", 1)
    monkeypatch.setattr(stream, "choose", lambda shape, archs: config)
    monkeypatch.setattr(stationary, "MAX_ROWS", 0)
    error, name = _run_quant(_quant_case(bits, group, 328, 297, rows), rows, tmp_path)
    assert name == "cuda.quant_linear.stream"
    assert error < 1e-3


@needs_gxx
def test_codes_meet_activations_exactly(tmp_path):
    # Whole scales, and activations with few bits: every product and sum is exact in float32, so the result is.
    case = Case.make(
        "quant_linear", "float16", 2, in_features=256, out_features=20, bits=4, group_size=128, has_zeros=True,
        has_bias=False, out_dtype="float32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (20, 256), dtype=np.uint8), rng.integers(0, 16, (20, 2), dtype=np.uint8)
    scales = rng.integers(1, 2000, (20, 2)).astype(np.float32) / np.float32(2048)
    x, out = rng.integers(-9, 10, (2, 256)).astype(np.float16), np.full((2, 20), np.nan, np.float32)
    tensors = {"x": x, "out": out, **layout_for(case, CUDA).pack(case, codes, scales, zeros)}
    for kernel in (k for k in quant_linear.KERNELS if k.name.endswith(("quant_linear.stream", ".pipeline"))):
        out[:] = np.nan
        cuda_emulator.run(kernel.prim_func(case, CUDA), CUDA, tensors, 2, tmp_path / kernel.name)
        weight = np.repeat(scales, 128, 1) * (codes.astype(np.float32) - np.repeat(zeros, 128, 1))
        np.testing.assert_array_equal(out, x.astype(np.float64) @ weight.astype(np.float64).T)


@needs_gxx
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_90a"])
def test_digits_follow_the_largest_activation_of_a_run(target, tmp_path):
    # Runs of very different size in one row, subnormal halves, an outlier, a run of zeros, and infinity in a token.
    built = Target.parse(target)
    case = Case.make(
        "quant_linear", "float16", 3, in_features=384, out_features=24, bits=3, group_size=64, has_zeros=False,
        has_bias=False, out_dtype="float32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (24, 384), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (24, 6)).astype(np.float16).astype(np.float32)
    sizes = np.repeat([[3e4, 1e-7, 1, 0, 1e-3, 1], [1, 1, 2e-5, 50, 1, 1], [1, 1, 1, 1, 1, 1]], 64, 1)
    x = (rng.uniform(-1, 1, (3, 384)) * sizes).astype(np.float16)
    x[1, 7], x[2, 300] = 1000, np.inf
    out = np.full((3, 24), np.nan, np.float32)
    tensors = {"x": x, "out": out, **layout_for(case, built).pack(case, codes, scales, None)}
    kernel = next(k for k in quant_linear.KERNELS if k.name.endswith("quant_linear.stream"))
    cuda_emulator.run(kernel.prim_func(case, built), built, tensors, 3, tmp_path)
    weight = np.repeat(scales, 64, 1).astype(np.float64) * (codes - 4.0)
    # Half a unit, 2**-14 of the largest activation of a run, each.
    runs = np.abs(x[:2].astype(np.float64)).reshape(2, 6, 64).max(2).repeat(64, 1)
    bound = 2.0**-14 * runs @ np.abs(weight).T + 1e-6
    assert (np.abs(out[:2] - x[:2].astype(np.float64) @ weight.T) <= bound).all()
    assert np.isnan(out[2]).all()


@needs_gxx
@pytest.mark.parametrize(
    ("k", "n", "rows", "static", "kernel"),
    [
        (136, 35, 3, True, "rows"),
        (136, 20, 66, False, "tiles_mma"),
        (45, 33, 5, False, "plain"),
    ],
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
    case = _quant_case(4, 8, 128, 16, None)
    func = select(case, CUDA, quant_linear.KERNELS).kernel.prim_func(case, CUDA)
    words = int(re.search(r"__shared__ alignas\(\d+\) uint \w+\[(\d+)\]", cuda_emulator.cuda_source(func, CUDA))[1])
    used = mma_linear.TILE_CODES // 2
    assert words == mma_linear.TILE_TOKENS * (used + 8) - 8  # nothing follows the last row


@needs_nvcc
@pytest.mark.parametrize(("group", "name"), [(128, "stream"), (8, "decode_mma")])
def test_nvcc_makes_machine_code_without_spills(group, name, tmp_path):
    case = _quant_case(4, group, 4096, 4096, 1)
    kernel = select(case, CUDA, quant_linear.KERNELS).kernel
    assert kernel.name == f"cuda.quant_linear.{name}"
    assert _spill_free(cuda_emulator.cuda_source(kernel.prim_func(case, CUDA), CUDA), 90, tmp_path)


@needs_nvcc
@pytest.mark.parametrize(("bits", "k", "n"), [(3, 4096, 28672), (2, 4096, 28672)])
def test_seven_tiles_side_by_side_have_registers_for_one_block(bits, k, n, tmp_path):
    target = Target.parse("cuda:sm_90")
    case = _quant_case(bits, 128, k, n, 1)
    source = cuda_emulator.cuda_source(select(case, target).kernel.prim_func(case, target), target)
    assert "__launch_bounds__(448, 1)" in source
    assert _spill_free(source, 90, tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(("group", "rows"), [(16, None), (128, None), (32, None), (128, 1), (32, 8), (128, 16)])
def test_nvcc_makes_tiles_without_spills(bits, arch, group, rows, tmp_path):
    if bits == 3 and group == 16:
        pytest.skip("3-bit rows are packed 32 codes at a time")
    case = _quant_case(bits, group, 4096, 4096, rows)
    func = select(case, CUDA, quant_linear.KERNELS).kernel.prim_func(case, CUDA)
    # To stay within launch bounds ptxas spills one register (3 bits, groups of 32, 8 rows: 64 of them) or two (4 bits,
    # groups of 128, any number of rows: the division for up to 32 of them, in 128).
    assert _spill_free(cuda_emulator.cuda_source(func, CUDA), arch, tmp_path, allowed=8)


@needs_nvcc
@pytest.mark.parametrize("rows", [16, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (32, 64, 128, 4096))])
@pytest.mark.parametrize(
    ("bits", "group"),
    [(4, 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 32), (2, 64), (8, -1)))],
)
def test_hopper_kernel_is_not_serialized(bits, group, rows, tmp_path):
    # ptxas makes wgmma wait, and says so, where it cannot follow what is under way.
    case = _quant_case(bits, group, 4096, 4097, None)
    config = wgmma_choice.best(stream.Shape(0, 4097, Grouping.of(bits, 4096, group), True), rows)
    source = cuda_emulator.cuda_source(wgmma_linear.build(case, HOPPER, [(None, config)]), HOPPER)
    assert _spill_free(source, "90a", tmp_path)


@needs_nvcc
def test_registers_move_between_warps(tmp_path):
    # Only where a kernel says how many blocks a multiprocessor has to hold.
    case = _quant_case(4, 128, 4096, 4096, None)
    source = cuda_emulator.cuda_source(wgmma_linear.build(case, HOPPER), HOPPER)
    assert "setmaxnreg" in source and "__launch_bounds__(384, 1)" in source


def _spill_free(source: str, arch: int | str, folder: Path, allowed: int = 0) -> bool:
    (folder / "kernel.cu").write_text(source)
    command = ["nvcc", "-std=c++17", "-w", "-Xptxas", "-v", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin"]
    done = subprocess.run(
        [*command, "-o", str(folder / "kernel.cubin"), str(folder / "kernel.cu")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    spilled = max(int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stderr))
    return spilled <= allowed and "Performance Loss" not in done.stderr


HOPPER_ALONE = {"cuda.quant_linear.wgmma": "is for whole tiles on a target of sm_90a alone"}


def test_hopper_kernels_are_for_hopper_alone():
    case = _quant_case(4, 128, 4096, 4096, None)
    assert select(case, HOPPER, quant_linear.KERNELS).kernel.name == "cuda.quant_linear.wgmma"
    for target in ("cuda:sm_90", "cuda:sm_90,sm_90a", "cuda"):
        assert select(case, Target.parse(target), quant_linear.KERNELS).kernel.name == "cuda.quant_linear.pipeline"
        assert layout_for(case, Target.parse(target)).name == "fragment_tiles"
    assert layout_for(case, HOPPER).name == "natural_tiles"


def test_refusals_are_words():
    case = _quant_case(4, 20, 100, 8, 1)
    reasons = dict(select(case, CUDA, quant_linear.KERNELS).refused)
    tiles = "is for whole tiles and needs in_features to be a multiple of 8, not 100"
    assert reasons == {
        **{
            f"cuda.quant_linear.{name}": tiles
            for name in ("stationary", "resident", "stream", "pipeline", "plain_tiles")
        },
        **HOPPER_ALONE,
        "cuda.quant_linear.decode_mma": "needs groups of whole units of 8 codes, not 20",
        "cuda.quant_linear.tiles_mma": "needs groups of whole units of 8 codes, not 20",
    }
    reasons = dict(select(_quant_case(4, 16, 64, 8, 9), CUDA, quant_linear.KERNELS).refused)
    assert reasons["cuda.quant_linear.decode_mma"] == "is for 1 to 8 rows known at compile time, not 9"
    assert reasons["cuda.quant_linear.pipeline"] == (
        "is for whole tiles and needs groups of a multiple of 32 codes, not 16"
    )
    reasons = dict(select(_quant_case(4, 32, 64, 8, None), CUDA, quant_linear.KERNELS).refused)
    few = [f"cuda.quant_linear.{name}" for name in ("stationary", "resident", "stream")]
    symbolic = dict.fromkeys(few, "is for 1 to 16 rows known at compile time, not symbolic")
    assert reasons == symbolic | HOPPER_ALONE
    reasons = dict(select(_quant_case(4, 128, 14336, 4096, 16), CUDA, quant_linear.KERNELS).refused)
    many = {
        "cuda.quant_linear.stationary": "16 rows of 14336 are more than the registers of a block hold",
        "cuda.quant_linear.resident": "shares K among the blocks of a cluster, from sm_90 on",
        "cuda.quant_linear.stream": "16 rows of 14336 do not fit in shared memory beside the weights",
    }
    assert reasons == many | HOPPER_ALONE
    reasons = dict(select(_quant_case(4, 128, 65536, 4096, 9), HOPPER, quant_linear.KERNELS).refused)
    assert reasons["cuda.quant_linear.stream"] == "is slower than wgmma from 9 rows on"
    for bits, k, most in ((4, 4096, 3), (3, 4096, 4), (4, 14336, 2), (2, 14336, 2), (3, 14336, 3)):
        for rows, slower in ((most, True), (most + 1, False)):
            selection = select(_quant_case(bits, 128, k, 4096, rows), HOPPER, quant_linear.KERNELS)
            assert (
                selection.kernel.name
                == f"cuda.quant_linear.{'stream' if slower else 'stationary' if k == 4096 else 'resident'}"
            )
    reasons = dict(select(_quant_case(4, 128, 256, 8, 9, "float32"), HOPPER, quant_linear.KERNELS).refused)
    assert reasons["cuda.quant_linear.pipeline"] == "needs float16 activations, not float32"


@pytest.mark.parametrize("has_zeros", (True, False))
@pytest.mark.parametrize("group", (-1, 32, 64, 128))
@pytest.mark.parametrize(("k", "n"), [(4096, 28672), (14336, 4096), (576, 192), (64, 16), (49152, 12288)])
def test_hopper_plans_fit_and_ascend(k, n, group, has_zeros):
    for bits in (2, 3, 4, 8):
        shape = stream.Shape(0, n, Grouping.of(bits, k, group), has_zeros)
        plan = wgmma_choice.choose(shape)
        limits = [most for most, _ in plan]
        assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
        for most, config in plan:
            assert wgmma.shared_bytes(shape, config) <= 227 << 10
            assert config.stages >= 3 and config.depth >= 3
            assert config.tokens >= min(most or 128, 128)


@pytest.mark.parametrize("archs", [("sm_90",), ("sm_80", "sm_89", "sm_90"), ("sm_80",)])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(("k", "n"), [(4096, 28672), (14336, 4096), (576, 192), (64, 16), (49152, 12288)])
def test_divisions_fit_in_shared_memory(k, n, rows, archs):
    limit = min({"sm_80": 163, "sm_89": 99, "sm_90": 227}[arch] for arch in archs) * 1024
    for bits in (2, 3, 4, 8):
        shape = stream.Shape(rows, n, Grouping.of(bits, k, 128), False)
        config = stream.choose(shape, archs)
        if config is None:
            assert rows * k * 2 > limit // 4
        else:
            assert stream.shared_bytes(shape, config) < limit
            assert config.depth >= 2 and config.splits <= shape.units
            assert config.tiles * config.splits * 32 <= 1024


@pytest.mark.parametrize(("archs", "together"), [(("sm_90",), 228), (("sm_90a",), 228), (("sm_120",), 100)])
@pytest.mark.parametrize(("k", "n"), [(4096, 28672), (14336, 4096), (576, 192)])
def test_two_blocks_of_overlapping_launches_do_not_fit_on_a_multiprocessor(k, n, archs, together):
    grouping = Grouping.of(4, k, 128)
    config = stream.choose(stream.Shape(1, n, grouping, False), archs)
    apart, overlapping = (stream.Shape(1, n, grouping, False, dependent=value) for value in (False, True))
    asked = stream.launch_bytes(overlapping, config, archs)
    assert 2 * (asked + 1024) > together * 1024 and asked < together * 1024
    assert stream.launch_bytes(apart, config, archs) == stream.shared_bytes(apart, config)


@pytest.mark.parametrize("archs", [("sm_90",), ("sm_80", "sm_89", "sm_90"), ("sm_80",)])
@pytest.mark.parametrize("rows", [3, 8, 16])
@pytest.mark.parametrize(("k", "n"), [(4096, 28672), (14336, 4096), (576, 192), (64, 16), (49152, 12288)])
def test_divisions_that_keep_activations_cover_k_and_fit(k, n, rows, archs):
    limit = min({"sm_80": 163, "sm_89": 99, "sm_90": 227}[arch] for arch in archs) * 1024
    for bits in (2, 3, 4, 8):
        shape = stream.Shape(rows, n, Grouping.of(bits, k, 128), False)
        for config in stationary.divisions(shape, archs):
            assert config.warps * config.units >= shape.units and config.warps <= 16
            assert stationary.shared_bytes(shape, config) < limit
        for config in resident.divisions(shape, archs):
            assert config.splits * config.parts * resident.units(shape, config) >= shape.units and config.warps <= 16
            assert resident.shared_bytes(shape, config) < limit
        config = stationary.choose(shape, archs)
        kept = config or resident.choose(shape, archs)
        assert archs != ("sm_90",) or rows * k > 16 * 14336 or kept is not None
        if config is not None:
            assert config.depth >= 3 and 1 <= config.early <= 2 * config.depth - 2
