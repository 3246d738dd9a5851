# SPDX-License-Identifier: Apache-2.0
"""Quantization of the linears of experts: each expert has the Hessian of the tokens that are routed to it.

The weight of all experts, ``[experts, N, K]`` (or ``[experts, K, N]``), is handled as one matrix of ``experts * N``
rows, so that solutions, reports and the work folder need not know about experts.

Experts that saw fewer than :data:`TOKENS_PER_FEATURE` tokens for each input feature are rounded to nearest, and the
report lists them. A Hessian of fewer tokens fits those instead of the distribution: on covariances with power-law
spectra (exponents 0.5 to 1, 256 and 512 features, 3 and 4 bits) the true error of GPTQ was 0.8 to 2.1 times that of
rounding with one token a feature, up to 2.6 times with half as many, and 0.5 to 1.0 times with four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import gptq_compile.passes.dialect_experts  # noqa: F401  registers ops
from gptq_compile.passes.common import Node, with_defaults
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solution import RowErrors, Solution, with_errors
from gptq_compile.passes.gptq.solver import prepare, solve
from gptq_compile.passes.program import Program

ops = torch.ops.gptq_compile

TOKENS_PER_FEATURE = 2
_GATHER = 1024  # tokens of one product: there is such a buffer for each expert
_LISTED = 16  # experts that a note names


def is_expert(node: Node) -> bool:
    """Whether a node is a linear of experts on a parameter."""
    return node.target is ops.expert_linear.default and "param" in node.args[1].meta


def is_transposed(node: Node) -> bool:
    """Whether the weight of a linear of experts is ``[experts, K, N]``."""
    return bool(with_defaults(node.args[3:], [None, False])[1] or node.kwargs.get("transposed", False))


def bias_of(node: Node) -> Node | None:
    """The bias of a linear of experts."""
    return node.kwargs.get("bias") or with_defaults(node.args[3:], [None, False])[0]


def matrix_shape(node: Node) -> tuple[int, int]:
    """Rows and columns of the matrix that a (dense or expert) linear's weight is solved as."""
    shape = [int(d) for d in node.args[1].meta["val"].shape]
    if len(shape) == 2:
        return shape[0], shape[1]
    experts, a, b = shape
    return (experts * b, a) if is_transposed(node) else (experts * a, b)


def as_matrix(weight: Tensor, node: Node) -> Tensor:
    """A weight as the matrix it is solved as; a dense one is returned as it is."""
    if weight.dim() == 2:
        return weight
    return (weight.transpose(1, 2) if is_transposed(node) else weight).flatten(0, 1)


@dataclass(frozen=True)
class ExpertSolution(Solution):
    """A solution of all experts' rows.

    Attributes:
        experts: their number. ``transposed``: whether the parameter is ``[experts, K, N]``.
    """

    experts: int = 1
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """Dequantized weight in the parameter's shape, f32."""
        flat = super().weight
        cube = flat.reshape(self.experts, -1, flat.shape[1])
        return cube.transpose(1, 2).contiguous() if self.transposed else cube


def for_node(solution: Solution, node: Node) -> Solution:
    """A solution that gives the weight in the shape of the node's parameter."""
    if node.args[1].meta["val"].dim() == 2 or isinstance(solution, ExpertSolution):
        return solution
    parts = {name: getattr(solution, name) for name in Solution.__dataclass_fields__}
    return ExpertSolution(**parts, experts=int(node.args[1].meta["val"].shape[0]), transposed=is_transposed(node))


class ExpertHessians:
    """One Hessian an expert.

    Args:
        experts: their number. ``features``: input features. ``device``: where the sums live.
        name: what is observed, for messages.
    """

    def __init__(self, experts: int, features: int, device: torch.device, name: str) -> None:
        self.parts = [
            Hessian(features, device=device, name=f"{name}, expert {e}", drop_bad=True, gather=_GATHER)
            for e in range(experts)
        ]

    def add(self, x: Tensor, expert: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            x: ``[..., K]`` inputs. ``expert``: ``[...]`` who reads each.
            weights: token weights ``[n]``, the rows of x being n tokens times the experts of each.
        """
        rows, ids = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
        if weights is not None:
            weights = weights.reshape(-1).repeat_interleave(ids.numel() // weights.numel())
        for e in ids.unique().tolist():
            mine = (ids == e).nonzero()[:, 0]
            self.parts[e].add(rows[mine], None if weights is None else weights[mine])


def observer(node: Node, device: torch.device, name: str) -> ExpertHessians:
    """The empty Hessians of a linear of experts."""
    experts = int(node.args[1].meta["val"].shape[0])
    return ExpertHessians(experts, matrix_shape(node)[1], device, name)


def observe(hessian: Hessian | ExpertHessians, read: Sequence[Tensor], weights: Tensor | None) -> None:
    """Adds tokens to whichever Hessian a group has: ``read`` are the values of the group's ``reads``."""
    if isinstance(hessian, ExpertHessians):
        hessian.add(read[0], read[1], weights)
    else:
        hessian.add(read[0], weights)


def solve_experts(weight: Tensor, hessians: ExpertHessians, config: QuantizeConfig, name: str) -> Solution:
    """Solves every expert by itself.

    Args:
        weight: float32 ``[experts * N, K]``.
        hessians: of the experts' tokens.
        config: settings; groups always follow the natural column order, which all experts share.
        name: of the weight, for messages.

    Returns:
        The stacked solution; its note names the experts that were rounded to nearest for want of tokens.
    """
    if config.permutes:
        config = replace(config, static_groups=True)
    parts: list[Solution] = []
    few: list[int] = []
    notes: dict[str, list[int]] = {}
    for e, (part, hessian) in enumerate(zip(weight.chunk(len(hessians.parts)), hessians.parts, strict=True)):
        if hessian.tokens < TOKENS_PER_FEATURE * hessian.features:
            few.append(e)
            parts.append(_rounded(part, hessian, config, f"{name}, expert {e}"))
        else:
            parts.append(solve(part, prepare(hessian, config), config, name=f"{name}, expert {e}"))
            if reason := parts[-1].stats.reason:
                notes.setdefault(reason, []).append(e)
    said = [f"{reason} ({_names(who)})" for reason, who in notes.items()]
    if few:
        least = TOKENS_PER_FEATURE * hessians.parts[0].features
        said.insert(0, f"{_names(few)} saw fewer than {least} tokens and were rounded to nearest")
    return _stack(parts, "; ".join(said) or None)


def _rounded(weight: Tensor, hessian: Hessian, config: QuantizeConfig, name: str) -> Solution:
    """Rounding to nearest, measured on what tokens there were."""
    if hessian.tokens == 0:
        return rtn(weight, config, name=name)
    matrix = hessian.matrix().double()
    solution = rtn(weight, config, name=name)
    quadratic = lambda m: ((m.double() @ matrix) * m.double()).sum(1)  # noqa: E731
    error, energy = quadratic(weight - solution.weight), quadratic(weight)
    errors = RowErrors(error, error, energy, torch.ones_like(error, dtype=torch.bool))
    return replace(solution, stats=with_errors(solution.stats, errors), row_errors=errors)


def _names(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:_LISTED]))
    more = f" and {len(experts) - _LISTED} more" if len(experts) > _LISTED else ""
    return f"expert{'s' if len(experts) > 1 else ''} {shown}{more}"


def _stack(parts: list[Solution], note: str | None) -> Solution:
    """The experts' solutions below one another, with errors over those that were measured."""
    stats = parts[0].stats
    measured = [p.row_errors for p in parts if p.row_errors is not None]
    seconds = sum(p.stats.seconds for p in parts)
    dead = sum(p.stats.dead_columns for p in parts)
    damp = max(p.stats.damp for p in parts)
    stats = replace(stats, reason=note, seconds=seconds, dead_columns=dead, damp=damp)
    if measured:
        fields = ("objective", "objective_rtn", "energy", "from_rtn")
        stats = with_errors(stats, RowErrors(**{f: torch.cat([getattr(m, f) for m in measured]) for f in fields}))
    method = "gptq" if any(p.stats.method == "gptq" for p in parts) else "rtn"
    zeros = None if parts[0].zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None])
    return replace(
        parts[0],
        codes=torch.cat([p.codes for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        zeros=zeros,
        stats=replace(stats, method=method),
        row_errors=None,
    )


def rewrite(program: Program, node: Node, solution: Solution) -> None:
    """Replaces a linear of experts by a ``quant_expert_linear`` on the solution's tensors."""
    experts, name = int(node.args[1].meta["val"].shape[0]), node.args[1].meta["param"]
    rows, columns = matrix_shape(node)
    # The dequantized weight of a transposed parameter is transposed back by this ending of its name.
    name = f"{name}.T" if is_transposed(node) else name
    shape = (experts, rows // experts, -1)
    tensors = {"codes": solution.codes, "scales": solution.scales, "zeros": solution.zeros}
    params = {
        key: None if value is None else program.add_param(f"{name}.{key}", value.cpu().reshape(shape))
        for key, value in tensors.items()
    }
    x, _, expert = node.args[:3]
    args = (x, params["codes"], params["scales"], params["zeros"], expert, bias_of(node), solution.bits,
            min(solution.group_size, columns))  # fmt: skip
    with program.graph.inserting_before(node):
        new = program.call(ops.quant_expert_linear.default, args, like=node)
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
