# SPDX-License-Identifier: Apache-2.0
"""Where the time of a quantization goes, by phase, without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class Phases:
    """Seconds of named phases."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Any, Any]] = []

    def add(self, name: str, start: Any, end: Any) -> None:
        """Adds a span between two CUDA events, or two clock readings."""
        self._spans.append((name, start, end))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in the order in which phases first ended; waits for the device."""
        total: dict[str, float] = {}
        for name, start, end in self._spans:
            if isinstance(start, float):
                span = end - start
            else:
                end.synchronize()
                span = start.elapsed_time(end) / 1000
            total[name] = total.get(name, 0.0) + span
        return total


_current: ContextVar[Phases | None] = ContextVar("phases", default=None)


@contextmanager
def collect() -> Iterator[Phases]:
    """Collects the phases that end inside."""
    phases = Phases()
    token = _current.set(phases)
    try:
        yield phases
    finally:
        _current.reset(token)


@contextmanager
def phase(name: str, device: torch.device) -> Iterator[None]:
    """Counts what is done inside, on ``device``, as a phase; does nothing where nobody collects. Phases do not nest."""
    phases = _current.get()
    if phases is None:
        yield
        return
    start = _now(device)
    try:
        yield
    finally:
        phases.add(name, start, _now(device))


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
