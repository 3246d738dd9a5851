# SPDX-License-Identifier: Apache-2.0
"""How a compilation is reported: bars on a terminal, plain lines elsewhere, or JSON events."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from gptq_compile.cli import summary
from gptq_compile.cli.output import duration, json_line, show

if TYPE_CHECKING:
    from gptq_compile.api import CompileResult, Plan
    from gptq_compile.options import CompileOptions
    from gptq_compile.passes.gptq_quantize import LinearReport

STAGES = {
    "open": "opening the model",
    "trace": "tracing",
    "raise": "recognising ops",
    "calibrate": "making calibration sequences",
    "text": "letting the model write text to tune on",
    "quantize": "quantizing",
    "tune": "tuning scales",
    "dequantize": "writing the dequantized model",
    "export": "writing the ONNX model",
    "checkpoint": "writing the checkpoint",
    "lower": "lowering",
    "kernels": "choosing kernels",
    "build": "compiling to machine code",
    "write": "writing the artifact",
}
_PLAIN_SECONDS = 5.0  # off a terminal, finished linears are told at most this often


class Reporter(Protocol):
    """:class:`gptq_compile.api.Progress` with a beginning and an end."""

    def __enter__(self) -> Reporter: ...

    def __exit__(self, *error: Any) -> None: ...

    def loading(self) -> None:
        """The compiler is being imported, which takes seconds."""

    def stage(self, name: str) -> None: ...

    def plan(self, plan: Plan) -> None: ...

    def linear(self, report: LinearReport, index: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, result: CompileResult, *, dry_run: bool) -> None:
        """All is done."""

    def failed(self, error: Exception) -> None:
        """It ended with an error, which is printed elsewhere too."""


def reporter(options: CompileOptions, *, as_json: bool) -> Reporter:
    """The reporter that suits stdout."""
    if as_json:
        return JsonReporter(options)
    return TerminalReporter(options) if sys.stdout.isatty() else PlainReporter(options)


class _Timed:
    """Remembers the stage that runs and since when."""

    def __init__(self, options: CompileOptions) -> None:
        self.options = options
        self._current: str | None = None
        self._since = time.monotonic()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def _switch(self, name: str | None) -> tuple[str | None, float]:
        """Starts a stage; returns the one before and its seconds."""
        now = time.monotonic()
        before, self._current = self._current, name
        seconds, self._since = now - self._since, now
        return before, seconds


class PlainReporter(_Timed):
    """Lines for logs: one when a stage starts, one now and then while linears are solved."""

    def __init__(self, options: CompileOptions) -> None:
        super().__init__(options)
        self._told = 0.0

    def loading(self) -> None: ...

    def stage(self, name: str) -> None:
        self._done()
        self._switch(name)
        _say(f"{STAGES.get(name, name)} ...")

    def plan(self, plan: Plan) -> None:
        self._done()
        show(summary.plan_table(plan, self.options))

    def linear(self, report: LinearReport, index: int, total: int) -> None:
        now = time.monotonic()
        if index < total and now - self._told < _PLAIN_SECONDS:
            return
        self._told = now
        left = (now - self._since) / index * (total - index)
        _say(
            f"  {index}/{total} {report.name}: {_errors(report)}, about {duration(left)} left",
        )

    def note(self, text: str) -> None:
        _say(f"  {text}")

    def finish(self, result: CompileResult, *, dry_run: bool) -> None:
        self._done()
        if not dry_run:
            show(summary.result_table(result, self.options))
        _say(summary.next_step(result, dry_run))

    def failed(self, error: Exception) -> None: ...

    def _done(self) -> None:
        name, seconds = self._switch(None)
        if name is not None and seconds >= 1:
            _say(f"  done in {duration(seconds)}")


class TerminalReporter(_Timed):
    """A bar for the stage that runs, a line for each that is over."""

    def __init__(self, options: CompileOptions) -> None:
        super().__init__(options)
        self.console = Console(highlight=False)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[detail]}"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._task: Any = None

    def __enter__(self) -> TerminalReporter:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def loading(self) -> None:
        self._start("loading the compiler", None)

    def stage(self, name: str) -> None:
        self._done()
        self._start(STAGES.get(name, name), name)

    def plan(self, plan: Plan) -> None:
        self._done()
        self.console.print(summary.plan_table(plan, self.options))

    def linear(self, report: LinearReport, index: int, total: int) -> None:
        detail = f"{report.name} {_errors(report)}"
        self._bars.update(self._task, completed=index, total=total, count=f"{index}/{total}", detail=detail)

    def note(self, text: str) -> None:
        self.console.print(Text(f"  {text}", style="dim"))

    def finish(self, result: CompileResult, *, dry_run: bool) -> None:
        self._done()
        self._bars.stop()
        if not dry_run:
            self.console.print(summary.result_table(result, self.options))
        self.console.print(summary.next_step(result, dry_run), markup=False, style="bold", soft_wrap=True)

    def failed(self, error: Exception) -> None:
        self._bars.stop()

    def _start(self, words: str, name: str | None) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._switch(name)
        self._task = self._bars.add_task(words, total=None, count="", detail="")

    def _done(self) -> None:
        name, seconds = self._switch(None)
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if name is not None:
            self.console.print(f"[green]✓[/] {STAGES.get(name, name)} [dim]{duration(seconds)}[/]")


class JsonReporter(_Timed):
    """One JSON object a line on stdout, each with its ``event`` and ``time`` in seconds since the start."""

    def __init__(self, options: CompileOptions) -> None:
        super().__init__(options)
        self._began = time.monotonic()

    def loading(self) -> None: ...

    def stage(self, name: str) -> None:
        self._event("stage", name=name)

    def plan(self, plan: Plan) -> None:
        self._event(
            "plan", **dataclasses.asdict(plan), out=str(self.options.out), disk_free=summary.disk_free(self.options)
        )

    def linear(self, report: LinearReport, index: int, total: int) -> None:
        self._event("linear", index=index, total=total, **dataclasses.asdict(report))

    def note(self, text: str) -> None:
        self._event("note", text=text)

    def finish(self, result: CompileResult, *, dry_run: bool) -> None:
        errors = summary.mean_errors(result.reports)
        self._event(
            "done",
            dry_run=dry_run,
            out=str(result.out) if result.out is not None else None,
            size=result.size,
            seconds=result.seconds,
            passes=[dataclasses.asdict(p) for p in result.passes],
            error=errors[0] if errors else None,
            error_rtn=errors[1] if errors else None,
            tuning=result.tuning,
            format=result.format,
            command=summary.run_command(result.out) if result.out is not None and result.format == "artifact" else None,
        )

    def failed(self, error: Exception) -> None:
        self._event("error", type=type(error).__name__, message=str(error))

    def _event(self, event: str, **values: Any) -> None:
        json_line({"event": event, "time": round(time.monotonic() - self._began, 3), **_finite(values)})


def _finite(value: Any) -> Any:
    """NaN and infinity as null: they are not JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _say(line: str) -> None:
    print(line, flush=True)


def _errors(report: LinearReport) -> str:
    """``error 0.0123 (rounding 0.0310), damp 0.01``; rounding alone is not measured."""
    if not summary.measured(report.error) or not summary.measured(report.error_rtn):
        return f"{report.bits} bits, {'taken over' if report.method == 'checkpoint' else 'rounded'}"
    text = f"error {report.error:.2g} (rounding {report.error_rtn:.2g}), damp {report.damp:g}"
    return f"{text}, {report.note}" if report.note and report.method == "rtn" else text
