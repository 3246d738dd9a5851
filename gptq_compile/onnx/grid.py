# SPDX-License-Identifier: Apache-2.0
"""A quantized matrix on its way into a graph, whatever operator will multiply by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Codes = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]


@dataclass(frozen=True)
class Grid:
    """Codes on grids, not read yet.

    Attributes:
        name: what its tensors are called after. ``rows``, ``columns``: output and input features.
        bits: 2, 3, 4 or 8. ``group_size``: columns of a group.
        g_idx: the group of each column, or None where groups lie in order.
        has_zeros: whether grids have zero points.
        read: loads codes ``[rows, columns]``, scales ``[rows, groups]`` and zero points like them or None.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int
    g_idx: NDArray[np.integer] | None
    has_zeros: bool
    read: Callable[[], Codes]


class Product(Protocol):
    """What multiplies by a quantized matrix.

    Attributes:
        divides: whether it makes several outputs of one matrix.
    """

    divides: bool

    def __call__(self, c: Any, x: str, grid: Grid, bias: str, sizes: Sequence[int]) -> tuple[str, ...]:
        """Adds ``x @ weight.T + bias`` to the graph of a lowering.

        Args:
            c: the lowering. ``x``: a float32 value ``[..., columns]``. ``grid``: the matrix.
            bias: a float32 value ``[rows]``, or the empty string.
            sizes: features of each output; one output unless ``divides``.

        Returns:
            Names of the outputs.
        """
        ...


def add_weights(
    b: Any, base: str, tensors: Sequence[tuple[str, tuple[int, ...], Any]], pack: Callable[[], Any]
) -> list[str]:
    """Registers tensors that are packed together, when the first of them is written, and then forgotten.

    Args:
        b: the graph. ``base``: what names start with.
        tensors: suffix, shape and type of each.
        pack: makes all of them, in order.

    Returns:
        Their names.
    """
    made: list[Any] = []

    def load(i: int) -> Any:
        if not made:
            made.extend(pack())
        value = made[i]
        if i == len(tensors) - 1:
            made.clear()
        return value

    return [
        b.weight(f"{base}.{suffix}", shape, dtype, lambda i=i: load(i))
        for i, (suffix, shape, dtype) in enumerate(tensors)
    ]


def gathered(c: Any, x: str, index: NDArray[np.integer]) -> str:
    """``x`` with its features in another order; linears that want the same share it."""
    name = c.b.constant(index, np.int64)
    return c.once(("gather", x, name), lambda: c.b.node("Gather", [x, name], axis=-1))
