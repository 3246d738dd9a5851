# SPDX-License-Identifier: Apache-2.0
"""How much each linear's quantization costs the model, measured, at every bit width and group size it might get.

One walk over the original model measures two things for each linear:

* The divergence of the model's predictions, KL(original || perturbed) in nats a token, when only this linear is rounded
  to nearest at :data:`REFERENCE_BITS`. Every linear's perturbed copy of the probe text travels along through the rest
  of the model, so that weights are read once.
* For each candidate, the GPTQ objective tr(E H E^T) against that of the reference rounding, on a sample of rows (rows
  are independent problems, and all that a Hessian costs is shared by the candidates).

To second order the divergence is quadratic in the error, so a candidate's divergence is the product of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import BITS, QuantizeConfig
from gptq_compile.passes.gptq.factor import Factor, no_factor
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.quadratic import row_quadratic
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solver import prepare, solve
from gptq_compile.passes.program import Program, where
from gptq_compile.passes.quantize_experts import ExpertHessians, as_matrix, for_node, is_expert, observe, observer
from gptq_compile.passes.stage_runner import Env, Runner
from gptq_compile.passes.stages import Group, features_of, live_values, stages_of, weight_name

REFERENCE_BITS = 3
GROUPS = (128, 64, 32)
HESSIAN_TOKENS = 16384
PROBES, PROBE_TOKENS = 2, 256
ROWS = 64
EXPERTS = 4  # experts of a layer whose rows are sampled

Candidate = tuple[int, int]
"""Bits and group size, the group size as in `QuantizeConfig`."""


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of one linear.

    Attributes:
        name: of its weight. ``shape``: (rows, columns) of it, all experts' rows together.
        reference: nats a token that the reference rounding of this linear alone costs.
        divergence: candidate -> predicted nats a token.
    """

    name: str
    shape: tuple[int, int]
    reference: float
    divergence: dict[Candidate, float]


def candidates_for(config: QuantizeConfig, columns: int) -> list[Candidate]:
    """What a linear of ``columns`` input features may get: all bit widths, in groups of the configured size or less."""
    largest = config.group_for(columns)
    groups = [config.group_size] if largest <= columns else []
    groups += [g for g in GROUPS if g < min(largest, columns) or (not groups and g <= columns)]
    return [(bits, group) for bits in BITS for group in groups or [-1]]


@torch.no_grad()
def measure(
    program: Program,
    linears: Sequence[Node],
    config: QuantizeConfig,
    calibration: Tensor,
    device: torch.device,
    on_linear: Callable[[Sensitivity, int, int], None] | None = None,
) -> dict[Node, Sensitivity]:
    """Measures every linear.

    Args:
        program: in sequence form, with its original weights.
        linears: in graph order.
        config: settings of the solves; its bits are not read.
        calibration: int64 ``[sequences, tokens]``.
        device: where to compute.
        on_linear: called when the errors of a linear are known, with its index and the number of all.

    Returns:
        Weight placeholder -> its sensitivity.
    """
    walk = _Walk(program, linears, config, calibration, device)
    return walk.run(on_linear)


@dataclass
class _Variant:
    """The probe text behind one perturbed linear."""

    weight: Node
    perturbed: Tensor | None
    states: list[Env]


class _Walk:
    def __init__(
        self,
        program: Program,
        linears: Sequence[Node],
        config: QuantizeConfig,
        calibration: Tensor,
        device: torch.device,
    ) -> None:
        self.program, self.linears, self.config, self.device = program, linears, config, device
        self.runner = Runner(program, device)
        count = max(1, HESSIAN_TOKENS // calibration.shape[1])
        self.states = [self.inputs(ids) for ids in calibration[:count]]
        self.probes = [self.inputs(ids) for ids in calibration[:PROBES, :PROBE_TOKENS]]
        self.variants: list[_Variant] = []
        self.errors: dict[Node, dict[Candidate, float]] = {}
        self.shapes: dict[Node, tuple[int, int]] = {}

    def inputs(self, ids: Tensor) -> Env:
        n = ids.numel()
        span = torch.arange(n, device=self.device)
        given = {"input_ids": ids.reshape(1, n).to(self.device), "position_ids": span.reshape(1, n), "logit_rows": span}
        return {node: given[node.name] for node in self.program.inputs}

    def run(self, on_linear: Callable[[Sensitivity, int, int], None] | None) -> dict[Node, Sensitivity]:
        stages = stages_of(self.program, list(self.linears), "true")
        order = [n for n in self.program.graph.nodes if n.op == "call_function"]
        total = len({n.args[1] for n in self.linears})
        start = 0
        for stage in stages:
            stop = start + len(stage.nodes)
            (group,) = stage.groups
            later = order[stop:]
            hessian = self.observer(group)
            live = live_values(later) | set(group.reads)
            loaded = self.runner.load(stage.nodes, {})
            for i, state in enumerate(self.states):
                self.states[i] = self.runner.run(state, stage.nodes, live, loaded)
                observe(hessian, [self.states[i][node] for node in group.reads], None)
            self.advance(stage.nodes, live, loaded)
            problems = self.problems(group, hessian)
            for node in group.linears:
                if node.args[1] not in self.errors:
                    self.linear(node, problems)
                    if on_linear:
                        on_linear(self.sensitivity(node.args[1], math.nan), len(self.errors), total)
            start = stop
        return self.finish(order[start:])

    def advance(self, nodes: list[Node], live: set[Node], loaded: Env) -> None:
        """Runs a stretch for the probes and every variant of them."""
        self.probes = [self.runner.run(state, nodes, live, loaded) for state in self.probes]
        for variant in self.variants:
            mine = loaded
            if variant.perturbed is not None and variant.weight in loaded:
                mine = {**loaded, variant.weight: variant.perturbed}
            variant.states = [self.runner.run(state, nodes, live, mine) for state in variant.states]
            if mine is not loaded and variant.weight not in {
                a for n in live for a in n.users for a in a.all_input_nodes
            }:
                variant.perturbed = None

    def observer(self, group: Group) -> Hessian | ExpertHessians:
        name = where(group.source)
        if is_expert(group.linears[0]):
            return observer(group.linears[0], self.device, name)
        return Hessian(features_of(group), device=self.device, name=name, drop_bad=True)

    def problems(self, group: Group, hessian: Hessian | ExpertHessians) -> list[tuple[int, int, Factor]]:
        """What to sample: (part of the rows, number of parts, factor); of experts, the busiest ones."""
        if isinstance(hessian, Hessian):
            return [(0, 1, prepare(hessian, self.config))]
        parts = hessian.parts
        busy = sorted((e for e in range(len(parts)) if parts[e].tokens), key=lambda e: -parts[e].tokens)
        if not busy:
            return [(0, 1, no_factor(parts[0].features, self.device, self.config.damp, "no expert saw a token"))]
        return [(e, len(parts), prepare(parts[e], self.config)) for e in busy[:EXPERTS]]

    def linear(self, node: Node, problems: list[tuple[int, int, Factor]]) -> None:
        """Errors of the candidates of one linear, and its variant of the probes."""
        stored = self.program.params.get(node.args[1].meta["param"]).to(self.device, torch.float32)
        weight, name = as_matrix(stored, node), weight_name(node)
        columns = weight.shape[1]
        group = min(self.config.group_for(columns), columns)
        rounding = replace(self.config, wbits=REFERENCE_BITS, mse=False, group_size=group)
        rounded = rtn(weight, rounding, name=name)
        perturbed = rounded.weight
        base, errors = 0.0, dict.fromkeys(candidates_for(self.config, columns), 0.0)
        for part, parts, factor in problems:
            height = weight.shape[0] // parts
            count = min(max(1, ROWS // len(problems)), height)
            rows = torch.linspace(0, height - 1, count, device=self.device).long() + part * height
            base += self.objective(weight[rows], perturbed[rows], factor)
            for bits, group in errors:
                config = replace(self.config, wbits=bits, group_size=group)
                solved = solve(weight[rows], factor, config, name=name)
                errors[bits, group] += self.objective(weight[rows], solved.weight, factor)
        self.errors[node.args[1]] = {c: e / base if base > 0 else 0.0 for c, e in errors.items()}
        self.shapes[node.args[1]] = (weight.shape[0], columns)
        self.variants.append(_Variant(node.args[1], for_node(rounded, node).weight, list(self.probes)))

    @staticmethod
    def objective(weight: Tensor, quantized: Tensor, factor: Factor) -> float:
        error = weight - quantized
        if factor.hessian is None:
            return float(error.square().sum(dtype=torch.float64))
        return float(row_quadratic(error, factor.hessian, factor.scale).sum())

    def finish(self, nodes: list[Node]) -> dict[Node, Sensitivity]:
        """Runs what follows the last linears, and compares predictions."""
        output = self.program.output
        self.states = []
        loaded = self.runner.load(nodes, {})
        logits = lambda state, mine: self.runner.run(state, nodes, [output], mine)[output][0].float()  # noqa: E731
        want = [torch.log_softmax(logits(state, loaded), -1) for state in self.probes]
        result: dict[Node, Sensitivity] = {}
        for variant in self.variants:
            mine = loaded
            if variant.perturbed is not None and variant.weight in loaded:
                mine = {**loaded, variant.weight: variant.perturbed}
            apart = [
                (p.exp() * (p - torch.log_softmax(logits(state, mine), -1))).sum(-1)
                for p, state in zip(want, variant.states, strict=True)
            ]
            result[variant.weight] = self.sensitivity(variant.weight, float(torch.cat(apart).double().mean()))
        return result

    def sensitivity(self, weight: Node, reference: float) -> Sensitivity:
        reference = max(reference, 0.0) if math.isfinite(reference) else reference
        divergence = {c: reference * ratio for c, ratio in self.errors[weight].items()}
        return Sensitivity(weight.meta["param"], self.shapes[weight], reference, divergence)
