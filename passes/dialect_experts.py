# SPDX-License-Identifier: Apache-2.0
"""Dialect ops of quantized mixtures of experts: `expert_linear` on codes, and on codes in a kernel's packed layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_compile.passes.dialect import NAMESPACE, dequantize, expert_linear


def dequantize_experts(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> Tensor:
    """Float32 weights ``[experts, N, K]`` of codes ``[experts, N, K]`` with grids ``[experts, N, groups]``."""
    flat = [None if t is None else t.flatten(0, 1) for t in (codes, scales, zeros)]
    return dequantize(flat[0], flat[1], flat[2], None, bits, group).reshape(codes.shape)  # type: ignore[arg-type]


@torch.library.custom_op(f"{NAMESPACE}::quant_expert_linear", mutates_args=())
def quant_expert_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    expert: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """:func:`expert_linear` with ``W[e, n, k] = scales[e, n, k // g] * (codes[e, n, k] - zeros[e, n, k // g])``.

    Shapes: x ``[..., K]``; codes uint8 ``[experts, N, K]``; scales float32 ``[experts, N, groups]`` holding float16
    values; zeros uint8 ``[experts, N, groups]``, or None for ``2^(bits-1)``; expert int64 ``[...]``; bias
    ``[experts, N]``.
    """
    return expert_linear(x, dequantize_experts(codes, scales, zeros, bits, group_size), expert, bias)


@quant_expert_linear.register_fake
def _(x, codes, scales, zeros, expert, bias, bits, group_size):
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def expert_case(
    experts: int,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    has_zeros: bool,
    has_bias: bool,
    dtype: str,
    rows: int | None = None,
) -> Any:
    """The kernel case of a packed linear of experts."""
    from gptq_compile.kernels.registry import Case

    return Case.make(
        "quant_expert_linear",
        dtype,
        rows,
        experts=experts,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        has_zeros=has_zeros,
        has_bias=has_bias,
    )


@torch.library.custom_op(f"{NAMESPACE}::packed_expert_linear", mutates_args=())
def packed_expert_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    expert: Tensor,
    bias: Tensor | None,
    suffixes: str,
    layout: str,
    bits: int,
    group_size: int,
    experts: int,
    out_features: int,
    has_zeros: bool,
) -> Tensor:
    """:func:`quant_expert_linear` on weights in a kernel's packed layout, all experts' rows below one another.

    Args:
        x: ``[..., K]``. ``expert``: ``[...]``. ``bias``: ``[experts, N]`` or None.
        packed: the layout's tensors; ``suffixes`` names them in order, separated by commas.
        layout: a name known to ``kernels.layouts``.
        bits, group_size, experts, out_features, has_zeros: of every expert.
    """
    from gptq_compile.kernels import layouts

    case = expert_case(experts, bits, group_size, x.shape[-1], out_features, has_zeros, bias is not None, "float32")
    slab, form = layouts.slab_case(case), layouts.by_name(layout)
    arrays = {name: t.numpy(force=True) for name, t in zip(suffixes.split(","), packed, strict=True)}
    scales, zeros = form.unpack_grid(slab, arrays)
    codes = torch.from_numpy(form.unpack(slab, arrays))
    points = None if zeros is None else torch.from_numpy(zeros)
    weight = dequantize(codes, torch.from_numpy(scales), points, None, bits, group_size)
    weight = weight.reshape(experts, -1, weight.shape[1])[:, :out_features].to(x.device)
    return expert_linear(x, weight, expert, bias)


@packed_expert_linear.register_fake
def _(x, packed, expert, bias, suffixes, layout, bits, group_size, experts, out_features, has_zeros):
    return x.new_empty((*x.shape[:-1], out_features))
