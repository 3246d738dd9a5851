# SPDX-License-Identifier: Apache-2.0
"""The operators of docs/onnx-ops.md: the library against the specification's own text, and an export that uses it."""

from __future__ import annotations

import pathlib
import re
import subprocess
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from gptq_compile.errors import PassError
from gptq_compile.kernels.layouts import LaneInterleaved, grouping_of
from gptq_compile.kernels.target import Target
from gptq_compile.onnx.custom_ops import DOMAIN, column_order
from gptq_compile.onnx.grid import Grid
from gptq_compile.onnx.library.build import build_library
from gptq_compile.passes.dialect import packed_case

SPECIFICATION = pathlib.Path(__file__).resolve().parents[3] / "docs" / "onnx-ops.md"
CASES = (  # bits, group, K, N, zeros, bias, output sizes
    (2, 32, 96, 48, True, False, (48,)),
    (3, 20, 130, 37, True, True, (20, 17)),
    (4, 64, 160, 33, False, True, (1, 16, 16)),
    (8, 96, 96, 16, True, False, (16,)),
)


@pytest.fixture(scope="module")
def specified() -> dict[str, Any]:
    """The functions that the specification gives."""
    blocks = re.findall(r"```python\n(.*?)```", SPECIFICATION.read_text("utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(next(b for b in blocks if "def quant_linear" in b), names)
    return names


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("ops") / "ops.so"
    cases = [packed_case(b, g, k, n, zeros, bias, "float32") for b, g, k, n, zeros, bias, _ in CASES]
    build_library(cases, Target.parse("cpu"), out)
    return out


def session(
    library: pathlib.Path, case: tuple, tensors: dict[str, np.ndarray], bias: np.ndarray | None, rank: int = 2
) -> ort.InferenceSession:
    """A model of one QuantLinear; its weights are initializers, but X is not."""
    bits, group, k, n, _, _, sizes = case
    held = dict(tensors) | ({} if bias is None else {"bias": bias})
    names = ["X", *(name if name in held else "" for name in ("qweight", "scales", "zeros", "bias"))]
    outputs = [f"Y{i}" for i in range(len(sizes))]
    node = helper.make_node(
        "QuantLinear", names, outputs, domain=DOMAIN, in_features=k, out_features=n, bits=bits, group_size=group,
        output_sizes=list(sizes),
    )  # fmt: skip
    dims = [f"d{i}" for i in range(rank - 1)]
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("X", TensorProto.FLOAT, [*dims, k])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [*dims, s]) for y, s in zip(outputs, sizes, strict=True)],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def weights(case: tuple, levels: int | None = None, zero: int | None = None) -> tuple[dict[str, np.ndarray], Any]:
    """Packed tensors with random codes below ``levels``, and a bias."""
    bits, group, k, n, has_zeros, has_bias, _ = case
    rng = np.random.default_rng(bits * 100 + k)
    kernel = packed_case(bits, group, k, n, has_zeros, has_bias, "float32")
    codes = rng.integers(0, levels or 1 << bits, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2, (n, grouping_of(kernel).groups)) / 100).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if zero is None else np.full_like(scales, zero)
    packed = LaneInterleaved().pack(kernel, codes, scales, zeros.astype(np.uint8) if has_zeros else None)
    return packed, rng.normal(size=n).astype(np.float32) if has_bias else None


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}bits")
@pytest.mark.parametrize("lead", [(1,), (1, 1), (5,), (2, 3), (0,)], ids=str)
def test_the_library_does_what_the_specification_says(
    case: tuple, lead: tuple[int, ...], library: pathlib.Path, specified: dict[str, Any]
) -> None:
    bits, group, k, n, _, _, sizes = case
    packed, bias = weights(case)
    x = np.random.default_rng(7).normal(size=(*lead, k)).astype(np.float32)
    got = session(library, case, packed, bias, x.ndim).run(None, {"X": x})
    assert [y.shape for y in got] == [(*lead, size) for size in sizes]
    want = specified["quant_linear"](
        x, packed["qweight"], packed["scales"], packed.get("zeros"), bias, bits, group, n, k
    )
    assert np.sum((np.concatenate(got, -1) - want) ** 2) <= 5e-9 * np.sum(want**2)


def test_ternary_weights(library: pathlib.Path, specified: dict[str, Any]) -> None:
    case = CASES[0]
    packed, _ = weights(case, levels=3, zero=1)
    assert set(np.unique(specified["codes_of"](packed["qweight"], 2, 32, 48, 96))) == {0, 1, 2}
    x = np.eye(96, dtype=np.float32)
    (got,) = session(library, case, packed, None).run(None, {"X": x})
    scales = packed["scales"].astype(np.float32).transpose(0, 2, 1).reshape(48, 3)[:, np.arange(96) // 32]
    assert np.all((got.T == 0) | (np.abs(got.T) == scales)) and np.any(got < 0) and np.any(got > 0)


def test_activations_that_start_anywhere(library: pathlib.Path) -> None:
    case = CASES[0]
    packed, _ = weights(case)
    one = session(library, case, packed, None)
    x = np.random.default_rng(3).normal(size=(4, 96)).astype(np.float32)
    (want,) = one.run(None, {"X": x})
    for offset in (4, 8, 20):
        memory = np.zeros(x.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        shifted = memory[start : start + x.nbytes].view(np.float32).reshape(x.shape)
        shifted[:] = x
        assert np.array_equal(one.run(None, {"X": shifted})[0], want)


def test_threads_may_share_a_session(library: pathlib.Path) -> None:
    case = CASES[1]
    packed, bias = weights(case)
    one = session(library, case, packed, bias)
    inputs = [np.random.default_rng(i).normal(size=(1 + i % 2, 130)).astype(np.float32) for i in range(8)]
    want = [one.run(None, {"X": x}) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not all(map(np.array_equal, one.run(None, {"X": inputs[i]}), want[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_does_not_fit_is_refused(library: pathlib.Path) -> None:
    bits, group, k, n, zeros, bias, sizes = CASES[0]
    packed, _ = weights(CASES[0])
    with pytest.raises(Exception, match="no kernel for a QuantLinear of 96 to 48 features, 2 bits and groups of 16"):
        session(library, (bits, 16, k, n, zeros, bias, sizes), packed, None)
    with pytest.raises(Exception, match="do not add up"):
        session(library, (bits, group, k, n, zeros, bias, (40,)), packed, None)
    without = {name: array for name, array in packed.items() if name != "zeros"}
    with pytest.raises(Exception, match="the same optional inputs"):
        session(library, CASES[0], without, None).run(None, {"X": np.zeros((1, k), np.float32)})
    short = packed | {"qweight": packed["qweight"][:, :-1].copy()}
    with pytest.raises(Exception, match="contradict its attributes"):
        session(library, CASES[0], short, None).run(None, {"X": np.zeros((1, k), np.float32)})


def test_the_library_needs_only_the_c_library(library: pathlib.Path) -> None:
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in linked.splitlines()}
    assert not [n for n in names if not re.match(r"linux-vdso|libc\.|libm\.|libpthread\.|ld-linux|ld64", n)]


def test_columns_are_ordered_by_their_groups() -> None:
    def grid(g_idx: list[int] | None) -> Grid:
        return Grid("layer", 1, 5, 4, 2, None if g_idx is None else np.array(g_idx), False, lambda: None)  # type: ignore

    assert column_order(grid(None)) is None and column_order(grid([0, 0, 1, 1, 2])) is None
    assert column_order(grid([1, 0, 2, 0, 1])).tolist() == [1, 3, 0, 4, 2]  # type: ignore[union-attr]
    with pytest.raises(PassError, match="--ops matmulnbits"):
        column_order(grid([0, 0, 0, 1, 1]))
