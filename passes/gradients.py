# SPDX-License-Identifier: Apache-2.0
"""How much each calibration token matters at the output of each linear: the squared gradient of the model's loss.

GPTQ's objective sums the squared output error over tokens with equal weight (paper, equation 1). To second order an
output error ``e_t`` of a linear at token ``t`` costs the model ``1/2 sum_t (g_t . e_t)^2``, with ``g_t`` the gradient
of the loss with respect to that output (the empirical Fisher matrix in place of the Hessian, arXiv 1905.12558); with
errors of different features uncorrelated, token ``t`` counts ``|g_t|^2``. Gradients see what a layer's output error
cannot: the first token of a sequence, which all later ones attend to, is worth hundreds of others in some linears and
nothing in others. But they are heavy-tailed, and a Hessian made of the few tokens with the largest ones fits those.
So half of the weight goes to all tokens equally:

    d_t = 1 + strength * |g_t|^2 / mean |g|^2

Everything in it comes from the model and the data. The backward pass runs one stretch of the graph at a time; between
stretches only the values that are live across the cut are kept.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.phases import phase
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import Batch, Env, Runner, params_of
from gptq_compile.passes.stages import live_values

ops = torch.ops.gptq_compile

_IGNORED = -100  # a token that the model reads but cannot predict; cross_entropy leaves it out


def squared_gradients(
    program: Program, runner: Runner, batches: list[Batch], linears: list[Node]
) -> dict[Node, list[Tensor]]:
    """Squared gradients of the next-token loss, summed over the output features of the linears that read one value.

    Args:
        program: in sequence form, with its original weights.
        runner: runs it.
        batches: the program's inputs; used up.
        linears: whose outputs' gradients are wanted.

    Returns:
        The value that linears read -> for each batch float32 ``[tokens]``; 0 where the loss or a gradient is not
        finite. Values that the loss does not depend on are missing.

    Raises:
        RuntimeError: an op of the program has no derivative.
    """
    return _Backward(program, runner, batches, linears).run()


class _Backward:
    def __init__(self, program: Program, runner: Runner, batches: list[Batch], linears: list[Node]) -> None:
        self.program, self.runner, self.batches = program, runner, batches
        self.linears = set(linears)
        self.ids = [b.values[program.input("input_ids")].reshape(b.sequences, -1) for b in batches]
        order = [n for n in program.graph.nodes if n.op == "call_function"]
        cuts = cuts_between_layers(order)
        self.stretches = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
        self.live = [live_values(order[b:]) for b in cuts]

    def run(self) -> dict[Node, list[Tensor]]:
        device = self.runner.device
        starts: list[list[Env]] = [[b.values for b in self.batches]]
        for stretch, live, after in zip(self.stretches, self.live, self.stretches[1:], strict=False):
            loaded = self.runner.load(stretch, {})
            self.runner.prefetch(params_of(after))
            with phase("original forward", device):
                for batch in self.batches:
                    self.runner.keep(batch, self.runner.run(batch.values, stretch, live, loaded, batch.sequences))
            starts.append([b.values for b in self.batches])
        found: dict[Node, list[Tensor | None]] = {}
        later: list[Env] = [{} for _ in self.batches]
        for index in reversed(range(len(self.stretches))):
            loaded = self.runner.load(self.stretches[index], {})
            if index:
                self.runner.prefetch(params_of(self.stretches[index - 1]))
            with phase("gradients", device):
                for i, start in enumerate(starts.pop()):
                    back = self._losses if index + 1 == len(self.stretches) else self._back
                    later[i], squares = back(i, start, self.stretches[index], loaded, later[i])
                    for node, value in squares.items():
                        parts = found.setdefault(node.args[0], [None] * len(self.batches))
                        parts[i] = value if parts[i] is None else parts[i] + value
        return {node: [p for p in parts if p is not None] for node, parts in found.items() if None not in parts}

    def _losses(self, i: int, start: Env, stretch: list[Node], loaded: Env, _: Env) -> tuple[Env, Env]:
        """The last stretch, sequence by sequence: logits are the largest value of all."""
        count = self.batches[i].sequences
        grads: list[Env] = []
        squares: list[Env] = []
        for s, ids in enumerate(self.ids[i]):
            known = {node: _sequence(node, value, s, count) for node, value in start.items()}
            one, two = self._back(i, known, stretch, loaded, {}, ids)
            grads.append(one)
            squares.append(two)
        if count == 1:
            return grads[0], squares[0]
        axes = {n: _token_axis(n) for n in grads[0]}
        joined = {n: sum(g[n] for g in grads) if a is None else torch.cat([g[n] for g in grads], a)
                  for n, a in axes.items()}  # fmt: skip
        return joined, {n: torch.cat([part[n] for part in squares]) for n in squares[0]}

    def _back(
        self, i: int, start: Env, stretch: list[Node], loaded: Env, later: Env, ids: Tensor | None = None
    ) -> tuple[Env, Env]:
        """One stretch forward with a tape, and back.

        Args:
            i: number of the batch.
            start: what the stretch starts from.
            stretch: its nodes. ``loaded``: its parameters.
            later: gradients of what it ends with.
            ids: the tokens of the one sequence, where it ends with the logits instead.

        Returns:
            The gradients of what it starts from, and the squared gradients ``[tokens]`` of its linears.
        """
        device = self.runner.device
        known = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in start.items()}
        leaves = {
            k: v.detach().requires_grad_()
            for k, v in known.items()
            if isinstance(v, Tensor) and v.is_floating_point() and k.op != "placeholder"
        }
        inside = [n for n in stretch if n in self.linears]
        ends = list(later) if ids is None else [self.program.output]
        env = {**known, **leaves, **loaded}
        if not leaves:  # the first stretch: nothing before it needs a gradient, but what is inside does
            env |= {k: v.detach().requires_grad_() for k, v in loaded.items() if _is_table(k)}
        sequences = self.batches[i].sequences if ids is None else 1
        with torch.enable_grad():
            values = self.runner.interpreter.run(env, [*inside, *ends], stretch, sequences, references=True)
            if ids is None:
                ends = [n for n in ends if values[n].requires_grad]
                outputs, upstream = [values[n] for n in ends], [later[n] for n in ends]
            else:
                logits = values[self.program.output].reshape(ids.numel(), -1).float()
                known_ids = torch.where(ids < logits.shape[1], ids, _IGNORED)[1:].long()
                outputs, upstream = [F.cross_entropy(logits[:-1], known_ids, reduction="sum")], None
                del logits
            inside = [n for n in inside if values[n].requires_grad]
            wanted = {n: values[n] for n in inside} | leaves
            if not outputs or not wanted:
                return {}, {}
            grads = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
        made = {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}
        return {n: g for n, g in made.items() if n in leaves}, {n: _squares(made[n]) for n in inside if n in made}


def _squares(grad: Tensor) -> Tensor:
    """Sums of squares over the last axis, float32, one a token; 0 where they are not finite."""
    sums = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32).square_().reshape(-1)
    return sums.nan_to_num_(0.0, 0.0, 0.0)


def _is_table(node: Node) -> bool:
    """Whether a parameter is a table of embeddings: where a tape can start."""
    return any(user.target is torch.ops.aten.embedding.default for user in node.users)


def _token_axis(node: Node) -> int | None:
    """The axis of a value along which tokens lie, or None."""
    for axis, size in enumerate(node.meta["val"].shape):
        if not isinstance(size, int):
            return axis
    return None


def _sequence(node: Node, value: Any, s: int, count: int) -> Any:
    """The part of a batch's value that belongs to its sequence ``s``."""
    if isinstance(value, int) and isinstance(size := node.meta["val"], torch.SymInt):
        (tokens,) = size.node.expr.free_symbols  # a number of tokens, or made of it
        total = sympy.solve(size.node.expr - value, tokens)[0]
        return int(size.node.expr.subs(tokens, total // count))
    axis = _token_axis(node) if isinstance(value, Tensor) else None
    if axis is None or count == 1:
        return value
    n = value.shape[axis] // count
    part = value.narrow(axis, s * n, n)
    return part - s * n if node.name == "logit_rows" else part


def cuts_between_layers(order: list[Node]) -> list[int]:
    """Where to cut: between two layers of attention, where the fewest numbers are live."""
    index = {n: i for i, n in enumerate(order)}
    change = [0] * (len(order) + 1)  # numbers a token that become live (or die, negative) before each node
    for node in order:
        last = max((index[u] for u in node.users if u in index), default=-1)
        if last >= 0 and isinstance(value := node.meta["val"], Tensor | list | tuple):
            # Never cut where several tensors live as one value.
            size = math.prod(s for s in value.shape if isinstance(s, int)) if isinstance(value, Tensor) else 1 << 40
            change[index[node] + 1] += size
            change[last + 1] -= size
    live = list(itertools.accumulate(change))
    layers = [index[n] for n in order if n.target is ops.attention.default]
    return [min(range(a + 1, b + 1), key=lambda p: (live[p], -p)) for a, b in itertools.pairwise(layers)]
