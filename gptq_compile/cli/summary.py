# SPDX-License-Identifier: Apache-2.0
"""The plan before the work and the table after it."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from rich import box
from rich.table import Table
from rich.text import Text

from gptq_compile.cli.output import duration, size

if TYPE_CHECKING:
    from gptq_compile.api import CompileResult, Plan
    from gptq_compile.options import CompileOptions
    from gptq_compile.passes.gptq_quantize import LinearReport


def plan_table(plan: Plan, options: CompileOptions) -> Table:
    """What will be done, as two columns."""
    q = options.quantize
    table = _two_columns("plan")
    _row(
        table,
        "model",
        f"{plan.name} ({plan.model_type}), {_count(plan.parameters)} parameters, context {plan.context_length}",
    )
    batches = ", ".join(map(str, options.batch_buckets))
    if options.format == "artifact":
        target = f"{options.resolved_target}, activations {options.resolved_dtype}, decode batches {batches}"
        _row(table, "target", target)
    else:
        onnx = "ONNX for onnxruntime and onnxruntime-genai, activations float32"
        _row(table, "format", onnx if options.format == "onnx" else f"{options.format}, a checkpoint for other tools")
    share = plan.quantized_parameters / plan.parameters if plan.parameters else 0.0
    _row(
        table,
        "quantize",
        f"{plan.linears} linears, {_count(plan.quantized_parameters)} weights ({share:.0%})"
        + (f": {_grid(options)}" if plan.checkpoint is None else ""),
    )
    if plan.checkpoint is not None:
        _row(table, "method", plan.checkpoint)
    elif q.method == "gptq":
        order = ["act-order" if q.act_order else "natural order"]
        order += ["static groups"] if q.act_order and q.static_groups else []
        order += ["MSE grids"] if q.clips else []
        order += [f"token weighting by {q.token_weighting}"] if q.token_weighting != "none" else []
        _row(table, "method", f"GPTQ, {', '.join(order)}, damp {q.damp:g}, sequential {q.sequential}")
        if q.tune_epochs:
            written = f" and {q.tune_nsamples} sequences that the model writes" if q.tune_nsamples else ""
            what = f"scales and norm weights tuned on the calibration tokens{written}, {q.tune_epochs} epochs"
            _row(table, "then", what)
        tokens = min(q.seqlen, plan.context_length)
        source = "text the model generates" if options.calibration == "self" else options.calibration
        _row(table, "calibration", f"{q.nsamples} x {tokens} tokens, {source}, seed {q.seed}")
    else:
        _row(table, "method", "round to nearest" + (", MSE grids" if q.clips else ""))
    ratio = plan.bytes_before / plan.bytes_after if plan.bytes_after else 0.0
    _row(
        table,
        "weights",
        f"{size(plan.bytes_before)} in float16 -> {size(plan.bytes_after)} ({ratio:.2f}x smaller; "
        f"{plan.bits_per_weight:.2f} bits a quantized weight)",
    )
    _row(table, "memory", f"about {size(plan.memory)} to quantize; this machine has {_memory()}")
    _row(table, "disk", f"about {size(disk_needed(plan, options))} into {options.out}; {size(disk_free(options))} free")
    if options.dequantized is not None:
        _row(table, "also", f"{size(4 * plan.parameters)} of dequantized weights into {options.dequantized}")
    return table


def result_table(result: CompileResult, options: CompileOptions) -> Table:
    """Seconds of every stage, quality of the layers, size of what was made."""
    from gptq_compile.cli.reporters import STAGES

    table = _two_columns("result")
    for name, seconds in result.seconds.items():
        _row(table, STAGES.get(name, name), duration(seconds))
    _row(table, "all together", duration(sum(result.seconds.values())), end_section=True)
    if errors := mean_errors(result.reports):
        error, rtn = errors
        change = f", {abs(1 - error / rtn):.0%} {'less' if error <= rtn else 'MORE'}" if rtn else ""
        _row(table, "mean layer error", f"{error:.3g} against {rtn:.3g} of rounding{change}")
    q = options.quantize
    if fallen := [r for r in result.reports if r.method not in (q.method, "checkpoint")]:
        _row(
            table, "not by GPTQ", f"{len(fallen)} linears, first {fallen[0].name}: {fallen[0].note or fallen[0].method}"
        )
    if damped := [r for r in result.reports if r.damp > 1.001 * q.damp]:
        _row(table, "damped more", f"{len(damped)} linears, first {damped[0].name}: {damped[0].damp:g}")
    if tuning := result.tuning:
        _row(
            table,
            "tuned scales",
            tuning["kept_untuned"]
            or f"divergence {tuning['divergence_before']:.3g} -> {tuning['divergence_after']:.3g} nats a token",
        )
    if result.out is not None:
        kind = {"artifact": "artifact", "onnx": "export"}.get(result.format, "checkpoint")
        _row(table, kind, f"{size(result.size)} in {result.out}")
        _row(table, "report", ", ".join(map(str, options.report_paths)))
    return table


def next_step(result: CompileResult, dry_run: bool) -> str:
    """What to type now."""
    if dry_run:
        return "Dry run: nothing was written."
    if result.out is None:
        return "Stopped where you asked; no artifact was written."
    if result.format == "onnx":
        return f"Load {result.out / 'model.onnx'} with onnxruntime, or the folder with onnxruntime-genai."
    if result.format != "artifact":
        path = _path(result.out)
        return f"Load it with transformers, GPTQModel or vLLM: {path}\nCompile it: gptq-compile {path}"
    return f"Try it: {run_command(result.out)}"


def run_command(out: Path) -> str:
    """The command that runs an artifact."""
    return f"gptq-compile run {_path(out)} {shlex.quote('What is a compiler?')}"


def _path(out: Path) -> str:
    relative = os.path.relpath(out)
    return shlex.quote(relative if not relative.startswith("..") else str(out))


def mean_errors(reports: Sequence[LinearReport]) -> tuple[float, float] | None:
    """Mean relative layer error and that of rounding, over the linears where both were measured."""
    both = [(r.error, r.error_rtn) for r in reports if measured(r.error) and measured(r.error_rtn)]
    if not both:
        return None
    return sum(e for e, _ in both) / len(both), sum(r for _, r in both) / len(both)


def measured(error: float | None) -> TypeGuard[float]:
    """Whether an error is a number; rounding without a Hessian measures none."""
    return error is not None and math.isfinite(error)


def disk_needed(plan: Plan, options: CompileOptions) -> int:
    """Bytes the artifact will take: weights, tokenizer, kernels and runtime libraries."""
    return plan.bytes_after + (30_000_000 if options.resolved_target.kind == "cuda" else 12_000_000)


def disk_free(options: CompileOptions) -> int:
    """Free bytes of the disk that OUT lies on."""
    place = options.out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _row(table: Table, name: str, words: str, end_section: bool = False) -> None:
    """Adds a row of plain text: names and notes may hold brackets, which rich would take for markup."""
    table.add_row(Text(name), Text(words), end_section=end_section)


def _two_columns(title: str) -> Table:
    table = Table(
        box=box.SIMPLE, show_header=False, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _grid(options: CompileOptions) -> str:
    q = options.quantize
    group = "one group per row" if q.group_size == -1 else f"groups of {q.group_size}"
    head = ", lm_head too" if q.quantize_lm_head else ""
    if not head and options.resolved_lm_head_bits:
        head = f"; lm_head rounded to {options.resolved_lm_head_bits} bits"
    bits = f"{q.wbits} bits" if not q.budgeted else f"bits by measured sensitivity, {_bound(options)}"
    return (
        f"{bits}, {group if not q.budgeted else group + ' or smaller'}, {'symmetric' if q.sym else 'asymmetric'}{head}"
    )


def _bound(options: CompileOptions) -> str:
    q = options.quantize
    if q.avg_bits is not None:
        return f"{q.avg_bits:g} a weight on average with scales and zero points"
    if q.max_size is not None:
        return f"all weights in {size(q.max_size)}"
    return f"perplexity up by {q.max_ppl_increase:.2%} at most"


def _count(n: int) -> str:
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= limit:
            return f"{n / limit:.1f}{unit}"
    return str(n)


def _memory() -> str:
    try:
        return size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError):
        return "an unknown amount"
