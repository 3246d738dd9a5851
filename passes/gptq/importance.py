# SPDX-License-Identifier: Apache-2.0
"""How much each calibration token matters to the rest of the model, from the attention it receives.

GPTQ's objective sums the squared output error over tokens with equal weight (paper, equation 1). In a decoder an error
made at one token is also read by every later token that attends to it, so tokens that receive much attention (above
all the attention sink at the start of a sequence) deserve more than one part in a thousand.

An error ``e`` in the value at token ``t`` adds ``A[q, t] e`` to the attention output of each query ``q``. With errors
of different tokens uncorrelated, the squared error summed over queries is ``sum_q A[q, t]^2 |e|^2``. That sum, averaged
over heads, is the token's *received attention* in one layer. A linear at token ``t`` then weighs

    d_t = 1 + strength * (sum of received attention over the attention layers downstream of the linear)

where 1 stands for the token's own prediction. Everything in it comes from the model and the data: nothing depends on
positions by number, on BOS, or (for a token that attracts little attention) on the length of the sequence.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.passes.dialect import attention_scores, softmax_with_sinks
from gptq_compile.passes.program import Program

log = logging.getLogger(__name__)

_QUERY_BLOCK = 512


@functools.cache
def _fused() -> Callable[..., Tensor] | None:
    """The CUDA version that stores no probabilities, or None without Triton (an optional part of torch's wheels)."""
    try:
        from gptq_compile.passes.gptq.received_triton import received_fused
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); attention probabilities are made in memory.", error)
        return None
    return received_fused


def received_attention(args: tuple[Any, ...], kwargs: dict[str, Any], sequences: int = 1) -> Tensor:
    """Received attention of every token in one layer.

    Args:
        args: arguments of ``gptq_compile::attention``, whose tokens belong to ``sequences`` of the same length.
        kwargs: its keyword arguments.
        sequences: how many there are.

    Returns:
        float32 ``[n]``: mean over heads of ``sum_q A[q, t]^2``, the sum over the queries of t's sequence.
    """
    q, k, _, scale, *rest = args
    names = ("window", "softcap", "sinks", "alibi_slopes")
    options = dict(zip(names, [0, 0.0, None, None], strict=True)) | dict(zip(names, rest, strict=False)) | kwargs
    q, k = (t.reshape(sequences, -1, *t.shape[2:]) for t in (q, k))
    if q.is_cuda and (fused := _fused()) is not None:
        return fused(q, k, scale, *(options[name] for name in names)).reshape(-1)
    n = q.shape[1]
    pos = torch.arange(n, device=q.device)
    total = torch.zeros(sequences, n, dtype=torch.float32, device=q.device)
    for i in range(sequences):
        for start in range(0, n, _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            scores = attention_scores(
                q[i, rows], k[i], pos[rows], pos, scale, options["window"], options["softcap"], options["alibi_slopes"]
            )
            total[i] += softmax_with_sinks(scores, options["sinks"]).square_().sum(1).mean(0)
    return total.reshape(-1)


def downstream_attention(program: Program) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node, the attention nodes whose keys or values depend on it."""
    target = torch.ops.gptq_compile.attention.default
    reach: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in reversed(program.graph.nodes):
        found: frozenset[fx.Node] = frozenset()
        for user in node.users:
            found |= reach.get(user, frozenset())
            if user.target is target and node in user.args[1:3]:
                found |= {user}
        reach[node] = found
    return reach


def token_weights(received: dict[fx.Node, Tensor], layers: frozenset[fx.Node], strength: float) -> Tensor | None:
    """Token weights ``d_t`` ``[n]`` of a linear (or None for equal weights).

    Args:
        received: attention node -> received attention ``[n]`` of one sequence.
        layers: the attention nodes downstream of the linear.
        strength: weight of received attention against the token's own prediction.
    """
    # In the order of the dict, which is the graph's: a set's changes from process to process, and with it the rounding.
    chosen = [value for layer, value in received.items() if layer in layers]
    if not chosen or strength == 0:
        return None
    return 1 + strength * torch.stack(chosen).sum(0)
