# SPDX-License-Identifier: Apache-2.0
"""``pack_weights``: quantization codes become the packed layout that the target's kernels read.

An act-order permutation (``g_idx`` not sorted) is applied to the columns here, so that groups lie together, and to the
activation by one gather. Packing happens when the packed tensor is read, one linear at a time.
"""

from __future__ import annotations

import functools

import torch

from gptq_compile.errors import PassError
from gptq_compile.kernels import layouts, pack_torch
from gptq_compile.kernels.target import Target
from gptq_compile.passes.common import Node
from gptq_compile.passes.dialect import packed_case
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.pack_experts import pack_experts, take
from gptq_compile.passes.program import Program, where

ops = torch.ops.gptq_compile


class PackWeights(Pass):
    """Rewrites ``quant_linear`` into ``packed_linear`` for one target.

    Args:
        target: whose layout.
        device: where codes are packed; packed tensors are handed out in host memory.
    """

    name = "pack_weights"
    tolerance = 1e-6  # the reference of a half-precision program dequantizes in another order

    def __init__(self, target: Target, device: str | torch.device = "cpu") -> None:
        self.target = target
        self.device = torch.device(device)

    def run(self, program: Program) -> bool:
        changed = False
        gathers: dict[tuple[Node, tuple[int, ...]], Node] = {}
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target is ops.quant_linear.default:
                self._pack(program, node, gathers)
                changed = True
            elif node.op == "call_function" and node.target is ops.quant_expert_linear.default:
                pack_experts(program, node, self.target)
                changed = True
        if changed:
            for node in list(program.graph.nodes):
                if node.op == "placeholder" and "param" in node.meta and not node.users:
                    program.graph.erase_node(node)
        return changed

    def _pack(self, program: Program, node: Node, gathers: dict) -> None:
        x, codes, _, zeros, g_idx, bias, bits, group = node.args
        params = program.params
        base = codes.meta["param"].removesuffix(".codes")
        out_features, in_features = params.shape(codes.meta["param"])
        order: torch.Tensor | None = None
        if g_idx is not None:
            idx = params.get(g_idx.meta["param"]).long()
            expected = torch.arange(in_features) // group
            if not torch.equal(idx, expected):
                order = torch.argsort(idx, stable=True)
                if not torch.equal(idx[order], expected):
                    raise PassError(f"{where(node)}: g_idx of {base} does not describe groups of {group} columns.")
        case = packed_case(bits, group, in_features, out_features, zeros is not None, bias is not None, "float32")
        layout = layouts.layout_for(case, self.target)
        read = functools.partial(_packed, program.params, base, zeros is not None, order, layout, case, self.device)
        cache: dict[str, torch.Tensor] = {}
        with program.graph.inserting_before(node):
            if order is not None:
                key = (x, tuple(order.tolist()))
                if key not in gathers:
                    index = program.add_param(f"{base}.order", order)
                    gathers[key] = program.call(
                        torch.ops.aten.index_select.default, (x, x.meta["val"].dim() - 1, index), like=node
                    )
                x = gathers[key]
            packed = []
            for suffix, (shape, dtype) in layout.tensors(case).items():
                name = f"{base}.{layout.name}.{suffix}"
                params.add(name, shape, getattr(torch, dtype), functools.partial(take, read, cache, suffix))
                packed.append(program._placeholder(name))
            args = (
                x,
                packed,
                bias,
                ",".join(layout.tensors(case)),
                layout.name,
                bits,
                group,
                out_features,
                zeros is not None,
            )
            new = program.call(ops.packed_linear.default, args, like=node)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)

    def ensures(self, program: Program) -> None:
        for node in program.graph.nodes:
            if node.target in (ops.quant_linear.default, ops.quant_expert_linear.default):
                raise PassError(f"{where(node)} was not packed.")


def _packed(params, base, has_zeros, order, layout, case, device) -> dict[str, torch.Tensor]:
    """Reads one linear's codes and grid and packs them."""
    codes, scales = params.get(f"{base}.codes"), params.get(f"{base}.scales")
    zeros = params.get(f"{base}.zeros") if has_zeros else None
    if device.type != "cpu":
        codes, scales = codes.to(device), scales.to(device)
        codes = codes if order is None else codes[:, order.to(device)]
        zeros = None if zeros is None else zeros.to(device)
        packed = pack_torch.pack(layout, case, codes, scales, zeros)
        return {name: tensor.cpu() for name, tensor in packed.items()}
    codes = codes if order is None else codes[:, order]
    grid = None if zeros is None else zeros.numpy()
    arrays = layout.pack(case, codes.contiguous().numpy(), scales.numpy(), grid)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
