# SPDX-License-Identifier: Apache-2.0
"""How much each linear's quantization costs the model, measured, at every bit width and group size it might get.

One walk over the original model measures two things for each linear:

* The divergence of the model's predictions, KL(original || perturbed) in nats a token, when only this linear is rounded
  to nearest at :data:`REFERENCE_BITS`. Every linear's perturbed copy of the probe text travels along through the rest
  of the model, so that weights are read once.
* For each candidate, the squared error of rounding the weight against that of the reference rounding, on a sample of
  rows.

To second order the divergence is quadratic in the error, so a candidate's divergence is the product of the two. GPTQ's
own objective is not taken for the second: a few tokens of huge activations rule plain Hessians, and what compensates
their errors says little about the other tokens (on SmolLM2-135M bits chosen by it, 4.19 on average, were to cost 0.045
nats and cost 0.376 when the weights were rounded to them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import BITS, QuantizeConfig
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.program import Program
from gptq_compile.passes.quantize_experts import as_matrix, for_node
from gptq_compile.passes.stage_runner import Env, Runner
from gptq_compile.passes.stages import live_values, stages_of, weight_name

REFERENCE_BITS = 3
GROUPS = (128, 64, 32)
PROBES = 2  # calibration sequences that are run, as far as the tokens below
PROBE_TOKENS = {"cpu": 256, "cuda": 1024}
ROWS = 64

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
    with Runner(program, device) as runner:
        return _Walk(program, linears, config, calibration, runner).run(on_linear)


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
        runner: Runner,
    ) -> None:
        self.program, self.linears, self.config = program, linears, config
        self.runner, self.device = runner, runner.device
        tokens = PROBE_TOKENS.get(self.device.type, PROBE_TOKENS["cpu"])
        self.probes = [self.inputs(ids) for ids in calibration[:PROBES, :tokens]]
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
            self.advance(stage.nodes, live_values(later), self.runner.load(stage.nodes, {}))
            for node in group.linears:
                if node.args[1] not in self.errors:
                    self.linear(node)
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

    def linear(self, node: Node) -> None:
        """Errors of the candidates of one linear, and its variant of the probes."""
        stored = self.program.params.get(node.args[1].meta["param"]).to(self.device, torch.float32)
        weight, name = as_matrix(stored, node), weight_name(node)
        columns = weight.shape[1]
        group = min(self.config.group_for(columns), columns)
        rounded = rtn(weight, replace(self.config, wbits=REFERENCE_BITS, mse=False, group_size=group), name=name)
        count = min(ROWS, weight.shape[0])
        rows = torch.linspace(0, weight.shape[0] - 1, count, device=self.device).long()
        sample = weight[rows]
        squared = lambda quantized: float((sample - quantized).square().sum(dtype=torch.float64))  # noqa: E731
        base = squared(rounded.weight[rows])
        errors = {}
        for bits, group in candidates_for(self.config, columns):
            config = replace(self.config, wbits=bits, group_size=group, mse=self.config.clips)
            error = squared(rtn(sample, config, name=name).weight)
            errors[bits, group] = error / base if base > 0 else 0.0
        self.errors[node.args[1]], self.shapes[node.args[1]] = errors, (weight.shape[0], columns)
        self.variants.append(_Variant(node.args[1], for_node(rounded, node).weight, list(self.probes)))

    def finish(self, nodes: list[Node]) -> dict[Node, Sensitivity]:
        """Runs what follows the last linears, and compares predictions."""
        output = self.program.output
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
