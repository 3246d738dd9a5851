# SPDX-License-Identifier: Apache-2.0
"""Remembers what a run reported and when, samples its memory meanwhile, and writes its trace."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from gptq_compile.report.changes import changes, folded
from gptq_compile.runtime.trace import Trace

if TYPE_CHECKING:
    from gptq_compile.api import Plan, Progress
    from gptq_compile.passes.gptq_quantize import LinearReport
    from gptq_compile.passes.manager import PassRecord

_EVERY = 0.25  # seconds between two samples at first
_SAMPLES = 2000  # most that are kept; beyond, every other is dropped and the interval doubled


@dataclass(frozen=True)
class Sample:
    """Memory at one time.

    Attributes:
        seconds: since the start. ``resident``: bytes of the process in memory. ``device``: bytes of tensors on the GPU.
    """

    seconds: float
    resident: int
    device: int


class Recorder:
    """A :class:`gptq_compile.api.Progress` that remembers and passes on; a context manager.

    Attributes:
        began: seconds since the epoch at the start.
        stages: (name, seconds since the start) of each stage. ``notes``: what was noted.
        solved: seconds since the start at which each linear was reported.
        samples: memory over the run.
        changes: what each pass did to the program's text. ``texts``: the text before the first pass and after the last;
            in both, layers that are alike stand once.
        build: seconds of each step from the lowered module to the library.
    """

    def __init__(self, inner: Progress, trace: Trace | None = None) -> None:
        self._inner, self._trace = inner, trace or Trace()
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self.began = time.time()
        self.stages: list[tuple[str, float]] = []
        self.notes: list[str] = []
        self.solved: list[float] = []
        self.samples: list[Sample] = []
        self.changes: list[tuple[str, ...]] = []
        self.texts: dict[str, list[str]] = {}
        self.build: dict[str, float] = {}
        self._steps: dict[str, tuple[str, float]] = {}  # library -> what is done for it, and since when

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def stage(self, name: str) -> None:
        self.stages.append((name, self.seconds))
        self._trace.enter("stages", name)
        self._inner.stage(name)

    def plan(self, plan: Plan) -> None:
        self._inner.plan(plan)

    def linear(self, report: LinearReport, index: int, total: int) -> None:
        self.solved.append(self.seconds)
        told = {"bits": report.bits, "error": report.error, "rounding": report.error_rtn, "seconds": report.seconds}
        self._trace.did("linears", report.name, report.seconds, method=report.method, **told)
        self._inner.linear(report, index, total)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._trace.mark("stages", text)
        self._inner.note(text)

    def pass_begins(self, name: str) -> None:
        """A pass starts."""
        self._trace.enter("passes", name)

    def pass_ends(self, record: PassRecord, before: str, after: str) -> None:
        """A pass is over; ``before`` and ``after`` are the program's text."""
        self._trace.enter("passes", None)
        self.changes.append(changes(before, after))
        self.texts.setdefault("before", folded(before.splitlines()))
        self.texts["after"] = folded(after.splitlines())

    def build_step(self, name: str | None, library: str = "") -> None:
        """A step of a build starts; None after the last. ``library`` is added to names where several are built."""
        self._trace.enter(f"build{library}", name)
        now = time.perf_counter()
        if library in self._steps:
            last, began = self._steps.pop(library)
            self.build[last] = self.build.get(last, 0.0) + now - began
        if name is not None:
            self._steps[library] = (f"{name}{library}", now)

    def _sample(self) -> None:
        every = _EVERY
        while True:
            self.samples.append(Sample(self.seconds, resident_bytes(), _device_bytes()))
            if len(self.samples) >= _SAMPLES:
                del self.samples[1::2]
                every *= 2
            if self._stop.wait(every):
                return


def resident_bytes() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _device_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
