# SPDX-License-Identifier: Apache-2.0
"""``insert_kv_cache``: attention over a whole sequence becomes attention of ragged tokens over a paged cache.

1. The program gains inputs ``seq_of_token [n]``, ``slots [n]``, ``page_table [b, p]`` (int32) and a key and a value
   cache a layer, ``[pages, kv_heads, page_size, head_dim]``.
2. Each ``attention`` becomes ``paged_attention`` on its layer's caches.
3. The selection of ``logit_rows`` moves up through everything that works row by row, so that only the rows asked for
   reach lm_head.

Everything but attention treats tokens independently (``check_token_parallel``), so the n tokens of one call may
belong to any number of sequences: a prefill is many tokens of one, a decode step one token of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from gptq_compile.errors import PassError
from gptq_compile.passes.evaluate import PAGE_SIZE
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

ops = torch.ops.gptq_compile
aten = torch.ops.aten

# Ops whose first argument carries the rows and whose other tensor arguments are parameters (or none).
_ROWWISE = {
    aten.linear.default, ops.quant_linear.default, ops.packed_linear.default, ops.rms_norm.default,
    ops.layer_norm.default, aten.layer_norm.default, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor,
    aten.tanh.default, aten.neg.default, aten._to_copy.default, aten.to.dtype, aten.gelu.default, aten.relu.default,
    aten.silu.default, aten.sigmoid.default, aten.mul.Scalar, aten.div.Scalar,
}  # fmt: skip


class InsertKvCache(Pass):
    """See the module's rules."""

    name = "insert_kv_cache"

    def requires(self, program: Program) -> None:
        if not any(n.target is ops.attention.default for n in program.graph.nodes) and not self._done(program):
            raise PassError("The program has no attention to cache.")

    @staticmethod
    def _done(program: Program) -> bool:
        return any(n.name == "page_table" for n in program.inputs)

    def run(self, program: Program) -> bool:
        if self._done(program):
            return False
        tokens = program.input("input_ids").meta["val"].shape[1]
        seq_of_token = program.add_input("seq_of_token", (tokens,), torch.int32)
        slots = program.add_input("slots", (tokens,), torch.int32)
        page_table = program.add_input("page_table", _symbols(program, "page_table", 2), torch.int32)
        pages = _symbols(program, "pages", 1)[0]
        positions = program.input("position_ids")
        layer = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not ops.attention.default:
                continue
            q, k, v, *rest = node.args
            caches = []
            for letter, source in (("k", k), ("v", v)):
                _, _, heads, dim = source.meta["val"].shape
                shape = (pages, heads, PAGE_SIZE, dim)
                caches.append(program.add_input(f"{letter}_cache_{layer}", shape, source.meta["val"].dtype))
            with program.graph.inserting_before(node):
                paged = program.call(
                    ops.paged_attention.default,
                    (q, k, v, *caches, positions, seq_of_token, slots, page_table, *rest),
                    dict(node.kwargs),
                    like=node,
                )
            node.replace_all_uses_with(paged)
            program.graph.erase_node(node)
            layer += 1
        self._raise_row_selection(program)
        return True

    def _raise_row_selection(self, program: Program) -> None:
        select = program.output
        if select.target is not aten.index_select.default or select.args[1] != 1:
            raise PassError("The program's output is not a selection of rows of the logits.")
        rows = select.args[2]
        source: Any = select.args[0]
        chain: list[fx.Node] = []
        while isinstance(source, fx.Node) and source.op == "call_function" and source.target in _ROWWISE:
            if len(source.users) != 1 or not _only_first_has_rows(source):
                break
            chain.append(source)
            source = source.args[0]
        if not chain:
            return
        with program.graph.inserting_before(chain[-1]):
            value = program.call(aten.index_select.default, (source, 1, rows), like=chain[-1])
            for node in reversed(chain):
                value = program.call(node.target, (value, *node.args[1:]), dict(node.kwargs), like=node)
        select.replace_all_uses_with(value)
        program.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))

    def ensures(self, program: Program) -> None:
        left = [n for n in program.graph.nodes if n.target is ops.attention.default]
        if left:
            raise PassError(f"{len(left)} attention nodes were not given a cache.")


def _only_first_has_rows(node: fx.Node) -> bool:
    rank = node.args[0].meta["val"].dim() if isinstance(node.args[0], fx.Node) else 0
    others = [n for n in node.all_input_nodes if n is not node.args[0]]
    return rank == 3 and all("param" in n.meta for n in others)


def _symbols(program: Program, name: str, count: int) -> tuple[torch.SymInt, ...]:
    """Fresh symbolic sizes."""
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * count)
    example = torch.empty([5 + 2 * i for i in range(count)], device="meta")
    fake = program.fake_mode.from_tensor(example, symbolic_context=context, source=ConstantSource(name))
    return tuple(fake.shape)  # type: ignore[arg-type]
