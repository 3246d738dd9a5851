# SPDX-License-Identifier: Apache-2.0
"""What the host does between the model and the sampler, for sequences that ask for it.

Log-probabilities are read from the logits before anything changes them; a constraint rules tokens out. Either takes the
logits to the host and back, so such a batch runs one step at a time.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gptq_compile.runtime.device import CpuDevice

if TYPE_CHECKING:
    from gptq_compile.runtime.sequence import Sequence


class Constraint(Protocol):
    """Decides which tokens may come next, for one sequence."""

    def allowed(self) -> np.ndarray:
        """bool [vocab]; at least one is True."""
        ...

    def accept(self, token: int) -> None:
        """Takes note of a generated token."""
        ...


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token it generated, before temperature, penalties and constraints.

    Attributes:
        token: its id. ``logprob``: natural logarithm of its probability.
        top: the most likely tokens and theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def needs_host(sequences: Rows[Sequence]) -> bool:
    """Whether any sequence wants its logits on the host."""
    return any(s.constraint is not None or s.settings.logprobs is not None for s in sequences)


def through_host(device: CpuDevice, logits: Any, sequences: Rows[Sequence]) -> Any:
    """Shows every sequence its row of logits, and rules out what their constraints do not allow.

    Args:
        device: where the logits are.
        logits: float32 [rows, vocab]; rows beyond the sequences are left alone.
        sequences: one for each of the first rows.

    Returns:
        The same tensor.
    """
    rows = device.download(logits)
    changed = False
    for row, sequence in zip(rows, sequences, strict=False):
        if sequence.settings.logprobs is not None:
            sequence.seen_logits = row.copy()
        if sequence.constraint is not None:
            row[~sequence.constraint.allowed()] = -np.inf
            changed = True
    if changed:
        device.upload(logits, rows)
    return logits


def token_logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """Log-probability of a token, and of the ``count`` likeliest, from one row of logits float32 [vocab]."""
    values = logits - logits.max()
    values -= np.log(np.exp(values).sum())
    count = min(count, len(values))
    top = np.argpartition(values, -count)[-count:] if count else np.empty(0, "int64")
    top = top[np.lexsort((top, -values[top]))]
    return TokenLogprob(token, float(values[token]), tuple((int(i), float(values[i])) for i in top))
