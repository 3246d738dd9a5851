# SPDX-License-Identifier: Apache-2.0
"""How a row of activations is cut where the CPU rounds it: each piece has its own scale.

A piece is a group of weights, or a part of a larger group. Groups of the rounded row start on whole blocks of codes.
"""

from __future__ import annotations

from gptq_compile.kernels.layouts import grouping_of
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.words import Grouping, block_codes, block_words

LEAST_GROUP = 16
"""Smaller groups spend their time on scales."""


def why_not(case: Case) -> Refusal | None:
    """Says why activations of a quant_linear are not rounded by pieces, whatever the processor."""
    if case.dtype != "float32" or case.get("out_dtype", "float32") != "float32":
        return Refusal("is for float32 activations and outputs")
    try:
        grouping = grouping_of(case)
    except ValueError as error:
        return Refusal(str(error))
    if min(grouping.group_size, grouping.in_features) < LEAST_GROUP:
        return Refusal(f"is for groups of {LEAST_GROUP} and more")
    return None


class Pieces:
    """How a row is cut into pieces of at most ``most`` features.

    Attributes:
        runs: equal groups as (first group, count, sizes of each one's pieces).
        per_group: pieces of a full group. ``count``: of a row.
        group_span: features of the rounded row from one group to the next. ``padded``: of the row.
    """

    def __init__(self, grouping: Grouping, most: int) -> None:
        def cut(size: int) -> tuple[int, ...]:
            return (most,) * (size // most) + ((size % most,) if size % most else ())

        self.grouping = grouping
        full = grouping.groups - (grouping.last_size != grouping.group_size)
        self.runs = [(0, full, cut(grouping.group_size))] if full else []
        if full < grouping.groups:
            self.runs.append((full, 1, cut(grouping.last_size)))
        self.per_group = len(cut(grouping.group_size))
        self.count = grouping.groups * self.per_group
        self.group_span = grouping.group_words // block_words(grouping.bits) * block_codes(grouping.bits)
        self.padded = grouping.groups * self.group_span
