# SPDX-License-Identifier: Apache-2.0
"""Quantized linears as ``gptq_compile::QuantLinear``, whose specification is docs/onnx-ops.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptq_compile.errors import PassError
from gptq_compile.kernels.layouts import LaneInterleaved
from gptq_compile.kernels.registry import Case
from gptq_compile.onnx.grid import Grid, add_weights, gathered
from gptq_compile.passes.dialect import packed_case

DOMAIN, VERSION = "gptq_compile", 1


class QuantLinear:
    """Adds the operator.

    Attributes:
        cases: the kernels that a library for the graph needs, each once.
    """

    divides = True

    def __init__(self) -> None:
        self.cases: dict[Case, None] = {}

    def __call__(self, c: Any, x: str, grid: Grid, bias: str, sizes: Sequence[int]) -> tuple[str, ...]:
        """See :class:`gptq_compile.onnx.grid.Product`.

        Raises:
            PassError: the columns' groups are not of one size.
        """
        order = column_order(grid)
        if order is not None:
            x = gathered(c, x, order)
        case = packed_case(grid.bits, grid.group_size, grid.columns, grid.rows, grid.has_zeros, bool(bias), "float32")
        self.cases[case] = None
        layout = LaneInterleaved()
        tensors = [(name, shape, np.dtype(dtype)) for name, (shape, dtype) in layout.tensors(case).items()]

        def pack() -> list[NDArray[Any]]:
            codes, scales, zeros = grid.read()
            if order is not None:
                codes = np.ascontiguousarray(codes[:, order])
            return list(layout.pack(case, codes, scales, zeros).values())

        weights = add_weights(c.b, grid.name, tensors, pack)
        inputs = [x, *weights, *[""] * (3 - len(weights)), bias]
        while not inputs[-1]:
            inputs.pop()
        c.b.domains[DOMAIN] = VERSION
        label = c.b.unique(grid.name + ".product")
        outputs = [label] if len(sizes) == 1 else [f"{label}.{i}" for i in range(len(sizes))]
        c.b.node(
            "QuantLinear", inputs, outputs, domain=DOMAIN, in_features=grid.columns, out_features=grid.rows,
            bits=grid.bits, group_size=grid.group_size, output_sizes=list(sizes),
        )  # fmt: skip
        return tuple(outputs)


def column_order(grid: Grid) -> NDArray[np.integer] | None:
    """The columns in an order in which groups lie together, or None if they do.

    Raises:
        PassError: groups are not all of ``group_size`` columns (but the last).
    """
    if grid.g_idx is None:
        return None
    expected = np.arange(grid.columns) // grid.group_size
    if np.array_equal(grid.g_idx, expected):
        return None
    order = np.argsort(grid.g_idx, kind="stable")
    if not np.array_equal(grid.g_idx[order], expected):
        raise PassError(
            f"The groups of {grid.name} are not of {grid.group_size} columns each, which QuantLinear needs; export it "
            "with --ops matmulnbits."
        )
    return order
