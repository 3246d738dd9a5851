# SPDX-License-Identifier: Apache-2.0
"""``gptq_quantize``: weights of linears become codes on a grid, in an order read off the dataflow.

1. Every ``linear`` on a two-dimensional parameter is quantized, except the head (the linear that no other linear or
   attention depends on) unless asked for, and routers (linears whose output only chooses experts).
2. Linears that read the same value share one Hessian and are solved stacked.
3. The graph is walked in order with all calibration sequences. ``sequential="true"``: each solve sees inputs computed
   with everything before it already quantized. ``"block"``: the Hessians of one repeated block are collected with its
   original weights, then all its linears are solved (the paper's setting, section 4).
4. Only the values that are live across a cut and one stretch's weights are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.errors import CalibrationError, PassError
from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.importance import downstream_attention, received_attention, token_weights
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solution import Solution
from gptq_compile.passes.gptq.solver import prepare, solve
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program, module_path, where

ops = torch.ops.gptq_compile
aten = torch.ops.aten

Env = dict[Node, Any]


@dataclass(frozen=True)
class LinearReport:
    """What was done to one linear, for the manifest; errors are None where no Hessian measured them."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    method: str
    error: float | None
    error_rtn: float | None
    damp: float
    dead_columns: int
    note: str | None
    seconds: float


@dataclass
class _Group:
    """Linears that read one value."""

    source: Node
    linears: list[Node] = field(default_factory=list)


@dataclass
class _Stage:
    """Groups whose Hessians are collected together, and the stretch of the graph that leads to their inputs."""

    nodes: list[Node]
    groups: list[_Group]
    rerun: bool  # whether the stretch contains the groups' own linears, so that it must run again quantized


def quantizable(program: Program, include_head: bool) -> list[Node]:
    """The linears to quantize, in graph order."""
    graph = program.graph
    users_first = list(reversed(graph.nodes))
    feeds: dict[Node, bool] = {}  # does a linear or attention depend on the node?
    for node in users_first:
        feeds[node] = any(
            feeds.get(u, False) or u.target in (aten.linear.default, ops.attention.default) for u in node.users
        )
    chosen = []
    for node in graph.nodes:
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


class GptqQuantize(Pass):
    """Quantizes the program's linears; see the module's rules.

    Args:
        config: settings.
        calibration: int64 ``[sequences, tokens]`` ids; not needed for ``method="rtn"``.
        device: where to compute.
        on_linear: called with the report of each finished linear and (index, total).
    """

    name = "gptq_quantize"
    preserves = False

    def __init__(
        self,
        config: QuantizeConfig,
        calibration: Tensor | None = None,
        device: str | torch.device = "cpu",
        on_linear: Callable[[LinearReport, int, int], None] | None = None,
    ) -> None:
        self.config, self.calibration, self.device = config, calibration, torch.device(device)
        self.on_linear = on_linear
        self.reports: list[LinearReport] = []

    def requires(self, program: Program) -> None:
        if self.config.method == "gptq" and (self.calibration is None or self.calibration.numel() == 0):
            raise CalibrationError("GPTQ needs calibration tokens, but there are none. Use --method rtn to do without.")

    @torch.no_grad()
    def run(self, program: Program) -> bool:
        linears = quantizable(program, self.config.quantize_lm_head)
        if not linears:
            return False
        for node in linears:
            self.config.validate_for_layer(int(node.args[1].meta["val"].shape[1]), _weight_name(node))
        self.total = len({n.args[1] for n in linears})
        solutions: dict[Node, Solution] = {}
        if self.config.method == "rtn":
            for node in linears:
                if node.args[1] not in solutions:
                    self._store(node, rtn(self._weight(program, node), self.config, name=_weight_name(node)), solutions)
        else:
            self._calibrated(program, linears, solutions)
        for node in linears:
            _rewrite(program, node, solutions[node.args[1]])
        for node in list(program.graph.nodes):
            if node.op == "placeholder" and "param" in node.meta and not node.users:
                program.graph.erase_node(node)
        program.attrs["quantization"] = [asdict(r) for r in self.reports]
        return True

    def _weight(self, program: Program, node: Node) -> Tensor:
        return program.params.get(node.args[1].meta["param"]).to(self.device, torch.float32)

    # -- the walk

    def _calibrated(self, program: Program, linears: list[Node], solutions: dict[Node, Solution]) -> None:
        assert self.calibration is not None
        stages = _stages(program, linears, self.config.sequential)
        runner = _Runner(program, self.device)
        states = [self._inputs(program, ids) for ids in self.calibration]
        weights = self._token_weights(program, runner)
        for index, stage in enumerate(stages):
            sources = [g.source for g in stage.groups]
            later = [n for s in stages[index + 1 :] for n in s.nodes] + ([] if stage.rerun else _own(stage))
            hessians = {g.source: Hessian(_features(g), device=self.device, name=where(g.source)) for g in stage.groups}
            live = _live(later) | set(sources)
            overrides = {w: solutions[w].weight.to(self.device) for w in _weights_of(stage.nodes) if w in solutions}
            loaded = runner.load(stage.nodes, overrides)
            for i, state in enumerate(states):
                values = runner.run(state, stage.nodes, live, loaded)
                for group in stage.groups:
                    hessians[group.source].add(values[group.source], weights(group.source, i))
                if not stage.rerun:
                    states[i] = values
            for group in stage.groups:
                self._solve(program, group, hessians.pop(group.source), solutions)
            if stage.rerun and later:
                mine = {w: solutions[w].weight.to(self.device) for w in _weights_of(stage.nodes) if w in solutions}
                loaded = runner.load(stage.nodes, mine)
                for i, state in enumerate(states):
                    states[i] = runner.run(state, stage.nodes, _live(later), loaded)

    def _inputs(self, program: Program, ids: Tensor) -> Env:
        n = ids.numel()
        span = torch.arange(n, device=self.device)
        given = {"input_ids": ids.reshape(1, n).to(self.device), "position_ids": span.reshape(1, n), "logit_rows": span}
        return {node: given[node.name] for node in program.inputs}

    def _token_weights(self, program: Program, runner: _Runner) -> Callable[[Node, int], Tensor | None]:
        """Runs the original model once and returns the token weights of a group's input in a sequence."""
        if self.config.token_weighting == "none":
            return lambda source, sequence: None
        assert self.calibration is not None
        reach = downstream_attention(program)
        attention = [n for n in program.graph.nodes if n.target is ops.attention.default]
        received: list[dict[Node, Tensor]] = [{} for _ in self.calibration]
        states = [self._inputs(program, ids) for ids in self.calibration]
        order = [n for n in program.graph.nodes if n.op == "call_function"]
        start = 0
        for layer in attention:
            stop = order.index(layer)
            stretch, operands = order[start:stop], set(layer.all_input_nodes)
            live = _live(order[stop:]) | operands
            loaded = runner.load([*stretch, layer], {})
            for i, state in enumerate(states):
                values = runner.run(state, stretch, live, loaded)
                lookup = {**loaded, **values}.__getitem__
                received[i][layer] = received_attention(
                    fx.node.map_arg(layer.args, lookup), fx.node.map_arg(layer.kwargs, lookup)
                )
                states[i] = values
            start = stop
        return lambda source, sequence: token_weights(received[sequence], reach[source], self.config.token_strength)

    def _solve(self, program: Program, group: _Group, hessian: Hessian, solutions: dict[Node, Solution]) -> None:
        todo = [n for n in group.linears if n.args[1] not in solutions]
        if not todo:
            return
        # Linears that read the same value see the same tokens, so they are one problem with more rows.
        names = [_weight_name(n) for n in todo]
        stacked = torch.cat([self._weight(program, n) for n in todo])
        solution = solve(stacked, prepare(hessian, self.config), self.config, name=", ".join(names))
        rows = [int(n.args[1].meta["val"].shape[0]) for n in todo]
        for node, part in zip(todo, solution.split(rows), strict=True):
            self._store(node, part, solutions)

    def _store(self, node: Node, solution: Solution, solutions: dict[Node, Solution]) -> None:
        solutions[node.args[1]] = solution
        stats = solution.stats
        rows, columns = (int(d) for d in node.args[1].meta["val"].shape)
        known = lambda v: v if math.isfinite(v) else None  # noqa: E731
        report = LinearReport(
            name=_weight_name(node),
            shape=(rows, columns),
            bits=solution.bits,
            group_size=solution.group_size,
            method=stats.method,
            error=known(stats.relative_error),
            error_rtn=known(stats.relative_error_rtn),
            damp=stats.damp,
            dead_columns=stats.dead_columns,
            note=stats.reason,
            seconds=round(stats.seconds, 4),
        )
        self.reports.append(report)
        if self.on_linear:
            self.on_linear(report, len(self.reports), self.total)


class _Runner:
    """Runs stretches of the graph for one sequence after another with their parameters loaded once."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self.interpreter = Interpreter(program, device, torch.float32)

    def load(self, nodes: list[Node], overrides: dict[Node, Tensor]) -> Env:
        """The parameters that ``nodes`` read; ``overrides`` replaces some."""
        needed = {a for n in nodes for a in n.all_input_nodes if "param" in a.meta}
        return {p: overrides[p] if p in overrides else self.interpreter.param(p) for p in needed}

    def run(self, state: Env, nodes: list[Node], live: Iterable[Node], loaded: Env) -> Env:
        env = {**state, **loaded}
        made = set(nodes)
        want = [n for n in live if n in made or n in state]
        return self.interpreter.run(env, want, nodes)


def _stages(program: Program, linears: list[Node], sequential: str) -> list[_Stage]:
    groups: dict[Node, _Group] = {}
    for node in linears:
        groups.setdefault(node.args[0], _Group(node.args[0])).linears.append(node)
    order = [n for n in program.graph.nodes if n.op == "call_function"]
    index = {n: i for i, n in enumerate(order)}
    stages: list[_Stage] = []
    start = 0
    if sequential == "true":
        for group in groups.values():
            cut = index[group.linears[0]]
            stages.append(_Stage(order[start:cut], [group], rerun=False))
            start = cut
        return stages
    blocks: dict[str, list[_Group]] = {}
    for i, group in enumerate(groups.values()):
        match = re.match(r"(.*?\.\d+)(\.|$)", module_path(group.linears[0]))
        blocks.setdefault(match.group(1) if match else f"#{i}", []).append(group)
    for members in blocks.values():
        cut = 1 + max(index[n] for g in members for n in g.linears)
        if cut <= start:
            raise PassError("The model's blocks are interleaved, so block order has no meaning. Use --sequential true.")
        stages.append(_Stage(order[start:cut], members, rerun=True))
        start = cut
    return stages


def _own(stage: _Stage) -> list[Node]:
    return [n for g in stage.groups for n in g.linears]


def _live(later: list[Node]) -> set[Node]:
    """Values that ``later`` reads and does not make; parameters are loaded anew."""
    made = set(later)
    return {a for n in later for a in n.all_input_nodes if a not in made and "param" not in a.meta}


def _weights_of(nodes: list[Node]) -> list[Node]:
    return [n.args[1] for n in nodes if n.target is aten.linear.default]


def _features(group: _Group) -> int:
    return int(group.source.meta["val"].shape[-1])


def _weight_name(node: Node) -> str:
    return node.args[1].meta["param"]


def _rewrite(program: Program, node: Node, solution: Solution) -> None:
    """Replaces a linear by a ``quant_linear`` on the solution's tensors."""
    x, _, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    name = _weight_name(node)
    tensors = {"codes": solution.codes, "scales": solution.scales, "zeros": solution.zeros, "g_idx": solution.g_idx}
    params = {
        key: None if value is None else program.add_param(f"{name}.{key}", value.cpu())
        for key, value in tensors.items()
    }
    with program.graph.inserting_before(node):
        new = program.call(
            ops.quant_linear.default,
            (
                x,
                params["codes"],
                params["scales"],
                params["zeros"],
                params["g_idx"],
                bias,
                solution.bits,
                solution.group_size,
            ),
            like=node,
        )
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
