# SPDX-License-Identifier: Apache-2.0
"""Perplexity by the protocol of the GPTQ papers: non-overlapping windows, each scored on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gptq_compile.errors import ConfigError


class Scorer(Protocol):
    """What perplexity needs of an engine."""

    def nll(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Negative log-likelihood in nats of ids[1:], float64 [n - 1]."""
        ...


@dataclass(frozen=True)
class Perplexity:
    """A measurement.

    Attributes:
        perplexity: exp(mean nll) over all scored tokens. ``nll``: that mean, in nats.
        stderr: standard error of the mean nll over windows (nats); 0 for one window.
        windows: windows scored. ``window``: tokens of each. ``tokens``: tokens scored, ``windows * (window - 1)``.
        per_window: mean nll of every window, in nats.
    """

    perplexity: float
    nll: float
    stderr: float
    windows: int
    window: int
    tokens: int
    per_window: tuple[float, ...]


def perplexity(
    engine: Scorer,
    ids: NDArray[np.int64],
    *,
    window: int = 1024,
    windows: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Scores the first ``windows`` non-overlapping windows of a text; each scores its tokens 1 and later.

    Args:
        engine: scores one window at a time.
        ids: token ids of the whole text, int64 [n].
        window: tokens of one window.
        windows: most windows; None for all that the text has (an incomplete last one is left out).
        on_window: called with (windows done, windows in all, perplexity so far).

    Raises:
        ConfigError: if the window is too short or the text has fewer tokens than one window.
    """
    if window < 2:
        raise ConfigError(f"The window is {window} tokens; it takes 2 at least, because the first is not scored.")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows is {windows}; it must be 1 or more.")
    count = len(ids) // window
    if count == 0:
        raise ConfigError(
            f"The text has {len(ids)} tokens, fewer than one window of {window}. Give a longer text or a smaller "
            "--window."
        )
    count = min(count, windows or count)
    means: list[float] = []
    for i in range(count):
        means.append(float(engine.nll(ids[i * window : (i + 1) * window]).mean()))
        if on_window is not None:
            on_window(i + 1, count, math.exp(sum(means) / len(means)))
    mean = sum(means) / count
    spread = float(np.std(means, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Perplexity(math.exp(mean), mean, spread, count, window, count * (window - 1), tuple(means))
