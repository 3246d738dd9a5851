# SPDX-License-Identifier: Apache-2.0
"""Remembers what a run reported and when, and samples its memory meanwhile."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_compile.api import Plan, Progress
    from gptq_compile.passes.gptq_quantize import LinearReport

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
    """

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self.began = time.time()
        self.stages: list[tuple[str, float]] = []
        self.notes: list[str] = []
        self.solved: list[float] = []
        self.samples: list[Sample] = []

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
        self._inner.stage(name)

    def plan(self, plan: Plan) -> None:
        self._inner.plan(plan)

    def linear(self, report: LinearReport, index: int, total: int) -> None:
        self.solved.append(self.seconds)
        self._inner.linear(report, index, total)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._inner.note(text)

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
