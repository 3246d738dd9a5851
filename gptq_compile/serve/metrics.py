# SPDX-License-Identifier: Apache-2.0
"""Counters, gauges and histograms in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "gptq_compile_"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Counter:
    """A sum for each set of label values."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self._labels = PREFIX + name, text, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, count: float, *labels: str) -> None:
        """Adds to the sum of these label values."""
        self._values[labels] = self._values.get(labels, 0) + count

    def lines(self) -> list[str]:
        """One line for each set of label values."""
        return [f"{self.name}{_labels(self._labels, key)} {value:g}" for key, value in sorted(self._values.items())]


class Reading:
    """A value that is asked for when it is shown; a gauge, or a counter that something else keeps."""

    def __init__(self, name: str, text: str, read: Callable[[], float], kind: str = "gauge") -> None:
        self.name, self.text, self.kind, self._read = PREFIX + name, text, kind, read

    def lines(self) -> list[str]:
        """One line."""
        return [f"{self.name} {self._read():g}"]


class Histogram:
    """How many values were at most so large, for growing bounds."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.text, self._bounds = PREFIX + name, text, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Takes one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> list[str]:
        """Cumulative counts, the sum and the count."""
        lines, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{self.name}_sum {self._sum:.6f}", f"{self.name}_count {total}"]


def render(metrics: Sequence[Counter | Reading | Histogram]) -> str:
    """The whole page."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    escaped = (v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for v in values)
    return "{" + ",".join(f'{n}="{v}"' for n, v in zip(names, escaped, strict=True)) + "}"
