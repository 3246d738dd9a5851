# SPDX-License-Identifier: Apache-2.0
"""Kernels for 64-bit ARM compile to its machine code; nothing here runs it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gptq_compile.errors import BuildError
from gptq_compile.kernels import toolchain
from gptq_compile.kernels.cpu import byte_codes
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.runtime_libs import runtime_libraries
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import relax, tvm
from gptq_compile.passes.build import build

ARM = Target.parse("cpu:aarch64+dotprod")
_EM_AARCH64 = 183  # ELF for the ARM 64-bit architecture, section 4.1
_SDOT = (0xFFE0FC00, 0x4E809400)  # SDOT Vd.4S, Vn.16B, Vm.16B (the same), and with one lane of Vm
_SDOT_LANE = (0xFFC0F400, 0x4F80E000)
_FMLA = (0xFFE0FC00, 0x4E20CC00)  # FMLA Vd.4S, Vn.4S, Vm.4S (ARM architecture reference manual, C7.2)


def _module() -> tuple[object, list[str]]:
    """A Relax module with a decode step's kernels, and their names."""
    linear = {"in_features": 256, "out_features": 64, "group_size": 64, "has_zeros": True, "has_bias": False}
    heads = {"heads": 6, "kv_heads": 2, "head_dim": 64, "v_head_dim": 64, "page_size": 16, "scale": 0.125}
    options = {"window": 0, "softcap": 0.0, "has_sinks": False, "has_alibi": False}
    cases = [
        Case.make("quant_linear", "float32", rows, bits=bits, activations=activations, **linear)
        for rows, bits, activations in ((1, 4, "float"), (1, 3, "int8"), (None, 4, "float"), (None, 2, "int8"))
    ] + [
        Case.make("paged_attention", "float32", rows, **heads, **options, cache_dtype=cache)
        for rows, cache in ((1, "float32"), (None, "float16"), (1, "int8"))
    ]
    builder, names = relax.BlockBuilder(), []
    for i, case in enumerate(cases):
        func = select(case, ARM).kernel.prim_func(case, ARM)
        names.append(f"kernel_{i}")
        builder.add_func(func.with_attr("global_symbol", names[-1]), names[-1])
    x = relax.Var("x", relax.TensorType([4], "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(x)
    return builder.get(), names


def test_kernels_become_arm_machine_code(tmp_path: Path) -> None:
    module, names = _module()
    info = build(module, ARM, tmp_path / "model.a")
    assert info.archs == ("aarch64+dotprod",)
    subprocess.run(["ar", "x", info.path], cwd=tmp_path, check=True)
    objects = sorted(tmp_path.glob("*.o"))
    symbols = subprocess.run(["nm", info.path], capture_output=True, text=True, check=True).stdout
    assert all(f"T __tvm_ffi_{name}\n" in symbols for name in names), symbols[:2000]
    code = b""
    for path in objects:
        data = path.read_bytes()
        assert data[:4] == b"\x7fELF" and int.from_bytes(data[18:20], "little") == _EM_AARCH64, path.name
        code += data[: len(data) // 4 * 4]
    words = np.frombuffer(code, "<u4")
    assert _count(words, _FMLA) > 50, "sums are not vectors"
    assert _count(words, _SDOT) + _count(words, _SDOT_LANE) > 100, "bytes are not multiplied four at a time"


def _count(words: np.ndarray, pattern: tuple[int, int]) -> int:
    """How many instructions are of a kind, given as mask and bits."""
    return int(((words & pattern[0]) == pattern[1]).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 4, None])
def test_dot_products_are_taken_where_the_processor_has_them(bits: int, rows: int | None) -> None:
    case = Case.make(
        "quant_linear", "float32", rows, bits=bits, activations="int8", in_features=192, out_features=40,
        group_size=64, has_zeros=True, has_bias=False,
    )  # fmt: skip
    name = "cpu.quant_linear.int8_few" if rows else "cpu.quant_linear.int8_many"
    chosen = select(case, ARM)
    assert chosen.kernel.name == name
    assembly = tvm.compile(chosen.kernel.prim_func(case, ARM), target=ARM.tvm()).mod.inspect_source("asm")
    # A block of codes is some vectors of four a lane; a tile of 16 rows is four registers for each of them.
    vectors = 4 * len(byte_codes.free_shifts(ARM, bits))
    assert len(re.findall(r"\tsdot\tv", assembly)) >= vectors * (rows or 1)
    without = select(case, Target.parse("cpu:aarch64"))
    assert without.kernel.name != name and "dotprod" in dict(without.refused)[name]


def test_what_linking_for_arm_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    with pytest.raises(BuildError, match=r"aarch64-linux-gnu-gcc was not found.*build model\.a"):
        build(_module()[0], ARM, tmp_path / "model.so")
    with pytest.raises(BuildError, match="runtime libraries for it, which no wheel here has"):
        runtime_libraries(ARM)
