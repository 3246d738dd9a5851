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

Everything in it comes from the model and the data. Where the whole model's weights and the tape of a call fit (the
memory plan says so), one tape goes over all of it. Elsewhere the original model runs forward first, and the backward
pass runs one stretch of the graph at a time; between stretches only the values that are live across the cut are kept.
The head and the loss run sequence by sequence: logits are the largest value of all.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import sympy
import torch
from torch import Tensor

from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.phases import phase
from gptq_compile.passes.interpret import fused_ops
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import Batch, Env, Runner, params_of
from gptq_compile.passes.stages import live_values

aten = torch.ops.aten
ops = torch.ops.gptq_compile

_IGNORED = -100  # a token that the model reads but cannot predict


def squared_gradients(
    program: Program, runner: Runner, batches: list[Batch], linears: list[Node], whole: bool = False
) -> dict[Node, Tensor]:
    """Squared gradients of the next-token loss, summed over the output features of the linears that read one value.

    Args:
        program: in sequence form, with its original weights.
        runner: runs it.
        batches: the program's inputs; used up.
        linears: whose outputs' gradients are wanted.
        whole: one tape over the whole model instead of one stretch after another.

    Returns:
        The value that linears read -> float32 ``[tokens of all batches]``; 0 where the loss or a gradient is not
        finite. Values that the loss does not depend on are missing.

    Raises:
        RuntimeError: an op of the program has no derivative.
    """
    return _Backward(program, runner, batches, linears, whole).run()


class _Backward:
    def __init__(
        self, program: Program, runner: Runner, batches: list[Batch], linears: list[Node], whole: bool
    ) -> None:
        self.program, self.runner, self.batches = program, runner, batches
        self.linears = set(linears)
        self.ids = [b.values[program.input("input_ids")].reshape(b.sequences, -1) for b in batches]
        order = [n for n in program.graph.nodes if n.op == "call_function"]
        self.stretches, self.tail = stretches_of(order, whole)
        bounds = list(itertools.accumulate(len(stretch) for stretch in self.stretches))
        self.live = [live_values(order[b:]) for b in bounds]
        self.logits: Node = program.output
        if self.logits.target is aten.index_select.default and self.logits.args[1:] == (1, program.input("logit_rows")):
            # All rows are asked for, in order.
            self.logits = self.logits.args[0]  # type: ignore[assignment]
            self.tail = self.tail[:-1]
        self.carries: set[Node] = set()  # what has a gradient: it comes from an embedding or a linear
        for node in order:
            begins = node.target in (aten.embedding.default, aten.linear.default)
            if begins or any(a in self.carries for a in node.all_input_nodes):
                self.carries.add(node)

    def run(self) -> dict[Node, Tensor]:
        device = self.runner.device
        last = len(self.stretches) - 1
        starts: list[list[Env]] = [[b.values for b in self.batches]]
        for index in range(last):
            loaded = self.runner.load(self.stretches[index], {})
            self.runner.prefetch(params_of(self.stretches[index + 1]))
            with phase("original forward", device):
                for batch in self.batches:
                    values = self.runner.run(
                        batch.values, self.stretches[index], self.live[index], loaded, batch.sequences
                    )
                    self.runner.keep(batch, values)
                    del values
            starts.append([b.values for b in self.batches])
            del loaded
        found: dict[Node, list[Tensor | None]] = {}
        later: list[Env] = [{} for _ in self.batches]
        for index in reversed(range(len(self.stretches))):
            loaded = self.runner.load(self.stretches[index] + (self.tail if index == last else []), {})
            if index:
                self.runner.prefetch(params_of(self.stretches[index - 1]))
            with phase("gradients", device):
                for i, start in enumerate(starts.pop()):
                    squares: dict[Node, Tensor] = {}
                    later[i] = self._back(i, start, index, loaded, later[i], squares)
                    for node, value in squares.items():
                        parts = found.setdefault(node.args[0], [None] * len(self.batches))  # type: ignore[arg-type]
                        before = parts[i]
                        parts[i] = value if before is None else before + value
            del loaded
        made = {node: [p for p in parts if p is not None] for node, parts in found.items()}
        return {node: torch.cat(parts) for node, parts in made.items() if len(parts) == len(self.batches)}

    def _back(self, i: int, start: Env, index: int, loaded: Env, later: Env, squares: dict[Node, Tensor]) -> Env:
        """One stretch forward with a tape, and back.

        Args:
            i: number of the batch.
            start: what the stretch starts from.
            index: number of the stretch.
            loaded: its parameters, and the tail's after the last one.
            later: gradients of what it ends with; not read for the last one.
            squares: receives the squared gradients ``[tokens]`` of its linears.

        Returns:
            The gradients of what it starts from.
        """
        device, stretch = self.runner.device, self.stretches[index]
        known = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in start.items()}
        leaves = self._leaves(known)
        made = set(stretch)
        last = index + 1 == len(self.stretches)
        ends = [n for n in self.live[index] if n in made or n in known] if last else list(later)
        tables = [n for n in stretch if n.target is aten.embedding.default]  # where a tape begins
        with torch.enable_grad():
            values = self.runner.interpreter.run(
                {**known, **leaves, **loaded},
                [*ends, *tables],
                stretch,
                self.batches[i].sequences,
                references=True,
                seen=functools.partial(self._watch, squares),
            )
            if last:
                later = self._losses(i, {n: values[n] for n in ends}, loaded, squares)
            ends = [n for n in later if values[n].requires_grad]
            begins = [*leaves.values(), *(values[n] for n in tables)]
            if not ends or not begins:
                return {}
            outputs, upstream = [values[n] for n in ends], [later[n] for n in ends]
            del values
            grads = torch.autograd.grad(outputs, begins, upstream, allow_unused=True)
        return {n: g for n, g in zip(leaves, grads, strict=False) if g is not None}

    def _losses(self, i: int, ends: Env, loaded: Env, squares: dict[Node, Tensor]) -> Env:
        """The gradients of what the last stretch ends with."""
        count = self.batches[i].sequences
        grads: list[Env] = []
        parts: list[dict[Node, Tensor]] = []
        for s, ids in enumerate(self.ids[i]):
            known = {n: _sequence(n, v.detach() if isinstance(v, Tensor) else v, s, count) for n, v in ends.items()}
            leaves = self._leaves(known)
            found: dict[Node, Tensor] = {}
            logits = self.runner.interpreter.run(
                {**known, **leaves, **loaded}, [self.logits], self.tail, references=True,
                seen=functools.partial(self._watch, found),
            )[self.logits]  # fmt: skip
            if not leaves or not logits.requires_grad:
                return {}
            rows = logits.reshape(ids.numel(), -1)
            labels = torch.full_like(ids, _IGNORED, dtype=torch.int64)
            labels[:-1] = torch.where(ids < rows.shape[1], ids, _IGNORED)[1:]
            upstream = loss_gradient(rows.detach(), labels).reshape(logits.shape)
            got = torch.autograd.grad(logits, list(leaves.values()), upstream, allow_unused=True)
            grads.append({n: g for n, g in zip(leaves, got, strict=True) if g is not None})
            parts.append(found)
            del logits, rows, upstream
        squares.update({n: torch.cat([part[n] for part in parts]) for n in parts[0]})
        if count == 1:
            return grads[0]
        axes = {n: _token_axis(n) for n in grads[0]}
        return {
            n: sum(g[n] for g in grads) if axis is None else torch.cat([g[n] for g in grads], axis)
            for n, axis in axes.items()
        }

    def _leaves(self, known: Env) -> Env:
        """The known values that have a gradient, as the beginning of a tape."""
        return {
            n: v.detach().requires_grad_()
            for n, v in known.items()
            if n in self.carries and isinstance(v, Tensor) and v.is_floating_point()
        }

    def _watch(self, squares: dict[Node, Tensor], node: Node, value: Any) -> None:
        """Begins a tape at embeddings, and takes the squares of a linear's gradient as it passes by, so that nobody has
        to keep it."""
        if node.target is aten.embedding.default:
            value.requires_grad_()
        if node in self.linears and value.requires_grad:
            value.register_hook(lambda grad: squares.__setitem__(node, _squares(grad)))


def loss_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Derivative of the summed cross-entropy of labels: softmax(logits) - onehot(labels).

    Args:
        logits: ``[n, V]``; the softmax is float32.
        labels: int64 ``[n]``; rows with a negative one are left out of the loss.

    Returns:
        ``[n, V]`` in the logits' type.
    """
    if logits.is_cuda and fused_ops():
        from gptq_compile.passes.fused_triton import loss_gradient as fused

        return fused(logits, labels)
    known = (labels >= 0).unsqueeze(1)
    share = torch.softmax(logits.float(), -1).mul_(known)
    share.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), -known.float())
    return share.to(logits.dtype)


def _squares(grad: Tensor) -> Tensor:
    """Sums of squares over the last axis, float32, one a token; 0 where they are not finite."""
    sums = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32).square_().reshape(-1)
    return sums.nan_to_num_(0.0, 0.0, 0.0)


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


def stretches_of(order: list[Node], whole: bool) -> tuple[list[list[Node]], list[Node]]:
    """The stretches of the backward pass, and the nodes from the head on, which run sequence by sequence."""
    layers = [i for i, n in enumerate(order) if n.target is ops.attention.default]
    linears = [i for i, n in enumerate(order) if n.target is aten.linear.default]
    head = max(linears[-1] if linears else 0, layers[-1] + 1 if layers else 0)
    cuts = [] if whole else [c for c in cuts_between_layers(order) if c < head]
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, head], strict=True)], order[head:]


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
