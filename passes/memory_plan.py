# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model keeps where, and its peak, worked out from shapes before anything is loaded.

The plan follows the walk of ``gptq_quantize``: at each stage what lives across the cut, one stretch's
weights and the next one's, the working set of one call (every value from where it is made to its last use), the Hessian
and the matrices of the solve. Shapes and types come from running the program's ops on meta tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import HUGE, LARGE
from gptq_compile.passes.gptq.hessian import GATHER
from gptq_compile.passes.gradients import cuts_between_layers
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import compute_dtype, params_of, sequences_per_call
from gptq_compile.passes.stages import Group, Stage, features_of, live_values, own_linears, quantizable, stages_of

ops = torch.ops.gptq_compile

_TEMPORARIES = {
    ops.rms_norm.default: 12,
    ops.layer_norm.default: 8,
    ops.rotary_embedding.default: 16,
    ops.gated_act.default: 8,
}
"""Bytes per element of the result that an op's reference holds besides operands and result, all of them float32."""

_QUADRATIC = 4096  # rows and columns of a product in gptq/quadratic.py
_RESERVE = 0.92  # of a GPU's free memory that a plan may use: fragments are lost


@dataclass(frozen=True)
class MemoryPlan:
    """Where things live while a model is quantized, in bytes.

    Attributes:
        device: "cpu" or "cuda".
        peak: most that is held on the device at once (on a CPU: in memory, beyond what the process held before).
        peak_at: in words, when.
        activations: most that lives between two stretches, of all calibration sequences of this process.
        offload: whether that is kept in pinned host memory instead of the device.
        weights: largest stretch's weights and the next one's, as far as they are read ahead.
        hessian: largest Hessian.
        solutions: codes and grids of all linears, in host memory.
        sequences: calibration sequences of one call.
        phases: phase -> its largest bytes.
    """

    device: str
    peak: int
    peak_at: str
    activations: int
    offload: bool
    weights: int
    hessian: int
    solutions: int
    sequences: int
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def host(self) -> int:
        """Bytes in host memory: on a GPU solutions and offloaded activations, on a CPU everything."""
        if self.device == "cpu":
            return self.peak
        return self.solutions + (self.activations if self.offload else 0)

    def lines(self) -> list[tuple[str, str]]:
        """(what, where and how much), for people."""
        gb = lambda n: f"{n / 1e9:.2f} GB"  # noqa: E731
        on = "memory" if self.device == "cpu" else "GPU"
        return [
            ("activations", f"{gb(self.activations)} in {'pinned host memory' if self.offload else on}"),
            ("weights", f"{gb(self.weights)} of one stretch at a time in {on}, the others where the checkpoint is"),
            ("Hessian", f"up to {gb(self.hessian)} in {on}"),
            ("solutions", f"{gb(self.solutions)} in host memory"),
            ("peak", f"{gb(self.peak)} in {on}, {self.peak_at}"),
        ]


def plan_memory(
    program: Program,
    config: QuantizeConfig,
    sequences: int,
    tokens: int,
    device: torch.device,
    limit: int | None = None,
) -> MemoryPlan:
    """Plans the walk.

    Args:
        program: with named ops (after the trace passes).
        config: settings.
        sequences: calibration sequences of this process. ``tokens``: of each.
        device: where to compute.
        limit: bytes of the device that may be used; by default what is free. Activations are offloaded from a GPU
            where they would not fit.
    """
    if limit is None and device.type == "cuda" and torch.cuda.is_available():
        limit = int(torch.cuda.mem_get_info(device)[0] * _RESERVE)
    plan = _Planner(program, config, sequences, tokens, device).plan(offload=False)
    if device.type == "cuda" and limit is not None and plan.peak > limit:
        plan = _Planner(program, config, sequences, tokens, device).plan(offload=True)
    return plan


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


class _Planner:
    def __init__(
        self, program: Program, config: QuantizeConfig, sequences: int, tokens: int, device: torch.device
    ) -> None:
        self.program, self.config, self.device = program, config, device
        self.per_call = min(sequences, sequences_per_call(program, device, tokens))
        self.tokens = self.per_call * tokens  # of one call
        self.calls = sequences / self.per_call
        self.dtype = compute_dtype(config, program, device)
        self.half = self.dtype != torch.float32
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

    # -- sizes

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
            extra = _TEMPORARIES.get(node.target, 0)
            if node.target is ops.gated_act.default and self.half:
                extra = 16
            value = self.values[node]
            peak = max(peak, held + extra * (value.numel() if isinstance(value, Tensor) else 0))
            live -= {a for a in node.all_input_nodes if last[a] is node and a not in keep}
        return peak

    # -- the walk

    def plan(self, offload: bool) -> MemoryPlan:
        linears = quantizable(self.program, self.config.quantize_lm_head)
        stages = stages_of(self.program, linears, self.config.sequential)
        peaks: dict[str, tuple[int, str]] = {}

        def note(phase: str, bytes_: float, at: str) -> None:
            peaks[phase] = max(peaks.get(phase, (0, "")), (int(bytes_), at))

        activations = weights = hessian = 0
        fixed = 0
        if self.config.token_weighting != "none":
            fixed, used = self._token_weights(offload, note)
            activations = max(activations, used)
        known: set[Node] = set(self.program.inputs)
        for i, stage in enumerate(stages):
            later = [n for s in stages[i + 1 :] for n in s.nodes] + ([] if stage.rerun else own_linears(stage))
            sources = {n for g in stage.groups for n in g.reads}
            live = live_values(later) | sources
            made = set(stage.nodes)
            after = {n for n in live if n in made or n in known}
            if stage.rerun:
                after -= sources - live_values(later)
            loaded = self.size(params_of(stage.nodes))
            own = self._stored_weights(stage)
            work = self.working(stage.nodes, known, live)
            states = self._states(known, after, offload)
            sums = [self._hessian(features_of(g), _experts(g)) for g in stage.groups]
            at = f"at {stage.groups[0].linears[0].args[1].meta['param']}"
            activations = max(activations, int(self.size(known) * self.calls), int(self.size(after) * self.calls))
            weights = max(weights, loaded + own)
            hessian = max(hessian, *(4 * _experts(g) * features_of(g) ** 2 for g in stage.groups))
            base = fixed + loaded + own
            note("forward", base + states + work + sum(sums), f"running the stretch before {at[3:]}")
            kept = 0 if offload else self.size(after) * self.calls
            remaining = sum(sums)
            for group, held in zip(stage.groups, sums, strict=True):
                remaining -= held
                count, columns = _experts(group), features_of(group)
                rows = sum(self.values[n.args[1]].numel() // columns for n in group.linears)
                factor, solve = self._solve(rows, columns)
                factor, solve = (b + 4 * (count - 1) * columns**2 for b in (factor, solve))
                note("factorization", fixed + own + kept + remaining + factor, f"factoring {at}")
                note("solve", fixed + kept + remaining + solve, f"solving {at}")
            known = after
        phase = max(peaks, key=lambda p: peaks[p])
        return MemoryPlan(
            device=self.device.type,
            peak=peaks[phase][0],
            peak_at=peaks[phase][1],
            activations=activations,
            offload=offload,
            weights=weights,
            hessian=hessian,
            solutions=self._solutions(linears),
            sequences=self.per_call,
            phases={p: b for p, (b, _) in peaks.items()},
        )

    def _token_weights(self, offload: bool, note: Any) -> tuple[int, int]:
        """The original model forward and back; returns what it leaves behind and the most it keeps between stretches.

        Every stretch's start is kept until the way back has passed it, and its gradient until the stretch before it is
        done. A stretch's values are all on the tape; at the model's end there are one sequence's logits, as floats,
        their softmax and their gradient.
        """
        cuts = cuts_between_layers(self.order)
        stretches = [self.order[a:b] for a, b in zip([0, *cuts], [*cuts, len(self.order)], strict=True)]
        linears = set(quantizable(self.program, self.config.quantize_lm_head))
        known: set[Node] = set(self.program.inputs)
        starts, saved = [known], 0.0
        left = 0
        for index, stretch in enumerate(stretches[:-1]):
            made, live = set(stretch), live_values(self.order[cuts[index] :])
            after = {n for n in live if n in made or n in known}
            loaded = self.size(params_of(stretch)) + self.size(params_of(stretches[index + 1]))
            held = self._states(known, after, offload) + saved
            note("original forward", loaded + held + self.working(stretch, known, live), "running the original model")
            saved += 0 if offload else self.size(after - known) * self.calls
            known = after
            starts.append(known)
        used = int(sum(self.size(start) for start in starts[1:]) * self.calls)
        for index in reversed(range(len(stretches))):
            stretch, last = stretches[index], index + 1 == len(stretches)
            share = 1 / self.per_call if last else 1.0
            tape = self.size(set(stretch) - set(starts[index])) + sum(
                _TEMPORARIES[node.target] * self.values[node].numel() for node in stretch if node.target in _TEMPORARIES
            )
            if last:
                tape += 3 * 4 * self.values[self.program.output].numel()
            edges = [self.size(starts[i]) for i in (index, index + 1) if 0 < i < len(stretches)]
            loaded = self.size(params_of(stretch)) + (self.size(params_of(stretches[index - 1])) if index else 0)
            note(
                "gradients",
                left + loaded + saved + tape * share + max(edges, default=0) * self.calls,
                "running the original model back",
            )
            left += int(4 * self.tokens * self.calls) * len({n.args[0] for n in stretch if n in linears})
            if not offload and index:
                saved -= self.size(starts[index] - starts[index - 1]) * self.calls
        return left, used

    def _states(self, before: set[Node], after: set[Node], offload: bool) -> float:
        """Values between stretches while one batch after another goes from ``before`` to ``after``."""
        a, b = self.size(before), self.size(after)
        if offload:
            return a
        # The batch in hand holds its old values, and its new ones are in the working set.
        return max(self.calls * a, a + (self.calls - 1) * b)

    def _stored_weights(self, stage: Stage) -> int:
        """The group's own weights as they are read ahead, in their stored type."""
        params = self.program.params
        names = {n.args[1].meta["param"] for g in stage.groups for n in g.linears}
        return sum(torch.Size(params.shape(n)).numel() * params.dtype(n).itemsize for n in names)

    def _hessian(self, features: int, experts: int) -> int:
        """The sums, and what an addition holds besides: tokens gathered for tensor cores, or float32 copies."""
        sums = 4 * features * features * experts
        if self.half and self.device.type == "cuda":
            return sums + 2 * GATHER * features * experts
        return sums + 4 * self.tokens * features

    def _solve(self, rows: int, columns: int) -> tuple[int, int]:
        """Most bytes while factoring, and while solving with the factor."""
        square = 4 * columns * columns
        matrices = 4 if columns <= LARGE or self.device.type == "cpu" else 3
        if self.device.type == "cuda" and columns > HUGE:
            matrices = 3
        weight = 4 * rows * columns
        if self.device.type == "cpu":
            return matrices * square, 2 * square + int(4.5 * weight)
        part = min(rows, _QUADRATIC)
        product = part * columns * 8 + columns * _QUADRATIC * 8 + part * _QUADRATIC * 8
        return matrices * square, 2 * square + int(3.5 * weight) + product

    def _solutions(self, linears: list[Node]) -> int:
        total = 0
        for weight in {n.args[1] for n in linears}:
            codes = self.values[weight].numel()
            total += codes + codes // self.config.group_for(self.values[weight].shape[-1]) * (
                4 if self.config.sym else 5
            )
        return total


def _experts(group: Group) -> int:
    """Hessians of a group: one, or one for each expert."""
    weight = group.linears[0].args[1].meta["val"]
    return int(weight.shape[0]) if weight.dim() == 3 else 1
