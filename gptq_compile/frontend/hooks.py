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
from torch.overrides import TorchFunctionMode
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
        try:
            seen = mask_function(zero, zero, torch.tensor(q), kv)
        except RuntimeError as e:
            raise ModelError(
                "The model masks attention by a rule that reads other tensors than the positions of query and key, "
                f"such as chunked attention with padding; such masks are not supported yet ({e})."
            ) from e
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


def experts_hook(module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function for transformers: two ``gptq_compile::expert_linear`` around the module's own gate.

    Args:
        module: an experts module, which describes itself (``has_gate``, ``has_bias``, ``is_transposed`` ...).
        hidden_states: ``[n, hidden]``.
        top_k_index: ``[n, k]`` the experts of each token. ``top_k_weights``: ``[n, k]`` their shares.

    Returns:
        ``[n, hidden]``.
    """
    n, k = top_k_index.shape
    # Older releases of transformers describe fewer of these.
    gated, has_bias = getattr(module, "has_gate", True), getattr(module, "has_bias", False)
    transposed = bool(getattr(module, "is_transposed", False))

    def linear(x: Tensor, name: str) -> Tensor:
        bias = getattr(module, f"{name}_bias") if has_bias else None
        return torch.ops.gptq_compile.expert_linear(x, getattr(module, name), top_k_index, bias, transposed)

    x = hidden_states.unsqueeze(1).expand(n, k, hidden_states.shape[-1])
    x = linear(x, "gate_up_proj" if gated else "up_proj")
    x = linear(module._apply_gate(x) if gated else module.act_fn(x), "down_proj")  # type: ignore[operator]
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)  # type: ignore[operator]
    return (x * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


class KeepConstants(TorchFunctionMode):
    """Keeps the values of constants that a model makes while it is traced on meta, where they would be lost.

    ``x[..., [3], :]`` becomes a slice (torch would make a tensor of the list on the device of ``x``), and
    ``torch.tensor(values, device="meta")`` is made on the CPU first.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            x, index = args
            items = index if isinstance(index, tuple) else (index,)
            plain = tuple(_as_slice(i) for i in items)
            if any(a is not b for a, b in zip(items, plain, strict=True)):
                return func(x, plain)
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            if isinstance(args[0], int | float):
                full = {k: v for k, v in kwargs.items() if k in ("dtype", "device")}
                full.setdefault("dtype", torch.tensor(args[0]).dtype)
                return torch.full((), args[0], **full)
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _as_slice(item: Any) -> Any:
    if not (isinstance(item, list) and item and all(type(i) is int for i in item)):
        return item
    first, last = item[0], item[-1]
    if item != list(range(first, first + len(item))) or first < 0 <= last:
        return item
    return slice(first, last + 1 if last != -1 else None)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Registers the hooks with transformers for the duration of a trace."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(IMPLEMENTATION, attention_hook)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_hook)
    ExpertsInterface.register(IMPLEMENTATION, experts_hook)
    # The trace holds one sequence, so there is nothing to detect about packed ones; the detection would otherwise
    # put position_ids into the mask predicate.
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield
