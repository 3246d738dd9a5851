# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face folder with the dequantized weights, so that anybody can check the compiled model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from gptq_compile.artifact.model_folder import SHARD_BYTES, Stored, write_model_folder
from gptq_compile.errors import OutputError
from gptq_compile.frontend.source import ModelSource
from gptq_compile.passes.dialect import dequantize
from gptq_compile.passes.dialect_experts import dequantize_experts
from gptq_compile.passes.lower_precision import LowerPrecision, stored_suffix
from gptq_compile.passes.program import ParamStore, Program

_TRANSPOSED = ".T"  # ends the name of a parameter that Normalize turned into a linear's weight


def dequantized_weights(program: Program, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Tensor]]:
    """What a quantized program multiplies by, and what else changed, under the checkpoint's names: the norm weights
    that were tuned, and matrices and biases that are stored in half precision.

    Args:
        program: after ``gptq_quantize`` and before ``pack_weights``.
        dtype: in which it will compute.

    Returns:
        Parameter name -> function that makes the float32 weight in the checkpoint's shape.
    """
    params = program.params

    def weight(name: str, nodes: Sequence[fx.Node | None], bits: int, group: int) -> Tensor:
        codes, scales, zeros, g_idx = (None if n is None else params.get(n.meta["param"]) for n in nodes)
        assert codes is not None and scales is not None
        made = dequantize(codes, scales, zeros, g_idx, bits, group)
        return made.t().contiguous() if name.endswith(_TRANSPOSED) else made

    def experts(name: str, nodes: Sequence[fx.Node | None], bits: int, group: int) -> Tensor:
        codes, scales, zeros = (None if n is None else params.get(n.meta["param"]) for n in nodes)
        assert codes is not None and scales is not None
        made = dequantize_experts(codes, scales, zeros, bits, group)
        return made.transpose(1, 2).contiguous() if name.endswith(_TRANSPOSED) else made

    def halved(params: ParamStore, name: str) -> Tensor:
        made = params.get(name).float()
        return made.t().contiguous() if name.endswith(_TRANSPOSED) else made

    def shifted(name: str, by: float) -> Tensor:
        return params.get(name) - by

    found: dict[str, Callable[[], Tensor]] = {}
    for node in program.graph.nodes:
        if node.target is torch.ops.gptq_compile.quant_linear.default:
            _, codes, scales, zeros, g_idx, _, bits, group = node.args
            name = codes.meta["param"].removesuffix(".codes")
            found[name.removesuffix(_TRANSPOSED)] = partial(weight, name, (codes, scales, zeros, g_idx), bits, group)
        elif node.target is torch.ops.gptq_compile.quant_expert_linear.default:
            _, codes, scales, zeros, _, _, bits, group = node.args
            name = codes.meta["param"].removesuffix(".codes")
            found[name.removesuffix(_TRANSPOSED)] = partial(experts, name, (codes, scales, zeros), bits, group)
    for name in program.attrs.get("halved", ()):
        base = params.canonical(name)
        found[base.removesuffix(_TRANSPOSED)] = partial(halved, params, base)
    if dtype != torch.float32:
        lowered = program.clone()
        LowerPrecision(dtype).run(lowered)
        for name in lowered.param_nodes:
            base = params.canonical(name.removesuffix(stored_suffix(dtype)))
            if lowered.params.dtype(name) == dtype != params.dtype(base):
                found[base.removesuffix(_TRANSPOSED)] = partial(halved, lowered.params, name)
    for name in program.attrs.get("tuned_norms", ()):
        base, shift = program.attrs.get("shifted", {}).get(name, (name, 0))
        found[base] = partial(shifted, name, shift)
    return found


def write_dequantized(
    source: ModelSource,
    overrides: Mapping[str, Tensor | Callable[[], Tensor]],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes a folder that ``AutoModelForCausalLM.from_pretrained`` loads, one tensor in memory at a time.

    Args:
        source: the model; gives every tensor that is not overridden, config, generation config and tokenizer.
        overrides: parameter name -> dequantized weight of the parameter's shape, or a function that makes it. One for
            a tied parameter (an ``lm_head`` that shares the embedding) unties it.
        out: a place that does not exist or is an empty folder.
        dtype: of the floating-point tensors: float32, float16 or bfloat16.
        shard_bytes: most bytes of one file.
        overwrite: replace a folder with a ``config.json`` that is there.

    Returns:
        The folder.

    Raises:
        OutputError: the folder exists, the disk is full, or an override does not fit the model.
    """
    params = source.params.copy()
    plan: dict[str, Callable[[], Tensor]] = {name: partial(params.get, name) for name in params}
    for name, value in overrides.items():
        if name not in params:
            raise OutputError(f"There is no parameter {name!r} in {source.name} to override.")
        plan[name] = _fitting(name, params.shape(name), value)
    untied = any(params.canonical(name) != name for name in overrides)
    tensors = {
        name: Stored(params.shape(name), _stored(params.dtype(name), dtype), load) for name, load in plan.items()
    }
    config = json.loads(source.config_json())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    if untied:
        config["tie_word_embeddings"] = False
    return write_model_folder(source, tensors, config, out, shard_bytes=shard_bytes, overwrite=overwrite)


def _fitting(name: str, shape: tuple[int, ...], value: Tensor | Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A loader of an override that makes sure of its shape."""

    def load() -> Tensor:
        tensor = value if isinstance(value, Tensor) else value()
        if tuple(tensor.shape) != shape:
            raise OutputError(f"The override of {name!r} has shape {list(tensor.shape)}, the model's is {list(shape)}.")
        return tensor

    return load


def _stored(dtype: torch.dtype, floating: torch.dtype) -> torch.dtype:
    """What a tensor is written as: floating-point ones as asked, others as they are."""
    return floating if dtype.is_floating_point else dtype
