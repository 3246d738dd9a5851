# SPDX-License-Identifier: Apache-2.0
"""Hooks that make transformers emit our ops while a model is traced: no code per architecture.

transformers calls a registered attention function with queries, keys and values before any GQA expansion or mask, and
a registered mask function with a predicate on positions. We emit one ``gptq_compile::attention`` for the first and
classify the predicate by evaluating it for the second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import gptq_compile.passes.dialect  # noqa: F401  registers the ops
from gptq_compile.errors import ModelError

IMPLEMENTATION = "gptq_compile"
_WINDOW = "_gptq_compile_window"
_PROBE = 1 << 17  # a query position beyond every sliding window in use


def visible_window(mask_function: Callable[..., Any]) -> int:
    """Classifies a transformers mask predicate ``f(batch, head, q, kv) -> bool`` by evaluating it.

    Returns:
        0 if a query sees every earlier position, ``w`` if it sees the last ``w`` positions including its own.

    Raises:
        ModelError: if the predicate is neither (chunked, bidirectional, prefix-LM ... attention).
    """
    zero = torch.zeros((), dtype=torch.long)
    window = None
    for q in (_PROBE, _PROBE - 1, _PROBE - 4097, 8191, 100, 13, 1, 0):
        kv = torch.arange(q + 64)
        seen = mask_function(zero, zero, torch.tensor(q), kv)
        seen = torch.as_tensor(seen).expand(kv.shape)
        if window is None:
            window = int(seen.sum())
        expected = (kv <= q) & (kv > q - window)
        if not torch.equal(seen, expected):
            raise ModelError(
                "The model masks attention in a way that is neither causal nor a sliding window (query position "
                f"{q} does not see exactly the last {window} positions). Such masks are not supported yet."
            )
    assert window is not None
    return 0 if window == _PROBE + 1 else window


def mask_hook(*args: Any, mask_function: Callable[..., Any], device: Any = None, **kwargs: Any) -> Tensor:
    """Mask function for transformers: returns a marker tensor that carries the window it stands for."""
    with _disable_current_modes():
        window = visible_window(mask_function)
    marker = torch.empty((1, 1, 1, 1), dtype=torch.bool, device=device)
    setattr(marker, _WINDOW, window)
    return marker


def attention_hook(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: emits one ``gptq_compile::attention``.

    Args:
        query: ``[1, heads, n, head_dim]``; key and value alike with their own head count.
        attention_mask: what :func:`mask_hook` returned, or None for a plain causal module.

    Raises:
        ModelError: if the model changed the mask on its way, or attends both ways.
    """
    if attention_mask is None:
        if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
            raise ModelError(
                f"{type(module).__name__} attends in both directions; only causal decoders can be compiled."
            )
        window = 0
    else:
        window = getattr(attention_mask, _WINDOW, -1)
        if window < 0:
            raise ModelError(
                f"{type(module).__name__} computes its own attention mask, whose meaning the trace cannot see. "
                "Retrying with the model's eager attention may raise it by pattern."
            )
    if sliding_window:
        window = min(window, sliding_window) if window else sliding_window
    bias = kwargs.get("position_bias")
    if bias is not None:
        raise ModelError(f"{type(module).__name__} adds a learned position bias to attention, which is not supported.")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out = torch.ops.gptq_compile.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale,
        window,
        float(softcap or 0.0),
        s_aux,
        None,
    )
    return out, None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Registers the hooks with transformers for the duration of a trace."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    AttentionInterface.register(IMPLEMENTATION, attention_hook)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_hook)
    # The trace holds one sequence, so there is nothing to detect about packed ones; the detection would otherwise
    # put position_ids into the mask predicate.
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield
