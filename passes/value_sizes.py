# SPDX-License-Identifier: Apache-2.0
"""How large the values of a program are, and what running a stretch of it holds at once, forward and back.

Shapes and types come from running the program's ops on meta tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.passes.common import Node
from gptq_compile.passes.interpret import Interpreter, fused_ops
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import params_of
from gptq_compile.passes.stages import live_values

aten = torch.ops.aten
ops = torch.ops.gptq_compile

_TEMPORARIES = {
    ops.rms_norm.default: 12,
    ops.layer_norm.default: 8,
    ops.rotary_embedding.default: 16,
    ops.gated_act.default: 8,
}
"""Bytes per element of the result that an op's reference holds besides operands and result, all of them float32."""

_SAVED: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (),
    aten.embedding.default: (),
    aten.add.Tensor: (),
    aten.sub.Tensor: (),
    aten.reshape.default: (),
    aten.unsqueeze.default: (),
    aten.transpose.int: (),
    aten.cat.default: (),
    aten._to_copy.default: (),
    ops.rms_norm.default: (0,),
    ops.layer_norm.default: (0,),
    ops.rotary_embedding.default: (),
    ops.gated_act.default: (0, 1),
    ops.attention.default: (0, 1, 2),
}
"""Which operands of an op its derivative reads (parameters aside, which have none); of others, all and the result."""

_TAPE = {ops.gated_act.default: 4}
_TAPE_HALF = {
    ops.gated_act.default: 12,
    ops.rms_norm.default: 4,
    ops.layer_norm.default: 4,
}
"""Bytes per element of the result that the tape holds besides, where an op's definition runs (on 16-bit values)."""


class _ShapeInterpreter(Interpreter):
    """Runs on meta tensors: shapes and types, no values."""

    def param(self, node: fx.Node) -> Tensor:
        shape = self.program.params.shape(node.meta["param"])
        return torch.empty(shape, dtype=self.param_dtype(node), device="meta")

    def call(self, node: Node, env: dict[Node, Any], sequences: int) -> Any:
        look = env.__getitem__
        return self._call(
            node.target, fx.node.map_arg(node.args, look), fx.node.map_arg(node.kwargs, look), sequences, False
        )


class ValueSizes:
    """Sizes in bytes, of one call.

    Args:
        program: in sequence form.
        device: where it is going to run.
        dtype: in which type, see `Interpreter`.
        per_call: sequences of a call. ``tokens``: of a sequence.

    Attributes:
        values: node -> its value on meta.
    """

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype, per_call: int, tokens: int) -> None:
        self.program, self.device, self.dtype = program, device, dtype
        self.per_call, self.tokens = per_call, per_call * tokens
        self.half = dtype != torch.float32
        self.fused = device.type == "cuda" and bool(fused_ops())
        self.order = [n for n in program.graph.nodes if n.op == "call_function"]
        self.values = self._values()

    def _values(self) -> dict[Node, Any]:
        """Every value on meta, for the tokens of one call."""
        interpreter = _ShapeInterpreter(self.program, "meta", self.dtype)
        n = self.tokens
        whole = {"input_ids": (1, n), "position_ids": (1, n), "logit_rows": (n,)}
        env: dict[Node, Any] = {
            node: torch.empty(whole[node.name], dtype=torch.int64, device="meta") for node in self.program.inputs
        }
        for node in self.order:
            for arg in node.all_input_nodes:
                if arg not in env and "param" in arg.meta:
                    env[arg] = interpreter.param(arg)
            env[node] = interpreter.call(node, env, self.per_call)
        return env

    def stored(self, nodes: Any) -> dict[int, int]:
        """Storage -> bytes of the values of nodes: a view costs nothing beside what it views."""
        found = {}
        for node in nodes:
            value = self.values[node]
            for t in value if isinstance(value, tuple | list) else [value]:
                if isinstance(t, Tensor):
                    found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return found

    def size(self, nodes: Any) -> int:
        return sum(self.stored(nodes).values())

    def working(self, nodes: list[Node], known: set[Node], keep: set[Node]) -> int:
        """Most bytes one call holds at once beside what was ``known`` and its parameters."""
        last: dict[Node, Node] = {}
        for node in nodes:
            for arg in node.all_input_nodes:
                last[arg] = node
        outside = set(self.stored(known)) | set(self.stored(params_of(nodes)))
        live: set[Node] = set()
        peak = 0
        for node in nodes:
            live.add(node)
            held = sum(size for storage, size in self.stored(live).items() if storage not in outside)
            peak = max(peak, held + self.extra(node))
            live -= {a for a in node.all_input_nodes if last[a] is node and a not in keep}
        return peak

    def tape(self, nodes: list[Node]) -> int:
        """What the backward pass over nodes reads, and what they hand on."""
        saved: set[Node] = set()
        extra, inside = 0, set(nodes)
        for node in nodes:
            rule = _SAVED.get(node.target)
            saved |= set(node.all_input_nodes) | {node} if rule is None else {node.args[i] for i in rule}
            if node.target is ops.attention.default or any(user not in inside for user in node.users):
                saved.add(node)
            if not self.fused:
                extra += self.elements(node) * (_TAPE_HALF if self.half else _TAPE).get(node.target, 0)
        return self.size(n for n in saved if "param" not in n.meta) + extra

    def step(self, nodes: list[Node]) -> int:
        """Most that one op holds besides the tape, forward or back: its operands, its result and its temporaries."""
        most = 0
        for node in nodes:
            operands = [a for a in node.all_input_nodes if "param" not in a.meta]
            most = max(most, self.size([node]) + self.size(operands) + self.extra(node))
        return most

    def losses(self, tail: list[Node]) -> int:
        """One sequence's logits and their gradient, and their softmax where it is an operation of its own."""
        logits = self.program.output
        bytes_ = 2 * self.values[logits].element_size()
        bytes_ += 0 if self.fused else 8 if self.half else 4
        return self.elements(logits) // self.per_call * bytes_ + 2 * self.size(live_values(tail))

    def elements(self, node: Node) -> int:
        value = self.values[node]
        return value.numel() if isinstance(value, Tensor) else 0

    def extra(self, node: Node) -> int:
        """Temporaries of an op."""
        if self.fused and node.target in fused_ops():
            return 0
        bytes_ = 16 if self.half and node.target is ops.gated_act.default else _TEMPORARIES.get(node.target, 0)
        return bytes_ * self.elements(node)
