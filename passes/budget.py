# SPDX-License-Identifier: Apache-2.0
"""Bits and group size of every linear under a budget, from measured sensitivity (see `passes/sensitivity.py`).

An average counts what is stored for the quantized weights, scales and zero points included. A size is that of the
artifact's weights, those that stay in full precision included. An increase of perplexity is found by quantizing and
measuring: the predicted divergences say which linears deserve bits, the measurement says how many there must be.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptq_compile.errors import CalibrationError, ConfigError
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.target import Target
from gptq_compile.passes.common import Node
from gptq_compile.passes.dialect import packed_case
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.gptq.allocate import Allocation, Choice, allocate
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.store import SolutionStore
from gptq_compile.passes.gptq.world import current, join
from gptq_compile.passes.gptq_quantize import GptqQuantize, LinearReport
from gptq_compile.passes.program import Program
from gptq_compile.passes.round_head import head_config
from gptq_compile.passes.sensitivity import Candidate, Sensitivity, measure
from gptq_compile.passes.stages import quantizable

log = logging.getLogger(__name__)

ROUNDS = 5  # quantizations that a bound on perplexity may take
CLOSE = 0.8  # of the allowed increase: what is used up to there is good enough
HELD_OUT = 8  # one calibration sequence in so many is kept from the calibration to measure perplexity on
_ALIGNED = 256  # bytes that a tensor's name and alignment may take in the weights file


@dataclass(frozen=True)
class Footprint:
    """How weights are stored.

    Attributes:
        target: whose layouts pack them. ``width``: bytes of a number that is not quantized.
        lm_head_bits: of an output projection that is not quantized with the rest, 0 if it stays as it is.
        header: bytes of the file that are no tensor's.
    """

    target: Target
    width: int
    lm_head_bits: int = 0
    header: int = 0

    def kept(self, shape: tuple[int, ...]) -> int:
        """Most bytes of a tensor that is not quantized."""
        half = self.target.kind == "cpu" and len(shape) == 2  # see store_half
        return math.prod(shape) * (2 if half else self.width) + _ALIGNED

    def head(self, rows: int, columns: int) -> int:
        """Bytes of a head that `RoundHead` rounded."""
        return file_bits(rows, columns, head_config(self.lm_head_bits, columns), self.target) // 8


def stored_bits(rows: int, columns: int, config: QuantizeConfig) -> int:
    """Bits of a quantized weight: codes, a float16 scale a group and, on asymmetric grids, a uint8 zero point."""
    grid = 16 if config.sym else 24
    return rows * (8 * math.ceil(columns * config.wbits / 8) + config.groups_in(columns) * grid)


def file_bits(rows: int, columns: int, config: QuantizeConfig, target: Target) -> int:
    """Bits of the tensors that a target's kernels read, padding and file overhead included."""
    case = packed_case(config.wbits, config.group_for(columns), columns, rows, not config.sym, False, "float32")
    sizes = {"uint32": 4, "float16": 2, "uint8": 1}
    tensors = layout_for(case, target).tensors(case).values()
    return 8 * sum(math.prod(shape) * sizes[dtype] + _ALIGNED for shape, dtype in tensors)


class BudgetedQuantize(GptqQuantize):
    """``gptq_quantize`` with settings per linear that keep to the config's budget.

    Args:
        config: with ``avg_bits``, ``max_size`` or ``max_ppl_increase``.
        calibration, device, on_linear, store: as in `GptqQuantize`. Trials for ``max_ppl_increase`` are not kept.
        footprint: needed for ``max_size``.
        note: told what is measured and chosen.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        calibration: Tensor | None = None,
        device: str | torch.device = "cpu",
        on_linear: Callable[[LinearReport, int, int], None] | None = None,
        store: SolutionStore | None = None,
        *,
        footprint: Footprint | None = None,
        note: Callable[[str], None] = log.info,
    ) -> None:
        super().__init__(config, calibration, device, on_linear, store)
        self.footprint, self.note = footprint, note

    @torch.no_grad()
    def run(self, program: Program) -> bool:
        linears = quantizable(program, self.config.quantize_lm_head)
        if not linears:
            return False
        assert self.calibration is not None
        self.device = join(self.device)
        held_out = self._hold_out() if self.config.max_ppl_increase is not None else None
        found = measure(
            program, linears, self.config, self.calibration, self.device,
            lambda s, i, n: self.note(f"measured {i} of {n} linears") if i % 50 == 0 or i == n else None,
        )  # fmt: skip
        # Every process measures everything; rank 0's figures decide.
        sensitivities = current().agree(list(found.values()))
        table = _Table(sensitivities, self.config, self._size_of())
        if held_out is not None:
            return self._bounded(program, table, held_out)
        if self.config.avg_bits is not None:
            budget = self.config.avg_bits * table.weights
        else:
            assert self.config.max_size is not None
            budget = 8 * self.config.max_size - self._others(program, linears)
        return self._quantize(program, table, table.choose(budget))

    def _hold_out(self) -> Tensor:
        assert self.calibration is not None
        count = max(1, len(self.calibration) // HELD_OUT)
        if len(self.calibration) < 2:
            raise CalibrationError(
                "Perplexity is measured on calibration sequences that are held out, so max_ppl_increase takes two at "
                "least; give more --nsamples."
            )
        self.calibration, held_out = self.calibration[:-count], self.calibration[-count:]
        return held_out

    def _size_of(self) -> Callable[[int, int, QuantizeConfig], int]:
        if self.config.max_size is None:
            return stored_bits
        if self.footprint is None:
            raise ConfigError("max_size needs to know the target, whose layout decides how large weights become.")
        target = self.footprint.target
        return lambda rows, columns, config: file_bits(rows, columns, config, target)

    def _others(self, program: Program, linears: Sequence[Node]) -> int:
        """Bits of the parameters that stay as they are."""
        assert self.footprint is not None
        coded, tensors = set(linears), self.footprint.header
        if self.footprint.lm_head_bits:
            heads = {n for n in quantizable(program, True) if n not in coded}
            tensors += sum(self.footprint.head(*w.meta["val"].shape) for w in {n.args[1] for n in heads})
            coded |= heads
        kept = {
            program.params.canonical(n.meta["param"]): tuple(n.meta["val"].shape)
            for n in program.param_nodes.values()
            if any(user not in coded for user in n.users)
        }
        return 8 * (tensors + sum(map(self.footprint.kept, kept.values())))

    def _quantize(self, program: Program, table: _Table, chosen: Allocation) -> bool:
        self.settings = table.settings(chosen)
        self.note(table.words(chosen))
        changed = super().run(program)
        program.attrs["budget"] = table.summary(chosen)
        for entry in program.attrs["quantization"]:
            entry["divergence"] = table.predicted(chosen)[entry["name"]]
        return changed

    def _bounded(self, program: Program, table: _Table, held_out: Tensor) -> bool:
        """The fewest bits whose measured perplexity stays within the bound: secant steps on the predicted curve."""
        assert self.config.max_ppl_increase is not None
        allowed = math.log1p(self.config.max_ppl_increase)
        full = _nll(program, held_out, self.device)
        gain = 1.0  # measured nats per predicted nat
        low, high = table.smallest, table.largest
        best: tuple[Program, Allocation, list[LinearReport], float] | None = None
        self.store = None  # it knows one solution a linear
        for _ in range(ROUNDS):
            chosen = table.cheapest(allowed / gain, low, high)
            trial, self.reports = program.clone(), []
            self._quantize(trial, table, chosen)
            increase = current().agree(_nll(trial, held_out, self.device) - full)
            self.note(
                f"{chosen.size / table.weights:.3f} bits a weight raise the perplexity of held-out calibration text by "
                f"{math.expm1(increase):.2%} (allowed: {self.config.max_ppl_increase:.2%})"
            )
            if increase <= allowed:
                best, high = (trial, chosen, self.reports, increase), chosen.size
            else:
                low = chosen.size
            if chosen.size >= table.largest * (1 - 1e-9) or (increase <= allowed and increase >= CLOSE * allowed):
                best = best or (trial, chosen, self.reports, increase)
                break
            if high - low < 0.02 * table.weights:
                break
            # A step that moved nothing would be repeated, so the gain moves by a tenth at least.
            measured = max(increase, 1e-6) / max(chosen.cost, 1e-9)
            gain = measured * (1.1 if increase > allowed else 1.0)
        if best is None:  # no trial passed: the most bits there are
            chosen = table.choose(table.largest)
            trial, self.reports = program.clone(), []
            self._quantize(trial, table, chosen)
            best = trial, chosen, self.reports, _nll(trial, held_out, self.device) - full
        trial, chosen, self.reports, increase = best
        if increase > allowed:
            log.warning(
                "Even %.2f bits a weight raise perplexity by %.2f %%, more than the allowed %.2f %%.",
                chosen.size / table.weights, 100 * math.expm1(increase), 100 * self.config.max_ppl_increase,
            )  # fmt: skip
        program.module, program.params, program.attrs = trial.module, trial.params, trial.attrs
        program.attrs["budget"] |= {"measured_ppl_increase": math.expm1(increase), "held_out": len(held_out)}
        return True


class _Table:
    """Sizes and predicted costs of every linear's candidates."""

    def __init__(
        self,
        linears: Sequence[Sensitivity],
        config: QuantizeConfig,
        size_of: Callable[[int, int, QuantizeConfig], int],
    ) -> None:
        self.config = config
        self.linears = list(linears)
        self.candidates: list[list[Candidate]] = [list(s.divergence) for s in self.linears]
        self.weights = sum(math.prod(s.shape) for s in self.linears)
        self.items = [
            [Choice(size_of(*s.shape, self._config(c)), cost) for c, cost in s.divergence.items()] for s in self.linears
        ]
        self.smallest = sum(min(c.size for c in item) for item in self.items)
        self.largest = sum(max(c.size for c in item) for item in self.items)

    def _config(self, candidate: Candidate) -> QuantizeConfig:
        bits, group = candidate
        return replace(self.config, wbits=bits, group_size=group, avg_bits=None, max_size=None, max_ppl_increase=None)

    def choose(self, budget: float) -> Allocation:
        """The best allocation within a budget of bits.

        Raises:
            ConfigError: the smallest settings exceed it.
        """
        if budget < self.smallest:
            raise ConfigError(
                f"The budget leaves {budget / 8e6:.3f} MB ({max(budget, 0) / self.weights:.3f} bits a weight) for the "
                f"quantized weights, but at 2 bits they take {self.smallest / 8e6:.3f} MB "
                f"({self.smallest / self.weights:.3f} bits a weight, scales and zero points included). Allow more, "
                "or use a larger --group-size."
            )
        return allocate(self.items, budget)

    def cheapest(self, cost: float, low: float, high: float) -> Allocation:
        """The smallest allocation between two sizes whose predicted cost is at most ``cost``, or the largest there."""
        best = self.choose(high)
        for _ in range(24):
            middle = (low + high) / 2
            chosen = self.choose(middle)
            if chosen.cost <= cost:
                best, high = chosen, middle
            else:
                low = middle
        return best

    def settings(self, chosen: Allocation) -> dict[str, QuantizeConfig]:
        picked = zip(self.linears, self.candidates, chosen.picks, strict=True)
        return {s.name: self._config(candidates[pick]) for s, candidates, pick in picked}

    def predicted(self, chosen: Allocation) -> dict[str, float]:
        picked = zip(self.linears, self.items, chosen.picks, strict=True)
        return {s.name: item[pick].cost for s, item, pick in picked}

    def summary(self, chosen: Allocation) -> dict[str, Any]:
        settings = self.settings(chosen)
        bits = sum(stored_bits(*s.shape, settings[s.name]) for s in self.linears)
        return {
            "bits_per_weight": bits / self.weights,
            "predicted_divergence": chosen.cost,
            "predicted_divergence_bound": chosen.bound,
            "reference_divergence": {s.name: s.reference for s in self.linears},
        }

    def words(self, chosen: Allocation) -> str:
        """One line on what was chosen."""
        count: Counter[Candidate] = Counter()
        for s, candidates, pick in zip(self.linears, self.candidates, chosen.picks, strict=True):
            count[candidates[pick]] += math.prod(s.shape)
        shares = ", ".join(
            f"{bits} bits in {'rows' if group == -1 else f'groups of {group}'} {share / self.weights:.0%}"
            for (bits, group), share in sorted(count.items())
        )
        average = self.summary(chosen)["bits_per_weight"]
        return f"chosen: {average:.3f} bits a weight with scales and zero points ({shares})"


def _nll(program: Program, sequences: Tensor, device: torch.device) -> float:
    """Mean negative log-likelihood of the tokens after the first, in nats."""
    total = 0.0
    for ids in sequences:
        logits = evaluate(program, ids, device=str(device))[:-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:].to(logits.device)).double())
    return total / len(sequences)
