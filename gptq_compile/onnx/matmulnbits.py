# SPDX-License-Identifier: Apache-2.0
"""Quantized linears as ``com.microsoft::MatMulNBits``, which ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptq_compile.onnx import blocks as layout
from gptq_compile.onnx.builder import MICROSOFT
from gptq_compile.onnx.grid import Grid, add_weights, gathered


class MatMulNBits:
    """Adds the operator.

    Args:
        accuracy_level: 0 as the runtime chooses, 1 float32, 4 activations rounded to int8.
    """

    divides = False

    def __init__(self, accuracy_level: int = 0) -> None:
        self.accuracy_level = accuracy_level

    def __call__(self, c: Any, x: str, grid: Grid, bias: str, sizes: Sequence[int]) -> tuple[str, ...]:
        """See :class:`gptq_compile.onnx.grid.Product`."""
        blocks = layout.arrange(grid.columns, grid.group_size, grid.g_idx)
        if (gather := blocks.gather) is not None:
            x = gathered(c, x, gather)
        count, field = len(blocks.groups), layout.field_bits(grid.bits)
        tensors: list[tuple[str, tuple[int, ...], Any]] = [
            ("codes", (grid.rows, count, blocks.size * field // 8), np.uint8),
            ("scales", (grid.rows, count), np.float32),
        ]
        if layout.explicit_zeros(grid.bits, grid.has_zeros):
            tensors.append(("zeros", (grid.rows, -(-count * field // 8)), np.uint8))
        weights = add_weights(c.b, grid.name, tensors, lambda: layout.pack(blocks, grid.bits, *grid.read()))
        inputs = [x, *weights, *[""] * (3 - len(weights)), "", bias]  # no g_idx: deprecated, wrong with zero points
        while not inputs[-1]:
            inputs.pop()
        out = c.b.node(
            "MatMulNBits", inputs, domain=MICROSOFT, K=len(blocks.columns), N=grid.rows, bits=field,
            block_size=blocks.size, accuracy_level=self.accuracy_level or None,
        )  # fmt: skip
        return (out,)
