# SPDX-License-Identifier: Apache-2.0
"""What a compilation will do, known from shapes before anything expensive is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gptq_compile.checkpoint import reader
from gptq_compile.checkpoint.settings import words
from gptq_compile.checkpoint.writer import check_is_linear, check_shape
from gptq_compile.errors import PassError
from gptq_compile.frontend.source import ModelSource
from gptq_compile.options import CHECKPOINTS, CompileOptions
from gptq_compile.passes.adopt_codes import AdoptCodes
from gptq_compile.passes.budget import stored_bits
from gptq_compile.passes.gptq.config import BITS
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.normalize import Normalize
from gptq_compile.passes.pipeline import lowering_passes, storing_passes, trace_passes
from gptq_compile.passes.program import Program
from gptq_compile.passes.quantize_experts import matrix_shape
from gptq_compile.passes.round_head import head_config
from gptq_compile.passes.stages import quantizable
from gptq_compile.passes.tune_scales import TuneScales


@dataclass(frozen=True)
class Plan:
    """What a compilation will do, known from shapes alone.

    Attributes:
        name, model_type, parameters, context_length: the model.
        linears: linears that will be quantized; ``quantized_parameters``: their weights.
        bytes_before: the checkpoint's weights as float16. ``bytes_after``: the artifact's weights.
        bits_per_weight: average over the quantized weights, scales and zero points included; the bound where bits are
            chosen by ``avg_bits`` or ``max_size``.
        memory: estimated peak bytes of quantization. ``settings``: the resolved options.
        checkpoint: says so if the model is quantized already and its codes are taken as they are.
    """

    name: str
    model_type: str
    parameters: int
    context_length: int
    linears: int
    quantized_parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    memory: int
    settings: dict[str, Any]
    checkpoint: str | None = None


def make_plan(program: Program, source: ModelSource, options: CompileOptions) -> Plan:
    """Sizes from shapes; the program is as traced, so linears are counted on a normalized copy."""
    probe = program.clone()
    Normalize().run(probe)
    config = options.quantize
    if options.stop_after is not None:
        _check_pass(options, program, source)
    if source.quantization is not None:
        return _plan_adopted(probe, source, options)
    linears = {n.args[1]: n for n in reversed(quantizable(probe, config.quantize_lm_head))}
    shapes = {weight: matrix_shape(node) for weight, node in reversed(linears.items())}  # in graph order
    weights = quantized = 0
    for node, (rows, columns) in shapes.items():
        if not config.budgeted:
            config.validate_for_layer(columns, node.meta["param"])
        if options.format in CHECKPOINTS:
            check_is_linear(node.meta["param"], node.meta["val"].dim())
            for bits in BITS if config.budgeted else (config.wbits,):
                check_shape(node.meta["param"], rows, columns, bits)
        quantized += rows * columns
        weights += stored_bits(rows, columns, config) // 8
    parameters = source.parameter_count
    rest = _rest(probe, options, parameters - quantized, not config.quantize_lm_head)
    if config.avg_bits is not None:
        weights = math.floor(config.avg_bits * quantized / 8)
    elif config.max_size is not None:
        weights = max(0, config.max_size - rest)
    after = weights + rest
    largest = max((math.prod(shape) for shape in shapes.values()), default=0)
    hidden = max((columns for _, columns in shapes.values()), default=0)
    # Experts have a Hessian each.
    experts = max((int(n.meta["val"].shape[0]) for n in shapes if n.meta["val"].dim() == 3), default=1)
    tokens = config.nsamples * config.seqlen if config.method == "gptq" else 0
    memory = parameters * 4 + 4 * (3 * largest + (2 + experts) * hidden * hidden) + 4 * tokens * hidden
    return Plan(
        name=source.name,
        model_type=source.config.model_type,
        parameters=parameters,
        context_length=source.context_length,
        linears=len(linears),
        quantized_parameters=quantized,
        bytes_before=2 * parameters,
        bytes_after=after,
        bits_per_weight=8 * weights / quantized if quantized else 0.0,
        memory=memory,
        settings=options.as_dict(),
    )


def _check_pass(options: CompileOptions, program: Program, source: ModelSource) -> None:
    """Refuses to stop after a pass that is not in the pipeline."""
    config = options.quantize
    adopted = source.quantization is not None
    known = [
        p.name
        for p in [
            *trace_passes(),
            AdoptCodes(source.codes) if adopted else GptqQuantize(config),
            *([TuneScales(config, program, None)] if config.tune_epochs else []),
            *(_compiling(options) if options.format == "artifact" else []),
        ]
    ]
    if options.stop_after not in known:
        raise PassError(f"There is no pass called {options.stop_after!r}. The pipeline has: {', '.join(known)}.")


def _compiling(options: CompileOptions) -> list[Pass]:
    target, dtype = options.resolved_target, options.resolved_dtype
    stored = storing_passes(target, dtype, options.resolved_lm_head_bits)
    return [*stored, *lowering_passes(target, dtype, cache=options.resolved_kv_cache)]


def _rest(program: Program, options: CompileOptions, parameters: int, head: bool) -> int:
    """Bytes of what is not quantized; of those, a head is rounded to fewer bits and matrices are 16 bits wide."""
    total = 0
    if head and options.resolved_lm_head_bits:
        heads = set(quantizable(program, True)) - set(quantizable(program, False))
        for weight in {n.args[1] for n in heads}:
            rows, columns = (int(d) for d in weight.meta["val"].shape)
            total += stored_bits(rows, columns, head_config(options.resolved_lm_head_bits, columns)) // 8
            if heads.issuperset(weight.users):  # else it is the embedding's table as well
                parameters -= rows * columns
    width = 4 if options.format != "artifact" and options.resolved_dtype == "float32" else 2
    return total + width * parameters  # norms and biases of artifacts, wider at times, are next to nothing


def _plan_adopted(program: Program, source: ModelSource, options: CompileOptions) -> Plan:
    """The plan for a model that is quantized already."""
    assert source.quantization is not None
    for name, weight in source.codes.items():
        if options.format in CHECKPOINTS:
            check_shape(name, weight.shape[0], weight.shape[1], weight.bits)
    quantized = sum(math.prod(weight.shape) for weight in source.codes.values())
    weights = sum(reader.stored_bits(weight) for weight in source.codes.values()) // 8
    parameters = source.parameter_count
    return Plan(
        name=source.name,
        model_type=source.config.model_type,
        parameters=parameters,
        context_length=source.context_length,
        linears=len(source.codes),
        quantized_parameters=quantized,
        bytes_before=2 * parameters,
        bytes_after=weights + _rest(program, options, parameters - quantized, False),
        bits_per_weight=8 * weights / quantized,
        memory=2 * quantized + 4 * (parameters - quantized),
        settings=options.as_dict(),
        checkpoint=words(source.quantization),
    )
