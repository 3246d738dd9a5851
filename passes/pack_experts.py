# SPDX-License-Identifier: Apache-2.0
"""Packing of quantized linears of experts: all experts' rows below one another in the target's layout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptq_compile.kernels import layouts
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from gptq_compile.passes.common import Node
from gptq_compile.passes.dialect_experts import expert_case
from gptq_compile.passes.program import ParamStore, Program

ops = torch.ops.gptq_compile


def pack_experts(program: Program, node: Node, target: Target) -> None:
    """Rewrites one ``quant_expert_linear`` into ``packed_expert_linear``."""
    x, codes, _, zeros, expert, bias, bits, group = node.args
    params = program.params
    base = codes.meta["param"].removesuffix(".codes")
    experts, out_features, in_features = params.shape(codes.meta["param"])
    case = expert_case(experts, bits, group, in_features, out_features, zeros is not None, bias is not None, "float32")
    slab = layouts.slab_case(case)
    layout = layouts.layout_for(slab, target)
    read = functools.partial(_packed, params, base, layout, slab, layouts.padded_rows(case))
    cache: dict[str, torch.Tensor] = {}
    tensors = layout.tensors(slab)
    with program.graph.inserting_before(node):
        packed = []
        for suffix, (shape, dtype) in tensors.items():
            name = f"{base}.{layout.name}.{suffix}"
            params.add(name, shape, getattr(torch, dtype), functools.partial(take, read, cache, suffix))
            packed.append(program._placeholder(name))
        args = (x, packed, expert, bias, ",".join(tensors), layout.name, bits, group, experts, out_features,
                zeros is not None)  # fmt: skip
        new = program.call(ops.packed_expert_linear.default, args, like=node)
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)


def _packed(params: ParamStore, base: str, layout: layouts.Layout, slab: Case, padded: int) -> dict[str, torch.Tensor]:
    """Reads the experts' codes and grids, pads each to whole tiles of rows, and packs them."""

    def rows(part: str) -> torch.Tensor:
        cube = params.get(f"{base}.{part}")
        return F.pad(cube, (0, 0, 0, padded - cube.shape[1])).flatten(0, 1)

    zeros = rows("zeros").numpy() if slab["has_zeros"] else None
    arrays = layout.pack(slab, rows("codes").numpy(), rows("scales").numpy(), zeros)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def take(read: Callable[[], dict[str, torch.Tensor]], cache: dict[str, torch.Tensor], suffix: str) -> torch.Tensor:
    """Packs once for all tensors of a linear: they are read one after another; each is handed out and forgotten."""
    if suffix not in cache:
        cache.clear()
        cache.update(read())
    return cache.pop(suffix)
