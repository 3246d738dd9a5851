# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model keeps where, and its peak, worked out from shapes before anything is loaded.

The plan follows the walk of ``gptq_quantize``: at each stage what lives across the cut, one stretch's
weights and the next one's, the working set of one call (every value from where it is made to its last use), the Hessian
and the matrices of the solve. Shapes and types come from running the program's ops on meta tensors.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import HUGE, LARGE
from gptq_compile.passes.gptq.hessian import GATHER
from gptq_compile.passes.gradients import stretches_of
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import compute_dtype, params_of, sequences_per_call
from gptq_compile.passes.stages import Group, Stage, features_of, live_values, own_linears, quantizable, stages_of
from gptq_compile.passes.value_sizes import ValueSizes

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
        tape: those of one call of the backward pass where one tape goes over the whole model; 0 where it takes one
            stretch of the model at a time.
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
    tape: int = 0
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
        limit: bytes of a GPU that may be used; by default what is free. The backward pass takes one tape over the whole
            model where that fits (on a CPU: where it does not raise the peak), of as many sequences as fit; activations
            are offloaded from a GPU where they would not fit otherwise.
    """
    planner = _Planner(program, config, sequences, tokens, device)
    if device.type != "cuda":
        plan, other = (planner.plan(offload=False, tape=tape) for tape in (planner.per_call, 0))
        return plan if plan.peak <= other.peak else other
    if limit is None and torch.cuda.is_available():
        limit = int(torch.cuda.mem_get_info(device)[0] * _RESERVE)
    tapes = [planner.per_call >> i for i in range(planner.per_call.bit_length())]
    plans = []
    for offload in (False, True):
        for tape in [*tapes, 0]:
            plans.append(planner.plan(offload, tape))
            if limit is None or plans[-1].peak <= limit:
                return plans[-1]
    return min(plans, key=lambda plan: plan.peak)


@dataclass(frozen=True)
class _Walk:
    """The walk's part of a plan."""

    peaks: dict[str, tuple[int, str]]
    activations: int
    weights: int
    hessian: int


class _Planner(ValueSizes):
    def __init__(
        self, program: Program, config: QuantizeConfig, sequences: int, tokens: int, device: torch.device
    ) -> None:
        per_call = min(sequences, sequences_per_call(program, device, tokens))
        super().__init__(program, device, compute_dtype(config, program, device), per_call, tokens)
        self.config = config
        self.calls = sequences / per_call
        self.linears = quantizable(program, config.quantize_lm_head)
        self._walks: dict[bool, _Walk] = {}

    # -- the walk

    def plan(self, offload: bool, tape: int) -> MemoryPlan:
        """One plan; ``tape``: sequences of a call of the backward pass that takes the whole model at once, or 0."""
        if offload not in self._walks:
            self._walks[offload] = self._walk(offload)
        walk = self._walks[offload]
        peaks, activations = dict(walk.peaks), walk.activations
        if self.config.token_weighting != "none":
            before, used = self._token_weights(offload, tape)
            peaks, activations = {**before, **peaks}, max(activations, used)
        phase = max(peaks, key=lambda p: peaks[p])
        return MemoryPlan(
            device=self.device.type,
            peak=peaks[phase][0],
            peak_at=peaks[phase][1],
            activations=activations,
            offload=offload,
            weights=walk.weights,
            hessian=walk.hessian,
            solutions=self._solutions(self.linears),
            sequences=self.per_call,
            tape=tape if self.config.token_weighting != "none" else 0,
            phases={p: b for p, (b, _) in peaks.items()},
        )

    def _walk(self, offload: bool) -> _Walk:
        stages = stages_of(self.program, self.linears, self.config.sequential)
        peaks: dict[str, tuple[int, str]] = {}

        def note(phase: str, bytes_: float, at: str) -> None:
            peaks[phase] = max(peaks.get(phase, (0, "")), (int(bytes_), at))

        activations = weights = hessian = 0
        fixed = self._squares() if self.config.token_weighting != "none" else 0
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
        return _Walk(peaks, activations, weights, hessian)

    def _squares(self) -> int:
        """The token weights of all groups of linears."""
        return int(4 * self.tokens * self.calls) * len({n.args[0] for n in self.linears})

    def _token_weights(self, offload: bool, whole: int) -> tuple[dict[str, tuple[int, str]], int]:
        """The original model forward and back; returns the peaks and the most that is kept between stretches.

        Every stretch's start is kept until the way back has passed it, and its gradient until the stretch before it is
        done.
        """
        stretches, tail = stretches_of(self.order, whole > 0)
        bounds = list(itertools.accumulate(len(stretch) for stretch in stretches))
        share = whole / self.per_call if whole else 1.0
        known: set[Node] = set(self.program.inputs)
        starts, saved = [known], 0.0
        forward = 0.0
        for index, stretch in enumerate(stretches[:-1]):
            made, live = set(stretch), live_values(self.order[bounds[index] :])
            after = {n for n in live if n in made or n in known}
            loaded = self.size(params_of(stretch)) + self.size(params_of(stretches[index + 1]))
            held = self._states(known, after, offload) + saved
            forward = max(forward, loaded + held + self.working(stretch, known, live))
            saved += 0 if offload else self.size(after - known) * self.calls
            known = after
            starts.append(known)
        used = int(sum(self.size(start) for start in starts[1:]) * self.calls)
        left, back = 0, 0.0
        for index in reversed(range(len(stretches))):
            stretch, last = stretches[index], index + 1 == len(stretches)
            losses = self.losses(tail) if last else 0  # when nothing but the tape and they are there
            work = share * self.tape(stretch) + max(share * self.step(stretch), losses)
            edges = [self.size(starts[i]) for i in (index, index + 1) if 0 < i < len(stretches)]
            loaded = self.size(params_of([*stretch, *(tail if last else [])]))
            loaded += self.size(params_of(stretches[index - 1])) if index else 0
            back = max(back, left + loaded + saved + work + max(edges, default=0) * self.calls)
            left += int(4 * self.tokens * self.calls) * len({n.args[0] for n in stretch if n in self.linears})
            if not offload and index:
                saved -= self.size(starts[index] - starts[index - 1]) * self.calls
        peaks = {"gradients": (int(back), "running the original model back")}
        if len(stretches) > 1:
            peaks["original forward"] = int(forward), "running the original model"
        return peaks, used

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
        product = rows * columns * 4 + columns * _QUADRATIC * 4 + part * _QUADRATIC * 4
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
