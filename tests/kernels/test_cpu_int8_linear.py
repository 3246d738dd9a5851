# SPDX-License-Identifier: Apache-2.0
"""The 8-bit quant_linear of the CPU against float64, exactly where activations are rounded as it does, in two ISAs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from gptq_compile.kernels.cpu import byte_codes
from gptq_compile.kernels.cpu.int8_linear import KERNELS
from gptq_compile.kernels.cpu.int8_rows import piece
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.script import script
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.kernels.words import Grouping
from tests.kernels.cpu_linears import linear_case, nmse, operands, run_linear

AVX2 = Target.parse("cpu")
VNNI = Target.parse("cpu:x86-64-v4+avx512vnni")
ARM = Target.parse("cpu:aarch64+dotprod")


@functools.cache
def _runs_vnni() -> bool:
    features = tvm.target.codegen.llvm_get_cpu_features(
        tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    )
    return {"avx512vnni", "avx512bw", "avx512vl"} <= {str(feature) for feature in features}


def _case(*sizes: int | None, activations: str = "int8", **attrs: Any) -> Case:
    return linear_case(*sizes, activations=activations, **attrs)


def _rounded(x: np.ndarray, case: Case) -> np.ndarray:
    """Activations as the kernel sees them: int8 with one scale a piece of a group."""
    grouping = Grouping.of(case["bits"], case["in_features"], case["group_size"])
    result = np.zeros(x.shape)
    for group in range(grouping.groups):
        end = min(x.shape[1], (group + 1) * grouping.group_size)
        for start in range(group * grouping.group_size, end, piece(case)):
            part = slice(start, min(end, start + piece(case)))
            top = np.abs(x[:, part]).max(axis=1, keepdims=True)
            inverse = np.where(top > 0, np.float32(127) / np.maximum(top, np.float32(1e-36)), np.float32(0))
            result[:, part] = np.rint(x[:, part] * inverse) * (top * np.float32(1 / 127)).astype(np.float64)
    return result


def _portable_sdot(total: Any, codes: Any, values: Any) -> Any:
    """What ARM's instruction does, for any processor: four products of signed bytes in each lane of 32 bits."""
    ir = script()
    for byte in range(4):
        up, down = (ir.Broadcast(ir.int32(n), 4) for n in (24 - 8 * byte, 24))
        code, value = ((ir.reinterpret("int32x4", part) << up) >> down for part in (codes, values))
        total = total + code * value
    return total


def _run(target: Target, case: Case, x: np.ndarray, codes: np.ndarray, zeros: np.ndarray | None) -> tuple:
    """Returns (kernel output, reference on rounded activations, reference)."""
    if target is VNNI and not _runs_vnni():
        pytest.skip("this processor has no AVX-512 VNNI")
    with pytest.MonkeyPatch.context() as patch:
        if target is ARM:
            patch.setattr(byte_codes, "_sdot", _portable_sdot)
        ran = run_linear(KERNELS, case, target, x, codes, zeros, AVX2 if target is ARM else None)
    with np.errstate(invalid="ignore"):
        rounded = _rounded(x, case)
    return ran.got, ran.reference(rounded), ran.reference(x)


_SHAPES = ((128, 576, 48, 1, True), (20, 130, 37, 3, True), (-1, 300, 17, 8, True), (32, 96, 16, 1, False),
           (33, 210, 50, 29, False), (-1, 216, 33, 13, False))  # fmt: skip
# Written out for another processor many rows take ten seconds to compile: one width stands for all.
_CASES = [
    (target, bits, *shape)
    for target in (AVX2, VNNI, ARM)
    for bits in (2, 3, 4, 8)
    for shape in _SHAPES
    if target is not ARM or shape in _SHAPES[:2] or (bits == 3 and shape == _SHAPES[4])
]


@pytest.mark.parametrize(("target", "bits", "group", "k", "n", "rows", "static"), _CASES, ids=str)
def test_matches_float64(target, bits, group, k, n, rows, static):
    case = _case(bits, group, k, n, rows if static else None, zeros=group != -1 and bits != 8, bias=n % 2 == 1)
    x, codes, zeros = operands(case, rows, seed=bits * 1000 + k)
    got, same_rounding, exact = _run(target, case, x, codes, zeros)
    assert nmse(got, same_rounding) < 1e-11
    assert nmse(got, exact) < 2e-4


@pytest.mark.parametrize("target", (AVX2, VNNI), ids=str)
def test_rows_beyond_one_chunk_of_the_cache(target, monkeypatch):
    monkeypatch.setattr("gptq_compile.kernels.cpu.int8_linear.CHUNK_BYTES", 64 * 24)
    case = _case(4, 32, 64, 32, None)
    got, same_rounding, _ = _run(target, case, *operands(case, 67, seed=1))
    assert nmse(got, same_rounding) < 1e-11


@pytest.mark.parametrize("target", (AVX2, VNNI, ARM), ids=str)
@pytest.mark.parametrize(("code", "zero"), [(255, 0), (0, 255), (255, 255)])
def test_the_largest_sums_are_exact(target, code, zero):
    case = _case(8, -1, 512, 16, 2)
    x = np.full((2, 512), 127.0, np.float32)
    x[1] *= -1
    got, _, exact = _run(target, case, x, np.full((16, 512), code, np.uint8), np.full((16, 1), zero, np.uint8))
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("target", (AVX2, VNNI, ARM), ids=str)
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_codes_that_stay_shifted_do_not_saturate(target, bits):
    case = _case(bits, -1, 512, 16, 1)
    x = np.full((1, 512), -127.0, np.float32)
    largest = np.full((16, 512), (1 << bits) - 1, np.uint8)
    got, _, exact = _run(target, case, x, largest, np.zeros((16, 1), np.uint8))
    np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_activations_of_zero_and_tiny_ones():
    case = _case(4, 32, 64, 16, 3)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (16, 64), dtype=np.uint8)
    x = np.full((3, 64), 1e-40, np.float32)
    x[1] = rng.normal(size=64) * 1e-25
    x[2, 32:] = 1.0  # one group of zeros
    x[2, :32] = 0.0
    got, same_rounding, _ = _run(AVX2, case, x, codes, rng.integers(0, 16, (16, 2), dtype=np.uint8))
    assert not got[0].any()
    np.testing.assert_allclose(got[1:], same_rounding[1:], rtol=1e-4, atol=1e-28)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("rows", (1, None))
def test_what_is_not_finite_stays_so(value, rows):
    x = np.ones((1, 64), np.float32)
    x[0, 40] = value
    got, _, _ = _run(AVX2, _case(4, 32, 64, 16, rows), x, np.full((16, 64), 9, np.uint8), np.full((16, 2), 8, np.uint8))
    assert not np.isfinite(got).any()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_the_order_of_bytes_names_every_code_once(bits):
    codes = byte_codes.order(bits)
    assert sorted(codes) == list(range(len(codes)))


def test_is_chosen_where_it_was_asked_for_alone():
    assert select(_case(4, 128, 256, 64, 1), AVX2).kernel is KERNELS[0]
    assert select(_case(4, 128, 256, 64, None), AVX2).kernel is KERNELS[1]
    assert select(_case(4, 128, 256, 64, 9), AVX2).kernel is KERNELS[1]
    for case in (_case(4, 128, 256, 64, 1, activations="float"), _case(4, 8, 256, 64, 1),
                 _case(4, 128, 256, 64, 1, dtype="float16")):  # fmt: skip
        selection = select(case, AVX2)
        assert selection.kernel not in KERNELS
        assert selection.refused[0][0] == KERNELS[0].name
    refusal = KERNELS[1].can_implement(_case(4, 128, 256, 64, 1), Target.parse("cpu:aarch64"))
    assert refusal is not None and "AVX2" in refusal.reason
