# SPDX-License-Identifier: Apache-2.0
"""Writes a quantized program as a GPTQ checkpoint that transformers, GPTQModel and vLLM load."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_compile import __version__
from gptq_compile.artifact.dequantized import dequantized_weights
from gptq_compile.artifact.model_folder import SHARD_BYTES, Stored, write_model_folder
from gptq_compile.checkpoint.config import FILE, VERSIONS
from gptq_compile.checkpoint.layout import pack, pack_zeros, words_for
from gptq_compile.errors import ConfigError, OutputError
from gptq_compile.frontend.source import ModelSource
from gptq_compile.passes.common import Node, is_call
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.program import ParamStore, Program

ops = torch.ops.gptq_compile

_TRANSPOSED = ".T"  # ends the name of a parameter that Normalize turned into a linear's weight
_IN_BLOCK = re.compile(r"\.\d+\.")  # in the path of a module of a repeated block


@dataclass(frozen=True)
class _Linear:
    """A quantized linear of the program: the names of its parameters, and the module it becomes."""

    module: str
    base: str
    bits: int
    group: int
    in_features: int
    out_features: int
    zeros: bool
    permuted: bool


def check_shape(name: str, rows: int, columns: int, bits: int) -> None:
    """Refuses a linear whose codes do not fill 32-bit words.

    Args:
        name: its weight. ``rows``, ``columns``: output and input features. ``bits``: of a code.

    Raises:
        ConfigError: naming the weight.
    """
    for features, which in ((columns, "input"), (rows, "output")):
        if features * bits % 32 or (bits == 3 and features % 32):
            raise ConfigError(
                f"{name} has {features} {which} features, which codes of {bits} bits do not fill 32-bit words with, so "
                "readers of GPTQ checkpoints do not take it. Compile it without --format, or choose other bits."
            )


def check_is_linear(name: str, dimensions: int) -> None:
    """Refuses the weights of experts, which the model holds in one tensor.

    Raises:
        ConfigError: naming the weight.
    """
    if dimensions != 2:
        raise ConfigError(
            f"{name} holds the weights of all experts of a layer, which are not written as a GPTQ checkpoint yet. "
            "Compile the model without --format."
        )


def write_checkpoint(
    program: Program,
    source: ModelSource,
    config: QuantizeConfig,
    out: str | os.PathLike[str],
    *,
    form: str = "gptq",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint of a program after ``gptq_quantize`` and before ``pack_weights``.

    Linears of the repeated blocks, and the head, are stored as codes; others, which readers expect as float weights,
    are stored dequantized. Everything that is not quantized is stored as in the source, tuned norm weights in float32.

    Args:
        program: quantized. ``source``: what it was made from. ``config``: how, for the notes in the config.
        out: a place that does not exist or is an empty folder.
        form: ``gptq`` or ``gptq_v2``.
        dtype: of what is not quantized; by default the source's if it has 16 bits, else float16.
        shard_bytes: most bytes of one file.
        overwrite: replace a folder with a ``config.json`` that is there.

    Returns:
        The folder.

    Raises:
        OutputError: the folder exists, the disk is full, or a zero point is 0 and the format cannot store that.
        ConfigError: the format has no place for a weight.
    """
    version = VERSIONS[form]
    found = _linears(program)
    overrides = dequantized_weights(program)
    head = [*found][-1:] if config.quantize_lm_head else []  # nothing depends on it, so it is the last
    linears = {}
    for weight, linear in found.items():
        if _IN_BLOCK.search(linear.module) or weight in head:
            check_shape(weight, linear.out_features, linear.in_features, linear.bits)
            linears[weight] = linear
    dtype = dtype or _float_type(source)
    params = source.params
    tensors: dict[str, Stored] = {}
    for name in [*params, *(w for w in found if params.canonical(w) != w)]:
        stored = params.dtype(name)
        stored = dtype if stored.is_floating_point else stored
        if name in linears:
            tensors |= _tensors(program.params, linears[name], version)
        elif name in overrides:
            tensors[name] = Stored(params.shape(name), torch.float32, overrides[name])
        else:
            tensors[name] = Stored(params.shape(name), stored, partial(params.get, name))
    quantization = _quantization(linears.values(), [x for w, x in found.items() if w not in linears], config, form)
    written = json.loads(source.config_json())
    written.pop("torch_dtype", None)
    written |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    if any(params.canonical(weight) != weight for weight in found):
        written["tie_word_embeddings"] = False
    extra = {FILE: json.dumps(quantization, indent=2).encode()}
    return write_model_folder(source, tensors, written, out, extra=extra, shard_bytes=shard_bytes, overwrite=overwrite)


def _linears(program: Program) -> dict[str, _Linear]:
    """Parameter name -> the quantized linear on it."""
    found: dict[str, _Linear] = {}
    for node in program.graph.nodes:
        if is_call(node, ops.quant_expert_linear.default):
            check_is_linear(node.args[1].meta["param"].removesuffix(".codes"), 3)
        if not is_call(node, ops.quant_linear.default):
            continue
        _, codes, _, zeros, g_idx, _, bits, group = node.args
        base = codes.meta["param"].removesuffix(".codes")
        weight = base.removesuffix(_TRANSPOSED)
        if not weight.endswith(".weight"):
            raise ConfigError(f"{weight} is no weight of a linear module, so a GPTQ checkpoint has no place for it.")
        rows, columns = program.params.shape(codes.meta["param"])
        permuted = g_idx is not None and not _natural(program.params, g_idx, group)
        module = weight.removesuffix(".weight")
        found[weight] = _Linear(module, base, bits, group, columns, rows, zeros is not None, permuted)
    return found


def _natural(params: ParamStore, g_idx: Node, group: int) -> bool:
    index = params.get(g_idx.meta["param"]).long()
    return torch.equal(index, torch.arange(len(index)) // group)


def _float_type(source: ModelSource) -> torch.dtype:
    stored = source.config.dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def _tensors(params: ParamStore, linear: _Linear, version: int) -> dict[str, Stored]:
    """The tensors of one linear."""
    base, bits, k, n = linear.base, linear.bits, linear.in_features, linear.out_features
    groups = params.shape(f"{base}.scales")[1]

    def qweight() -> Tensor:
        return pack(params.get(f"{base}.codes").t(), bits)

    def qzeros() -> Tensor:
        if linear.zeros:
            zeros = params.get(f"{base}.zeros").t()
        else:
            zeros = torch.full((groups, n), 1 << (bits - 1), dtype=torch.uint8)
        try:
            return pack_zeros(zeros, bits, version)
        except ValueError:
            count = int((zeros == 0).sum())
            raise OutputError(
                f"{linear.module} has {count} groups with zero point 0, which the format gptq, that stores zero points "
                "minus 1, cannot hold in a way that all readers understand. Write it with --format gptq_v2."
            ) from None

    def g_idx() -> Tensor:
        if linear.permuted:
            return params.get(f"{base}.g_idx")
        return torch.arange(k, dtype=torch.int32) // linear.group

    return {
        f"{linear.module}.qweight": Stored((words_for(k, bits), n), torch.int32, qweight),
        f"{linear.module}.qzeros": Stored((groups, words_for(n, bits)), torch.int32, qzeros),
        f"{linear.module}.scales": Stored(
            (groups, n), torch.float16, lambda: params.get(f"{base}.scales").t().contiguous()
        ),
        f"{linear.module}.g_idx": Stored((k,), torch.int32, g_idx),
    }


def _quantization(
    linears: Iterable[_Linear], floats: Iterable[_Linear], config: QuantizeConfig, form: str
) -> dict[str, Any]:
    """``quantization_config``: the settings of most linears, and those of others by name."""
    every = list(linears)
    whole = all(linear.group == linear.in_features for linear in every)
    grids = Counter((linear.bits, -1 if whole else linear.group) for linear in every)
    bits, group = grids.most_common(1)[0][0]
    dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(linear.module)}$": {} for linear in floats}
    for linear in every:
        own = -1 if whole else linear.group
        if (linear.bits, own) != (bits, group):
            dynamic[f"+:^{re.escape(linear.module)}$"] = {"bits": linear.bits, "group_size": own}
    permuted = any(linear.permuted for linear in every)
    return {
        "bits": bits,
        "group_size": group,
        "desc_act": permuted,
        "sym": not any(linear.zeros for linear in every),
        "lm_head": any(not _IN_BLOCK.search(linear.module) for linear in every),
        "quant_method": "gptq",
        "checkpoint_format": form,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {
            "quantizer": [f"gptq-compile:{__version__}"],
            "damp_percent": config.damp,
            "static_groups": not permuted,
            "true_sequential": config.sequential == "true",
        },
    }
