# SPDX-License-Identifier: Apache-2.0
"""Peak of a process's own (anonymous) memory while something runs, by looking every few milliseconds (Linux)."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import torch

from gptq_compile.passes.gptq.heap import trim_heap

_PAUSE = 0.003


class HostPeak:
    """``with HostPeak() as peak: ...``; then ``peak.bytes`` is the most memory beyond what was held at the start."""

    def __enter__(self) -> HostPeak:
        gc.collect()
        trim_heap(torch.device("cpu"))  # or what was freed before would be counted as held, and used again
        self._done = threading.Event()
        self._start = self._most = _anonymous()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._most - self._start

    def _look(self) -> None:
        while not self._done.wait(_PAUSE):
            self._most = max(self._most, _anonymous())


def _anonymous() -> int:
    """Bytes in memory that are not of a file, such as a library."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
