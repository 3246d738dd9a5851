# SPDX-License-Identifier: Apache-2.0
"""In what order the linears of a program are solved, read off its graph: groups, stages, and what is live between."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from gptq_compile.errors import PassError
from gptq_compile.passes.common import Node
from gptq_compile.passes.program import Program, module_path
from gptq_compile.passes.quantize_experts import is_expert

ops = torch.ops.gptq_compile
aten = torch.ops.aten


@dataclass
class Group:
    """Linears that read one value, or a linear of experts, which also reads whose tokens they are."""

    source: Node
    linears: list[Node] = field(default_factory=list)

    @property
    def reads(self) -> tuple[Node, ...]:
        """The values that its Hessian is made of."""
        first = self.linears[0]
        return (self.source, first.args[2]) if is_expert(first) else (self.source,)  # type: ignore[return-value]


@dataclass
class Stage:
    """Groups whose Hessians are collected together, and the stretch of the graph that leads to their inputs."""

    nodes: list[Node]
    groups: list[Group]
    rerun: bool  # whether the stretch contains the groups' own linears, so that it must run again quantized


_LAYERS = frozenset(
    {
        aten.linear.default, ops.expert_linear.default, ops.attention.default, ops.quant_linear.default,
        ops.quant_expert_linear.default,
    }
)  # fmt: skip


def quantizable(program: Program, include_head: bool) -> list[Node]:
    """The linears to quantize, those of experts among them, in graph order."""
    graph = program.graph
    users_first = list(reversed(graph.nodes))
    feeds: dict[Node, bool] = {}  # does a linear or attention depend on the node?
    for node in users_first:
        feeds[node] = any(feeds.get(u, False) or u.target in _LAYERS for u in node.users)
    chosen = []
    for node in graph.nodes:
        if is_expert(node):
            chosen.append(node)
            continue
        if node.op != "call_function" or node.target is not aten.linear.default:
            continue
        weight = node.args[1]
        if "param" not in weight.meta or (not feeds[node] and not include_head) or _only_routes(node):
            continue
        chosen.append(node)
    return chosen


def _only_routes(node: Node) -> bool:
    """Whether everything computed from a linear goes through a top-k before the next linear."""
    seen, todo, found = set(), list(node.users), False
    while todo:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in (aten.topk.default, aten.sort.default):
            found = True
        elif user.target is aten.linear.default or user.op == "output" or user.target is ops.attention.default:
            return False
        else:
            todo.extend(user.users)
    return found


def stages_of(program: Program, linears: list[Node], sequential: str) -> list[Stage]:
    groups: dict[tuple[Node, Node | None], Group] = {}
    for node in linears:
        key = (node.args[0], node.args[2] if is_expert(node) else None)
        groups.setdefault(key, Group(node.args[0])).linears.append(node)
    order = [n for n in program.graph.nodes if n.op == "call_function"]
    index = {n: i for i, n in enumerate(order)}
    stages: list[Stage] = []
    start = 0
    if sequential == "true":
        for group in groups.values():
            cut = index[group.linears[0]]
            stages.append(Stage(order[start:cut], [group], rerun=False))
            start = cut
        return stages
    blocks: dict[str, list[Group]] = {}
    for i, group in enumerate(groups.values()):
        match = re.match(r"(.*?\.\d+)(\.|$)", module_path(group.linears[0]))
        blocks.setdefault(match.group(1) if match else f"#{i}", []).append(group)
    for members in blocks.values():
        cut = 1 + max(index[n] for g in members for n in g.linears)
        if cut <= start:
            raise PassError("The model's blocks are interleaved, so block order has no meaning. Use --sequential true.")
        stages.append(Stage(order[start:cut], members, rerun=True))
        start = cut
    return stages


def own_linears(stage: Stage) -> list[Node]:
    return [n for g in stage.groups for n in g.linears]


def live_values(later: list[Node]) -> set[Node]:
    """Values that ``later`` reads and does not make; parameters are loaded anew."""
    made = set(later)
    return {a for n in later for a in n.all_input_nodes if a not in made and "param" not in a.meta}


def weights_of(nodes: list[Node]) -> list[Node]:
    return [n.args[1] for n in nodes if n.target is aten.linear.default or is_expert(n)]


def features_of(group: Group) -> int:
    return int(group.source.meta["val"].shape[-1])


def weight_name(node: Node) -> str:
    return node.args[1].meta["param"]
