# SPDX-License-Identifier: Apache-2.0
"""``compile_model``: the whole path from a Hugging Face model to an artifact, one stage after another."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from gptq_compile.artifact.contents import library_name, manifest
from gptq_compile.artifact.dequantized import dequantized_weights, write_dequantized
from gptq_compile.artifact.files import StagedFolder
from gptq_compile.artifact.model_folder import is_model
from gptq_compile.artifact.tensors import HEADER_BYTES
from gptq_compile.artifact.writer import ArtifactWriter
from gptq_compile.calibration import SELF, load_calibration
from gptq_compile.checkpoint.settings import settled
from gptq_compile.checkpoint.writer import write_checkpoint
from gptq_compile.frontend.source import ModelSource, load_source
from gptq_compile.frontend.trace import trace
from gptq_compile.inspect_artifact import inspect_artifact
from gptq_compile.kernels.runtime_libs import copy_runtime_libraries, runtime_libraries
from gptq_compile.options import CHECKPOINTS, CompileOptions
from gptq_compile.passes.adopt_codes import AdoptCodes
from gptq_compile.passes.budget import BudgetedQuantize, Footprint
from gptq_compile.passes.gptq.world import current, join
from gptq_compile.passes.gptq_quantize import GptqQuantize, LinearReport
from gptq_compile.passes.manager import Pass, PassManager, PassRecord
from gptq_compile.passes.memory_plan import plan_memory
from gptq_compile.passes.pipeline import lowering_passes, storing_passes, trace_passes
from gptq_compile.passes.program import Program
from gptq_compile.passes.round_head import RoundHead
from gptq_compile.passes.tune_scales import TuneScales
from gptq_compile.plan import Plan, make_plan
from gptq_compile.report.page import page, write_report
from gptq_compile.report.record import Recorder
from gptq_compile.runtime.trace import Trace
from gptq_compile.workdir.work import Work

log = logging.getLogger(__name__)

# Translation validation runs the whole model twice a pass; beyond this many weights it would cost more than it tells.
_VALIDATE_PARAMETERS = 500_000_000


class Progress(Protocol):
    """Where the stages of a compilation are reported."""

    def stage(self, name: str) -> None:
        """A stage starts."""

    def plan(self, plan: Plan) -> None:
        """What will be done, before anything expensive is."""

    def linear(self, report: LinearReport, index: int, total: int) -> None:
        """Linear ``index`` of ``total`` was quantized."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """A :class:`Progress` that says nothing."""

    def stage(self, name: str) -> None: ...

    def plan(self, plan: Plan) -> None: ...

    def linear(self, report: LinearReport, index: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class CompileResult:
    """What a compilation made.

    Attributes:
        out: what was made, or None after ``stop_after``, a dry run, or in a process beside torchrun's first.
        format: of it, as in the options.
        plan: what was planned. ``seconds``: stage -> wall time. ``reports``: one a linear.
        passes: one record a pass. ``size``: bytes of the artifact. ``tuning``: what tuning scales did, if asked for.
    """

    out: Path | None
    plan: Plan
    seconds: dict[str, float]
    reports: list[LinearReport] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    size: int = 0
    tuning: dict[str, Any] | None = None
    format: str = "artifact"


class _Stopped(Exception):
    """``stop_after`` was reached."""


def compile_model(options: CompileOptions, progress: Progress | None = None, *, dry_run: bool = False) -> CompileResult:
    """Compiles a model into an artifact folder, or quantizes it into a GPTQ checkpoint (``options.format``).

    Processes that ``torchrun`` started share the quantization; what is made is the first one's.

    Args:
        options: settings.
        progress: told about stages, the plan and every finished linear.
        dry_run: stop after the plan.

    Returns:
        Where the artifact is and what happened.

    Raises:
        GptqCompileError: with a sentence that says what was wrong, where, and what to do.
    """
    join(torch.device(options.resolved_device))
    if current().rank:  # torchrun: the first process keeps the work folder, reports and writes
        options, progress = replace(options, work_dir=None, resume=False, trace=None), None
    with (
        Work.open(None if dry_run else options.work_dir, options.resume) as work,
        Trace(options.trace) as trace,
        Recorder(progress or Silent(), trace) as recorder,
    ):
        result = _compile(options, recorder, dry_run, work)
        if result.out is not None:
            made = inspect_artifact(result.out) if options.format == "artifact" else None
            write_report(options.report_paths, page(result, recorder, made))
            result = replace(result, size=_size(result.out))
        return result


def _compile(options: CompileOptions, progress: Recorder, dry_run: bool, work: Work) -> CompileResult:
    clock = _Clock(progress)
    target, dtype, world = options.resolved_target, options.resolved_dtype, current()
    overwrite = options.overwrite or work.claimed(options.out)
    if world.rank == 0:
        _output(options, overwrite).check()
    with clock("open"):
        source = load_source(
            options.model,
            revision=options.revision,
            offline=options.offline,
            trust_remote_code=options.trust_remote_code,
        )
        options = settled(options, source.quantization, source.name)
        work.depend_on_settings(options)
        work.depend_on_model(source)
    for note in source.notes:
        progress.note(note)
    if options.format == "gptq" and not options.quantize.sym:
        progress.note(
            "GPTQModel takes asymmetric checkpoints of format gptq only from itself; write --format gptq_v2 for it."
        )
    adopted = source.quantization is not None  # codes are taken as they are
    calibrated = options.quantize.method == "gptq" and not adopted
    from_text = calibrated and options.calibration != SELF
    calibration = None
    if from_text:  # a bad file is found before anything slow
        with clock("calibrate"):
            calibration = world.agree(torch.from_numpy(_calibration(source, options, progress, work)))
    with clock("trace"):
        program = trace(source.config, source.params, name=source.name, source=source.source)
    plan = make_plan(program, source, options)
    progress.plan(plan)
    if world.rank == 0:
        _output(options, overwrite, plan.bytes_after).check()
    if dry_run:
        return CompileResult(None, plan, clock.seconds)
    if options.format == "artifact":
        runtime_libraries(target)  # a target without any is found before anything slow
    work.claim(options.out)
    small = source.parameter_count <= _VALIDATE_PARAMETERS
    if options.validate and not small:
        progress.note(
            f"Passes are not validated by running the model: it has more than {_VALIDATE_PARAMETERS // 10**6} million "
            "weights."
        )
    manager = _Manager(options, small, progress)
    quantize: GptqQuantize | AdoptCodes | None = None
    try:
        with clock("raise"):
            manager.run(trace_passes(), program)
            if options.format == "onnx":  # an op without a form in ONNX is found before anything slow
                from gptq_compile.onnx.export import products
                from gptq_compile.onnx.lowering import Lowering

                Lowering(program, products(options.onnx_ops)).run()
        if calibrated and not from_text:
            with clock("calibrate"):
                calibration = world.agree(torch.from_numpy(_calibration(source, options, progress, work)))
        tuned_on = calibration
        if options.quantize.tune_nsamples and calibration is not None:  # before anything that could be lost
            with clock("text"):
                tuned_on = world.agree(_with_text_to_tune_on(calibration, source, options, progress, work))
        with clock("quantize"):
            if work.solutions:
                progress.note(f"{len(work.solutions)} linears were finished by an earlier run and are taken over.")
            if options.quantize.method == "gptq" and calibration is not None:
                count, tokens = calibration.shape
                memory = plan_memory(program, options.quantize, count, tokens, torch.device(options.resolved_device))
                progress.note("memory: " + "; ".join(f"{what} {kept}" for what, kept in memory.lines()))
            original = program.clone()  # shares the parameters, which are read when asked for
            if adopted:
                quantize = AdoptCodes(source.codes, progress.linear)
                program.attrs["checkpoint"] = plan.checkpoint
            else:
                quantize = _quantizer(options, calibration, progress, work)
            manager.run([quantize], program)
        if options.quantize.tune_epochs:
            with clock("tune"):
                tune = TuneScales(options.quantize, original, tuned_on, options.resolved_device, progress.note)
                manager.run([tune], program)
        reports = quantize.reports
        if world.rank:
            return CompileResult(None, plan, clock.seconds, reports, manager.records)
        if options.format == "artifact":
            stored = storing_passes(target, dtype, options.resolved_lm_head_bits, options.resolved_device)
            manager.run(stored, program)
            reports = [*reports, *(r for step in stored if isinstance(step, RoundHead) for r in step.reports)]
        if options.dequantized is not None:
            with clock("dequantize"):
                again = work.claimed(options.dequantized)
                StagedFolder(options.dequantized, overwrite=is_model if again else None).check()
                work.claim(options.dequantized)
                # Other formats keep what is not quantized as it came.
                kept = getattr(torch, dtype) if options.format == "artifact" else torch.float32
                weights = dequantized_weights(program, kept)
                write_dequantized(source, weights, options.dequantized, overwrite=again)
        if options.format == "onnx":
            from gptq_compile.onnx.export import write_onnx

            with clock("export"):
                write_onnx(
                    program,
                    source,
                    options.as_dict(),
                    options.out,
                    ops=options.onnx_ops,
                    accuracy_level=options.accuracy_level,
                    overwrite=overwrite,
                )
            return _result(options, plan, clock, reports, manager, program)
        if options.format in CHECKPOINTS:
            with clock("checkpoint"):
                floats = None if options.dtype is None else getattr(torch, options.dtype)
                place, form = options.out, options.format
                write_checkpoint(program, source, options.quantize, place, form=form, dtype=floats, overwrite=overwrite)
            return _result(options, plan, clock, reports, manager, program)
        with clock("lower"):
            manager.run(lowering_passes(target, dtype, options.resolved_device, options.resolved_kv_cache), program)
    except _Stopped:
        return CompileResult(None, plan, clock.seconds, quantize.reports if quantize else [], manager.records)
    from gptq_compile.passes.build import build
    from gptq_compile.passes.lower_to_relax import lower_to_relax

    with ArtifactWriter(options.out, overwrite=overwrite, disk_needed=plan.bytes_after) as writer:
        with clock("kernels"):
            lowered = [
                lower_to_relax(program, variant, options.batch_buckets, activations=options.resolved_activations)
                for variant in target.variants
            ]
        with clock("build"):
            names = ["", *(f" {variant.archs[0]}" for variant in target.variants[1:])]
            pool = ThreadPoolExecutor(os.cpu_count())  # code generation is not Python
            # Waited for twice: a signal may interrupt the first time, and what is written later would stay behind.
            with pool, pool:
                built = list(
                    pool.map(
                        lambda each, variant, name: build(
                            each.module,
                            variant,
                            writer.place(library_name(target, variant)),
                            on_step=lambda step: progress.build_step(step, name),
                        ),
                        lowered,
                        target.variants,
                        names,
                    )
                )
        with clock("write"):
            for path in copy_runtime_libraries(target, writer.place("lib/x").parent):
                log.debug("library %s", path)
            writer.add_weights((name, program.params.get(name)) for name in lowered[0].weights)
            writer.add_files(source.tokenizer_files)
            writer.add_file(source.config_json(), "config.json")
            writer.add_file(source.generation_json(), "generation_config.json")
            writer.finish(manifest(program, source, options, lowered, built))
    return _result(options, plan, clock, reports, manager, program)


def _output(options: CompileOptions, overwrite: bool, disk_needed: int = 0) -> StagedFolder | ArtifactWriter:
    """The folder to make, to check its place and disk before anything slow."""
    if options.format == "artifact":
        return ArtifactWriter(options.out, overwrite=overwrite, disk_needed=disk_needed)
    from gptq_compile.onnx.export import is_export

    replaceable = is_model if options.format in CHECKPOINTS else is_export
    return StagedFolder(options.out, overwrite=replaceable if overwrite else None, disk_needed=disk_needed)


def _result(
    options: CompileOptions,
    plan: Plan,
    clock: _Clock,
    reports: list[LinearReport],
    manager: _Manager,
    program: Program,
) -> CompileResult:
    tuning = program.attrs.get("tuning")
    return CompileResult(
        options.out, plan, clock.seconds, reports, manager.records, _size(options.out), tuning, options.format
    )


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


class _Clock:
    """Times stages and reports them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.progress.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


class _Manager:
    """Runs parts of the pipeline through one PassManager each, with dumps numbered across all of them."""

    def __init__(self, options: CompileOptions, validate: bool, recorder: Recorder) -> None:
        self.options, self.validate, self.recorder = options, options.validate and validate, recorder
        self.records: list[PassRecord] = []

    def run(self, passes: Any, program: Program) -> None:
        stop = self.options.stop_after
        names = [p.name for p in passes]
        manager = PassManager(
            list[Pass](passes),
            validate=self.validate,
            dump_ir=self.options.dump_ir,
            first_index=len(self.records),
            stop_after=stop if stop in names else None,
            reproducer=self.options.reproducer,
            on_pass=self.recorder.pass_begins,
            on_text=self.recorder.pass_ends,
        )
        manager.run(program)
        self.records += manager.records
        if stop is not None and stop in names:
            raise _Stopped


def _quantizer(
    options: CompileOptions, calibration: torch.Tensor | None, progress: Progress, work: Work
) -> GptqQuantize:
    config, device = options.quantize, options.resolved_device
    if not config.budgeted:
        return GptqQuantize(config, calibration, device, progress.linear, work.solutions)
    width = getattr(torch, options.resolved_dtype).itemsize
    footprint = Footprint(options.resolved_target, width, options.resolved_lm_head_bits, HEADER_BYTES)
    return BudgetedQuantize(
        config, calibration, device, progress.linear, work.solutions, footprint=footprint, note=progress.note
    )


def _with_text_to_tune_on(
    calibration: torch.Tensor, source: ModelSource, options: CompileOptions, progress: Progress, work: Work
) -> torch.Tensor:
    """The calibration sequences, and those that the model writes for tuning."""
    from gptq_compile.self_text import text_to_tune_on

    seqlen, device = calibration.shape[1], options.resolved_device
    written = text_to_tune_on(source, options.quantize, seqlen, device, progress.note, work.remember)
    return torch.cat([calibration, torch.from_numpy(written)])


def _calibration(source: ModelSource, options: CompileOptions, progress: Progress, work: Work) -> Any:
    from gptq_compile.self_text import generator, settings_for

    config = options.quantize
    seqlen = min(config.seqlen, source.context_length)
    settings = settings_for(config.nsamples, seqlen, config.seed, options.resolved_device)
    generate = None
    if options.calibration == SELF:
        total = config.nsamples * seqlen
        generate = work.remember(generator(source, options.resolved_device, total, progress.note))
    ids = load_calibration(
        options.calibration, source.tokenizer, settings, vocab_size=source.vocab_size, generate=generate
    )
    work.depend_on_calibration(ids)
    return ids
