# SPDX-License-Identifier: Apache-2.0
"""Runs a program, or a stretch of it, on the eager reference of its ops."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.passes import dialect
from gptq_compile.passes.program import Program

log = logging.getLogger(__name__)

aten = torch.ops.aten
ops = torch.ops.gptq_compile

_HALVES = (torch.float16, torch.bfloat16)
_PRODUCTS = {
    op: count
    for ops_, count in (
        ((aten.linear.default, aten.addmm.default, aten.baddbmm.default), 3),
        ((aten.matmul.default, aten.mm.default, aten.bmm.default), 2),
        ((ops.attention.default,), 3),
        ((ops.expert_linear.default,), 2),
    )
    for op in ops_
}
"""Products of matrices -> how many of their first arguments a half-precision run converts."""


class Interpreter:
    """Evaluates nodes in order, loading a parameter at its first use and dropping every value after its last.

    In half precision, what products of matrices and embeddings read is stored in it and products take their operands in
    it; other parameters stay float32 and other ops compute in the widest type of what they are given.

    Args:
        program: what to run.
        device: where values live.
        dtype: floating parameters are converted to it (None leaves them as stored); float16 and bfloat16 as above.
    """

    def __init__(self, program: Program, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.program = program
        self.device = torch.device(device)
        self.dtype = dtype
        self._fused = fused_ops() if self.device.type == "cuda" else {}

    def param_dtype(self, node: fx.Node) -> torch.dtype:
        """The type that a parameter has while the program runs."""
        stored = self.program.params.dtype(node.meta["param"])
        if self.dtype is None or not stored.is_floating_point:
            return stored
        return torch.float32 if self.dtype in _HALVES and not _multiplied(node) else self.dtype

    def param(self, node: fx.Node) -> Tensor:
        """Loads the parameter of a placeholder onto the device."""
        return self.stored(node).to(self.param_dtype(node))

    def stored(self, node: fx.Node) -> Tensor:
        """The parameter of a placeholder on the device, in the type it is stored in."""
        return self.program.params.get(node.meta["param"]).to(self.device)

    def run(
        self,
        env: dict[fx.Node, Any],
        want: Iterable[fx.Node],
        nodes: Iterable[fx.Node] | None = None,
        sequences: int = 1,
        references: bool = False,
        seen: Callable[[fx.Node, Any], None] | None = None,
    ) -> dict[fx.Node, Any]:
        """Evaluates ``nodes`` (default: the whole graph) and returns the values of ``want``.

        Args:
            env: values known at the start (user inputs, or values live across a cut); it is not changed.
            want: nodes whose values to return; each is in ``env`` or computed.
            nodes: the stretch to evaluate, in graph order.
            sequences: of equal length to which the tokens belong, one after the other. More than one needs a program
                in which only attention mixes tokens.
            references: run what dialect ops are defined by (or fused kernels with derivatives) instead of the ops,
                which have no derivative.
            seen: called with each node and its value.
        """
        env = dict(env)
        want = list(want)
        todo = [n for n in (self.program.graph.nodes if nodes is None else nodes) if n.op == "call_function"]
        last_use: dict[fx.Node, fx.Node] = {}
        for node in todo:
            for arg in node.all_input_nodes:
                last_use[arg] = node
        keep = set(want)
        for node in todo:
            for arg in node.all_input_nodes:
                if arg not in env and "param" in arg.meta:
                    env[arg] = self.param(arg)
            lookup = env.__getitem__
            args, kwargs = fx.node.map_arg(node.args, lookup), fx.node.map_arg(node.kwargs, lookup)
            env[node] = self._call(node.target, args, kwargs, sequences, references)
            if seen is not None:
                seen(node, env[node])
            for arg in node.all_input_nodes:
                if last_use[arg] is node and arg not in keep:
                    env.pop(arg, None)
        for node in want:
            if node not in env and "param" in node.meta:
                env[node] = self.param(node)
        return {node: env[node] for node in want}

    def _call(self, target: Any, args: Any, kwargs: dict[str, Any], sequences: int, references: bool) -> Any:
        if self.dtype in _HALVES and (count := _PRODUCTS.get(target, 0)):
            args = tuple(self._half(a) if i < count else a for i, a in enumerate(args))
            if "bias" in kwargs:
                kwargs = {**kwargs, "bias": self._half(kwargs["bias"])}
        # The trace ran on the meta device, so tensor factories in the graph ask for it; values live on ours.
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self.device}
        call = self._fused.get(target) or (dialect.REFERENCES.get(target, target) if references else target)
        if sequences > 1 and target is ops.attention.default:
            return _attention(call, args, kwargs, sequences)
        return call(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@functools.cache
def fused_ops() -> dict[Any, Callable[..., Any]]:
    """Ops of the dialect that are one kernel on CUDA; none without Triton (an optional part of torch's CUDA wheels)."""
    try:
        from gptq_compile.passes.fused_triton import FUSED
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); norms and activations run operation by operation.", error)
        return {}
    return FUSED


def _multiplied(node: fx.Node) -> bool:
    """Whether all that reads a parameter are embeddings and products of matrices."""
    return all(user.target in _PRODUCTS or user.target is aten.embedding.default for user in node.users)


def _attention(attend: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sequences: int) -> Tensor:
    q, k, v, *rest = args
    parts = [t.reshape(sequences, -1, *t.shape[2:]) for t in (q, k, v)]
    names = ("scale", "window", "softcap", "sinks", "alibi_slopes")
    options = {**dict(zip(names, rest, strict=False)), **kwargs}
    window = options.get("window", 0)
    plain = not options.get("softcap") and options.get("sinks") is None and options.get("alibi_slopes") is None
    if plain and (window == 0 or window >= parts[0].shape[1]):  # one call takes a batch then
        out = attend(*parts, *rest, **kwargs)
    else:
        out = torch.cat([attend(*(t[i : i + 1] for t in parts), *rest, **kwargs)
                         for i in range(sequences)])  # fmt: skip
    return out.reshape(1, -1, *out.shape[2:])
