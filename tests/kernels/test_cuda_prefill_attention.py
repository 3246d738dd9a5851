# SPDX-License-Identifier: Apache-2.0
"""Flash attention over pages for CUDA: the generated source, run by an emulator, against float64; and its refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from gptq_compile.kernels.cuda import prefill_attention
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from tests.gpu.cases_attention import attention
from tests.gpu.op_case import OpCase, mismatch
from tests.kernels.op_runner import needs_gxx, needs_nvcc
from tests.kernels.test_cuda_linear_codegen import _spill_free

CUDA = Target.parse("cuda:sm_80,sm_90")
CHECKS = [
    (attention("float16", None, 4, 2, 32, longest=90), 37),
    (attention("float16", None, 7, 1, 16, longest=150), 11),
    (attention("float16", None, 3, 3, 16, window=20, sinks=True), 70),
    (attention("float16", None, 4, 2, 48, 32, window=33, softcap=20.0, sinks=True, alibi=True, longest=60), 19),
]


def _run(check: OpCase, arrays: list[np.ndarray], folder: Path) -> None:
    func = prefill_attention.KERNELS[0].prim_func(check.case, CUDA)
    names = [p.name.removesuffix("_ptr") for p in func.params]
    cuda_emulator.run(func, CUDA, dict(zip(names, arrays, strict=True)), arrays[0].shape[0], folder)


@needs_gxx
@pytest.mark.parametrize(("check", "n"), CHECKS, ids=[check.name for check, _ in CHECKS])
def test_flash_attention_matches_float64(check: OpCase, n: int, tmp_path: Path) -> None:
    before = check.make_inputs(np.random.default_rng(n), n)
    after = [a.copy() for a in before]
    _run(check, after, tmp_path)
    wrong = mismatch(check, before, after)
    assert wrong is None, wrong
    expected = check.reference(before)[len(before) - 1]
    assert np.abs(after[-1] - expected).mean() < 1e-3 * np.abs(expected).mean()


@needs_gxx
def test_a_prompt_of_several_tiles(tmp_path: Path) -> None:
    # Causal from the first token on, and a token in no place, which sees nothing.
    check, n = attention("float16", None, 8, 2, 16, longest=140), 131
    before = check.make_inputs(np.random.default_rng(5), n)
    before[4][:], before[3][:] = 4, np.arange(n)
    before[3][-1] = -1
    after = [a.copy() for a in before]
    _run(check, after, tmp_path)
    expected = check.reference([a[:-1] if i in (0, 3, 4, 6) else a for i, a in enumerate(before)])[6]
    assert np.abs(after[-1][:-1] - expected).mean() < 1e-3 * np.abs(expected).mean()
    assert not after[-1][-1].any()


def test_few_tokens_and_other_types_are_refused() -> None:
    def reason(dtype: str, rows: int | None, dim: int) -> str:
        case = Case.make("paged_attention", dtype, rows, heads=4, kv_heads=2, head_dim=dim)
        selection = select(case, CUDA)
        return dict(selection.refused).get("cuda.paged_attention.flash", selection.kernel.name)

    assert reason("float16", None, 128) == "cuda.paged_attention.flash"
    assert reason("float32", None, 128) == "multiplies float16 on tensor cores, not float32"
    assert reason("float16", 8, 128) == "is for any number of tokens, and the 8 of this case are few"
    assert reason("float16", None, 256) == "needs a head_dim that is a multiple of 16 up to 128, not 256"


@needs_nvcc
@pytest.mark.parametrize("arch", [80, "90a"])
def test_nvcc_keeps_everything_in_registers(arch: int | str, tmp_path: Path) -> None:
    case = Case.make("paged_attention", "float16", None, heads=32, kv_heads=8, head_dim=128)
    func = prefill_attention.KERNELS[0].prim_func(case, CUDA)
    assert _spill_free(cuda_emulator.cuda_source(func, CUDA), arch, tmp_path)
