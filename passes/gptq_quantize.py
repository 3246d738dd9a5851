# SPDX-License-Identifier: Apache-2.0
"""``gptq_quantize``: weights of linears become codes on a grid, in an order read off the dataflow.

1. Every ``linear`` and ``expert_linear`` on a parameter is quantized, except the head (the linear that no other linear
   or attention depends on) unless asked for, and routers (linears whose output only chooses experts).
2. Linears that read the same value share one Hessian and are solved stacked; experts have one each.
3. The graph is walked in order with all calibration sequences. ``sequential="true"``: each solve sees inputs computed
   with everything before it already quantized. ``"block"``: the Hessians of one repeated block are collected with its
   original weights, then all its linears are solved (the paper's setting, section 4).
4. Only the values that are live across a cut and one stretch's weights are kept.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gptq_compile.errors import CalibrationError
from gptq_compile.passes import quantize_experts as experts
from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.heap import trim_heap
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.phases import collect, phase
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solution import Solution
from gptq_compile.passes.gptq.solver import prepare
from gptq_compile.passes.gptq.store import SolutionStore
from gptq_compile.passes.gptq.world import World, current, join
from gptq_compile.passes.gradients import squared_gradients
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.memory_plan import MemoryPlan, plan_memory
from gptq_compile.passes.program import Program, where
from gptq_compile.passes.stage_runner import Runner, compute_dtype
from gptq_compile.passes.stages import (
    Group,
    features_of,
    live_values,
    own_linears,
    quantizable,
    stages_of,
    weight_name,
    weights_of,
)

log = logging.getLogger(__name__)

NO_DERIVATIVE = re.compile(r"derivative for|no autograd formula|does not require grad")  # torch's words for it

ops = torch.ops.gptq_compile
aten = torch.ops.aten


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


class GptqQuantize(Pass):
    """Quantizes the program's linears; see the module's rules.

    Args:
        config: settings.
        calibration: int64 ``[sequences, tokens]`` ids; not needed for ``method="rtn"``.
        device: where to compute.
        on_linear: called with the report of each finished linear and (index, total).
        store: keeps finished solves, and knows those of an earlier run, which are taken over as they are.
        memory_limit: bytes of a GPU that may be used; by default what is free.

    Attributes:
        settings: weight name -> settings of its linear, where they are not the common ones.
    """

    name = "gptq_quantize"
    preserves = False

    def __init__(
        self,
        config: QuantizeConfig,
        calibration: Tensor | None = None,
        device: str | torch.device = "cpu",
        on_linear: Callable[[LinearReport, int, int], None] | None = None,
        store: SolutionStore | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.config, self.calibration, self.device = config, calibration, torch.device(device)
        self.on_linear, self.store = on_linear, store
        self.reports: list[LinearReport] = []
        self.settings: dict[str, QuantizeConfig] = {}
        self.seconds: dict[str, float] = {}  # phase -> seconds, after a run
        self.world = World()
        self.memory_limit = memory_limit
        self.plan: MemoryPlan | None = None  # of the walk, once it has started
        self.caveat: str | None = None  # what holds for every linear, for the reports

    def requires(self, program: Program) -> None:
        if self.config.method == "gptq" and (self.calibration is None or self.calibration.numel() == 0):
            raise CalibrationError("GPTQ needs calibration tokens, but there are none. Use --method rtn to do without.")

    @torch.no_grad()
    def run(self, program: Program) -> bool:
        linears = quantizable(program, self.config.quantize_lm_head)
        if not linears:
            return False
        for node in linears:
            self._config(node).validate_for_layer(experts.matrix_shape(node)[1], weight_name(node))
        self.total = len({n.args[1] for n in linears})
        solutions: dict[Node, Solution] = {}
        self.device = join(self.device)
        self.world = current()
        if self.config.method == "rtn":
            for node in linears:
                if node.args[1] not in solutions:
                    weight = self._weight(program, node)
                    solution = rtn(weight, self._config(node), name=weight_name(node))
                    self._store(node, experts.for_node(solution, node), solutions)
        else:
            with collect() as phases:
                self._calibrated(program, linears, solutions)
            self.seconds = phases.seconds()
        for node in linears:
            rewrite = experts.rewrite if experts.is_expert(node) else rewrite_linear
            rewrite(program, node, solutions[node.args[1]])
        for node in list(program.graph.nodes):
            if node.op == "placeholder" and "param" in node.meta and not node.users:
                program.graph.erase_node(node)
        program.attrs["quantization"] = [asdict(r) for r in self.reports]
        return True

    def _config(self, node: Node) -> QuantizeConfig:
        return self.settings.get(weight_name(node), self.config)

    def _weight(self, program: Program, node: Node) -> Tensor:
        weight = program.params.get(node.args[1].meta["param"])
        return experts.as_matrix(weight.to(self.device, torch.float32), node)

    # -- the walk

    def _calibrated(self, program: Program, linears: list[Node], solutions: dict[Node, Solution]) -> None:
        assert self.calibration is not None
        stages = stages_of(program, linears, self.config.sequential)
        kept = self._finished(linears)
        todo = [[g for g in s.groups if not all(n.args[1] in kept for n in g.linears)] for s in stages]
        end = max((i + 1 for i, groups in enumerate(todo) if groups), default=0)  # stages that need activations
        ids = self.calibration[self.world.share(len(self.calibration))]
        plan = plan_memory(program, self.config, len(ids), ids.shape[1], self.device, self.memory_limit)
        self.plan = plan
        for what, where_ in plan.lines():
            log.info("memory: %s: %s", what, where_)
        dtype = compute_dtype(self.config, program, self.device)
        with Runner(program, self.device, dtype, offload=plan.offload) as runner:
            count = plan.sequences
            batches = runner.batches(ids, count) if end else []
            weights = self._token_weights(program, runner, ids, plan) if end else None
            for index, stage in enumerate(stages):
                trim_heap(self.device)
                sources = [n for g in stage.groups for n in g.reads]
                later = [n for s in stages[index + 1 : end] for n in s.nodes]
                later += [] if stage.rerun else own_linears(stage)
                hessians = {g.linears[0]: self._observer(g) for g in todo[index]}
                solved = [w for w in weights_of(stage.nodes) if w in solutions]
                if index < end and (hessians or not stage.rerun):
                    live = live_values(later) | set(sources)
                    loaded = runner.load(stage.nodes, {w: solutions[w] for w in solved})
                    if not stage.rerun:
                        runner.park(solved, solutions)
                    runner.prefetch(
                        (n.args[1] for g in todo[index] for n in g.linears if n.args[1] not in solutions), exact=True
                    )
                    for i, batch in enumerate(batches):
                        with phase("forward", self.device):
                            values = runner.run(batch.values, stage.nodes, live, loaded, batch.sequences)
                            if not stage.rerun:
                                runner.keep(batch, values)
                        with phase("Hessian", self.device):
                            for group in todo[index]:
                                assert weights is not None
                                read = [values[n] for n in group.reads]
                                experts.observe(hessians[group.linears[0]], read, weights(group.source, i))
                        del values
                    del loaded
                for group in stage.groups:
                    trim_heap(self.device)
                    self._solve(program, runner, group, hessians.pop(group.linears[0], None), kept, solutions)
                if stage.rerun and index + 1 < end:
                    mine = [w for w in weights_of(stage.nodes) if w in solutions]
                    loaded = runner.load(stage.nodes, {w: solutions[w] for w in mine})
                    runner.park(mine, solutions)
                    for batch in batches:
                        with phase("forward", self.device):
                            values = runner.run(batch.values, stage.nodes, live_values(later), loaded, batch.sequences)
                            runner.keep(batch, values)

    def _observer(self, group: Group) -> Hessian | experts.ExpertHessians:
        if experts.is_expert(group.linears[0]):
            return experts.observer(group.linears[0], self.device, where(group.source))
        return Hessian(features_of(group), device=self.device, name=where(group.source), drop_bad=True)

    def _finished(self, linears: list[Node]) -> dict[Node, Solution]:
        """Solutions of an earlier run, by weight: those that the first process knows."""
        kept = [None if self.store is None else self.store.finished(weight_name(node)) for node in linears]
        found: dict[Node, Solution] = {}
        for node, solution in zip(linears, self.world.agree(kept), strict=True):
            config, columns = self._config(node), experts.matrix_shape(node)[1]
            if solution is not None and (solution.bits, solution.group_size) == (
                config.wbits,
                config.group_for(columns),
            ):
                found[node.args[1]] = experts.for_node(solution, node)
        return found

    def _token_weights(
        self, program: Program, runner: Runner, ids: Tensor, plan: MemoryPlan
    ) -> Callable[[Node, int], Tensor | None]:
        """Runs the original model once forward and back; returns the token weights of a group's input in a batch."""
        strength = self.config.token_strength
        if self.config.token_weighting == "none" or strength == 0:
            return lambda source, batch: None
        try:
            linears = quantizable(program, self.config.quantize_lm_head)
            batches = runner.batches(ids, plan.tape or plan.sequences)
            squares = squared_gradients(program, runner, batches, linears, plan.tape > 0)
        except RuntimeError as error:
            if not NO_DERIVATIVE.search(str(error)):
                raise
            self.caveat = f"calibration tokens weigh the same, because the model has no gradient: {error}"
            log.warning("GPTQ: %s", self.caveat)
            return lambda source, batch: None
        weights: dict[Node, tuple[Tensor, ...]] = {}
        for source in dict.fromkeys(n.args[0] for n in linears):  # in an order on which processes agree
            found = squares.get(source, torch.zeros(0, device=self.device))
            mean = self.world.mean(found)
            if mean > 0:
                weights[source] = (1 + strength * found / mean).split(plan.sequences * ids.shape[1])
        return lambda source, batch: weights[source][batch] if source in weights else None

    def _solve(
        self,
        program: Program,
        runner: Runner,
        group: Group,
        hessian: Hessian | experts.ExpertHessians | None,
        kept: dict[Node, Solution],
        solutions: dict[Node, Solution],
    ) -> None:
        todo = [n for n in group.linears if n.args[1] not in solutions]
        if all(n.args[1] in kept for n in todo):
            for node in todo:
                self._store(node, kept[node.args[1]], solutions)
            return
        assert hessian is not None
        if isinstance(hessian, experts.ExpertHessians):
            for one in hessian.parts:
                self.world.add_up(one)
            for node in todo:
                with phase("weights", self.device):
                    weight = experts.as_matrix(runner.param(node.args[1], exact=True).float(), node)
                solution = experts.solve_experts(weight, hessian, self._config(node), weight_name(node))
                self._keep([node], [experts.for_node(solution, node)], solutions)
            return
        self.world.add_up(hessian)
        factor = prepare(hessian, self.config, consume=True)
        # Linears that read the same value see the same tokens: one problem with more rows, where settings agree.
        for config in dict.fromkeys(self._config(n) for n in todo):
            part = [n for n in todo if self._config(n) == config]
            if all(n.args[1] in kept for n in part):
                for node in part:
                    self._store(node, kept[node.args[1]], solutions)
                continue
            with phase("weights", self.device):
                stacked = torch.cat([runner.param(n.args[1], exact=True).float() for n in part])
            solution = self.world.solve(stacked, factor, config, ", ".join(weight_name(n) for n in part))
            rows = [int(n.args[1].meta["val"].shape[0]) for n in part]
            self._keep(part, solution.split(rows), solutions)

    def _keep(self, nodes: list[Node], parts: list[Solution], solutions: dict[Node, Solution]) -> None:
        """Makes the solutions of one group durable, then reports them."""
        if self.store is not None:
            self.store.keep({weight_name(n): part for n, part in zip(nodes, parts, strict=True)})
        for node, part in zip(nodes, parts, strict=True):
            self._store(node, part, solutions)

    def _store(self, node: Node, solution: Solution, solutions: dict[Node, Solution]) -> None:
        solutions[node.args[1]] = solution
        stats = solution.stats
        known = lambda v: v if math.isfinite(v) else None  # noqa: E731
        report = LinearReport(
            name=weight_name(node),
            shape=experts.matrix_shape(node),
            bits=solution.bits,
            group_size=solution.group_size,
            method=stats.method,
            error=known(stats.relative_error),
            error_rtn=known(stats.relative_error_rtn),
            damp=stats.damp,
            dead_columns=stats.dead_columns,
            note="; ".join(r for r in (stats.reason, self.caveat) if r) or None,
            seconds=round(stats.seconds, 4),
        )
        self.reports.append(report)
        if self.on_linear and self.world.rank == 0:
            self.on_linear(report, len(self.reports), self.total)


def rewrite_linear(program: Program, node: Node, solution: Solution) -> None:
    """Replaces a linear by a ``quant_linear`` on the solution's tensors."""
    x, _, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    name = weight_name(node)
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
