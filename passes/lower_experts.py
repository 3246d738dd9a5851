# SPDX-License-Identifier: Apache-2.0
"""Lowering of mixtures of experts: the choice of experts, and linears whose weight is chosen row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptq_compile.errors import PassError
from gptq_compile.kernels.registry import Case
from gptq_compile.passes.common import with_defaults
from gptq_compile.passes.dialect_experts import expert_case
from gptq_compile.passes.program import where

aten = torch.ops.aten


def _dtype(node: Any) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _expert_linear(entry: Any, node: Any) -> Any:
    x, weight, expert, *rest = node.args
    bias, transposed = with_defaults(rest, [None, False])
    experts, a, b = (int(d) for d in weight.meta["val"].shape)
    n, k = (b, a) if transposed else (a, b)
    value, rows = entry.flat(x)
    chosen, _ = entry.flat(expert, 0)
    case = Case.make(
        "expert_linear", _dtype(x), rows if isinstance(rows, int) else None, experts=experts, in_features=k,
        out_features=n, has_bias=bias is not None, transposed=bool(transposed), weight_dtype=_dtype(weight),
    )  # fmt: skip
    args = [value, entry.env[weight], chosen] + ([entry.env[bias]] if bias is not None else [])
    return entry.shaped(entry.kernels.call(case, args, [rows, n], _dtype(node)), node)


def _packed_expert_linear(entry: Any, node: Any) -> Any:
    x, packed, expert, bias, _, _, bits, group, experts, out_features, has_zeros = node.args
    value, rows = entry.flat(x)
    chosen, _ = entry.flat(expert, 0)
    case = expert_case(
        experts, bits, group, int(x.meta["val"].shape[-1]), out_features, has_zeros, bias is not None, _dtype(x),
        rows if isinstance(rows, int) else None,
    )  # fmt: skip
    args = [value, *(entry.env[p] for p in packed), chosen] + ([entry.env[bias]] if bias is not None else [])
    return entry.shaped(entry.kernels.call(case, args, [rows, out_features], _dtype(node)), node)


def _ranked(entry: Any, node: Any) -> list[Any]:
    """``topk`` and ``sort``: the values and their indices, best first, along the last axis."""
    from gptq_compile.kernels.tvm_env import relax

    x = node.args[0]
    rank, width = x.meta["val"].dim(), x.meta["val"].shape[-1]
    if node.target is aten.topk.default:
        settings: dict[str, Any] = {"k": None, "dim": -1, "largest": True}
    else:
        settings = {"dim": -1, "largest": False}
    settings |= dict(zip(settings, node.args[1:], strict=False)) | dict(node.kwargs)
    if "descending" in settings:
        settings["largest"] = settings["descending"]
    if settings["dim"] % rank != rank - 1 or not isinstance(width, int):
        raise PassError(f"{where(node)} ranks along dimension {settings['dim']}; only the last one has a kernel.")
    k = int(settings.get("k", width))
    value, rows = entry.flat(x)
    case = Case.make(
        "topk", _dtype(x), rows if isinstance(rows, int) else None, width=width, k=k, largest=bool(settings["largest"])
    )
    made = entry.kernels.call_many(case, [value], [([rows, k], _dtype(x)), ([rows, k], "int64")])
    shape = [*entry.shape(x)[:-1], k]
    return [entry.builder.emit(relax.op.reshape(v, shape)) for v in made]


RULES: dict[Any, Callable[[Any, Any], Any]] = {
    torch.ops.gptq_compile.expert_linear.default: _expert_linear,
    torch.ops.gptq_compile.packed_expert_linear.default: _packed_expert_linear,
    aten.topk.default: _ranked,
    aten.sort.default: _ranked,
}
